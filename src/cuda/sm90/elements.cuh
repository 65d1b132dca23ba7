// 16-bit elements, read and written 8 at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>

#include "cuda/limits.h"

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

// Calls f with a value of the element type and the first of `widths` that fits, as integral constants.
template <class Fits, class F>
cudaError_t dispatch_where(DType dtype, Fits&& fits, F&& f) {
  cudaError_t error = cudaErrorInvalidValue;
  const auto with_type = [&]<class T, std::size_t... i>(T element, std::index_sequence<i...>) {
    static_cast<void>(((fits(widths[i]) && ((error = f(element, std::integral_constant<int, widths[i].keys>{},
                                                       std::integral_constant<int, widths[i].values>{})),
                                            true)) ||
                       ...));
  };
  constexpr auto each = std::make_index_sequence<std::size(widths)>{};
  dtype == DType::bf16 ? with_type(__nv_bfloat16{}, each) : with_type(__half{}, each);
  return error;
}

// Calls f with a value of the element type and the widths of keys and values as integral constants.
template <class F>
cudaError_t dispatch(DType dtype, const Shape& shape, F&& f) {
  return dispatch_where(
      dtype, [&](Widths w) { return w.keys == shape.head_dim && w.values == value_dim(shape); }, std::forward<F>(f));
}

// Calls f with a value of the element type and one width, of keys or of values, as an integral constant.
template <class F>
cudaError_t dispatch(DType dtype, std::int64_t width, F&& f) {
  return dispatch_where(
      dtype, [&](Widths w) { return w.keys == width; },
      [&](auto element, auto keys, auto) { return f(element, keys); });
}

}  // namespace pbsattn::cuda
