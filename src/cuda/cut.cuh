// The heaviest of many values by a whole thread block, without a sort: a search in the bits of their keys, which order
// like integers. Each step measures what lies above the interval's quarters; counts and sums are taken in a fixed
// order, so the same values give the same cut.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace pbsattn::cuda {

constexpr int cut_threads = 1024;

// Values aren't negative and not NaN. Of equal ones the first is the highest, so that keys are different.
__device__ inline std::uint64_t cut_key(float value, std::int64_t index) {
  return static_cast<std::uint64_t>(__float_as_uint(value)) << 32 | (~0U - static_cast<unsigned>(index));
}

struct Cut {
  std::uint64_t least;  // the least key above the cut
  int count;            // of keys from there up
};

enum class Measure { number, sum };

// The highest of value(0) .. value(size - 1) whose number, or sum, stays within `limit`: up to the first that would
// exceed it. All threads of the block call it and get the same.
template <Measure measure, class Value>
__device__ Cut cut_within(double limit, int size, Value&& value) {
  constexpr int warps = cut_threads / 32;
  constexpr int quarters = 3;
  __shared__ int counts[warps][quarters];
  __shared__ double sums[warps][quarters];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;

  std::uint64_t low = 0;  // from here up the keys exceed the limit, from `high` up they don't
  std::uint64_t high = cut_key(INFINITY, 0) + 1;
  int count_low = size;
  int count_high = 0;
  bool first = true;  // the first step measures everything
  while (first || (count_low - count_high > 1 && high - low > 1)) {
    if (measure == Measure::number && !first && count_high == limit) break;
    const std::uint64_t from[quarters] = {first ? low : low + (high - low) / 4, low + (high - low) / 2,
                                          high - (high - low) / 4};
    int count[quarters] = {};
    double sum[quarters] = {};
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < size; i += cut_threads) {
      const float x = value(i);
      const std::uint64_t key = cut_key(x, i);
#pragma unroll
      for (int q = 0; q < quarters; ++q) {
        const bool above = key >= from[q];
        count[q] += above;
        if constexpr (measure == Measure::sum) sum[q] += above ? static_cast<double>(x) : 0.0;
      }
    }
    __syncthreads();  // everyone has read the last step's
#pragma unroll
    for (int q = 0; q < quarters; ++q) {
      count[q] = __reduce_add_sync(~0U, count[q]);
      if constexpr (measure == Measure::sum) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) sum[q] += __shfl_xor_sync(~0U, sum[q], offset);
      }
      if (lane == 0) {
        counts[warp][q] = count[q];
        sums[warp][q] = sum[q];
      }
    }
    __syncthreads();
#pragma unroll
    for (int q = quarters - 1; q >= 0; --q) {
      count[q] = __reduce_add_sync(~0U, counts[lane][q]);
      sum[q] = measure == Measure::number ? count[q] : sums[lane][q];
      if constexpr (measure == Measure::sum) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) sum[q] += __shfl_xor_sync(~0U, sum[q], offset);
      }
    }
    if (first && sum[0] <= limit) return {low, size};
#pragma unroll
    for (int q = quarters - 1; q >= 0; --q) {
      if (sum[q] > limit) {
        low = from[q];
        count_low = count[q];
        break;
      }
      high = from[q];
      count_high = count[q];
    }
    first = false;
  }
  return {high, count_high};
}

}  // namespace pbsattn::cuda
