// What score_per_query.cu does with products in registers, and the products of a few keys by one warp.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/permute_common.cuh"

namespace pbsattn::cuda {

// Folds a product into the state of this thread's two queries; columns from `valid` on aren't there.
__device__ inline void fold(float (&s)[64], int valid, float scale_log2, Statistics (&statistics)[2]) {
  if (valid < tile_tokens) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if (i / 4 * 8 + column + i % 2 >= valid) s[i] = -INFINITY;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float max[2] = {statistics[r].max, -INFINITY};
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      max[0] = fmaxf(max[0], s[i + 2 * r]);
      max[1] = fmaxf(max[1], s[i + 2 * r + 1]);
    }
    const float larger = fmaxf(max[0], max[1]);
    const float shift = Statistics::finite_or_zero(larger);
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      sum[0] += sm90::exp2_fast((s[i + 2 * r] - shift) * scale_log2);
      sum[1] += sm90::exp2_fast((s[i + 2 * r + 1] - shift) * scale_log2);
    }
    statistics[r].sum =
        statistics[r].sum * sm90::exp2_fast((statistics[r].max - shift) * scale_log2) + (sum[0] + sum[1]);
    statistics[r].max = larger;
  }
}

// Sums over the queries [first, last) of the weights of this thread's two blocks, in all four lanes that share them.
__device__ inline void sum_weights(const float (&s)[64], float scale_log2, const LogSum* log_sums, int first, int last,
                                   float (&sum)[2]) {
  const int column = threadIdx.x % 4 * 2;
  const bool whole = first == 0 && last == tile_tokens;
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
    const int query = i * 2 + column;
    const float4 pair = *reinterpret_cast<const float4*>(log_sums + query);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float low = sm90::exp2_fast(fmaf(s[i + 2 * r] - pair.x, scale_log2, -pair.y));
      const float high = sm90::exp2_fast(fmaf(s[i + 2 * r + 1] - pair.z, scale_log2, -pair.w));
      if (whole) {
        sum[r] += low + high;
      } else {  // what isn't there may be NaN
        if (query >= first && query < last) sum[r] += low;
        if (query + 1 >= first && query + 1 < last) sum[r] += high;
      }
    }
  }
#pragma unroll
  for (float& x : sum) {
    x += __shfl_xor_sync(~0U, x, 1);
    x += __shfl_xor_sync(~0U, x, 2);
  }
}

// Products of this warp's 16 queries from `first_query` on with `n8` pooled keys, of which `count` are there: element
// (lane / 4 + 8 r, 2 (lane % 4) + c) is d[2 r + c], and -inf where there is no key.
template <class T, int head_dim>
__device__ inline void multiply_own(float (&d)[4], const unsigned char* queries, int first_query, const T* keys,
                                    int count) {
  const int lane = threadIdx.x % 32;
  const int key = min(lane / 4, count - 1);
  const auto* of_key = reinterpret_cast<const std::uint32_t*>(keys + key * head_dim) + lane % 4;
  std::uint32_t b[head_dim / 16][2];
#pragma unroll
  for (int k16 = 0; k16 < head_dim / 16; ++k16)
#pragma unroll
    for (int i = 0; i < 2; ++i) b[k16][i] = __ldg(of_key + k16 * 8 + i * 4);
#pragma unroll
  for (float& x : d) x = 0;
#pragma unroll
  for (int k16 = 0; k16 < head_dim / 16; ++k16) {
    std::uint32_t a[4];
    sm90::load_matrices(a, queries + Tile<head_dim>::offset(first_query + lane % 16, k16 * 2 + lane / 16));
    multiply_add<T>(d, a[0], a[1], a[2], a[3], b[k16][0], b[k16][1]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (lane % 4 * 2 + i % 2 >= count) d[i] = -INFINITY;
}

}  // namespace pbsattn::cuda
