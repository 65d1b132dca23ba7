// Block-sparse attention on Hopper: what the attend stage takes, and its launch.
//
// A *tile* is one row (see core/geometry.h) of one query head of one batch entry; tiles are numbered
// [batch][q_head][row]. Each tile has a list of key blocks, its diagonal one at least,
// and where there is a window exactly the blocks down from it. Blocks before own_begin(row) are read from the
// permuted K and V, blocks own_begin(row) .. diagonal(row) from the caller's, and only the diagonal block is masked.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/geometry.h"
#include "cuda/attend/parts.h"
#include "cuda/memory/arrays.h"

namespace pbsattn::cuda {

// Views are of f16 or bf16, all four alike, with 16-byte aligned data and strides of multiples of 8 elements.
// To work pass by pass, give the pass's head counts and pointers advanced to its first head.
struct AttendArgs {
  Geometry geometry;                  // block 128; widths of limits.h
  float scale = 0;                    // factor on q . k
  float softcap = 0;                  // of logits; 0: none
  Inputs inputs = {};                 // sinks, if any, are in device memory
  Permuted permuted = {};             // k and v are read, if not null
  BlockLists lists = {};              // with null: dense causal attention
  Outputs outputs = {};               // [batch][q_heads][q_len][head_dim_v]; lse at lse_batch_stride, optional: of
                                      // weights as rounded, each by 2^-8 of itself at most in bf16 and 2^-11 in
                                      // f16, where those below 2^-14 are off by 2^-25
  std::int64_t lse_batch_stride = 0;  // elements from one batch entry to the next
  RowParts parts = {};                // of lists; those rows list a block for each part at least
  void* scratch = nullptr;            // attend_scratch_size() bytes, 256-byte aligned
};

// Returns the bytes of scratch that attend() needs for tile scheduling and parts.
std::size_t attend_scratch_size(const Geometry& geometry, const RowParts& parts = {});

// Enqueues the work on `stream` of the current device (compute capability 9.0) and returns. Allocates nothing, reads
// nothing back, can be captured in a graph. The same inputs give the same bits.
cudaError_t attend(const AttendArgs& args, cudaStream_t stream);

// Enqueues Correction::mean after attend() with the same arguments: adds to the attention of each row, but the dense
// last ones, the blocks before its own segment that its list leaves out, each as 128 keys that all are its mean key,
// with its mean value. Of the means it takes k and v.
cudaError_t correct(const AttendArgs& args, const Pooled& pooled, std::int64_t dense_last_rows, cudaStream_t stream);

}  // namespace pbsattn::cuda
