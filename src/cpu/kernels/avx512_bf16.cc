// bf16 products on AVX512-BF16's vdpbf16ps: twice the f32 rate on AMD Zen 4 and later. This file alone is
// compiled for those instructions, so it includes nothing whose inline functions others might share.
#include "cpu/kernels/kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#include <cmath>

#include "cpu/kernels/avx512_bf16_pack.h"

namespace pbsattn::cpu {
namespace {

constexpr int strip_vectors = strip / lanes;
static_assert(strip_vectors == 2);

// Computes c[i][:] = beta[:] * c[i][:] + sum over k of a(i, k) . b[k][:] for row_tile rows i, where a(i, k) is the
// pair a[i * row_stride + k * k_stride] and b is [..][strip] pairs. A null beta stands for zero.
inline void product(const Pair* __restrict a, std::int64_t row_stride, std::int64_t k_stride, int k_count,
                    const Pair* __restrict b, const float* __restrict beta, float* __restrict c) {
  __m512 acc[row_tile][strip_vectors];
#pragma GCC unroll 8
  for (int i = 0; i < row_tile; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < strip_vectors; ++j)
      acc[i][j] = beta == nullptr
                      ? _mm512_setzero_ps()
                      : _mm512_mul_ps(_mm512_load_ps(beta + j * lanes), _mm512_load_ps(c + i * strip + j * lanes));
  }
  for (int k = 0; k < k_count; ++k) {
    const __m512bh b0 = as_pairs(_mm512_load_si512(b + k * strip));
    const __m512bh b1 = as_pairs(_mm512_load_si512(b + k * strip + lanes));
#pragma GCC unroll 8
    for (int i = 0; i < row_tile; ++i) {
      const __m512bh a_pair = as_pairs(_mm512_set1_epi32(static_cast<int>(a[i * row_stride + k * k_stride])));
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a_pair, b0);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], a_pair, b1);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < row_tile; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < strip_vectors; ++j) _mm512_store_ps(c + i * strip + j * lanes, acc[i][j]);
  }
}

// Returns 2^x for x <= 0 (NaN kept): 2^x = 2^f * 2^floor(x) with a minimax cubic for 2^f on [0, 1), relative error
// 7.5e-5, a 26th of bf16's half ulp. -inf gives 0.
inline __m512 exp2_for_bf16(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.0780245F);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2260672F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6958335F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999252F));
  return _mm512_scalef_ps(p, x);
}

// Returns the same to float32's accuracy, for factors that stay in float32.
inline __m512 exp2_for_f32(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(1.5353362e-4F);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3398874e-3F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6184373e-3F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5503324e-2F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022648e-1F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314720e-1F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0F));
  return _mm512_scalef_ps(p, n);
}

