// Stage two: each row of queries chooses key blocks of the permuted sequence by the attention mass that
// pooled queries and keys predict (paper, section 3.3).
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/keep_rule.h"
#include "reference/numbers.h"
#include "reference/stages.h"

namespace pbsattn::reference {
namespace {

std::vector<std::int64_t> by_descending_score(std::span<const double> scores) {
  std::vector<std::int64_t> blocks(scores.size());
  std::iota(blocks.begin(), blocks.end(), std::int64_t{0});
  std::ranges::stable_sort(blocks, [&](std::int64_t a, std::int64_t b) { return scores[a] > scores[b]; });
  return blocks;
}

// Marks the highest scores up to and including the one that brings their sum, which begins at `sum`, to `mass`.
void keep_top_p(double mass, std::span<const double> scores, std::vector<bool>& keep, double sum) {
  if (sum > 0 && sum >= mass) return;
  for (const std::int64_t b : by_descending_score(scores)) {
    if (keep[b]) continue;
    keep[b] = true;
    sum += scores[b];
    if (sum >= mass) return;
  }
}

void keep_at_least(double least, std::span<const double> scores, std::vector<bool>& keep) {
  for (std::size_t b = 0; b < scores.size(); ++b)
    if (scores[b] >= least) keep[b] = true;
}

void keep_highest(std::int64_t count, std::span<const double> scores, std::vector<bool>& keep) {
  const auto blocks = by_descending_score(scores);
  for (std::int64_t i = 0; i < count; ++i) keep[blocks[i]] = true;
}

// keep[b] for blocks 0 .. own_begin-1. `scores` may go on to the diagonal: then what is always kept, sink_block among
// it, counts first.
std::vector<bool> apply_rule(const Options& options, const Geometry& geometry, std::int64_t row,
                             std::int64_t sink_block, std::span<const double> all_scores) {
  const std::int64_t own_begin = geometry.own_begin(row);
  const std::span<const double> scores = all_scores.first(own_begin);
  std::vector<bool> keep(own_begin, false);
  if (options.keep == KeepRule::none) return keep;
  // Scores that NaN made 0.
  if (*std::ranges::max_element(all_scores) == 0) return std::vector<bool>(own_begin, options.rules == Rules::paper);

  const auto threshold = static_cast<double>(options.threshold);
  switch (options.keep) {
    case KeepRule::all:
    case KeepRule::none:
    case KeepRule::vertical_slash:
    case KeepRule::coverage: break;
    case KeepRule::top_p: {
      double counted = 0;
      if (std::ssize(all_scores) > own_begin) {
        keep[sink_block] = true;
        counted = std::accumulate(all_scores.begin() + own_begin, all_scores.end(), scores[sink_block]);
      }
      keep_top_p(static_cast<double>(options.top_p), scores, keep, counted);
      break;
    }
    case KeepRule::threshold: {
      if (options.floor_top_p > 0) keep_top_p(static_cast<double>(options.floor_top_p), scores, keep, 0);
      keep_at_least(threshold, scores, keep);
      break;
    }
    case KeepRule::relative: keep_at_least(threshold * std::ranges::max(scores), scores, keep); break;
    case KeepRule::top_k:
    case KeepRule::density: keep_highest(kept_count(options, own_begin, geometry.diagonal(row)), scores, keep); break;
  }
  return keep;
}

void nan_to_zero(std::span<double> scores) {
  for (double& s : scores)
    if (std::isnan(s)) s = 0;
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

std::vector<double> block_scores(std::span<const double> pooled_query, const Matrix& pooled_keys,
                                 std::int64_t own_begin, double scale) {
  std::vector<double> scores(own_begin);
  for (std::int64_t b = 0; b < own_begin; ++b) scores[b] = dot(pooled_query, pooled_keys[b]) * scale;
  softmax(scores);
  nan_to_zero(scores);
  return scores;
}

std::vector<double> per_query_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                     const Matrix& pooled_keys, double scale) {
  const std::int64_t own_begin = geometry.own_begin(row);
  const std::int64_t count = geometry.row_end(row) - geometry.row_begin(row);
  std::vector<double> mean(own_begin, 0.0);
  std::vector<double> share(own_begin);
  for (std::int64_t token = geometry.row_begin(row); token < geometry.row_end(row); ++token) {
    const auto query = head.q[token - geometry.q_offset()];
    for (std::int64_t b = 0; b < own_begin; ++b) share[b] = dot(query, pooled_keys[b]) * scale;
    softmax(share);
    for (std::int64_t b = 0; b < own_begin; ++b) mean[b] += share[b] / static_cast<double>(count);
  }
  nan_to_zero(mean);
  return mean;
}

std::vector<double> exact_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                 std::span<const std::int32_t> order, double scale) {
  const std::int64_t own_token = geometry.own_begin(row) * geometry.block;
  const auto count = static_cast<double>(geometry.row_end(row) - geometry.row_begin(row));
  std::vector<double> mean(geometry.diagonal(row) + 1, 0.0);
  std::vector<double> share;
  for (std::int64_t token = geometry.row_begin(row); token < geometry.row_end(row); ++token) {
    share.resize(token + 1);
    const auto query = head.q[token - geometry.q_offset()];
    for (std::int64_t slot = 0; slot <= token; ++slot)
      share[slot] = dot(query, head.k[slot < own_token ? order[slot] : slot]) * scale;
    softmax(share);
    for (std::int64_t slot = 0; slot <= token; ++slot) mean[slot / geometry.block] += share[slot] / count;
  }
  nan_to_zero(mean);
  return mean;
}

std::vector<double> row_scores(const Head& head, const Options& options, const Geometry& geometry, std::int64_t row,
                               std::span<const std::int32_t> order, const Matrix& pooled_keys) {
  switch (options.score) {
    case BlockScore::none: return {};
    case BlockScore::mean_pool:
      return block_scores(pool_query(head, geometry, options.rules, row), pooled_keys, geometry.own_begin(row),
                          options.scale);
    case BlockScore::per_query: return per_query_scores(head, geometry, row, pooled_keys, options.scale);
    case BlockScore::antidiagonal:
    case BlockScore::antidiagonal_causal:
      return antidiagonal_scores(head, geometry, row, order, options.score == BlockScore::antidiagonal_causal,
                                 options.scale);
    case BlockScore::exact: return exact_scores(head, geometry, row, order, options.scale);
    case BlockScore::mean_pool_causal:
    case BlockScore::sampled:
    case BlockScore::energy:
    case BlockScore::dual_band:
    case BlockScore::vertical_slash:
    case BlockScore::flexible: break;
  }
  return {};
}

std::vector<std::int32_t> select_blocks(const Options& options, const Geometry& geometry, std::int64_t row,
                                        std::span<const double> scores, std::span<const std::int32_t> order) {
  const std::int64_t own_begin = geometry.own_begin(row);
  const bool dense = keeps_every_block(options) || row >= geometry.rows() - options.dense_last_rows || own_begin == 0;
  const std::int64_t sink_block = (std::ranges::find(order, 0) - order.begin()) / geometry.block;
  std::vector<bool> keep =
      dense ? std::vector<bool>(own_begin, true) : apply_rule(options, geometry, row, sink_block, scores);
  if (own_begin > 0) keep[sink_block] = true;
  std::vector<std::int32_t> list;
  for (std::int64_t b = 0; b <= geometry.diagonal(row); ++b)
    if (b >= own_begin || keep[b] || b < options.sink_blocks || b > geometry.diagonal(row) - options.local_blocks)
      list.push_back(static_cast<std::int32_t>(b));
  return list;
}

}  // namespace pbsattn::reference
