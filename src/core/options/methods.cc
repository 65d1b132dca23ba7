// The table of named methods. A new method is a new row; a new idea is a new part of Options.
#include <algorithm>
#include <array>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "core/options/shown.h"
#include "pbsattn/pbsattn.hpp"

namespace pbsattn {
namespace {

constexpr Options pbs_options{
    .permutation = Permutation::last_queries, .score = BlockScore::mean_pool, .keep = KeepRule::top_p};

// The threshold is the mean share of a block, but for short rows, of which up to .008 lost nothing with pbs-sampled on
// a 1.5B model (docs/methods.md).
constexpr Options two_step_options(Permutation permutation) {
  Options options{.permutation = permutation,
                  .score = BlockScore::two_step,
                  .keep = KeepRule::threshold,
                  .threshold = 8e-3F,
                  .dense_last_rows = 1};
  options.threshold_tokens = 128;
  return options;
}

constexpr Options with_fallback(Options options) {
  options.fallback = Fallback::when_faster;
  return options;
}

constexpr std::array table{
    MethodInfo{"full", "dense causal attention: the baseline every error is measured against", Options{}},
    MethodInfo{"pbs", "permuted block-sparse attention as published (arXiv 2510.21270)", pbs_options},
    MethodInfo{"auto", "two-step, or full attention where the sequence is too short for two-step to be faster",
               with_fallback(two_step_options(Permutation::none))},
    MethodInfo{
        "pbs+", "pbs with XAttention's antidiagonal scores of the permuted keys",
        Options{.permutation = Permutation::last_queries, .score = BlockScore::antidiagonal, .keep = KeepRule::top_p}},
    MethodInfo{"xattention", "antidiagonal scores, stride 8, keys in their order (arXiv 2503.16428)",
               Options{.score = BlockScore::antidiagonal_causal, .keep = KeepRule::top_p, .segment = 128}},
    MethodInfo{"mean-pool", "mean pooling: pooled queries against pooled keys, the own block among them",
               Options{.score = BlockScore::mean_pool_causal, .keep = KeepRule::top_p, .segment = 128}},
    MethodInfo{"flashprefill", "softmax energy of pooled keys, relative to a row's highest (arXiv 2608.19758)",
               Options{.score = BlockScore::energy,
                       .keep = KeepRule::relative,
                       .correction = Correction::mean,
                       .threshold = 0.1F,
                       .segment = 128,
                       .dense_last_rows = 8,
                       .sink_blocks = 2,
                       .local_blocks = 4}},
    MethodInfo{"prism", "mean pooling of RoPE's fast and slow frequencies apart (arXiv 2602.08426)",
               Options{.score = BlockScore::dual_band, .keep = KeepRule::top_p, .top_p = 0.95F, .segment = 128}},
    MethodInfo{"minference", "each head's heaviest columns and diagonals, as whole blocks (arXiv 2407.02490)",
               Options{.score = BlockScore::vertical_slash, .keep = KeepRule::vertical_slash, .segment = 128}},
    MethodInfo{"flexprefill", "pooled attention or columns and diagonals, by head (arXiv 2502.20766)",
               Options{.score = BlockScore::flexible, .keep = KeepRule::coverage, .top_p = 0.95F, .segment = 128}},
    MethodInfo{"streaming", "the first block and the last eight: StreamingLLM, MInference's A-shape",
               Options{.keep = KeepRule::none, .segment = 128, .sink_blocks = 1, .local_blocks = 8}},
    MethodInfo{"oracle", "blocks by their true attention mass, keys in pbs order: the bound that estimates are held to",
               Options{.permutation = Permutation::last_queries, .score = BlockScore::exact, .keep = KeepRule::top_p}},
    MethodInfo{"pbs-unpermuted", "the same blocks chosen without moving keys: what the permutation buys",
               Options{.score = BlockScore::mean_pool, .keep = KeepRule::top_p}},
    MethodInfo{"pbs-threshold", "keys in pbs order, blocks by their mean share of each query's softmax, last row dense",
               Options{.permutation = Permutation::last_queries,
                       .score = BlockScore::per_query,
                       .keep = KeepRule::threshold,
                       .dense_last_rows = 1}},
    MethodInfo{"pbs-sampled", "pbs-threshold with the exact attention of 8 queries of a block averaged in",
               Options{.permutation = Permutation::last_queries,
                       .score = BlockScore::sampled,
                       .keep = KeepRule::threshold,
                       .dense_last_rows = 1}},
    MethodInfo{"pbs-two-step", "keys in pbs order, all blocks by their means, then likely ones by 4 queries exactly",
               two_step_options(Permutation::last_queries)},
    MethodInfo{"two-step", "pbs-two-step with keys in their order", two_step_options(Permutation::none)},
};

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = std::exchange(row[j], std::min({row[j] + 1, row[j - 1] + 1, substituted}));
    }
  }
  return row[b.size()];
}

}  // namespace

std::span<const MethodInfo> methods() {
  return table;
}

Options method(std::string_view name) {
  const auto found = std::ranges::find(table, name, &MethodInfo::name);
  if (found != table.end()) return found->options;
  const std::string wanted = shown(name);  // short, which bounds the distance's cost whatever the caller sends
  const auto nearest =
      std::ranges::min_element(table, {}, [&](const MethodInfo& info) { return edit_distance(wanted, info.name); });
  throw Error(ErrorCode::invalid_argument,
              "method \"" + wanted + "\": no such method; did you mean \"" + std::string(nearest->name) + "\"?");
}

}  // namespace pbsattn
