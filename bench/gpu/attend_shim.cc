// The attend stage behind one C function, for lists of any density. Tensors are [batch][heads][tokens][head_dim], of
// values and outputs [head_dim_v]; strides are {batch, head, token} in elements. Lists and permuted K and V may be
// null.
#include "cuda/attend/attend.h"

using namespace pbsattn;

extern "C" __attribute__((visibility("default"))) std::size_t attend_bench_scratch(std::int64_t batch,
                                                                                   std::int64_t q_heads,
                                                                                   std::int64_t q_len,
                                                                                   std::int64_t kv_len) {
  const Shape shape{
      .batch = batch, .q_heads = q_heads, .kv_heads = 1, .q_len = q_len, .kv_len = kv_len, .head_dim = 64};
  return cuda::attend_scratch_size(Geometry{.shape = shape});
}

extern "C" __attribute__((visibility("default"))) int attend_bench(
    const std::int64_t* sizes,  // batch, q_heads, kv_heads, q_len, kv_len, head_dim, head_dim_v, segment, order_heads,
                                // is_bf16, window
    float scale, float softcap, float* sinks, void* q, void* k, void* v, void* out, const std::int64_t* strides,
    float* lse, void* permuted_k, void* permuted_v, std::int64_t* row_start, std::int32_t* row_count,
    std::int32_t* list, void* scratch, void* stream) {
  const DType dtype = sizes[9] != 0 ? DType::bf16 : DType::f16;
  const auto view = [&](void* data, int i) {
    return View{data, dtype, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  };
  const auto input = [&](void* data, int i) {
    return ConstView{data, dtype, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  };
  const Shape shape{.batch = sizes[0],
                    .q_heads = sizes[1],
                    .kv_heads = sizes[2],
                    .q_len = sizes[3],
                    .kv_len = sizes[4],
                    .head_dim = sizes[5],
                    .head_dim_v = sizes[6]};
  const Geometry geometry{.shape = shape, .block = 128, .segment = static_cast<int>(sizes[7]), .window = sizes[10]};
  const cuda::AttendArgs args{
      .geometry = geometry,
      .scale = scale,
      .softcap = softcap,
      .inputs = {.q = input(q, 0),
                 .k = input(k, 1),
                 .v = input(v, 2),
                 .sinks = {sinks, sinks == nullptr ? 0 : static_cast<std::size_t>(shape.q_heads)}},
      .permuted = {.order_heads = sizes[8], .slots = geometry.permuted_len(), .k = permuted_k, .v = permuted_v},
      .lists = {.row_start = row_start, .row_count = row_count, .block = list},
      .outputs = {.out = view(out, 3), .lse = lse},
      .lse_batch_stride = shape.q_heads * shape.q_len,
      .scratch = scratch,
  };
  return cuda::attend(args, static_cast<cudaStream_t>(stream));
}
