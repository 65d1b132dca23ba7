#include "reference/select/scores/scores.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/score_traits.h"
#include "reference/permute/permute.h"

namespace pbsattn::reference {

void nan_to_zero(std::span<double> scores) {
  for (double& s : scores)
    if (std::isnan(s)) s = 0;
}

std::vector<std::int64_t> descending(std::span<const double> scores) {
  std::vector<std::int64_t> places(scores.size());
  std::iota(places.begin(), places.end(), std::int64_t{0});
  std::ranges::stable_sort(places, [&](std::int64_t a, std::int64_t b) { return scores[a] > scores[b]; });
  return places;
}

Scoring prepare_scores(const Head& head, const Options& options, const Geometry& geometry,
                       std::span<const std::int32_t> order) {
  Scoring scoring{.pooled_k = pool_keys(head, geometry, order),
                  .pooled_own = pools_own(options.score) ? pool_own_keys(head, options, geometry) : Matrix(0, 0),
                  .bands = {},
                  .pattern = {}};
  if (options.score == BlockScore::dual_band)
    scoring.bands = calibrate_bands(head, options, geometry, scoring.pooled_own);
  if (options.score == BlockScore::vertical_slash)
    scoring.pattern = vertical_slash_pattern(head, options, geometry, &scoring.pattern_margin);
  if (options.score == BlockScore::flexible)
    scoring.pattern = flexible_pattern(head, options, geometry, scoring.pooled_own, &scoring.pattern_margin);
  return scoring;
}

RowScores row_scores(const Head& head, const Options& options, const Geometry& geometry, std::int64_t row,
                     std::span<const std::int32_t> order, const Scoring& scoring) {
  const Logits logits(options);
  const std::int64_t own_begin = geometry.own_begin(row);
  const std::int64_t causal = geometry.diagonal(row) + 1;
  const auto pooled_q = [&] { return pool_query(head, options, geometry, row); };
  // Keys as the row sees them: permuted before its own segment, as they were in it.
  const auto causal_k = [&] {
    Matrix keys(causal, geometry.shape.head_dim);
    for (std::int64_t b = 0; b < causal; ++b)
      std::ranges::copy(b < own_begin ? scoring.pooled_k[b] : scoring.pooled_own[b], keys[b].begin());
    return keys;
  };
  switch (options.score) {
    case BlockScore::none: return {};
    case BlockScore::mean_pool: return {block_scores(pooled_q(), scoring.pooled_k, own_begin, logits)};
    case BlockScore::mean_pool_causal: return {block_scores(pooled_q(), causal_k(), causal, logits)};
    case BlockScore::per_query: return {per_query_scores(head, geometry, row, causal_k(), logits)};
    case BlockScore::antidiagonal:
    case BlockScore::antidiagonal_causal:
      return {
          antidiagonal_scores(head, geometry, row, order, options.score == BlockScore::antidiagonal_causal, logits)};
    case BlockScore::exact: return {exact_scores(head, geometry, row, order, logits)};
    case BlockScore::sampled: return {sampled_scores(head, geometry, row, order, causal_k(), logits)};
    case BlockScore::energy: return {energy_scores(head, geometry, row, causal_k(), logits)};
    case BlockScore::dual_band: return dual_band_scores(pooled_q(), causal_k(), scoring.bands);
    case BlockScore::vertical_slash:
    case BlockScore::flexible: {
      const auto& kept = scoring.pattern[row];
      return {std::vector<double>(kept.begin(), kept.end())};
    }
    case BlockScore::two_step: return {two_step_scores(head, options, geometry, row, order, causal_k())};
  }
  return {};
}

}  // namespace pbsattn::reference
