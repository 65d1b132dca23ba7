#include "attention.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

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
  }
  return "";
}

const char* name_of(KeepRule keep) {
  switch (keep) {
    case KeepRule::all: return "all";
    case KeepRule::top_p: return "top_p";
    case KeepRule::threshold: return "threshold";
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

Precision precision_named(const std::string& name) {
  for (const Precision precision : {Precision::automatic, Precision::f32, Precision::bf16}) {
    if (name == name_of(precision)) return precision;
  }
  throw UsageError(fmt::format("precision \"{}\": no such precision; there are bf16, f32 and automatic", name));
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
  command.add_option("--floor-top-p", floor_top_p,
                     "attention mass that a threshold must leave by the scores, in [0, 1]; 0 turns it off");
  command.add_option("--segment", segment, "tokens inside which keys move; a multiple of the block of 128")
      ->capture_default_str();
  command.add_option("--dense-last-rows", dense_last_rows,
                     "the prompt's last blocks of queries that attend to everything");
  command.add_option("--precision", precision, "what products are computed in: bf16, f32 or automatic")
      ->capture_default_str();
}

Attention attention_named(const std::string& name, const AttentionFlags& flags) {
  if (name == "ggml") return {.name = name, .by_ggml = true, .options = {}};
  pbsattn::Options options = pbsattn::method(name);
  options.precision = precision_named(flags.precision);
  options.segment = flags.segment;
  options.top_p = flags.top_p;
  options.threshold = flags.threshold.value_or(options.threshold);
  options.floor_top_p = flags.floor_top_p.value_or(options.floor_top_p);
  options.dense_last_rows = flags.dense_last_rows.value_or(options.dense_last_rows);
  check(options);
  return {.name = name, .by_ggml = false, .options = options};
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
          .block = options.block,
          .segment = options.segment,
          .dense_last_rows = options.dense_last_rows,
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
          {"block", options.block},
          {"segment", options.segment},
          {"dense_last_rows", options.dense_last_rows},
          {"expected_density", options.expected_density}};
}

std::string describe(const pbsattn::Options& options) {
  if (options.keep == KeepRule::all) return "keeps every block";
  const std::string rule = options.keep == KeepRule::top_p ? fmt::format("top_p {}", options.top_p)
                           : options.floor_top_p == 0.0F
                               ? fmt::format("threshold {}", options.threshold)
                               : fmt::format("threshold {} or top_p {}", options.threshold, options.floor_top_p);
  return fmt::format("permutation {}, score {}, keep rule {}, blocks of {}, segments of {}, dense last rows {}{}",
                     name_of(options.permutation), name_of(options.score), rule, options.block, options.segment,
                     options.dense_last_rows,
                     options.fallback == Fallback::when_faster ? "; full when that is faster" : "");
}

}  // namespace app
