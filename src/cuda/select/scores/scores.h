// Block scores that have launches of their own, a part of select(), whose arguments they take.
//
// They score the rows that aren't dense in every head: score b of a tile stands at the place of entry b of its list.
// NaN where the softmax of a query, or of a patch of queries, has no value.
#pragma once

#include <cstddef>

#include "core/keep_rule.h"
#include "cuda/select/select.h"

namespace pbsattn::cuda {

// Returns the bytes of scratch of a score.
std::size_t mass_scratch_size(BlockScore score, const Geometry& geometry, std::int64_t dense_last_rows);
std::size_t dual_band_scratch_size(const Geometry& geometry);
std::size_t vertical_slash_scratch_size(const Geometry& geometry);
std::size_t flexible_scratch_size(const Geometry& geometry);
std::size_t two_step_scratch_size(const Options& options, const Geometry& geometry, std::int64_t order_heads,
                                  std::int64_t dense_last_rows, int part_blocks);

// Returns where scores go: to the lists' places, [batch * q_heads * causal_blocks_per_head()].
inline float* scores_of(const SelectArgs& args) {
  return reinterpret_cast<float*>(args.lists.block);
}
// Returns how many of a head's rows come before those that are dense in every head.
inline std::int64_t scored_rows(const SelectArgs& args) {
  return std::max<std::int64_t>(args.geometry.rows() - common_dense_rows(args.option_sets()), 0);
}

cudaError_t score_per_query(const SelectArgs& args, cudaStream_t stream);
cudaError_t score_two_step(const SelectArgs& args, cudaStream_t stream);
// Scores antidiagonal, antidiagonal_causal and exact; sampled after score_per_query(), whose scores it averages its own
// into.
cudaError_t score_mass(const SelectArgs& args, cudaStream_t stream);
// Score 1 for the blocks before the own segment that the head's rule keeps, 0 for the others; nothing for heads with
// another rule.
cudaError_t score_vertical_slash(const SelectArgs& args, cudaStream_t stream);
cudaError_t score_flexible(const SelectArgs& args, cudaStream_t stream);
// These scores are logarithms of base 2 of shares, up to a constant of the row.
cudaError_t score_energy(const SelectArgs& args, cudaStream_t stream);
// Scores mean_pool_causal and dual_band, whose second score lies in scratch as the first does in its place.
cudaError_t score_means(const SelectArgs& args, cudaStream_t stream);

}  // namespace pbsattn::cuda
