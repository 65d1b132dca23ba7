// Moves keys and values: packs them in their original order and scores the keys by the last queries, block by
// block; then orders each complete segment by score, and packs its far blocks again in that order.
//
// A key's score needs the softmax's maximum and sum over all keys, and they are known only after the last block.
// So exponentials are kept, each block's measured from its own maximum: storing them is cheaper than a
// second product.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numeric>
#include <span>
#include <utility>

#include "core/score_traits.h"
#include "cpu/parallel.h"
#include "cpu/permute/permute.h"

namespace pbsattn::cpu {
namespace {

// Block b's rows of the original order.
struct BlockRange {
  std::int64_t first;
  int count;
};

BlockRange block_range(const Geometry& g, std::int64_t block) {
  const std::int64_t first = block * g.block;
  return {first, static_cast<int>(std::min<std::int64_t>(g.block, g.shape.kv_len - first))};
}

int padded(const StageContext& c, int count) {
  const int step = c.kernels.key_step;
  return std::min((count + step - 1) / step * step, c.geometry().block);
}

// The mean of a block's rows, over `divisor` of them, rounded to their dtype as the method has it.
void pool(const StageContext& c, const Rows& rows, int count, int divisor, float* mean) {
  const auto dim = static_cast<int>(c.geometry().shape.head_dim);
  c.f32_kernels.sum_rows(rows, count, dim, mean);
  for (int d = 0; d < dim; ++d) mean[d] /= static_cast<float>(divisor);
  c.f32_kernels.round_row(rows.dtype, dim, mean);
}

// The means of a far block.
void pool_far(const StageContext& c, std::int64_t far_head, std::int64_t block, const Rows& keys, const Rows& values) {
  const Geometry& g = c.geometry();
  const std::int64_t pooled_rows = ceil_div(c.pass.far_blocks, row_tile) * row_tile;
  const std::int64_t place = (far_head * pooled_rows + block) * g.shape.head_dim;
  if (c.pass.scored || c.pass.corrected) pool(c, keys, g.block, g.block, c.pass.pooled_keys + place);
  if (c.pass.corrected) pool(c, values, g.block, g.block, c.pass.pooled_values + place);
}

// The mean of a block's keys in their original order; the last block's follows the rules.
void pool_original(const StageContext& c, std::int64_t kv_head, std::int64_t block, const Rows& keys, int count) {
  const Geometry& g = c.geometry();
  if (!c.pass.scored || !pools_own(c.spec.options.score)) return;
  const std::int64_t stored = ceil_div(g.blocks(), row_tile) * row_tile;
  pool(c, keys, count, divides_by_count(c.spec.options) ? count : g.block,
       c.pass.original_pooled + (kv_head * stored + block) * g.shape.head_dim);
}

void pack_scoring_queries(const StageContext& c) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  const std::int64_t strips = c.pass.scoring_strips;
  parallel_for(c.spec.threads, c.heads.q_count * strips, [&](std::int64_t item, int) {
    const std::int64_t first = item % strips * strip;
    const auto count = static_cast<int>(std::min<std::int64_t>(strip, g.scoring_queries() - first));
    c.kernels.pack_queries(c.q_rows(item / strips, g.shape.q_len - g.scoring_queries() + first), count, dim,
                           c.pass.scoring_queries + item * c.pass.strip_bytes);
  });
}

// The last queries' exponentials on one block of keys, for each query head that reads them.
void score_block(const StageContext& c, std::int64_t kv_head, std::int64_t block, const std::byte* keys) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  const std::int64_t strips = c.pass.scoring_strips;
  for (std::int64_t head = 0; head < c.heads.q_count; ++head) {
    if (c.kv_head(head) != kv_head) continue;
    for (std::int64_t i = 0; i < strips; ++i) {
      const std::int64_t place = (head * c.pass.scored_blocks + block) * strips + i;
      c.kernels.score_keys(keys, c.pass.scoring_queries + (head * strips + i) * c.pass.strip_bytes, g.block, dim,
                           c.scale_log2(), c.pass.score_factors + place * strip, c.pass.score_sums + place * strip,
                           c.pass.exps + place * c.pass.exps_bytes);
    }
  }
}

// Packs every block in its original order. What else is made of a block's keys is made while they are in cache.
void pack_original(const StageContext& c) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  parallel_for(c.spec.threads, c.heads.kv_count * g.blocks(), [&](std::int64_t item, int) {
    const std::int64_t head = item / g.blocks();
    const std::int64_t block = item % g.blocks();
    const auto [first, count] = block_range(g, block);
    const Rows k = c.rows_of(c.inputs.k, c.heads.kv_begin + head, first);
    const Rows v = c.rows_of(c.inputs.v, c.heads.kv_begin + head, first);
    std::byte* const keys = c.pass.keys + item * c.pass.block_bytes;
    c.kernels.pack_keys(k, count, padded(c, count), dim, keys);
    if (c.pass.permuted && block < c.pass.scored_blocks) score_block(c, head, block, keys);
    if (!c.pass.permuted && block < c.pass.far_blocks) pool_far(c, head, block, k, v);
    pool_original(c, head, block, k, count);
    c.pass.values_finite[item] =
        c.kernels.pack_values(v, count, padded(c, count), dim, c.pass.values + item * c.pass.block_bytes);
  });
}

