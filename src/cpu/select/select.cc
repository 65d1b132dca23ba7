// Chooses key blocks by their scores and the keep rule. The result is a bit mask, because lists of every row at 1M
// tokens would not fit a bounded workspace.
#include "cpu/select/select.h"

#include <algorithm>

#include "core/keep_rule.h"
#include "core/score_traits.h"
#include "cpu/parallel.h"
#include "cpu/select/keep.h"
#include "cpu/select/scores/scores.h"
#include "cpu/select/scores/two_step.h"

namespace pbsattn::cpu {
namespace {

// Selects for one row, which is `lane` of a strip.
void select_row(const StageContext& c, std::int64_t head, std::int64_t row, int lane, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const auto keep = [&](double total, std::int64_t blocks) {
    keep_by_rule(c, head, row, total, scratch.weights, blocks, scratch.sorted);
  };
  const std::int64_t before = g.own_begin(row);
  const std::int64_t causal = g.diagonal(row) + 1;
  switch (c.spec.options.score) {
    case BlockScore::mean_pool: keep(mean_pool_weights(c, row, lane, scratch), before); break;
    case BlockScore::antidiagonal: keep(score_antidiagonal(c, head, row, scratch), before); break;
    case BlockScore::antidiagonal_causal: keep(score_antidiagonal(c, head, row, scratch), causal); break;
    case BlockScore::per_query: keep(score_per_query(c, head, row, scratch), causal); break;
    case BlockScore::exact: keep(score_exact(c, head, row, scratch), causal); break;
    case BlockScore::sampled: keep(score_sampled(c, head, row, scratch), causal); break;
    case BlockScore::mean_pool_causal: keep(score_mean_pool_causal(c, head, row, scratch), causal); break;
    case BlockScore::energy: keep(score_energy(c, head, row, scratch), causal); break;
    case BlockScore::dual_band: keep_by_either(c, head, row, score_dual_band(c, head, row, scratch), scratch); break;
    case BlockScore::none:
    case BlockScore::vertical_slash:
    case BlockScore::flexible:
    case BlockScore::two_step: break;
  }
}

// Selects for rows by BlockScore::two_step.
void select_two_step(const StageContext& c, std::int64_t head, std::int64_t first_row, std::int64_t end,
                     const SelectScratch& scratch) {
  const int together = two_step_rows(c.spec.options);
  for (std::int64_t row = first_row; row < end; row += together) {
    const int count = static_cast<int>(std::min<std::int64_t>(together, end - row));
    const auto totals = score_two_step(c, head, row, count, scratch);
    for (int i = 0; i < count; ++i)
      keep_by_rule(c, head, row + i, totals[i], two_step_weights(c, i, scratch), c.geometry().diagonal(row + i) + 1,
                   scratch.sorted);
  }
}

// Selects for a strip of rows, but for those that see everything.
void select_strip(const StageContext& c, std::int64_t head, std::int64_t first_row, int rows,
                  const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  if (c.spec.options.score == BlockScore::two_step) {
    while (rows > 0 && g.own_begin(first_row) == 0) ++first_row, --rows;
    const std::int64_t end = std::min(first_row + rows, g.rows() - c.options(head).dense_last_rows);
    return select_two_step(c, head, first_row, end, scratch);
  }
  if (c.spec.options.score == BlockScore::mean_pool) score_mean_pool(c, head, first_row, rows, scratch);
  for (int i = 0; i < rows; ++i) {
    const std::int64_t row = first_row + i;
    if (g.own_begin(row) > 0 && row < g.rows() - c.options(head).dense_last_rows) select_row(c, head, row, i, scratch);
  }
}

}  // namespace

std::int64_t select_scratch_bytes(const detail::PlanSpec& spec, std::int64_t permuted_blocks,
                                  std::int64_t strip_bytes) {
  return SelectScratch(spec, permuted_blocks, strip_bytes, nullptr).size;
}

void select(const StageContext& c) {
  const Geometry& g = c.geometry();
  const std::int64_t rows = g.rows();
  const BlockScore score = c.spec.options.score;
  const auto scratch_of = [&](int thread) {
    return SelectScratch(c.spec, c.layout.permuted_blocks, c.layout.strip_bytes, c.scratch(thread));
  };
  std::fill_n(c.layout.mask, c.heads.q_count * rows * c.layout.mask_words, 0);
  if (c.layout.scored && (is_pattern(score) || score == BlockScore::dual_band))
    parallel_for(c.spec.threads, c.heads.q_count, [&](std::int64_t head, int thread) {
      if (score == BlockScore::dual_band)
        calibrate_bands(c, head, scratch_of(thread));
      else if (reads_scores(c.options(head)))
        (score == BlockScore::flexible ? mark_flexible : mark_vertical_slash)(c, head, scratch_of(thread));
    });

  const std::int64_t strips = ceil_div(rows, strip);
  parallel_for(c.spec.threads, c.heads.q_count * strips, [&](std::int64_t item, int thread) {
    const std::int64_t head = item / strips;
    const std::int64_t begin = item % strips * strip;
    const std::int64_t end = std::min<std::int64_t>(begin + strip, rows);
    const Options& options = c.options(head);
    const bool keep_all = keeps_every_block(options);
    const std::int64_t sink = c.sink_block(head);
    if (c.layout.scored && reads_scores(options) && !is_pattern(score))
      select_strip(c, head, begin, static_cast<int>(end - begin), scratch_of(thread));
    for (std::int64_t row = begin; row < end; ++row) {
      std::uint64_t* const mask = c.mask(head, row);
      const bool dense = keep_all || row >= rows - options.dense_last_rows;
      set_range(mask, dense ? g.window_begin(row) : g.own_begin(row), g.diagonal(row) + 1);
      if (g.windowed()) continue;
      if (sink < g.own_begin(row)) set_bit(mask, sink);
      set_range(mask, 0, std::min<std::int64_t>(options.sink_blocks, g.diagonal(row) + 1));
      set_range(mask, std::max<std::int64_t>(g.diagonal(row) + 1 - options.local_blocks, 0), g.diagonal(row) + 1);
    }
  });
}

}  // namespace pbsattn::cpu
