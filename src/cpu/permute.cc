// Moves keys and values: packs them in their original order, scores the keys by the last queries, sorts
// each complete segment by score, and packs the far blocks again in that order.
#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "cpu/pool.h"
#include "cpu/stages.h"

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

int padded(int count) {
  return (count + row_tile - 1) / row_tile * row_tile;
}

float* pooled_row(const StageContext& c, std::int64_t head, std::int64_t block) {
  const std::int64_t pooled_rows = ceil_div(c.pass.far_blocks, row_tile) * row_tile;
  return c.pass.pooled_keys + (head * pooled_rows + block) * c.geometry().shape.head_dim;
}

// Turns a sum of `block` keys into the pooled key, in the keys' dtype as the method has it.
void pool_key(const StageContext& c, float* sum) {
  const auto dim = c.geometry().shape.head_dim;
  for (std::int64_t d = 0; d < dim; ++d) sum[d] /= static_cast<float>(c.geometry().block);
  c.f32_kernels.round_row(c.inputs.k.dtype, static_cast<int>(dim), sum);
}

void pack_original(const StageContext& c) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  parallel_for(c.spec.threads, c.heads.kv_count * g.blocks(), [&](std::int64_t item, int) {
    const std::int64_t head = item / g.blocks();
    const std::int64_t block = item % g.blocks();
    const auto [first, count] = block_range(g, block);
    float* const pool =
        c.pass.scored && !c.pass.permuted && block < c.pass.far_blocks ? pooled_row(c, head, block) : nullptr;
    if (pool != nullptr) std::fill_n(pool, dim, 0.0F);
    c.kernels.pack_keys(c.rows_of(c.inputs.k, c.heads.kv_begin + head, first), count, padded(count), dim,
                        c.pass.keys + item * c.pass.block_bytes, pool);
    c.pass.values_finite[item] = c.kernels.pack_values(c.rows_of(c.inputs.v, c.heads.kv_begin + head, first), count,
                                                       padded(count), dim, c.pass.values + item * c.pass.block_bytes);
    if (pool != nullptr) pool_key(c, pool);
  });
}

// The softmax weight of the last queries on every key of a complete segment, summed by strip. Exponentials
// are kept until the final max and sum are known: storing them is cheaper than a second product.
void score_keys(const StageContext& c) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  const std::int64_t strips = c.pass.scoring_strips;
  const std::int64_t blocks = g.permuted_len() / g.block;
  parallel_for(c.pass.scoring_threads, c.heads.q_count * strips, [&](std::int64_t item, int thread) {
    const std::int64_t head = item / strips;
    const std::int64_t first = g.shape.q_len - g.scoring_queries() + item % strips * strip;
    const int queries = static_cast<int>(std::min<std::int64_t>(strip, g.shape.q_len - first));
    float* const max = reinterpret_cast<float*>(c.scratch(thread));
    float* const sum = max + strip;
    float* const factors = sum + strip;
    float* const packed = factors + strip;
    float* const exps = c.pass.exps + thread * c.pass.exps_floats;
    float* const block_max = exps + g.permuted_len() * strip;
    const std::byte* const keys = c.pass.keys + c.kv_head(head) * g.blocks() * c.pass.block_bytes;

    c.kernels.pack_queries(c.q_rows(head, first), queries, dim, packed);
    std::fill_n(max, strip, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, strip, 0.0F);
    for (std::int64_t b = 0; b < blocks; ++b) {
      c.kernels.score_keys(keys + b * c.pass.block_bytes, packed, g.block, dim, c.scale_log2(), max, sum,
                           exps + b * g.block * strip);
      std::copy_n(max, strip, block_max + b * strip);
    }
    float* const weights = c.pass.weights + item * g.permuted_len();
    for (std::int64_t b = 0; b < blocks; ++b) {
      for (int i = 0; i < strip; ++i) {
        const float origin = block_max[b * strip + i];
        const bool nothing = std::isinf(origin) && origin < 0;        // then exps were measured from 0, and are 0
        const bool undefined = std::isnan(sum[i]) || sum[i] == 0.0F;  // a NaN score, or all of them -inf
        if (i >= queries || (nothing && !undefined))
          factors[i] = 0.0F;
        else
          factors[i] = undefined ? std::nanf("") : std::exp2((origin - max[i]) * c.scale_log2()) / sum[i];
      }
      c.kernels.weigh_keys(exps + b * g.block * strip, g.block, factors, weights + b * g.block);
    }
  });
}

