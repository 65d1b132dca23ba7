// The arrays in device memory that stages hand on: permute writes the first two kinds, select the lists. All are
// contiguous, but that a head has as much room as a number beside the pointer says, and 16-byte aligned.
#pragma once

#include <cstdint>

namespace pbsattn::cuda {

// Keys and values in the order that permute gave them, in the inputs' dtype.
struct Permuted {
  std::int64_t order_heads =
      0;                   // heads that have an order: q_heads (one for each query head) or kv_heads (a shared one)
  std::int64_t slots = 0;  // of a head: at least permuted_len
  void* k = nullptr;       // [batch][order_heads][slots][head_dim]; null: keys are where they were
  void* v = nullptr;       // the same, [head_dim_v]
  std::int32_t* order = nullptr;       // [batch][order_heads][slots]: the token at each slot
  std::int32_t* sink_block = nullptr;  // [batch][order_heads]: the block whose slot holds token 0
};

// Means of blocks, in the inputs' dtype; null where nobody asks for them.
struct Pooled {
  void* q = nullptr;            // [batch][q_heads][rows][head_dim]
  void* k = nullptr;            // [batch][order_heads][k_blocks][head_dim], in the keys' order
  std::int64_t k_blocks = 0;    // at least permuted_blocks(); where keys are permuted, those of Permuted::slots
  void* v = nullptr;            // [batch][order_heads][v_blocks][head_dim_v]
  std::int64_t v_blocks = 0;    // at least permuted_blocks()
  void* own = nullptr;          // [batch][kv_heads][own_blocks][head_dim]: of keys where they were
  std::int64_t own_blocks = 0;  // at least blocks()
};

// The key blocks of each tile [batch][q_head][row], in CSR with counts. Rows have room for all their causal blocks, so
// a list's place is known beforehand (RowGrid::list_start) and no pass over the counts is needed. A list ascends, holds
// each block at most once, and ends with the row's diagonal block.
struct BlockLists {
  std::int64_t* row_start =
      nullptr;  // [tile]: index in `block` of the row's first entry; null: rows see all their blocks
  std::int32_t* row_count = nullptr;  // [tile]: entries, at least 1
  std::int32_t* block = nullptr;      // [batch * q_heads * causal_blocks_per_head()]
};

}  // namespace pbsattn::cuda
