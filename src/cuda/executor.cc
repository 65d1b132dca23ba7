// The CUDA backend's Plan: checks what only it refuses, lays out the workspace, and enqueues the stages.
//
// A *pass* works on a group of heads: all of them, or as many as the workspace cap allows. Passes follow each other on
// the stream and use the same memory.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "core/executor.h"
#include "core/fallback.h"
#include "cuda/attend.h"
#include "cuda/stages.h"

namespace pbsattn::cuda {
namespace {

constexpr std::int64_t element_bytes = 2;
constexpr std::size_t alignment = 256;  // of every array in the workspace
constexpr CostModel cost_model{.call = 1500, .key_block = 5};
constexpr std::int64_t max_grid = 65'535;

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::unsupported, message);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw Error(error == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::internal,
              fmt::format("{}: CUDA error {} ({}); the stream's work up to here is not to be trusted", what,
                          static_cast<int>(error), cudaGetErrorString(error)));
}

// Makes a device current for as long as this lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    check(cudaGetDevice(&previous_), "current device");
    if (previous_ == index) return;
    check(cudaSetDevice(index), "choosing the plan's device");
    changed_ = true;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Events on a stream, for the seconds between them.
class Timeline {
 public:
  explicit Timeline(cudaStream_t stream) : stream_(stream) {}
  ~Timeline() {
    for (const cudaEvent_t event : events_) cudaEventDestroy(event);
  }
  Timeline(const Timeline&) = delete;
  Timeline& operator=(const Timeline&) = delete;

  void mark() {
    cudaEvent_t event = nullptr;
    check(cudaEventCreate(&event), "timing event");
    events_.push_back(event);
    check(cudaEventRecord(event, stream_), "timing event");
  }
  // From mark `i` to the next; the stream's work must be done.
  double seconds(std::size_t i) const {
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, events_[i], events_[i + 1]), "timing event");
    return milliseconds * 1e-3;
  }
  std::size_t size() const { return events_.size(); }

 private:
  cudaStream_t stream_;
  std::vector<cudaEvent_t> events_;
};

// Heads of one pass.
struct Extent {
  std::int64_t batch, kv_heads, group;  // `group`: query heads of each KV head
};

// A pass's arrays. Made without a base address, it counts bytes.
struct Layout {
  Layout(const detail::PlanSpec& spec, bool sparse, const Extent& extent, std::byte* base) {
    Geometry g = geometry_of(spec.geometry, extent);
    const bool permutes = sparse && spec.options.permutation != Permutation::none;
    const std::int64_t query_heads = g.shape.batch * g.shape.q_heads;
    const std::int64_t order_heads = g.shape.batch * order_heads_of(spec, g);
    const auto take = [&]<class T>(T*& pointer, std::int64_t count) {
      bytes = (bytes + alignment - 1) / alignment * alignment;
      if (base != nullptr) pointer = reinterpret_cast<T*>(base + bytes);
      bytes += static_cast<std::size_t>(count) * sizeof(T);
    };
    take(attend_scratch, static_cast<std::int64_t>(attend_scratch_size(g)));
    if (!sparse) return;
    take(visited_blocks, 1);
    take(pooled_k, order_heads * permuted_blocks(g) * g.shape.head_dim * element_bytes);
    take(pooled_q, query_heads * g.rows() * g.shape.head_dim * element_bytes);
    take(sink_block, order_heads);
    take(row_start, query_heads * g.rows());
    take(row_count, query_heads * g.rows());
    take(block, query_heads * g.causal_blocks_per_head());
    if (!permutes) return;
    take(permute_scratch, static_cast<std::int64_t>(permute_scratch_size(g)));
    take(order, order_heads * g.permuted_len());
    take(permuted_k, order_heads * g.permuted_len() * g.shape.head_dim * element_bytes);
    take(permuted_v, order_heads * g.permuted_len() * g.shape.head_dim * element_bytes);
  }

  static Geometry geometry_of(Geometry g, const Extent& extent) {
    g.shape.batch = extent.batch;
    g.shape.kv_heads = extent.kv_heads;
    g.shape.q_heads = extent.kv_heads * extent.group;
    return g;
  }
  static std::int64_t order_heads_of(const detail::PlanSpec& spec, const Geometry& g) {
    const bool each_query_head =
        spec.options.permutation != Permutation::none && spec.options.order_scope == OrderScope::query_head;
    return each_query_head ? g.shape.q_heads : g.shape.kv_heads;
  }

