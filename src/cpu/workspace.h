// What one pass over some heads keeps in memory, and how heads are cut into passes.
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

// Sizes a pass is laid out from.
struct PassShape {
  std::int64_t q_heads = 0;
  std::int64_t kv_heads = 0;
};

// Arrays of one pass in the caller's workspace. With a null base the same arithmetic gives the size.
// "Far" blocks are those that some row sees outside its own segment: permuted, or the originals
// themselves when nothing is permuted.
struct Pass {
  Pass(const detail::PlanSpec& spec, const Kernels& kernels, PassShape shape, std::byte* base);

  std::byte* keys = nullptr;              // [kv_heads][blocks][block][head_dim] packed, original order
  std::byte* values = nullptr;            // the same
  std::uint8_t* values_finite = nullptr;  // [kv_heads][blocks]
  std::byte* far_keys = nullptr;          // [order_heads][far_blocks][block][head_dim] packed, permuted; none
                                          // where the path gathers
  std::byte* far_values = nullptr;        // the same
  float* pooled_keys = nullptr;           // [far_heads][far_blocks up to a row_tile][head_dim]
  float* pooled_values = nullptr;         // the same of values, where what is pruned is corrected for
  float* original_pooled = nullptr;       // [kv_heads][blocks up to a row_tile][head_dim], in the original order
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

  bool permuted = false;
  bool scored = false;
  bool corrected = false;
  bool shared_order = false;    // one order for each KV head
  std::int64_t far_blocks = 0;  // blocks before the last row's own segment
  std::int64_t scoring_strips = 0;
  std::int64_t scored_blocks = 0;  // blocks of complete segments, whose keys are scored
  std::int64_t strip_bytes = 0;    // of a packed strip of queries
  std::int64_t exps_bytes = 0;     // of a strip's exponentials on one block
  std::int64_t mask_words = 0;
  std::int64_t block_bytes = 0;  // of a packed block of keys or of values
  std::int64_t scratch_bytes = 0;
  std::int64_t lists_bytes = 0;  // of scratch, at its start: a group's block lists of the rows that are done together

  // Index of a pass's query head in far_keys, pooled_keys and order.
  std::int64_t far_head(std::int64_t q_head, std::int64_t kv_head) const {
    return permuted && !shared_order ? q_head : kv_head;
  }
};

// Bytes of a pass for whichever of these paths a run takes.
std::size_t pass_bytes(const detail::PlanSpec& spec, std::span<const Kernels* const> paths, PassShape shape);

// The largest useful pass within the plan's cap. Throws Error(out_of_memory) when even the smallest is
// over it.
PassShape choose_pass(const detail::PlanSpec& spec, std::span<const Kernels* const> paths);

}  // namespace pbsattn::cpu
