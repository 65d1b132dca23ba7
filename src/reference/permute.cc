// Stage one: keys that the last queries attend to most move to the front of their segment, so that they
// share blocks (paper, section 3.2).
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "reference/numbers.h"
#include "reference/stages.h"

namespace pbsattn::reference {

double dot(std::span<const double> a, std::span<const double> b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

std::vector<double> key_scores(const Head& head, const Geometry& geometry, double scale) {
  const std::int64_t keys = geometry.permuted_len();
  const std::int64_t queries = geometry.scoring_queries();
  std::vector<double> mean(keys, 0.0);
  std::vector<double> weight(keys);
  for (std::int64_t i = geometry.shape.q_len - queries; i < geometry.shape.q_len; ++i) {
    double max = -std::numeric_limits<double>::infinity();
    for (std::int64_t n = 0; n < keys; ++n) {
      weight[n] = dot(head.q[i], head.k[n]) * scale;
      max = std::max(max, weight[n]);
    }
    double sum = 0;
    for (double& w : weight) sum += w = std::exp(w - max);
    for (std::int64_t n = 0; n < keys; ++n) mean[n] += weight[n] / sum / static_cast<double>(queries);
  }
  return mean;
}

std::vector<std::int32_t> order_keys(const Geometry& geometry, std::span<const double> scores) {
  std::vector<std::int32_t> order(geometry.shape.kv_len);
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](std::int32_t a, std::int32_t b) {
    if (std::isnan(scores[a]) || std::isnan(scores[b])) return !std::isnan(scores[a]) && std::isnan(scores[b]);
    return scores[a] > scores[b];
  };
  for (std::int64_t begin = 0; begin < geometry.permuted_len(); begin += geometry.segment)
    std::stable_sort(order.begin() + begin, order.begin() + begin + geometry.segment, before);
  return order;
}

namespace {

// Means of `blocks` blocks of rows, each rounded to a dtype.
Matrix pool(const Matrix& rows, DType dtype, std::int64_t blocks, std::int64_t block,
            std::span<const std::int32_t> order) {
  Matrix pooled(blocks, rows.columns);
  for (std::int64_t b = 0; b < blocks; ++b) {
    for (std::int64_t slot = b * block; slot < std::min((b + 1) * block, rows.rows); ++slot)
      for (std::int64_t d = 0; d < rows.columns; ++d) pooled[b][d] += rows[order.empty() ? slot : order[slot]][d];
    for (double& x : pooled[b]) x = round_to(dtype, x / static_cast<double>(block));
  }
  return pooled;
}

}  // namespace

Matrix pool_keys(const Head& head, const Geometry& geometry, std::span<const std::int32_t> order) {
  return pool(head.k, head.k_dtype, geometry.permuted_len() / geometry.block, geometry.block, order);
}

Matrix pool_values(const Head& head, const Geometry& geometry, std::span<const std::int32_t> order) {
  return pool(head.v, head.v_dtype, geometry.permuted_len() / geometry.block, geometry.block, order);
}

Matrix pool_original_keys(const Head& head, const Geometry& geometry, Rules rules) {
  const std::int64_t last = geometry.blocks() - 1;
  const std::int64_t tail = geometry.shape.kv_len - last * geometry.block;
  Matrix pooled = pool(head.k, head.k_dtype, geometry.blocks(), geometry.block, {});
  if (rules == Rules::paper) {
    for (std::int64_t d = 0; d < pooled.columns; ++d) {
      double sum = 0;
      for (std::int64_t i = 0; i < tail; ++i) sum += head.k[last * geometry.block + i][d];
      pooled[last][d] = round_to(head.k_dtype, sum / static_cast<double>(tail));
    }
  }
  return pooled;
}

}  // namespace pbsattn::reference
