// f32 products through Highway: one source, compiled for each of its targets, chosen at run time.
#include "cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels_f32.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>

HWY_BEFORE_NAMESPACE();
namespace pbsattn::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F = hn::ScalableTag<float>;
using Vec = hn::Vec<F>;
constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
constexpr F f32;
constexpr int lanes = static_cast<int>(hn::MaxLanes(f32));
static_assert(strip % lanes == 0);
constexpr int strip_vectors = strip / lanes;

// Register tile: tile_rows x tile_vectors accumulators, within 16 registers below AVX-512, 32 with it.
constexpr int tile_rows = lanes >= 16 ? 8 : 4;
constexpr int tile_vectors = strip_vectors < 2 ? strip_vectors : 2;

// c[i][:] = beta[:] * c[i][:] + sum over k of a(i, k) * b[k][:] for row_tile rows i, where a(i, k) is
// a[i * row_stride + k * k_stride] and c, b are [..][strip]. A null beta stands for zero.
HWY_INLINE void product(const float* HWY_RESTRICT a, std::int64_t row_stride, std::int64_t k_stride, int k_count,
                        const float* HWY_RESTRICT b, const float* HWY_RESTRICT beta, float* HWY_RESTRICT c) {
  for (int row = 0; row < row_tile; row += tile_rows) {
    for (int vector = 0; vector < strip_vectors; vector += tile_vectors) {
      const float* HWY_RESTRICT a_tile = a + row * row_stride;
      const float* HWY_RESTRICT b_tile = b + vector * lanes;
      float* HWY_RESTRICT c_tile = c + row * strip + vector * lanes;
      Vec acc[tile_rows][tile_vectors];
      HWY_UNROLL(8)
      for (int i = 0; i < tile_rows; ++i) {
        HWY_UNROLL(2)
        for (int j = 0; j < tile_vectors; ++j) {
          acc[i][j] = beta == nullptr ? hn::Zero(f32)
                                      : hn::Mul(hn::Load(f32, beta + (vector + j) * lanes),
                                                hn::Load(f32, c_tile + i * strip + j * lanes));
        }
      }
      for (int k = 0; k < k_count; ++k) {
        Vec b_vec[tile_vectors];
        HWY_UNROLL(2)
        for (int j = 0; j < tile_vectors; ++j) b_vec[j] = hn::Load(f32, b_tile + k * strip + j * lanes);
        HWY_UNROLL(8)
        for (int i = 0; i < tile_rows; ++i) {
          const Vec a_vec = hn::Set(f32, a_tile[i * row_stride + k * k_stride]);
          HWY_UNROLL(2)
          for (int j = 0; j < tile_vectors; ++j) acc[i][j] = hn::MulAdd(a_vec, b_vec[j], acc[i][j]);
        }
      }
      HWY_UNROLL(8)
      for (int i = 0; i < tile_rows; ++i) {
        HWY_UNROLL(2)
        for (int j = 0; j < tile_vectors; ++j) hn::Store(acc[i][j], f32, c_tile + i * strip + j * lanes);
      }
    }
  }
}

// 2^x for x <= 0 (or NaN, kept), relative error about 1e-7: x = n + f with f in [-1/2, 1/2], a minimax
// polynomial for 2^f, then n added to the exponent. Below 2^-126 the result is 0.
HWY_INLINE Vec exp2_nonpositive(Vec x) {
  const hn::RebindToSigned<F> i32;
  const auto underflow = hn::Lt(x, hn::Set(f32, -126.0F));
  const Vec clamped = hn::IfThenElse(underflow, hn::Zero(f32), x);
  const Vec n = hn::Round(clamped);
  const Vec f = hn::Sub(clamped, n);
  Vec p = hn::Set(f32, 1.5353362e-4F);
  p = hn::MulAdd(p, f, hn::Set(f32, 1.3398874e-3F));
  p = hn::MulAdd(p, f, hn::Set(f32, 9.6184373e-3F));
  p = hn::MulAdd(p, f, hn::Set(f32, 5.5503324e-2F));
  p = hn::MulAdd(p, f, hn::Set(f32, 2.4022648e-1F));
  p = hn::MulAdd(p, f, hn::Set(f32, 6.9314720e-1F));
  p = hn::MulAdd(p, f, hn::Set(f32, 1.0F));
  const auto exponent = hn::ShiftLeft<23>(hn::ConvertTo(i32, n));
  const Vec scaled = hn::BitCast(f32, hn::Add(hn::BitCast(i32, p), exponent));
  // A NaN leaves integer conversion undefined, so it is put back by hand.
  return hn::IfThenElse(hn::Eq(x, x), hn::IfThenZeroElse(underflow, scaled), x);
}

