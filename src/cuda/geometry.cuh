// Where a pass's rows, blocks, segments and lists lie, as kernels read it: core/geometry.h in 32 bits, which hold
// whatever validate.cc takes. The host compiler reads it too, so that tests compare the two without a GPU.
#pragma once

#include "core/geometry.h"
#include "cuda/limits.h"

#ifdef __CUDACC__
#define PBSATTN_DEVICE __host__ __device__
#else
#define PBSATTN_DEVICE
#endif

namespace pbsattn::cuda {

// Of a block's 128 tokens those from `begin` to before `end`.
struct Span {
  int begin, end;

  PBSATTN_DEVICE int count() const { return end - begin; }
};

// A *row* is the queries of one token block of one head. Heads are query heads of all batch entries, unless said
// otherwise: [batch][q_head].
struct RowGrid {
  // `order_heads`: heads of a batch entry that have an order, q_heads or kv_heads.
  RowGrid(const Geometry& g, std::int64_t order_heads)
      : causal_blocks(g.causal_blocks_per_head()),
        q_offset(static_cast<int>(g.q_offset())),
        q_len(static_cast<int>(g.shape.q_len)),
        kv_len(static_cast<int>(g.shape.kv_len)),
        heads(static_cast<int>(g.shape.batch * g.shape.q_heads)),
        q_heads(static_cast<int>(g.shape.q_heads)),
        kv_heads(static_cast<int>(g.shape.kv_heads)),
        group(static_cast<int>(g.group())),
        order_group(static_cast<int>(g.shape.q_heads / order_heads)),
        orders(static_cast<int>(order_heads / g.shape.kv_heads)),
        rows(static_cast<int>(g.rows())),
        blocks(static_cast<int>(g.blocks())),
        first_row(static_cast<int>(g.first_row())),
        blocks_per_segment(g.segment / g.block) {}

  // Returns the token block that a row is the queries of: the last key block that it sees.
  PBSATTN_DEVICE int diagonal(int row) const { return first_row + row; }
  // Returns the first block of a row's own segment, by its diagonal: blocks before it are permuted and may be left out.
  PBSATTN_DEVICE int own_begin(int diagonal) const { return diagonal / blocks_per_segment * blocks_per_segment; }
  // Returns the first row that has blocks before its own segment; it may be beyond the last.
  PBSATTN_DEVICE int first_sparse_row() const {
    return blocks_per_segment > first_row ? blocks_per_segment - first_row : 0;
  }

  // Returns the query, counted from the call's first, that is a block's first token; negative where the call's first
  // query stands inside the block.
  PBSATTN_DEVICE int first_query(int diagonal) const { return diagonal * block_tokens - q_offset; }
  // Returns those of a block's tokens that are queries of the call.
  PBSATTN_DEVICE Span queries_of(int diagonal) const {
    const int first = first_query(diagonal);
    return {first < 0 ? -first : 0, q_len - first < block_tokens ? q_len - first : block_tokens};
  }

  // Returns how many entries a head's lists have room for before a row's.
  PBSATTN_DEVICE std::int64_t entries_before(int row) const {
    return row * std::int64_t{first_row} + row * (row + std::int64_t{1}) / 2;
  }
  // Returns where a row's list begins in memory, or its scores.
  PBSATTN_DEVICE std::int64_t list_start(std::int64_t head, int row) const {
    return head * causal_blocks + entries_before(row);
  }

  // Returns the `i`-th query head of a KV head of one batch entry.
  PBSATTN_DEVICE int q_head(int batch, int kv_head, int i) const { return batch * q_heads + kv_head * group + i; }
  // Returns the `i`-th order head of a KV head of one batch entry; a loop may call it, as it does not divide.
  PBSATTN_DEVICE int order_head(int batch, int kv_head, int i) const {
    return (batch * kv_heads + kv_head) * orders + i;
  }
  // Returns the head of all batch entries, KV heads or those that have an order, that belongs to a query head; or of
  // one batch entry, if the query head is.
  PBSATTN_DEVICE int kv_head(int head) const { return head / group; }
  PBSATTN_DEVICE int order_head(int head) const { return head / order_group; }

  std::int64_t causal_blocks;  // entries that a head's lists have room for
  int q_offset, q_len, kv_len;
  int heads;               // of all batch entries
  int q_heads, kv_heads;   // of one
  int group, order_group;  // query heads of a KV head, and of an order
  int orders;              // of a KV head
  int rows, blocks;        // of a head
  int first_row;           // token block of row 0
  int blocks_per_segment;
};

#ifdef __CUDACC__
// Returns the first element of a head of one batch entry.
template <class T>
__device__ const T* head_of(const ConstView& view, int batch, int head) {
  return static_cast<const T*>(view.data) + batch * view.batch_stride + head * view.head_stride;
}
#endif

}  // namespace pbsattn::cuda
