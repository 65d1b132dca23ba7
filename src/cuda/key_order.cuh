// What both reorder kernels share: scores of keys from products, and the rank of each key in its segment.
//
// Scores are not divided by the number of queries or heads: that would not change their order.
#pragma once

#include "cuda/permute_common.cuh"

namespace pbsattn::cuda {

// Sums over queries of the weights of this thread's two keys, in the first of the four lanes that share them.
__device__ inline void sum_weights(const float (&s)[64], float scale_log2, const LogSum* log_sums, int lane,
                                   float (&sum)[2]) {
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
    const float4 pair = *reinterpret_cast<const float4*>(log_sums + i * 2 + lane % 4 * 2);
#pragma unroll
    for (int r = 0; r < 2; ++r)
      sum[r] += sm90::exp2_fast(fmaf(s[i + 2 * r] - pair.x, scale_log2, -pair.y)) +
                sm90::exp2_fast(fmaf(s[i + 2 * r + 1] - pair.z, scale_log2, -pair.w));
  }
#pragma unroll
  for (float& x : sum) {
    x += __shfl_xor_sync(~0U, x, 1);
    x += __shfl_xor_sync(~0U, x, 2);
  }
}

// What sorts descending as an integer: scores are not negative; NaN comes last.
__device__ inline int sortable(float score) {
  return isnan(score) ? -1 : __float_as_int(score);
}

// How many of four integers are at least `bound`.
__device__ inline int count_at_least(const int* values, int bound) {
  const int4 four = *reinterpret_cast<const int4*>(values);
  return (four.x >= bound) + (four.y >= bound) + (four.z >= bound) + (four.w >= bound);
}

// from[rank] = key, by counting the keys that come before each: those of larger score, and of equal score those before
// it. `threads` threads take part.
template <int threads>
__device__ void rank_keys(const int* score, int segment, int thread, int* from) {
  for (int key = thread; key < segment; key += threads) {
    const int mine = score[key];
    const int lane = thread % 32;
    const int warp_begin = key - lane;
    int rank = 0;
#pragma unroll 4
    for (int other = 0; other < warp_begin; other += 4) rank += count_at_least(score + other, mine);
#pragma unroll 8
    for (int other = 0; other < 32; ++other)
      rank += score[warp_begin + other] >= mine + static_cast<int>(other >= lane);
#pragma unroll 4
    for (int other = warp_begin + 32; other < segment; other += 4) rank += count_at_least(score + other, mine + 1);
    from[rank] = key;
  }
}

}  // namespace pbsattn::cuda
