// The permute stage on Hopper: what it takes and its launches.
//
// A launch enqueues its work on `stream` of the current device and returns; it allocates nothing and reads nothing
// back. To work head group by head group, pass the group's head counts and pointers advanced to its first head:
// the bits of a head's result don't depend on which other heads go with it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/limits.h"

namespace pbsattn::cuda {

// Views are of f16 or bf16, all alike, with 16-byte aligned data and strides of multiples of 8 elements.
// `order_heads` is q_heads (OrderScope::query_head) or kv_heads (OrderScope::kv_head).
struct PermuteArgs {
  Geometry geometry;  // block 128; head_dim 64 or 128; at least one complete segment
  OrderScope scope = OrderScope::query_head;
  bool divide_by_count = false;  // means of tail blocks: by their tokens, else by the block size
  float scale = 0;
  Inputs inputs;
  void* k = nullptr;                   // [batch][order_heads][permuted_len][head_dim], 16-byte aligned like all below
  void* v = nullptr;                   // the same
  void* pooled_k = nullptr;            // [batch][order_heads][permuted_blocks][head_dim]: means of permuted blocks
  void* pooled_own = nullptr;          // [batch][kv_heads][blocks][head_dim]: means of blocks of keys where they were;
                                       // null: not asked for
  void* pooled_v = nullptr;            // [batch][order_heads][permuted_blocks][head_dim]; null: not asked for
  void* pooled_q = nullptr;            // [batch][q_heads][rows][head_dim]
  std::int32_t* order = nullptr;       // [batch][order_heads][permuted_len]: the token at each slot
  std::int32_t* sink_block = nullptr;  // [batch][order_heads]: the block whose slot holds token 0
  void* scratch = nullptr;             // permute_scratch_size() bytes
};
std::size_t permute_scratch_size(const Geometry& geometry);
cudaError_t permute(const PermuteArgs& args, cudaStream_t stream);

// Pooled K and Q, and sink blocks, of keys that stay where they are: order_heads is kv_heads. Reads only inputs,
// geometry and divide_by_count, writes only pooled_q, sink_block, pooled_v and pooled_own, or pooled_k where pooled_own
// is null; sink_block alone where pooled_q is null.
cudaError_t pool(const PermuteArgs& args, cudaStream_t stream);

}  // namespace pbsattn::cuda