HWY_INLINE Vec max_or_zero(Vec max) {
  // A query that has seen nothing yet has max -inf; -inf - -inf would be NaN, so it is measured from 0.
  return hn::IfThenElse(hn::Eq(max, hn::Set(f32, minus_infinity)), hn::Zero(f32), max);
}

// The unnormalised softmax weight of a score. Subtracting before scaling keeps the exponent from rounding
// above 0, however large the scores are.
HWY_INLINE Vec weight_of(Vec score, Vec origin, Vec scale) {
  return exp2_nonpositive(hn::Mul(hn::Sub(score, origin), scale));
}

// float16 by hand where the target has no instructions for it: there Highway 1.0 truncates, and takes
// infinity and NaN for numbers.
template <class D32>
HWY_INLINE hn::Vec<D32> load_f16(D32 d32, const std::uint16_t* halves) {
#if HWY_TARGET <= HWY_AVX2
  const hn::Rebind<hwy::float16_t, D32> d16;
  return hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(halves)));
#else
  const hn::RebindToUnsigned<D32> u32;
  const auto bits = hn::PromoteTo(u32, hn::LoadU(hn::Rebind<std::uint16_t, D32>(), halves));
  const auto magnitude = hn::And(bits, hn::Set(u32, 0x7FFF));
  // Shifted into place the exponent is 112 too small; a product corrects it for subnormals too.
  const auto value = hn::Mul(hn::BitCast(d32, hn::ShiftLeft<13>(magnitude)), hn::Set(d32, 0x1p112F));
  const auto special = hn::Gt(magnitude, hn::Set(u32, 0x7BFF));
  const auto exponent = hn::IfThenElseZero(special, hn::Set(u32, 0x7F800000));
  const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(u32, 0x8000)));
  return hn::BitCast(d32, hn::Or(hn::Or(hn::BitCast(u32, value), exponent), sign));
#endif
}

template <class D32>
HWY_INLINE void store_f16(D32 d32, hn::Vec<D32> value, std::uint16_t* halves) {
#if HWY_TARGET <= HWY_AVX2
  const hn::Rebind<hwy::float16_t, D32> d16;
  hn::StoreU(hn::DemoteTo(d16, value), d16, reinterpret_cast<hwy::float16_t*>(halves));
#else
  const hn::RebindToUnsigned<D32> u32;
  const auto bits = hn::BitCast(u32, value);
  const auto magnitude = hn::And(bits, hn::Set(u32, 0x7FFFFFFF));
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(u32, 1));
  const auto normal =
      hn::ShiftRight<13>(hn::Sub(hn::Add(hn::Add(magnitude, odd), hn::Set(u32, 0xFFF)), hn::Set(u32, 112U << 23)));
  // A float's unit just above 1/2 is float16's smallest number, so this addition rounds to it.
  const auto half = hn::Set(d32, 0.5F);
  const auto subnormal = hn::Sub(hn::BitCast(u32, hn::Add(hn::BitCast(d32, magnitude), half)), hn::BitCast(u32, half));
  auto rounded = hn::IfThenElse(hn::Lt(magnitude, hn::Set(u32, 113U << 23)), subnormal, normal);
  rounded = hn::IfThenElse(hn::Gt(rounded, hn::Set(u32, 0x7C00)), hn::Set(u32, 0x7C00), rounded);
  rounded = hn::IfThenElse(hn::Gt(magnitude, hn::Set(u32, 0x7F800000)), hn::Set(u32, 0x7E00), rounded);
  rounded = hn::Or(rounded, hn::And(hn::ShiftRight<16>(bits), hn::Set(u32, 0x8000)));
  HWY_ALIGN std::uint32_t lanes32[row_tile];
  hn::Store(rounded, u32, lanes32);
  for (std::size_t i = 0; i < hn::Lanes(d32); ++i) halves[i] = static_cast<std::uint16_t>(lanes32[i]);
#endif
}

