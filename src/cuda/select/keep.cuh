// What a row keeps of its scored blocks, a warp for each row: the keep rules of select.cu.
//
// top-p without a sort: the least kept weight is searched in the bits of a float, which order like integers, until one
// block is left in the interval or all in it are equal. Each step adds up the weights above the interval's quarters, in
// a fixed order, so the same input gives the same list. A step reads 4 bytes a block from shared memory; about 6 do.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/select/head_options.h"
#include "cuda/sm90/lanes.cuh"

namespace pbsattn::cuda {

// What a row keeps, by the bits of its weights: all of at least `above`, and the first `ties` of at least `least`.
struct Threshold {
  unsigned above, least;
  int ties;
};
__device__ constexpr Threshold keep_all() {
  return {0, 0, 0};
}
__device__ constexpr Threshold keep_none() {
  return {~0U, ~0U, 0};
}

// Of a row's weights: the sum of those that may be left out, and the largest and the sum of all, with those of the own
// segment where the score gives it some. Scores are shares of the total.
struct Weights {
  float sum, largest, total;
  int competing;  // blocks from which top-p takes the highest: those that may be left out, or all causal ones
  bool valid;     // false: the softmax has no value
};

// Turns the scores of `end` blocks, of which the first `count` may be left out, into weights exp2(score - max). The
// largest weight is 1, unless a score is NaN or +inf or all are -inf: then the sum is under 1 or NaN.
__device__ inline Weights exponentiate(float* scores, int count, int end, int lane) {
  float max = -INFINITY;
  for (int i = lane; i < end; i += 32) max = fmaxf(max, scores[i]);
  max = warp_max(max);
  float sum = 0;
  float own = 0;
  for (int i = lane; i < end; i += 32) {
    const float weight = scores[i] = exp2f(scores[i] - max);
    if (i < count)
      sum += weight;
    else
      own += weight;
  }
  sum = warp_sum(sum);
  const float total = end > count ? sum + warp_sum(own) : sum;
  return {sum, 1.0F, total, end, total >= 1.0F};
}

// Does the same of scores in memory that `weights` takes.
__device__ inline Weights exponentiate(const float* from, float* weights, int count, int end, int lane) {
  for (int i = lane; i < end; i += 32) weights[i] = from[i];
  return exponentiate(weights, count, end, lane);
}

// Copies one row's scores, which are shares already, of `count` blocks, and adds up those up to `end`.
__device__ inline Weights take(const float* from, float* weights, int count, int end, int lane) {
  float largest = 0;
  float sum = 0;
  for (int i = lane; i < count; i += 32) {
    const float weight = weights[i] = from[i];
    largest = fmaxf(largest, weight);
    sum += weight;
  }
  float own = 0;
  for (int i = count + lane; i < end; i += 32) {
    largest = fmaxf(largest, from[i]);
    own += from[i];
  }
  sum = warp_sum(sum);
  const float total = sum + warp_sum(own);
  return {sum, warp_max(largest), total, count, total > 0};
}

// Takes of two scores of a row the higher share of each of `count` blocks, in the place of the first.
__device__ inline Weights take_higher(float* first, Weights of_first, const float* second, Weights of_second, int count,
                                      int lane) {
  const auto share = [](float weight, Weights of) { return of.valid ? weight / of.total : 0.0F; };
  float largest = 0;
  for (int i = lane; i < count; i += 32)
    largest = fmaxf(largest, first[i] = fmaxf(share(first[i], of_first), share(second[i], of_second)));
  return {1.0F, warp_max(largest), 1.0F, count, of_first.valid || of_second.valid};
}

// Finds the highest of a row's weights, up to and including the one that brings their sum (by_count: their number) to
// `target`. `least` is under each weight that is kept.
template <bool by_count>
__device__ Threshold find_highest(const float* weights, float target, float least, float largest, int count, int lane) {
  // [low, high) holds the least kept weight: the weights from low up reach the target, those from high up don't.
  unsigned low = __float_as_uint(least);
  unsigned high = __float_as_uint(largest) + 1;
  int count_low = count;
  int count_high = 0;
  float sum_high = 0;
  while (high - low > 1 && count_low - count_high > 1) {
    const unsigned quarter[3] = {low + (high - low) / 4, low + (high - low) / 2, high - (high - low) / 4};
    float sum[3] = {};
    int above[3] = {};
    for (int i = lane; i < count; i += 32) {
      const float weight = weights[i];
#pragma unroll
      for (int q = 0; q < 3; ++q) {
        const bool counts = __float_as_uint(weight) >= quarter[q];
        if constexpr (!by_count) sum[q] += counts ? weight : 0.0F;
        above[q] += counts;
      }
    }
#pragma unroll
    for (int q = 0; q < 3; ++q) {
      above[q] = __reduce_add_sync(~0U, above[q]);
      sum[q] = by_count ? static_cast<float>(above[q]) : warp_sum(sum[q]);
    }
#pragma unroll
    for (int q = 2; q >= 0; --q) {
      if (sum[q] >= target) {
        low = quarter[q];
        count_low = above[q];
        break;
      }
      high = quarter[q];
      count_high = above[q];
      sum_high = sum[q];
    }
  }
  const int in_interval = count_low - count_high;
  if (in_interval <= 1) return {high, low, 1};
  // All are equal: as many as it takes, and at least the one that the interval promises.
  const float needed = ceilf((target - sum_high) / (by_count ? 1.0F : __uint_as_float(low)));
  return {high, low, static_cast<int>(fminf(fmaxf(needed, 1.0F), static_cast<float>(in_interval)))};
}

// Finds what top-p keeps of a row's weights to bring their sum to `target`.
__device__ inline Threshold find_top_p(float target, const float* weights, Weights all, int count, int lane) {
  // Of at most `left_out`, one of `count` weights left out is above the mean.
  const float left_out = all.sum - target;
  constexpr float trusted = 1e-3F;  // of the total: below, rounding of the sums may matter
  if (left_out < 0) return keep_all();
  return find_highest<false>(weights, target,
                             left_out > trusted * all.total ? 0.5F * left_out / static_cast<float>(count) : 0.0F,
                             all.largest, count, lane);
}

// Returns how many a rule that counts keeps of blocks 0 .. own_begin-1: core/keep_rule.h's kept_count().
__device__ inline int kept_count(const HeadOptions& options, int own_begin, int diagonal) {
  if (options.keep == KeepRule::top_k) return min(options.top_k, own_begin);
  const int wanted = static_cast<int>(ceilf(options.density * static_cast<float>(diagonal + 1)));
  return min(max(wanted - (diagonal + 1 - own_begin), 0), own_begin);
}

// Finds what the keep rule takes of a row's weights, and may change those that are kept in any case.
__device__ inline Threshold find_threshold(const HeadOptions& options, float* weights, Weights all, int own_begin,
                                           int diagonal, int sink, int lane) {
  const auto at_least = [](float weight) { return Threshold{__float_as_uint(weight), ~0U, 0}; };
  if (options.keep == KeepRule::none) return keep_none();
  if (options.keep == KeepRule::vertical_slash || options.keep == KeepRule::coverage)
    return at_least(1);  // of what it marked
  if (!all.valid) return options.keep_all_if_short ? keep_all() : keep_none();
  switch (options.keep) {
    case KeepRule::all: return keep_all();
    case KeepRule::top_p: {
      float target = options.top_p * all.total;
      if (options.kept_first) {
        const float counted = all.total - all.sum + weights[sink];
        if (counted >= target) return keep_none();
        target -= counted;
        all.sum -= weights[sink];
        __syncwarp();
        if (lane == 0) weights[sink] = 0;
        __syncwarp();
        return find_top_p(target, weights, all, own_begin, lane);
      }
      all.sum = all.total;
      return find_top_p(target, weights, all, all.competing, lane);
    }
    case KeepRule::threshold: {
      const Threshold absolute = at_least(options.row_threshold(diagonal) * all.total);
      if (options.floor_top_p == 0) return absolute;
      Threshold both = find_top_p(options.floor_top_p * all.total, weights, all, own_begin, lane);
      both.above = min(both.above, absolute.above);
      return both;
    }
    case KeepRule::relative: return at_least(options.threshold * all.largest);
    case KeepRule::top_k:
    case KeepRule::density: {
      const int kept = kept_count(options, own_begin, diagonal);
      if (kept == 0) return keep_none();
      return find_highest<true>(weights, static_cast<float>(kept), 0.0F, all.largest, own_begin, lane);
    }
    default: break;  // above
  }
  return keep_all();
}

// Takes blocks by a row's weights, 32 at a time, ascending.
struct Taker {
  const float* weights;
  Threshold threshold;
  int ties = 0;  // seen so far

