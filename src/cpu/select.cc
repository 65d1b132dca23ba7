// Chooses key blocks: pooled queries against pooled keys, softmax over the blocks before the row's own
// segment, and the keep rule. The result is a bit mask, because lists of every row at 1M tokens would not
// fit a bounded workspace.
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "cpu/pool.h"
#include "cpu/stages.h"

namespace pbsattn::cpu {
namespace {

struct ScoredBlock {
  float score;
  std::int32_t block;
};

void set_bit(std::uint64_t* mask, std::int64_t block) {
  mask[block / 64] |= std::uint64_t{1} << (block % 64);
}

void set_range(std::uint64_t* mask, std::int64_t begin, std::int64_t end) {
  for (std::int64_t block = begin; block < end; ++block) set_bit(mask, block);
}

// The mean of row r's queries, in their dtype.
void pool_queries(const StageContext& c, std::int64_t head, std::int64_t row, float* pooled) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  const std::int64_t begin = g.row_begin(row);
  const std::int64_t count = g.row_end(row) - begin;
  const Rows queries = c.q_rows(head, begin - g.q_offset());
  std::fill_n(pooled, dim, 0.0F);
  for (int i = 0; i < count; ++i) c.f32_kernels.add_row(queries.at(i), queries.dtype, dim, pooled);
  const auto divisor = static_cast<float>(c.spec.options.rules == Rules::paper ? count : g.block);
  for (int d = 0; d < dim; ++d) pooled[d] /= divisor;
  c.f32_kernels.round_row(queries.dtype, dim, pooled);
}

// Keeps the highest shares of softmax(scores) up to and including the one that reaches top_p.
void keep_top_p(const Options& options, std::span<ScoredBlock> blocks, std::uint64_t* mask) {
  float max = -std::numeric_limits<float>::infinity();
  for (const ScoredBlock& b : blocks) max = std::max(max, b.score);
  double total = 0;
  for (ScoredBlock& b : blocks) total += b.score = std::exp(b.score - max);
  // A NaN anywhere makes every share NaN, which counts as 0: none reaches top_p.
  const bool shares_exist = total > 0;
  const auto by_share = [](const ScoredBlock& a, const ScoredBlock& b) {
    return a.score != b.score ? a.score < b.score : a.block > b.block;
  };
  if (shares_exist) {
    // A heap, since most rows stop after a few of many blocks.
    std::make_heap(blocks.begin(), blocks.end(), by_share);
    double mass = 0;
    for (auto end = blocks.end(); end != blocks.begin(); --end) {
      std::pop_heap(blocks.begin(), end, by_share);
      const ScoredBlock& best = *(end - 1);
      set_bit(mask, best.block);
      mass += best.score;
      if (mass >= static_cast<double>(options.top_p) * total) return;
    }
  } else if (options.rules == Rules::paper) {
    for (const ScoredBlock& b : blocks) set_bit(mask, b.block);
  }
}

void select_strip(const StageContext& c, std::int64_t head, std::int64_t first_row, int thread) {
  const Geometry& g = c.geometry();
  const Options& options = c.spec.options;
  const auto dim = static_cast<int>(g.shape.head_dim);
  const auto pooled_rows = static_cast<int>(ceil_div(c.pass.far_blocks, row_tile) * row_tile);
  const std::int64_t far_head = c.pass.far_head(head, c.kv_head(head));
  const int rows = static_cast<int>(std::min<std::int64_t>(strip, g.rows() - first_row));
  float* const scores = reinterpret_cast<float*>(c.scratch(thread));
  float* const pooled = scores + static_cast<std::int64_t>(pooled_rows) * strip;
  float* const packed = pooled + strip * dim;
  auto* const sorted = reinterpret_cast<ScoredBlock*>(packed + strip * dim);

  for (int i = 0; i < rows; ++i) pool_queries(c, head, first_row + i, pooled + i * dim);
  c.f32_kernels.pack_queries({pooled, DType::f32, dim, nullptr}, rows, dim, packed);
  const float* const keys = c.pass.pooled_keys + far_head * pooled_rows * dim;
  c.f32_kernels.scores(keys, packed, pooled_rows, dim, scores);

  for (int i = 0; i < rows; ++i) {
    const std::int64_t visible = g.own_begin(first_row + i);
    for (std::int64_t b = 0; b < visible; ++b)
      sorted[b] = {scores[b * strip + i] * options.scale, static_cast<std::int32_t>(b)};
    std::uint64_t* const mask = c.pass.mask + (head * g.rows() + first_row + i) * c.pass.mask_words;
    keep_top_p(options, {sorted, static_cast<std::size_t>(visible)}, mask);
  }
}

}  // namespace

void select(const StageContext& c) {
  const Geometry& g = c.geometry();
  const Options& options = c.spec.options;
  const std::int64_t rows = g.rows();
  const bool keep_all = !c.pass.scored || options.top_p >= 1.0F;
  const std::int64_t strips = ceil_div(rows, strip);
  parallel_for(c.spec.threads, c.heads.q_count * strips, [&](std::int64_t item, int thread) {
    const std::int64_t head = item / strips;
    const std::int64_t begin = item % strips * strip;
    const std::int64_t end = std::min<std::int64_t>(begin + strip, rows);
    const std::int64_t sink = c.pass.permuted ? c.pass.sink_block[c.pass.far_head(head, c.kv_head(head))] : 0;
    std::uint64_t* const masks = c.pass.mask + head * rows * c.pass.mask_words;
    std::fill(masks + begin * c.pass.mask_words, masks + end * c.pass.mask_words, 0);
    if (!keep_all) select_strip(c, head, begin, thread);
    for (std::int64_t row = begin; row < end; ++row) {
      std::uint64_t* const mask = masks + row * c.pass.mask_words;
      const bool dense = keep_all || row >= rows - options.dense_last_rows;
      set_range(mask, dense ? 0 : g.own_begin(row), g.diagonal(row) + 1);
      if (sink < g.own_begin(row)) set_bit(mask, sink);
    }
  });
}

}  // namespace pbsattn::cpu
