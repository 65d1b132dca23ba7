#include "cpu/select/keep.h"

#include <algorithm>
#include <span>
#include <utility>

#include "core/keep_rule.h"
#include "core/score_traits.h"

namespace pbsattn::cpu {
namespace {

// Orders by share, of equal ones the higher block first.
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

// Keeps the weights that reach `least`.
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

}  // namespace

void keep_by_rule(const StageContext& c, std::int64_t head, std::int64_t row, double total, const float* weights,
                  std::int64_t count, ScoredBlock* memory) {
  const Options& options = c.options(head);
  std::uint64_t* const mask = c.mask(head, row);
  const std::int64_t own_begin = c.geometry().own_begin(row);
  // A NaN anywhere makes every share NaN, which counts as 0.
  if (!(total > 0)) {
    if (options.rules == Rules::paper) set_range(mask, 0, own_begin);
    return;
  }
  for (std::int64_t b = 0; b < count; ++b) memory[b] = {weights[b], static_cast<std::int32_t>(b)};
  const std::span blocks(memory, static_cast<std::size_t>(count));
  const std::span<ScoredBlock> before = blocks.first(static_cast<std::size_t>(own_begin));
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
      keep_at_least(row_threshold(options, c.geometry().diagonal(row)) * total, before, mask);
      if (options.floor_top_p > 0.0F) keep_top_p(options.floor_top_p, total, 0, before, mask);
      break;
    case KeepRule::relative:
      keep_at_least(static_cast<double>(options.threshold) *
                        static_cast<double>(std::ranges::max_element(blocks, by_share)->score),
                    before, mask);
      break;
    case KeepRule::top_k:
    case KeepRule::density:
      keep_highest(kept_count(options, own_begin, c.geometry().diagonal(row)), before, mask);
      break;
  }
}

void keep_by_either(const StageContext& c, std::int64_t head, std::int64_t row, BandTotals totals,
                    const SelectScratch& scratch) {
  const Options& options = c.options(head);
  const std::int64_t blocks = c.geometry().diagonal(row) + 1;
  float* const slow = scratch.weights + c.geometry().blocks();
  if (options.keep != KeepRule::top_k && options.keep != KeepRule::density) {
    keep_by_rule(c, head, row, totals.fast, scratch.weights, blocks, scratch.sorted);
    keep_by_rule(c, head, row, totals.slow, slow, blocks, scratch.sorted);
    return;
  }
  const auto share = [](float weight, double total) {
    return total > 0 ? static_cast<float>(static_cast<double>(weight) / total) : 0.0F;
  };
  double total = 0;
  for (std::int64_t b = 0; b < blocks; ++b)
    total += scratch.weights[b] = std::max(share(scratch.weights[b], totals.fast), share(slow[b], totals.slow));
  keep_by_rule(c, head, row, total, scratch.weights, blocks, scratch.sorted);
}

}  // namespace pbsattn::cpu
