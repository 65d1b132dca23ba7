// Asking a barrier where it is not worth a wait.
#pragma once

#include "cuda/sm90/ptx.cuh"

namespace pbsattn::cuda::attention {

// Returns at once whether the phase of this parity is complete. Barrier::test() may sleep for microseconds where it
// isn't.
__device__ inline bool poll(const sm90::Barrier& barrier, std::uint32_t parity) {
  sm90::random_delay();
  std::uint32_t done = 0;
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.u32 %0, 1, 0, complete;\n"
      "}\n"
      : "=r"(done)
      : "r"(sm90::shared_address(&barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

}  // namespace pbsattn::cuda::attention