inline __m512 max_or_zero(__m512 max) {
  // A query that has seen nothing yet has max -inf; -inf - -inf would be NaN, so it is measured from 0.
  const __mmask16 nothing = _mm512_cmp_ps_mask(max, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
  return _mm512_mask_mov_ps(max, nothing, _mm512_setzero_ps());
}

// Returns an exponent in base 2. Subtracting before scaling keeps it from rounding above 0, however large the scores
// are.
inline __m512 exponent(__m512 score, __m512 origin, __m512 scale) {
  return _mm512_mul_ps(_mm512_sub_ps(score, origin), scale);
}

// Returns the lanes of vector j whose queries are `query` of the strip, which may lie outside of it, or later ones.
inline __mmask16 from(std::int64_t query, int j) {
  const std::int64_t before = query - j * lanes;
  return before <= 0 ? 0xFFFF : before >= lanes ? 0 : static_cast<__mmask16>(0xFFFFU << before);
}

// Returns the lanes of vector j that see a key of the block: those from its own token on, up to where the window leaves
// it behind.
inline __mmask16 sees(const BlockArgs& args, std::int64_t key, int j) {
  return from(key - args.diagonal, j) & static_cast<__mmask16>(~from(key - args.edge, j));
}

void scores(const void* keys, const void* queries, int count, int head_dim, float* out) {
  const int pairs = head_dim / 2;
  for (int i = 0; i < count; i += row_tile)
    product(static_cast<const Pair*>(keys) + static_cast<std::int64_t>(i) * pairs, pairs, 1, pairs,
            static_cast<const Pair*>(queries), nullptr, out + i * strip);
}

// Adds P V to O^T over visible pairs only, for blocks whose masked values would spoil the sum.
void accumulate_visible(const BlockArgs& args, const Pair* weights, float* out) {
  for (int key = 0; key < args.count; ++key) {
    const Pair* value =
        reinterpret_cast<const Pair*>(args.block.values) + static_cast<std::int64_t>(key / 2) * args.head_dim_v;
    const int shift = key % 2 == 0 ? 16 : 0;  // of a pair, the bf16 at hand as the high half of a float
    for (int j = 0; j < strip_vectors; ++j) {
      const __mmask16 visible = sees(args, key, j);
      __m512i bits = _mm512_load_si512(weights + key / 2 * strip + j * lanes);
      bits = _mm512_and_si512(_mm512_slli_epi32(bits, static_cast<unsigned>(shift)),
                              _mm512_set1_epi32(static_cast<int>(0xFFFF0000U)));
      const __m512 weight = _mm512_castsi512_ps(bits);
      for (int d = 0; d < args.head_dim_v; ++d) {
        const auto value_bits = static_cast<int>((value[d] << shift) & 0xFFFF0000U);
        float* o = out + d * strip + j * lanes;
        const __m512 v = _mm512_castsi512_ps(_mm512_set1_epi32(value_bits));
        _mm512_store_ps(o, _mm512_mask3_fmadd_ps(weight, v, _mm512_load_ps(o), visible));
      }
    }
  }
}

// Fetches the part of the next block's keys and values that falls to key tile `i`.
inline void prefetch_share(const BlockArgs& args, int i) {
  const int keys = args.next_end - args.next_begin;
  const int begin = args.next_begin + keys * i / args.count;
  const int end = args.next_begin + keys * (i + row_tile) / args.count;
  const auto fetch = [&](const std::byte* rows, int row_bytes) {
    for (int line = begin * row_bytes / cache_line; line < end * row_bytes / cache_line; ++line)
      __builtin_prefetch(rows + line * cache_line, 0, 2);
  };
  fetch(args.next.keys, args.head_dim * 2);
  fetch(args.next.values, args.head_dim_v * 2);
}

void attend_block(const BlockArgs& args, const StripState& state) {
  float* const s = args.scratch;
  Pair* const weights = reinterpret_cast<Pair*>(args.scratch + args.count * strip);
  const int pairs = args.head_dim / 2;
  const Pair* const keys = reinterpret_cast<const Pair*>(args.block.keys);
  const Pair* const values = reinterpret_cast<const Pair*>(args.block.values);
  for (int i = 0; i < args.count; i += row_tile) {
    product(keys + static_cast<std::int64_t>(i) * pairs, pairs, 1, pairs, static_cast<const Pair*>(args.queries),
            nullptr, s + i * strip);
    prefetch_share(args, i);
  }
  if (args.logits.softcap != 0) args.logits.cap(s, args.count * strip, args.logits);

  alignas(64) float rescale[strip];
  const __m512 scale = _mm512_set1_ps(args.logits.scale_log2);
  const __m512bh ones = as_pairs(_mm512_set1_epi16(0x3F80));
  for (int j = 0; j < strip_vectors; ++j) {
    float* const column = s + j * lanes;
    const __m512 old_max = _mm512_load_ps(state.max + j * lanes);
    __m512 max = old_max;
    if (args.masked) {
      for (int key = 0; key < args.count; ++key) {
        const __mmask16 visible = sees(args, key, j);
        const __m512 masked =
            _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), visible, _mm512_load_ps(column + key * strip));
        _mm512_store_ps(column + key * strip, masked);
        max = _mm512_max_ps(masked, max);
      }
    } else {
      __m512 other = old_max;  // two chains: a maximum takes several cycles
      for (int key = 0; key < args.count; key += 2) {
        max = _mm512_max_ps(_mm512_load_ps(column + key * strip), max);
        other = _mm512_max_ps(_mm512_load_ps(column + (key + 1) * strip), other);
      }
      max = _mm512_max_ps(max, other);
    }
    const __m512 origin = max_or_zero(max);
    const __m512 factor = exp2_for_f32(exponent(old_max, origin, scale));
    // Weights are summed as rounded, so that the quotient stays a weighted mean.
    __m512 sum = _mm512_mul_ps(_mm512_load_ps(state.sum + j * lanes), factor);
    for (int key = 0; key < args.count; key += 2) {
      const __m512 low = exp2_for_bf16(exponent(_mm512_load_ps(column + key * strip), origin, scale));
      const __m512 high = exp2_for_bf16(exponent(_mm512_load_ps(column + (key + 1) * strip), origin, scale));
      const __m512i pair = interleave(as_bits(_mm512_cvtneps_pbh(low)), as_bits(_mm512_cvtneps_pbh(high)));
      sum = _mm512_dpbf16_ps(sum, as_pairs(pair), ones);
      _mm512_store_si512(weights + key / 2 * strip + j * lanes, pair);
    }
    _mm512_store_ps(state.max + j * lanes, max);
    _mm512_store_ps(state.sum + j * lanes, sum);
    _mm512_store_ps(rescale + j * lanes, factor);
  }

  const bool careful = args.masked && !args.values_finite;
  for (int d = 0; d < args.head_dim_v; d += row_tile)
    product(values + d, 1, args.head_dim_v, careful ? 0 : args.count / 2, weights, rescale, state.out + d * strip);
  if (careful) accumulate_visible(args, weights, state.out);
}

