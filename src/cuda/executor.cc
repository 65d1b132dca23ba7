// The CUDA backend's Plan: enqueues the stages, pass by pass.
//
// A *pass* works on a group of heads: all of them, or as many as the workspace cap allows. Passes follow each other on
// the stream and use the same memory.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "core/executor.h"
#include "core/fallback.h"
#include "core/keep_rule.h"
#include "core/score_traits.h"
#include "cuda/attend/attend.h"
#include "cuda/cache.h"
#include "cuda/permute/permute.h"
#include "cuda/runtime.h"
#include "cuda/select/select.h"
#include "cuda/validate.h"
#include "cuda/workspace.h"

namespace pbsattn::cuda {
namespace {

// What permuting and choosing take, in pairs of blocks of that width, which take 7.1, 8.6, 10.3, 12.8 and 20.8 ns of
// the full device: fitted to permute + select of one H200 at 8K, 16K and 32K tokens of 32 heads, which they meet within
// 12 % and at 256 within 19 %. Below 8K launches take longer than the work, and full attention is faster anyway. A
// learned order takes up to 8 ns a key block more.
CostModel cost_model_of(const Options& options, const Shape& shape) {
  struct Cost {
    double call;
    double permuted;          // a key block, in an order of the method's own
    double unpermuted, pair;  // of two-step scores
  };
  const auto of_width = [&]() -> Cost {
    switch (shape.head_dim) {
      case 64: return {1500, 5.4, 4.3, .013};
      case 96: return {2000, 5.2, 3.2, .021};
      case 192: return {1200, 6.7, 2.6, .028};
      case 256: return {1000, 6.1, 1.9, .029};
      default: return {1500, 5, 2.4, .026};
    }
  };
  const Cost cost = of_width();
  if (options.score != BlockScore::two_step) return {.call = cost.call, .key_block = cost.permuted, .pair = 0};
  double key_block = cost.permuted;
  if (options.permutation == Permutation::none) key_block = cost.unpermuted;
  if (options.permutation == Permutation::learned) key_block = cost.unpermuted + .5;
  return {.call = cost.call, .key_block = key_block, .pair = cost.pair};
}

template <class V>
V advanced(V view, std::int64_t batch, std::int64_t head) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(view.data)>>, const std::byte, std::byte>;
  view.data = static_cast<Byte*>(view.data) + (batch * view.batch_stride + head * view.head_stride) * element_bytes;
  return view;
}

class CudaExecutor final : public detail::Executor {
 public:
  explicit CudaExecutor(const detail::PlanSpec& plan_spec)
      : Executor(plan_spec),
        sparse_(is_sparse(spec)),
        extent_(choose_extent(spec, sparse_)),
        workspace_size_(workspace_bytes(spec, sparse_, extent_)) {}

  std::size_t workspace_size() const noexcept override { return workspace_size_; }
  std::string_view path() const noexcept override { return sparse_ ? "sm90" : "sm90_dense"; }
  std::size_t cache_size(std::int64_t tokens) const override { return cache_bytes(spec, tokens); }

  void run(const Inputs& inputs, const Outputs& outputs, std::span<std::byte> workspace, Stats* stats,
           Trace* trace) const override {
    run_on({}, inputs, outputs, workspace, stats, trace);
  }

  void run_on(Stream on, const Inputs& inputs, const Outputs& outputs, std::span<std::byte> workspace, Stats* stats,
              Trace* trace) const override {
    const CurrentDevice device(spec.device_index);
    // Peeking leaves the error to whoever caused it.
    if (const cudaError_t earlier = cudaPeekAtLastError(); earlier != cudaSuccess)
      fail(earlier, "earlier work, before this run");
    check_buffers(spec, inputs, outputs, workspace.data());
    const auto stream = static_cast<cudaStream_t>(on.handle);
    const CacheRun cache(spec, sparse_, inputs, outputs);
    Call call{.inputs = inputs,
              .outputs = outputs,
              .base = aligned(workspace.data()),
              .stream = stream,
              .kept_blocks = cache.kept_blocks()};
    std::optional<Timeline> timeline;
    if (stats != nullptr) call.timeline = &timeline.emplace(stream);
    const Geometry& g = spec.geometry;
    if (trace != nullptr) *trace = detail::start_trace(g);

    if (sparse_)
      check(write_head_options(spec.heads, Layout(spec, sparse_, extent_, call.base).head_options, stream),
            "launching write_head_options");
    for (std::int64_t batch = 0; batch < g.shape.batch; batch += extent_.batch)
      for (std::int64_t kv_head = 0; kv_head < g.shape.kv_heads; kv_head += extent_.kv_heads)
        for (std::int64_t head = 0; head < g.group(); head += extent_.group) {
          const Extent extent{extent_.batch, std::min(extent_.kv_heads, g.shape.kv_heads - kv_head),
                              std::min(extent_.group, g.group() - head)};
          Layout layout(spec, sparse_, extent, call.base);
          cache.enter(batch, kv_head, layout);
          enqueue(call, layout, extent, batch, kv_head, kv_head * g.group() + head);
          if (stats != nullptr) stats->visited_blocks += count_visited(call, layout, extent);
          if (trace != nullptr) extend_trace(call, layout, extent, *trace);
        }
    check(cache.finish(stream), "asking whether the stream is being captured");
    if (stats != nullptr) {
      check(cudaStreamSynchronize(stream), "waiting for the run");
      stats->causal_blocks = g.shape.batch * g.shape.q_heads * g.causal_blocks_per_head();
      constexpr std::size_t marks = 4;  // of a pass
      for (std::size_t i = 0; i < timeline->size(); i += marks) {
        stats->permute_seconds += timeline->seconds(i);
        stats->select_seconds += timeline->seconds(i + 1);
        stats->attend_seconds += timeline->seconds(i + 2);
      }
    }
  }

