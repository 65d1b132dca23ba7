// Block scores from the means of blocks.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {
namespace {

int up_to_tile(std::int64_t rows) {
  return static_cast<int>(ceil_div(rows, row_tile) * row_tile);
}

// scores[b][:] of blocks 0 .. diagonal against packed queries, by the keys as the row sees them.
void score_causal_blocks(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  const std::int64_t kv_head = c.kv_head(head);
  const float* const originals = c.pass.original_pooled + kv_head * up_to_tile(g.blocks()) * dim;
  c.f32_kernels.scores(originals, scratch.packed, up_to_tile(g.diagonal(row) + 1), dim, scratch.scores);
  if (!c.pass.permuted || g.own_begin(row) == 0) return;
  const float* const moved = c.pass.pooled_keys + c.pass.far_head(head, kv_head) * up_to_tile(c.pass.far_blocks) * dim;
  c.f32_kernels.scores(moved, scratch.packed, up_to_tile(g.own_begin(row)), dim, scratch.sums);
  std::copy_n(scratch.sums, g.own_begin(row) * strip, scratch.scores);
}

// weights[b] = exp(scores[b][lane] * scale - max); returns their sum.
double exponentials(const float* scores, int lane, std::int64_t blocks, float scale, float* weights) {
  float max = -std::numeric_limits<float>::infinity();
  for (std::int64_t b = 0; b < blocks; ++b) max = std::max(max, scores[b * strip + lane] * scale);
  double total = 0;
  for (std::int64_t b = 0; b < blocks; ++b) total += weights[b] = std::exp(scores[b * strip + lane] * scale - max);
  return total;
}

// weights[b] = the sum over the row's queries of exp(score), measured from the highest of all; returns their sum.
double energies(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  const float scale = c.spec.options.scale;
  const std::int64_t whole = g.row_end(row) / g.block;  // blocks that the row's last query sees whole
  float max = -std::numeric_limits<float>::infinity();
  std::fill_n(scratch.weights, g.diagonal(row) + 1, 0.0F);
  for (std::int64_t token = g.row_begin(row); token < g.row_end(row); token += strip) {
    const int queries = static_cast<int>(std::min<std::int64_t>(strip, g.row_end(row) - token));
    c.f32_kernels.pack_queries(c.q_rows(head, token - g.q_offset()), queries, dim, scratch.packed);
    score_causal_blocks(c, head, row, scratch);
    float highest = max;
    for (std::int64_t b = 0; b < whole; ++b)
      for (int i = 0; i < queries; ++i) highest = std::max(highest, scratch.scores[b * strip + i] * scale);
    const float carry = std::isinf(max) ? 0.0F : std::exp(max - highest);
    max = highest;
    for (std::int64_t b = 0; b < whole; ++b) {
      float sum = 0;
      for (int i = 0; i < queries; ++i) sum += std::exp(scratch.scores[b * strip + i] * scale - max);
      scratch.weights[b] = scratch.weights[b] * carry + sum;
    }
  }
  double total = 0;
  for (std::int64_t b = 0; b < whole; ++b) total += static_cast<double>(scratch.weights[b]);
  return total;
}

// Whether a column of head_dim belongs to the fast band, or to the slow one.
struct BandColumns {
  std::int64_t pairs;
  bool fast(std::int64_t d) const { return d < 2 * pairs && d % pairs < pairs / 2; }
  bool slow(std::int64_t d) const { return d < 2 * pairs && d % pairs >= pairs - pairs * 3 / 4; }
};

}  // namespace

void pool_queries(const StageContext& c, std::int64_t head, std::int64_t row, float* pooled) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  const std::int64_t begin = g.row_begin(row);
  const std::int64_t count = g.row_end(row) - begin;
  const Rows queries = c.q_rows(head, begin - g.q_offset());
  c.f32_kernels.sum_rows(queries, static_cast<int>(count), dim, pooled);
  const auto divisor = static_cast<float>(divides_by_count(c.spec.options) ? count : g.block);
  for (int d = 0; d < dim; ++d) pooled[d] /= divisor;
  c.f32_kernels.round_row(queries.dtype, dim, pooled);
}

