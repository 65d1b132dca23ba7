// The order in which attend's thread blocks take tiles.
#pragma once

#include "cuda/geometry.cuh"

namespace pbsattn::cuda {

// The natural one, where no array gives another: heads in sections whose K and V fit L2 together; in a section long
// rows first, and the section's heads side by side.
struct TileOrder {
  int rows = 0;
  int heads = 0;  // of all batch entries
  int section_heads = 0;

  PBSATTN_DEVICE int tiles() const { return rows * heads; }
  // Returns the tile, [head][row], at a place.
  PBSATTN_DEVICE int tile(int place) const {
    const int section = place / (section_heads * rows);
    const int rest = place - section * section_heads * rows;
    const int first = section * section_heads;
    const int width = first + section_heads <= heads ? section_heads : heads - first;
    return (first + rest % width) * rows + rows - 1 - rest / width;
  }
};

}  // namespace pbsattn::cuda
