// Scores and orders the keys of segments of up to 256 tokens and 128 columns, and writes K and V in that order.
//
// A CTA takes one segment of one KV head: its K and V stay in shared memory while the CTA goes through the query heads.
// Two warpgroups score, a tile of keys each,
//     S^T[key][query] = K Q^T, score[key] = sum over queries of exp2(S^T - log-sum-exp),
// and rank the keys by counting those before each. Two others write: rows of K to their new places, 16 bytes a thread,
// with K's block means, and rows of V by the copy engine. Writing, bound by memory, so runs under the next head's
// arithmetic. K is loaded before V, which comes under the first head's scores.
#pragma once

#include "cuda/permute/key_order.cuh"
#include "cuda/sm90/ring.cuh"

namespace pbsattn::cuda {

constexpr int resident_tiles = 2;  // the longest segment that this kernel takes
constexpr int resident_scorers = 256;
constexpr int resident_writers = 256;

// `full` and `free` guard the two places of an order in shared memory: scorers fill one while writers read the other.
// Named barriers would do for the kernel, but not for its tests: synccheck wants all threads to meet at one place in
// the code, and racecheck doesn't know what such a barrier orders.
struct Handover {
  static constexpr int places = 2;
  sm90::Barrier full[places], free[places];
  sm90::Barrier keys;  // K is there

