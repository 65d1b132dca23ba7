// BlockScore::energy: exp(score) summed over the row's queries, measured from the highest of all.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/select/scores/means.h"
#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {

double score_energy(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const int dim = c.head_dim();
  const float scale = c.scale_left();
  const std::int64_t whole = g.row_end(row) / g.block;  // blocks that the row's last query sees whole
  float max = -std::numeric_limits<float>::infinity();
  std::fill_n(scratch.weights, g.diagonal(row) + 1, 0.0F);
  for (std::int64_t token = g.row_begin(row); token < g.row_end(row); token += strip) {
    const int queries = static_cast<int>(std::min<std::int64_t>(strip, g.row_end(row) - token));
    c.f32_kernels.pack.queries(c.q_rows(head, token - g.q_offset()), queries, dim, scratch.packed);
    score_causal_means(c, head, row, scratch);
    c.cap(scratch.scores, whole * strip);
    float highest = max;
    for (std::int64_t b = 0; b < whole; ++b)
      for (int i = 0; i < queries; ++i) highest = std::max(highest, scratch.scores[b * strip + i] * scale);
    const float carry = std::isinf(max) ? 0.0F : std::exp(max - highest);
    max = highest;
    for (std::int64_t b = 0; b < whole; ++b) {
      float sum = 0;
      for (int i = 0; i < queries; ++i) sum += std::exp(scratch.scores[b * strip + i] * scale - max);
      scratch.weights[b] = scratch.weights[b] * carry + sum;
    }
  }
  double total = 0;
  for (std::int64_t b = 0; b < whole; ++b) total += static_cast<double>(scratch.weights[b]);
  return total;
}

}  // namespace pbsattn::cpu
