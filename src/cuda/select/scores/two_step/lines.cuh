// What both steps of two_step.cu work with: which queries of a row are sampled, and which blocks the second step reads.
#pragma once

#include "core/score_traits.h"
#include "cuda/geometry.cuh"
#include "cuda/memory/kv_copy.cuh"
#include "cuda/select/scores/scores.h"
#include "cuda/sm90/copy.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/prologue.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/soft_cap.cuh"
#include "cuda/sm90/swizzled_tile.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/sm90/turns.cuh"

namespace pbsattn::cuda::two_step {

using sm90::Barrier;

constexpr int groups = 4;        // warpgroups that multiply
constexpr int group_lines = 64;  // of each
constexpr int item_lines = groups * group_lines;
constexpr int threads = (groups + 1) * 128;
constexpr int multiplying_registers = 112;
constexpr int other_registers = 32;

// Some of each row's queries, evenly spaced, the row's last among them: core/score_traits.h's sampled_query(). A row
// has room for a power of two of them, its *lines*; a head's lines follow one another, row by row. A line that has no
// query is the row's last one again, and counts nothing.
struct Sample {
  int most;       // queries of a row
  int log_lines;  // log2 of its lines

  __host__ __device__ int lines() const { return 1 << log_lines; }
  PBSATTN_DEVICE int row_of(int line) const { return line >> log_lines; }
  PBSATTN_DEVICE int of_row(int line) const { return line & (lines() - 1); }
  PBSATTN_DEVICE int count(Span queries) const { return most < queries.count() ? most : queries.count(); }
  // Returns where in its block the `i`-th query is.
  PBSATTN_DEVICE int place(Span queries, int i) const {
    const int of = count(queries);
    return queries.begin + ((i < of ? i : of - 1) + 1) * queries.count() / of - 1;
  }
};

struct Params {
  RowGrid grid;
  ConstView q;
  PageTable pages;  // of the caller's keys
  bool moved;       // keys before the own segment are permuted ones
  float* scores;    // of tile [batch][q_head][row] where its list will be: shares of the first step, then of both
  int scored_rows;  // those from there on are dense
  float scale_log2;
  OptionsOfHeads options;
  float reach;
  const void* pooled_own;
  std::int64_t own_blocks;  // of a head
  Sample means, exact;
  // Of the second step, in parts: some order heads and rows at a time.
  int part_blocks, parts;  // key blocks of a part of a row's, and parts of the longest row
  int first_order_head;    // of all batch entries
  int row_begin, row_end;  // whole strips
  std::int64_t head_sums;  // numbers in memory of a head
  float* sums;  // of each head its log-sum-exps, [row][block up to the diagonal][line], then [row][line][part + 1]

  // Returns the least share of the first step that lets the second read a block; none where nothing goes by scores.
  __device__ float least_share(int head, int row) const {
    const HeadOptions& of_head = options.of(head);
    if (of_head.keep != KeepRule::threshold || row >= grid.rows - of_head.dense_last_rows) return INFINITY;
    return of_head.row_threshold(grid.diagonal(row)) / reach;
  }
  // Returns how many blocks before its own segment a row has; none where it isn't scored.
  __device__ int visible(int row) const { return row < scored_rows ? grid.own_begin(grid.diagonal(row)) : 0; }
  // Return where a head's numbers begin, and from there on a row's log-sum-exps, and its parts' totals.
  __device__ int of_head(int head) const {
    return static_cast<int>((head - first_order_head * grid.order_group) * head_sums);
  }
  __device__ int sums_before(int row) const {
    return static_cast<int>(grid.entries_before(row) - grid.entries_before(row_begin)) * exact.lines();
  }
  __device__ int totals_before(int row) const {
    return sums_before(row_end) + (row - row_begin) * exact.lines() * (parts + 1) * 2;
  }
};

// Starts the copy of `count` lines of a head, from `first_line` on, to tiles of 128; thread `thread` of `threads` has a
// share of it.
template <class T, int head_dim>
__device__ void gather_lines(const Params& p, const Sample& sample, int head, int first_line, int count,
                             unsigned char* tiles, int thread, int threads) {
  using Swizzled = SwizzledTile<head_dim>;
  const T* queries = head_of<T>(p.q, head / p.grid.q_heads, head % p.grid.q_heads);
  const int chunk = thread % Swizzled::threads;
  if (chunk >= Swizzled::chunks) return;
#pragma unroll 1
  for (int i = thread / Swizzled::threads; i < count; i += threads / Swizzled::threads) {
    const int line = first_line + i;
    const int diagonal = p.grid.diagonal(min(sample.row_of(line), p.grid.rows - 1));
    const int query = p.grid.first_query(diagonal) + sample.place(p.grid.queries_of(diagonal), sample.of_row(line));
    copy_async(
        sm90::shared_address(tiles) + i / tile_tokens * Swizzled::bytes + Swizzled::offset(i % tile_tokens, chunk),
        queries + query * p.q.token_stride + chunk * 8, true);
  }
}

}  // namespace pbsattn::cuda::two_step