void convert_row(const void* source, DType dtype, int head_dim, float* HWY_RESTRICT out) {
  const hn::CappedTag<float, row_tile> d32;
  const int step = static_cast<int>(hn::Lanes(d32));
  if (dtype == DType::f32) {
    const auto* row = static_cast<const float*>(source);
    for (int d = 0; d < head_dim; d += step) hn::StoreU(hn::LoadU(d32, row + d), d32, out + d);
  } else if (dtype == DType::bf16) {
    const hn::Rebind<hwy::bfloat16_t, decltype(d32)> d16;
    const auto* row = static_cast<const hwy::bfloat16_t*>(source);
    for (int d = 0; d < head_dim; d += step) hn::StoreU(hn::PromoteTo(d32, hn::LoadU(d16, row + d)), d32, out + d);
  } else {
    const auto* row = static_cast<const std::uint16_t*>(source);
    for (int d = 0; d < head_dim; d += step) hn::StoreU(load_f16(d32, row + d), d32, out + d);
  }
}

void load_row(const Rows& rows, int i, int head_dim, float* out) {
  convert_row(rows.at(i), rows.dtype, head_dim, out);
}

void store_row(const float* HWY_RESTRICT row, int head_dim, DType dtype, void* out) {
  const hn::CappedTag<float, row_tile> d32;
  const int step = static_cast<int>(hn::Lanes(d32));
  if (dtype == DType::f32) {
    for (int d = 0; d < head_dim; d += step) hn::StoreU(hn::LoadU(d32, row + d), d32, static_cast<float*>(out) + d);
  } else if (dtype == DType::bf16) {
    // Rounded to nearest even by hand: Highway 1.0's DemoteTo truncates.
    const hn::RebindToUnsigned<decltype(d32)> u32;
    auto* bits = static_cast<std::uint16_t*>(out);
    HWY_ALIGN std::uint32_t lanes32[row_tile];
    for (int d = 0; d < head_dim; d += step) {
      const auto value = hn::LoadU(d32, row + d);
      const auto raw = hn::BitCast(u32, value);
      const auto odd = hn::And(hn::ShiftRight<16>(raw), hn::Set(u32, 1));
      const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(raw, odd), hn::Set(u32, 0x7FFF)));
      const auto is_number = hn::RebindMask(u32, hn::Eq(value, value));
      hn::Store(hn::IfThenElse(is_number, rounded, hn::Set(u32, 0x7FC0)), u32, lanes32);
      for (int i = 0; i < step; ++i) bits[d + i] = static_cast<std::uint16_t>(lanes32[i]);
    }
  } else {
    auto* halves = static_cast<std::uint16_t*>(out);
    for (int d = 0; d < head_dim; d += step) store_f16(d32, hn::LoadU(d32, row + d), halves + d);
  }
}

void pack_keys(const Rows& rows, int count, int padded, int head_dim, void* packed, float* sum) {
  const hn::CappedTag<float, row_tile> d32;
  const int step = static_cast<int>(hn::Lanes(d32));
  float* out = static_cast<float*>(packed);
  for (int i = 0; i < count; ++i, out += head_dim) {
    load_row(rows, i, head_dim, out);
    if (sum == nullptr) continue;
    for (int d = 0; d < head_dim; d += step)
      hn::StoreU(hn::Add(hn::LoadU(d32, sum + d), hn::LoadU(d32, out + d)), d32, sum + d);
  }
  std::fill(out, static_cast<float*>(packed) + static_cast<std::int64_t>(padded) * head_dim, 0.0F);
}

bool pack_values(const Rows& rows, int count, int padded, int head_dim, void* packed) {
  pack_keys(rows, count, padded, head_dim, packed, nullptr);
  // x * 0 is 0 for every finite x and NaN for every other.
  const hn::CappedTag<float, row_tile> d32;
  const float* values = static_cast<const float*>(packed);
  auto zero = hn::Zero(d32);
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(count) * head_dim; i += hn::Lanes(d32))
    zero = hn::MulAdd(hn::LoadU(d32, values + i), hn::Zero(d32), zero);
  return hn::AllTrue(d32, hn::Eq(zero, zero));
}

void pack_queries(const Rows& rows, int count, int head_dim, void* packed) {
  HWY_ALIGN float row[max_head_dim];
  float* out = static_cast<float*>(packed);
  for (int i = 0; i < strip; ++i) {
    if (i < count)
      load_row(rows, i, head_dim, row);
    else
      std::fill(row, row + head_dim, 0.0F);
    for (int d = 0; d < head_dim; ++d) out[d * strip + i] = row[d];
  }
}