 private:
  struct Call {
    const Inputs& inputs;
    const Outputs& outputs;
    std::byte* base;
    cudaStream_t stream;
    std::int64_t kept_blocks;  // of a cache
    Timeline* timeline = nullptr;
  };

  void enqueue(const Call& call, const Layout& layout, const Extent& extent, std::int64_t batch, std::int64_t kv_head,
               std::int64_t q_head) const {
    const Geometry g = Layout::geometry_of(spec.geometry, extent);
    const OrderWeights& weights = call.inputs.order_weights;
    const std::size_t features = weights.values.size() / static_cast<std::size_t>(spec.geometry.shape.kv_heads);
    Pages pages = call.inputs.pages;
    const std::int64_t kv_batch = pages.table == nullptr ? batch : 0;  // else the table has them
    if (pages.table != nullptr) pages.table += batch * pages.batch_stride;
    const Inputs inputs{
        .q = advanced(call.inputs.q, batch, q_head),
        .k = advanced(call.inputs.k, kv_batch, kv_head),
        .v = advanced(call.inputs.v, kv_batch, kv_head),
        .sinks = sinks_of(call.inputs, q_head, g.shape.q_heads),
        .order_weights = {weights.values.subspan(features * static_cast<std::size_t>(kv_head)), weights.pairs},
        .pages = pages};
    KeyOrder kept = call.outputs.order;
    if (kept.data != nullptr) kept.data += batch * kept.batch_stride + kv_head * kept.head_stride;
    const auto mark = [&] {
      if (call.timeline != nullptr) call.timeline->mark();
    };
    mark();
    if (sparse_) {
      const PermuteArgs permutation{.geometry = g,
                                    .divide_by_count = divides_by_count(spec.options),
                                    .scale = spec.options.scale,
                                    .softcap = spec.options.softcap,
                                    .permutation = spec.options.permutation,
                                    .inputs = inputs,
                                    .kept = kept,
                                    .kept_blocks = call.kept_blocks,
                                    .permuted = layout.permuted,
                                    .pooled = layout.pooled,
                                    .scratch = layout.permute_scratch};
      if (spec.options.permutation == Permutation::none)
        check(pool(permutation, call.stream), "launching pool");
      else
        check(permute(permutation, call.stream), "launching permute");
    }
    mark();
    if (sparse_)
      check(select({.geometry = g,
                    .options = spec.options,
                    .heads = spec.heads,
                    .head_options = spec.heads.empty() ? nullptr : layout.head_options + q_head,
                    .inputs = inputs,
                    .permuted = layout.permuted,
                    .pooled = layout.pooled,
                    .scratch = layout.score_scratch,
                    .scratch_bytes = layout.score_scratch_bytes,
                    .part_blocks = layout.part_blocks,
                    .lists = layout.lists},
                   call.stream),
            "launching select");
    mark();
    const Shape& whole = spec.geometry.shape;
    const bool wanted = call.outputs.lse != nullptr;
    const AttendArgs attention{
        .geometry = g,
        .scale = spec.options.scale,
        .softcap = spec.options.softcap,
        .inputs = inputs,
        .permuted = layout.permuted,
        .lists = layout.lists,
        .outputs = {.out = advanced(call.outputs.out, batch, q_head),
                    .lse = wanted ? call.outputs.lse + (batch * whole.q_heads + q_head) * whole.q_len : layout.lse},
        .lse_batch_stride = (wanted ? whole.q_heads : g.shape.q_heads) * whole.q_len,
        .parts = layout.parts,
        .scratch = layout.attend_scratch};
    check(attend(attention, call.stream), "launching attend");
    if (sparse_ && spec.options.correction != Correction::none)
      check(correct(attention, layout.pooled, common_dense_rows(spec.option_sets()), call.stream),
            "launching the correction");
    mark();
  }

