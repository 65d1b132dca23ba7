// BlockScore::antidiagonal (XAttention, arXiv 2503.16428): of each patch of queries and keys the antidiagonal
// stands for all pairs, since every query and every key is on it once.
#include <cmath>

#include "core/score_traits.h"
#include "reference/select/scores/scores.h"

namespace pbsattn::reference {

std::vector<double> antidiagonal_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                        std::span<const std::int32_t> order, bool causal, const Logits& logits) {
  const std::int64_t own_begin = geometry.own_begin(row);
  const std::int64_t blocks = causal ? geometry.diagonal(row) + 1 : own_begin;
  std::vector<double> mean(blocks, 0.0);
  std::vector<double> share;
  std::int64_t groups = 0;
  for (std::int64_t r = geometry.diagonal(row) * geometry.block; r < geometry.row_end(row); r += patch_tokens) {
    if (r + patch_tokens <= geometry.row_begin(row)) continue;  // before a chunk's first query
    ++groups;
    const std::int64_t keys = std::min(blocks * geometry.block, causal ? r + patch_tokens : own_begin * geometry.block);
    share.assign(keys / patch_tokens, 0.0);
    for (std::int64_t c = 0; c < keys; c += patch_tokens) {
      for (std::int64_t i = 0; i < patch_tokens; ++i) {
        const std::int64_t token = r + patch_tokens - 1 - i;
        const std::int64_t slot = c + i;
        if (token < geometry.row_begin(row) || token >= geometry.row_end(row) || slot >= geometry.shape.kv_len)
          continue;
        const std::int64_t key = slot < own_begin * geometry.block ? order[slot] : slot;
        share[c / patch_tokens] += dot(head.q[token - geometry.q_offset()], head.k[key]) / patch_tokens;
      }
    }
    for (double& x : share) x = logits(x);
    softmax(share);
    for (std::size_t c = 0; c < share.size(); ++c) mean[c * patch_tokens / geometry.block] += share[c];
  }
  for (double& x : mean) x = std::isnan(x) ? 0.0 : x / static_cast<double>(groups);
  return mean;
}

}  // namespace pbsattn::reference
