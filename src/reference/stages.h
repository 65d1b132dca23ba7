// The definition of every stage, for reading and for testing backends against.
//
//     Head head = load_head(inputs, geometry, batch, q_head);
//     order   = order_keys(geometry, key_scores(head, geometry, scale));        // permute
//     scores  = row_scores(head, options, geometry, row, order, prepare_scores(head, options, geometry, order));
//     list    = select_blocks(options, geometry, row, scores, order);           // select
//     result  = attend_query(head, geometry, scale, query, order, list);        // attend
//
// Everything is computed in double: backends work in float32 and may differ from here by float32
// rounding, and by which of two keys or blocks comes first when their scores agree that closely.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "core/geometry.h"
#include "pbsattn/pbsattn.hpp"

namespace pbsattn::reference {

struct Matrix {
  Matrix(std::int64_t row_count, std::int64_t column_count)
      : rows(row_count), columns(column_count), values(static_cast<std::size_t>(row_count * column_count)) {}

  std::span<double> operator[](std::int64_t row) {
    return std::span(values).subspan(static_cast<std::size_t>(row * columns), static_cast<std::size_t>(columns));
  }
  std::span<const double> operator[](std::int64_t row) const {
    return std::span(values).subspan(static_cast<std::size_t>(row * columns), static_cast<std::size_t>(columns));
  }

  std::int64_t rows;
  std::int64_t columns;
  std::vector<double> values;
};

// What one query head of one batch entry sees: q [q_len][head_dim], k and v [kv_len][head_dim].
struct Head {
  Matrix q, k, v;
  DType q_dtype = DType::f32;  // pooled queries and keys are rounded to the dtype they came in
  DType k_dtype = DType::f32;
  DType v_dtype = DType::f32;
};
Head load_head(const Inputs& inputs, const Geometry& geometry, std::int64_t batch, std::int64_t q_head);

double dot(std::span<const double> a, std::span<const double> b);

// ------------------------------------------------------------------------------------ permute (permute.cc)

// Attention weight of each key of the complete segments, [permuted_len()]: the mean over the last
// scoring_queries() queries of softmax(q . k * scale) over those keys, without a causal mask. NaN
// throughout if one of the scores is NaN or +inf, or if all scores of one query are -inf.
std::vector<double> key_scores(const Head& head, const Geometry& geometry, double scale);

// The permuted sequence, [kv_len]: slot -> token. Within each complete segment keys stand in descending
// score, equal ones in token order, NaN last; the incomplete segment keeps its order.
std::vector<std::int32_t> order_keys(const Geometry& geometry, std::span<const double> scores);

// Mean of each block of permuted keys, [permuted_len() / block][head_dim], rounded to k's dtype, and of their values,
// rounded to v's.
Matrix pool_keys(const Head& head, const Geometry& geometry, std::span<const std::int32_t> order);
Matrix pool_values(const Head& head, const Geometry& geometry, std::span<const std::int32_t> order);
struct PooledBlocks {
  Matrix keys, values;
};

// The same in the original order of all blocks, the last one's sum divided by `block` under Rules::reference_code and
// by its keys under Rules::paper.
Matrix pool_original_keys(const Head& head, const Geometry& geometry, Rules rules);

// ------------------------------------------------------------------------------ select: scores (scores.cc)

// Mean of the queries of a row, [head_dim], rounded to q's dtype. A row of fewer than `block` queries is
// divided by their number under Rules::paper and by `block` under Rules::reference_code.
std::vector<double> pool_query(const Head& head, const Geometry& geometry, Rules rules, std::int64_t row);

// BlockScore::mean_pool, mean_pool_causal and dual_band: softmax over the first `blocks` pooled keys of pooled query .
// pooled key * scale; NaN becomes 0.
std::vector<double> block_scores(std::span<const double> pooled_query, const Matrix& pooled_keys, std::int64_t blocks,
                                 double scale);

// BlockScore::per_query: the mean over the row's queries of softmax over blocks 0 .. own_begin-1 of
// query . pooled key * scale, [own_begin]; NaN becomes 0.
std::vector<double> per_query_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                     const Matrix& pooled_keys, double scale);

// BlockScore::antidiagonal and, if causal, antidiagonal_causal (antidiagonal.cc): [own_begin] or [diagonal + 1].
// Patches are aligned to token 0; queries and keys of a patch that aren't there count 0. NaN becomes 0.
std::vector<double> antidiagonal_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                        std::span<const std::int32_t> order, bool causal, double scale);

// BlockScore::exact, [diagonal + 1]: the mean over the row's queries of their softmax over all visible keys, summed by
// block. NaN becomes 0.
std::vector<double> exact_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                 std::span<const std::int32_t> order, double scale);

// BlockScore::sampled, [diagonal + 1]: the mean of exact_scores() over sampled_queries() of the row's queries and of
// per_query_scores(), which counts 0 in the own segment. NaN becomes 0, throughout where the latter has no value.
std::vector<double> sampled_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                   std::span<const std::int32_t> order, const Matrix& pooled_keys, double scale);

// BlockScore::energy, [diagonal + 1]: exp(q . key * scale) summed over the row's queries, as shares of its sum over the
// blocks that the row's last query sees whole; `causal_keys` are those pooled keys. NaN becomes 0.
std::vector<double> energy_scores(const Head& head, const Geometry& geometry, std::int64_t row,
                                  const Matrix& causal_keys, double scale);

