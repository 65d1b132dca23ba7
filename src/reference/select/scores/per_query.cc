#include "core/score_traits.h"
#include "reference/select/scores/scores.h"

namespace pbsattn::reference {

std::vector<std::int64_t> sampled_tokens(const Geometry& geometry, std::int64_t row, std::int64_t most) {
  const std::int64_t queries = geometry.row_end(row) - geometry.row_begin(row);
  std::vector<std::int64_t> tokens(sampled_queries(queries, most));
  for (std::size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = geometry.row_begin(row) + sampled_query(queries, static_cast<std::int64_t>(i), most);
  return tokens;
}

std::vector<double> pooled_shares(const Head& head, const Geometry& geometry, const Matrix& causal_k,
                                  const Logits& logits, std::span<const std::int64_t> tokens) {
  std::vector<double> mean(causal_k.rows, 0.0);
  std::vector<double> share(causal_k.rows);
  for (const std::int64_t token : tokens) {
    const auto query = head.q[token - geometry.q_offset()];
    for (std::int64_t b = 0; b < causal_k.rows; ++b) share[b] = logits(dot(query, causal_k[b]));
    softmax(share);
    for (std::int64_t b = 0; b < causal_k.rows; ++b) mean[b] += share[b] / static_cast<double>(tokens.size());
  }
  return mean;
}

std::vector<double> per_query_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                     const Matrix& causal_k, const Logits& logits) {
  auto mean = pooled_shares(head, geometry, causal_k, logits, sampled_tokens(geometry, row, geometry.block));
  nan_to_zero(mean);
  return mean;
}

}  // namespace pbsattn::reference
