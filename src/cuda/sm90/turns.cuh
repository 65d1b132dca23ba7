// Warpgroups that start their products one after the other.
//
// Left alone, warpgroups that share tiles fall into step: the tensor cores serve all of them by turns, so that all
// finish at the same time, and then all want the unit for exponentials at the same time. In turn, one's product is done
// first, and its exponentials run under the products of the others.
#pragma once

#include "cuda/sm90/ptx.cuh"

namespace pbsattn::cuda {

// Returns the index of this thread's warpgroup, as a value that the compiler knows to be the same in the whole warp.
__device__ inline int warpgroup_index() {
  return __shfl_sync(~0U, static_cast<int>(threadIdx.x) / 128, 0);
}

// Of each of `groups` warpgroups, all of which take the same number of turns. Uses named barriers 8 and up.
template <int groups>
class Turns {
 public:
  __device__ explicit Turns(int group) : group_(group) {
    if (group_ == groups - 1) pass();  // the first turn is the first warpgroup's
  }
  __device__ void wait() const { asm volatile("bar.sync %0, 256;" ::"r"(first_barrier + group_) : "memory"); }
  __device__ void pass() const {
    asm volatile("bar.arrive %0, 256;" ::"r"(first_barrier + (group_ + 1) % groups) : "memory");
  }
  // Ends the turns, by taking the one that was passed on to the first warpgroup.
  __device__ void finish() const {
    if (group_ == 0) wait();
  }

 private:
  static constexpr int first_barrier = 8;
  int group_;
};

}  // namespace pbsattn::cuda