void scores(const void* keys, const void* queries, int count, int head_dim, float* out) {
  for (int i = 0; i < count; i += row_tile)
    product(static_cast<const float*>(keys) + static_cast<std::int64_t>(i) * head_dim, head_dim, 1, head_dim,
            static_cast<const float*>(queries), nullptr, out + i * strip);
}

// The mask of queries, in vector `vector` of the strip, that see the key `ahead` tokens after query 0.
HWY_INLINE hn::Mask<F> sees(std::int64_t ahead, int vector) {
  const auto clamped = static_cast<float>(std::min<std::int64_t>(ahead, strip));
  return hn::Ge(hn::Iota(f32, static_cast<float>(vector * lanes)), hn::Set(f32, clamped));
}

// O^T += P V over visible pairs only, for blocks whose masked values would spoil the sum.
void accumulate_visible(const BlockArgs& args, const float* weights, float* out) {
  for (int key = 0; key < args.count; ++key) {
    const float* value = static_cast<const float*>(args.values) + static_cast<std::int64_t>(key) * args.head_dim;
    for (int vector = 0; vector < strip_vectors; ++vector) {
      const auto visible = sees(key - args.diagonal, vector);
      const Vec weight = hn::Load(f32, weights + key * strip + vector * lanes);
      for (int d = 0; d < args.head_dim; ++d) {
        float* o = out + d * strip + vector * lanes;
        const Vec old = hn::Load(f32, o);
        hn::Store(hn::IfThenElse(visible, hn::MulAdd(weight, hn::Set(f32, value[d]), old), old), f32, o);
      }
    }
  }
}

void attend_block(const BlockArgs& args, const StripState& state) {
  float* weights = args.scratch;
  scores(args.keys, args.queries, args.count, args.head_dim, weights);

  HWY_ALIGN float rescale[strip];
  const Vec scale = hn::Set(f32, args.scale_log2);
  for (int vector = 0; vector < strip_vectors; ++vector) {
    float* column = weights + vector * lanes;
    const Vec old_max = hn::Load(f32, state.max + vector * lanes);
    Vec max = old_max;
    for (int key = 0; key < args.count; ++key) {
      Vec s = hn::Load(f32, column + key * strip);
      if (args.causal) {
        s = hn::IfThenElse(sees(key - args.diagonal, vector), s, hn::Set(f32, minus_infinity));
        hn::Store(s, f32, column + key * strip);
      }
      max = hn::Max(s, max);
    }
    const Vec origin = max_or_zero(max);
    const Vec factor = weight_of(old_max, origin, scale);
    Vec sum = hn::Mul(hn::Load(f32, state.sum + vector * lanes), factor);
    for (int key = 0; key < args.count; ++key) {
      const Vec p = weight_of(hn::Load(f32, column + key * strip), origin, scale);
      sum = hn::Add(sum, p);
      hn::Store(p, f32, column + key * strip);
    }
    hn::Store(max, f32, state.max + vector * lanes);
    hn::Store(sum, f32, state.sum + vector * lanes);
    hn::Store(factor, f32, rescale + vector * lanes);
  }

  const bool careful = args.causal && !args.values_finite;
  const float* values = static_cast<const float*>(args.values);
  for (int d = 0; d < args.head_dim; d += row_tile)
    product(values + d, 1, args.head_dim, careful ? 0 : args.count, weights, rescale, state.out + d * strip);
  if (careful) accumulate_visible(args, weights, state.out);
}

void finish(const StripState& state, int count, int head_dim, float scale_log2, void* out, DType dtype,
            std::int64_t stride, float* lse) {
  constexpr int tile = 8;  // columns of O^T turned into rows at a time: few enough that all stay in L1
  HWY_ALIGN float rows[tile][max_head_dim];
  const int size = dtype == DType::f32 ? 4 : 2;
  for (int first = 0; first < count; first += tile) {
    float inverse[tile];
    for (int i = 0; i < tile; ++i) inverse[i] = state.sum[first + i] == 0.0F ? 0.0F : 1.0F / state.sum[first + i];
    for (int d = 0; d < head_dim; ++d)
      for (int i = 0; i < tile; ++i) rows[i][d] = state.out[d * strip + first + i] * inverse[i];
    for (int i = 0; i < std::min(tile, count - first); ++i)
      store_row(rows[i], head_dim, dtype, static_cast<std::byte*>(out) + (first + i) * stride * size);
  }
  if (lse == nullptr) return;
  constexpr float ln2 = 0.693147180559945F;
  for (int i = 0; i < count; ++i)
    lse[i] = state.sum[i] == 0.0F ? minus_infinity : ln2 * (state.max[i] * scale_log2 + std::log2(state.sum[i]));
}

