// Block scores: what each of a row's key blocks is expected to weigh, before the keep rule.
//
// mean_pool is scored for a strip of rows at once (select.cc), and only it and per_query are made to be fast. The rest
// is for comparisons: plain loops around the f32 kernels, a row at a time.
#pragma once

#include <limits>
#include <span>

#include "core/keep_rule.h"
#include "core/score_traits.h"
#include "cpu/context.h"

namespace pbsattn::cpu {

struct ScoredBlock {
  float score;
  std::int32_t block;
};

// Cells (row, block) of pooled attention whose bits lie in one range.
struct CellBin {
  double sum;
  std::int64_t count;
};
constexpr int cell_bins = 1 << 11;

// A thread's memory for selecting.
struct SelectScratch {
  SelectScratch(const detail::PlanSpec& spec, std::int64_t far_blocks, std::byte* memory);
  static std::int64_t bytes(const detail::PlanSpec& spec, std::int64_t far_blocks);

  float* scores;        // [blocks up to a row_tile][strip]
  float* pooled;        // [strip][head_dim]
  float* packed;        // [head_dim][strip] queries
  ScoredBlock* sorted;  // [blocks]
  float* weights;       // [2][blocks]
  // Of scores other than mean_pool and per_query:
  float* sums;          // [blocks up to a row_tile][strip]
  float* keys;          // [block, at least 64][head_dim]
  float* exps;          // [block, at least row_tile][strip]
  float* patches;       // [8][head_dim][strip] queries
  std::int32_t* index;  // [strip]
  // Of patterns:
  float* columns;         // [kv_len]
  float* diagonals;       // [kv_len]
  std::int32_t* ranked;   // [kv_len + 1]
  CellBin* bins;          // [cell_bins], of flexible
  std::int64_t size = 0;  // bytes
};

// The mean of row r's queries, in their dtype.
void pool_queries(const StageContext& c, std::int64_t head, std::int64_t row, float* pooled);

// BlockScore::per_query: the sum over the row's queries of each block's share of their softmax, into weights. Returns
// the sum of all of these: the number of queries, or NaN if a query's softmax has no value.
double score_per_query(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch);

// The scores that read pooled keys of all causal blocks, into weights: exponentials, whose shares of the returned sum
// are the scores. dual_band's second list follows blocks() after the first.
struct Totals {
  double first = 0, second = 0;
};
Totals score_pooled_causal(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch);

// The factors of dual_band's two bands for a pass's head, from all its pooled queries and keys.
void calibrate_bands(const StageContext& c, std::int64_t head, const SelectScratch& scratch);

// exact, sampled and the antidiagonal scores, by softmax over keys themselves: as for per_query.
double score_by_keys(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch);

// vertical_slash and flexible: marks in the masks of a head's rows what its columns and diagonals keep.
void mark_pattern(const StageContext& c, std::int64_t head, const SelectScratch& scratch);

inline void set_bit(std::uint64_t* mask, std::int64_t block) {
  mask[block / 64] |= std::uint64_t{1} << (block % 64);
}

// Softmax of a strip of queries over blocks of keys, as the blocks' masses. NaN throughout for a query that has a NaN
// or +inf among its scores, or no other than -inf.
class BlockMasses {
 public:
  BlockMasses(const Kernels& kernels, const SelectScratch& scratch, std::int64_t blocks, float scale_log2)
      : kernels_(kernels), scratch_(scratch), blocks_(blocks), scale_log2_(scale_log2) {}

  // Block b with keys that all queries see: packed rows, as many as a multiple of row_tile.
  void add(std::int64_t b, const float* keys, int count, int dim, const float* queries);
  // The same where sees(query, key) says which; rows are padded to a multiple of row_tile.
  template <class Sees>
  void add_masked(std::int64_t b, const float* keys, int count, int dim, const float* queries, Sees&& sees);

  // Turns what was added into factors of its exponentials: the softmax weight of a key is exps * factor.
  void finish(int queries);
  const float* factors(std::int64_t b) const { return scratch_.scores + b * strip; }
  // weights[b] += the masses of the first `queries` queries.
  void add_to(float* weights, int queries) const;

 private:
  void add_masked_exps(std::int64_t b, int count);

  const Kernels& kernels_;
  const SelectScratch& scratch_;
  std::int64_t blocks_;
  float scale_log2_;
};

template <class Sees>
void BlockMasses::add_masked(std::int64_t b, const float* keys, int count, int dim, const float* queries, Sees&& sees) {
  kernels_.scores(keys, queries, (count + row_tile - 1) / row_tile * row_tile, dim, scratch_.exps);
  for (int key = 0; key < count; ++key)
    for (int query = 0; query < strip; ++query)
      if (!sees(query, key)) scratch_.exps[key * strip + query] = -std::numeric_limits<float>::infinity();
  add_masked_exps(b, count);
}

}  // namespace pbsattn::cpu
