// Throws bytes at planning and running through the C interface. Whatever a plan accepts it must run within
// the buffers that its shape and strides describe, which lie here between AddressSanitizer's red zones.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <vector>

#include "bytes.h"
#include "pbsattn/pbsattn.h"

namespace {

using pbsattn::fuzz::Bytes;

constexpr std::int64_t small = 320;               // tokens; enough for two segments of 128 and more
constexpr std::int64_t largest_tensor = 1 << 17;  // elements

pbsattn_options take_options(Bytes& bytes) {
  pbsattn_options options{.struct_size = sizeof options};
  const char* const names[] = {"pbs", "full", "pbs-unpermuted", "auto", "pbs-threshold"};
  pbsattn_method(names[bytes.take<std::uint8_t>() % 5], &options);
  options.permutation = static_cast<std::int32_t>(bytes.take_near(0, 1));
  options.order_scope = static_cast<std::int32_t>(bytes.take_near(0, 1));
  options.score = static_cast<std::int32_t>(bytes.take_near(0, 5));
  options.keep = static_cast<std::int32_t>(bytes.take_near(0, 5));
  options.rules = static_cast<std::int32_t>(bytes.take_near(0, 1));
  options.precision = static_cast<std::int32_t>(bytes.take_near(0, 2));
  options.top_p = static_cast<float>(bytes.take_near(0, 20)) / 20;
  options.threshold = static_cast<float>(bytes.take_near(0, 16)) / 16;
  options.floor_top_p = static_cast<float>(bytes.take_near(0, 20)) / 20;
  options.top_k = static_cast<std::int32_t>(bytes.take_near(0, 4));
  options.density = static_cast<float>(bytes.take_near(0, 8)) / 8;
  options.block = static_cast<std::int32_t>(32 * bytes.take_near(1, 4));
  options.segment = static_cast<std::int32_t>(options.block * (bytes.take_near(1, 3) & 0xFF));
  options.dense_last_rows = static_cast<std::int32_t>(bytes.take_near(0, 3));
  options.sink_blocks = static_cast<std::int32_t>(bytes.take_near(0, 2));
  options.local_blocks = static_cast<std::int32_t>(bytes.take_near(0, 2));
  options.fallback = static_cast<std::int32_t>(bytes.take_near(0, 1));
  options.expected_density = static_cast<float>(bytes.take_near(0, 8)) / 8;
  options.scale = static_cast<float>(bytes.take_near(0, 4)) / 4;
  return options;
}

pbsattn_shape take_shape(Bytes& bytes) {
  pbsattn_shape shape{.struct_size = sizeof shape};
  shape.batch = bytes.take_near(1, 2);
  shape.kv_heads = bytes.take_near(1, 2);
  shape.q_heads = bytes.take_near(1, 2) * (shape.kv_heads & 0xFF);
  shape.kv_len = bytes.take_near(1, small);
  shape.q_len = bytes.take_near(1, std::clamp<std::int64_t>(shape.kv_len, 1, small));
  shape.head_dim = 8 * bytes.take_near(1, 4);
  return shape;
}

// A view whose strides fit a tensor of these sizes, or nearly, and the memory that it spans.
struct Tensor {
  Tensor(Bytes& bytes, std::int64_t batch, std::int64_t heads, std::int64_t tokens, std::int64_t dim) {
    view.dtype = static_cast<std::int32_t>(bytes.take_near(0, 2));
    view.token_stride = bytes.take_near(dim - 1, dim + 3);
    view.head_stride = bytes.take_near(0, 3) + tokens * (dim + 3);
    view.batch_stride = bytes.take_near(0, 3) + heads * view.head_stride;
    const auto reach = [](std::int64_t extent, std::int64_t stride) {
      return extent > 1 ? (extent - 1) * std::max<std::int64_t>(stride, 0) : 0;
    };
    const auto sane = [](std::int64_t stride) { return std::abs(stride) < largest_tensor; };
    fits = sane(view.token_stride) && sane(view.head_stride) && sane(view.batch_stride);
    if (!fits) return;
    const std::int64_t elements =
        reach(batch, view.batch_stride) + reach(heads, view.head_stride) + reach(tokens, view.token_stride) + dim;
    fits = elements <= 8 * largest_tensor;
    if (!fits) return;
    memory.resize(static_cast<std::size_t>(elements) * (view.dtype == PBSATTN_F32 ? 4 : 2));
    for (std::size_t i = 0; i < memory.size() && bytes.size() > 0; ++i) memory[i] = bytes.data()[i % bytes.size()];
    view.data = memory.data();
  }

  pbsattn_view view{.struct_size = sizeof(pbsattn_view)};
  std::vector<std::uint8_t> memory;
  bool fits = false;
};

void run_plan(const pbsattn_plan* plan, const pbsattn_shape& s, Bytes& bytes) {
  Tensor q(bytes, s.batch, s.q_heads, s.q_len, s.head_dim);
  Tensor k(bytes, s.batch, s.kv_heads, s.kv_len, s.head_dim);
  Tensor v(bytes, s.batch, s.kv_heads, s.kv_len, s.head_dim);
  Tensor out(bytes, s.batch, s.q_heads, s.q_len, s.head_dim);
  if (!q.fits || !k.fits || !v.fits || !out.fits) return;
  std::vector<float> lse(static_cast<std::size_t>(s.batch * s.q_heads * s.q_len));
  const std::size_t size = pbsattn_plan_workspace_size(plan);
  const std::unique_ptr<std::byte[]> workspace(new std::byte[size]);
  pbsattn_stats stats{.struct_size = sizeof stats};
  const pbsattn_run run{.struct_size = sizeof run,
                        .q = &q.view,
                        .k = &k.view,
                        .v = &v.view,
                        .out = &out.view,
                        .lse = bytes.take<std::uint8_t>() % 2 == 0 ? lse.data() : nullptr,
                        .workspace = workspace.get(),
                        .workspace_size = size,
                        .stream = nullptr,
                        .stats = &stats};
  if (pbsattn_plan_run(plan, &run) != PBSATTN_OK) return;
  const bool counted = 0 < stats.visited_blocks && stats.visited_blocks <= stats.causal_blocks;
  if (!counted) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  const pbsattn_options options = take_options(bytes);
  const pbsattn_shape shape = take_shape(bytes);
  pbsattn_device device{.struct_size = sizeof device};
  device.kind = static_cast<std::int32_t>(bytes.take_near(0, 2));
  device.threads = static_cast<std::int32_t>(bytes.take_near(0, 2));
  const std::size_t cap = bytes.take<std::uint8_t>() % 4 == 0 ? bytes.take<std::uint32_t>() : SIZE_MAX;
  pbsattn_plan* plan = nullptr;
  const pbsattn_status status = pbsattn_plan_create(&options, &shape, &device, cap, &plan);
  const bool explained = std::string_view(pbsattn_last_error()).empty() == (status == PBSATTN_OK);
  if (!explained || (plan != nullptr) != (status == PBSATTN_OK) || status == PBSATTN_INTERNAL) std::abort();
  // Naive loops make the reference too slow for all that the CPU may run here.
  const std::int64_t affordable = device.kind == PBSATTN_DEVICE_REFERENCE ? 64 : small;
  if (plan != nullptr && shape.kv_len <= affordable && shape.batch * shape.q_heads <= 8 && shape.head_dim <= 64)
    run_plan(plan, shape, bytes);
  pbsattn_plan_destroy(plan);
  return 0;
}
