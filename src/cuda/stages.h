// The permute and select stages on Hopper: what they take and their launches. attend.h has the third stage.
//
// A launch enqueues its work on `stream` of the current device and returns; it allocates nothing and reads nothing
// back. To work head group by head group, pass the group's head counts and pointers advanced to its first head:
// the bits of a head's result don't depend on which other heads go with it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/geometry.h"
#include "cuda/rule.h"

namespace pbsattn::cuda {

inline constexpr int block_tokens = 128;            // the only block size of this backend
inline constexpr std::int64_t max_segment = 8192;   // a segment's scores and order live in shared memory
inline constexpr std::int64_t max_blocks = 49'152;  // a row's scores live in shared memory: 6 M tokens

// Key blocks that may be pruned: those of complete segments.
inline std::int64_t permuted_blocks(const Geometry& g) {
  return g.permuted_len() / block_tokens;
}

// Views are of f16 or bf16, all alike, with 16-byte aligned data and strides of multiples of 8 elements.
// `order_heads` is q_heads (OrderScope::query_head) or kv_heads (OrderScope::kv_head).
struct PermuteArgs {
  Geometry geometry;  // block 128; head_dim 64 or 128; at least one complete segment
  OrderScope scope = OrderScope::query_head;
  Rules rules = Rules::reference_code;
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
// geometry and rules, writes only pooled_q, sink_block, pooled_v and pooled_own, or pooled_k where pooled_own is null;
// sink_block alone where pooled_q is null.
cudaError_t pool(const PermuteArgs& args, cudaStream_t stream);

// Whether the score reads means of the own segment's blocks.
inline bool pools_own(BlockScore score) {
  return score == BlockScore::per_query || score == BlockScore::sampled || score == BlockScore::mean_pool_causal ||
         score == BlockScore::energy || score == BlockScore::dual_band || score == BlockScore::flexible;
}
// Whether any means are read.
inline bool reads_means(const Options& options) {
  return (options.score != BlockScore::vertical_slash && options.score != BlockScore::none) ||
         options.correction != Correction::none;
}
// How it divides the sums of parts of blocks.
inline Rules rules_of_means(const Options& options) {
  return options.score == BlockScore::flexible ? Rules::paper : options.rules;
}

// Scratch of the scores that have launches of their own.
std::size_t score_scratch_size(BlockScore score, const Geometry& geometry, std::int64_t dense_last_rows);
std::size_t dual_band_scratch_size(const Geometry& geometry);
std::size_t vertical_slash_scratch_size(const Geometry& geometry);
std::size_t flexible_scratch_size(const Geometry& geometry);

struct SelectArgs {
  Geometry geometry;
  std::int64_t order_heads = 0;  // heads of pooled_k and sink_block
  DType dtype = DType::bf16;
  Options options;                      // as Plan::options() gives them
  std::span<const Options> heads = {};  // of each query head, where they differ,
  const Rule* rules = nullptr;          // and their rules in device memory
  const void* pooled_k = nullptr;       // [batch][order_heads][pooled_blocks][head_dim]
  std::int64_t pooled_blocks = 0;       // at least permuted_blocks()
  const void* pooled_own = nullptr;     // as in PermuteArgs, where pools_own() says so
  const void* pooled_q = nullptr;       // [batch][q_heads][rows][head_dim]
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

// Scores that have launches of their own, a part of select(): of the rows that it doesn't list as dense, score b of a
// tile at the place of entry b of its list, [batch * q_heads * causal_blocks_per_head()]. NaN where the softmax of a
// query, or of a patch of queries, has no value.
struct ScoreArgs {
  Geometry geometry;
  std::int64_t order_heads = 0;
  BlockScore score = BlockScore::per_query;
  float scale = 0;
  std::int64_t dense_last_rows = 0;  // in every head
  HeadRules rules = {};              // of score_vertical_slash and score_flexible
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
