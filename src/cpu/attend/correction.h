// Correction::mean: the blocks that a row doesn't attend to answer as their means.
#pragma once

#include <span>

#include "cpu/context.h"

namespace pbsattn::cpu {

// Returns the bytes of a thread's scratch, aligned like it.
std::int64_t correction_bytes(const Geometry& geometry, std::int64_t permuted_blocks);

// Begins the softmax of `count` queries of a row, from query `first` of the call, with the mean keys and values of the
// blocks before the row's own segment that `blocks` doesn't list. `state` has seen nothing yet.
void correct_strip(const StageContext& c, std::int64_t head, std::int64_t row, std::int64_t first, int count,
                   std::span<const std::int32_t> blocks, const StripState& state, std::byte* scratch);

}  // namespace pbsattn::cpu