  std::size_t bytes = 0;
  std::byte* attend_scratch = nullptr;
  unsigned long long* visited_blocks = nullptr;
  std::byte *pooled_k = nullptr, *pooled_q = nullptr;
  std::int32_t* sink_block = nullptr;
  std::int64_t* row_start = nullptr;
  std::int32_t* row_count = nullptr;
  std::int32_t* block = nullptr;
  std::byte* permute_scratch = nullptr;
  std::int32_t* order = nullptr;
  std::byte *permuted_k = nullptr, *permuted_v = nullptr;
};

// Whether some row has a block that may be pruned.
bool is_sparse(const detail::PlanSpec& spec) {
  const Geometry& g = spec.geometry;
  const std::int64_t last_row = g.rows() - 1 - spec.options.dense_last_rows;
  return spec.options.keep == KeepRule::top_p && spec.options.top_p < 1.0F && last_row >= 0 &&
         g.own_begin(last_row) > 0;
}

// The largest pass that the cap allows: everything, then whole KV heads of one batch entry, then query heads of one
// KV head, which share no order.
Extent choose_extent(const detail::PlanSpec& spec, bool sparse) {
  const Geometry& g = spec.geometry;
  const auto bytes = [&](const Extent& e) { return Layout(spec, sparse, e, nullptr).bytes + alignment; };
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

void check_memory(const void* data, const char* name, int device) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, data), name);
  const bool there = attributes.type == cudaMemoryTypeManaged ||
                     (attributes.type == cudaMemoryTypeDevice && attributes.device == device);
  if (!there)
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{}: not in the memory of CUDA device {}; pass a tensor of that device", name, device));
}

