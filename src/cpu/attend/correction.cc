#include "cpu/attend/correction.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace pbsattn::cpu {
namespace {

// Calls body(b) for the blocks before the row's own segment that aren't listed.
template <class Body>
void for_each_left_out(std::int64_t own_begin, std::span<const std::int32_t> blocks, Body&& body) {
  auto listed = blocks.begin();
  for (std::int64_t b = 0; b < own_begin; ++b)
    if (listed != blocks.end() && *listed == b)
      ++listed;
    else
      body(b);
}

}  // namespace

std::int64_t correction_bytes(const Geometry& geometry, std::int64_t permuted_blocks) {
  return (up_to_tile(permuted_blocks) + geometry.shape.head_dim) * strip * static_cast<std::int64_t>(sizeof(float));
}

void correct_strip(const StageContext& c, std::int64_t head, std::int64_t row, std::int64_t first, int count,
                   std::span<const std::int32_t> blocks, const StripState& state, std::byte* scratch) {
  const Geometry& g = c.geometry();
  const int dim = c.head_dim();
  const std::int64_t own_begin = g.own_begin(row);
  float* const scores = reinterpret_cast<float*>(scratch);
  float* const queries = scores + up_to_tile(c.layout.permuted_blocks) * strip;
  c.f32_kernels.pack.queries(c.q_rows(head, first), count, dim, queries);
  c.f32_kernels.scores(c.pooled_k(head), queries, static_cast<int>(up_to_tile(own_begin)), dim, scores);
  c.cap(scores, own_begin * strip);

  for_each_left_out(own_begin, blocks, [&](std::int64_t b) {
    for (int i = 0; i < strip; ++i) state.max[i] = std::max(state.max[i], scores[b * strip + i]);
  });
  const auto keys = static_cast<float>(g.block);  // that a mean stands for
  std::array<float, strip> weight;
  for_each_left_out(own_begin, blocks, [&](std::int64_t b) {
    for (int i = 0; i < strip; ++i) {
      const float origin = state.max[i] == -std::numeric_limits<float>::infinity() ? 0.0F : state.max[i];
      weight[i] = keys * std::exp2((scores[b * strip + i] - origin) * c.scale_log2());
      state.sum[i] += weight[i];
    }
    const float* const value = c.pooled_v(head) + b * c.head_dim_v();
    for (int d = 0; d < c.head_dim_v(); ++d)
      for (int i = 0; i < strip; ++i) state.out[d * strip + i] += weight[i] * value[d];
  });
}

}  // namespace pbsattn::cpu
