// What per_query.cu does with products in registers, and the products of a few keys by one warp.
#pragma once

#include "cuda/geometry.cuh"
#include "cuda/select/scores/exp.cuh"
#include "cuda/sm90/lanes.cuh"
#include "cuda/sm90/mma.cuh"
#include "cuda/sm90/soft_cap.cuh"
#include "cuda/sm90/swizzled_tile.cuh"

namespace pbsattn::cuda {

// Folds a product into the state of this thread's two queries; columns from `valid` on aren't there.
__device__ inline void fold(float (&s)[64], int valid, float scale_log2, Statistics (&statistics)[2]) {
  if (valid < tile_tokens) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if (i / 4 * 8 + column + i % 2 >= valid) s[i] = -INFINITY;
  }
  bool trusted[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float shift = statistics[r].max * scale_log2;
    const float sum = sum_relative(s, r, scale_log2, shift);
    trusted[r] = is_trusted(sum, shift);
    if (trusted[r]) statistics[r].sum += sum;
  }
  if (__all_sync(~0U, trusted[0] && trusted[1])) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (trusted[r]) continue;
    const float largest = largest_of(s, r);
    statistics[r].merge({largest, sum_exactly(s, r, scale_log2, Statistics::finite_or_zero(largest))}, scale_log2);
  }
}

// Waits until `threads` threads have come to barrier `id`; returns whether `condition` holds in all of them.
__device__ inline bool wait_all(int id, int threads, bool condition) {
  std::uint32_t all;
  asm volatile(
      "{\n"
      ".reg .pred mine, all;\n"
      "setp.ne.u32 mine, %3, 0;\n"
      "bar.red.and.pred all, %1, %2, mine;\n"
      "selp.u32 %0, 1, 0, all;\n"
      "}\n"
      : "=r"(all)
      : "r"(id), "r"(threads), "r"(static_cast<std::uint32_t>(condition))
      : "memory");
  return all != 0;
}

// What a shift may be so that, rounded, it changes a weight by less than 1e-3 of itself.
constexpr float max_shift = 8192;

// Sums over a row's queries of the weights of this thread's two blocks, over a fourth of the queries.
__device__ inline void sum_weights(const float (&s)[64], float scale_log2, const float* shifts, float (&sum)[2]) {
  float part[2][2] = {};
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
    const float2 shift = *reinterpret_cast<const float2*>(shifts + i * 2 + threadIdx.x % 4 * 2);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      part[r][0] += sm90::exp2_fast(fmaf(s[i + 2 * r], scale_log2, -shift.x));
      part[r][1] += sm90::exp2_fast(fmaf(s[i + 2 * r + 1], scale_log2, -shift.y));
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) sum[r] = part[r][0] + part[r][1];
}

// Sums them over the queries `of`, whatever their products.
__device__ inline void sum_weights(const float (&s)[64], float scale_log2, const LogSum* log_sums, Span of,
                                   float (&sum)[2]) {
  const int column = threadIdx.x % 4 * 2;
  sum[0] = sum[1] = 0;
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
    const int query = i * 2 + column;
    const float4 pair = *reinterpret_cast<const float4*>(log_sums + query);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float low = sm90::exp2_fast(fmaf(s[i + 2 * r] - pair.x, scale_log2, -pair.y));
      const float high = sm90::exp2_fast(fmaf(s[i + 2 * r + 1] - pair.z, scale_log2, -pair.w));
      // What isn't there may be NaN.
      if (query >= of.begin && query < of.end) sum[r] += low;
      if (query + 1 >= of.begin && query + 1 < of.end) sum[r] += high;
    }
  }
}

// Multiplies this warp's 16 queries from `first_query` on by eight pooled keys, of which `count` are there: element
// (lane / 4 + 8 r, 2 (lane % 4) + c) is d[2 r + c], and -inf where there is no key.
template <class T, int head_dim, class Cap>
__device__ inline void multiply_own(float (&d)[4], const unsigned char* queries, int first_query, const T* keys,
                                    int count, const Cap& cap) {
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
    sm90::load_matrices(a, queries + SwizzledTile<head_dim>::offset(first_query + lane % 16, k16 * 2 + lane / 16));
    mma<T>(d, a[0], a[1], a[2], a[3], b[k16][0], b[k16][1]);
  }
  apply(cap, d);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (lane % 4 * 2 + i % 2 >= count) d[i] = -INFINITY;
}

}  // namespace pbsattn::cuda