void finish_scores(const StageContext& c) {
  const Geometry& g = c.geometry();
  const std::int64_t strips = c.pass.scoring_strips;
  parallel_for(c.spec.threads, c.heads.q_count * strips, [&](std::int64_t item, int) {
    const std::int64_t i = item % strips;
    const std::int64_t place = (item / strips * c.pass.scored_blocks * strips + i) * strip;
    const auto queries = static_cast<int>(std::min<std::int64_t>(strip, g.scoring_queries() - i * strip));
    c.f32_kernels.score_factors(c.pass.score_factors + place, c.pass.score_sums + place, c.pass.scored_blocks,
                                strips * strip, c.scale_log2(), queries);
  });
}

// Writes the tokens begin .. begin + weights.size() - 1 in descending weight, of equal ones in their order, NaN last: a
// radix sort, byte by byte from the lowest, which keeps equal keys in place and has no branch to mispredict.
void sort_by_weight(std::span<const float> weights, std::int64_t begin, std::uint32_t* keys, std::int32_t* other,
                    std::int32_t* order) {
  constexpr int bytes = 4;
  const auto size = static_cast<std::int32_t>(weights.size());
  const auto byte_of = [](std::uint32_t key, int byte) { return key >> (8 * byte) & 0xFF; };
  std::array<std::array<std::int32_t, 256>, bytes> places{};  // how many keys have a byte, then where the next one goes
  for (std::int32_t i = 0; i < size; ++i) {
    // Weights are not negative, so their bits order as they do.
    keys[i] = std::isnan(weights[i]) ? ~std::uint32_t{0} : ~std::bit_cast<std::uint32_t>(weights[i]) - 1;
    order[i] = i;
    for (int byte = 0; byte < bytes; ++byte) ++places[byte][byte_of(keys[i], byte)];
  }
  std::int32_t* from = order;
  std::int32_t* to = other;
  for (int byte = 0; byte < bytes; ++byte) {
    auto& place = places[byte];
    std::exclusive_scan(place.begin(), place.end(), place.begin(), 0);
    for (std::int32_t i = 0; i < size; ++i) to[place[byte_of(keys[from[i]], byte)]++] = from[i];
    std::swap(from, to);
  }
  static_assert(bytes % 2 == 0, "or the last byte's order is in `other`");
  for (std::int32_t i = 0; i < size; ++i) order[i] += static_cast<std::int32_t>(begin);
}

// Orders one segment: its keys in descending score.
void order_segment(const StageContext& c, std::int64_t order_head, std::int64_t begin, std::byte* scratch) {
  const Geometry& g = c.geometry();
  const std::int64_t heads = c.pass.shared_order ? g.group() : 1;
  const std::int64_t strips = c.pass.scoring_strips;
  float* const weights = reinterpret_cast<float*>(scratch);
  std::fill_n(weights, g.segment, 0.0F);
  for (std::int64_t head = order_head * heads; head < (order_head + 1) * heads; ++head) {
    for (std::int64_t i = 0; i < g.segment; i += g.block) {
      const std::int64_t place = (head * c.pass.scored_blocks + (begin + i) / g.block) * strips;
      c.kernels.weigh_keys(c.pass.exps + place * c.pass.exps_bytes, static_cast<int>(strips), g.block,
                           c.pass.score_factors + place * strip, weights + i);
    }
  }
  auto* const keys = reinterpret_cast<std::uint32_t*>(weights + g.segment);
  auto* const other = reinterpret_cast<std::int32_t*>(keys + g.segment);
  std::int32_t* const order = c.pass.order + order_head * g.permuted_len() + begin;
  sort_by_weight({weights, static_cast<std::size_t>(g.segment)}, begin, keys, other, order);
  if (begin == 0) c.pass.sink_block[order_head] = (std::find(order, order + g.segment, 0) - order) / g.block;
}

// Orders the keys of each segment, and packs and pools its far blocks in that order.
void order_segments(const StageContext& c) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  const std::int64_t orders = c.pass.shared_order ? c.heads.kv_count : c.heads.q_count;
  parallel_for(c.spec.threads, orders * g.complete_segments(), [&](std::int64_t item, int thread) {
    const std::int64_t head = item % orders;  // heads of a group read the same tokens while they are in cache
    const std::int64_t begin = item / orders * g.segment;
    order_segment(c, head, begin, c.scratch(thread));
    const std::int64_t kv_head = c.heads.kv_begin + (c.pass.shared_order ? head : c.kv_head(head));
    const std::int64_t end = std::min((begin + g.segment) / g.block, c.pass.far_blocks);
    for (std::int64_t block = begin / g.block; block < end; ++block) {
      Rows k = c.rows_of(c.inputs.k, kv_head, 0);
      Rows v = c.rows_of(c.inputs.v, kv_head, 0);
      k.index = v.index = c.pass.order + head * g.permuted_len() + block * g.block;
      pool_far(c, head, block, k, v);
      if (c.kernels.gathers) continue;
      const std::int64_t place = (head * c.pass.far_blocks + block) * c.pass.block_bytes;
      c.kernels.pack_keys(k, g.block, g.block, dim, c.pass.far_keys + place);
      c.kernels.pack_values(v, g.block, g.block, dim, c.pass.far_values + place);
    }
  });
}

}  // namespace

void permute(const StageContext& c) {
  if (c.pass.permuted) pack_scoring_queries(c);
  pack_original(c);
  if (!c.pass.permuted) return;
  finish_scores(c);
  order_segments(c);
}

}  // namespace pbsattn::cpu
