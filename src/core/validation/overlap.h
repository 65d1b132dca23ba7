// Whether tensors share memory, by their strides: exactly, so that slices of one packed tensor pass.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace pbsattn {

// Rows of bytes at a start and every sum of multiples of the axes' strides under their extents. Strides aren't
// negative; extents are positive. Callers bound what the axes reach (see max_reach).
struct Region {
  struct Axis {
    std::int64_t stride = 0, extent = 1;
  };
  std::uintptr_t begin = 0;
  std::int64_t row_bytes = 0;  // 0: the region is empty
  std::array<Axis, 3> axes{};
};

inline constexpr std::int64_t max_reach = std::int64_t{1}
                                          << 58;  // bytes between the first and the last row by one axis

// True also where so many rows lie between each other that the search for a shared byte is given up; tensors of one
// layout, and any whose axes are nested, take a few steps.
bool overlap(const Region& a, const Region& b);

// Whether two different rows share a byte.
bool overlaps_itself(const Region& region);

}  // namespace pbsattn
