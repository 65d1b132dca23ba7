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
         score == BlockScore::energy || score == BlockScore::dual_band || score == BlockScore::flexible ||
         score == BlockScore::two_step;
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

// Says how many queries, and keys, a patch of BlockScore::antidiagonal and antidiagonal_causal has: XAttention's
// stride.
inline constexpr int patch_tokens = 8;

// BlockScore::sampled takes this many of a row's queries, evenly spaced, the row's last among them: the i-th is
// sampled_query(). BlockScore::two_step takes the numbers in the options.
inline constexpr int most_sampled = 8;
inline std::int64_t sampled_queries(std::int64_t queries, std::int64_t most = most_sampled) {
  return std::min(queries, most);
}
inline std::int64_t sampled_query(std::int64_t queries, std::int64_t i, std::int64_t most = most_sampled) {
  return (i + 1) * queries / sampled_queries(queries, most) - 1;
}

// MInference's numbers, by which BlockScore::vertical_slash is: of the last queries it goes by, of the columns and of
// the diagonals it keeps at least. The first least_columns, and the diagonals of a distance under near_diagonals, come
// before all others.
namespace minference {
inline constexpr int last_queries = 64;
inline constexpr int least_columns = 30;
inline constexpr int least_diagonals = 50;
inline constexpr int near_diagonals = 100;
}  // namespace minference

// BlockScore::flexible goes by the last block of queries, Geometry::scoring_queries() as FlexPrefill's 128, and keeps
// everything where there are no more blocks than this.
inline constexpr int flexible_whole_blocks = 2;

// Names frequencies of RoPE, [begin, end) of those of `pairs` columns, the fastest first: frequency i turns columns i
// and i + pairs.
struct FrequencyBand {
  std::int64_t begin, end;

  constexpr std::int64_t count() const { return end - begin; }
  constexpr bool has(std::int64_t frequency) const { return frequency >= begin && frequency < end; }
};
// Return the bands of BlockScore::dual_band: the faster half of the frequencies, and the slower three quarters.
constexpr FrequencyBand fast_band(std::int64_t pairs) {
  return {0, pairs / 2};
}
constexpr FrequencyBand slow_band(std::int64_t pairs) {
  return {pairs - pairs * 3 / 4, pairs};
}
// A band's root mean square is divided by that of all columns, or by this where that is less.
inline constexpr double least_root_mean_square = 1e-6;

}  // namespace pbsattn