  static std::span<const float> sinks_of(const Inputs& inputs, std::int64_t first_head, std::int64_t heads) {
    if (inputs.sinks.empty()) return {};
    return inputs.sinks.subspan(static_cast<std::size_t>(first_head), static_cast<std::size_t>(heads));
  }

  std::int64_t count_visited(const Call& call, const Layout& layout, const Extent& extent) const {
    const Geometry g = Layout::geometry_of(spec.geometry, extent);
    const std::int64_t heads = g.shape.batch * g.shape.q_heads;
    if (!sparse_) {
      std::int64_t blocks = 0;
      for (std::int64_t row = 0; row < g.rows(); ++row) blocks += g.diagonal(row) + 1 - g.window_begin(row);
      return heads * blocks;
    }
    const auto count = read(call, layout.lists.row_count, heads * g.rows());
    return std::accumulate(count.begin(), count.end(), std::int64_t{0});
  }

  // Reads `count` numbers, or as many of each of `heads` that lie `stride` apart.
  template <class T>
  static std::vector<T> read(const Call& call, const T* from, std::int64_t count, std::int64_t heads = 1,
                             std::int64_t stride = 0) {
    std::vector<T> values(static_cast<std::size_t>(heads * count));
    const auto bytes = static_cast<std::size_t>(count) * sizeof(T);
    if (heads == 1)
      check(cudaMemcpyAsync(values.data(), from, bytes, cudaMemcpyDeviceToHost, call.stream), "reading back");
    else if (count > 0)
      check(cudaMemcpy2DAsync(values.data(), bytes, from, static_cast<std::size_t>(stride) * sizeof(T), bytes,
                              static_cast<std::size_t>(heads), cudaMemcpyDeviceToHost, call.stream),
            "reading back");
    check(cudaStreamSynchronize(call.stream), "waiting for the run");
    return values;
  }

  // Passes come in the order of their heads, so a trace grows at its end.
  void extend_trace(const Call& call, const Layout& layout, const Extent& extent, Trace& trace) const {
    const Geometry g = Layout::geometry_of(spec.geometry, extent);
    const std::int64_t heads = g.shape.batch * g.shape.q_heads;
    const std::int64_t moved = layout.permuted.order == nullptr ? 0 : g.permuted_len();
    const std::int64_t sharing = g.shape.q_heads / layout.permuted.order_heads;
    const auto order = read(call, layout.permuted.order, moved, heads / sharing, layout.permuted.slots);
    const auto count = read(call, layout.lists.row_count, sparse_ ? heads * g.rows() : 0);
    const auto start = read(call, layout.lists.row_start, sparse_ ? heads * g.rows() : 0);
    const auto block = read(call, layout.lists.block, sparse_ ? heads * g.causal_blocks_per_head() : 0);
    for (std::int64_t head = 0; head < heads; ++head) {
      const auto own = order.begin() + head / sharing * moved;
      trace.order.insert(trace.order.end(), own, own + moved);
      for (std::int64_t token = moved; token < g.shape.kv_len; ++token)
        trace.order.push_back(static_cast<std::int32_t>(token));
      for (std::int64_t row = 0; row < g.rows(); ++row) {
        const std::int64_t tile = head * g.rows() + row;
        if (sparse_) {
          trace.block.insert(trace.block.end(), block.begin() + start[tile], block.begin() + start[tile] + count[tile]);
        } else {
          for (std::int64_t b = g.window_begin(row); b <= g.diagonal(row); ++b)
            trace.block.push_back(static_cast<std::int32_t>(b));
        }
        trace.row_start.push_back(static_cast<std::int64_t>(trace.block.size()));
      }
    }
  }

  bool sparse_;
  Extent extent_;
  std::size_t workspace_size_;
};

}  // namespace

std::unique_ptr<detail::Executor> make_executor(const detail::PlanSpec& spec) {
  check_limits(spec);
  check_device(spec.device_index);
  return std::make_unique<CudaExecutor>(with_fallback_resolved(spec, cost_model_of(spec.options, spec.geometry.shape)));
}

}  // namespace pbsattn::cuda
