// Log-sum-exp of each scoring query over all keys of complete segments, in parts.
//
// A CTA takes one *unit* of keys and two query heads that share them. Each of its two multiplying warpgroups takes one
// head's 128 queries, 64 at a time, so that the softmax of one half runs under the product of the other:
//     S[query][key] = Q K^T, both from shared memory; max and sum of exp2 per query, in registers.
// Of wide heads, of which shared memory holds no two beside keys, a CTA takes one, and each warpgroup 64 of its
// queries. A third warpgroup meanwhile pools Q, which is bound by memory as the others are by arithmetic.
#pragma once

#include "cuda/permute/common.cuh"

namespace pbsattn::cuda {

// Folds a product into the state of this thread's two queries.
__device__ inline void fold(const float (&s)[64], float scale_log2, Statistics (&statistics)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    Statistics part;
#pragma unroll
    for (int i = 0; i < 64; i += 4) part.max = fmaxf(part.max, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
    part.max = fmaxf(part.max, statistics[r].max);
    const float shift = Statistics::finite_or_zero(part.max);
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      sum[0] += sm90::exp2_fast((s[i + 2 * r] - shift) * scale_log2);
      sum[1] += sm90::exp2_fast((s[i + 2 * r + 1] - shift) * scale_log2);
    }
    part.sum = statistics[r].sum * sm90::exp2_fast((statistics[r].max - shift) * scale_log2) + (sum[0] + sum[1]);
    statistics[r] = part;
    // The sum is due here, not after the next product has begun to overwrite s: keeping s alive costs spills.
    asm volatile("" : "+f"(statistics[r].sum)::"memory");
  }
}

constexpr int statistics_threads = 384;
constexpr int multiplying_threads = 256;
constexpr int tiles_of_round = 2;
template <int head_dim>
constexpr int heads_at_once = head_dim > 128 ? 1 : 2;
template <int head_dim>
constexpr int key_stages = head_dim > 128 ? 2 : 3;

// Waits at the barrier of the two warpgroups that multiply; barrier 0 is __syncthreads(), which the third would have to
// join.
__device__ inline void multiplying_barrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(multiplying_threads) : "memory");
}

template <int head_dim>
constexpr int statistics_tile_bytes = (heads_at_once<head_dim> + key_stages<head_dim>)*SwizzledTile<head_dim>::bytes;
template <int head_dim>
constexpr int statistics_shared_bytes =
    statistics_tile_bytes<head_dim> + 4 * pool_stage_bytes<head_dim> + shared_alignment;

