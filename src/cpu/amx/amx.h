// The parts of the AMX path, each compiled for its instructions alone.
#pragma once

#include "cpu/kernels/kernels.h"

#if defined(PBSATTN_EMULATE_AMX) || (defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__))
#define PBSATTN_HAS_AMX 1
#else
#define PBSATTN_HAS_AMX 0
#endif

namespace pbsattn::cpu::amx {

void attend_rows(const AttendRow* rows, int count, const AttendArgs& args);
std::int64_t attend_scratch_bytes(int head_dim, int block);

}  // namespace pbsattn::cpu::amx
