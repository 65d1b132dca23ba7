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

Matrix pool_keys(const Head& head, const Geometry& geometry, std::span<const std::int32_t> order) {
  Matrix pooled(geometry.permuted_len() / geometry.block, geometry.shape.head_dim);
  for (std::int64_t b = 0; b < pooled.rows; ++b) {
    for (std::int64_t slot = b * geometry.block; slot < (b + 1) * geometry.block; ++slot)
      for (std::int64_t d = 0; d < pooled.columns; ++d) pooled[b][d] += head.k[order[slot]][d];
    for (double& x : pooled[b]) x = round_to(head.k_dtype, x / geometry.block);
  }
  return pooled;
}

}  // namespace pbsattn::reference