template <class V>
void check_view(const V& view, const char* name, const Shape& shape, std::int64_t heads, std::int64_t tokens,
                DType dtype, int device) {
  if (view.dtype == DType::f32)
    refuse(fmt::format("{}: f32; the CUDA backend takes f16 and bf16; convert, or use Device::cpu()", name));
  if (view.dtype != dtype)
    refuse(fmt::format("{}: dtype {} but q has {} (1 is f16, 2 bf16); the CUDA backend takes four tensors alike", name,
                       static_cast<int>(view.dtype), static_cast<int>(dtype)));
  constexpr std::int64_t row_alignment = 16;
  if (reinterpret_cast<std::uintptr_t>(view.data) % row_alignment != 0)
    refuse(fmt::format("{}: data at {}, not at a {}-byte boundary; the CUDA backend loads rows {} bytes at a time",
                       name, static_cast<const void*>(view.data), row_alignment, row_alignment));
  const auto check_stride = [&](std::int64_t extent, std::int64_t stride, const char* axis) {
    if (extent > 1 && stride % (row_alignment / element_bytes) != 0)
      refuse(fmt::format("{}: {} stride {} is no multiple of {} elements, so rows would leave {}-byte boundaries", name,
                         axis, stride, row_alignment / element_bytes, row_alignment));
  };
  check_stride(tokens, view.token_stride, "token");
  check_stride(heads, view.head_stride, "head");
  check_stride(shape.batch, view.batch_stride, "batch");
  check_memory(view.data, name, device);
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
        workspace_size_(Layout(spec, sparse_, extent_, nullptr).bytes + alignment) {}

  std::size_t workspace_size() const noexcept override { return workspace_size_; }
  std::string_view path() const noexcept override { return sparse_ ? "sm90" : "sm90_dense"; }

  void run(const Inputs& inputs, const Outputs& outputs, std::span<std::byte> workspace, Stats* stats,
           Trace* trace) const override {
    run_on({}, inputs, outputs, workspace, stats, trace);
  }

  void run_on(Stream on, const Inputs& inputs, const Outputs& outputs, std::span<std::byte> workspace, Stats* stats,
              Trace* trace) const override {
    const CurrentDevice device(spec.device_index);
    // Peeking leaves the error to whoever caused it.
    check(cudaPeekAtLastError(), "earlier work, before this run");
    check_arguments(inputs, outputs, workspace);
    const auto stream = static_cast<cudaStream_t>(on.handle);
    Call call{.inputs = inputs, .outputs = outputs, .base = aligned(workspace.data()), .stream = stream};
    std::optional<Timeline> timeline;
    if (stats != nullptr) call.timeline = &timeline.emplace(stream);
    const Geometry& g = spec.geometry;
    if (trace != nullptr) *trace = detail::start_trace(g);

    for (std::int64_t batch = 0; batch < g.shape.batch; batch += extent_.batch)
      for (std::int64_t kv_head = 0; kv_head < g.shape.kv_heads; kv_head += extent_.kv_heads)
        for (std::int64_t head = 0; head < g.group(); head += extent_.group) {
          const Extent extent{extent_.batch, std::min(extent_.kv_heads, g.shape.kv_heads - kv_head),
                              std::min(extent_.group, g.group() - head)};
          const Layout layout(spec, sparse_, extent, call.base);
          enqueue(call, layout, extent, batch, kv_head, kv_head * g.group() + head);
          if (stats != nullptr) stats->visited_blocks += count_visited(call, layout, extent);
          if (trace != nullptr) extend_trace(call, layout, extent, *trace);
        }
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
    Timeline* timeline = nullptr;
  };

  static std::byte* aligned(std::byte* pointer) {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    return pointer + ((address + alignment - 1) / alignment * alignment - address);
  }

  void check_arguments(const Inputs& inputs, const Outputs& outputs, std::span<std::byte> workspace) const {
    const Shape& s = spec.geometry.shape;
    const DType dtype = inputs.q.dtype;
    check_view(inputs.q, "q", s, s.q_heads, s.q_len, dtype, spec.device_index);
    check_view(inputs.k, "k", s, s.kv_heads, s.kv_len, dtype, spec.device_index);
    check_view(inputs.v, "v", s, s.kv_heads, s.kv_len, dtype, spec.device_index);
    check_view(outputs.out, "out", s, s.q_heads, s.q_len, dtype, spec.device_index);
    if (outputs.lse != nullptr) check_memory(outputs.lse, "lse", spec.device_index);
    check_memory(workspace.data(), "workspace", spec.device_index);
  }

  void enqueue(const Call& call, const Layout& layout, const Extent& extent, std::int64_t batch, std::int64_t kv_head,
               std::int64_t q_head) const {
    const Geometry g = Layout::geometry_of(spec.geometry, extent);
    const Inputs inputs{.q = advanced(call.inputs.q, batch, q_head),
                        .k = advanced(call.inputs.k, batch, kv_head),
                        .v = advanced(call.inputs.v, batch, kv_head)};
    const std::int64_t order_heads = Layout::order_heads_of(spec, g);
    const BlockLists lists{.row_start = layout.row_start, .row_count = layout.row_count, .block = layout.block};
    const auto mark = [&] {
      if (call.timeline != nullptr) call.timeline->mark();
    };
    mark();
    if (sparse_) {
      const PermuteArgs permutation{.geometry = g,
                                    .scope = spec.options.order_scope,
                                    .rules = spec.options.rules,
                                    .scale = spec.options.scale,
                                    .inputs = inputs,
                                    .k = layout.permuted_k,
                                    .v = layout.permuted_v,
                                    .pooled_k = layout.pooled_k,
                                    .pooled_q = layout.pooled_q,
                                    .order = layout.order,
                                    .sink_block = layout.sink_block,
                                    .scratch = layout.permute_scratch};
      if (spec.options.permutation == Permutation::none)
        check(pool(permutation, call.stream), "launching pool");
      else
        check(permute(permutation, call.stream), "launching permute");
      mark();
      if (call.timeline != nullptr)
        check(cudaMemsetAsync(layout.visited_blocks, 0, sizeof(*layout.visited_blocks), call.stream),
              "clearing counts");
      check(select({.geometry = g,
                    .order_heads = order_heads,
                    .dtype = inputs.q.dtype,
                    .rules = spec.options.rules,
                    .scale = spec.options.scale,
                    .top_p = spec.options.top_p,
                    .dense_last_rows = spec.options.dense_last_rows,
                    .pooled_k = layout.pooled_k,
                    .pooled_q = layout.pooled_q,
                    .sink_block = layout.sink_block,
                    .row_start = layout.row_start,
                    .row_count = layout.row_count,
                    .block = layout.block,
                    .visited_blocks = call.timeline != nullptr ? layout.visited_blocks : nullptr},
                   call.stream),
            "launching select");
    } else {
      mark();
    }
    mark();
    const Shape& whole = spec.geometry.shape;
    check(
        attend({.geometry = g,
                .scale = spec.options.scale,
                .inputs = inputs,
                .permuted = {.k = layout.permuted_k, .v = layout.permuted_v, .order_heads = order_heads},
                .lists = sparse_ ? &lists : nullptr,
                .out = advanced(call.outputs.out, batch, q_head),
                .lse = call.outputs.lse == nullptr ? nullptr
                                                   : call.outputs.lse + (batch * whole.q_heads + q_head) * whole.q_len,
                .lse_batch_stride = whole.q_heads * whole.q_len,
                .scratch = layout.attend_scratch},
               call.stream),
        "launching attend");
    mark();
  }

  std::int64_t count_visited(const Call& call, const Layout& layout, const Extent& extent) const {
    const Geometry g = Layout::geometry_of(spec.geometry, extent);
    if (!sparse_) return g.shape.batch * g.shape.q_heads * g.causal_blocks_per_head();
    return static_cast<std::int64_t>(read(call, layout.visited_blocks, 1).front());
  }

  template <class T>
  static std::vector<T> read(const Call& call, const T* from, std::int64_t count) {
    std::vector<T> values(static_cast<std::size_t>(count));
    check(cudaMemcpyAsync(values.data(), from, values.size() * sizeof(T), cudaMemcpyDeviceToHost, call.stream),
          "reading back");
    check(cudaStreamSynchronize(call.stream), "waiting for the run");
    return values;
  }

  // Passes come in the order of their heads, so a trace grows at its end.
  void extend_trace(const Call& call, const Layout& layout, const Extent& extent, Trace& trace) const {
    const Geometry g = Layout::geometry_of(spec.geometry, extent);
    const std::int64_t heads = g.shape.batch * g.shape.q_heads;
    const std::int64_t moved = layout.order == nullptr ? 0 : g.permuted_len();
    const std::int64_t sharing = g.shape.q_heads / Layout::order_heads_of(spec, g);
    const auto order = read(call, layout.order, heads / sharing * moved);
    const auto count = read(call, layout.row_count, sparse_ ? heads * g.rows() : 0);
    const auto start = read(call, layout.row_start, sparse_ ? heads * g.rows() : 0);
    const auto block = read(call, layout.block, sparse_ ? heads * g.causal_blocks_per_head() : 0);
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
          for (std::int64_t b = 0; b <= g.diagonal(row); ++b) trace.block.push_back(static_cast<std::int32_t>(b));
        }
        trace.row_start.push_back(static_cast<std::int64_t>(trace.block.size()));
      }
    }
  }

  bool sparse_;
  Extent extent_;
  std::size_t workspace_size_;
};

