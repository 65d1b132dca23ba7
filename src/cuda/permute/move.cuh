// Orders the keys of segments by what a linear model says of each (Permutation::learned), or as they are known to stand
// (Permutation::arrival), and writes K and V in that order, once for each KV head.
//
// A CTA takes one segment of one KV head:
//     score[key] = sum of weight * feature, a thread for each key, 256 keys in shared memory at a time;
//     rank of each key by counting the keys before it;
//     rows of K and V to their new places, 16 bytes a thread, with K's block means.
// Keys of a segment of up to 256 are read once; of a longer or known one K is read, or read again, through L2. Three
// CTAs share a multiprocessor, so that one loads or ranks while others write; fewer of wide heads.
//
// The least traffic is K and V read once and written once: 1.07 GB at 128K tokens, 8 KV heads of 128, .26 ms at the 4.1
// TB/s that a copy reaches on an H200.
#pragma once

#include <climits>

#include "cuda/permute/key_order.cuh"

namespace pbsattn::cuda {

struct MoveParams {
  ConstView k, v;
  PageTable pages;  // of both
  RowGrid grid;
  int segment;
  int first_segment;     // those before stand in `permuted` already
  const float* weights;  // [kv_heads][head_dim / 2 + head_dim]; null: orders are known
  bool neighbours;       // which columns are pairs: RopePairs
  KeyOrder known;
  Permuted permuted;
  void* pooled_k;
  void* pooled_own;  // null: not wanted, nor where orders are known
  std::int64_t own_blocks;
};

constexpr int move_threads = 256;
constexpr int moved_at_once = 256;  // keys in shared memory

// The dynamic shared memory of move_keys(), aligned.
template <int head_dim>
struct MoveShared {
  static constexpr int keys = 0;
  static constexpr int weights = keys + moved_at_once / tile_tokens * SwizzledTile<head_dim>::bytes;
  static constexpr int block_sums = weights + (head_dim / 2 + head_dim) * 4;   // float[warps][head_dim]
  static constexpr int score = block_sums + move_threads / 32 * head_dim * 4;  // int[segment]
  static constexpr std::size_t bytes(std::int64_t segment) {
    return shared_alignment + score + segment * 8;
  }  // with int from[segment]
};

// Returns what sorts descending as an integer; 0 as -0, NaN last.
__device__ inline int sortable_signed(float score) {
  const int bits = __float_as_int(score + 0.0F);
  return isnan(score) ? INT_MIN : bits ^ (bits >> 31 & INT_MAX);
}

__device__ inline float length_of(float a, float b) {
  float length;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(length) : "f"(fmaf(a, a, b * b)));
  return length;
}

// Returns the sum of weight * feature of the key in a tile's row. Two chunks of 8 columns at a time, half a row apart.
template <class T, int head_dim>
__device__ float learned_score(const unsigned char* tile, int row, const float* weights, bool neighbours) {
  using Swizzled = SwizzledTile<head_dim>;
  constexpr int half = head_dim / 2;
  // Squares of columns beyond 1e19 are infinite. Where that may have been, the columns are measured in a large unit.
  for (float unit = 1;; unit = 0x1p64F) {
    const float part = 1 / unit;
    float numbers[2] = {};
    float lengths[2] = {};
#pragma unroll 2
    for (int i = 0; i < Swizzled::chunks / 2; ++i) {
      float low[8] = {}, high[8] = {};
      add_to<T>(low, *reinterpret_cast<const uint4*>(tile + Swizzled::offset(row, i)));
      add_to<T>(high, *reinterpret_cast<const uint4*>(tile + Swizzled::offset(row, i + Swizzled::chunks / 2)));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        numbers[0] = fmaf(weights[half + i * 8 + j], low[j], numbers[0]);
        numbers[1] = fmaf(weights[2 * half + i * 8 + j], high[j], numbers[1]);
        low[j] *= part;
        high[j] *= part;
      }
      if (neighbours) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          lengths[0] = fmaf(weights[i * 4 + j], length_of(low[2 * j], low[2 * j + 1]), lengths[0]);
          lengths[1] = fmaf(weights[half / 2 + i * 4 + j], length_of(high[2 * j], high[2 * j + 1]), lengths[1]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          lengths[j % 2] = fmaf(weights[i * 8 + j], length_of(low[j], high[j]), lengths[j % 2]);
      }
    }
    const float score = fmaf(lengths[0] + lengths[1], unit, numbers[0] + numbers[1]);
    if (isfinite(score) || unit > 1) return score;
  }
}

