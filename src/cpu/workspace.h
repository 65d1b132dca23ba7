// The workspace of a CPU plan: where the arrays of a pass lie, and how heads are cut into passes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/executor.h"
#include "cpu/kernels/kernels.h"

namespace pbsattn::cpu {

// Consecutive query heads of one batch entry and the KV heads they read: whole groups, or part of one.
struct Heads {
  std::int64_t batch = 0;
  std::int64_t q_begin = 0, q_count = 0;
  std::int64_t kv_begin = 0, kv_count = 0;
};

// How many heads a pass takes.
struct Extent {
  std::int64_t q_heads = 0;
  std::int64_t kv_heads = 0;
};

// Rounds a number of pooled rows up to whole tiles, which the products take.
inline std::int64_t up_to_tile(std::int64_t rows) {
  return ceil_div(rows, row_tile) * row_tile;
}

// Arrays of one pass in the caller's workspace. With a null base the same arithmetic gives the size. *Permuted* blocks
// are those that some row sees before its own segment; where no key moves they stay where they were, and k and v serve.
struct Layout {
  Layout(const detail::PlanSpec& spec, const Kernels& kernels, Extent extent, std::byte* base);

  std::byte* k = nullptr;                 // [kv_heads][blocks][block][head_dim] packed, original order
  std::byte* v = nullptr;                 // the same, [head_dim_v]
  std::uint8_t* values_finite = nullptr;  // [kv_heads][blocks]
  std::byte* permuted_k = nullptr;        // [order_heads][permuted_blocks][block][head_dim] packed; none where the
                                          // path gathers
  std::byte* permuted_v = nullptr;        // the same, [head_dim_v]
  float* pooled_k = nullptr;              // [pooled_heads][permuted_blocks up to a row_tile][head_dim]
  float* pooled_v = nullptr;              // the same of values, [head_dim_v], where what is left out is corrected for
  float* pooled_own = nullptr;            // [kv_heads][blocks up to a row_tile][head_dim], in the original order
  float* band_factors = nullptr;          // [q_heads][2]
  std::byte* scoring_queries = nullptr;   // [q_heads][scoring_strips][strip_bytes] packed: they score the keys
  std::byte* exps = nullptr;              // [q_heads][scored_blocks][scoring_strips][block][strip] of element_size
  float* score_sums = nullptr;            // [q_heads][scored_blocks][scoring_strips][strip]
  float* score_factors = nullptr;         // the same; maxima at first
  std::int32_t* order = nullptr;          // [order_heads][permuted_len]
  std::int64_t* sink_block = nullptr;     // [order_heads]: the block that holds token 0
  std::uint64_t* mask = nullptr;          // [q_heads][rows][mask_words], bit b: the row sees block b
  std::byte* scratch = nullptr;           // [threads][scratch_bytes]
  std::size_t bytes = 0;                  // of all these, alignment slack included

  // From head to head: blocks of k, v and values_finite, blocks of their copies, rows of means, tokens of orders.
  std::int64_t block_stride = 0, copy_stride = 0;
  std::int64_t pooled_stride = 0, pooled_own_stride = 0;
  std::int64_t order_stride = 0;

  bool permuted = false;
  bool copied = false;  // into permuted_k and permuted_v
  bool scored = false;
  bool corrected = false;
  bool shared_order = false;         // one order for each KV head
  std::int64_t permuted_blocks = 0;  // blocks before the last row's own segment
  std::int64_t kept_blocks = 0;      // the first ones, which a cache holds from earlier runs
  std::int64_t scoring_strips = 0;
  std::int64_t scored_blocks = 0;  // blocks of complete segments, whose keys queries score
  std::int64_t strip_bytes = 0;    // of a packed strip of queries
  std::int64_t exps_bytes = 0;     // of a strip's exponentials on one block
  std::int64_t mask_words = 0;
  std::int64_t k_block_bytes = 0;  // of a packed block of keys
  std::int64_t v_block_bytes = 0;  // of values
  std::int64_t scratch_bytes = 0;
  std::int64_t lists_bytes = 0;  // of scratch, at its start: a group's block lists of the rows that are done together
};

// Returns the bytes of a pass for whichever of these paths a run takes.
std::size_t workspace_bytes(const detail::PlanSpec& spec, std::span<const Kernels* const> paths, Extent extent);

// Returns the largest useful pass within the plan's cap. Throws Error(out_of_memory) when even the smallest is over it.
Extent choose_extent(const detail::PlanSpec& spec, std::span<const Kernels* const> paths);

}  // namespace pbsattn::cpu
