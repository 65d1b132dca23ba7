// Columns and diagonals of a head's last queries, from two sweeps over the keys: one for the softmax's maxima and sums,
// one for its weights (reference/select/scores/scores.h defines the patterns that are made of them).
#pragma once

#include <span>

#include "cpu/context.h"
#include "cpu/select/scratch.h"

namespace pbsattn::cpu {

// Adds up mean softmax weights of the call's last `queries` queries, by key into columns and by distance into
// diagonals.
void find_masses(const StageContext& c, std::int64_t head, std::int64_t queries, const SelectScratch& scratch);

// Sorts 0 .. masses.size()-1 by descending mass, of equal ones the lower first.
std::span<std::int32_t> rank(std::span<const float> masses, std::int32_t* memory);

// Replaces the masses by 1 for the `count` heaviest, the first `forced` before all others, and by 0.
void mark_heaviest(std::span<float> masses, std::int64_t count, std::int64_t forced, std::int32_t* memory);

}  // namespace pbsattn::cpu
