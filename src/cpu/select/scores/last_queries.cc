#include "cpu/select/scores/last_queries.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/select/scores/mass.h"

namespace pbsattn::cpu {

void find_masses(const StageContext& c, std::int64_t head, std::int64_t queries, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const int dim = c.head_dim();
  std::fill_n(scratch.columns, g.shape.kv_len, 0.0F);
  std::fill_n(scratch.diagonals, g.shape.kv_len, 0.0F);
  for (std::int64_t first = g.shape.kv_len - queries; first < g.shape.kv_len; first += strip) {
    const auto count = static_cast<int>(std::min<std::int64_t>(strip, g.shape.kv_len - first));
    c.f32_kernels.pack.queries(c.q_rows(head, first - g.q_offset()), count, dim, scratch.packed);
    BlockMasses masses(c.f32_kernels, scratch, g.blocks(), c.logits());
    const auto add = [&](std::int64_t b) {
      const std::int64_t key = b * g.block;
      const int keys = pack_block(c, head, b, false, scratch.keys);
      if (key + g.block <= first)
        masses.add(b, scratch.keys, keys, dim, scratch.packed);
      else
        masses.add_masked(b, scratch.keys, keys, dim, scratch.packed,
                          [&](int query, int i) { return query < count && key + i <= first + query; });
      return keys;
    };
    for (std::int64_t b = 0; b < g.blocks(); ++b) add(b);
    masses.finish(count);
    // The second sweep overwrites maxima, whose place the factors took.
    std::copy_n(scratch.scores, g.blocks() * strip, scratch.patches);
    for (std::int64_t b = 0; b < g.blocks(); ++b) {
      const int keys = add(b);
      for (int i = 0; i < keys; ++i) {
        const std::int64_t n = b * g.block + i;
        for (int query = 0; query < count && n <= first + count - 1; ++query) {
          const float factor = scratch.patches[b * strip + query];
          if (std::isnan(factor) || n > first + query) continue;  // NaN makes its query count nothing
          const float mass = scratch.exps[i * strip + query] * factor / static_cast<float>(queries);
          scratch.columns[n] += mass;
          scratch.diagonals[first + query - n] += mass;
        }
      }
    }
  }
}

std::span<std::int32_t> rank(std::span<const float> masses, std::int32_t* memory) {
  const std::span order(memory, masses.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(
      order, [&](std::int32_t a, std::int32_t b) { return masses[a] != masses[b] ? masses[a] > masses[b] : a < b; });
  return order;
}

void mark_heaviest(std::span<float> masses, std::int64_t count, std::int64_t forced, std::int32_t* memory) {
  constexpr float above_all = 2;  // masses are means of softmax weights
  const auto size = static_cast<std::int64_t>(masses.size());
  std::fill_n(masses.begin(), std::min(forced, size), above_all);
  const auto order = rank(masses, memory);
  for (std::int64_t i = 0; i < size; ++i) masses[order[i]] = i < count ? 1.0F : 0.0F;
}

}  // namespace pbsattn::cpu
