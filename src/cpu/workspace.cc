#include "cpu/workspace.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "core/keep_rule.h"
#include "cpu/attend/correction.h"
#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {
namespace {

constexpr std::size_t alignment = 64;

class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {
    if (base != nullptr) used_ = (alignment - reinterpret_cast<std::uintptr_t>(base) % alignment) % alignment;
  }
  template <class T>
  void take(T*& pointer, std::int64_t count) {
    if (base_ != nullptr) pointer = reinterpret_cast<T*>(base_ + used_);
    constexpr std::size_t most = std::numeric_limits<std::ptrdiff_t>::max() - 2 * alignment;
    if (static_cast<std::size_t>(count) > (most - used_) / sizeof(T))
      throw Error(ErrorCode::out_of_memory,
                  fmt::format("workspace: over {} bytes, more than can be addressed; take fewer heads or threads, or "
                              "split the prompt into chunks",
                              most));
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + alignment - 1) / alignment * alignment;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

}  // namespace

Pass::Pass(const detail::PlanSpec& spec, const Kernels& kernels, PassShape shape, std::byte* base) {
  const Options& options = spec.options;
  const Geometry& g = spec.geometry;
  const std::int64_t dim = g.shape.head_dim;
  const std::int64_t blocks = g.blocks();
  far_blocks = g.own_begin(g.rows() - 1);
  permuted = options.permutation != Permutation::none && g.permuted_len() > 0;
  scored = reads_scores(spec.option_sets()) && far_blocks > 0;
  corrected = options.correction == Correction::mean && far_blocks > 0;
  shared_order = options.order_scope == OrderScope::kv_head;
  scoring_strips = ceil_div(g.scoring_queries(), strip);
  mask_words = ceil_div(blocks, 64);
  block_bytes = g.block * kernels.packed_head_dim(dim) * kernels.element_size;
  const std::int64_t order_heads = !permuted ? 0 : shared_order ? shape.kv_heads : shape.q_heads;
  const std::int64_t far_heads = permuted ? order_heads : shape.kv_heads;

  scored_blocks = permuted ? g.permuted_len() / g.block : 0;
  strip_bytes = kernels.packed_head_dim(dim) * strip * kernels.element_size;
  exps_bytes = static_cast<std::int64_t>(g.block) * strip * kernels.element_size;
  const std::int64_t scored_strips = shape.q_heads * scored_blocks * scoring_strips;
  const std::int64_t copied_heads = kernels.gathers ? 0 : order_heads;

  // A thread's scratch: the lists of a group's rows, and a row's packed queries and softmax state with one
  // block's scores, or what the path wants; or, when keys are ordered, a segment's weights, ranks and tokens; or,
  // when blocks are scored, a strip of rows' scores.
  const std::int64_t row_strips = g.block / strip;
  lists_bytes =
      ceil_div(std::min(shape.q_heads, g.group()) * kernels.rows_together() * blocks * 4, alignment) * alignment;
  const std::int64_t attend =
      lists_bytes + (kernels.attend_rows != nullptr ? kernels.attend_scratch_bytes(static_cast<int>(dim), g.block)
                                                    : row_strips * (strip_bytes + dim * strip * 4 + 2 * strip * 4) +
                                                          2 * std::max<std::int64_t>(g.block, dim) * strip * 4 +
                                                          (corrected ? correction_bytes(g, far_blocks) : 0));
  const std::int64_t pooled_rows = ceil_div(far_blocks, row_tile) * row_tile;
  const std::int64_t select = SelectScratch::bytes(spec, far_blocks);
  const std::int64_t sort = permuted ? std::int64_t{g.segment} * 12 : 0;
  scratch_bytes = ceil_div(std::max({attend, select, sort}), alignment) * alignment;

  Arena arena(base);
  arena.take(keys, shape.kv_heads * blocks * block_bytes);
  arena.take(values, shape.kv_heads * blocks * block_bytes);
  arena.take(values_finite, shape.kv_heads * blocks);
  arena.take(far_keys, copied_heads * far_blocks * block_bytes);
  arena.take(far_values, copied_heads * far_blocks * block_bytes);
  arena.take(pooled_keys, scored || corrected ? far_heads * pooled_rows * dim : 0);
  arena.take(pooled_values, corrected ? far_heads * pooled_rows * dim : 0);
  // A row tile more, because an own segment's tiles may begin anywhere.
  arena.take(original_pooled, scored && pools_own(options.score)
                                  ? (shape.kv_heads * ceil_div(blocks, row_tile) + 1) * row_tile * dim
                                  : 0);
  arena.take(band_factors, scored && options.score == BlockScore::dual_band ? 2 * shape.q_heads : 0);
  arena.take(scoring_queries, permuted ? shape.q_heads * scoring_strips * strip_bytes : 0);
  arena.take(exps, scored_strips * exps_bytes);
  arena.take(score_sums, scored_strips * strip);
  arena.take(score_factors, scored_strips * strip);
  arena.take(order, order_heads * g.permuted_len());
  arena.take(sink_block, order_heads);
  arena.take(mask, shape.q_heads * g.rows() * mask_words);
  arena.take(scratch, spec.threads * scratch_bytes);
  bytes = arena.used() + (base == nullptr ? alignment : 0);
}

std::size_t pass_bytes(const detail::PlanSpec& spec, std::span<const Kernels* const> paths, PassShape shape) {
  std::size_t most = 0;
  for (const Kernels* kernels : paths) most = std::max(most, Pass(spec, *kernels, shape, nullptr).bytes);
  return most;
}

PassShape choose_pass(const detail::PlanSpec& spec, std::span<const Kernels* const> paths) {
  const Geometry& g = spec.geometry;
  const std::int64_t group = g.group();
  // Enough rows that the threads stay busy while the last long ones finish; more would only take memory.
  constexpr std::int64_t rows_per_thread = 16;
  std::int64_t groups = ceil_div(rows_per_thread * spec.threads, group * g.rows());
  groups = std::min(groups, g.shape.kv_heads);
  const auto fits = [&](PassShape shape) { return pass_bytes(spec, paths, shape) <= spec.workspace_cap; };
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
                  spec.workspace_cap, pass_bytes(spec, paths, {least, 1})));
}

}  // namespace pbsattn::cpu