// Descending score, ties by index; NaN last.
void sort_segments(const StageContext& c) {
  const Geometry& g = c.geometry();
  const std::int64_t segments = g.complete_segments();
  const std::int64_t per_order = c.pass.shared_order ? g.group() : 1;
  const std::int64_t orders = c.heads.q_count / per_order;
  const std::int64_t shares = per_order * c.pass.scoring_strips;
  const std::int64_t len = g.permuted_len();
  parallel_for(c.spec.threads, orders * segments, [&](std::int64_t item, int thread) {
    const std::int64_t head = item / segments;
    const std::int64_t begin = item % segments * g.segment;
    const std::int64_t end = begin + g.segment;
    float* const total = c.pass.weights + head * shares * len;
    for (std::int64_t share = 1; share < shares; ++share)
      for (std::int64_t i = begin; i < end; ++i) total[i] += total[share * len + i];
    // Weights are not negative, so their bits order as they do. A key is (weight, reversed index).
    auto* const keys = reinterpret_cast<std::uint64_t*>(c.scratch(thread));
    for (std::int64_t i = begin; i < end; ++i) {
      const std::uint32_t rank = std::isnan(total[i]) ? 0 : std::bit_cast<std::uint32_t>(total[i]) + 1;
      keys[i - begin] = std::uint64_t{rank} << 32 | static_cast<std::uint32_t>(~i);
    }
    std::sort(keys, keys + g.segment, std::greater<>());
    std::int32_t* const order = c.pass.order + head * len;
    for (std::int64_t i = begin; i < end; ++i)
      order[i] = static_cast<std::int32_t>(~static_cast<std::uint32_t>(keys[i - begin]));
    if (begin == 0) c.pass.sink_block[head] = (std::find(order, order + end, 0) - order) / g.block;
  });
}

void pack_permuted(const StageContext& c) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  const std::int64_t orders = c.pass.shared_order ? c.heads.kv_count : c.heads.q_count;
  parallel_for(c.spec.threads, orders * c.pass.far_blocks, [&](std::int64_t item, int) {
    const std::int64_t head = item % orders;  // heads of a group read the same tokens while they are in cache
    const std::int64_t block = item / orders;
    const std::int64_t place = (head * c.pass.far_blocks + block) * c.pass.block_bytes;
    const std::int64_t kv_head = c.heads.kv_begin + (c.pass.shared_order ? head : c.kv_head(head));
    const std::int32_t* const tokens = c.pass.order + head * g.permuted_len() + block * g.block;
    float* const pool = c.pass.scored ? pooled_row(c, head, block) : nullptr;
    if (pool != nullptr) std::fill_n(pool, dim, 0.0F);
    Rows k = c.rows_of(c.inputs.k, kv_head, 0);
    Rows v = c.rows_of(c.inputs.v, kv_head, 0);
    k.index = v.index = tokens;
    c.kernels.pack_keys(k, g.block, g.block, dim, c.pass.far_keys + place, pool);
    c.kernels.pack_values(v, g.block, g.block, dim, c.pass.far_values + place);
    if (pool != nullptr) pool_key(c, pool);
  });
}

}  // namespace

void permute(const StageContext& c) {
  pack_original(c);
  if (!c.pass.permuted) return;
  score_keys(c);
  sort_segments(c);
  pack_permuted(c);
}

}  // namespace pbsattn::cpu
