#include "cuda/workspace.h"

#include <fmt/format.h>

#include "core/keep_rule.h"
#include "core/score_traits.h"
#include "cuda/attend/attend.h"
#include "cuda/limits.h"
#include "cuda/permute/permute.h"
#include "cuda/select/select.h"

namespace pbsattn::cuda {

namespace {

// Takes that many rows of elements.
void take_rows(Carver& carver, void*& pointer, std::int64_t rows, std::int64_t width) {
  std::byte* elements = nullptr;
  carver.take(elements, rows * width * element_bytes, alignment);
  pointer = elements;
}

}  // namespace

Layout::Layout(const detail::PlanSpec& spec, bool sparse, const Extent& extent, std::byte* base) : carver(base) {
  const Geometry g = geometry_of(spec.geometry, extent);
  const Options& options = spec.options;
  const bool permutes = sparse && options.permutation != Permutation::none;
  const std::int64_t query_heads = g.shape.batch * g.shape.q_heads;
  const auto take = [&]<class T>(T*& pointer, std::int64_t count) { carver.take(pointer, count, alignment); };
  permuted.order_heads = order_heads_of(spec, g);
  take(head_options, static_cast<std::int64_t>(spec.heads.size()));
  if (sparse) parts = row_parts(spec.geometry, common_dense_rows(spec.option_sets()));
  take(attend_scratch, static_cast<std::int64_t>(attend_scratch_size(g, parts)));
  if (!sparse) return;
  take_segments(carver, spec, g, g.permuted_len(), g.blocks(), permuted, pooled);
  if (options.correction != Correction::none) take(lse, query_heads * g.shape.q_len);
  if ((permutes || reads_means(options)) && options.score != BlockScore::two_step)
    take_rows(carver, pooled.q, query_heads * g.rows(), g.shape.head_dim);
  take(lists.row_start, query_heads * g.rows());
  take(lists.row_count, query_heads * g.rows());
  take(lists.block, query_heads * g.causal_blocks_per_head());
  part_blocks = part_blocks_of(options, spec.geometry, order_heads_of(spec, spec.geometry));
  score_scratch_bytes =
      score_scratch_size(options, g, permuted.order_heads, common_dense_rows(spec.option_sets()), part_blocks);
  take(score_scratch, static_cast<std::int64_t>(score_scratch_bytes));
  if (permutes && options.permutation != Permutation::learned)
    take(permute_scratch, static_cast<std::int64_t>(permute_scratch_size(g)));
}

void take_segments(Carver& carver, const detail::PlanSpec& spec, const Geometry& g, std::int64_t slots,
                   std::int64_t blocks, Permuted& permuted, Pooled& pooled) {
  const Options& options = spec.options;
  const bool permutes = options.permutation != Permutation::none;
  const std::int64_t dim = g.shape.head_dim;
  const std::int64_t dim_v = value_dim(g.shape);
  const std::int64_t order_heads = g.shape.batch * Layout::order_heads_of(spec, g);
  const auto take_keys = [&](void*& pointer, std::int64_t rows) { take_rows(carver, pointer, rows, dim); };
  const auto take_values = [&](void*& pointer, std::int64_t rows) { take_rows(carver, pointer, rows, dim_v); };
  permuted.slots = slots;
  pooled.own_blocks = blocks;
  pooled.v_blocks = slots / block_tokens;
  if (pools_own(options.score)) take_keys(pooled.own, g.shape.batch * g.shape.kv_heads * blocks);
  // Keys that stay where they are have the same means there and here.
  const bool same = !permutes && pools_own(options.score);
  pooled.k_blocks = same ? blocks : slots / block_tokens;
  if (same) pooled.k = pooled.own;
  if (!same && (permutes || reads_means(options))) take_keys(pooled.k, order_heads * pooled.k_blocks);
  if (options.correction != Correction::none) take_values(pooled.v, order_heads * pooled.v_blocks);
  carver.take(permuted.sink_block, order_heads, alignment);
  if (!permutes) return;
  carver.take(permuted.order, order_heads * slots, alignment);
  take_keys(permuted.k, order_heads * slots);
  take_values(permuted.v, order_heads * slots);
}

Geometry Layout::geometry_of(Geometry g, const Extent& extent) {
  g.shape.batch = extent.batch;
  g.shape.kv_heads = extent.kv_heads;
  g.shape.q_heads = extent.kv_heads * extent.group;
  return g;
}

std::int64_t Layout::order_heads_of(const detail::PlanSpec& spec, const Geometry& g) {
  const bool each_query_head =
      spec.options.permutation != Permutation::none && spec.options.order_scope == OrderScope::query_head;
  return each_query_head ? g.shape.q_heads : g.shape.kv_heads;
}

std::size_t workspace_bytes(const detail::PlanSpec& spec, bool sparse, const Extent& extent) {
  return Layout(spec, sparse, extent, nullptr).carver.bytes + alignment;
}

bool is_sparse(const detail::PlanSpec& spec) {
  const Geometry& g = spec.geometry;
  if (spec.options.permutation == Permutation::arrival && g.complete_segments() > 0) return true;
  return std::ranges::any_of(spec.option_sets(), [&](const Options& options) {
    const std::int64_t last_row = g.rows() - 1 - options.dense_last_rows;
    return !keeps_every_block(options) && last_row >= 0 && g.own_begin(last_row) > 0;
  });
}

// Tries everything, then whole KV heads of one batch entry, then query heads of one KV head, which share no order.
Extent choose_extent(const detail::PlanSpec& spec, bool sparse) {
  const Geometry& g = spec.geometry;
  const auto bytes = [&](const Extent& e) { return workspace_bytes(spec, sparse, e); };
  const auto fits = [&](const Extent& e) { return bytes(e) <= spec.workspace_cap; };
  if (const Extent all{g.shape.batch, g.shape.kv_heads, g.group()}; fits(all)) return all;
  // Parts of nearly equal size leave no small pass at the end.
  for (std::int64_t parts = 1; parts <= g.shape.kv_heads; ++parts)
    if (const Extent e{1, ceil_div(g.shape.kv_heads, parts), g.group()}; fits(e)) return e;
  const bool splits =
      spec.options.order_scope == OrderScope::query_head || spec.options.permutation == Permutation::none;
  for (std::int64_t parts = 2; splits && parts <= g.group(); ++parts)
    if (const Extent e{1, 1, ceil_div(g.group(), parts)}; fits(e)) return e;
  throw Error(ErrorCode::out_of_memory,
              fmt::format("workspace cap of {} bytes: one head of this shape needs {}; raise the cap",
                          spec.workspace_cap, bytes({1, 1, splits ? 1 : g.group()})));
}

}  // namespace pbsattn::cuda
