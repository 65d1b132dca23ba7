// Panels: tiles in shared memory, as the copy engine writes them and warpgroup products read them, are cut into panels
// of 64 columns, whose rows of 128 bytes are swizzled; or of 32 and 64 bytes, where a width is no multiple of 64.
#pragma once

#include <cstdint>

namespace pbsattn::cuda {

constexpr int panel_of(std::int64_t width) {
  return width % 64 == 0 ? 64 : 32;
}

#ifdef __CUDACC__
// Returns where in its row of a panel a 16-byte chunk of the row stands.
template <int panel>
__device__ int swizzled(int chunk, int row) {
  return panel == 64 ? chunk ^ row % 8 : chunk ^ row / 2 % 4;
}
#endif

}  // namespace pbsattn::cuda
