// BlockScore::two_step, a few rows at a time.
#pragma once

#include <array>

#include "cpu/context.h"
#include "cpu/select/scratch.h"

namespace pbsattn::cpu {

// Returns how many rows are scored together.
int two_step_rows(const Options& options);

// Scores rows that follow one another. Their weights are two_step_weights() of the i-th; returns the totals.
std::array<double, most_two_step_rows> score_two_step(const StageContext& c, std::int64_t head, std::int64_t first_row,
                                                      int rows, const SelectScratch& scratch);
float* two_step_weights(const StageContext& c, int i, const SelectScratch& scratch);

}  // namespace pbsattn::cpu