template <class T, int head_dim, class Cap>
__global__ void __launch_bounds__(statistics_threads, 1)
    score_statistics(const __grid_constant__ PermuteParams p, const __grid_constant__ Cap cap) {
  using Swizzled = SwizzledTile<head_dim>;
  unsigned char* queries = aligned_shared();
  const int warpgroup = threadIdx.x / 128;
  let_next_kernel_start();
  if (warpgroup == 2) {
    sm90::give_registers<40>();
    const int warp = threadIdx.x % 128 / 32;
    const int cta = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int ctas = gridDim.x * gridDim.y * gridDim.z;
    pool_rows_staged<T, head_dim, false>(p.pool_q, p.batch, cta * 4 + warp, ctas * 4,
                                         queries + statistics_tile_bytes<head_dim> + warp * pool_stage_bytes<head_dim>);
  } else {
    sm90::take_registers<232>();
    constexpr int heads = heads_at_once<head_dim>;
    constexpr int stages = key_stages<head_dim>;
    unsigned char* keys = queries + heads * Swizzled::bytes;
    const int batch = blockIdx.z / p.grid.kv_heads;
    const int kv_head = blockIdx.z % p.grid.kv_heads;
    const int first_key = static_cast<int>(blockIdx.x * p.unit_keys);
    const int tiles = static_cast<int>(min(p.unit_keys, p.permuted_len - first_key) / tile_tokens);
    const Rows<T> source(p.k, p.pages, batch, kv_head);
    const auto load_keys = [&](int tile) {
      load_tile<T, head_dim, multiplying_threads>(keys + tile % stages * Swizzled::bytes, source,
                                                  first_key + tile * tile_tokens, threadIdx.x);
      commit_copies();
    };
    // The last head of an odd group has no partner: both warpgroups compute it, since a branch around the products
    // would make the compiler wait after each of them.
    const auto q_head = [&](int i) {
      return kv_head * p.grid.group + min(static_cast<int>(blockIdx.y) * heads + i, p.grid.group - 1);
    };
    for (int i = 0; i < heads; ++i)
      load_tile<T, head_dim, multiplying_threads>(queries + i * Swizzled::bytes,
                                                  head_of<T>(p.scoring_queries, batch, q_head(i)),
                                                  p.scoring_queries.token_stride, p.queries, threadIdx.x);
    load_keys(0);

    Statistics low[2], high[2];  // queries 0 .. 63 and 64 .. 127
    float s_low[64], s_high[64];
    const int my_head = heads == 2 ? warpgroup : 0;
    const unsigned char* my_queries = queries + my_head * Swizzled::bytes;
    const auto start_half = [&](float(&scores)[64], int tile, int first_query) {
      start_product<T, head_dim>(scores, my_queries, first_query, keys + tile % stages * Swizzled::bytes);
    };
    // Waits for tile's keys. After the barrier every product of earlier tiles is done, or but the last where there are
    // three stages, so the stage of tile - 1 or tile - 2 is free; it becomes that of tile + 1.
    const auto take_tile = [&](int tile) {
      wait_copies<0>();
      sm90::fence_async_shared();
      multiplying_barrier();
      if (tile + 1 < tiles) load_keys(tile + 1);
    };
    // The compiler keeps products in flight through straight code only, hence rounds of several tiles.
    const auto round = [&]<int length>(std::integral_constant<int, length>, int first_tile) {
      take_tile(first_tile);
      start_half(s_low, first_tile, 0);
#pragma unroll
      for (int i = 0; i < length; ++i) {
        const bool last = i + 1 == length;
        start_half(s_high, first_tile + i, 64);
        sm90::wgmma_wait<1>();
        sm90::pin(s_low);
        fold(s_low, p.scale_log2, low);
        if (!last) {
          take_tile(first_tile + i + 1);
          start_half(s_low, first_tile + i + 1, 0);
          sm90::wgmma_wait<1>();
        } else {
          sm90::wgmma_wait<0>();
        }
        sm90::pin(s_high);
        fold(s_high, p.scale_log2, high);
      }
    };
    // Takes one half alone; a cap's arithmetic leaves no registers for a second product.
    const auto fold_half = [&](int tile, int first_query, Statistics(&statistics)[2]) {
      start_half(s_low, tile, first_query);
      sm90::wgmma_wait<0>();
      sm90::pin(s_low);
      apply(cap, s_low);
      fold(s_low, p.scale_log2, statistics);
    };
    int tile = 0;
    if constexpr (heads == 1) {
      for (; tile < tiles; ++tile) {
        take_tile(tile);
        fold_half(tile, warpgroup * 64, low);
      }
    } else if constexpr (Cap::caps) {
      for (; tile < tiles; ++tile) {
        take_tile(tile);
        fold_half(tile, 0, low);
        fold_half(tile, 64, high);
      }
    } else {
      for (; tile + tiles_of_round <= tiles; tile += tiles_of_round)
        round(std::integral_constant<int, tiles_of_round>{}, tile);
      for (; tile < tiles; ++tile) round(std::integral_constant<int, 1>{}, tile);
    }

    const int lane = threadIdx.x % 32;
    const std::int64_t head = static_cast<std::int64_t>(batch) * p.grid.q_heads + q_head(my_head);
    float2* out = p.statistics + (head * p.units + blockIdx.x) * 128;
    const bool writes = lane % 4 == 0 && blockIdx.y * heads + my_head < p.grid.group;
#pragma unroll
    for (int i = 0; i < 2 * heads; ++i) {
      Statistics total = i < 2 ? low[i] : high[i - 2];
      total.merge_across_lanes(p.scale_log2);
      const int query = (heads == 2 ? i / 2 : warpgroup) * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4 + i % 2 * 8;
      if (writes) out[query] = make_float2(total.max, total.sum);
    }
  }
}

// Merges the parts: a CTA of 128 threads for each query head.
__global__ void __launch_bounds__(128) merge_statistics(const __grid_constant__ PermuteParams p) {
  const std::int64_t head = blockIdx.x;
  const int query = threadIdx.x;
  const float2* parts = p.statistics + head * p.units * 128 + query;
  Statistics total;
  let_next_kernel_start();
  wait_for_earlier_kernels();
#pragma unroll 8
  for (int i = 0; i < p.units; ++i) {
    const float2 part = __ldg(parts + i * 128);
    total.merge({part.x, part.y}, p.scale_log2);
  }
  p.log_sums[head * 128 + query] = query < p.queries ? LogSum{total.max, log2f(total.sum)} : LogSum{0, INFINITY};
}

}  // namespace pbsattn::cuda
