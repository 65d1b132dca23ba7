// BlockScore::exact and sampled: attention mass itself, of all of a row's queries or of some.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/score_traits.h"
#include "reference/select/scores/scores.h"

namespace pbsattn::reference {
namespace {

// Returns the mean over some of a row's queries, given by their tokens, of their softmax over all visible keys, by
// block.
std::vector<double> masses(const Head& head, const Geometry& geometry, std::int64_t row,
                           std::span<const std::int32_t> order, const Logits& logits,
                           std::span<const std::int64_t> tokens) {
  const std::int64_t own_token = geometry.own_begin(row) * geometry.block;
  std::vector<double> mean(geometry.diagonal(row) + 1, 0.0);
  std::vector<double> share;
  for (const std::int64_t token : tokens) {
    share.resize(token + 1);
    const auto query = head.q[token - geometry.q_offset()];
    for (std::int64_t slot = 0; slot <= token; ++slot)
      share[slot] = logits(dot(query, head.k[slot < own_token ? order[slot] : slot]));
    softmax(share);
    for (std::int64_t slot = 0; slot <= token; ++slot)
      mean[slot / geometry.block] += share[slot] / static_cast<double>(tokens.size());
  }
  return mean;
}

}  // namespace

std::vector<double> exact_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                 std::span<const std::int32_t> order, const Logits& logits) {
  std::vector<std::int64_t> tokens(geometry.row_end(row) - geometry.row_begin(row));
  std::iota(tokens.begin(), tokens.end(), geometry.row_begin(row));
  auto scores = masses(head, geometry, row, order, logits, tokens);
  nan_to_zero(scores);
  return scores;
}

std::vector<double> sampled_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                   std::span<const std::int32_t> order, const Matrix& causal_k, const Logits& logits) {
  auto scores = masses(head, geometry, row, order, logits, sampled_tokens(geometry, row, most_sampled));
  const auto pooled = per_query_scores(head, geometry, row, causal_k, logits);
  const bool no_value = std::ranges::all_of(pooled, [](double s) { return s == 0; });
  for (std::size_t b = 0; b < scores.size(); ++b) scores[b] = no_value ? std::nan("") : (scores[b] + pooled[b]) / 2;
  nan_to_zero(scores);
  return scores;
}

}  // namespace pbsattn::reference
