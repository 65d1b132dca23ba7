// BlockScore::dual_band (Prism, arXiv 2602.08426): the mean of a block's rotated keys keeps little of RoPE's fast
// frequencies, which turn several times within a block, and their say is lost beside the slow ones'. So each band gets
// a softmax of its own, at a temperature that makes up for what pooling took.
#include <algorithm>
#include <cmath>

#include "core/score_traits.h"
#include "reference/select/scores/scores.h"

namespace pbsattn::reference {
namespace {

// Returns the columns that rotate with a band's frequencies.
std::vector<std::int64_t> columns(std::int64_t pairs, FrequencyBand band) {
  std::vector<std::int64_t> result;
  for (std::int64_t i = band.begin; i < band.end; ++i) {
    result.push_back(i);
    result.push_back(i + pairs);
  }
  return result;
}

double root_mean_square(const Matrix& m, std::span<const std::int64_t> of) {
  double squares = 0;
  for (std::int64_t r = 0; r < m.rows; ++r)
    for (const std::int64_t d : of) squares += m[r][d] * m[r][d];
  return std::sqrt(squares / static_cast<double>(m.rows * std::ssize(of)));
}

}  // namespace

std::vector<Band> calibrate_bands(const Head& head, const Options& options, const Geometry& geometry,
                                  const Matrix& pooled_own) {
  const std::int64_t dim = geometry.shape.head_dim;
  const std::int64_t pairs = dim / 2;
  Matrix pooled_q(geometry.rows(), dim);
  for (std::int64_t row = 0; row < geometry.rows(); ++row)
    std::ranges::copy(pool_query(head, options, geometry, row), pooled_q[row].begin());

  const auto all = columns(pairs, {0, pairs});
  const double queries = std::max(root_mean_square(pooled_q, all), least_root_mean_square);
  const double keys = std::max(root_mean_square(pooled_own, all), least_root_mean_square);
  std::vector<Band> bands;
  for (const auto& of : {columns(pairs, fast_band(pairs)), columns(pairs, slow_band(pairs))}) {
    const auto width = static_cast<double>(of.size());
    // What the band's logits would be divided by, relative to those of all columns: once for having fewer columns, and
    // once for what pooling left of their squares.
    const double share = width / static_cast<double>(dim) * root_mean_square(pooled_q, of) / queries *
                         root_mean_square(pooled_own, of) / keys;
    bands.push_back({of, Logits(options.scale / share, options.softcap)});
  }
  return bands;
}

RowScores dual_band_scores(std::span<const double> pooled_q, const Matrix& causal_k, std::span<const Band> bands) {
  RowScores scores;
  for (const Band& band : bands) {
    std::vector<double> query;
    query.reserve(band.columns.size());
    for (const std::int64_t d : band.columns) query.push_back(pooled_q[d]);
    Matrix keys(causal_k.rows, std::ssize(band.columns));
    for (std::int64_t b = 0; b < keys.rows; ++b)
      for (std::int64_t d = 0; d < keys.columns; ++d) keys[b][d] = causal_k[b][band.columns[d]];
    scores.push_back(block_scores(query, keys, keys.rows, band.logits));
  }
  return scores;
}

}  // namespace pbsattn::reference
