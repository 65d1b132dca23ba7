// Options by name: the table of what they are called and mean, and the parser of methods written as text. Command
// lines, the environment, Python, JSON and the C interface read and write options by these alone.
#pragma once

#include <array>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn {

// Names an enum's values, in their order: the value i goes by values[i].
template <class Enum>
struct Names;

template <>
struct Names<Permutation> {
  static constexpr std::array<std::string_view, 4> values{"none", "last_queries", "learned", "arrival"};
};
template <>
struct Names<OrderScope> {
  static constexpr std::array<std::string_view, 2> values{"query_head", "kv_head"};
};
template <>
struct Names<BlockScore> {
  static constexpr std::array<std::string_view, 13> values{
      "none",           "mean_pool",        "per_query", "antidiagonal", "antidiagonal_causal",
      "exact",          "mean_pool_causal", "sampled",   "energy",       "dual_band",
      "vertical_slash", "flexible",         "two_step"};
};
template <>
struct Names<KeepRule> {
  static constexpr std::array<std::string_view, 9> values{"all",     "top_p", "threshold",      "relative", "top_k",
                                                          "density", "none",  "vertical_slash", "coverage"};
};
template <>
struct Names<Correction> {
  static constexpr std::array<std::string_view, 2> values{"none", "mean"};
};
template <>
struct Names<Rules> {
  static constexpr std::array<std::string_view, 2> values{"reference_code", "paper"};
};
template <>
struct Names<Precision> {
  static constexpr std::array<std::string_view, 3> values{"automatic", "f32", "bf16"};
};
template <>
struct Names<Fallback> {
  static constexpr std::array<std::string_view, 2> values{"never", "when_faster"};
};

// Returns a value's name, "" if it has none.
template <class Enum>
constexpr std::string_view name_of(Enum value) {
  const auto i = static_cast<std::size_t>(value);
  return i < Names<Enum>::values.size() ? Names<Enum>::values[i] : std::string_view();
}

// Returns an option's value as text formats have it: an enum's name, a number as it is.
template <class Field>
constexpr auto plain_value(Field field) {
  if constexpr (std::is_enum_v<Field>)
    return name_of(field);
  else
    return field;
}

// Tells of an option what people read in help, tables and messages.
struct OptionInfo {
  std::string_view name;     // of its field: "top_p"
  std::string_view rule;     // what a value is, "a number in (0, 1]"; "" where it is any of an enum's names
  std::string_view meaning;  // what it sets, and of which methods if not of all
  bool by_head = false;      // whether the query heads of a plan may differ in it
};

