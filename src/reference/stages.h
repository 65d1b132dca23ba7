// The definition of every stage, for reading and for testing backends against.
//
//     Head head = load_head(inputs, geometry, batch, q_head);
//     order   = order_keys(geometry, key_scores(head, geometry, scale));        // permute
//     scores  = row_scores(head, options, geometry, row, order, pool_keys(head, geometry, order));
//     list    = select_blocks(options, geometry, row, scores, order);           // select
//     result  = attend_query(head, geometry, scale, query, order, list);        // attend
//
// Everything is computed in double: backends work in float32 and may differ from here by float32
// rounding, and by which of two keys or blocks comes first when their scores agree that closely.
#pragma once

#include <cstdint>
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

// Mean of each block of permuted keys, [permuted_len() / block][head_dim], rounded to k's dtype.
Matrix pool_keys(const Head& head, const Geometry& geometry, std::span<const std::int32_t> order);

// -------------------------------------------------------------------------------------- select (select.cc)

// Mean of the queries of a row, [head_dim], rounded to q's dtype. A row of fewer than `block` queries is
// divided by their number under Rules::paper and by `block` under Rules::reference_code.
std::vector<double> pool_query(const Head& head, const Geometry& geometry, Rules rules, std::int64_t row);

// BlockScore::mean_pool: softmax over blocks 0 .. own_begin-1 of pooled query . pooled key * scale,
// [own_begin]; NaN becomes 0.
std::vector<double> block_scores(std::span<const double> pooled_query, const Matrix& pooled_keys,
                                 std::int64_t own_begin, double scale);

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

// softmax in place; NaN throughout if a score is NaN or +inf, or all are -inf.
void softmax(std::span<double> scores);

// What options.score gives blocks 0 .. own_begin-1 of a row (antidiagonal_causal, exact: 0 .. diagonal); empty for
// none.
std::vector<double> row_scores(const Head& head, const Options& options, const Geometry& geometry, std::int64_t row,
                               std::span<const std::int32_t> order, const Matrix& pooled_keys);

// The key blocks row attends to, ascending: what the keep rule takes of blocks 0 .. own_begin-1 (`scores`, from
// row_scores()), the block of those whose slots hold token 0, sink and local blocks, and the
// row's own segment up to its diagonal.
std::vector<std::int32_t> select_blocks(const Options& options, const Geometry& geometry, std::int64_t row,
                                        std::span<const double> scores, std::span<const std::int32_t> order);

// -------------------------------------------------------------------------------------- attend (attend.cc)

struct QueryResult {
  std::vector<double> out;  // [head_dim]
  double lse = 0;           // log of the sum of exp(q . k * scale) over the visible keys
};

// Attention of one query over the blocks listed for its row. Exact: weights are not rounded to the input's
// dtype, and backends that do so are measured against this.
QueryResult attend_query(const Head& head, const Geometry& geometry, double scale, std::int64_t query,
                         std::span<const std::int32_t> order, std::span<const std::int32_t> list);

// ------------------------------------------------------------------------------- whole calls (executor.cc)

// Stages one and two for all heads. options.scale is resolved (not 0), as Plan::options() gives it.
Trace decide(const Inputs& inputs, const Options& options, const Geometry& geometry);

// Stage three over any order and lists, a backend's own for instance.
void attend(const Inputs& inputs, const Options& options, const Geometry& geometry, const Trace& trace,
            const Outputs& outputs);

}  // namespace pbsattn::reference
