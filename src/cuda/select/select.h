// The select stage on Hopper: what it takes and its launch. Scores that have launches of their own are in scores/.
//
// A launch enqueues its work on `stream` of the current device and returns; it allocates nothing and reads nothing
// back. To work pass by pass, give the pass's head counts, pointers advanced to its first head and the call's
// part_blocks: the bits of a head's result don't depend on which other heads go with it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/geometry.h"
#include "cuda/memory/arrays.h"
#include "cuda/select/head_options.h"

namespace pbsattn::cuda {

struct SelectArgs {
  Geometry geometry;
  Options options;                            // as Plan::options() gives them
  std::span<const Options> heads = {};        // of each query head, where they differ,
  const HeadOptions* head_options = nullptr;  // and what kernels read of them, in device memory
  Inputs inputs = {};                         // read by scores that have launches of their own, but for their dtype
  Permuted permuted = {};                     // k and sink_block are read
  Pooled pooled = {};                         // q, k and own, as far as the score reads means
  void* scratch = nullptr;
  std::size_t scratch_bytes = 0;  // score_scratch_size(); with less, score_mass() cuts work finer, to 16 rows of a head
  int part_blocks = 0;            // part_blocks_of() the whole call; of two_step
  BlockLists lists = {};          // written

  // Returns the options of all heads, or of each.
  std::span<const Options> option_sets() const { return heads.empty() ? std::span(&options, 1) : heads; }
  OptionsOfHeads options_of_heads() const {
    return {.all = head_options_of(options), .each = head_options, .q_heads = static_cast<int>(geometry.shape.q_heads)};
  }
};

// Returns how many key blocks of a row a thread block of two-step scores goes through. That hangs on the options and
// the whole call's shape, so that the heads of a pass change no bit. `order_heads`: heads of a batch entry that have an
// order.
int part_blocks_of(const Options& options, const Geometry& call, std::int64_t order_heads);

// Returns the bytes of scratch of a score, whose rows from the last `dense_last_rows` on need none.
std::size_t score_scratch_size(const Options& options, const Geometry& geometry, std::int64_t order_heads,
                               std::int64_t dense_last_rows, int part_blocks);

// Enqueues the lists of all rows.
cudaError_t select(const SelectArgs& args, cudaStream_t stream);

}  // namespace pbsattn::cuda
