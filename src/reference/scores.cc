// Stage two, the block scores: the attention mass that a row's queries are expected to put on each key block.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/score_traits.h"
#include "reference/numbers.h"
#include "reference/stages.h"

namespace pbsattn::reference {
namespace {

void nan_to_zero(std::span<double> scores) {
  for (double& s : scores)
    if (std::isnan(s)) s = 0;
}

// The mean over some of a row's queries, given by their tokens, of their softmax over all visible keys, by block.
std::vector<double> masses(const Head& head, const Geometry& geometry, std::int64_t row,
                           std::span<const std::int32_t> order, double scale, std::span<const std::int64_t> tokens) {
  const std::int64_t own_token = geometry.own_begin(row) * geometry.block;
  std::vector<double> mean(geometry.diagonal(row) + 1, 0.0);
  std::vector<double> share;
  for (const std::int64_t token : tokens) {
    share.resize(token + 1);
    const auto query = head.q[token - geometry.q_offset()];
    for (std::int64_t slot = 0; slot <= token; ++slot)
      share[slot] = dot(query, head.k[slot < own_token ? order[slot] : slot]) * scale;
    softmax(share);
    for (std::int64_t slot = 0; slot <= token; ++slot)
      mean[slot / geometry.block] += share[slot] / static_cast<double>(tokens.size());
  }
  return mean;
}

}  // namespace

void softmax(std::span<double> scores) {
  double max = -std::numeric_limits<double>::infinity();
  for (const double s : scores) max = std::max(max, s);
  double sum = 0;
  for (double& s : scores) sum += s = std::exp(s - max);
  for (double& s : scores) s /= sum;
}

std::vector<double> pool_query(const Head& head, const Geometry& geometry, Rules rules, std::int64_t row) {
  std::vector<double> pooled(geometry.shape.head_dim, 0.0);
  const std::int64_t begin = geometry.row_begin(row);
  const std::int64_t end = geometry.row_end(row);
  for (std::int64_t token = begin; token < end; ++token)
    for (std::int64_t d = 0; d < geometry.shape.head_dim; ++d) pooled[d] += head.q[token - geometry.q_offset()][d];
  const auto count = static_cast<double>(rules == Rules::paper ? end - begin : geometry.block);
  for (double& x : pooled) x = round_to(head.q_dtype, x / count);
  return pooled;
}

std::vector<double> block_scores(std::span<const double> pooled_query, const Matrix& pooled_keys, std::int64_t blocks,
                                 double scale) {
  std::vector<double> scores(blocks);
  for (std::int64_t b = 0; b < blocks; ++b) scores[b] = dot(pooled_query, pooled_keys[b]) * scale;
  softmax(scores);
  nan_to_zero(scores);
  return scores;
}

std::vector<double> per_query_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                     const Matrix& pooled_keys, double scale) {
  const std::int64_t blocks = geometry.diagonal(row) + 1;
  const std::int64_t count = geometry.row_end(row) - geometry.row_begin(row);
  std::vector<double> mean(blocks, 0.0);
  std::vector<double> share(blocks);
  for (std::int64_t token = geometry.row_begin(row); token < geometry.row_end(row); ++token) {
    const auto query = head.q[token - geometry.q_offset()];
    for (std::int64_t b = 0; b < blocks; ++b) share[b] = dot(query, pooled_keys[b]) * scale;
    softmax(share);
    for (std::int64_t b = 0; b < blocks; ++b) mean[b] += share[b] / static_cast<double>(count);
  }
  nan_to_zero(mean);
  return mean;
}

std::vector<double> exact_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                 std::span<const std::int32_t> order, double scale) {
  std::vector<std::int64_t> tokens(geometry.row_end(row) - geometry.row_begin(row));
  std::iota(tokens.begin(), tokens.end(), geometry.row_begin(row));
  auto scores = masses(head, geometry, row, order, scale, tokens);
  nan_to_zero(scores);
  return scores;
}

