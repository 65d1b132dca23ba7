// Moves keys and values: packs them in their original order and scores the keys by the last queries, block by block;
// then orders each complete segment by score, and packs its blocks again in that order.
//
// A key's score needs the softmax's maximum and sum over all keys, and they are known only after the last block. So
// exponentials are kept, each block's measured from its own maximum: storing them is cheaper than a second product.
// Learned scores need nothing but the segment's keys, and an order that is known (Permutation::arrival) no scores:
// there a segment is moved as soon as it is packed.
#include "cpu/permute/permute.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numeric>
#include <span>
#include <utility>

#include "core/score_traits.h"
#include "cpu/parallel.h"

namespace pbsattn::cpu {
namespace {

// Tells whether queries score keys: whether some segment has no order yet.
bool queries_score_keys(const StageContext& c) {
  return c.layout.scored_blocks > 0 && c.outputs.order.known < c.geometry().permuted_len();
}

// Rounds a block's number of keys up as the path packs them.
int padded(const StageContext& c, int count) {
  const int step = c.kernels.key_step;
  return std::min((count + step - 1) / step * step, c.geometry().block);
}

// Pools a permuted block's keys and values, where something reads their means.
void pool_permuted(const StageContext& c, std::int64_t order_head, std::int64_t block, const Rows& k, const Rows& v) {
  const int size = c.geometry().block;
  const std::int64_t row = order_head * c.layout.pooled_stride + block;
  if (c.layout.scored || c.layout.corrected)
    pool_rows(c, k, size, size, c.head_dim(), c.layout.pooled_k + row * c.head_dim());
  if (c.layout.corrected) pool_rows(c, v, size, size, c.head_dim_v(), c.layout.pooled_v + row * c.head_dim_v());
}

// Pools a block's keys where they were, where a score reads these means.
void pool_own(const StageContext& c, std::int64_t kv_head, std::int64_t block, const Rows& k, int count) {
  const Geometry& g = c.geometry();
  if (!c.layout.scored || !pools_own(c.spec.options.score)) return;
  pool_rows(c, k, count, divides_by_count(c.spec.options) ? count : g.block, c.head_dim(),
            c.layout.pooled_own + (kv_head * c.layout.pooled_own_stride + block) * c.head_dim());
}

// Packs the last queries, which score the keys.
void pack_scoring_queries(const StageContext& c) {
  const Geometry& g = c.geometry();
  const int dim = c.head_dim();
  const std::int64_t strips = c.layout.scoring_strips;
  parallel_for(c.spec.threads, c.heads.q_count * strips, [&](std::int64_t item, int) {
    const std::int64_t first = item % strips * strip;
    const auto count = static_cast<int>(std::min<std::int64_t>(strip, g.scoring_queries() - first));
    c.kernels.pack.queries(c.q_rows(item / strips, g.shape.q_len - g.scoring_queries() + first), count, dim,
                           c.layout.scoring_queries + item * c.layout.strip_bytes);
  });
}

// Scores one block of keys by the last queries: leaves the exponentials of each query head that reads them.
void score_block(const StageContext& c, std::int64_t kv_head, std::int64_t block, const std::byte* keys) {
  const Geometry& g = c.geometry();
  const int dim = c.head_dim();
  const std::int64_t strips = c.layout.scoring_strips;
  for (std::int64_t head = 0; head < c.heads.q_count; ++head) {
    if (c.kv_head(head) != kv_head) continue;
    for (std::int64_t i = 0; i < strips; ++i) {
      const std::int64_t place = (head * c.layout.scored_blocks + block) * strips + i;
      c.kernels.score_keys(keys, c.layout.scoring_queries + (head * strips + i) * c.layout.strip_bytes, g.block, dim,
                           c.logits(), c.layout.score_factors + place * strip, c.layout.score_sums + place * strip,
                           c.layout.exps + place * c.layout.exps_bytes);
    }
  }
}

// Packs a block in its original order. What else is made of its keys is made while they are in the processor's cache.
// Of a kept block only what nothing keeps is made: scores, and where keys were copied in another order, the original
// one for rows of its segment.
void pack_original(const StageContext& c, std::int64_t head, std::int64_t block, bool scores) {
  const Geometry& g = c.geometry();
  const int dim = c.head_dim();
  const int count = c.block_keys(block);
  const std::int64_t place = head * c.layout.block_stride + block;
  const bool kept = block < c.layout.kept_blocks;
  const bool scored = scores && block < c.layout.scored_blocks;
  const bool read = !kept || (c.layout.copied && block >= g.own_begin(0));
  const Rows k = c.kv_rows(c.inputs.k, c.heads.kv_begin + head, block * g.block);
  const Rows v = c.kv_rows(c.inputs.v, c.heads.kv_begin + head, block * g.block);
  std::byte* const keys = c.layout.k + place * c.layout.k_block_bytes;
  if (read || (scored && c.layout.copied)) c.kernels.pack.keys(k, count, padded(c, count), dim, keys);
  if (scored) score_block(c, head, block, keys);
  if (!kept && !c.layout.permuted && block < c.layout.permuted_blocks) pool_permuted(c, head, block, k, v);
  if (!kept) pool_own(c, head, block, k, count);
  if (!read) return;
  c.layout.values_finite[place] =
      c.kernels.pack.values(v, count, padded(c, count), c.head_dim_v(), c.layout.v + place * c.layout.v_block_bytes);
}

// Turns each block's maxima into factors of its exponentials.
void finish_scores(const StageContext& c) {
  const Geometry& g = c.geometry();
  const std::int64_t strips = c.layout.scoring_strips;
  parallel_for(c.spec.threads, c.heads.q_count * strips, [&](std::int64_t item, int) {
    const std::int64_t i = item % strips;
    const std::int64_t place = (item / strips * c.layout.scored_blocks * strips + i) * strip;
    const auto queries = static_cast<int>(std::min<std::int64_t>(strip, g.scoring_queries() - i * strip));
    c.f32_kernels.score_factors(c.layout.score_factors + place, c.layout.score_sums + place, c.layout.scored_blocks,
                                strips * strip, c.scale_log2(), queries);
  });
}

// Returns bits that order as the weights do, the highest first, NaN last and 0 as -0.
std::uint32_t descending_bits(float weight) {
  constexpr std::uint32_t sign = std::uint32_t{1} << 31;
  if (std::isnan(weight)) return ~std::uint32_t{0};
  const auto bits = std::bit_cast<std::uint32_t>(weight + 0.0F);
  return (bits & sign) != 0 ? bits : ~bits & ~sign;
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
    keys[i] = descending_bits(weights[i]);
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

// Writes the scores of a segment's keys by the last queries of the heads that share their order.
void weigh_by_queries(const StageContext& c, std::int64_t order_head, std::int64_t begin, float* weights) {
  const Geometry& g = c.geometry();
  const std::int64_t heads = c.layout.shared_order ? g.group() : 1;
  const std::int64_t strips = c.layout.scoring_strips;
  std::fill_n(weights, g.segment, 0.0F);
  for (std::int64_t head = order_head * heads; head < (order_head + 1) * heads; ++head) {
    for (std::int64_t i = 0; i < g.segment; i += g.block) {
      const std::int64_t place = (head * c.layout.scored_blocks + (begin + i) / g.block) * strips;
      c.kernels.weigh_keys(c.layout.exps + place * c.layout.exps_bytes, static_cast<int>(strips), g.block,
                           c.layout.score_factors + place * strip, weights + i);
    }
  }
}

// Writes their learned scores, 0 where there is nothing learned.
void weigh_by_features(const StageContext& c, std::int64_t kv_head, std::int64_t begin, float* weights) {
  const auto& [values, pairs] = c.inputs.order_weights;
  const std::size_t count = values.size() / static_cast<std::size_t>(c.geometry().shape.kv_heads);
  const auto of_head = values.subspan(static_cast<std::size_t>(kv_head) * count, count);
  if (std::ranges::all_of(of_head, [](float w) { return w == 0.0F; })) {
    std::fill_n(weights, c.geometry().segment, 0.0F);
    return;
  }
  c.f32_kernels.learned_scores(c.kv_rows(c.inputs.k, kv_head, begin), c.geometry().segment, c.head_dim(),
                               of_head.data(), pairs, weights);
}

// Orders one segment: its keys in descending score, or as they are known to stand.
void order_segment(const StageContext& c, std::int64_t order_head, std::int64_t begin, std::byte* scratch) {
  const Geometry& g = c.geometry();
  std::int32_t* const order = c.layout.order + order_head * c.layout.order_stride + begin;
  const std::int64_t kv_head = c.heads.kv_begin + order_head;  // where an order is learned, or kept
  const KeyOrder& kept = c.outputs.order;
  std::int32_t* const kept_order =
      kept.data == nullptr ? nullptr
                           : kept.data + c.heads.batch * kept.batch_stride + kv_head * kept.head_stride + begin;
  if (begin < kept.known) {
    std::copy_n(kept_order, g.segment, order);
  } else {
    float* const weights = reinterpret_cast<float*>(scratch);
    if (c.spec.options.permutation == Permutation::learned)
      weigh_by_features(c, kv_head, begin, weights);
    else
      weigh_by_queries(c, order_head, begin, weights);
    auto* const keys = reinterpret_cast<std::uint32_t*>(weights + g.segment);
    auto* const other = reinterpret_cast<std::int32_t*>(keys + g.segment);
    sort_by_weight({weights, static_cast<std::size_t>(g.segment)}, begin, keys, other, order);
    if (kept_order != nullptr) std::copy_n(order, g.segment, kept_order);
  }
}

// Orders the keys of a segment, and packs and pools its blocks in that order.
void move_segment(const StageContext& c, std::int64_t order_head, std::int64_t begin, std::byte* scratch) {
  const Geometry& g = c.geometry();
  const bool kept = begin / g.block < c.layout.kept_blocks;
  if (!kept) order_segment(c, order_head, begin, scratch);
  const std::int32_t* const order = c.layout.order + order_head * c.layout.order_stride;
  if (begin == 0) c.layout.sink_block[order_head] = (std::find(order, order + g.segment, 0) - order) / g.block;
  if (kept) return;
  const std::int64_t kv_head = c.heads.kv_begin + (c.layout.shared_order ? order_head : c.kv_head(order_head));
  const std::int64_t end = std::min((begin + g.segment) / g.block, c.layout.permuted_blocks);
  for (std::int64_t block = begin / g.block; block < end; ++block) {
    Rows k = c.kv_rows(c.inputs.k, kv_head, 0);
    Rows v = c.kv_rows(c.inputs.v, kv_head, 0);
    k.index = v.index = order + block * g.block;
    pool_permuted(c, order_head, block, k, v);
    if (!c.layout.copied) continue;
    const std::int64_t place = order_head * c.layout.copy_stride + block;
    c.kernels.pack.keys(k, g.block, g.block, c.head_dim(), c.layout.permuted_k + place * c.layout.k_block_bytes);
    c.kernels.pack.values(v, g.block, g.block, c.head_dim_v(), c.layout.permuted_v + place * c.layout.v_block_bytes);
  }
}

}  // namespace

std::int64_t order_scratch_bytes(const Geometry& geometry) {
  constexpr std::int64_t bytes = sizeof(float) + sizeof(std::uint32_t) + sizeof(std::int32_t);
  return geometry.segment * bytes;
}

void pool_rows(const StageContext& c, const Rows& rows, int count, int divisor, int dim, float* mean) {
  c.f32_kernels.sum_rows(rows, count, dim, mean);
  for (int d = 0; d < dim; ++d) mean[d] /= static_cast<float>(divisor);
  c.f32_kernels.round_row(rows.dtype, dim, mean);
}

void permute(const StageContext& c) {
  const Geometry& g = c.geometry();
  const bool scores = queries_score_keys(c);
  if (scores) pack_scoring_queries(c);
  // Where no query scores keys, a segment is moved as soon as it is packed: such orders are one for each KV head.
  const bool moves = c.layout.permuted && !scores;
  const std::int64_t length = moves ? g.segment : g.block;
  const std::int64_t parts = ceil_div(g.shape.kv_len, length);
  parallel_for(c.spec.threads, c.heads.kv_count * parts, [&](std::int64_t item, int thread) {
    const std::int64_t head = item / parts;
    const std::int64_t begin = item % parts * length;
    const std::int64_t end = std::min((begin + length) / g.block, g.blocks());
    for (std::int64_t block = begin / g.block; block < end; ++block) pack_original(c, head, block, scores);
    if (moves && begin < g.permuted_len()) move_segment(c, head, begin, c.scratch(thread));
  });
  if (!scores) return;
  finish_scores(c);
  const std::int64_t orders = c.layout.shared_order ? c.heads.kv_count : c.heads.q_count;
  parallel_for(c.spec.threads, orders * g.complete_segments(), [&](std::int64_t item, int thread) {
    // Heads of a group read the same tokens while they are in cache.
    move_segment(c, item % orders, item / orders * g.segment, c.scratch(thread));
  });
}

}  // namespace pbsattn::cpu