  __device__ void init() {
    for (sm90::Barrier& barrier : full) barrier.init(resident_scorers);
    for (sm90::Barrier& barrier : free) barrier.init(resident_writers);
    keys.init(resident_scorers);
  }
};

// The dynamic shared memory of reorder_resident(), aligned.
template <int head_dim, int head_dim_v>
struct ResidentShared {
  static constexpr int tile = SwizzledTile<head_dim>::bytes;
  static constexpr int segment = resident_tiles * tile_tokens;
  static constexpr int writer_warps = resident_writers / 32;
  static constexpr int keys = 0;
  static constexpr int values = keys + resident_tiles * tile;                    // rows one after the other
  static constexpr int queries = values + segment * head_dim_v * 2;              // of two heads
  static constexpr int log_sums = queries + 2 * tile;                            // LogSum[2][128]
  static constexpr int score = log_sums + 2 * 128 * 8;                           // int[segment]
  static constexpr int from = score + segment * 4;                               // int[2][segment]
  static constexpr int block_sums = from + 2 * segment * 4;                      // float[2][writer_warps][head_dim]
  static constexpr int handover = block_sums + 2 * writer_warps * head_dim * 4;  // Handover
  static constexpr int bytes = shared_alignment + handover + sizeof(Handover);
};

namespace resident {

// Named barriers, of one role each.
enum Meeting : int { scorers = 1, writers = 2 };
constexpr int everyone = resident_scorers + resident_writers;

template <class T, int head_dim, int head_dim_v, class Cap>
__device__ void score(const PermuteParams& p, const Cap& cap, unsigned char* base, int batch, int kv_head,
                      int first_token) {
  using Swizzled = SwizzledTile<head_dim>;
  using Shared = ResidentShared<head_dim, head_dim_v>;
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  unsigned char* keys = base + Shared::keys;
  int* score = reinterpret_cast<int*>(base + Shared::score);  // bits of floats until the last head adds its own
  const int tiles = p.segment / tile_tokens;
  const Rows<T> source(p.k, p.pages, batch, kv_head);

  const auto load_queries = [&](int head) {
    load_tile<T, head_dim, resident_scorers>(base + Shared::queries + head % 2 * Swizzled::bytes,
                                             head_of<T>(p.scoring_queries, batch, kv_head * p.grid.group + head),
                                             p.scoring_queries.token_stride, p.queries, thread);
  };
  const auto load_log_sums = [&](int head) {
    const int q_head = p.grid.q_head(batch, kv_head, head);
    LogSum* to = reinterpret_cast<LogSum*>(base + Shared::log_sums) + head % 2 * 128;
    if (thread < 64) copy_async(sm90::shared_address(to + 2 * thread), p.log_sums + q_head * 128 + 2 * thread, true);
  };

  for (int i = 0; i < tiles; ++i)
    load_tile<T, head_dim, resident_scorers>(keys + i * Swizzled::bytes, source, first_token + i * tile_tokens, thread);
  load_queries(0);
  commit_copies();
  wait_copies<0>();
  auto& handover = *reinterpret_cast<Handover*>(base + Shared::handover);
  handover.keys.arrive();
  wait_for_earlier_kernels();
  load_log_sums(0);
  commit_copies();
  Ring<Handover::places> place;
  for (int head = 0; head < p.grid.group; ++head) {
    if (head + 1 < p.grid.group) {
      load_queries(head + 1);
      load_log_sums(head + 1);
    }
    commit_copies();
    wait_copies<1>();
    sm90::fence_async_shared();
    sm90::named_wait(scorers, resident_scorers);
    const bool ranks = !p.shared_order || head + 1 == p.grid.group;
    const int tile = thread / 128;
    if (tile < tiles) {
      const unsigned char* my_keys = keys + tile * Swizzled::bytes;
      const unsigned char* queries = base + Shared::queries + head % 2 * Swizzled::bytes;
      const LogSum* log_sums = reinterpret_cast<const LogSum*>(base + Shared::log_sums) + head % 2 * 128;
      const auto add_half = [&](const float(&s)[64], int half) {
        float sum[2] = {};
        sum_weights(s, p.scale_log2, log_sums, lane, sum);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int key = tile * tile_tokens + half * 64 + thread % 128 / 32 * 16 + lane / 4 + r * 8;
          if (lane % 4 == 0) {
            const float total = sum[r] + (p.shared_order && head > 0 ? __int_as_float(score[key]) : 0.0F);
            score[key] = ranks ? sortable(total) : __float_as_int(total);
          }
        }
      };
      float low[64], high[64];
      start_product<T, head_dim>(low, my_keys, 0, queries);
      start_product<T, head_dim>(high, my_keys, 64, queries);
      sm90::wgmma_wait<1>();
      sm90::pin(low);
      apply(cap, low);
      add_half(low, 0);
      sm90::wgmma_wait<0>();
      sm90::pin(high);
      apply(cap, high);
      add_half(high, 1);
    }
    sm90::named_wait(scorers, resident_scorers);
    if (!ranks) continue;
    handover.free[place.at].wait(place.parity ^ 1);
    rank_keys<resident_scorers>(score, p.segment, thread,
                                reinterpret_cast<int*>(base + Shared::from) + place.at * Shared::segment);
    handover.full[place.at].arrive();
    place.next();
  }
}

template <class T, int head_dim, int head_dim_v>
__device__ void write(const PermuteParams& p, unsigned char* base, int batch, int kv_head, int first_token) {
  using Swizzled = SwizzledTile<head_dim>;
  using Shared = ResidentShared<head_dim, head_dim_v>;
  const int thread = threadIdx.x - resident_scorers;
  const unsigned char* keys = base + Shared::keys;
  unsigned char* values = base + Shared::values;
  auto& block_sums = *reinterpret_cast<float(*)[2][Shared::writer_warps][head_dim]>(base + Shared::block_sums);
  const int tiles = p.segment / tile_tokens;
  auto& handover = *reinterpret_cast<Handover*>(base + Shared::handover);
  constexpr int row_bytes = head_dim_v * static_cast<int>(sizeof(T));
  const RowShare<head_dim, resident_writers> of_k(thread);
  const RowShare<head_dim_v, resident_writers> of_v(thread);

  handover.keys.wait(0);
  const Rows<T> source(p.v, p.pages, batch, kv_head);
  const T* row = source.paged() ? nullptr : source.at(first_token + of_v.first) + of_v.chunk * 8;
  const int chunk_v = of_v.chunks == SwizzledTile<head_dim_v>::threads ? thread : of_v.first * of_v.chunks + of_v.chunk;
#pragma unroll 1
  for (int i = 0; i < p.segment / of_v.rows_at_once; ++i) {
    if (source.paged() && of_v.any())
      row = source.at(first_token + of_v.first + i * of_v.rows_at_once) + of_v.chunk * 8;
    if (of_v.any())
      copy_async(sm90::shared_address(values) + (i * of_v.rows_at_once * of_v.chunks + chunk_v) * 16, row, true);
    row += of_v.rows_at_once * p.v.token_stride;
  }
  commit_copies();
  wait_copies<0>();
  sm90::fence_async_shared();
  sm90::named_wait(writers, resident_writers);

  const std::uint64_t policy = evict_first();
  int parity = 0;
  Ring<Handover::places> place;
  for (int i = 0; i < p.grid.orders; ++i, place.next()) {
    const int* from = reinterpret_cast<const int*>(base + Shared::from) + place.at * Shared::segment;
    const int out_head = p.grid.order_head(batch, kv_head, i);
    const std::int64_t out_token = out_head * p.permuted.slots + first_token;
    handover.full[place.at].wait(place.parity);
    if (thread < p.segment) {
      p.permuted.order[out_token + thread] = first_token + from[thread];
      if (first_token == 0 && from[thread] == 0) p.permuted.sink_block[out_head] = thread / block_tokens;
    }
    for (int block = 0; block < tiles; ++block) {
      if (thread < block_tokens) {
        const int slot = block * block_tokens + thread;
        sm90::bulk_store(static_cast<unsigned char*>(p.permuted.v) + (out_token + slot) * row_bytes,
                         values + from[slot] * row_bytes, row_bytes, policy);
      }
      const int first_slot = block * block_tokens + of_k.first;
      float sum[8] = {};
#pragma unroll
      for (int j = 0; j < of_k.rows; ++j) {
        if (!of_k.any()) continue;
        const int slot = first_slot + j * of_k.rows_at_once;
        const int key = from[slot];
        const int at = key / tile_tokens * Swizzled::bytes + Swizzled::offset(key % tile_tokens, of_k.chunk);
        const uint4 k_chunk = *reinterpret_cast<const uint4*>(keys + at);
        const std::int64_t out = (out_token + slot) * of_k.chunks + of_k.chunk;
        __stcs(static_cast<uint4*>(p.permuted.k) + out, k_chunk);
        add_to<T>(sum, k_chunk);
      }
      write_block_mean<T>(
          sum, block_sums[parity], thread, [] { sm90::named_wait(writers, resident_writers); },
          static_cast<std::uint32_t*>(p.pooled_k) + (out_token / block_tokens + block) * (head_dim / 2));
      parity ^= 1;
    }
    handover.free[place.at].arrive();
  }
  sm90::tma_store_wait_read();
}

}  // namespace resident

template <class T, int head_dim, int head_dim_v, class Cap>
__global__ void __launch_bounds__(resident::everyone, 1)
    reorder_resident(const __grid_constant__ PermuteParams p, const __grid_constant__ Cap cap) {
  unsigned char* base = aligned_shared();
  // Backwards: the keys that score_statistics read last may still be in L2.
  const int first_token = static_cast<int>(p.known) + static_cast<int>(gridDim.x - 1 - blockIdx.x) * p.segment;
  const int kv_head = gridDim.y - 1 - blockIdx.y;
  if (threadIdx.x == 0) reinterpret_cast<Handover*>(base + ResidentShared<head_dim, head_dim_v>::handover)->init();
  __syncthreads();
  let_next_kernel_start();
  if (threadIdx.x < resident_scorers) {
    sm90::take_registers<168>();
    resident::score<T, head_dim, head_dim_v>(p, cap, base, blockIdx.z, kv_head, first_token);
  } else {
    sm90::give_registers<80>();
    resident::write<T, head_dim, head_dim_v>(p, base, blockIdx.z, kv_head, first_token);
  }
}

}  // namespace pbsattn::cuda
