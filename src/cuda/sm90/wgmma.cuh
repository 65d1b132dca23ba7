// Warpgroup matrix products (wgmma) on Hopper: d += a b with fp32 d in the registers of 128 threads.
//
// Thread t of the warpgroup holds of a 64 x N product, for n8 = 0 .. N/8-1 and r = 0, 1:
//     d[4 n8 + 2 r + c] = element (16 (t / 32) + t % 32 / 4 + 8 r, 8 n8 + 2 (t % 4) + c)
// and the 64 x 16 slice k16 of `a` in registers is laid out the same way, as packed pairs: a[4 k16 .. 4 k16 + 3].
//
// Products are asynchronous: between wgmma_fence() and wgmma_wait() the registers involved must not be touched.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/sm90/ptx.cuh"

namespace pbsattn::cuda::sm90 {

// Describes a shared-memory operand with the copy engine's swizzle: panels of 64 elements (128 bytes) a row, or of 32,
// groups of 8 rows one after the other, all panels `panel_bytes` apart (read only where rows run along d's, as V's do).
template <int panel = 64>
__device__ inline std::uint64_t operand(const void* shared, std::uint32_t panel_bytes = 16) {
  static_assert(panel == 64 || panel == 32);
  constexpr std::uint64_t swizzle = panel == 64 ? 1ULL << 62 : 2ULL << 62;
  constexpr std::uint64_t group_bytes = 8 * panel * 2;
  return swizzle | (group_bytes >> 4) << 32 | std::uint64_t{panel_bytes >> 4} << 16 |
         (shared_address(shared) & 0x3FFFF) >> 4;
}
// Returns the operand `bytes` further on.
__device__ inline std::uint64_t advance(std::uint64_t descriptor, int bytes) {
  return descriptor + (bytes >> 4);
}

// Orders register writes before the products that follow.
__device__ inline void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes a batch of products; wgmma_wait<n> returns when all but the last n batches are done.
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving uses of these registers across this point.
template <int n>
__device__ void pin(float (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Returns `n` of a product's registers.
template <int first, int n, int all>
__device__ auto part(float (&registers)[all]) -> float (&)[n] {
  static_assert(first + n <= all);
  return reinterpret_cast<float(&)[n]>(registers[first]);
}

// The instruction for bf16 or f16 elements: d's registers are the asm's first operands, `rest` names those after them
// and `add` the last but for constants.
#define PBSATTN_WGMMA_TEXT(type, shape, d, rest, add) \
  "{\n.reg .pred add;\nsetp.ne.b32 add, " add         \
  ", 0;\n"                                            \
  "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" d "}, " rest ";\n}\n"
#define PBSATTN_WGMMA(Element, shape, d, rest, add, ...)                       \
  if constexpr (std::is_same_v<Element, __nv_bfloat16>)                        \
    asm volatile(PBSATTN_WGMMA_TEXT("bf16", shape, d, rest, add) __VA_ARGS__); \
  else                                                                         \
    asm volatile(PBSATTN_WGMMA_TEXT("f16", shape, d, rest, add) __VA_ARGS__)
#define PBSATTN_NAMES_32                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PBSATTN_NAMES_48 \
  PBSATTN_NAMES_32       \
  ", "                   \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PBSATTN_NAMES_64 \
  PBSATTN_NAMES_48       \
  ", "                   \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PBSATTN_NAMES_128                                                                        \
  PBSATTN_NAMES_64                                                                               \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PBSATTN_REGISTERS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PBSATTN_REGISTERS_8(d, i) PBSATTN_REGISTERS_4(d, i), PBSATTN_REGISTERS_4(d, i + 4)
#define PBSATTN_REGISTERS_16(d, i) PBSATTN_REGISTERS_8(d, i), PBSATTN_REGISTERS_8(d, i + 8)
#define PBSATTN_REGISTERS_32(d, i)                                                          \
  PBSATTN_REGISTERS_8(d, i), PBSATTN_REGISTERS_8(d, i + 8), PBSATTN_REGISTERS_8(d, i + 16), \
      PBSATTN_REGISTERS_8(d, i + 24)

#define PBSATTN_LEFT(a) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

// Starts d = a b^T (+ d if add): a is 64 x 16, b is 128 x 16, both in shared memory with rows along the sum.
template <class Element>
__device__ void wgmma(float (&d)[64], std::uint64_t a, std::uint64_t b, int add) {
  PBSATTN_WGMMA(Element, "m64n128k16", PBSATTN_NAMES_64, "%64, %65, add, 1, 1, 0, 0", "%66",
                : PBSATTN_REGISTERS_32(d, 0), PBSATTN_REGISTERS_32(d, 32)
                : "l"(a), "l"(b), "r"(add));
}

// Does the same with 64 rows of b.
template <class Element>
__device__ void wgmma(float (&d)[32], std::uint64_t a, std::uint64_t b, int add) {
  PBSATTN_WGMMA(Element, "m64n64k16", PBSATTN_NAMES_32, "%32, %33, add, 1, 1, 0, 0", "%34",
                : PBSATTN_REGISTERS_32(d, 0)
                : "l"(a), "l"(b), "r"(add));
}

// Starts d += a b with `a` 64 x 16 in registers; b, 16 x 128, is in shared memory with rows along d's.
template <class Element>
__device__ void wgmma(float (&d)[64], const std::uint32_t* a, std::uint64_t b, int add = 1) {
  PBSATTN_WGMMA(Element, "m64n128k16", PBSATTN_NAMES_64, "{%64, %65, %66, %67}, %68, add, 1, 1, 1", "%69",
                : PBSATTN_REGISTERS_32(d, 0), PBSATTN_REGISTERS_32(d, 32)
                : PBSATTN_LEFT(a), "l"(b), "r"(add));
}

// Does the same with 64, 96 and 256 columns, and with 72, 104 and 136.
template <class Element>
__device__ void wgmma(float (&d)[32], const std::uint32_t* a, std::uint64_t b, int add = 1) {
  PBSATTN_WGMMA(Element, "m64n64k16", PBSATTN_NAMES_32, "{%32, %33, %34, %35}, %36, add, 1, 1, 1", "%37",
                : PBSATTN_REGISTERS_32(d, 0)
                : PBSATTN_LEFT(a), "l"(b), "r"(add));
}
template <class Element>
__device__ void wgmma(float (&d)[48], const std::uint32_t* a, std::uint64_t b, int add = 1) {
  PBSATTN_WGMMA(Element, "m64n96k16", PBSATTN_NAMES_48, "{%48, %49, %50, %51}, %52, add, 1, 1, 1", "%53",
                : PBSATTN_REGISTERS_32(d, 0), PBSATTN_REGISTERS_16(d, 32)
                : PBSATTN_LEFT(a), "l"(b), "r"(add));
}
template <class Element>
__device__ void wgmma(float (&d)[128], const std::uint32_t* a, std::uint64_t b, int add = 1) {
  PBSATTN_WGMMA(Element, "m64n256k16", PBSATTN_NAMES_128, "{%128, %129, %130, %131}, %132, add, 1, 1, 1", "%133",
                : PBSATTN_REGISTERS_32(d, 0), PBSATTN_REGISTERS_32(d, 32), PBSATTN_REGISTERS_32(d, 64),
                  PBSATTN_REGISTERS_32(d, 96)
                : PBSATTN_LEFT(a), "l"(b), "r"(add));
}
template <class Element>
__device__ void wgmma(float (&d)[52], const std::uint32_t* a, std::uint64_t b, int add = 1) {
  PBSATTN_WGMMA(Element, "m64n104k16", PBSATTN_NAMES_48 ", %48, %49, %50, %51",
                "{%52, %53, %54, %55}, %56, add, 1, 1, 1", "%57",
                : PBSATTN_REGISTERS_32(d, 0), PBSATTN_REGISTERS_16(d, 32), PBSATTN_REGISTERS_4(d, 48)
                : PBSATTN_LEFT(a), "l"(b), "r"(add));
}
template <class Element>
__device__ void wgmma(float (&d)[68], const std::uint32_t* a, std::uint64_t b, int add = 1) {
  PBSATTN_WGMMA(Element, "m64n136k16", PBSATTN_NAMES_64 ", %64, %65, %66, %67",
                "{%68, %69, %70, %71}, %72, add, 1, 1, 1", "%73",
                : PBSATTN_REGISTERS_32(d, 0), PBSATTN_REGISTERS_32(d, 32), PBSATTN_REGISTERS_4(d, 64)
                : PBSATTN_LEFT(a), "l"(b), "r"(add));
}
template <class Element>
__device__ void wgmma(float (&d)[36], const std::uint32_t* a, std::uint64_t b, int add = 1) {
  PBSATTN_WGMMA(Element, "m64n72k16", PBSATTN_NAMES_32 ", %32, %33, %34, %35",
                "{%36, %37, %38, %39}, %40, add, 1, 1, 1", "%41",
                : PBSATTN_REGISTERS_32(d, 0), PBSATTN_REGISTERS_4(d, 32)
                : PBSATTN_LEFT(a), "l"(b), "r"(add));
}

#undef PBSATTN_WGMMA_TEXT
#undef PBSATTN_WGMMA
#undef PBSATTN_NAMES_32
#undef PBSATTN_NAMES_48
#undef PBSATTN_NAMES_64
#undef PBSATTN_NAMES_128
#undef PBSATTN_REGISTERS_4
#undef PBSATTN_REGISTERS_8
#undef PBSATTN_REGISTERS_16
#undef PBSATTN_REGISTERS_32
#undef PBSATTN_LEFT

}  // namespace pbsattn::cuda::sm90
