// BlockScore::mean_pool and mean_pool_causal.
#include "cpu/select/scores/means.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/score_traits.h"
#include "cpu/permute/permute.h"
#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {

void pool_query(const StageContext& c, std::int64_t head, std::int64_t row, float* pooled_q) {
  const Geometry& g = c.geometry();
  const std::int64_t begin = g.row_begin(row);
  const auto count = static_cast<int>(g.row_end(row) - begin);
  pool_rows(c, c.q_rows(head, begin - g.q_offset()), count, divides_by_count(c.spec.options) ? count : g.block,
            c.head_dim(), pooled_q);
}

void multiply_means(const StageContext& c, const float* means, std::int64_t blocks, const SelectScratch& scratch,
                    float* scores) {
  c.f32_kernels.scores(means, scratch.packed, static_cast<int>(up_to_tile(blocks)), c.head_dim(), scores);
}

void score_causal_means(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const std::int64_t own_begin = c.geometry().own_begin(row);
  multiply_means(c, c.pooled_own(head), c.geometry().diagonal(row) + 1, scratch, scratch.scores);
  if (!c.layout.permuted || own_begin == 0) return;
  multiply_means(c, c.pooled_k(head), own_begin, scratch, scratch.sums);
  std::copy_n(scratch.sums, own_begin * strip, scratch.scores);
}

double exponentials(const float* scores, int lane, std::int64_t blocks, float scale, float* weights) {
  float max = -std::numeric_limits<float>::infinity();
  for (std::int64_t b = 0; b < blocks; ++b) max = std::max(max, scores[b * strip + lane] * scale);
  double total = 0;
  for (std::int64_t b = 0; b < blocks; ++b) total += weights[b] = std::exp(scores[b * strip + lane] * scale - max);
  return total;
}

void score_mean_pool(const StageContext& c, std::int64_t head, std::int64_t first_row, int rows,
                     const SelectScratch& scratch) {
  const int dim = c.head_dim();
  for (int i = 0; i < rows; ++i) pool_query(c, head, first_row + i, scratch.pooled_q + i * dim);
  c.f32_kernels.pack.queries({scratch.pooled_q, DType::f32, dim, nullptr}, rows, dim, scratch.packed);
  multiply_means(c, c.pooled_k(head), c.layout.permuted_blocks, scratch, scratch.scores);
  c.cap(scratch.scores, up_to_tile(c.layout.permuted_blocks) * strip);
}

double mean_pool_weights(const StageContext& c, std::int64_t row, int lane, const SelectScratch& scratch) {
  return exponentials(scratch.scores, lane, c.geometry().own_begin(row), c.scale_left(), scratch.weights);
}

double score_mean_pool_causal(const StageContext& c, std::int64_t head, std::int64_t row,
                              const SelectScratch& scratch) {
  const int dim = c.head_dim();
  pool_query(c, head, row, scratch.pooled_q);
  c.f32_kernels.pack.queries({scratch.pooled_q, DType::f32, dim, nullptr}, 1, dim, scratch.packed);
  score_causal_means(c, head, row, scratch);
  const std::int64_t blocks = c.geometry().diagonal(row) + 1;
  c.cap(scratch.scores, blocks * strip);
  return exponentials(scratch.scores, 0, blocks, c.scale_left(), scratch.weights);
}

}  // namespace pbsattn::cpu
