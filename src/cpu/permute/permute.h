// Stage one: keys move inside their segments.
#pragma once

#include "cpu/context.h"

namespace pbsattn::cpu {

// Fills keys, values and values_finite; where keys are permuted also order, sink_block, far_keys and
// far_values; where blocks are scored also pooled_keys.
void permute(const StageContext& context);

}  // namespace pbsattn::cpu
