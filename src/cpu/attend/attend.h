// Stage three: exact attention over the chosen blocks.
#pragma once

#include "cpu/context.h"

namespace pbsattn::cpu {

// Fills the outputs of the pass's heads. Returns the number of block pairs computed.
std::int64_t attend(const StageContext& context);

}  // namespace pbsattn::cpu
