// Stage one: keys move inside their segments, and what the other stages read of keys and values is packed.
#pragma once

#include "cpu/context.h"

namespace pbsattn::cpu {

// Fills k, v and values_finite; where keys are permuted also order, the caller's if it keeps one, sink_block,
// permuted_k and permuted_v; pooled_k, pooled_v and pooled_own where something reads them.
void permute(const StageContext& context);

// Returns what a thread needs to order a segment: its keys' weights, ranks and tokens.
std::int64_t order_scratch_bytes(const Geometry& geometry);

// Writes the mean of `count` rows, [head_dim]: their sum over `divisor`, rounded to their dtype as the method has it.
void pool_rows(const StageContext& context, const Rows& rows, int count, int divisor, int dim, float* mean);

}  // namespace pbsattn::cpu
