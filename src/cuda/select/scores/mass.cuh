// What both first launches of mass.cu work with.
#pragma once

#include "cuda/limits.h"
#include "cuda/select/scores/scores.h"
#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/lanes.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/online_sum.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/swizzled_tile.cuh"
#include "cuda/sm90/tensor.cuh"

namespace pbsattn::cuda::mass {

using sm90::Barrier;

constexpr int tile_queries = 256;  // lines
constexpr int tile_keys = 128;     // lines
constexpr int max_sampled = 8;     // queries of a row

struct Params {
  float* log_sums;  // of rows [row_begin, row_end) of each head: [row][line of the row][block up to the diagonal]
  float* scores;    // of tile [batch][q_head][row] where its list will be
  std::int64_t head_sums, causal_blocks;
  std::int64_t q_offset, q_len;
  int q_heads, group, heads_of_order;
  int first_head;          // of all batch entries
  int first_row;           // token block of row 0
  int row_begin, row_end;  // rows of these launches
  int blocks_per_segment;
  bool causal;  // the own segment counts
  float scale_log2;
  int patch;        // tokens of a line
  int query_lines;  // of a row's whole block, a power of two
  // Of BlockScore::sampled, for the first, a middle and the last row: how many queries, and where in the block.
  bool sampled;
  int rows;
  int sampled_count[3], sampled_at[3][max_sampled];

  __device__ int kind_of(int row) const { return row == 0 ? 0 : row < rows - 1 ? 1 : 2; }
  // The key line of its block that a query line stands at.
  __device__ int place_of(int row, int line) const { return sampled ? sampled_at[kind_of(row)][line] : line; }
  __device__ int own_begin(int block) const { return block / blocks_per_segment * blocks_per_segment; }
  // Entries of a head's lists before those of `row`.
  __device__ std::int64_t entries_before(int row) const {
    return row * static_cast<std::int64_t>(first_row) + row * (row + std::int64_t{1}) / 2;
  }
};

struct Maps {
  CUtensorMap q, permuted_k, k;
};

}  // namespace pbsattn::cuda::mass