double score_per_query(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  const std::int64_t kv_head = c.kv_head(head);
  // The blocks before the row's own segment, with keys as they were moved, and those of it, where they were.
  const auto far = static_cast<int>(g.own_begin(row));
  const int own = static_cast<int>(g.diagonal(row)) + 1 - far;
  const float* const far_keys =
      c.pass.pooled_keys + c.pass.far_head(head, kv_head) * up_to_tile(c.pass.far_blocks) * dim;
  const float* const own_keys = c.pass.original_pooled + (kv_head * up_to_tile(g.blocks()) + far) * dim;
  float* const own_exps = scratch.scores + up_to_tile(far) * strip;
  alignas(cache_line) std::array<float, 2 * strip> max;
  alignas(cache_line) std::array<float, 2 * strip> sum;
  std::fill_n(scratch.weights, far + own, 0.0F);
  for (std::int64_t token = g.row_begin(row); token < g.row_end(row); token += strip) {
    const int queries = static_cast<int>(std::min<std::int64_t>(strip, g.row_end(row) - token));
    c.f32_kernels.pack_queries(c.q_rows(head, token - g.q_offset()), queries, dim, scratch.packed);
    c.f32_kernels.score_keys(far_keys, scratch.packed, far, dim, c.scale_log2(), max.data(), sum.data(),
                             scratch.scores);
    c.f32_kernels.score_keys(own_keys, scratch.packed, own, dim, c.scale_log2(), max.data() + strip, sum.data() + strip,
                             own_exps);
    c.f32_kernels.score_factors(max.data(), sum.data(), 2, strip, c.scale_log2(), queries);
    for (int i = 0; i < queries; ++i)
      if (std::isnan(max[i])) return std::nan("");
    c.f32_kernels.weigh_keys(scratch.scores, 1, far, max.data(), scratch.weights);
    c.f32_kernels.weigh_keys(own_exps, 1, own, max.data() + strip, scratch.weights + far);
  }
  return static_cast<double>(g.row_end(row) - g.row_begin(row));
}

Totals score_pooled_causal(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const Options& options = c.spec.options;
  if (options.score == BlockScore::energy) return {.first = energies(c, head, row, scratch)};

  const auto dim = static_cast<int>(g.shape.head_dim);
  const std::int64_t blocks = g.diagonal(row) + 1;
  pool_queries(c, head, row, scratch.pooled);
  int lists = 1;
  if (options.score == BlockScore::dual_band) {
    // A band's query is the row's with the other columns at 0.
    const BandColumns band{dim / 2};
    for (int d = 0; d < dim; ++d) {
      const float whole = scratch.pooled[d];
      scratch.pooled[d] = band.fast(d) ? whole : 0.0F;
      scratch.pooled[dim + d] = band.slow(d) ? whole : 0.0F;
    }
    lists = 2;
  }
  c.f32_kernels.pack_queries({scratch.pooled, DType::f32, dim, nullptr}, lists, dim, scratch.packed);
  score_causal_blocks(c, head, row, scratch);
  if (lists == 1) return {.first = exponentials(scratch.scores, 0, blocks, options.scale, scratch.weights)};
  const float* const factors = c.pass.band_factors + head * 2;
  return {.first = exponentials(scratch.scores, 0, blocks, factors[0], scratch.weights),
          .second = exponentials(scratch.scores, 1, blocks, factors[1], scratch.weights + g.blocks())};
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
    pool_queries(c, head, row, scratch.pooled);
    add(queries, scratch.pooled);
  }
  const float* const originals = c.pass.original_pooled + c.kv_head(head) * up_to_tile(g.blocks()) * dim;
  for (std::int64_t b = 0; b < g.blocks(); ++b) add(keys, originals + b * dim);

  // The band's factor is the scale over its width's share and what pooling left of its root mean squares
  // (reference/dual_band.cc).
  const auto factor = [&](double queries_left, double keys_left, std::int64_t pairs) {
    const auto width = static_cast<double>(2 * pairs);
    const auto whole = static_cast<double>(dim - dim % 2);
    constexpr double least = 1e-6;
    const auto ratio = [&](double part, double all, std::int64_t rows) {
      return std::sqrt(part / (static_cast<double>(rows) * width)) /
             std::max(std::sqrt(all / (static_cast<double>(rows) * whole)), least);
    };
    const double share = width / static_cast<double>(dim) * ratio(queries_left, queries.all, g.rows()) *
                         ratio(keys_left, keys.all, g.blocks());
    return static_cast<float>(static_cast<double>(c.spec.options.scale) / share);
  };
  c.pass.band_factors[head * 2] = factor(queries.fast, keys.fast, dim / 2 / 2);
  c.pass.band_factors[head * 2 + 1] = factor(queries.slow, keys.slow, dim / 2 * 3 / 4);
}

}  // namespace pbsattn::cpu
