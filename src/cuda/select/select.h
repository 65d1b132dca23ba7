// The select stage on Hopper: what it takes and its launch. Scores that have launches of their own are in scores/.
//
// A launch enqueues its work on `stream` of the current device and returns; it allocates nothing and reads nothing
// back. To work head group by head group, pass the group's head counts and pointers advanced to its first head:
// the bits of a head's result don't depend on which other heads go with it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/geometry.h"
#include "cuda/select/head_options.h"

namespace pbsattn::cuda {

struct SelectArgs {
  Geometry geometry;
  std::int64_t order_heads = 0;  // heads of pooled_k and sink_block
  DType dtype = DType::bf16;
  Options options;                            // as Plan::options() gives them
  std::span<const Options> heads = {};        // of each query head, where they differ,
  const HeadOptions* head_options = nullptr;  // and their rules in device memory
  const void* pooled_k = nullptr;             // [batch][order_heads][pooled_blocks][head_dim]
  std::int64_t pooled_blocks = 0;             // at least permuted_blocks()
  const void* pooled_own = nullptr;           // as in PermuteArgs, where pools_own() says so
  const void* pooled_q = nullptr;             // [batch][q_heads][rows][head_dim]
  // Of the scores that have launches of their own.
  ConstView q = {}, k = {};
  const void* permuted_k = nullptr;  // [batch][order_heads][permuted_len][head_dim]; null: keys are where they were
  void* scratch = nullptr;
  std::size_t scratch_bytes = 0;  // score_scratch_size(); with less, score_mass() cuts work finer, to 16 rows of a head
  const std::int32_t* sink_block = nullptr;
  // Lists of tile [batch][q_head][row], as attend() reads them. Rows keep room for all their causal blocks, so a list's
  // place is known beforehand and no pass over the counts is needed.
  std::int64_t* row_start = nullptr;  // [tile]
  std::int32_t* row_count = nullptr;  // [tile]
  std::int32_t* block = nullptr;      // [batch * q_heads * causal_blocks_per_head()]
};
cudaError_t select(const SelectArgs& args, cudaStream_t stream);

}  // namespace pbsattn::cuda
