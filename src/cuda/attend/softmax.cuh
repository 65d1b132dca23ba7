// The online softmax of a product's rows, in the registers of the warpgroup that multiplied (sm90/wgmma.cuh).
#pragma once

#include <limits>

#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace pbsattn::cuda::attention {

constexpr float infinity = std::numeric_limits<float>::infinity();

// The running softmax of the two query rows that a thread holds parts of: row r = 0, 1 is query 8 r + lane / 4 of its
// warp's 16. Maxima and sums run in several chains, since each step of one waits for the step before.
struct Softmax {
  // Of a score and the maximum, scaled one by one, the difference is off by up to 2^-24 of this, which is little;
  // beyond it their difference is scaled instead.
  static constexpr float largest_offset = 1024;
  static constexpr int chains = 4;

  float maximum[2] = {-infinity, -infinity};  // unscaled
  float sum[2] = {0, 0};                      // this thread's part, of weights not rounded; attend has its own
  float offset[2];                            // a weight is 2 to the scaled score less this

  // Takes the largest scores of the first eight columns for maxima.
  template <int scores>
  __device__ void start(const float (&s)[scores]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
      for (int step = 1; step < 4; step *= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, step));
      maximum[r] = top;
    }
  }

  // Raises the maxima to those of scores s. What was summed before must then be multiplied by factor[r]; returns
  // whether any factor of the warp is not 1. Where maxima are too large, scores become differences to them.
  template <int scores>
  __device__ bool raise(float (&s)[scores], float scale_log2, float (&factor)[2]) {
    float top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float part[chains] = {maximum[r], -infinity, -infinity, -infinity};
#pragma unroll
      for (int i = 0; i < scores / 2; ++i)
        part[i / 2 % chains] = fmaxf(part[i / 2 % chains], s[i / 2 * 4 + 2 * r + i % 2]);
      top[r] = fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
    }
    // Both votes are taken here, beside the exchange of maxima, and not where they are needed: there each would wait.
    // A thread's part of a row may be far below the row's maximum and seem huge though the row is not, which does no
    // harm.
    const float largest = largest_offset / scale_log2;
    const bool huge = __any_sync(0xFFFFFFFF, fabsf(top[0]) > largest || fabsf(top[1]) > largest);
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
#pragma unroll
      for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], __shfl_xor_sync(0xFFFFFFFF, top[r], step));
    }
    const bool moved = __any_sync(0xFFFFFFFF, top[0] != maximum[0] || top[1] != maximum[1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Of two -inf nothing was summed, and their difference is no number.
      factor[r] = top[r] == -infinity ? 1.0F : sm90::exp2_fast((maximum[r] - top[r]) * scale_log2);
      maximum[r] = top[r];
      offset[r] = top[r] == -infinity ? 0.0F : top[r] * scale_log2;
    }
    if (huge) {
#pragma unroll
      for (int i = 0; i < scores; ++i) s[i] -= maximum[i % 4 / 2] == -infinity ? 0.0F : maximum[i % 4 / 2];
      offset[0] = offset[1] = 0;
    }
    return moved;
  }

  // Sets the offsets for scores to come (raise() may have left them 0, with this block's scores as differences).
  // Returns whether those may be scaled and set off one by one in all rows of the warp; where not, as where a row has
  // no maximum yet, weights by these offsets are worth nothing.
  __device__ bool settle(float scale_log2) {
    const float largest = largest_offset / scale_log2;
    for (int r = 0; r < 2; ++r) offset[r] = maximum[r] * scale_log2;
    return __all_sync(0xFFFFFFFF, fabsf(maximum[0]) <= largest && fabsf(maximum[1]) <= largest);
  }

  // Turns scores s, that the maxima were raised to, into weights in place, and sums them.
  __device__ void weigh(float (&s)[64], float scale_log2, const float (&factor)[2]) {
    float part[2][chains] = {};
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      s[i] = sm90::exp2_fast(fmaf(s[i], scale_log2, -offset[i % 4 / 2]));
      part[i % 4 / 2][(i / 4 * 2 + i % 2) % chains] += s[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = fmaf(sum[r], factor[r], (part[r][0] + part[r][1]) + (part[r][2] + part[r][3]));
    }
  }
};

}  // namespace pbsattn::cuda::attention
