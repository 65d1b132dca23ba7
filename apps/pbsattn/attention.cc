#include "attention.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string_view>
#include <vector>

#include "errors.h"

namespace app {
namespace {

using pbsattn::BlockScore;
using pbsattn::Fallback;
using pbsattn::KeepRule;
using pbsattn::OrderScope;
using pbsattn::Permutation;
using pbsattn::Precision;
using pbsattn::Rules;

const char* name_of(Permutation permutation) {
  return permutation == Permutation::none ? "none" : "last_queries";
}

const char* name_of(OrderScope scope) {
  return scope == OrderScope::query_head ? "query_head" : "kv_head";
}

const char* name_of(BlockScore score) {
  switch (score) {
    case BlockScore::none: return "none";
    case BlockScore::mean_pool: return "mean_pool";
    case BlockScore::per_query: return "per_query";
    case BlockScore::antidiagonal: return "antidiagonal";
    case BlockScore::antidiagonal_causal: return "antidiagonal_causal";
    case BlockScore::exact: return "exact";
  }
  return "";
}

const char* name_of(KeepRule keep) {
  switch (keep) {
    case KeepRule::all: return "all";
    case KeepRule::top_p: return "top_p";
    case KeepRule::threshold: return "threshold";
    case KeepRule::relative: return "relative";
    case KeepRule::top_k: return "top_k";
    case KeepRule::density: return "density";
  }
  return "";
}

const char* name_of(Rules rules) {
  return rules == Rules::paper ? "paper" : "reference_code";
}

const char* name_of(Precision precision) {
  switch (precision) {
    case Precision::automatic: return "automatic";
    case Precision::f32: return "f32";
    case Precision::bf16: return "bf16";
  }
  return "";
}

const char* name_of(Fallback fallback) {
  return fallback == Fallback::never ? "never" : "when_faster";
}

// The value of an enum's that goes by `name`; `what` says in a message what it is a name of.
template <class Enum>
Enum named(const char* what, std::string_view name, std::initializer_list<Enum> values) {
  std::string known;
  for (const Enum value : values) {
    if (name == name_of(value)) return value;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", name_of(value));
  }
  throw UsageError(fmt::format("{} \"{}\": no such {}; there are {}", what, name, what, known));
}

Precision precision_named(std::string_view name) {
  return named("precision", name, {Precision::bf16, Precision::f32, Precision::automatic});
}

template <class Number>
Number number(std::string_view option, std::string_view text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    throw UsageError(fmt::format("{} \"{}\": not a number; pass one, such as pbs:top_p=0.95", option, text));
  }
  return value;
}

// Sets one option of a method, as `pbs:top_p=0.95` names it.
void set(pbsattn::Options* options, std::string_view option, std::string_view value) {
  if (option == "top_p") {
    options->top_p = number<float>(option, value);
  } else if (option == "threshold") {
    options->threshold = number<float>(option, value);
  } else if (option == "floor_top_p") {
    options->floor_top_p = number<float>(option, value);
  } else if (option == "segment") {
    options->segment = number<int>(option, value);
  } else if (option == "dense_last_rows") {
    options->dense_last_rows = number<int>(option, value);
  } else if (option == "order_scope") {
    options->order_scope = named("order_scope", value, {OrderScope::query_head, OrderScope::kv_head});
  } else if (option == "rules") {
    options->rules = named("rules", value, {Rules::reference_code, Rules::paper});
  } else if (option == "precision") {
    options->precision = precision_named(value);
  } else if (option == "fallback") {
    options->fallback = named("fallback", value, {Fallback::never, Fallback::when_faster});
  } else {
    throw UsageError(
        fmt::format("option \"{}\": no such option of a method; there are top_p, threshold, floor_top_p, segment, "
                    "dense_last_rows, order_scope, rules, precision and fallback",
                    option));
  }
}

// The library's own check of options, on a shape that nothing else can be wrong with.
void check(const pbsattn::Options& options) {
  const pbsattn::Shape shape{.q_len = 1, .kv_len = 1, .head_dim = 8};
  static_cast<void>(pbsattn::Plan::create(options, shape, pbsattn::Device::reference()));
}

}  // namespace

void AttentionFlags::add_to(CLI::App& command) {
  command.add_option("--top-p", top_p, "attention mass that the kept blocks hold by their scores, in (0, 1]")
      ->capture_default_str();
  command.add_option("--threshold", threshold,
                     "least share of a row's attention of a kept block, in [0, 1]; of methods that keep by threshold");
  command.add_option("--top-k", top_k, "blocks that a row keeps; of methods that keep by top_k");
  command.add_option("--density", density,
                     "share of its causal blocks that a row keeps, in [0, 1]; of methods that keep by density");
  command.add_option("--floor-top-p", floor_top_p,
                     "attention mass that a threshold must leave by the scores, in [0, 1]; 0 turns it off");
  command.add_option("--segment", segment, "tokens inside which keys move; a multiple of the block of 128")
      ->capture_default_str();
  command.add_option("--dense-last-rows", dense_last_rows,
                     "the prompt's last blocks of queries that attend to everything");
  command.add_option("--precision", precision, "what products are computed in: bf16, f32 or automatic")
      ->capture_default_str();
}

