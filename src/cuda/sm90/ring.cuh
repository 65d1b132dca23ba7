// A place in a ring of n buffers that barriers guard, and the parity of its turn.
#pragma once

#include <cstdint>

namespace pbsattn::cuda {

template <int n>
struct Ring {
  unsigned at = 0;
  std::uint32_t parity = 0;

  __device__ void next(unsigned steps = 1) {
    at += steps;
    parity ^= at / n & 1;
    at %= n;
  }
};

}  // namespace pbsattn::cuda
