// Online sums of exponentials of products, and the tiles whose products they are.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "cuda/sm90/copy.cuh"
#include "cuda/sm90/shared_product.cuh"

namespace pbsattn::cuda {

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

  // Products of -inf alone leave max at -inf; subtracting 0 instead keeps NaN out of the sum.
  __device__ static float finite_or_zero(float x) { return x == -INFINITY ? 0.0F : x; }

  __device__ void merge(Statistics other, float scale_log2) {
    const float larger = fmaxf(max, other.max);
    const float shift = finite_or_zero(larger);
    sum = sum * sm90::exp2_fast((max - shift) * scale_log2) +
          other.sum * sm90::exp2_fast((other.max - shift) * scale_log2);
    max = larger;
  }
  __device__ void merge_across_lanes(float scale_log2) {  // the four lanes that share a row of a product
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      Statistics other;
      other.max = __shfl_xor_sync(~0U, max, offset);
      other.sum = __shfl_xor_sync(~0U, sum, offset);
      merge(other, scale_log2);
    }
  }
};

// Starts the copy of `rows` rows; the tile's other rows become zero.
template <class T, int head_dim, int threads>
__device__ void load_tile(unsigned char* tile, const T* from, std::int64_t stride, int rows, int thread) {
  using Layout = Tile<head_dim>;
  constexpr int rows_at_once = threads / Layout::chunks;
  static_assert(rows_at_once % 8 == 0, "swizzling repeats every 8 rows");
  const int first_row = thread / Layout::chunks;
  const int chunk = thread % Layout::chunks;
  const std::uint32_t to = sm90::shared_address(tile) + Layout::offset(first_row, chunk);
  const T* row = from + first_row * stride + chunk * 8;
#pragma unroll 1  // unrolled, it would keep every row's address in registers
  for (int i = 0; i < tile_tokens / rows_at_once; ++i) {
    const bool present = first_row + i * rows_at_once < rows;
    copy_async(to + i * rows_at_once * 128, present ? row : from, present);
    row += rows_at_once * stride;
  }
}

}  // namespace pbsattn::cuda
