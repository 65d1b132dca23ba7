// Online sums of exponentials of products.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "cuda/sm90/ptx.cuh"

namespace pbsattn::cuda {

// Returns what a product is multiplied by to be an exponent of base 2.
inline float scale_log2(float scale) {
  return static_cast<float>(scale / std::log(2.0));
}

// Of a scoring query: its largest product, and log2 of the sum of exp2((product - max) * scale_log2). A query that
// isn't there has a sum of +inf, so that its weights are 0.
struct LogSum {
  float max, log2_sum;
};

// The online softmax's state of a scoring query: the largest product so far, and the sum of
// exp2((product - max) * scale_log2). Products are scaled after the subtraction: the other way round, huge ones would
// differ from their own maximum by rounding.
struct Statistics {
  float max = -INFINITY;
  float sum = 0;

  // Returns what to subtract of a maximum: products of -inf alone leave it at -inf, and subtracting 0 instead keeps NaN
  // out of the sum.
  __device__ static float finite_or_zero(float x) { return x == -INFINITY ? 0.0F : x; }

  __device__ void merge(Statistics other, float scale_log2) {
    const float larger = fmaxf(max, other.max);
    const float shift = finite_or_zero(larger);
    sum = sum * sm90::exp2_fast((max - shift) * scale_log2) +
          other.sum * sm90::exp2_fast((other.max - shift) * scale_log2);
    max = larger;
  }
  __device__ void merge_with_lane(int offset, float scale_log2) {
    Statistics other;
    other.max = __shfl_xor_sync(~0U, max, offset);
    other.sum = __shfl_xor_sync(~0U, sum, offset);
    merge(other, scale_log2);
  }
  __device__ void merge_across_lanes(float scale_log2) {  // the four lanes that share a row of a product
    merge_with_lane(1, scale_log2);
    merge_with_lane(2, scale_log2);
  }
};

}  // namespace pbsattn::cuda
