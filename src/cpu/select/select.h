// Stage two: each row chooses its key blocks.
#pragma once

#include "cpu/context.h"

namespace pbsattn::cpu {

// Fills mask.
void select(const StageContext& context);

// Returns what a thread needs to select for a strip of rows.
std::int64_t select_scratch_bytes(const detail::PlanSpec& spec, std::int64_t permuted_blocks, std::int64_t strip_bytes);

}  // namespace pbsattn::cpu
