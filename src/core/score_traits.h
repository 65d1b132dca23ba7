// What a block score means, for every backend: what it reads, and how the keep rule takes it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn {

// Tells whether the score is a pattern of columns and diagonals, whose keep rule is its own.
inline bool is_pattern(BlockScore score) {
  return score == BlockScore::vertical_slash || score == BlockScore::flexible;
}

// Tells whether the score reads the means of the own segment's blocks, whose keys stay where they are.
inline bool pools_own(BlockScore score) {
  return score == BlockScore::per_query || score == BlockScore::sampled || score == BlockScore::mean_pool_causal ||
         score == BlockScore::energy || score == BlockScore::dual_band || score == BlockScore::flexible;
}

// Tells whether anything reads means of blocks.
inline bool reads_means(const Options& options) {
  return (options.score != BlockScore::vertical_slash && options.score != BlockScore::none) ||
         options.correction != Correction::none;
}

// Tells whether the mean of a tail block, of keys or of queries, is its sum divided by its tokens, not by the block
// size.
inline bool divides_by_count(const Options& options) {
  return options.rules == Rules::paper || options.score == BlockScore::flexible;
}

// Tells of a score of all causal blocks whether what is always kept counts first toward top_p, because the score shares
// out a row's whole attention. Else these blocks compete with the others.
inline bool counts_kept_first(BlockScore score) {
  return score == BlockScore::antidiagonal_causal || score == BlockScore::exact || score == BlockScore::sampled ||
         score == BlockScore::per_query;
}

// BlockScore::sampled takes this many of a row's queries, evenly spaced, the row's last among them: the i-th is
// sampled_query().
inline std::int64_t sampled_queries(std::int64_t queries) {
  return std::min<std::int64_t>(queries, 8);
}
inline std::int64_t sampled_query(std::int64_t queries, std::int64_t i) {
  return (i + 1) * queries / sampled_queries(queries) - 1;
}

}  // namespace pbsattn
