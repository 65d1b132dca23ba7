// Block scores that have launches of their own, a part of select().
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

// Scratch of the scores that have launches of their own.
std::size_t score_scratch_size(BlockScore score, const Geometry& geometry, std::int64_t dense_last_rows);
std::size_t dual_band_scratch_size(const Geometry& geometry);
std::size_t vertical_slash_scratch_size(const Geometry& geometry);
std::size_t flexible_scratch_size(const Geometry& geometry);

// Of the rows that select() doesn't list as dense, score b of a
// tile at the place of entry b of its list, [batch * q_heads * causal_blocks_per_head()]. NaN where the softmax of a
// query, or of a patch of queries, has no value.
struct ScoreArgs {
  Geometry geometry;
  std::int64_t order_heads = 0;
  BlockScore score = BlockScore::per_query;
  float scale = 0;
  std::int64_t dense_last_rows = 0;  // in every head
  OptionsOfHeads options = {};       // of score_vertical_slash and score_flexible
  const void* pooled_q = nullptr;    // as in SelectArgs, like all that follow
  const void* pooled_k = nullptr;
  const void* pooled_own = nullptr;
  std::int64_t pooled_blocks = 0;
  const void* permuted_k = nullptr;
  ConstView q, k;
  void* scratch = nullptr;
  std::size_t scratch_bytes = 0;
  float* scores = nullptr;
};
cudaError_t score_per_query(const ScoreArgs& args, cudaStream_t stream);
// antidiagonal, antidiagonal_causal, exact; sampled after score_per_query(), whose scores it averages its own into.
cudaError_t score_mass(const ScoreArgs& args, cudaStream_t stream);
// 1 for the blocks before the own segment that the head's rule keeps, 0 for the others; nothing for heads with another
// rule.
cudaError_t score_vertical_slash(const ScoreArgs& args, cudaStream_t stream);
cudaError_t score_flexible(const ScoreArgs& args, cudaStream_t stream);
// These scores are logarithms of base 2 of shares, up to a constant of the row.
cudaError_t score_energy(const ScoreArgs& args, cudaStream_t stream);
// mean_pool_causal and dual_band, whose second score lies in scratch as the first does in scores.
cudaError_t score_means(const ScoreArgs& args, cudaStream_t stream);

}  // namespace pbsattn::cuda
