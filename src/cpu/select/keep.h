// The keep rules: which blocks before its own segment a row keeps by their scores.
#pragma once

#include "cpu/context.h"
#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {

inline void set_range(std::uint64_t* mask, std::int64_t begin, std::int64_t end) {
  for (std::int64_t block = begin; block < end; ++block) set_bit(mask, block);
}

// Applies the keep rule to a row's weights, whose shares of `total` are the scores of blocks 0 .. count - 1. They may
// go on to the diagonal: then what is always kept counts first toward top_p, or competes with the rest. `memory` is for
// `count` blocks.
void keep_by_rule(const StageContext& c, std::int64_t head, std::int64_t row, double total, const float* weights,
                  std::int64_t count, ScoredBlock* memory);

// Applies the keep rule to the two lists of BlockScore::dual_band: a block is kept that either keeps; rules that count
// do so by the higher share.
void keep_by_either(const StageContext& c, std::int64_t head, std::int64_t row, BandTotals totals,
                    const SelectScratch& scratch);

}  // namespace pbsattn::cpu
