// Rows of any dtype as pairs of bf16, for avx512_bf16.cc, which alone is compiled for these instructions.
#pragma once

#include <immintrin.h>

#include "cpu/kernels/kernels.h"

namespace pbsattn::cpu {
namespace {

constexpr int lanes = 16;

// A packed element of two bf16, the unit of every address below.
using Pair = std::uint32_t;

inline __m512bh as_pairs(__m512i bits) {
  return reinterpret_cast<__m512bh>(bits);
}
inline __m256i as_bits(__m256bh pairs) {
  return reinterpret_cast<__m256i>(pairs);
}

// Returns the first `left` lanes of a row's next 16.
inline __mmask16 head_mask(int left) {
  return left >= lanes ? 0xFFFF : static_cast<__mmask16>((1U << left) - 1);
}

inline __m512 load_f32(const void* row, DType dtype, int d, __mmask16 mask) {
  if (dtype == DType::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(row) + d);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const std::uint16_t*>(row) + d);
  if (dtype == DType::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m256i load_bf16(const void* row, DType dtype, int d, __mmask16 mask) {
  if (dtype == DType::bf16) return _mm256_maskz_loadu_epi16(mask, static_cast<const std::uint16_t*>(row) + d);
  return as_bits(_mm512_cvtneps_pbh(load_f32(row, dtype, d, mask)));
}

// Puts (low[i], high[i]) in lane i.
inline __m512i interleave(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

void zero(void* memory, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<char*>(memory) + i), _mm_setzero_si128());
}

void pack_keys(const Rows& rows, int count, int padded, int head_dim, void* packed) {
  auto* out = static_cast<std::uint16_t*>(packed);
  for (int i = 0; i < count; ++i, out += head_dim) {
    const void* row = rows.at(i);
    for (int d = 0; d < head_dim; d += lanes) {
      const __mmask16 mask = head_mask(head_dim - d);
      _mm256_mask_storeu_epi16(out + d, mask, load_bf16(row, rows.dtype, d, mask));
    }
  }
  zero(out, static_cast<std::int64_t>(padded - count) * head_dim * 2);
}

bool pack_values(const Rows& rows, int count, int padded, int head_dim, void* packed) {
  auto* out = static_cast<Pair*>(packed);
  const __m256i exponent_bits = _mm256_set1_epi16(0x7F80);
  __mmask16 special = 0;
  int i = 0;
  for (; i < count; i += 2, out += head_dim) {
    const void* const first = rows.at(i);
    const void* const second = i + 1 < count ? rows.at(i + 1) : nullptr;
    for (int d = 0; d < head_dim; d += lanes) {
      const __mmask16 mask = head_mask(head_dim - d);
      const __m256i low = load_bf16(first, rows.dtype, d, mask);
      const __m256i high = second != nullptr ? load_bf16(second, rows.dtype, d, mask) : _mm256_setzero_si256();
      special |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(low, exponent_bits), exponent_bits);
      special |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(high, exponent_bits), exponent_bits);
      _mm512_mask_storeu_epi32(out + d, mask, interleave(low, high));
    }
  }
  zero(out, static_cast<std::int64_t>(padded - i) * head_dim * 2);
  return special == 0;
}

// Writes out[j][i] = in[i][j] for a 16 x 16 tile of 32-bit elements; strides in elements. Writes only the first
// `rows` rows of out.
inline void transpose16(const Pair* in, std::int64_t in_stride, Pair* out, std::int64_t out_stride, int rows) {
  __m512i a[lanes];
  __m512i b[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) a[i] = _mm512_loadu_si512(in + i * in_stride);
#pragma GCC unroll 8
  for (int i = 0; i < lanes; i += 2) {  // pairs of rows, then of pairs, within 128-bit lanes
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < lanes; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // a[4g + i] holds rows 4g .. 4g + 3 of columns i, i + 4, i + 8, i + 12
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD);
    a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xDD);
  }
  for (int i = 0; i < rows; ++i) _mm512_storeu_si512(out + i * out_stride, a[i]);
}

void pack_queries(const Rows& rows, int count, int head_dim, void* packed) {
  alignas(64) Pair pairs[strip][max_head_dim / 2 + lanes];  // a tile may read past a row's end
  for (int i = 0; i < strip; ++i) {
    const void* const row = i < count ? rows.at(i) : nullptr;
    for (int d = 0; d < head_dim; d += lanes) {
      const __m256i bits =
          row == nullptr ? _mm256_setzero_si256() : load_bf16(row, rows.dtype, d, head_mask(head_dim - d));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs[i] + d / 2), bits);
    }
  }
  auto* out = static_cast<Pair*>(packed);
  for (int d = 0; d < head_dim / 2; d += lanes)
    for (int i = 0; i < strip; i += lanes)
      transpose16(pairs[i] + d, max_head_dim / 2 + lanes, out + d * strip + i, strip,
                  head_dim / 2 - d < lanes ? head_dim / 2 - d : lanes);
}

}  // namespace
}  // namespace pbsattn::cpu
