#include "reference/permute/permute.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "core/score_traits.h"
#include "reference/numbers.h"

namespace pbsattn::reference {
namespace {

// Returns the means of `blocks` blocks of rows, each rounded to a dtype. A last block of fewer rows is divided by their
// number if `by_count`, else by `block` as the others.
Matrix pool(const Matrix& rows, DType dtype, std::int64_t blocks, std::int64_t block,
            std::span<const std::int32_t> order, bool by_count) {
  Matrix pooled(blocks, rows.columns);
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t end = std::min((b + 1) * block, rows.rows);
    for (std::int64_t slot = b * block; slot < end; ++slot)
      for (std::int64_t d = 0; d < rows.columns; ++d) pooled[b][d] += rows[order.empty() ? slot : order[slot]][d];
    const auto divisor = static_cast<double>(by_count ? end - b * block : block);
    for (double& x : pooled[b]) x = round_to(dtype, x / divisor);
  }
  return pooled;
}

}  // namespace

std::vector<double> key_scores(const Head& head, const Geometry& geometry, const Logits& logits) {
  const std::int64_t queries = geometry.scoring_queries();
  std::vector<double> mean(geometry.permuted_len(), 0.0);
  std::vector<double> weight(mean.size());
  for (std::int64_t i = geometry.shape.q_len - queries; i < geometry.shape.q_len; ++i) {
    for (std::size_t n = 0; n < weight.size(); ++n) weight[n] = logits(dot(head.q[i], head.k[n]));
    softmax(weight);
    for (std::size_t n = 0; n < weight.size(); ++n) mean[n] += weight[n] / static_cast<double>(queries);
  }
  return mean;
}

std::vector<double> learned_scores(const Head& head, const Geometry& geometry, std::span<const float> weights,
                                   RopePairs pairs) {
  std::vector<double> scores(geometry.permuted_len(), 0.0);
  if (std::ranges::all_of(weights, [](float w) { return w == 0; })) return scores;
  const std::int64_t half = geometry.shape.head_dim / 2;
  for (std::size_t n = 0; n < scores.size(); ++n) {
    const auto key = head.k[n];
    for (std::int64_t i = 0; i < half; ++i) {
      const auto [a, b] =
          pairs == RopePairs::halves ? std::pair(key[i], key[i + half]) : std::pair(key[2 * i], key[2 * i + 1]);
      scores[n] += static_cast<double>(weights[i]) * std::sqrt(a * a + b * b);
    }
    for (std::int64_t d = 0; d < geometry.shape.head_dim; ++d)
      scores[n] += static_cast<double>(weights[half + d]) * key[d];
  }
  return scores;
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
  return pool(head.k, head.k_dtype, geometry.permuted_len() / geometry.block, geometry.block, order, false);
}

Matrix pool_values(const Head& head, const Geometry& geometry, std::span<const std::int32_t> order) {
  return pool(head.v, head.v_dtype, geometry.permuted_len() / geometry.block, geometry.block, order, false);
}

Matrix pool_own_keys(const Head& head, const Options& options, const Geometry& geometry) {
  return pool(head.k, head.k_dtype, geometry.blocks(), geometry.block, {}, divides_by_count(options));
}

}  // namespace pbsattn::reference
