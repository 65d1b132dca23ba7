// What both reorder kernels share: scores of keys from products, the rank of each key in its segment, and the means of
// blocks.
//
// Scores are not divided by the number of queries or heads: that would not change their order.
#pragma once

#include "cuda/permute/common.cuh"

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

// Returns what sorts descending as an integer: scores are not negative; NaN comes last.
__device__ inline int sortable(float score) {
  return isnan(score) ? -1 : __float_as_int(score);
}

// Counts which of four integers are at least `bound`.
__device__ inline int count_at_least(const int* values, int bound) {
  const int4 four = *reinterpret_cast<const int4*>(values);
  return (four.x >= bound) + (four.y >= bound) + (four.z >= bound) + (four.w >= bound);
}

// Writes from[rank] = key, by counting the keys that come before each: those of larger score, and of equal score those
// before it. `threads` threads take part.
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

// A thread's share of a block's rows, of which each has as many 16-byte chunks as `width` says: one chunk of each of
// `rows`, from `first` on `rows_at_once` apart.
template <int width, int threads>
struct RowShare {
  static constexpr int chunks = SwizzledTile<width>::chunks;
  static constexpr int rows_at_once = threads / SwizzledTile<width>::threads;
  static constexpr int rows = block_tokens / rows_at_once;

  __device__ explicit RowShare(int thread)
      : chunk(thread % SwizzledTile<width>::threads), first(thread / SwizzledTile<width>::threads) {}
  __device__ bool any() const { return chunk < chunks; }  // false: the thread has none
  int chunk, first;
};

// Writes the mean of a block's keys, from each thread's sum over some of its rows of 8 columns: those of 16-byte chunk
// `thread` modulo SwizzledTile's threads of a row. All threads call it and meet once, at `meet`; calls take turns with
// two `sums`.
template <class T, int warps, int head_dim, class Meet>
__device__ void write_block_mean(float (&sum)[8], float (&sums)[warps][head_dim], int thread, Meet&& meet,
                                 std::uint32_t* mean) {
  using Swizzled = SwizzledTile<head_dim>;
  add_across_lanes<Swizzled::threads>(sum);
  if (thread % 32 < Swizzled::chunks) {
    float4* mine = reinterpret_cast<float4*>(sums[thread / 32] + thread % Swizzled::threads * 8);
    mine[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    mine[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  }
  meet();
  if (thread < head_dim / 2) {
    float2 total = {};
    for (const auto& of_warp : sums) {
      const float2 part = *reinterpret_cast<const float2*>(of_warp + thread * 2);
      total.x += part.x;
      total.y += part.y;
    }
    mean[thread] = pack<T>(total.x / block_tokens, total.y / block_tokens);
  }
}

}  // namespace pbsattn::cuda
