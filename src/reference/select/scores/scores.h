// Stage two, the block scores: the attention mass that a row's queries are expected to put on each key block.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "reference/head.h"

namespace pbsattn::reference {

// A row's scores of blocks 0 .. own_begin-1, or 0 .. diagonal for those of all causal blocks: one list, or two of which
// each keeps blocks.
using RowScores = std::vector<std::vector<double>>;

// Returns the mean of a row's queries, [head_dim], rounded to q's dtype. The sum of a row of fewer than `block` queries
// is divided as divides_by_count() tells (core/score_traits.h).
std::vector<double> pool_query(const Head& head, const Options& options, const Geometry& geometry, std::int64_t row);

// Scores by BlockScore::mean_pool, mean_pool_causal or dual_band: softmax over the first `blocks` pooled keys of pooled
// query . pooled key as logits; NaN becomes 0.
std::vector<double> block_scores(std::span<const double> pooled_q, const Matrix& pooled_k, std::int64_t blocks,
                                 const Logits& logits);

// Returns the tokens of a row's queries that a score samples: `most` of them, evenly spaced, or all.
std::vector<std::int64_t> sampled_tokens(const Geometry& geometry, std::int64_t row, std::int64_t most);

// Returns the mean over queries, given by their tokens, of softmax over blocks of query . pooled key as
// logits.
std::vector<double> pooled_shares(const Head& head, const Geometry& geometry, const Matrix& causal_k,
                                  const Logits& logits, std::span<const std::int64_t> tokens);

// Scores by BlockScore::per_query, [diagonal + 1]: the mean over the row's queries of softmax over all causal blocks of
// query . pooled key as logits; `causal_k` are those pooled keys. NaN becomes 0.
std::vector<double> per_query_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                     const Matrix& causal_k, const Logits& logits);

// Scores by BlockScore::antidiagonal, [own_begin], or, if causal, antidiagonal_causal, [diagonal + 1]. Patches are
// aligned to token 0; queries and keys of a patch that aren't there count 0. The mean of a patch's products is its
// logit's. NaN becomes 0.
std::vector<double> antidiagonal_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                        std::span<const std::int32_t> order, bool causal, const Logits& logits);

// Scores by BlockScore::exact, [diagonal + 1]: the mean over the row's queries of their softmax over all visible keys,
// summed by block. NaN becomes 0.
std::vector<double> exact_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                 std::span<const std::int32_t> order, const Logits& logits);

// Scores by BlockScore::sampled, [diagonal + 1]: the mean of exact_scores() over sampled_queries() of the row's queries
// and of per_query_scores() over all of them. NaN becomes 0, throughout where the latter has no value.
std::vector<double> sampled_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                   std::span<const std::int32_t> order, const Matrix& causal_k, const Logits& logits);

// Scores by BlockScore::two_step, [diagonal + 1]: the mean of two shares, of which blocks that the second step doesn't
// read have no second. The first step's is per_query_scores() over options.two_step_queries of the row's queries. The
// second reads the own segment and blocks before it whose share is at least the row's threshold over two_step_reach: of
// two_step_exact queries the softmax over the visible keys of these blocks, and over each other block as `block` keys
// that all are its mean. 0 throughout where either step gives NaN.
std::vector<double> two_step_scores(const Head& head, const Options& options, const Geometry& geometry,
                                    std::int64_t row, std::span<const std::int32_t> order, const Matrix& causal_k);

// Scores by BlockScore::energy, [diagonal + 1]: exp of q . pooled key as logits, summed over the row's queries, as
// shares of its sum over the blocks that the row's last query sees whole. NaN becomes 0.
std::vector<double> energy_scores(const Head& head, const Geometry& geometry, std::int64_t row, const Matrix& causal_k,
                                  const Logits& logits);

// A band of BlockScore::dual_band (core/score_traits.h): the columns of head_dim that it reads, which rotate_half
// pairs, and the factor on their products. The factors follow from the root mean squares of all pooled queries and
// keys, so they depend on what comes later.
struct Band {
  std::vector<std::int64_t> columns;
  Logits logits;
};
std::vector<Band> calibrate_bands(const Head& head, const Options& options, const Geometry& geometry,
                                  const Matrix& pooled_own);
RowScores dual_band_scores(std::span<const double> pooled_q, const Matrix& causal_k, std::span<const Band> bands);

// What a head keeps by its columns and diagonals: for each row whether blocks 0 .. diagonal.
using Pattern = std::vector<std::vector<bool>>;

// Returns what BlockScore::vertical_slash keeps with its keep rule (MInference, arXiv 2407.02490). The last 64 queries'
// softmax over all keys, summed by key (column) and by distance (diagonal). Of the columns the `vertical` heaviest, at
// least 30, the first 30 before all others; of the diagonals the `slash` heaviest, at least 50, those of distance under
// 100 before all others. A block is kept that a column stands in or a diagonal passes through: MInference reads single
// columns, whole blocks read more.
//
// `margin`, of this and of the next, is lowered to the distance of the closest of a head's choices from its opposite: a
// share of the lighter mass's heavier rival, or a difference of shares. Within rounding backends may choose the
// opposite.
Pattern vertical_slash_pattern(const Head& head, const Options& options, const Geometry& geometry,
                               double* margin = nullptr);

// Returns what BlockScore::flexible keeps with its keep rule (FlexPrefill, arXiv 2502.20766).
//
//     The last block of queries' softmax over all keys gives columns' and distances' masses. Where their sums by block
//     are closer than tau (square root of the Jensen-Shannon divergence) to what the mean of these queries and the mean
//     keys of blocks predict, the head keeps of the pooled attention of all rows, highest first, as much as stays
//     within top_p of it, and of columns and distances min_budget tokens. Else it keeps as many blocks of columns, and
//     of distances, as the tokens that hold top_p of the mass would fill, and one more; min_budget at least.
//
// Block 0 and the diagonal are always among them; up to two blocks or min_budget tokens everything is. `pooled_own` are
// pool_own_keys().
Pattern flexible_pattern(const Head& head, const Options& options, const Geometry& geometry, const Matrix& pooled_own,
                         double* margin = nullptr);

// What the scores of a head's rows share.
struct Scoring {
  Matrix pooled_k;
  Matrix pooled_own;  // where pools_own() tells that the score reads it
  std::vector<Band> bands;
  Pattern pattern;  // of vertical_slash and flexible, whose scores are 1 for what is kept
  double pattern_margin = std::numeric_limits<double>::infinity();
};
Scoring prepare_scores(const Head& head, const Options& options, const Geometry& geometry,
                       std::span<const std::int32_t> order);

// Scores a row by options.score; no list for BlockScore::none.
RowScores row_scores(const Head& head, const Options& options, const Geometry& geometry, std::int64_t row,
                     std::span<const std::int32_t> order, const Scoring& scoring);

// Writes 0 for NaN.
void nan_to_zero(std::span<double> scores);

// Returns the places of scores from the highest down, of equal ones the lower first.
std::vector<std::int64_t> descending(std::span<const double> scores);

}  // namespace pbsattn::reference