// Scores a whole block before any exponential, for which the maximum must be known.
void score_keys(const void* keys, const void* queries, int count, int head_dim, const Logits& logits, float* max_out,
                float* sum_out, void* exps) {
  alignas(64) float s[max_block * strip];
  scores(keys, queries, count, head_dim, s);
  if (logits.softcap != 0) logits.cap(s, count * strip, logits);
  const __m512 scale = _mm512_set1_ps(logits.scale_log2);
  auto* const rounded = static_cast<std::uint16_t*>(exps);
  for (int lane = 0; lane < strip; lane += lanes) {
    __m512 max = _mm512_set1_ps(-INFINITY);
    for (int key = 0; key < count; ++key) max = _mm512_max_ps(_mm512_load_ps(s + key * strip + lane), max);
    const __m512 origin = max_or_zero(max);
    __m512 sum = _mm512_setzero_ps();
    for (int key = 0; key < count; ++key) {
      const __m512 e = exp2_for_bf16(exponent(_mm512_load_ps(s + key * strip + lane), origin, scale));
      sum = _mm512_add_ps(sum, e);
      _mm256_store_si256(reinterpret_cast<__m256i*>(rounded + key * strip + lane), as_bits(_mm512_cvtneps_pbh(e)));
    }
    _mm512_store_ps(max_out + lane, max);
    _mm512_store_ps(sum_out + lane, sum);
  }
}

// Scores keys by the 16 queries from `lane` on. Even and odd pairs go to accumulators of their own: with half as many,
// a dot product would wait for the one before it.
void score_half(const Pair* __restrict keys, const Pair* __restrict queries, int count, int pairs, float* out) {
  for (int first = 0; first < count;
       first += row_tile, keys += std::int64_t{row_tile} * pairs, out += row_tile * strip) {
    __m512 acc[row_tile][2];
#pragma GCC unroll 8
    for (int i = 0; i < row_tile; ++i) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int k = 0; k < pairs; k += 2) {  // head_dim is a multiple of 8
      const __m512bh b0 = as_pairs(_mm512_load_si512(queries + k * strip));
      const __m512bh b1 = as_pairs(_mm512_load_si512(queries + (k + 1) * strip));
#pragma GCC unroll 8
      for (int i = 0; i < row_tile; ++i) {
        const Pair* const key = keys + i * pairs + k;
        acc[i][0] = _mm512_dpbf16_ps(acc[i][0], as_pairs(_mm512_set1_epi32(static_cast<int>(key[0]))), b0);
        acc[i][1] = _mm512_dpbf16_ps(acc[i][1], as_pairs(_mm512_set1_epi32(static_cast<int>(key[1]))), b1);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < row_tile; ++i) _mm512_store_ps(out + i * strip, _mm512_add_ps(acc[i][0], acc[i][1]));
  }
}

