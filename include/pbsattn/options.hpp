// The names of options and of their values: one table for everything that reads or writes them as text.
#pragma once

#include <array>
#include <string_view>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn {

// Of an enum's values, in their order: the value i goes by values[i].
template <class Enum>
struct Names;

template <>
struct Names<Permutation> {
  static constexpr std::array<std::string_view, 2> values{"none", "last_queries"};
};
template <>
struct Names<OrderScope> {
  static constexpr std::array<std::string_view, 2> values{"query_head", "kv_head"};
};
template <>
struct Names<BlockScore> {
  static constexpr std::array<std::string_view, 12> values{
      "none",           "mean_pool",        "per_query", "antidiagonal", "antidiagonal_causal",
      "exact",          "mean_pool_causal", "sampled",   "energy",       "dual_band",
      "vertical_slash", "flexible"};
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

// "" for a value that has no name.
template <class Enum>
constexpr std::string_view name_of(Enum value) {
  const auto i = static_cast<std::size_t>(value);
  return i < Names<Enum>::values.size() ? Names<Enum>::values[i] : std::string_view();
}

// Calls visit(name, field) for each field of Options, in their order. A field is an enum, a float or an int.
template <class AnyOptions, class Visitor>
constexpr void visit_options(AnyOptions& options, Visitor&& visit) {
  visit("permutation", options.permutation);
  visit("order_scope", options.order_scope);
  visit("score", options.score);
  visit("keep", options.keep);
  visit("correction", options.correction);
  visit("rules", options.rules);
  visit("precision", options.precision);
  visit("fallback", options.fallback);
  visit("top_p", options.top_p);
  visit("threshold", options.threshold);
  visit("floor_top_p", options.floor_top_p);
  visit("top_k", options.top_k);
  visit("density", options.density);
  visit("vertical", options.vertical);
  visit("slash", options.slash);
  visit("tau", options.tau);
  visit("min_budget", options.min_budget);
  visit("block", options.block);
  visit("segment", options.segment);
  visit("dense_last_rows", options.dense_last_rows);
  visit("sink_blocks", options.sink_blocks);
  visit("local_blocks", options.local_blocks);
  visit("scale", options.scale);
  visit("expected_density", options.expected_density);
}

// Sets one option from text: "keep", "top_k". Throws invalid_argument, naming what there is, for a name or a value that
// there isn't; whether the number is in its range Plan::create checks.
void set_option(Options& options, std::string_view name, std::string_view value);

}  // namespace pbsattn
