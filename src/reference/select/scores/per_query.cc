#include "reference/select/scores/scores.h"

namespace pbsattn::reference {

std::vector<double> per_query_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                     const Matrix& causal_k, const Logits& logits) {
  const std::int64_t blocks = geometry.diagonal(row) + 1;
  const std::int64_t count = geometry.row_end(row) - geometry.row_begin(row);
  std::vector<double> mean(blocks, 0.0);
  std::vector<double> share(blocks);
  for (std::int64_t token = geometry.row_begin(row); token < geometry.row_end(row); ++token) {
    const auto query = head.q[token - geometry.q_offset()];
    for (std::int64_t b = 0; b < blocks; ++b) share[b] = logits(dot(query, causal_k[b]));
    softmax(share);
    for (std::int64_t b = 0; b < blocks; ++b) mean[b] += share[b] / static_cast<double>(count);
  }
  nan_to_zero(mean);
  return mean;
}

}  // namespace pbsattn::reference
