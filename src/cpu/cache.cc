#include "cpu/cache.h"

#include <algorithm>

#include "core/keep_rule.h"
#include "core/score_traits.h"
#include "cpu/arena.h"

namespace pbsattn::cpu {
namespace {

// Returns which means a cache has, as bits.
std::int64_t means_of(const detail::PlanSpec& spec) {
  const bool scored = reads_scores(spec.option_sets());
  return static_cast<std::int64_t>(scored) + (scored && pools_own(spec.options.score) ? 2 : 0);
}

}  // namespace

CachedArrays::CachedArrays(const detail::PlanSpec& spec, const Kernels& kernels, std::int64_t block_count,
                           std::byte* base)
    : blocks(block_count) {
  const Options& options = spec.options;
  const Shape& shape = spec.geometry.shape;
  const std::int64_t heads = shape.batch * shape.kv_heads;
  const std::int64_t rows = up_to_tile(blocks);
  const bool scored = reads_scores(spec.option_sets());
  const bool corrected = options.correction == Correction::mean;
  Arena arena(base);
  arena.take(k, heads * blocks * kernels.block_bytes(options.block, shape.head_dim));
  arena.take(v, heads * blocks * kernels.block_bytes(options.block, value_dim(shape)));
  arena.take(values_finite, heads * blocks);
  arena.take(pooled_k, scored || corrected ? heads * rows * shape.head_dim : 0);
  arena.take(pooled_v, corrected ? heads * rows * value_dim(shape) : 0);
  arena.take(pooled_own, scored && pools_own(options.score) ? (heads * rows + row_tile) * shape.head_dim : 0);
  arena.take(order, options.permutation == Permutation::none ? 0 : heads * blocks * options.block);
  bytes = arena.bytes();
}

std::size_t cache_bytes(const detail::PlanSpec& spec, std::span<const Kernels* const> paths, std::int64_t tokens) {
  if (!detail::keeps_segments(spec.options) || tokens == 0) return 0;
  std::size_t most = 0;
  for (const Kernels* kernels : paths)
    most = std::max(most, CachedArrays(spec, *kernels, ceil_div(tokens, spec.options.block), nullptr).bytes);
  return most;
}

CacheRun::CacheRun(const detail::PlanSpec& spec, const Kernels& kernels, const Layout& layout, const Inputs& inputs,
                   const Outputs& outputs)
    : shape_(spec.geometry.shape), block_(spec.geometry.block), made_blocks_(layout.permuted_blocks) {
  SegmentCache* const cache = outputs.cache.cache;
  if (cache == nullptr || !detail::keeps_segments(spec.options)) return;
  const std::span<std::byte> memory = detail::CacheAccess::memory(*cache);
  // The same for all of a sequence's plans, whatever their lengths.
  const std::int64_t blocks = detail::most_blocks(
      [&](std::int64_t count) { return CachedArrays(spec, kernels, count, nullptr).bytes <= memory.size(); });
  if (blocks < spec.geometry.blocks()) return;
  arrays_ = CachedArrays(spec, kernels, blocks, memory.data());
  kept_ = detail::KeptBlocks(spec, outputs, detail::made_by(spec, inputs, &kernels, means_of(spec)));
}

void CacheRun::enter(const Heads& heads, Layout& layout) const {
  if (!kept_.any()) return;
  const std::int64_t first = heads.batch * shape_.kv_heads + heads.kv_begin;
  const std::int64_t block = first * arrays_.blocks;
  const std::int64_t row = first * up_to_tile(arrays_.blocks);
  layout.kept_blocks = kept_.count();
  (layout.copied ? layout.permuted_k : layout.k) = arrays_.k + block * layout.k_block_bytes;
  (layout.copied ? layout.permuted_v : layout.v) = arrays_.v + block * layout.v_block_bytes;
  (layout.copied ? layout.copy_stride : layout.block_stride) = arrays_.blocks;
  layout.pooled_k = arrays_.pooled_k + row * shape_.head_dim;
  layout.pooled_v = arrays_.pooled_v + row * value_dim(shape_);
  layout.pooled_own = arrays_.pooled_own + row * shape_.head_dim;
  layout.pooled_stride = layout.pooled_own_stride = up_to_tile(arrays_.blocks);
  layout.order = arrays_.order + block * block_;
  layout.order_stride = arrays_.blocks * block_;
  if (!layout.copied) layout.values_finite = arrays_.values_finite + block;
}

}  // namespace pbsattn::cpu
