// How kernels begin: their dynamic shared memory, and the roles of their warpgroups.
#pragma once

#include "cuda/sm90/ptx.cuh"

namespace pbsattn::cuda {

constexpr int shared_alignment = 1024;  // of tiles that are swizzled
// What a launch asks for, so that a T can be aligned.
template <class T>
constexpr int aligned_bytes = sizeof(T) + shared_alignment;

// Returns the dynamic shared memory from its first aligned address on.
__device__ inline unsigned char* aligned_shared() {
  extern __shared__ unsigned char dynamic_shared[];
  const std::uint32_t past = sm90::shared_address(dynamic_shared) % shared_alignment;
  return dynamic_shared + (shared_alignment - past) % shared_alignment;
}
template <class T>
__device__ T& aligned_shared() {
  return *reinterpret_cast<T*>(aligned_shared());
}

// Initialises the barriers, then runs consume() in the first `consumers` warpgroups and produce() in one thread of the
// last, or in so many, each with as many registers as its role needs.
template <int consumers, int consumer_registers, int producer_registers, int producing_threads = 1, class Shared,
          class Consume, class Produce>
__device__ void run_roles(Shared& shared, Consume&& consume, Produce&& produce) {
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  if (threadIdx.x / 128 < consumers) {
    sm90::take_registers<consumer_registers>();
    consume();
  } else {
    sm90::give_registers<producer_registers>();
    if (threadIdx.x % 128 < producing_threads) produce();
  }
}

}  // namespace pbsattn::cuda
