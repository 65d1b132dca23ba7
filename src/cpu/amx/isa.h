// The instructions the AMX path is written in: eight tiles of 16 rows of 64 bytes, and vectors of 16 lanes.
// PBSATTN_EMULATE_AMX puts plain C++ in their place, so that any machine can test the path's layouts, tails
// and schedule. Everything here has internal linkage, since it is compiled for instructions that other files
// must not use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/kernels/kernels.h"

#ifdef PBSATTN_EMULATE_AMX
#include <bit>
#include <cmath>
#else
#include <immintrin.h>
#endif

namespace pbsattn::cpu::amx {
namespace {

constexpr int lanes = 16;
constexpr int tile_rows = 16;
constexpr int tile_bytes = 1024;  // 16 rows of 64 bytes
constexpr int tile_row_bytes = 64;

using F32 [[gnu::vector_size(64), gnu::may_alias]] = float;
using I32 [[gnu::vector_size(64), gnu::may_alias]] = std::int32_t;
using U32 [[gnu::vector_size(64), gnu::may_alias]] = std::uint32_t;
using U16 [[gnu::vector_size(32), gnu::may_alias]] = std::uint16_t;

#define PBSATTN_INLINE [[gnu::always_inline]] inline

PBSATTN_INLINE F32 splat(float x) {
  return F32{} + x;
}
PBSATTN_INLINE F32& f32_at(void* p) {
  return *static_cast<F32*>(p);
}
PBSATTN_INLINE const F32& f32_at(const void* p) {
  return *static_cast<const F32*>(p);
}
PBSATTN_INLINE U32& u32_at(void* p) {
  return *static_cast<U32*>(p);
}
PBSATTN_INLINE float sum_lanes(F32 x) {
  x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return x[0] + x[1];
}
PBSATTN_INLINE F32 as_f32(U32 bits) {
  return reinterpret_cast<F32>(bits);
}
PBSATTN_INLINE U32 as_u32(F32 x) {
  return reinterpret_cast<U32>(x);
}
PBSATTN_INLINE U32 widen(U16 x) {
  return __builtin_convertvector(x, U32);
}
// Puts in lane i elements 2i and 2i + 1 of the two in sequence.
PBSATTN_INLINE U32 in_sequence(U16 a, U16 b) {
  return reinterpret_cast<U32>(__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,
                                                       17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31));
}

#ifndef PBSATTN_EMULATE_AMX

// The compiler knows neither what tiles hold nor which memory they touch: the clobbers keep loads and stores
// where they stand, which also keeps the schedule as written.
template <int T>
PBSATTN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
PBSATTN_INLINE void tile_load(const void* from, std::int64_t stride = tile_row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
// Loads what is read once and should not push out of the first-level cache what is read again.
template <int T>
PBSATTN_INLINE void tile_stream(const void* from, std::int64_t stride = tile_row_bytes) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
PBSATTN_INLINE void tile_store(void* to, std::int64_t stride = tile_row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// Adds A B to C, where A is rows of pairs of bf16 and B has a row for each pair.
template <int C, int A, int B>
PBSATTN_INLINE void tile_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
}

struct TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
alignas(64) constexpr TileConfig tile_config;  // static: compilers may drop the stores to one on the stack

// Configures this thread's tiles, and leaves them as they were: other libraries remember having configured
// theirs.
class TileScope {
 public:
  TileScope() {
    asm volatile("sttilecfg %0" : "=m"(before_)::"memory");
    asm volatile("ldtilecfg %0" ::"m"(tile_config) : "memory");
  }
  ~TileScope() {
    if (before_.palette == 0)
      asm volatile("tilerelease" ::: "memory");
    else
      asm volatile("ldtilecfg %0" ::"m"(before_) : "memory");
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  alignas(64) TileConfig before_;
};

PBSATTN_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
  return _mm512_fmadd_ps(a, b, c);
}
PBSATTN_INLINE F32 above_floor(F32 x) {
  return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
// Returns p * 2^floor(x).
PBSATTN_INLINE F32 times_power(F32 p, F32 x) {
  return _mm512_scalef_ps(p, x);
}
// Pairs in lane i the bf16 of (low[i], high[i]), both cut off rather than rounded.
PBSATTN_INLINE U32 cut_to_pairs(F32 low, F32 high) {
  return reinterpret_cast<U32>(
      _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high)));
}
// Returns sum + low + high.
PBSATTN_INLINE F32 add_pairs(F32 sum, U32 pairs) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pairs),
                          reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3F80)));
}
// Returns a > b ? a : b in every lane: b where either is NaN
PBSATTN_INLINE F32 larger(F32 a, F32 b) {
  return _mm512_max_ps(a, b);
}
PBSATTN_INLINE __mmask16 first_lanes(int count) {
  return static_cast<__mmask16>(count >= lanes ? 0xFFFFU : (1U << count) - 1U);
}
PBSATTN_INLINE F32 load_f32(const void* from, int count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), from);
}
PBSATTN_INLINE U16 load_u16(const void* from, int count) {
  return reinterpret_cast<U16>(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}
PBSATTN_INLINE void store_f32(void* to, int count, F32 x) {
  _mm512_mask_storeu_ps(to, first_lanes(count), x);
}
PBSATTN_INLINE void store_u16(void* to, int count, U16 x) {
  _mm256_mask_storeu_epi16(to, first_lanes(count), reinterpret_cast<__m256i>(x));
}
// Writes `count` of 32 elements of 16 bits, two a lane.
PBSATTN_INLINE void store_pairs(void* to, int count, U32 x) {
  const __mmask32 mask = count >= 2 * lanes ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
  _mm512_mask_storeu_epi16(to, mask, reinterpret_cast<__m512i>(x));
}
PBSATTN_INLINE U16 to_bf16(F32 x) {
  return reinterpret_cast<U16>(_mm512_cvtneps_pbh(x));
}
PBSATTN_INLINE U16 to_f16(F32 x) {
  return reinterpret_cast<U16>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PBSATTN_INLINE F32 from_f16(U16 x) {
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(x));
}

#else

thread_local float emulated[8][tile_rows][lanes];

template <int T>
[[gnu::noinline]] void tile_zero() {
  std::memset(emulated[T], 0, tile_bytes);
}
template <int T>
[[gnu::noinline]] void tile_load(const void* from, std::int64_t stride = tile_row_bytes) {
  for (int i = 0; i < tile_rows; ++i)
    std::memcpy(emulated[T][i], static_cast<const std::byte*>(from) + i * stride, tile_row_bytes);
}
template <int T>
[[gnu::noinline]] void tile_stream(const void* from, std::int64_t stride = tile_row_bytes) {
  tile_load<T>(from, stride);
}
template <int T>
[[gnu::noinline]] void tile_store(void* to, std::int64_t stride = tile_row_bytes) {
  for (int i = 0; i < tile_rows; ++i)
    std::memcpy(static_cast<std::byte*>(to) + i * stride, emulated[T][i], tile_row_bytes);
}
template <int C, int A, int B>
[[gnu::noinline]] void tile_product() {
  for (int m = 0; m < tile_rows; ++m) {
    F32 row;
    std::memcpy(&row, emulated[C][m], sizeof row);
    for (int k = 0; k < tile_rows; ++k) {
      const auto pair = std::bit_cast<std::uint32_t>(emulated[A][m][k]);
      U32 b;
      std::memcpy(&b, emulated[B][k], sizeof b);
      row += std::bit_cast<float>(pair << 16) * as_f32(b << 16);
      row += std::bit_cast<float>(pair & 0xFFFF0000U) * as_f32(b & 0xFFFF0000U);
    }
    std::memcpy(emulated[C][m], &row, sizeof row);
  }
}

class TileScope {
 public:
  TileScope() { std::memset(emulated, 0xFF, sizeof emulated); }  // NaN: nobody relies on what was there
};

[[gnu::noinline, maybe_unused]] F32 multiply_add(F32 a, F32 b, F32 c) {
  for (int i = 0; i < lanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}
[[gnu::noinline, maybe_unused]] F32 above_floor(F32 x) {
  for (int i = 0; i < lanes; ++i) x[i] = std::isinf(x[i]) ? 0.0F : x[i] - std::floor(x[i]);
  return x;
}
[[gnu::noinline, maybe_unused]] F32 times_power(F32 p, F32 x) {
  for (int i = 0; i < lanes; ++i) p[i] *= std::isnan(x[i]) ? x[i] : std::exp2(std::floor(x[i]));
  return p;
}
[[gnu::noinline, maybe_unused]] U32 cut_to_pairs(F32 low, F32 high) {
  return as_u32(low) >> 16 | (as_u32(high) & 0xFFFF0000U);
}
[[gnu::noinline, maybe_unused]] F32 add_pairs(F32 sum, U32 pairs) {
  return sum + as_f32(pairs << 16) + as_f32(pairs & 0xFFFF0000U);
}
[[gnu::noinline, maybe_unused]] F32 larger(F32 a, F32 b) {
  return a > b ? a : b;
}
[[gnu::noinline, maybe_unused]] F32 load_f32(const void* from, int count) {
  F32 x{};
  std::memcpy(&x, from, static_cast<std::size_t>(count < lanes ? count : lanes) * 4);
  return x;
}
[[gnu::noinline, maybe_unused]] U16 load_u16(const void* from, int count) {
  U16 x{};
  std::memcpy(&x, from, static_cast<std::size_t>(count < lanes ? count : lanes) * 2);
  return x;
}
[[gnu::noinline, maybe_unused]] void store_f32(void* to, int count, F32 x) {
  std::memcpy(to, &x, static_cast<std::size_t>(count < lanes ? count : lanes) * 4);
}
[[gnu::noinline, maybe_unused]] void store_u16(void* to, int count, U16 x) {
  std::memcpy(to, &x, static_cast<std::size_t>(count < lanes ? count : lanes) * 2);
}
[[gnu::noinline, maybe_unused]] void store_pairs(void* to, int count, U32 x) {
  std::memcpy(to, &x, static_cast<std::size_t>(count < 2 * lanes ? count : 2 * lanes) * 2);
}
[[gnu::noinline, maybe_unused]] U16 to_bf16(F32 x) {
  const U32 bits = as_u32(x);
  const U32 rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16 | 0x40), U16);
}
[[gnu::noinline, maybe_unused]] U16 to_f16(F32 x) {
  // By the scalar rule: scaling brings float16's subnormals and overflow into float32's own rounding.
  U16 out;
  for (int i = 0; i < lanes; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(x[i]);
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
    const float magnitude = std::fabs(x[i]);
    if (std::isnan(x[i])) {
      out[i] = sign | 0x7E00;
    } else if (magnitude >= 65520.0F) {
      out[i] = sign | 0x7C00;
    } else if (magnitude < 0x1p-14F) {
      out[i] = sign | static_cast<std::uint16_t>(std::nearbyint(magnitude * 0x1p24F));
    } else {
      const std::uint32_t m = bits & 0x7FFFFFFF;
      out[i] = static_cast<std::uint16_t>(sign | (m - (112U << 23) + 0xFFF + (m >> 13 & 1)) >> 13);
    }
  }
  return out;
}
[[gnu::noinline, maybe_unused]] F32 from_f16(U16 x) {
  F32 out;
  for (int i = 0; i < lanes; ++i) {
    const std::uint32_t exponent = x[i] >> 10 & 31;
    const std::uint32_t fraction = x[i] & 1023;
    float value = 0;
    if (exponent == 31)
      value = fraction != 0 ? std::nanf("") : HUGE_VALF;
    else if (exponent == 0)
      value = static_cast<float>(fraction) * 0x1p-24F;
    else
      value = std::ldexp(static_cast<float>(fraction + 1024), static_cast<int>(exponent) - 25);
    out[i] = (x[i] & 0x8000) != 0 ? -value : value;
  }
  return out;
}