Attention attention_named(const std::string& spec, const AttentionFlags& flags) {
  const std::vector<std::string> parts = CLI::detail::split(spec, ':');
  Attention attention{.name = spec, .by_ggml = parts.front() == "ggml", .options = {}};
  if (attention.by_ggml && parts.size() > 1) {
    throw UsageError(fmt::format("{}: ggml's kernel has no options; name it alone", spec));
  }
  if (attention.by_ggml) return attention;
  pbsattn::Options& options = attention.options = pbsattn::method(parts.front());
  options.precision = precision_named(flags.precision);
  options.segment = flags.segment;
  options.top_p = flags.top_p;
  options.threshold = flags.threshold.value_or(options.threshold);
  options.floor_top_p = flags.floor_top_p.value_or(options.floor_top_p);
  options.top_k = flags.top_k.value_or(options.top_k);
  options.density = flags.density.value_or(options.density);
  options.dense_last_rows = flags.dense_last_rows.value_or(options.dense_last_rows);
  for (std::size_t i = 1; i < parts.size(); ++i) {
    const std::size_t equals = parts[i].find('=');
    if (equals == std::string::npos) {
      throw UsageError(fmt::format("{}: \"{}\" is no OPTION=VALUE; write, say, pbs:top_p=0.95", spec, parts[i]));
    }
    const std::string_view part = parts[i];
    set(&options, part.substr(0, equals), part.substr(equals + 1));
  }
  check(options);
  return attention;
}

pbsattn_options to_c(const pbsattn::Options& options) {
  return {.permutation = static_cast<int32_t>(options.permutation),
          .order_scope = static_cast<int32_t>(options.order_scope),
          .score = static_cast<int32_t>(options.score),
          .keep = static_cast<int32_t>(options.keep),
          .rules = static_cast<int32_t>(options.rules),
          .precision = static_cast<int32_t>(options.precision),
          .fallback = static_cast<int32_t>(options.fallback),
          .top_p = options.top_p,
          .threshold = options.threshold,
          .floor_top_p = options.floor_top_p,
          .top_k = options.top_k,
          .density = options.density,
          .block = options.block,
          .segment = options.segment,
          .dense_last_rows = options.dense_last_rows,
          .sink_blocks = options.sink_blocks,
          .local_blocks = options.local_blocks,
          .scale = options.scale,
          .expected_density = options.expected_density};
}

nlohmann::json to_json(const pbsattn::Options& options) {
  return {{"permutation", name_of(options.permutation)},
          {"order_scope", name_of(options.order_scope)},
          {"score", name_of(options.score)},
          {"keep", name_of(options.keep)},
          {"rules", name_of(options.rules)},
          {"precision", name_of(options.precision)},
          {"fallback", name_of(options.fallback)},
          {"top_p", options.top_p},
          {"threshold", options.threshold},
          {"floor_top_p", options.floor_top_p},
          {"top_k", options.top_k},
          {"density", options.density},
          {"block", options.block},
          {"segment", options.segment},
          {"dense_last_rows", options.dense_last_rows},
          {"sink_blocks", options.sink_blocks},
          {"local_blocks", options.local_blocks},
          {"expected_density", options.expected_density}};
}

std::string describe(const pbsattn::Options& options) {
  if (options.keep == KeepRule::all) return "keeps every block";
  const auto rule = [&] {
    switch (options.keep) {
      case KeepRule::all: break;
      case KeepRule::top_p: return fmt::format("top_p {}", options.top_p);
      case KeepRule::threshold:
        return fmt::format("threshold {}", options.threshold) +
               (options.floor_top_p == 0.0F ? "" : fmt::format(" or top_p {}", options.floor_top_p));
      case KeepRule::relative: return fmt::format("relative {}", options.threshold);
      case KeepRule::top_k: return fmt::format("top_k {}", options.top_k);
      case KeepRule::density: return fmt::format("density {}", options.density);
    }
    return std::string("all");
  };
  return fmt::format("permutation {}, score {}, keep rule {}, blocks of {}, segments of {}, dense last rows {}{}",
                     name_of(options.permutation), name_of(options.score), rule(), options.block, options.segment,
                     options.dense_last_rows,
                     options.fallback == Fallback::when_faster ? "; full when that is faster" : "");
}

}  // namespace app