template <class T, int head_dim, int head_dim_v>
__global__ void __launch_bounds__(move_threads, head_dim > 128 ? 1 : 3)
    move_keys(const __grid_constant__ MoveParams p) {
  using Swizzled = SwizzledTile<head_dim>;
  using Shared = MoveShared<head_dim>;
  constexpr int features = head_dim / 2 + head_dim;
  unsigned char* base = aligned_shared();
  unsigned char* keys = base + Shared::keys;
  float* weights = reinterpret_cast<float*>(base + Shared::weights);
  auto& block_sums = *reinterpret_cast<float(*)[move_threads / 32][head_dim]>(base + Shared::block_sums);
  int* score = reinterpret_cast<int*>(base + Shared::score);
  int* from = score + p.segment;  // slot -> key, both within the segment

  const int thread = static_cast<int>(threadIdx.x);
  const int batch = static_cast<int>(blockIdx.z);
  const int kv_head = static_cast<int>(blockIdx.y);
  const int first_token = (p.first_segment + static_cast<int>(blockIdx.x)) * p.segment;
  const Rows<T> source_k(p.k, p.pages, batch, kv_head);
  const Rows<T> source_v(p.v, p.pages, batch, kv_head);

  const RowShare<head_dim, move_threads> of_k(thread);
  const RowShare<head_dim_v, move_threads> of_v(thread);
  if (p.weights != nullptr) {
    bool moves = false;
    for (int first = 0; first < p.segment; first += moved_at_once) {
      __syncthreads();  // all have scored the keys before
      const int tiles = min(p.segment - first, moved_at_once) / tile_tokens;
      for (int i = 0; i < tiles; ++i)
        load_tile<T, head_dim, move_threads>(keys + i * Swizzled::bytes, source_k,
                                             first_token + first + i * tile_tokens, thread);
      commit_copies();
      if (first == 0) {  // under the copies
        for (int i = thread; i < features; i += move_threads) {
          weights[i] = __ldg(p.weights + kv_head * features + i);
          moves = moves || weights[i] != 0.0F;
        }
        moves = __syncthreads_or(static_cast<int>(moves)) != 0;
      }
      wait_copies<0>();
      __syncthreads();
      if (const int key = first + thread; key < p.segment)
        score[key] = moves ? sortable_signed(learned_score<T, head_dim>(keys + thread / tile_tokens * Swizzled::bytes,
                                                                        thread % tile_tokens, weights, p.neighbours))
                           : 0;
      for (int i = 0; i < tiles && p.pooled_own != nullptr; ++i) {
        float sum[8] = {};
        if (of_k.any())
#pragma unroll
          for (int row = of_k.first; row < tile_tokens; row += of_k.rows_at_once)
            add_to<T>(sum,
                      *reinterpret_cast<const uint4*>(keys + i * Swizzled::bytes + Swizzled::offset(row, of_k.chunk)));
        const std::int64_t block =
            (std::int64_t{batch} * p.grid.kv_heads + kv_head) * p.own_blocks + (first_token + first) / block_tokens + i;
        write_block_mean<T>(
            sum, block_sums, thread, [] { __syncthreads(); },
            static_cast<std::uint32_t*>(p.pooled_own) + block * (head_dim / 2));
        __syncthreads();  // the sums are read
      }
    }
    __syncthreads();
    rank_keys<move_threads>(score, p.segment, thread, from);
  } else {
    // What a caller hands in may be anything, but is read as places in the segment.
    const std::int32_t* known =
        p.known.data + batch * p.known.batch_stride + kv_head * p.known.head_stride + first_token;
    for (int slot = thread; slot < p.segment; slot += move_threads)
      from[slot] = min(max(known[slot] - first_token, 0), p.segment - 1);
  }
  __syncthreads();

  const int out_head = p.grid.order_head(batch, kv_head, 0);
  const std::int64_t out_token = out_head * p.permuted.slots + first_token;
  for (int slot = thread; slot < p.segment; slot += move_threads)
    p.permuted.order[out_token + slot] = first_token + from[slot];
  if (first_token == 0) {
    int& sink = score[0];
    if (thread == 0) sink = 0;
    __syncthreads();
    for (int slot = thread; slot < p.segment; slot += move_threads)
      if (from[slot] == 0) sink = slot / block_tokens;
    __syncthreads();
    if (thread == 0) p.permuted.sink_block[out_head] = sink;
  }

  const auto write = [&](auto&& key_chunk, auto&& value_row) {
#pragma unroll 1
    for (int block = 0; block < p.segment / block_tokens; ++block) {
      const int first_v = block * block_tokens + of_v.first;
      const int first_k = block * block_tokens + of_k.first;
      uint4 v_chunk[of_v.rows];
#pragma unroll
      for (int i = 0; i < of_v.rows; ++i)
        if (of_v.any())
          v_chunk[i] =
              __ldg(reinterpret_cast<const uint4*>(value_row(first_token + from[first_v + i * of_v.rows_at_once])) +
                    of_v.chunk);
      float sum[8] = {};
#pragma unroll
      for (int i = 0; i < of_k.rows; ++i) {
        if (!of_k.any()) continue;
        const uint4 k_chunk = key_chunk(from[first_k + i * of_k.rows_at_once]);
        __stcs(static_cast<uint4*>(p.permuted.k) + (out_token + first_k + i * of_k.rows_at_once) * of_k.chunks +
                   of_k.chunk,
               k_chunk);
        add_to<T>(sum, k_chunk);
      }
#pragma unroll
      for (int i = 0; i < of_v.rows; ++i)
        if (of_v.any())
          __stcs(static_cast<uint4*>(p.permuted.v) + (out_token + first_v + i * of_v.rows_at_once) * of_v.chunks +
                     of_v.chunk,
                 v_chunk[i]);
      write_block_mean<T>(
          sum, block_sums, thread, [] { __syncthreads(); },
          static_cast<std::uint32_t*>(p.pooled_k) + (out_token / block_tokens + block) * (head_dim / 2));
      __syncthreads();  // the sums are read
    }
  };
  const auto from_memory = [&](int key) {
    return __ldg(reinterpret_cast<const uint4*>(source_k.at(first_token + key)) + of_k.chunk);
  };
  const auto from_tiles = [&](int key) {
    return *reinterpret_cast<const uint4*>(keys + key / tile_tokens * Swizzled::bytes +
                                           Swizzled::offset(key % tile_tokens, of_k.chunk));
  };
  // Apart, as one loop for both would need more registers.
  const auto in_pages = [&](int token) { return source_v.in_pages(token); };
  const auto contiguous = [&](int token) { return source_v.contiguous(token); };
  if (p.weights == nullptr || p.segment > moved_at_once)
    source_v.paged() ? write(from_memory, in_pages) : write(from_memory, contiguous);
  else
    source_v.paged() ? write(from_tiles, in_pages) : write(from_tiles, contiguous);
}

}  // namespace pbsattn::cuda
