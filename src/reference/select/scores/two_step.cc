// BlockScore::two_step: means of blocks for all, then keys themselves for those that may be kept.
#include <algorithm>
#include <cmath>

#include "core/keep_rule.h"
#include "reference/select/scores/scores.h"

namespace pbsattn::reference {

std::vector<double> two_step_scores(const Head& head, const Options& options, const Geometry& geometry,
                                    std::int64_t row, std::span<const std::int32_t> order, const Matrix& causal_k) {
  const Logits logits(options);
  const std::int64_t own_begin = geometry.own_begin(row);
  const std::int64_t diagonal = geometry.diagonal(row);
  const auto first =
      pooled_shares(head, geometry, causal_k, logits, sampled_tokens(geometry, row, options.two_step_queries));
  const double least = row_threshold(options, diagonal) / options.two_step_reach;
  const auto read = [&](std::int64_t b) { return b >= own_begin || first[b] >= least; };

  // Each query's softmax over keys of blocks that are read, and over means, as heavy as their keys, of the others.
  const auto tokens = sampled_tokens(geometry, row, options.two_step_exact);
  std::vector<double> second(diagonal + 1, 0.0);
  for (const std::int64_t token : tokens) {
    const auto query = head.q[token - geometry.q_offset()];
    std::vector<double> share;
    std::vector<std::int64_t> block;
    for (std::int64_t b = 0; b <= diagonal; ++b) {
      if (!read(b)) {
        share.push_back(logits(dot(query, causal_k[b])) + std::log(geometry.block));
        block.push_back(b);
        continue;
      }
      for (std::int64_t slot = b * geometry.block; slot < std::min((b + 1) * geometry.block, token + 1); ++slot) {
        share.push_back(logits(dot(query, head.k[b < own_begin ? order[slot] : slot])));
        block.push_back(b);
      }
    }
    softmax(share);
    for (std::size_t i = 0; i < share.size(); ++i) second[block[i]] += share[i] / static_cast<double>(tokens.size());
  }

  std::vector<double> scores(diagonal + 1, 0.0);
  const auto is_nan = [](double s) { return std::isnan(s); };
  if (std::ranges::any_of(first, is_nan) || std::ranges::any_of(second, is_nan)) return scores;
  for (std::int64_t b = 0; b <= diagonal; ++b) scores[b] = (first[b] + (read(b) ? second[b] : 0)) / 2;
  return scores;
}

}  // namespace pbsattn::reference
