// Block-sparse attention on Hopper: what the attend stage takes, and its launch.
//
// A *tile* is one row (see core/geometry.h) of one query head of one batch entry; tiles are numbered
// [batch][q_head][row]. Each tile has a list of key blocks. Blocks before own_begin(row) are read from the
// permuted K and V, blocks own_begin(row) .. diagonal(row) from the caller's, and only the diagonal block is masked.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/geometry.h"

namespace pbsattn::cuda {

// Device arrays in CSR with counts, so that rows may be stored with gaps. Each list ascends, holds each block at most
// once, and ends with the row's diagonal block.
struct BlockLists {
  const std::int64_t* row_start = nullptr;  // [tile]: index in `block` of the row's first entry
  const std::int32_t* row_count = nullptr;  // [tile]: entries, at least 1
  const std::int32_t* block = nullptr;
};

// K and V after permute, contiguous: [batch][order_heads][geometry.permuted_len()][head_dim], in the inputs' dtype.
struct PermutedKV {
  const void* k = nullptr;  // 16-byte aligned; null: no permutation, every block comes from the caller's K and V
  const void* v = nullptr;
  std::int64_t order_heads = 0;  // q_heads (an order for each query head) or kv_heads (a shared order)
};

// Views are of f16 or bf16, all four alike, with 16-byte aligned data and strides of multiples of 8 elements.
// To work head group by head group, pass the group's head counts and pointers advanced to its first head.
struct AttendArgs {
  Geometry geometry;  // block 128; head_dim 64 or 128
  float scale = 0;    // factor on q . k
  Inputs inputs;
  PermutedKV permuted;
  const BlockLists* lists = nullptr;  // null: every row lists all its blocks (dense causal attention)
  View out;                           // [batch][q_heads][q_len][head_dim]
  float* lse = nullptr;               // [batch][q_heads][q_len] at lse_batch_stride, natural logarithm; optional
  std::int64_t lse_batch_stride = 0;  // elements from one batch entry to the next
  void* scratch = nullptr;            // attend_scratch_size() bytes, 16-byte aligned
};

// Bytes of scratch that attend() needs for tile scheduling.
std::size_t attend_scratch_size(const Geometry& geometry);

// Enqueues the work on `stream` of the current device (compute capability 9.0) and returns. Allocates nothing, reads
// nothing back, can be captured in a graph. The same inputs give the same bits.
cudaError_t attend(const AttendArgs& args, cudaStream_t stream);

// What correct() takes besides what attend() took of the same call.
struct CorrectArgs {
  Geometry geometry;
  float scale = 0;
  std::int64_t dense_last_rows = 0;
  ConstView q;
  BlockLists lists;
  std::int64_t order_heads = 0;    // heads of the means
  const void* pooled_k = nullptr;  // [batch][order_heads][pooled_blocks][head_dim]
  std::int64_t pooled_blocks = 0;
  const void* pooled_v = nullptr;  // [batch][order_heads][blocks of complete segments][head_dim]
  View out;                        // as attend() left them, like lse
  float* lse = nullptr;
  std::int64_t lse_batch_stride = 0;
};

// Correction::mean: adds to the attention of each row, but the dense last ones, the blocks before its own segment that
// its list leaves out, each as 128 keys that all are its mean key, with its mean value.
cudaError_t correct(const CorrectArgs& args, cudaStream_t stream);

}  // namespace pbsattn::cuda
