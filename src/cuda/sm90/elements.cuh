// 16-bit elements, read and written 8 at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn::cuda {

// Takes two elements packed in 32 bits apart, and back (rounded to nearest even).
template <class T>
__device__ inline float2 unpack(std::uint32_t bits) {
  if constexpr (std::is_same_v<T, __half>) return __half22float2(reinterpret_cast<const __half2&>(bits));
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000U));
}
template <class T>
__device__ inline std::uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  }
}

template <class T>
__device__ inline void add_to(float (&sum)[8], uint4 chunk) {
  const std::uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(words[i]);
    sum[2 * i] += pair.x;
    sum[2 * i + 1] += pair.y;
  }
}

// Adds up lanes that differ in the bits from `first` up: those that hold the same columns of different rows.
template <int first>
__device__ inline void add_across_lanes(float (&sum)[8]) {
#pragma unroll
  for (int offset = first; offset < 32; offset *= 2) {
#pragma unroll
    for (float& x : sum) x += __shfl_xor_sync(~0U, x, offset);
  }
}

// Calls f with a value of the element type and the head_dim as an integral constant.
template <class F>
cudaError_t dispatch(DType dtype, std::int64_t head_dim, F&& f) {
  const auto with_type = [&]<class T>(T element) {
    return head_dim == 128 ? f(element, std::integral_constant<int, 128>{})
                           : f(element, std::integral_constant<int, 64>{});
  };
  return dtype == DType::bf16 ? with_type(__nv_bfloat16{}) : with_type(__half{});
}

}  // namespace pbsattn::cuda
