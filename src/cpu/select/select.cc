// Chooses key blocks by their scores and the keep rule. The result is a bit mask, because lists of every row at 1M
// tokens would not fit a bounded workspace.
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <type_traits>

#include "core/keep_rule.h"
#include "core/score_traits.h"
#include "cpu/parallel.h"
#include "cpu/select/scores/scores.h"
#include "cpu/select/select.h"

namespace pbsattn::cpu {
namespace {

void set_range(std::uint64_t* mask, std::int64_t begin, std::int64_t end) {
  for (std::int64_t block = begin; block < end; ++block) set_bit(mask, block);
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

// Keeps the highest weights up to and including the one that brings their sum, which begins at `mass`, to `top_p` of
// the total. Reorders them.
void keep_top_p(float top_p, double total, double mass, std::span<ScoredBlock> blocks, std::uint64_t* mask) {
  if (mass > 0 && mass >= static_cast<double>(top_p) * total) return;
  // A heap, since most rows stop after a few of many blocks.
  std::make_heap(blocks.begin(), blocks.end(), by_share);
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

// Applies the keep rule to a row's weights, whose shares of `total` are the blocks' scores. They may go on to the
// diagonal: then what is always kept counts first toward top_p, or competes with the rest.
void keep_by_rule(const StageContext& c, std::int64_t head, std::int64_t row, double total,
                  std::span<ScoredBlock> blocks, std::uint64_t* mask) {
  const Options& options = c.options(head);
  const std::int64_t own_begin = c.geometry().own_begin(row);
  const std::span<ScoredBlock> before = blocks.first(static_cast<std::size_t>(own_begin));
  // A NaN anywhere makes every share NaN, which counts as 0.
  if (!(total > 0)) {
    if (options.rules == Rules::paper) set_range(mask, 0, own_begin);
    return;
  }
  const auto threshold = static_cast<double>(options.threshold);
  switch (options.keep) {
    case KeepRule::all: set_range(mask, 0, own_begin); break;
    case KeepRule::none:
    case KeepRule::vertical_slash:
    case KeepRule::coverage: break;
    case KeepRule::top_p: {
      if (!counts_kept_first(options.score)) {
        keep_top_p(options.top_p, total, 0, blocks, mask);
        break;
      }
      const std::int64_t sink = c.sink_block(head);
      double counted = blocks[sink].score;
      for (const ScoredBlock& b : blocks.subspan(before.size())) counted += b.score;
      std::swap(before[sink], before.back());
      keep_top_p(options.top_p, total, counted, before.first(before.size() - 1), mask);
      break;
    }
    case KeepRule::threshold:
      keep_at_least(threshold * total, before, mask);
      if (options.floor_top_p > 0.0F) keep_top_p(options.floor_top_p, total, 0, before, mask);
      break;
    case KeepRule::relative:
      keep_at_least(threshold * static_cast<double>(std::ranges::max_element(blocks, by_share)->score), before, mask);
      break;
    case KeepRule::top_k:
    case KeepRule::density:
      keep_highest(kept_count(options, own_begin, c.geometry().diagonal(row)), before, mask);
      break;
  }
}

std::span<ScoredBlock> listed(const float* weights, std::int64_t count, ScoredBlock* list) {
  for (std::int64_t b = 0; b < count; ++b) list[b] = {weights[b], static_cast<std::int32_t>(b)};
  return {list, static_cast<std::size_t>(count)};
}

// The same for the two lists of BlockScore::dual_band: a block is kept that either keeps; rules that count do so by the
// higher share.
void keep_by_either(const StageContext& c, std::int64_t head, std::int64_t row, Totals totals,
                    const SelectScratch& scratch, std::uint64_t* mask) {
  const Options& options = c.options(head);
  const std::int64_t blocks = c.geometry().diagonal(row) + 1;
  float* const second = scratch.weights + c.geometry().blocks();
  if (options.keep != KeepRule::top_k && options.keep != KeepRule::density) {
    keep_by_rule(c, head, row, totals.first, listed(scratch.weights, blocks, scratch.sorted), mask);
    keep_by_rule(c, head, row, totals.second, listed(second, blocks, scratch.sorted), mask);
    return;
  }
  const auto share = [](float weight, double total) {
    return total > 0 ? static_cast<float>(static_cast<double>(weight) / total) : 0.0F;
  };
  double total = 0;
  for (std::int64_t b = 0; b < blocks; ++b)
    total += scratch.weights[b] = std::max(share(scratch.weights[b], totals.first), share(second[b], totals.second));
  keep_by_rule(c, head, row, total, listed(scratch.weights, blocks, scratch.sorted), mask);
}

// One row by a score that is made row by row.
void select_row(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch,
                std::uint64_t* mask) {
  const Geometry& g = c.geometry();
  const auto keep = [&](double total, std::int64_t blocks) {
    keep_by_rule(c, head, row, total, listed(scratch.weights, blocks, scratch.sorted), mask);
  };
  switch (c.spec.options.score) {
    case BlockScore::per_query: keep(score_per_query(c, head, row, scratch), g.diagonal(row) + 1); break;
    case BlockScore::antidiagonal: keep(score_by_keys(c, head, row, scratch), g.own_begin(row)); break;
    case BlockScore::antidiagonal_causal:
    case BlockScore::exact:
    case BlockScore::sampled: keep(score_by_keys(c, head, row, scratch), g.diagonal(row) + 1); break;
    case BlockScore::mean_pool_causal:
    case BlockScore::energy: keep(score_pooled_causal(c, head, row, scratch).first, g.diagonal(row) + 1); break;
    case BlockScore::dual_band:
      keep_by_either(c, head, row, score_pooled_causal(c, head, row, scratch), scratch, mask);
      break;
    case BlockScore::none:
    case BlockScore::mean_pool:
    case BlockScore::vertical_slash:
    case BlockScore::flexible: break;
  }
}

void select_strip(const StageContext& c, std::int64_t head, std::int64_t first_row, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const Options& options = c.options(head);
  const auto dim = static_cast<int>(g.shape.head_dim);
  const int rows = static_cast<int>(std::min<std::int64_t>(strip, g.rows() - first_row));
  if (options.score == BlockScore::mean_pool) {
    const auto pooled_rows = static_cast<int>(ceil_div(c.pass.far_blocks, row_tile) * row_tile);
    const std::int64_t far_head = c.pass.far_head(head, c.kv_head(head));
    for (int i = 0; i < rows; ++i) pool_queries(c, head, first_row + i, scratch.pooled + i * dim);
    c.f32_kernels.pack_queries({scratch.pooled, DType::f32, dim, nullptr}, rows, dim, scratch.packed);
    c.f32_kernels.scores(c.pass.pooled_keys + far_head * pooled_rows * dim, scratch.packed, pooled_rows, dim,
                         scratch.scores);
  }
  for (int i = 0; i < rows; ++i) {
    const std::int64_t row = first_row + i;
    if (g.own_begin(row) == 0 || row >= g.rows() - options.dense_last_rows) continue;
    std::uint64_t* const mask = c.pass.mask + (head * g.rows() + row) * c.pass.mask_words;
    if (options.score != BlockScore::mean_pool) {
      select_row(c, head, row, scratch, mask);
      continue;
    }
    const std::span blocks(scratch.sorted, static_cast<std::size_t>(g.own_begin(row)));
    for (std::size_t b = 0; b < blocks.size(); ++b)
      blocks[b] = {scratch.scores[b * strip + i] * options.scale, static_cast<std::int32_t>(b)};
    const double total = exponentiate(blocks);
    keep_by_rule(c, head, row, total, blocks, mask);
  }
}

}  // namespace

SelectScratch::SelectScratch(const detail::PlanSpec& spec, std::int64_t far_blocks, std::byte* memory) {
  const Geometry& g = spec.geometry;
  const Options& options = spec.options;
  const std::int64_t dim = g.shape.head_dim;
  const bool light = options.score <= BlockScore::per_query;
  const bool pattern = is_pattern(options.score);
  // Blocks before a row's own segment and those of it fill tiles of their own.
  const std::int64_t blocks = options.score == BlockScore::mean_pool ? far_blocks : g.blocks();
  const std::int64_t scored = (ceil_div(blocks, row_tile) + 1) * row_tile * strip;
  const auto take = [&](auto*& pointer, std::int64_t count) {
    constexpr std::int64_t line = cache_line;
    if (memory != nullptr) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + size);
    size += ceil_div(count * static_cast<std::int64_t>(sizeof *pointer), line) * line;
  };
  take(scores, scored);
  take(pooled, strip * dim);
  take(packed, strip * dim);
  take(sorted, blocks);
  take(weights, light ? blocks : 2 * blocks);
  take(sums, light ? 0 : scored);
  take(keys, light ? 0 : std::max(g.block, 8 * row_tile) * dim);
  take(exps, light ? 0 : std::max(g.block, row_tile) * strip);
  take(patches, light ? 0 : std::max(8 * dim * strip, pattern ? scored : 0));
  take(index, light ? 0 : strip);
  take(columns, pattern ? g.shape.kv_len : 0);
  take(diagonals, pattern ? g.shape.kv_len : 0);
  take(ranked, pattern ? g.shape.kv_len + 1 : 0);
  take(bins, options.score == BlockScore::flexible ? cell_bins : 0);
}

std::int64_t SelectScratch::bytes(const detail::PlanSpec& spec, std::int64_t far_blocks) {
  return SelectScratch(spec, far_blocks, nullptr).size;
}

void select(const StageContext& c) {
  const Geometry& g = c.geometry();
  const std::int64_t rows = g.rows();
  const BlockScore score = c.spec.options.score;
  const auto scratch_of = [&](int thread) { return SelectScratch(c.spec, c.pass.far_blocks, c.scratch(thread)); };
  std::fill_n(c.pass.mask, c.heads.q_count * rows * c.pass.mask_words, 0);
  if (c.pass.scored && (is_pattern(score) || score == BlockScore::dual_band))
    parallel_for(c.spec.threads, c.heads.q_count, [&](std::int64_t head, int thread) {
      if (score == BlockScore::dual_band)
        calibrate_bands(c, head, scratch_of(thread));
      else if (reads_scores(c.options(head)))
        mark_pattern(c, head, scratch_of(thread));
    });

  const std::int64_t strips = ceil_div(rows, strip);
  parallel_for(c.spec.threads, c.heads.q_count * strips, [&](std::int64_t item, int thread) {
    const std::int64_t head = item / strips;
    const std::int64_t begin = item % strips * strip;
    const std::int64_t end = std::min<std::int64_t>(begin + strip, rows);
    const Options& options = c.options(head);
    const bool keep_all = keeps_every_block(options);
    const std::int64_t sink = c.sink_block(head);
    if (c.pass.scored && reads_scores(options) && !is_pattern(score)) select_strip(c, head, begin, scratch_of(thread));
    for (std::int64_t row = begin; row < end; ++row) {
      std::uint64_t* const mask = c.pass.mask + (head * rows + row) * c.pass.mask_words;
      const bool dense = keep_all || row >= rows - options.dense_last_rows;
      set_range(mask, dense ? 0 : g.own_begin(row), g.diagonal(row) + 1);
      if (sink < g.own_begin(row)) set_bit(mask, sink);
      set_range(mask, 0, std::min<std::int64_t>(options.sink_blocks, g.diagonal(row) + 1));
      set_range(mask, std::max<std::int64_t>(g.diagonal(row) + 1 - options.local_blocks, 0), g.diagonal(row) + 1);
    }
  });
}

}  // namespace pbsattn::cpu
