#include "cuda/sm90/tensor_map.h"

#include <cuda_runtime_api.h>

#include <atomic>

#include "cuda/runtime.h"
#include "cuda/sm90/panel.h"

namespace pbsattn::cuda {
namespace {

using Encoder = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time so that nothing links to libcuda. Kept once it is found: where the look-up
// fails, as before a driver is loaded, the next call tries again.
Encoder encoder() {
  static std::atomic<Encoder> known = nullptr;
  if (const Encoder function = known) return function;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const bool called =
      succeeded(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
  if (called && result == cudaDriverEntryPointSuccess) known = reinterpret_cast<Encoder>(found);
  return known;
}

}  // namespace

bool make_tensor_map(CUtensorMap& map, const void* data, DType dtype, std::int64_t batch_stride,
                     std::int64_t head_stride, std::int64_t token_stride, std::int64_t batch, std::int64_t heads,
                     std::int64_t tokens, std::int64_t head_dim, Box box) {
  const int panel = box.panel != 0 ? box.panel : panel_of(head_dim);
  // An axis of one element may carry any stride; the driver wants one it would accept.
  const auto bytes = [&](std::int64_t extent, std::int64_t stride) {
    return static_cast<cuuint64_t>(extent > 1 ? stride * 2 : head_dim * 2);
  };
  const cuuint64_t extents[5] = {static_cast<cuuint64_t>(panel), static_cast<cuuint64_t>(tokens),
                                 static_cast<cuuint64_t>(head_dim / panel), static_cast<cuuint64_t>(heads),
                                 static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[4] = {bytes(tokens, token_stride), static_cast<cuuint64_t>(panel) * 2,
                                 bytes(heads, head_stride), bytes(batch, batch_stride)};
  const auto step = static_cast<cuuint32_t>(box.token_step);
  const cuuint32_t sizes[5] = {static_cast<cuuint32_t>(panel), static_cast<cuuint32_t>(box.tokens) * step,
                               static_cast<cuuint32_t>(box.columns / panel), 1, 1};
  const cuuint32_t steps[5] = {1, step, 1, 1, 1};
  const auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const Encoder encode = encoder();
  return encode != nullptr &&
         encode(&map, type, 5, const_cast<void*>(data), extents, strides, sizes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                panel == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace pbsattn::cuda
