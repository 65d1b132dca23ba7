// Stage one: keys that the last queries attend to most, or that are expected to be attended to, move to the front of
// their segment, so that they share blocks (paper, section 3.2).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "reference/head.h"

namespace pbsattn::reference {

// Returns the attention weight of each key of the complete segments, [permuted_len()]: the mean over the last
// scoring_queries() queries of softmax(logits of q . k) over those keys, without a causal mask. NaN throughout if one
// of the logits is NaN or +inf, or if all logits of one query are -inf.
std::vector<double> key_scores(const Head& head, const Geometry& geometry, const Logits& logits);

// Returns the score of each key of the complete segments under Permutation::learned, [permuted_len()]: the sum of
// weight
// * feature over the lengths of the key's pairs of columns and over its numbers; 0 throughout where all weights are 0.
// `weights` are those of the KV head, [head_dim / 2 + head_dim].
std::vector<double> learned_scores(const Head& head, const Geometry& geometry, std::span<const float> weights,
                                   RopePairs pairs);

// Returns the permuted sequence, [kv_len]: slot -> token. Within each complete segment keys stand in descending score,
// equal ones in token order, NaN last; the incomplete segment keeps its order.
std::vector<std::int32_t> order_keys(const Geometry& geometry, std::span<const double> scores);

// Returns the mean of each block of permuted keys, [permuted_len() / block][head_dim], rounded to k's dtype, or of
// their values, rounded to v's.
Matrix pool_keys(const Head& head, const Geometry& geometry, std::span<const std::int32_t> order);
Matrix pool_values(const Head& head, const Geometry& geometry, std::span<const std::int32_t> order);

// The means of a head's permuted blocks.
struct PooledBlocks {
  Matrix k, v;
};

// Returns the mean of each block of keys where they were, [blocks()][head_dim], rounded to k's dtype: a row reads those
// of its own segment. The last block's sum is divided as divides_by_count() tells (core/score_traits.h).
Matrix pool_own_keys(const Head& head, const Options& options, const Geometry& geometry);

}  // namespace pbsattn::reference