// softmax in place; NaN throughout if a score is NaN or +inf, or all are -inf.
void softmax(std::span<double> scores);

// A row's scores of blocks 0 .. own_begin-1, or 0 .. diagonal for those of all causal blocks: one list, or two of which
// each keeps blocks.
using RowScores = std::vector<std::vector<double>>;

// A band of BlockScore::dual_band (dual_band.cc): the columns of head_dim that it reads, and the factor on their
// products. The fast band has the first half of RoPE's frequencies, the slow one the last three quarters; a frequency i
// turns columns i and i + head_dim / 2, as rotate_half has it. The factors follow from the root mean squares of all
// pooled queries and keys, so they depend on what comes later.
struct Band {
  std::vector<std::int64_t> columns;
  double scale = 0;
};
std::vector<Band> calibrate_bands(const Head& head, const Options& options, const Geometry& geometry,
                                  const Matrix& pooled_keys);
RowScores dual_band_scores(std::span<const double> pooled_query, const Matrix& causal_keys,
                           std::span<const Band> bands);

// What a head keeps by its columns and diagonals (vertical_slash.cc): for each row whether blocks 0 .. diagonal.
using Pattern = std::vector<std::vector<bool>>;

// BlockScore::vertical_slash with its keep rule (MInference, arXiv 2407.02490). The last 64 queries' softmax over all
// keys, summed by key (column) and by distance (diagonal). Of the columns the `vertical` heaviest, at least 30, the
// first 30 before all others; of the diagonals the `slash` heaviest, at least 50, those of distance under 100 before
// all others. A block is kept that a column stands in or a diagonal passes through: MInference reads single columns,
// whole blocks read more.
//
// `margin`, of this and of the next, is lowered to the distance of the closest of a head's choices from its opposite: a
// share of the lighter mass's heavier rival, or a difference of shares. Within rounding backends may choose the
// opposite.
Pattern vertical_slash_pattern(const Head& head, const Options& options, const Geometry& geometry,
                               double* margin = nullptr);

// BlockScore::flexible with its keep rule (FlexPrefill, arXiv 2502.20766).
//
//     The last block of queries' softmax over all keys gives columns' and distances' masses. Where their sums by block
//     are closer than tau (square root of the Jensen-Shannon divergence) to what the mean of these queries and the mean
//     keys of blocks predict, the head keeps of the pooled attention of all rows, highest first, as much as stays
//     within top_p of it, and of columns and distances min_budget tokens. Else it keeps as many blocks of columns, and
//     of distances, as the tokens that hold top_p of the mass would fill, and one more; min_budget at least.
//
// Block 0 and the diagonal are always among them; up to two blocks or min_budget tokens everything is.
Pattern flexible_pattern(const Head& head, const Options& options, const Geometry& geometry, double* margin = nullptr);

// What the scores of a head's rows share.
struct Scoring {
  Matrix pooled_keys;
  Matrix original_keys;  // pool_original_keys(), of mean_pool_causal, energy and dual_band
  std::vector<Band> bands;
  Pattern pattern;  // of vertical_slash and flexible, whose scores are 1 for what is kept
  double pattern_margin = std::numeric_limits<double>::infinity();
};
Scoring prepare_scores(const Head& head, const Options& options, const Geometry& geometry,
                       std::span<const std::int32_t> order);

// What options.score gives a row; none for BlockScore::none.
RowScores row_scores(const Head& head, const Options& options, const Geometry& geometry, std::int64_t row,
                     std::span<const std::int32_t> order, const Scoring& scoring);

// ------------------------------------------------------------------------- select: keep rules (select.cc)

// The key blocks row attends to, ascending: what the keep rule takes of blocks 0 .. own_begin-1 (`scores`, from
// row_scores()), the block of those whose slots hold token 0, sink and local blocks, and the
// row's own segment up to its diagonal.
std::vector<std::int32_t> select_blocks(const Options& options, const Geometry& geometry, std::int64_t row,
                                        const RowScores& scores, std::span<const std::int32_t> order);

// -------------------------------------------------------------------------------------- attend (attend.cc)

struct QueryResult {
  std::vector<double> out;  // [head_dim]
  double lse = 0;           // log of the sum of exp(q . k * scale) over the visible keys
};

// Attention of one query over the blocks listed for its row. Exact: weights are not rounded to the input's dtype, and
// backends that do so are measured against this. Where every score is -inf every weight is 0, of which values that are
// not finite make NaN. With pooled blocks (Correction::mean) each block before the own segment that isn't listed counts
// as `block` more keys that all are its mean key, with its mean value.
QueryResult attend_query(const Head& head, const Geometry& geometry, double scale, std::int64_t query,
                         std::span<const std::int32_t> order, std::span<const std::int32_t> list,
                         const PooledBlocks* pooled = nullptr);

// ------------------------------------------------------------------------------- whole calls (executor.cc)

// Stages one and two for all heads. options.scale is resolved (not 0), as Plan::options() gives it.
Trace decide(const Inputs& inputs, const Options& options, const Geometry& geometry);

// Stage three over any order and lists, a backend's own for instance.
void attend(const Inputs& inputs, const Options& options, const Geometry& geometry, const Trace& trace,
            const Outputs& outputs);

}  // namespace pbsattn::reference
