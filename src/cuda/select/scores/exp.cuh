// Sums of exponentials of products.
//
// For 64 x 128 products of 128 elements the tensor cores take 512 cycles, and the unit for exponentials as long for
// theirs, so there are few cycles for anything else. A sum doesn't begin by looking for its largest product: exponents
// are relative to one of earlier products. Where that turns out too far below, or products are so large that their
// exponents would be off by their rounding, the sum is made again with the largest subtracted first. Far above, what is
// summed is 0 in float32 beside the earlier products.
#pragma once

#include "cuda/sm90/online_sum.cuh"

namespace pbsattn::cuda {

// Returns the sum of exp2(s * scale - shift) of row r of a product in registers: in this thread s[4 i + 2 r + c].
__device__ inline float sum_relative(const float (&s)[64], int r, float scale_log2, float shift) {
  float sum[2] = {};
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
    sum[0] += sm90::exp2_fast(fmaf(s[i + 2 * r], scale_log2, -shift));
    sum[1] += sm90::exp2_fast(fmaf(s[i + 2 * r + 1], scale_log2, -shift));
  }
  return sum[0] + sum[1];
}

// Tells whether such a sum is good. What it is relative to is -inf where there were no products yet.
__device__ inline bool is_trusted(float sum, float shift) {
  return sum < 0x1p40F && fabsf(shift) < 0x1p28F;
}

__device__ inline float largest_of(const float (&s)[64], int r) {
  float max[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
    max[0] = fmaxf(max[0], s[i + 2 * r]);
    max[1] = fmaxf(max[1], s[i + 2 * r + 1]);
  }
  return fmaxf(max[0], max[1]);
}

// Returns the sum of exp2((s - max) * scale).
__device__ inline float sum_exactly(const float (&s)[64], int r, float scale_log2, float max) {
  float sum[2] = {};
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
    sum[0] += sm90::exp2_fast((s[i + 2 * r] - max) * scale_log2);
    sum[1] += sm90::exp2_fast((s[i + 2 * r + 1] - max) * scale_log2);
  }
  return sum[0] + sum[1];
}

}  // namespace pbsattn::cuda
