// BlockScore::per_query: the sum over the row's queries of each block's share of their softmax over means of blocks.
#include <algorithm>
#include <array>
#include <cmath>

#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {

bool add_pooled_shares(const StageContext& c, std::int64_t head, std::int64_t row, const Rows& queries, int count,
                       const SelectScratch& scratch, float* weights) {
  const Geometry& g = c.geometry();
  const int dim = c.head_dim();
  // The blocks before the row's own segment, with keys as they were moved, and those of it, where they were.
  const auto before = static_cast<int>(g.own_begin(row));
  const int own = static_cast<int>(g.diagonal(row)) + 1 - before;
  const float* const pooled_k = c.pooled_k(head);
  const float* const pooled_own = c.pooled_own(head) + std::int64_t{before} * dim;
  float* const own_exps = scratch.scores + up_to_tile(before) * strip;
  alignas(cache_line) std::array<float, 2 * strip> max;
  alignas(cache_line) std::array<float, 2 * strip> sum;
  c.f32_kernels.pack.queries(queries, count, dim, scratch.packed);
  c.f32_kernels.score_keys(pooled_k, scratch.packed, before, dim, c.logits(), max.data(), sum.data(), scratch.scores);
  c.f32_kernels.score_keys(pooled_own, scratch.packed, own, dim, c.logits(), max.data() + strip, sum.data() + strip,
                           own_exps);
  c.f32_kernels.score_factors(max.data(), sum.data(), 2, strip, c.scale_log2(), count);
  for (int i = 0; i < count; ++i)
    if (std::isnan(max[i])) return false;
  c.f32_kernels.weigh_keys(scratch.scores, 1, before, max.data(), weights);
  c.f32_kernels.weigh_keys(own_exps, 1, own, max.data() + strip, weights + before);
  return true;
}

double score_per_query(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  std::fill_n(scratch.weights, g.diagonal(row) + 1, 0.0F);
  for (std::int64_t token = g.row_begin(row); token < g.row_end(row); token += strip) {
    const int queries = static_cast<int>(std::min<std::int64_t>(strip, g.row_end(row) - token));
    if (!add_pooled_shares(c, head, row, c.q_rows(head, token - g.q_offset()), queries, scratch, scratch.weights))
      return std::nan("");
  }
  return static_cast<double>(g.row_end(row) - g.row_begin(row));
}

}  // namespace pbsattn::cpu
