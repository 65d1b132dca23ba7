// The heaviest of many values by a whole thread block, without a sort: a search in the bits of their keys, which order
// like integers. Each step measures what lies above the interval's quarters; counts and sums are taken in a fixed
// order, so the same values give the same cut.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/sm90/lanes.cuh"

namespace pbsattn::cuda {

constexpr int cut_threads = 1024;

// Returns what orders values, which aren't negative and not NaN, as integers. Of equal ones the first is the highest,
// so that keys are different.
__device__ inline std::uint64_t cut_key(float value, std::int64_t index) {
  return static_cast<std::uint64_t>(__float_as_uint(value)) << 32 | (~0U - static_cast<unsigned>(index));
}

struct Cut {
  std::uint64_t least;  // the least key above the cut
  int count;            // of keys from there up
};

enum class Measure { number, sum };

// A search's interval of 32-bit keys: those from `low` up exceed the limit, those from `high` up don't.
struct CutInterval {
  std::uint64_t low, high;
  int count_low, count_high;  // of keys from there up
  double high_measure;
  bool low_exceeds;  // false: not known yet
};

// Narrows the interval to one key, or to keys alike; to none if nothing exceeds the limit. For each of `size` values
// visit(i, use) calls use(key, value) if it counts; its measure adds to `base`, that of those that are above all of
// these. All threads of the block call it and get the same.
template <Measure measure, class Visit>
__device__ void narrow(CutInterval& interval, double limit, int base_count, double base, int size, Visit&& visit) {
  constexpr int warps = cut_threads / 32;
  constexpr int quarters = 3;
  __shared__ int counts[warps][quarters];
  __shared__ double sums[warps][quarters];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  while (!interval.low_exceeds || (interval.count_low - interval.count_high > 1 && interval.high - interval.low > 1)) {
    if (measure == Measure::number && interval.count_high == limit) return;
    const std::uint64_t width = interval.high - interval.low;
    const unsigned from[quarters] = {static_cast<unsigned>(interval.low + (interval.low_exceeds ? width / 4 : 0)),
                                     static_cast<unsigned>(interval.low + width / 2),
                                     static_cast<unsigned>(interval.high - max(width / 4, std::uint64_t{1}))};
    int count[quarters] = {};
    double sum[quarters] = {};
#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.x); i < size; i += cut_threads)
      visit(i, [&](unsigned key, float value) {
#pragma unroll
        for (int q = 0; q < quarters; ++q) {
          count[q] += key >= from[q];
          if constexpr (measure == Measure::sum)
            if (key >= from[q]) sum[q] += static_cast<double>(value);
        }
      });
    __syncthreads();  // everyone has read the last step's
#pragma unroll
    for (int q = 0; q < quarters; ++q) {
      count[q] = __reduce_add_sync(~0U, count[q]);
      if constexpr (measure == Measure::sum) sum[q] = warp_sum(sum[q]);
      if (lane == 0) {
        counts[warp][q] = count[q];
        sums[warp][q] = sum[q];
      }
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < quarters; ++q) {
      count[q] = base_count + __reduce_add_sync(~0U, counts[lane][q]);
      sum[q] = measure == Measure::number ? count[q] : base + warp_sum(sums[lane][q]);
    }
    if (!interval.low_exceeds && sum[0] <= limit) {
      interval.high = interval.low;
      interval.count_high = interval.count_low;
      return;
    }
    interval.low_exceeds = true;
#pragma unroll
    for (int q = quarters - 1; q >= 0; --q) {
      if (sum[q] > limit) {
        interval.low = from[q];
        interval.count_low = count[q];
        break;
      }
      interval.high = from[q];
      interval.count_high = count[q];
      interval.high_measure = sum[q];
    }
  }
}

// Finds the highest of value(0) .. value(size - 1) whose number, or sum, stays within `limit`: up to the first that
// would exceed it. All threads of the block call it and get the same.
template <Measure measure, class Value>
__device__ Cut cut_within(double limit, int size, Value&& value) {
  if (measure == Measure::number && size <= limit) return {0, size};
  // By the bits of values.
  CutInterval bits{0, __float_as_uint(INFINITY) + std::uint64_t{1}, size, 0, 0, measure == Measure::number};
  narrow<measure>(bits, limit, 0, 0, size, [&](int i, auto&& use) {
    const float x = value(i);
    use(__float_as_uint(x), x);
  });
  const bool done = bits.count_low - bits.count_high <= 1 || (measure == Measure::number && bits.count_high == limit);
  if (done) return {bits.high << 32, bits.count_high};
  // Equal ones by their index.
  const auto tie = static_cast<unsigned>(bits.low);
  CutInterval places{0, std::uint64_t{1} << 32, bits.count_low, bits.count_high, bits.high_measure, true};
  narrow<measure>(places, limit, bits.count_high, bits.high_measure, size, [&](int i, auto&& use) {
    const float x = value(i);
    if (__float_as_uint(x) == tie) use(~0U - static_cast<unsigned>(i), x);
  });
  return {bits.low << 32 | places.high, places.count_high};
}

}  // namespace pbsattn::cuda
