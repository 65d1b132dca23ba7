// A thread's memory for selecting.
#pragma once

#include "core/executor.h"
#include "core/score_traits.h"
#include "cpu/kernels/kernels.h"

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
inline constexpr int cell_bins = 1 << 11;

inline constexpr int most_two_step_rows = 8;  // that BlockScore::two_step scores together

struct SelectScratch {
  // Without memory it counts bytes.
  SelectScratch(const detail::PlanSpec& spec, std::int64_t permuted_blocks, std::int64_t strip_bytes,
                std::byte* memory);

  float* scores;        // [blocks up to a row_tile][strip]
  float* pooled_q;      // [strip][head_dim]
  float* packed;        // [head_dim][strip] queries
  ScoredBlock* sorted;  // [blocks]
  float* weights;       // [2][blocks]; of two_step [most_two_step_rows][blocks]
  // Of scores other than mean_pool and per_query:
  float* sums;          // [blocks up to a row_tile][strip]
  std::int32_t* index;  // [strip]
  // Of those but two_step, which reads keys as the path packs them:
  float* keys;     // [block, at least patch_tokens * row_tile][head_dim]
  float* exps;     // [block, at least row_tile][strip]
  float* patches;  // [patch_tokens][head_dim][strip] queries
  // Of patterns:
  float* columns;        // [kv_len]
  float* diagonals;      // [kv_len]
  std::int32_t* ranked;  // [kv_len + 1]
  CellBin* bins;         // [cell_bins], of flexible
  // Of two_step:
  std::uint32_t* readers;  // [blocks], bit i: row i reads the block's keys
  std::byte* exact;        // [strip_bytes] queries as the path packs them
  std::int64_t size = 0;   // bytes
};

}  // namespace pbsattn::cpu
