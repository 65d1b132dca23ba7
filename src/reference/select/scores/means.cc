#include "core/score_traits.h"
#include "reference/numbers.h"
#include "reference/select/scores/scores.h"

namespace pbsattn::reference {

std::vector<double> pool_query(const Head& head, const Options& options, const Geometry& geometry, std::int64_t row) {
  std::vector<double> pooled(geometry.shape.head_dim, 0.0);
  const std::int64_t begin = geometry.row_begin(row);
  const std::int64_t end = geometry.row_end(row);
  for (std::int64_t token = begin; token < end; ++token)
    for (std::int64_t d = 0; d < geometry.shape.head_dim; ++d) pooled[d] += head.q[token - geometry.q_offset()][d];
  const auto count = static_cast<double>(divides_by_count(options) ? end - begin : geometry.block);
  for (double& x : pooled) x = round_to(head.q_dtype, x / count);
  return pooled;
}

std::vector<double> block_scores(std::span<const double> pooled_q, const Matrix& pooled_k, std::int64_t blocks,
                                 const Logits& logits) {
  std::vector<double> scores(blocks);
  for (std::int64_t b = 0; b < blocks; ++b) scores[b] = logits(dot(pooled_q, pooled_k[b]));
  softmax(scores);
  nan_to_zero(scores);
  return scores;
}

}  // namespace pbsattn::reference
