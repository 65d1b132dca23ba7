#include "cpu/cache.h"

#include <algorithm>
#include <bit>

#include "core/keep_rule.h"
#include "core/score_traits.h"
#include "cpu/arena.h"

namespace pbsattn::cpu {
namespace {

bool keeps_segments(const Options& options) {
  return options.permutation != Permutation::last_queries;
}

// Returns the blocks that memory holds: the same for all of a sequence's plans, whatever their lengths.
std::int64_t capacity(const detail::PlanSpec& spec, const Kernels& kernels, std::size_t memory) {
  const auto fit = [&](std::int64_t blocks) { return CachedArrays(spec, kernels, blocks, nullptr).bytes <= memory; };
  std::int64_t blocks = 0;
  std::int64_t step = 1;
  while (fit(step)) step *= 2;
  for (; step > 0; step /= 2)
    if (fit(blocks + step)) blocks += step;
  return blocks;
}

// Returns all that contents depend on besides the caller's keys, values, weights and orders.
std::array<std::int64_t, 16> made_by(const detail::PlanSpec& spec, const Kernels& kernels, const Inputs& inputs) {
  const Options& o = spec.options;
  const Shape& s = spec.geometry.shape;
  return {static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(&kernels)),
          s.batch,
          s.kv_heads,
          s.head_dim,
          value_dim(s),
          o.block,
          o.segment,
          static_cast<std::int64_t>(o.permutation),
          reads_scores(spec.option_sets()) ? 1 : 0,
          reads_scores(spec.option_sets()) && pools_own(o.score) ? 1 : 0,
          static_cast<std::int64_t>(o.correction),
          static_cast<std::int64_t>(inputs.k.dtype),
          static_cast<std::int64_t>(inputs.v.dtype)};
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
  if (!keeps_segments(spec.options) || tokens == 0) return 0;
  std::size_t most = 0;
  for (const Kernels* kernels : paths)
    most = std::max(most, CachedArrays(spec, *kernels, ceil_div(tokens, spec.options.block), nullptr).bytes);
  return most;
}

CacheRun::CacheRun(const detail::PlanSpec& spec, const Kernels& kernels, const Layout& layout, const Inputs& inputs,
                   const Outputs& outputs)
    : shape_(spec.geometry.shape), block_(spec.geometry.block) {
  SegmentCache* const cache = outputs.cache.cache;
  if (cache == nullptr || !keeps_segments(spec.options)) return;
  const std::span<std::byte> memory = detail::CacheAccess::memory(*cache);
  const std::int64_t blocks = capacity(spec, kernels, memory.size());
  if (blocks < spec.geometry.blocks()) return;
  cache_ = cache;
  arrays_ = CachedArrays(spec, kernels, blocks, memory.data());
  auto& before = detail::CacheAccess::made_by(*cache);
  std::int64_t kept = cache->tokens();
  if (const auto now = made_by(spec, kernels, inputs); before != now) {
    before = now;
    kept = 0;
  }
  // An order of arrival that the caller doesn't know is made anew.
  if (spec.options.permutation == Permutation::arrival) kept = std::min(kept, outputs.order.known);
  kept_blocks_ = kept / spec.geometry.segment * (spec.geometry.segment / block_);
  made_blocks_ = std::max(kept_blocks_, layout.permuted_blocks);
  detail::CacheAccess::tokens(*cache) = kept_blocks_ * block_;
}

void CacheRun::enter(const Heads& heads, Layout& layout) const {
  if (cache_ == nullptr) return;
  const std::int64_t first = heads.batch * shape_.kv_heads + heads.kv_begin;
  const std::int64_t block = first * arrays_.blocks;
  const std::int64_t row = first * up_to_tile(arrays_.blocks);
  layout.kept_blocks = kept_blocks_;
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

void CacheRun::finish() const {
  if (cache_ != nullptr) detail::CacheAccess::tokens(*cache_) = made_blocks_ * block_;
}

}  // namespace pbsattn::cpu
