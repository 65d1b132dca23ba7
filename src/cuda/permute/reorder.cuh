// Scores and orders the keys of segments of more than 256 tokens, or of wide heads, and writes K and V in that order;
// reorder_resident.cuh has the others.
//
// A CTA takes one segment of one KV head and goes through its query heads:
//     S^T[key][query] = K Q^T piece by piece, score[key] = sum over queries of exp2(S^T - log-sum-exp);
//     rank of each key by counting the keys before it;
//     rows of K and V to their new places, 16 bytes a thread, with K's block means.
// K and V are read again through L2. Two CTAs share a multiprocessor, so that one computes while the other writes;
// one has it alone at 256 columns.
#pragma once

#include "cuda/permute/key_order.cuh"

namespace pbsattn::cuda {

constexpr int reorder_threads = 256;
constexpr int reorder_warps = reorder_threads / 32;

// The dynamic shared memory of reorder(), aligned.
template <int head_dim>
struct ReorderShared {
  static constexpr int piece_tiles = head_dim > 128 ? 1 : 2;  // key tiles at a time
  static constexpr int keys = 0;
  static constexpr int queries = keys + piece_tiles * SwizzledTile<head_dim>::bytes;
  static constexpr int log_sums = queries + SwizzledTile<head_dim>::bytes;     // LogSum[128]
  static constexpr int block_sums = log_sums + 128 * 8;                        // float[2][reorder_warps][head_dim]
  static constexpr int score = block_sums + 2 * reorder_warps * head_dim * 4;  // int[segment]
  static constexpr std::size_t bytes(std::int64_t segment) {
    return shared_alignment + score + segment * 8;
  }  // with int from[segment]
};

template <class T, int head_dim, int head_dim_v, class Cap>
__global__ void __launch_bounds__(reorder_threads, 2)
    reorder(const __grid_constant__ PermuteParams p, const __grid_constant__ Cap cap) {
  using Swizzled = SwizzledTile<head_dim>;
  using Shared = ReorderShared<head_dim>;
  constexpr int piece_tiles = Shared::piece_tiles;
  unsigned char* base = aligned_shared();
  unsigned char* keys = base + Shared::keys;
  unsigned char* queries = base + Shared::queries;
  LogSum* log_sums = reinterpret_cast<LogSum*>(base + Shared::log_sums);
  auto& block_sums = *reinterpret_cast<float(*)[2][reorder_warps][head_dim]>(base + Shared::block_sums);
  int* score = reinterpret_cast<int*>(base + Shared::score);  // bits of floats until the last head adds its own
  int* from = score + p.segment;                              // slot -> key, both within the segment

  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int batch = blockIdx.z;
  const int kv_head = blockIdx.y;
  const int first_token = static_cast<int>(p.known) + static_cast<int>(blockIdx.x) * p.segment;
  const Rows<T> source_k(p.k, p.pages, batch, kv_head);
  const Rows<T> source_v(p.v, p.pages, batch, kv_head);
  const int tiles = p.segment / tile_tokens;

  const auto load_queries = [&](int head) {
    load_tile<T, head_dim, reorder_threads>(queries,
                                            head_of<T>(p.scoring_queries, batch, kv_head * p.grid.group + head),
                                            p.scoring_queries.token_stride, p.queries, thread);
    if (thread < 64)
      copy_async(sm90::shared_address(log_sums + 2 * thread),
                 p.log_sums + p.grid.q_head(batch, kv_head, head) * 128 + 2 * thread, true);
  };
  const auto load_keys = [&](int piece) {
    for (int i = 0; i < min(piece_tiles, tiles - piece * piece_tiles); ++i)
      load_tile<T, head_dim, reorder_threads>(keys + i * Swizzled::bytes, source_k,
                                              first_token + (piece * piece_tiles + i) * tile_tokens, thread);
  };

  let_next_kernel_start();
  wait_for_earlier_kernels();
  load_queries(0);
  int parity = 0;
  for (int head = 0; head < p.grid.group; ++head) {
    const bool ranks = !p.shared_order || head + 1 == p.grid.group;
    for (int piece = 0; piece * piece_tiles < tiles; ++piece) {
      load_keys(piece);
      commit_copies();
      wait_copies<0>();
      sm90::fence_async_shared();
      __syncthreads();
      // A warpgroup takes a tile, or half of the only one.
      const int warpgroup = thread / 128;
      const int tile_of_piece = piece_tiles == 2 ? warpgroup : 0;
      if (piece * piece_tiles + tile_of_piece < tiles) {
#pragma unroll 1
        for (int i = 0; i < piece_tiles; ++i) {
          const int half = piece_tiles == 2 ? i : warpgroup;
          float s[64];
          start_product<T, head_dim>(s, keys + tile_of_piece * Swizzled::bytes, half * 64, queries);
          sm90::wgmma_wait<0>();
          sm90::pin(s);
          apply(cap, s);
          float sum[2] = {};
          sum_weights(s, p.scale_log2, log_sums, lane, sum);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int key = (piece * piece_tiles + tile_of_piece) * tile_tokens + half * 64 + thread % 128 / 32 * 16 +
                            lane / 4 + r * 8;
            if (lane % 4 == 0) {
              const float total = sum[r] + (p.shared_order && head > 0 ? __int_as_float(score[key]) : 0.0F);
              score[key] = ranks ? sortable(total) : __float_as_int(total);
            }
          }
        }
      }
      __syncthreads();
    }
    if (head + 1 < p.grid.group) load_queries(head + 1);
    if (!ranks) continue;

    rank_keys<reorder_threads>(score, p.segment, thread, from);
    __syncthreads();

    const int out_head = p.grid.order_head(batch, kv_head, p.shared_order ? 0 : head);
    const std::int64_t out_token = out_head * p.permuted.slots + first_token;
    for (int slot = thread; slot < p.segment; slot += reorder_threads) {
      p.permuted.order[out_token + slot] = first_token + from[slot];
      if (first_token == 0 && from[slot] == 0) p.permuted.sink_block[out_head] = slot / block_tokens;
    }
    const RowShare<head_dim, reorder_threads> of_k(thread);
    const RowShare<head_dim_v, reorder_threads> of_v(thread);
    const auto write = [&](auto&& row_of) {
      for (int block = 0; block < p.segment / block_tokens; ++block) {
        // Streaming stores leave L2 to the values that the CTA's next heads read again.
        const int first_v = block * block_tokens + of_v.first;
        const int first_k = block * block_tokens + of_k.first;
        uint4 v_chunk[of_v.rows];
#pragma unroll
        for (int i = 0; i < of_v.rows; ++i)
          if (of_v.any())
            v_chunk[i] = __ldg(reinterpret_cast<const uint4*>(row_of(source_v, from[first_v + i * of_v.rows_at_once])) +
                               of_v.chunk);
        float sum[8] = {};
#pragma unroll
        for (int i = 0; i < of_k.rows; ++i) {
          if (!of_k.any()) continue;
          const int key = from[first_k + i * of_k.rows_at_once];
          const uint4 k_chunk = __ldg(reinterpret_cast<const uint4*>(row_of(source_k, key)) + of_k.chunk);
          const std::int64_t out = (out_token + first_k + i * of_k.rows_at_once) * of_k.chunks + of_k.chunk;
          __stcs(static_cast<uint4*>(p.permuted.k) + out, k_chunk);
          add_to<T>(sum, k_chunk);
        }
#pragma unroll
        for (int i = 0; i < of_v.rows; ++i)
          if (of_v.any())
            __stcs(static_cast<uint4*>(p.permuted.v) + (out_token + first_v + i * of_v.rows_at_once) * of_v.chunks +
                       of_v.chunk,
                   v_chunk[i]);
        write_block_mean<T>(
            sum, block_sums[parity], thread, [] { __syncthreads(); },
            static_cast<std::uint32_t*>(p.pooled_k) + (out_token / block_tokens + block) * (head_dim / 2));
        parity ^= 1;
      }
    };
    // Apart, as one loop for both would need more registers.
    if (source_k.paged())
      write([&](const Rows<T>& rows, int key) { return rows.in_pages(first_token + key); });
    else
      write([&](const Rows<T>& rows, int key) { return rows.contiguous(first_token + key); });
  }
}

}  // namespace pbsattn::cuda