void check_device(int index) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess)
    refuse(
        fmt::format("device cuda: no CUDA device can be used here ({}); use Device::cpu()", cudaGetErrorString(error)));
  if (index < 0 || index >= count)
    refuse(fmt::format("device cuda {}: this machine has {}; pass an index below that", index, count));
  int major = 0;
  int minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "compute capability");
  if (major != 9 || minor != 0)
    refuse(
        fmt::format("device cuda {}: compute capability {}.{}; the CUDA backend is built for 9.0 (H100, H200); use "
                    "Device::cpu()",
                    index, major, minor));
}

void check_limits(const detail::PlanSpec& spec) {
  const Geometry& g = spec.geometry;
  if (g.shape.head_dim != 64 && g.shape.head_dim != 128)
    refuse(fmt::format("head_dim {}: the CUDA backend takes 64 or 128; pad, or use Device::cpu()", g.shape.head_dim));
  if (spec.options.block != block_tokens)
    refuse(fmt::format("block {}: the CUDA backend takes {}; use that, or Device::cpu()", spec.options.block,
                       block_tokens));
  if (spec.options.segment > max_segment)
    refuse(fmt::format("segment {}: the CUDA backend takes up to {}; 256 is the paper's setting", spec.options.segment,
                       max_segment));
  if (spec.options.score == BlockScore::per_query)
    refuse("block score per_query: the CUDA backend has mean_pool; use that, or Device::cpu()");
  if (spec.options.keep == KeepRule::threshold)
    refuse("keep rule threshold: the CUDA backend has all and top_p; use one of them, or Device::cpu()");
  if (spec.options.precision == Precision::f32)
    refuse("precision f32: the CUDA backend multiplies f16 and bf16 as they come; use automatic, or Device::cpu()");
  if (g.blocks() > max_blocks)
    refuse(fmt::format("kv_len {}: the CUDA backend takes up to {} tokens", g.shape.kv_len, max_blocks * block_tokens));
  if (g.shape.batch * g.shape.q_heads > max_grid)
    refuse(fmt::format("{} heads in {} batch entries: the CUDA backend takes up to {} in all; split the batch",
                       g.shape.q_heads, g.shape.batch, max_grid));
}

}  // namespace

std::unique_ptr<detail::Executor> make_executor(const detail::PlanSpec& spec) {
  check_limits(spec);
  check_device(spec.device_index);
  return std::make_unique<CudaExecutor>(with_fallback_resolved(spec, cost_model));
}

}  // namespace pbsattn::cuda