  // Tells whether the block of this lane is taken; `scored`: it has a weight.
  __device__ bool takes(int block, bool scored, unsigned lanes_below) {
    const bool reads_weights = threshold.above != keep_all().above && threshold.above != keep_none().above;
    const unsigned weight = scored && reads_weights ? __float_as_uint(weights[block]) : 0;
    const bool tie = scored && weight >= threshold.least && weight < threshold.above;
    const unsigned tie_lanes = __ballot_sync(~0U, tie);
    const bool among_ties = tie && ties + __popc(tie_lanes & lanes_below) < threshold.ties;
    ties += __popc(tie_lanes);
    return scored && (weight >= threshold.above || among_ties);
  }
};

// Writes the row's list, ascending, and returns its length: what either taker takes (two: there is a second one), and
// what is always kept.
__device__ inline int write_list(const HeadOptions& options, Taker first, Taker second, bool two, int own_begin,
                                 int diagonal, int sink, std::int32_t* list, int lane) {
  const unsigned lanes_below = (1U << lane) - 1;
  int length = 0;
  for (int begin = 0; begin <= diagonal; begin += 32) {
    const int block = begin + lane;
    const bool scored = block < own_begin;
    bool kept = first.takes(block, scored, lanes_below);
    if (two) kept |= second.takes(block, scored, lanes_below);
    kept |=
        block == sink || block < options.sink_blocks || block >= own_begin || block > diagonal - options.local_blocks;
    kept &= block <= diagonal;
    const unsigned kept_lanes = __ballot_sync(~0U, kept);
    if (kept) list[length + __popc(kept_lanes & lanes_below)] = block;
    length += __popc(kept_lanes);
  }
  return length;
}

}  // namespace pbsattn::cuda
