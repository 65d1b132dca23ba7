// Chooses key blocks: pooled queries against pooled keys, softmax over the blocks before the row's own
// segment, and the keep rule. The result is a bit mask, because lists of every row at 1M tokens would not
// fit a bounded workspace.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "core/keep_rule.h"
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
  c.f32_kernels.sum_rows(queries, static_cast<int>(count), dim, pooled);
  const auto divisor = static_cast<float>(c.spec.options.rules == Rules::paper ? count : g.block);
  for (int d = 0; d < dim; ++d) pooled[d] /= divisor;
  c.f32_kernels.round_row(queries.dtype, dim, pooled);
}

// Turns scores into exp(score - max) and returns their sum.
double exponentiate(std::span<ScoredBlock> blocks) {
  float max = -std::numeric_limits<float>::infinity();
  for (const ScoredBlock& b : blocks) max = std::max(max, b.score);
  double total = 0;
  for (ScoredBlock& b : blocks) total += b.score = std::exp(b.score - max);
  return total;
}

bool by_share(const ScoredBlock& a, const ScoredBlock& b) {
  return a.score != b.score ? a.score < b.score : a.block > b.block;
}

// Keeps the highest weights up to and including the one that brings their sum to `top_p` of the total. Reorders them.
void keep_top_p(float top_p, double total, std::span<ScoredBlock> blocks, std::uint64_t* mask) {
  // A heap, since most rows stop after a few of many blocks.
  std::make_heap(blocks.begin(), blocks.end(), by_share);
  double mass = 0;
  for (auto end = blocks.end(); end != blocks.begin(); --end) {
    std::pop_heap(blocks.begin(), end, by_share);
    const ScoredBlock& best = *(end - 1);
    set_bit(mask, best.block);
    mass += best.score;
    if (mass >= static_cast<double>(top_p) * total) return;
  }
}

void keep_at_least(double least, std::span<const ScoredBlock> blocks, std::uint64_t* mask) {
  for (const ScoredBlock& b : blocks)
    if (static_cast<double>(b.score) >= least) set_bit(mask, b.block);
}

// Keeps the highest weights. Reorders them.
void keep_highest(std::int64_t count, std::span<ScoredBlock> blocks, std::uint64_t* mask) {
  if (count == 0) return;
  const auto last = blocks.begin() + count;
  std::nth_element(blocks.begin(), last - 1, blocks.end(),
                   [](const ScoredBlock& a, const ScoredBlock& b) { return by_share(b, a); });
  for (auto b = blocks.begin(); b != last; ++b) set_bit(mask, b->block);
}

// Applies the keep rule to a row's weights, whose shares of `total` are the blocks' scores.
void keep_by_rule(const StageContext& c, std::int64_t row, double total, std::span<ScoredBlock> blocks,
                  std::uint64_t* mask) {
  const Options& options = c.spec.options;
  // A NaN anywhere makes every share NaN, which counts as 0.
  if (!(total > 0)) {
    if (options.rules == Rules::paper) set_range(mask, 0, static_cast<std::int64_t>(blocks.size()));
    return;
  }
  const auto threshold = static_cast<double>(options.threshold);
  switch (options.keep) {
    case KeepRule::all:
    case KeepRule::none:
    case KeepRule::vertical_slash:
    case KeepRule::coverage: break;
    case KeepRule::top_p: keep_top_p(options.top_p, total, blocks, mask); break;
    case KeepRule::threshold:
      keep_at_least(threshold * total, blocks, mask);
      if (options.floor_top_p > 0.0F) keep_top_p(options.floor_top_p, total, blocks, mask);
      break;
    case KeepRule::relative:
      keep_at_least(threshold * static_cast<double>(std::ranges::max_element(blocks, by_share)->score), blocks, mask);
      break;
    case KeepRule::top_k:
    case KeepRule::density:
      keep_highest(kept_count(options, c.geometry().own_begin(row), c.geometry().diagonal(row)), blocks, mask);
      break;
  }
}

// A thread's memory for a strip of rows.
struct Scratch {
  Scratch(const StageContext& c, int thread) {
    const std::int64_t dim = c.geometry().shape.head_dim;
    const std::int64_t pooled_rows = ceil_div(c.pass.far_blocks, row_tile) * row_tile;
    scores = reinterpret_cast<float*>(c.scratch(thread));
    pooled = scores + pooled_rows * strip;
    packed = pooled + strip * dim;
    sorted = reinterpret_cast<ScoredBlock*>(packed + strip * dim);
    weights = reinterpret_cast<float*>(sorted + c.pass.far_blocks);
  }
  float* scores;        // [far_blocks up to a row_tile][strip]
  float* pooled;        // [strip][head_dim]
  float* packed;        // [strip][head_dim] packed
  ScoredBlock* sorted;  // [far_blocks]
  float* weights;       // [far_blocks]
};