#endif

// What both share.

template <DType T>
PBSATTN_INLINE F32 load_as_f32(const void* row, int first, int count) {
  if constexpr (T == DType::f32) return load_f32(static_cast<const float*>(row) + first, count);
  const U16 half = load_u16(static_cast<const std::uint16_t*>(row) + first, count);
  if constexpr (T == DType::f16) return from_f16(half);
  return as_f32(widen(half) << 16);
}
template <DType T>
PBSATTN_INLINE U16 load_as_bf16(const void* row, int first, int count) {
  if constexpr (T == DType::bf16) return load_u16(static_cast<const std::uint16_t*>(row) + first, count);
  return to_bf16(load_as_f32<T>(row, first, count));
}
template <DType T>
PBSATTN_INLINE U16 to_half(F32 x) {
  return T == DType::f16 ? to_f16(x) : to_bf16(x);
}

// Writes out[j][i] = in[i][j] for 16 x 16 elements of 32 bits.
PBSATTN_INLINE void transpose(const U32 in[lanes], U32 out[lanes]) {
  U32 a[lanes];
  U32 b[lanes];
#pragma GCC unroll 8
  for (int i = 0; i < lanes; i += 2) {  // pairs of rows, then of pairs, within 128-bit lanes
    b[i] = __builtin_shufflevector(in[i], in[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    b[i + 1] = __builtin_shufflevector(in[i], in[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < lanes; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const U32 low = b[i + j];
      const U32 high = b[i + j + 2];
      a[i + 2 * j] = __builtin_shufflevector(low, high, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      a[i + 2 * j + 1] = __builtin_shufflevector(low, high, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  }
  const auto even = [](U32 x, U32 y) __attribute__((always_inline)) {
    return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  };
  const auto odd = [](U32 x, U32 y) __attribute__((always_inline)) {
    return __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // a[4g + i] holds rows 4g .. 4g + 3 of columns i, i + 4, i + 8, i + 12
    b[i] = even(a[i], a[i + 4]);
    b[i + 4] = odd(a[i], a[i + 4]);
    b[i + 8] = even(a[i + 8], a[i + 12]);
    b[i + 12] = odd(a[i + 8], a[i + 12]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    out[i] = even(b[i], b[i + 8]);
    out[i + 8] = odd(b[i], b[i + 8]);
    out[i + 4] = even(b[i + 4], b[i + 12]);
    out[i + 12] = odd(b[i + 4], b[i + 12]);
  }
}

// 2^x with a minimax cubic for 2^f on [0, 1), relative error 7.5e-5, a 26th of bf16's half ulp. `bias` is
// added to 2^f, which lies in [1, 2): with bf16's half ulp, 2^-8, cutting off the low bits rounds to nearest.
// -inf gives 0; NaN stays.
constexpr float bf16_half_ulp = 0x1p-8F;
PBSATTN_INLINE F32 exp2_cubic(F32 x, float bias) {
  const F32 f = above_floor(x);
  F32 p = multiply_add(splat(0.0780245F), f, splat(0.2260672F));
  p = multiply_add(p, f, splat(0.6958335F));
  p = multiply_add(p, f, splat(0.9999252F + bias));
  return times_power(p, x);
}
// Returns 2^x to float32's accuracy: a Taylor-like polynomial around the middle, sqrt(2) * 2^f on [-1/2, 1/2).
PBSATTN_INLINE F32 exp2_precise(F32 x) {
  constexpr float root2 = 1.41421356237309505F;
  const F32 f = above_floor(x) - 0.5F;
  F32 p = multiply_add(splat(root2 * 1.5353362e-4F), f, splat(root2 * 1.3398874e-3F));
  p = multiply_add(p, f, splat(root2 * 9.6184373e-3F));
  p = multiply_add(p, f, splat(root2 * 5.5503324e-2F));
  p = multiply_add(p, f, splat(root2 * 2.4022648e-1F));
  p = multiply_add(p, f, splat(root2 * 6.9314720e-1F));
  p = multiply_add(p, f, splat(root2));
  return times_power(p, x);
}

}  // namespace
}  // namespace pbsattn::cpu::amx
