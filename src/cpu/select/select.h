// Stage two: each row chooses its key blocks.
#pragma once

#include "cpu/context.h"

namespace pbsattn::cpu {

// Fills mask.
void select(const StageContext& context);

}  // namespace pbsattn::cpu
