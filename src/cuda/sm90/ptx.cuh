// Hopper's own instructions, one function each: barriers in shared memory, the tensor copy engine (TMA), register
// hand-over between warpgroups.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace pbsattn::cuda::sm90 {

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Where PBSATTN_RANDOM_DELAYS is defined, warps stop now and then before and after they use a barrier, for up to 4 us.
// What the barriers leave to chance then comes out differently from run to run, and a test sees it.
__device__ inline void random_delay() {
#ifdef PBSATTN_RANDOM_DELAYS
  std::uint32_t bits =
      static_cast<std::uint32_t>(clock64()) ^ (blockIdx.x * blockDim.x + threadIdx.x) / 32 * 0x9E3779B9U;
  bits = (bits ^ bits >> 16) * 0x85EBCA6BU;
  bits = (bits ^ bits >> 13) * 0xC2B2AE35U;
  if (bits >> 29 == 0) __nanosleep(bits & 0xFFF);
#endif
}

// A barrier in shared memory that counts arrivals and bytes still to come. Its phases alternate parity 0, 1, 0, ...
struct Barrier {
  std::uint64_t bits;

  __device__ void init(std::uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
  }
  __device__ void arrive() {
    random_delay();
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  __device__ void arrive_expecting(std::uint32_t bytes) {
    random_delay();
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  // Returns whether the phase of this parity is complete. May sleep for a moment where it isn't; mbarrier.test_wait,
  // which doesn't, was the slower one in attend at head_dim 64.
  __device__ bool test(std::uint32_t parity) {
    random_delay();
    std::uint32_t done = 0;
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(this)), "r"(parity)
        : "memory");
    return done != 0;
  }
  // Returns once the phase of this parity is complete. Waiting for parity 1 on a fresh barrier returns at once. With a
  // time limit the thread sleeps until then; without one it asks again and again, in issue slots that others need.
  __device__ void wait(std::uint32_t parity) {
    constexpr int limit_ns = 1'000'000;
    random_delay();
    std::uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n"
          ".reg .pred complete;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2, %3;\n"
          "selp.u32 %0, 1, 0, complete;\n"
          "}\n"
          : "=r"(done)
          : "r"(shared_address(this)), "r"(parity), "n"(limit_ns)
          : "memory");
    }
    random_delay();
  }
};

// Makes barriers just initialised visible to the copy engine.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's ordinary shared-memory writes before later reads by the tensor cores and the copy engine.
__device__ inline void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Copies between shared memory and a box of a rank-5 tensor. Elements outside the tensor read as zero and are not
// written; coordinates may be negative.
__device__ inline void tma_load(void* to, const CUtensorMap& map, Barrier& done, int c0, int c1, int c2, int c3,
                                int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&done)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
// Brings a description of a tensor near, which is a kernel's parameter.
__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ inline void tma_store(const CUtensorMap& map, const void* from, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}
// Copies a run of 16-byte pieces from shared to global memory; `policy` is L2's.
__device__ inline void bulk_store(void* to, const void* from, int bytes, std::uint64_t policy) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes), "l"(policy)
               : "memory");
}
// Ends a group of stores and waits until the copy engine has read their shared memory.
__device__ inline void tma_store_wait_read() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Returns threadIdx.x, asked for anew each time.
__device__ inline int thread_number() {
  int number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  return number;
}

template <int registers>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// Waits until `threads` threads have come to barrier `id`.
__device__ inline void named_wait(int id, int threads) {
  random_delay();
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Loads and stores four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(std::uint32_t* to, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void store_matrices(void* row, std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace pbsattn::cuda::sm90