void sum_exps(const SumArgs& args, float* max_out, float* sum_out) {
  alignas(64) float s[max_block * strip];
  if (args.by_half())
    score_half(reinterpret_cast<const Pair*>(args.block.keys), static_cast<const Pair*>(args.queries) + args.first,
               args.count, args.head_dim / 2, s + args.first);
  else
    scores(args.block.keys, args.queries, args.count, args.head_dim, s);
  if (args.logits.softcap != 0) args.logits.cap(s, std::int64_t{args.count} * strip, args.logits);
  const __m512 scale = _mm512_set1_ps(args.logits.scale_log2);
  for (int lane = args.first; lane < args.last; lane += lanes) {
    float* const column = s + lane;
    if (args.seen != nullptr) {
      const __m512i keys = _mm512_loadu_si512(args.seen + lane);
      for (int key = 0; key < args.count; ++key) {
        const __mmask16 visible = _mm512_cmplt_epi32_mask(_mm512_set1_epi32(key), keys);
        _mm512_store_ps(column + key * strip,
                        _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), visible, _mm512_load_ps(column + key * strip)));
      }
    }
    __m512 max[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};  // two chains: a step takes several cycles
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const int even = args.count / 2 * 2;
    for (int key = 0; key < even; key += 2)
      for (int i = 0; i < 2; ++i) max[i] = _mm512_max_ps(_mm512_load_ps(column + (key + i) * strip), max[i]);
    if (even < args.count) max[0] = _mm512_max_ps(_mm512_load_ps(column + even * strip), max[0]);
    max[0] = _mm512_max_ps(max[0], max[1]);
    const __m512 origin = max_or_zero(max[0]);
    const auto exp_of = [&](int key) {
      return exp2_for_bf16(exponent(_mm512_load_ps(column + key * strip), origin, scale));
    };
    for (int key = 0; key < even; key += 2)
      for (int i = 0; i < 2; ++i) sum[i] = _mm512_add_ps(sum[i], exp_of(key + i));
    if (even < args.count) sum[0] = _mm512_add_ps(sum[0], exp_of(even));
    _mm512_store_ps(max_out + lane, max[0]);
    _mm512_store_ps(sum_out + lane, _mm512_add_ps(sum[0], sum[1]));
  }
}

void weigh_keys(const void* exps, int strips, int count, const float* factors, float* weights) {
  for (int key = 0; key < count; ++key) {
    __m512 total = _mm512_setzero_ps();
    for (int s = 0; s < strips; ++s) {
      const auto* row = static_cast<const std::uint16_t*>(exps) + (static_cast<std::int64_t>(s) * count + key) * strip;
      for (int lane = 0; lane < strip; lane += lanes) {
        const __m512 factor = _mm512_load_ps(factors + s * strip + lane);
        const __mmask16 real = _mm512_cmp_ps_mask(factor, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        const __m512 e = load_f32(row, DType::bf16, lane, 0xFFFF);
        total = _mm512_mask3_fmadd_ps(e, factor, total, real);
      }
    }
    weights[key] += _mm512_reduce_add_ps(total);
  }
}

constexpr Kernels kernels{.name = "avx512_bf16",
                          .products = Precision::bf16,
                          .element_size = 2,
                          .gathers = false,
                          .pack = {pack_keys, pack_values, pack_queries},
                          .attend_block = attend_block,
                          .score_keys = score_keys,
                          .sum_exps = sum_exps,
                          .weigh_keys = weigh_keys};

}  // namespace

const Kernels* avx512_bf16_kernels() {
  // Intel's vdpbf16ps is no faster than its f32 multiply-add, so there the f32 path is the better one.
  const bool amd = __builtin_cpu_is("amd") != 0;
  const bool supported = __builtin_cpu_supports("avx512bf16") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
                         __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0;
  return amd && supported ? &kernels : nullptr;
}

}  // namespace pbsattn::cpu

#else

const pbsattn::cpu::Kernels* pbsattn::cpu::avx512_bf16_kernels() {
  return nullptr;
}

#endif
