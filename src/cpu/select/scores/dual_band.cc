// BlockScore::dual_band (reference/select/scores/dual_band.cc defines it).
#include <algorithm>
#include <cmath>

#include "core/score_traits.h"
#include "cpu/select/scores/means.h"
#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {
namespace {

// Whether a column of head_dim belongs to the fast band, or to the slow one.
struct BandColumns {
  std::int64_t pairs;
  bool fast(std::int64_t d) const { return d < 2 * pairs && fast_band(pairs).has(d % pairs); }
  bool slow(std::int64_t d) const { return d < 2 * pairs && slow_band(pairs).has(d % pairs); }
};

}  // namespace

BandTotals score_dual_band(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const int dim = c.head_dim();
  const std::int64_t blocks = c.geometry().diagonal(row) + 1;
  pool_query(c, head, row, scratch.pooled_q);
  // A band's query is the row's with the other columns at 0.
  const BandColumns band{dim / 2};
  for (int d = 0; d < dim; ++d) {
    const float whole = scratch.pooled_q[d];
    scratch.pooled_q[d] = band.fast(d) ? whole : 0.0F;
    scratch.pooled_q[dim + d] = band.slow(d) ? whole : 0.0F;
  }
  c.f32_kernels.pack.queries({scratch.pooled_q, DType::f32, dim, nullptr}, 2, dim, scratch.packed);
  score_causal_means(c, head, row, scratch);
  const auto weigh = [&](int band_lane, float* weights) {
    const float factor = c.layout.band_factors[head * 2 + band_lane];
    const float most = c.spec.options.softcap;
    if (most == 0) return exponentials(scratch.scores, band_lane, blocks, factor, weights);
    for (std::int64_t b = 0; b < blocks; ++b) {
      float& score = scratch.scores[b * strip + band_lane];
      score = most * std::tanh(score * factor / most);
    }
    return exponentials(scratch.scores, band_lane, blocks, 1, weights);
  };
  return {.fast = weigh(0, scratch.weights), .slow = weigh(1, scratch.weights + c.geometry().blocks())};
}

void calibrate_bands(const StageContext& c, std::int64_t head, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const std::int64_t dim = g.shape.head_dim;
  const BandColumns band{dim / 2};
  struct Squares {
    double all = 0, fast = 0, slow = 0;
  };
  const auto add = [&](Squares& squares, const float* pooled) {
    for (std::int64_t d = 0; d < dim; ++d) {
      const double square = static_cast<double>(pooled[d]) * static_cast<double>(pooled[d]);
      squares.all += square;
      if (band.fast(d)) squares.fast += square;
      if (band.slow(d)) squares.slow += square;
    }
  };
  Squares queries;
  Squares keys;
  for (std::int64_t row = 0; row < g.rows(); ++row) {
    pool_query(c, head, row, scratch.pooled_q);
    add(queries, scratch.pooled_q);
  }
  for (std::int64_t b = 0; b < g.blocks(); ++b) add(keys, c.pooled_own(head) + b * dim);

  // The band's factor is the scale over its width's share and what pooling left of its root mean squares
  // (reference/select/scores/dual_band.cc).
  const auto factor = [&](double queries_left, double keys_left, std::int64_t pairs) {
    const auto width = static_cast<double>(2 * pairs);
    const auto whole = static_cast<double>(dim - dim % 2);
    const auto ratio = [&](double part, double all, std::int64_t rows) {
      return std::sqrt(part / (static_cast<double>(rows) * width)) /
             std::max(std::sqrt(all / (static_cast<double>(rows) * whole)), least_root_mean_square);
    };
    const double share = width / static_cast<double>(dim) * ratio(queries_left, queries.all, g.rows()) *
                         ratio(keys_left, keys.all, g.blocks());
    return static_cast<float>(static_cast<double>(c.spec.options.scale) / share);
  };
  c.layout.band_factors[head * 2] = factor(queries.fast, keys.fast, fast_band(band.pairs).count());
  c.layout.band_factors[head * 2 + 1] = factor(queries.slow, keys.slow, slow_band(band.pairs).count());
}

}  // namespace pbsattn::cpu
