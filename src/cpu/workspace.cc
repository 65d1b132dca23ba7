#include "cpu/workspace.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/keep_rule.h"
#include "core/score_traits.h"
#include "cpu/arena.h"
#include "cpu/attend/attend.h"
#include "cpu/permute/permute.h"
#include "cpu/select/select.h"

namespace pbsattn::cpu {
Layout::Layout(const detail::PlanSpec& spec, const Kernels& kernels, Extent extent, std::byte* base) {
  const Options& options = spec.options;
  const Geometry& g = spec.geometry;
  const std::int64_t dim = g.shape.head_dim;
  const std::int64_t dim_v = value_dim(g.shape);
  const std::int64_t blocks = g.blocks();
  permuted_blocks = g.own_begin(g.rows() - 1);
  permuted = options.permutation != Permutation::none && g.permuted_len() > 0;
  scored = reads_scores(spec.option_sets()) && permuted_blocks > 0;
  corrected = options.correction == Correction::mean && permuted_blocks > 0;
  shared_order = options.order_scope == OrderScope::kv_head;
  scoring_strips = ceil_div(g.scoring_queries(), strip);
  mask_words = ceil_div(blocks, 64);
  k_block_bytes = kernels.block_bytes(g.block, dim);
  v_block_bytes = kernels.block_bytes(g.block, dim_v);
  const std::int64_t order_heads = !permuted ? 0 : shared_order ? extent.kv_heads : extent.q_heads;
  const std::int64_t pooled_heads = permuted ? order_heads : extent.kv_heads;

  const bool by_queries = permuted && options.permutation != Permutation::learned;
  scored_blocks = by_queries ? g.permuted_len() / g.block : 0;
  strip_bytes = kernels.packed_head_dim(dim) * strip * kernels.element_size;
  exps_bytes = static_cast<std::int64_t>(g.block) * strip * kernels.element_size;
  const std::int64_t scored_strips = extent.q_heads * scored_blocks * scoring_strips;
  copied = permuted && !kernels.gathers;
  const std::int64_t copied_heads = copied ? order_heads : 0;
  block_stride = blocks;
  copy_stride = permuted_blocks;
  pooled_stride = up_to_tile(permuted_blocks);
  pooled_own_stride = up_to_tile(blocks);
  order_stride = g.permuted_len();

  // A thread's scratch serves one stage after the other.
  constexpr std::int64_t alignment = Arena::alignment;
  lists_bytes =
      ceil_div(std::min(extent.q_heads, g.group()) * kernels.rows_together() * blocks * 4, alignment) * alignment;
  const std::int64_t attend = lists_bytes + row_scratch_bytes(g, kernels, corrected ? permuted_blocks : 0);
  const std::int64_t select = select_scratch_bytes(spec, permuted_blocks, strip_bytes);
  const std::int64_t sort = permuted ? order_scratch_bytes(g) : 0;
  scratch_bytes = ceil_div(std::max({attend, select, sort}), alignment) * alignment;

  Arena arena(base);
  arena.take(k, extent.kv_heads * blocks * k_block_bytes);
  arena.take(v, extent.kv_heads * blocks * v_block_bytes);
  arena.take(values_finite, extent.kv_heads * blocks);
  arena.take(permuted_k, copied_heads * permuted_blocks * k_block_bytes);
  arena.take(permuted_v, copied_heads * permuted_blocks * v_block_bytes);
  arena.take(pooled_k, scored || corrected ? pooled_heads * pooled_stride * dim : 0);
  arena.take(pooled_v, corrected ? pooled_heads * pooled_stride * dim_v : 0);
  // A row tile more, because an own segment's tiles may begin anywhere.
  arena.take(pooled_own,
             scored && pools_own(options.score) ? (extent.kv_heads * pooled_own_stride + row_tile) * dim : 0);
  arena.take(band_factors, scored && options.score == BlockScore::dual_band ? 2 * extent.q_heads : 0);
  arena.take(scoring_queries, by_queries ? extent.q_heads * scoring_strips * strip_bytes : 0);
  arena.take(exps, scored_strips * exps_bytes);
  arena.take(score_sums, scored_strips * strip);
  arena.take(score_factors, scored_strips * strip);
  arena.take(order, order_heads * order_stride);
  arena.take(sink_block, order_heads);
  arena.take(mask, extent.q_heads * g.rows() * mask_words);
  arena.take(scratch, spec.threads * scratch_bytes);
  bytes = arena.bytes();
}

std::size_t workspace_bytes(const detail::PlanSpec& spec, std::span<const Kernels* const> paths, Extent extent) {
  std::size_t most = 0;
  for (const Kernels* kernels : paths) most = std::max(most, Layout(spec, *kernels, extent, nullptr).bytes);
  return most;
}

Extent choose_extent(const detail::PlanSpec& spec, std::span<const Kernels* const> paths) {
  const Geometry& g = spec.geometry;
  const std::int64_t group = g.group();
  // Enough rows that the threads stay busy while the last long ones finish; more would only take memory.
  constexpr std::int64_t rows_per_thread = 16;
  std::int64_t groups = ceil_div(rows_per_thread * spec.threads, group * g.rows());
  groups = std::min(groups, g.shape.kv_heads);
  const auto fits = [&](Extent extent) { return workspace_bytes(spec, paths, extent) <= spec.workspace_cap; };
  for (; groups >= 1; --groups)
    if (fits({groups * group, groups})) return {groups * group, groups};
  // A shared order needs the scores of its whole group.
  const std::int64_t least = spec.options.order_scope == OrderScope::kv_head ? group : 1;
  for (std::int64_t heads = group - 1; heads >= least; --heads)
    if (fits({heads, 1})) return {heads, 1};
  throw Error(
      ErrorCode::out_of_memory,
      fmt::format("workspace_cap {} bytes: the smallest pass of this plan takes {}; raise the cap, or split the "
                  "prompt into chunks",
                  spec.workspace_cap, workspace_bytes(spec, paths, {least, 1})));
}

}  // namespace pbsattn::cpu
