#include "reference/select/scores/scores.h"

namespace pbsattn::reference {

std::vector<double> energy_scores(const Head& head, const Geometry& geometry, std::int64_t row, const Matrix& causal_k,
                                  const Logits& logits) {
  const std::int64_t whole = geometry.row_end(row) / geometry.block;  // blocks that the last query sees whole
  std::vector<double> all;
  for (std::int64_t token = geometry.row_begin(row); token < geometry.row_end(row); ++token)
    for (std::int64_t b = 0; b < whole; ++b)
      all.push_back(logits(dot(head.q[token - geometry.q_offset()], causal_k[b])));
  softmax(all);
  std::vector<double> scores(geometry.diagonal(row) + 1, 0.0);
  for (std::size_t i = 0; i < all.size(); ++i) scores[i % whole] += all[i];
  nan_to_zero(scores);
  return scores;
}

}  // namespace pbsattn::reference
