// What both first launches of mass.cu work with.
#pragma once

#include "core/score_traits.h"
#include "cuda/geometry.cuh"
#include "cuda/memory/kv_copy.cuh"
#include "cuda/select/scores/scores.h"
#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/lanes.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/online_sum.cuh"
#include "cuda/sm90/prologue.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/soft_cap.cuh"
#include "cuda/sm90/swizzled_tile.cuh"

namespace pbsattn::cuda::mass {

using sm90::Barrier;

constexpr int tile_queries = 256;  // lines
constexpr int tile_keys = 128;     // lines

struct Params {
  RowGrid grid;
  PageTable pages;  // of the caller's keys
  bool moved;       // keys before the own segment are permuted ones
  float* log_sums;  // of rows [row_begin, row_end) of each head: [row][line of the row][block up to the diagonal]
  float* scores;    // of tile [batch][q_head][row] where its list will be
  std::int64_t head_sums;
  int first_head;
  int row_begin, row_end;  // rows of these launches
  bool causal;             // the own segment counts
  float scale_log2;
  int patch;        // tokens of a line
  int query_lines;  // of a row's whole block, a power of two
  // Of BlockScore::sampled, for the first, a middle and the last row: how many queries, and where in the block.
  bool sampled;
  int sampled_count[3], sampled_at[3][most_sampled];

  __device__ int kind_of(int row) const { return row == 0 ? 0 : row < grid.rows - 1 ? 1 : 2; }
  // Returns the key line of its block that a query line stands at.
  __device__ int place_of(int row, int line) const { return sampled ? sampled_at[kind_of(row)][line] : line; }
  // Returns where a row's sums begin among those of its head.
  __device__ std::int64_t sums_before(int row) const {
    return (grid.entries_before(row) - grid.entries_before(row_begin)) * query_lines;
  }
};

struct Maps {
  CUtensorMap q, permuted_k;
  KvMap k;
};

}  // namespace pbsattn::cuda::mass
