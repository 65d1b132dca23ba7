#include "cuda/validate.h"

#include <fmt/format.h>

#include <string>

#include "cuda/limits.h"
#include "cuda/runtime.h"
#include "cuda/workspace.h"
#include "pbsattn/options.hpp"

namespace pbsattn::cuda {
namespace {

constexpr std::int64_t max_grid = 65'535;

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::unsupported, message);
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

void check_widths(const Shape& shape) {
  std::string keys, values;
  for (const Widths& w : widths) {
    keys += fmt::format("{}{}", keys.empty() ? "" : ", ", w.keys);
    if (w.keys != shape.head_dim) continue;
    values += fmt::format("{}{}", values.empty() ? "" : ", ", w.values);
    if (w.values == value_dim(shape)) return;
  }
  if (values.empty())
    refuse(fmt::format("head_dim {}: the CUDA backend takes {}; pad, or use Device::cpu()", shape.head_dim, keys));
  refuse(fmt::format("head_dim_v {}: the CUDA backend takes {} beside a head_dim of {}; pad, or use Device::cpu()",
                     value_dim(shape), values, shape.head_dim));
}

// What a view's strides go along.
struct Axes {
  const char* outer_name;
  std::int64_t outer, heads;
  const char* inner_name;
  std::int64_t inner;
};

template <class V>
void check_view(const V& view, const char* name, const Axes& axes, DType dtype, int device) {
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
      refuse(
          fmt::format("{}: {} stride {} is no multiple of {} elements, so rows would leave {}-byte boundaries; "
                      "pad it to one, or use Device::cpu()",
                      name, axis, stride, row_alignment / element_bytes, row_alignment));
  };
  check_stride(axes.inner, view.token_stride, axes.inner_name);
  check_stride(axes.heads, view.head_stride, "head");
  check_stride(axes.outer, view.batch_stride, axes.outer_name);
  check_memory(view.data, name, device);
}

}  // namespace

void check_device(int index) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); !succeeded(error))
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
  check_widths(g.shape);
  if (spec.options.block != block_tokens)
    refuse(fmt::format("block {}: the CUDA backend takes {}; use that, or Device::cpu()", spec.options.block,
                       block_tokens));
  if (spec.options.segment > max_segment)
    refuse(fmt::format("segment {}: the CUDA backend takes up to {}; 256 is the paper's setting", spec.options.segment,
                       max_segment));
  const Options& options = spec.options;
  if (spec.options.precision == Precision::f32)
    refuse("precision f32: the CUDA backend multiplies f16 and bf16 as they come; use automatic, or Device::cpu()");
  if (options.softcap != 0.0F && !takes_caps(g.shape.head_dim))
    refuse(fmt::format("softcap {}: the CUDA backend takes 0 at a head_dim of {}; use that, or Device::cpu()",
                       options.softcap, g.shape.head_dim));
  if (g.blocks() > max_blocks)
    refuse(fmt::format("kv_len {}: the CUDA backend takes up to {} tokens", g.shape.kv_len, max_blocks * block_tokens));
  if (options.score == BlockScore::dual_band && 2 * g.blocks() > max_blocks)  // two scores of a row in shared memory
    refuse(fmt::format("kv_len {}: the CUDA backend takes up to {} tokens with block score dual_band; use another",
                       g.shape.kv_len, max_blocks / 2 * block_tokens));
  if (g.shape.batch * g.shape.q_heads > max_grid)
    refuse(fmt::format("{} heads in {} batch entries: the CUDA backend takes up to {} in all; split the batch",
                       g.shape.q_heads, g.shape.batch, max_grid));
}

void check_buffers(const detail::PlanSpec& spec, const Inputs& inputs, const Outputs& outputs,
                   const std::byte* workspace) {
  const Shape& s = spec.geometry.shape;
  const DType dtype = inputs.q.dtype;
  const Pages& pages = inputs.pages;
  const bool paged = pages.table != nullptr;
  const Axes of_kv = paged ? Axes{"page", pages.count, s.kv_heads, "place", pages.size}
                           : Axes{"batch", s.batch, s.kv_heads, "token", s.kv_len};
  check_view(inputs.q, "q", {"batch", s.batch, s.q_heads, "token", s.q_len}, dtype, spec.device_index);
  check_view(inputs.k, "k", of_kv, dtype, spec.device_index);
  check_view(inputs.v, "v", of_kv, dtype, spec.device_index);
  check_view(outputs.out, "out", {"batch", s.batch, s.q_heads, "token", s.q_len}, dtype, spec.device_index);
  if (paged && !takes_pages(s.head_dim))
    refuse(
        fmt::format("pages of {} tokens: the CUDA backend takes none at a head_dim of {}; gather them, or use "
                    "Device::cpu()",
                    pages.size, s.head_dim));
  if (paged && !takes_pages_of_layers(s.head_dim) && (!inputs.sinks.empty() || spec.geometry.windowed()))
    refuse(
        fmt::format("pages of {} tokens: the CUDA backend takes none with sinks or a window at a head_dim of {}; "
                    "gather them, or use Device::cpu()",
                    pages.size, s.head_dim));
  if (paged) check_memory(pages.table, "page table", spec.device_index);
  if (!inputs.sinks.empty()) check_memory(inputs.sinks.data(), "sinks", spec.device_index);
  if (outputs.lse != nullptr) check_memory(outputs.lse, "lse", spec.device_index);
  if (!inputs.order_weights.values.empty())
    check_memory(inputs.order_weights.values.data(), "order_weights", spec.device_index);
  if (outputs.order.data != nullptr) check_memory(outputs.order.data, "order", spec.device_index);
  if (const SegmentCache* const cache = outputs.cache.cache; cache != nullptr)
    if (const std::span<std::byte> memory = detail::CacheAccess::memory(*cache); !memory.empty())
      check_memory(memory.data(), "cache", spec.device_index);
  check_memory(workspace, "workspace", spec.device_index);
}

}  // namespace pbsattn::cuda