std::vector<double> sampled_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                   std::span<const std::int32_t> order, const Matrix& pooled_keys, double scale) {
  const std::int64_t queries = geometry.row_end(row) - geometry.row_begin(row);
  std::vector<std::int64_t> tokens;
  tokens.reserve(sampled_queries(queries));
  for (std::int64_t i = 0; i < sampled_queries(queries); ++i)
    tokens.push_back(geometry.row_begin(row) + sampled_query(queries, i));
  auto scores = masses(head, geometry, row, order, scale, tokens);
  const auto pooled = per_query_scores(head, geometry, row, pooled_keys, scale);
  const bool no_value = std::ranges::all_of(pooled, [](double s) { return s == 0; });
  for (std::size_t b = 0; b < scores.size(); ++b) {
    const double other = b < pooled.size() ? pooled[b] : 0.0;
    scores[b] = no_value ? std::nan("") : (scores[b] + other) / 2;
  }
  nan_to_zero(scores);
  return scores;
}

std::vector<double> energy_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                  const Matrix& causal_keys, double scale) {
  const std::int64_t whole = geometry.row_end(row) / geometry.block;  // blocks that the last query sees whole
  std::vector<double> all;
  for (std::int64_t token = geometry.row_begin(row); token < geometry.row_end(row); ++token)
    for (std::int64_t b = 0; b < whole; ++b)
      all.push_back(dot(head.q[token - geometry.q_offset()], causal_keys[b]) * scale);
  softmax(all);
  std::vector<double> scores(geometry.diagonal(row) + 1, 0.0);
  for (std::size_t i = 0; i < all.size(); ++i) scores[i % whole] += all[i];
  nan_to_zero(scores);
  return scores;
}

Scoring prepare_scores(const Head& head, const Options& options, const Geometry& geometry,
                       std::span<const std::int32_t> order) {
  Scoring scoring{.pooled_keys = pool_keys(head, geometry, order), .original_keys = {0, 0}, .bands = {}, .pattern = {}};
  switch (options.score) {
    case BlockScore::mean_pool_causal:
    case BlockScore::per_query:
    case BlockScore::sampled:
    case BlockScore::energy: scoring.original_keys = pool_original_keys(head, geometry, options.rules); break;
    case BlockScore::dual_band:
      scoring.original_keys = pool_original_keys(head, geometry, options.rules);
      scoring.bands = calibrate_bands(head, options, geometry, scoring.original_keys);
      break;
    case BlockScore::vertical_slash:
      scoring.pattern = vertical_slash_pattern(head, options, geometry, &scoring.pattern_margin);
      break;
    case BlockScore::flexible:
      scoring.pattern = flexible_pattern(head, options, geometry, &scoring.pattern_margin);
      break;
    default: break;
  }
  return scoring;
}

RowScores row_scores(const Head& head, const Options& options, const Geometry& geometry, std::int64_t row,
                     std::span<const std::int32_t> order, const Scoring& scoring) {
  const double scale = options.scale;
  const std::int64_t own_begin = geometry.own_begin(row);
  const std::int64_t causal = geometry.diagonal(row) + 1;
  const auto pooled_query = [&] { return pool_query(head, geometry, options.rules, row); };
  // Keys as the row sees them: permuted before its own segment, as they were in it.
  const auto causal_keys = [&] {
    Matrix keys(causal, geometry.shape.head_dim);
    for (std::int64_t b = 0; b < causal; ++b)
      std::ranges::copy(b < own_begin ? scoring.pooled_keys[b] : scoring.original_keys[b], keys[b].begin());
    return keys;
  };
  switch (options.score) {
    case BlockScore::none: return {};
    case BlockScore::mean_pool: return {block_scores(pooled_query(), scoring.pooled_keys, own_begin, scale)};
    case BlockScore::mean_pool_causal: return {block_scores(pooled_query(), causal_keys(), causal, scale)};
    case BlockScore::per_query: return {per_query_scores(head, geometry, row, causal_keys(), scale)};
    case BlockScore::antidiagonal:
    case BlockScore::antidiagonal_causal:
      return {antidiagonal_scores(head, geometry, row, order, options.score == BlockScore::antidiagonal_causal, scale)};
    case BlockScore::exact: return {exact_scores(head, geometry, row, order, scale)};
    case BlockScore::sampled: return {sampled_scores(head, geometry, row, order, causal_keys(), scale)};
    case BlockScore::energy: return {energy_scores(head, geometry, row, causal_keys(), scale)};
    case BlockScore::dual_band: return dual_band_scores(pooled_query(), causal_keys(), scoring.bands);
    case BlockScore::vertical_slash:
    case BlockScore::flexible: {
      const auto& kept = scoring.pattern[row];
      return {std::vector<double>(kept.begin(), kept.end())};
    }
  }
  return {};
}

}  // namespace pbsattn::reference
