// Stage three: exact attention over the chosen blocks.
#pragma once

#include "cpu/context.h"

namespace pbsattn::cpu {

// Fills the outputs of the pass's heads. Returns the number of block pairs computed.
std::int64_t attend(const StageContext& context);

// Returns what a thread needs for a row, besides lists: its packed queries and softmax state with one block's scores,
// and what a correction by so many blocks' means takes, or what a path wants that takes whole rows.
std::int64_t row_scratch_bytes(const Geometry& geometry, const Kernels& kernels, std::int64_t corrected_blocks);

}  // namespace pbsattn::cpu