// Calls visit(info, field...) for each option, in the order of Options' fields. `options` are structs with fields of
// these names, Options or pbsattn_options; each gives one field. A row here is all that makes a field of these two
// structs an option everywhere.
template <class Visitor, class... AnyOptions>
constexpr void visit_option_rows(Visitor&& visit, AnyOptions&... options) {
  constexpr bool by_head = true;
  using Row = OptionInfo;
  visit(Row{"permutation", "", "how keys move inside their segment before blocks are formed"}, options.permutation...);
  visit(Row{"order_scope", "",
            "whose order of keys there is, each query head's or each KV head's; of methods that permute"},
        options.order_scope...);
  visit(Row{"score", "", "estimate of a block's attention mass that the keep rule reads"}, options.score...);
  visit(Row{"keep", "", "rule by which a row's blocks are kept", by_head}, options.keep...);
  visit(Row{"correction", "", "what stands for the blocks that a row doesn't attend to"}, options.correction...);
  visit(Row{"rules", "", "which one holds where the paper and its code differ"}, options.rules...);
  visit(Row{"precision", "one of bf16, f32, automatic", "what products are computed in"}, options.precision...);
  visit(Row{"fallback", "", "whether full attention is taken where that is expected to be faster"},
        options.fallback...);
  visit(Row{"top_p", "a number in (0, 1]",
            "attention mass that the kept blocks hold by their scores, in (0, 1]; of methods that keep by top_p or "
            "coverage",
            by_head},
        options.top_p...);
  visit(Row{"threshold", "a number in [0, 1]",
            "least share of a row's attention of a kept block, in [0, 1]; of methods that keep by threshold, or by "
            "relative as a share of the row's highest",
            by_head},
        options.threshold...);
  visit(Row{"floor_top_p", "a number in [0, 1]",
            "attention mass that a threshold must leave by the scores, in [0, 1]; 0 turns it off; of methods that keep "
            "by threshold",
            by_head},
        options.floor_top_p...);
  visit(Row{"top_k", "a whole number of blocks", "blocks that a row keeps; of methods that keep by top_k", by_head},
        options.top_k...);
  visit(Row{"density", "a number in [0, 1]",
            "share of its causal blocks that a row keeps, in [0, 1]; of methods that keep by density", by_head},
        options.density...);
  visit(Row{"vertical", "a whole number of columns",
            "columns that a head keeps; of methods that keep by vertical_slash", by_head},
        options.vertical...);
  visit(Row{"slash", "a whole number of diagonals",
            "diagonals that a head keeps; of methods that keep by vertical_slash", by_head},
        options.slash...);
  visit(Row{"tau", "a number in [0, 1]",
            "distance of two distributions from which on a head goes by columns and distances, in [0, 1]; of methods "
            "that keep by coverage",
            by_head},
        options.tau...);
  visit(
      Row{"min_budget", "a whole number of tokens",
          "tokens of columns, and of distances, that a head keeps at least; of methods that keep by coverage", by_head},
      options.min_budget...);
  visit(Row{"block", "a whole number of tokens", "tokens of a query block and of a key block"}, options.block...);
  visit(Row{"segment", "a whole number of tokens", "tokens inside which keys move; a multiple of the block of 128"},
        options.segment...);
  visit(Row{"dense_last_rows", "a whole number of query blocks",
            "the prompt's last blocks of queries that attend to everything", by_head},
        options.dense_last_rows...);
  visit(Row{"sink_blocks", "a whole number of blocks",
            "first blocks of the permuted sequence that every row attends to", by_head},
        options.sink_blocks...);
  visit(Row{"local_blocks", "a whole number of blocks", "last blocks up to its own that every row attends to", by_head},
        options.local_blocks...);
  visit(Row{"scale", "a number from 0 up",
            "factor on q . k; 0: 1 / sqrt(head_dim); in llama.cpp the model's own is taken"},
        options.scale...);
  visit(
      Row{"expected_density", "a number in [0, 1]",
          "share of causal blocks that the fallback reckons with, in [0, 1]; 0: what was measured at about the length"},
      options.expected_density...);
  visit(Row{"softcap", "a number from 0 up",
            "c of logits c * tanh(q . k * scale / c); 0: none; in llama.cpp the model's own is taken"},
        options.softcap...);
  visit(Row{"window", "a whole number of tokens",
            "tokens that a query sees, itself the last; where the sequence is longer, all that is computed; in "
            "llama.cpp the model's own is taken"},
        options.window...);
  visit(Row{"threshold_tokens", "a number from 0 up",
            "tokens over which a threshold goes on: it is at most this over the tokens up to the row's end; 0 turns "
            "that off; of methods that keep by threshold",
            by_head},
        options.threshold_tokens...);
  visit(Row{"two_step_queries", "a whole number of queries",
            "queries of a row that score all blocks by their means; of methods that score by two_step"},
        options.two_step_queries...);
  visit(Row{"two_step_exact", "a whole number of queries",
            "queries of a row that score likely blocks by their keys; of methods that score by two_step"},
        options.two_step_exact...);
  visit(Row{"two_step_reach", "a whole number",
            "a block is scored by its keys from this part of the threshold on; of methods that score by two_step"},
        options.two_step_reach...);
}

// Calls visit(name, field) for each field of Options, in their order. A field is an enum, a float or an int.
template <class AnyOptions, class Visitor>
constexpr void visit_options(AnyOptions& options, Visitor&& visit) {
  visit_option_rows([&](const OptionInfo& info, auto& field) { visit(info.name, field); }, options);
}

// As in pbsattn.hpp, but for these functions alone: templates of this header stay with whoever instantiates them.
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

// Sets one option from text: "keep", "top_k". Throws invalid_argument, naming what there is, for a name or a value that
// there isn't; whether the number is in its range Plan::create checks.
void set_option(Options& options, std::string_view name, std::string_view value);

// Holds the parts of a method with options of its own as text has it, "pbs:top_p=0.95:segment=512": views into that
// text.
struct MethodText {
  std::string_view name;                                               // "pbs"
  std::vector<std::pair<std::string_view, std::string_view>> options;  // names and values, in their order
};

// Takes such a text apart, whatever the names in it. Throws invalid_argument for a part that is no OPTION=VALUE.
MethodText split_method(std::string_view text);

// Returns the options that such a text stands for: those of the named method with its own set over them, of which the
// last one of a name counts. Throws what split_method(), method() and set_option() throw.
Options parse_method(std::string_view text);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

}  // namespace pbsattn
