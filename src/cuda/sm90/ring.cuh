// The place in a ring of n stages that barriers guard, and the parity of its turn.
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

// The same in one register, for n a power of two.
template <int n>
struct CountedRing {
  static_assert((n & (n - 1)) == 0);
  unsigned count = 0;

  __device__ unsigned at() const { return count % n; }
  __device__ unsigned parity() const { return count / n % 2; }
  __device__ void next() { ++count; }
};

}  // namespace pbsattn::cuda