void score_keys(const void* keys, const void* queries, int count, int head_dim, float scale_log2, float* max_out,
                float* sum_out, float* exps) {
  scores(keys, queries, count, head_dim, exps);
  const Vec scale = hn::Set(f32, scale_log2);
  for (int lane = 0; lane < strip; lane += lanes) {
    const Vec old_max = hn::Load(f32, max_out + lane);
    Vec max = old_max;
    for (int key = 0; key < count; ++key) max = hn::Max(hn::Load(f32, exps + key * strip + lane), max);
    const Vec origin = max_or_zero(max);
    Vec sum = hn::Mul(hn::Load(f32, sum_out + lane), weight_of(old_max, origin, scale));
    for (int key = 0; key < count; ++key) {
      const Vec e = weight_of(hn::Load(f32, exps + key * strip + lane), origin, scale);
      sum = hn::Add(sum, e);
      hn::Store(e, f32, exps + key * strip + lane);
    }
    hn::Store(max, f32, max_out + lane);
    hn::Store(sum, f32, sum_out + lane);
  }
}

void weigh_keys(const float* exps, int count, const float* factors, float* weights) {
  for (int key = 0; key < count; ++key) {
    Vec total = hn::Zero(f32);
    for (int lane = 0; lane < strip; lane += lanes) {
      const Vec factor = hn::Load(f32, factors + lane);
      const Vec share = hn::Mul(hn::Load(f32, exps + key * strip + lane), factor);
      // Eq, since Highway's Ne says false of a NaN on some targets.
      total = hn::Add(total, hn::IfThenZeroElse(hn::Eq(factor, hn::Zero(f32)), share));
    }
    weights[key] = hn::GetLane(hn::SumOfLanes(f32, total));
  }
}

void add_row(const void* row, DType dtype, int head_dim, float* sum) {
  HWY_ALIGN float values[max_head_dim];
  convert_row(row, dtype, head_dim, values);
  for (int d = 0; d < head_dim; ++d) sum[d] += values[d];
}

void round_row(DType dtype, int count, float* row) {
  if (dtype == DType::f32) return;
  HWY_ALIGN std::uint16_t rounded[max_head_dim];
  store_row(row, count, dtype, rounded);
  convert_row(rounded, dtype, count, row);
}

const Kernels* table() {
  static constexpr std::string_view name = HWY_TARGET == HWY_AVX3_DL || HWY_TARGET == HWY_AVX3 ? "avx512_f32"
                                           : HWY_TARGET == HWY_AVX2                            ? "avx2_f32"
                                           : HWY_TARGET == HWY_SSE4                            ? "sse4_f32"
                                                                                               : "baseline_f32";
  static constexpr Kernels kernels{name,         Precision::f32, sizeof(float), pack_keys,  pack_values,
                                   pack_queries, attend_block,   finish,        score_keys, weigh_keys,
                                   scores,       add_row,        round_row};
  return &kernels;
}

}  // namespace HWY_NAMESPACE
}  // namespace pbsattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <hwy/targets.h>

namespace pbsattn::cpu {
HWY_EXPORT(table);

std::vector<const Kernels*> f32_kernels() {
  // Highway dispatches to the best target left enabled: disable them one by one, best first.
  std::vector<const Kernels*> found;
  std::int64_t disabled = 0;
  for (std::int64_t left = hwy::SupportedTargets() & HWY_TARGETS; left != 0; left &= left - 1) {
    hwy::DisableTargets(disabled);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    const Kernels* const kernels = HWY_DYNAMIC_DISPATCH(table)();
    if (found.empty() || found.back()->name != kernels->name) found.push_back(kernels);
    disabled |= left & -left;
  }
  hwy::DisableTargets(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return found;
}

}  // namespace pbsattn::cpu
#endif
