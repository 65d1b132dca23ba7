// The permute stage on Hopper: what it takes and its launches.
//
// A launch enqueues its work on `stream` of the current device and returns; it allocates nothing and reads nothing
// back. To work pass by pass, give the pass's head counts and pointers advanced to its first head:
// the bits of a head's result don't depend on which other heads go with it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/geometry.h"
#include "cuda/memory/arrays.h"

namespace pbsattn::cuda {

// Views are of f16 or bf16, all alike, with 16-byte aligned data and strides of multiples of 8 elements.
struct PermuteArgs {
  Geometry geometry;             // block 128; widths of limits.h; at least one complete segment
  bool divide_by_count = false;  // means of tail blocks: by their tokens, else by the block size
  float scale = 0;
  float softcap = 0;  // 0: none
  Permutation permutation = Permutation::last_queries;
  Inputs inputs = {};            // with order_weights, in device memory, where the order is learned
  KeyOrder kept = {};            // of Permutation::arrival, in device memory: read and written where it isn't null
  std::int64_t kept_blocks = 0;  // the first, whole segments, that `permuted` and `pooled` have already: not read
  Permuted permuted = {};
  Pooled pooled = {};       // `q`, `v` and `own` may be null
  void* scratch = nullptr;  // permute_scratch_size() bytes
};

// Returns the bytes of scratch that permute() needs.
std::size_t permute_scratch_size(const Geometry& geometry);

// Enqueues the order of the keys, keys and values in it, and all means.
cudaError_t permute(const PermuteArgs& args, cudaStream_t stream);

// Enqueues the means and sink blocks of keys that stay where they are: order_heads is kv_heads, and a scale and scratch
// are not read. Writes pooled.own in place of pooled.k where it isn't null, and sink blocks alone where all means are.
cudaError_t pool(const PermuteArgs& args, cudaStream_t stream);

}  // namespace pbsattn::cuda