// BlockScore::per_query: the sum over the row's queries of each block's share of their softmax. Returns the sum of all
// of these: the number of queries, or NaN if a query's softmax has no value.
double score_per_query(const StageContext& c, std::int64_t head, std::int64_t row, const float* keys,
                       const Scratch& scratch, std::span<ScoredBlock> blocks) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  const auto visible = static_cast<int>(blocks.size());
  alignas(cache_line) std::array<float, strip> max;
  alignas(cache_line) std::array<float, strip> sum;
  std::fill_n(scratch.weights, visible, 0.0F);
  for (std::int64_t token = g.row_begin(row); token < g.row_end(row); token += strip) {
    const int queries = static_cast<int>(std::min<std::int64_t>(strip, g.row_end(row) - token));
    c.f32_kernels.pack_queries(c.q_rows(head, token - g.q_offset()), queries, dim, scratch.packed);
    c.f32_kernels.score_keys(keys, scratch.packed, visible, dim, c.scale_log2(), max.data(), sum.data(),
                             scratch.scores);
    for (int i = 0; i < queries; ++i)
      if (!(sum[i] > 0.0F)) return std::nan("");
    for (int i = 0; i < strip; ++i) sum[i] = i < queries ? 1.0F / sum[i] : 0.0F;
    c.f32_kernels.weigh_keys(scratch.scores, 1, visible, sum.data(), scratch.weights);
  }
  for (int b = 0; b < visible; ++b) blocks[b] = {scratch.weights[b], b};
  return static_cast<double>(g.row_end(row) - g.row_begin(row));
}

void select_strip(const StageContext& c, std::int64_t head, std::int64_t first_row, int thread) {
  const Geometry& g = c.geometry();
  const Options& options = c.spec.options;
  const auto dim = static_cast<int>(g.shape.head_dim);
  const auto pooled_rows = static_cast<int>(ceil_div(c.pass.far_blocks, row_tile) * row_tile);
  const std::int64_t far_head = c.pass.far_head(head, c.kv_head(head));
  const int rows = static_cast<int>(std::min<std::int64_t>(strip, g.rows() - first_row));
  const Scratch scratch(c, thread);
  const float* const keys = c.pass.pooled_keys + far_head * pooled_rows * dim;

  if (options.score == BlockScore::mean_pool) {
    for (int i = 0; i < rows; ++i) pool_queries(c, head, first_row + i, scratch.pooled + i * dim);
    c.f32_kernels.pack_queries({scratch.pooled, DType::f32, dim, nullptr}, rows, dim, scratch.packed);
    c.f32_kernels.scores(keys, scratch.packed, pooled_rows, dim, scratch.scores);
  }
  for (int i = 0; i < rows; ++i) {
    const std::int64_t row = first_row + i;
    const std::span blocks(scratch.sorted, static_cast<std::size_t>(g.own_begin(row)));
    if (blocks.empty() || row >= g.rows() - options.dense_last_rows) continue;
    double total = 0;
    if (options.score == BlockScore::mean_pool) {
      for (std::size_t b = 0; b < blocks.size(); ++b)
        blocks[b] = {scratch.scores[b * strip + i] * options.scale, static_cast<std::int32_t>(b)};
      total = exponentiate(blocks);
    } else {
      total = score_per_query(c, head, row, keys, scratch, blocks);
    }
    keep_by_rule(c, row, total, blocks, c.pass.mask + (head * g.rows() + row) * c.pass.mask_words);
  }
}

}  // namespace

void select(const StageContext& c) {
  const Geometry& g = c.geometry();
  const Options& options = c.spec.options;
  const std::int64_t rows = g.rows();
  const bool keep_all = keeps_every_block(options);
  const std::int64_t strips = ceil_div(rows, strip);
  parallel_for(c.spec.threads, c.heads.q_count * strips, [&](std::int64_t item, int thread) {
    const std::int64_t head = item / strips;
    const std::int64_t begin = item % strips * strip;
    const std::int64_t end = std::min<std::int64_t>(begin + strip, rows);
    const std::int64_t sink = c.pass.permuted ? c.pass.sink_block[c.pass.far_head(head, c.kv_head(head))] : 0;
    std::uint64_t* const masks = c.pass.mask + head * rows * c.pass.mask_words;
    std::fill(masks + begin * c.pass.mask_words, masks + end * c.pass.mask_words, 0);
    if (c.pass.scored) select_strip(c, head, begin, thread);
    for (std::int64_t row = begin; row < end; ++row) {
      std::uint64_t* const mask = masks + row * c.pass.mask_words;
      const bool dense = keep_all || row >= rows - options.dense_last_rows;
      set_range(mask, dense ? 0 : g.own_begin(row), g.diagonal(row) + 1);
      if (sink < g.own_begin(row)) set_bit(mask, sink);
      set_range(mask, 0, std::min<std::int64_t>(options.sink_blocks, g.diagonal(row) + 1));
      set_range(mask, std::max<std::int64_t>(g.diagonal(row) + 1 - options.local_blocks, 0), g.diagonal(row) + 1);
    }
  });
}

}  // namespace pbsattn::cpu
