// Rows of any dtype to float32 and back, for f32.cc: compiled once for each Highway target.
#if defined(PBSATTN_CPU_CONVERT_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef PBSATTN_CPU_CONVERT_INL_H
#undef PBSATTN_CPU_CONVERT_INL_H
#else
#define PBSATTN_CPU_CONVERT_INL_H
#endif

#include <hwy/highway.h>

#include "cpu/kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace pbsattn::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Vectors of at most row_tile lanes, which divide every head_dim.
using Narrow = hn::CappedTag<float, row_tile>;
constexpr int narrow_lanes = static_cast<int>(hn::MaxLanes(Narrow()));

// Loads float16, by hand where the target has no instructions for it: there Highway 1.0 truncates, and takes
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

// Elements d .. of a row.
template <DType dtype>
HWY_INLINE hn::Vec<Narrow> load_narrow(const void* row, int d) {
  constexpr Narrow d32;
  if constexpr (dtype == DType::f32) {
    return hn::LoadU(d32, static_cast<const float*>(row) + d);
  } else if constexpr (dtype == DType::bf16) {
    const hn::Rebind<hwy::bfloat16_t, Narrow> d16;
    return hn::PromoteTo(d32, hn::LoadU(d16, static_cast<const hwy::bfloat16_t*>(row) + d));
  } else {
    return load_f16(d32, static_cast<const std::uint16_t*>(row) + d);
  }
}

template <DType dtype>
HWY_INLINE void convert_row_of(const void* row, int head_dim, float* HWY_RESTRICT out) {
  for (int d = 0; d < head_dim; d += narrow_lanes) hn::StoreU(load_narrow<dtype>(row, d), Narrow(), out + d);
}

HWY_INLINE void convert_row(const void* row, DType dtype, int head_dim, float* HWY_RESTRICT out) {
  if (dtype == DType::f32)
    convert_row_of<DType::f32>(row, head_dim, out);
  else if (dtype == DType::bf16)
    convert_row_of<DType::bf16>(row, head_dim, out);
  else
    convert_row_of<DType::f16>(row, head_dim, out);
}

// Sums rows. Columns stay in registers while the rows go by.
template <DType dtype>
HWY_INLINE void sum_rows_of(const void* const* rows, int count, int head_dim, float* HWY_RESTRICT sum) {
  constexpr Narrow d32;
  constexpr int vectors = 8;
  int d = 0;
  for (; d + vectors * narrow_lanes <= head_dim; d += vectors * narrow_lanes) {
    hn::Vec<Narrow> total[vectors];
    HWY_UNROLL(8)
    for (int j = 0; j < vectors; ++j) total[j] = hn::Zero(d32);
    for (int i = 0; i < count; ++i) {
      const void* const row = rows[i];
      HWY_UNROLL(8)
      for (int j = 0; j < vectors; ++j) total[j] = hn::Add(total[j], load_narrow<dtype>(row, d + j * narrow_lanes));
    }
    HWY_UNROLL(8)
    for (int j = 0; j < vectors; ++j) hn::StoreU(total[j], d32, sum + d + j * narrow_lanes);
  }
  for (; d < head_dim; d += narrow_lanes) {
    auto total = hn::Zero(d32);
    for (int i = 0; i < count; ++i) total = hn::Add(total, load_narrow<dtype>(rows[i], d));
    hn::StoreU(total, d32, sum + d);
  }
}

HWY_INLINE void store_row(const float* HWY_RESTRICT row, int head_dim, DType dtype, void* out) {
  constexpr Narrow d32;
  constexpr int step = narrow_lanes;
  if (dtype == DType::f32) {
    for (int d = 0; d < head_dim; d += step) hn::StoreU(hn::LoadU(d32, row + d), d32, static_cast<float*>(out) + d);
  } else if (dtype == DType::bf16) {
    // Rounded to nearest even by hand: Highway 1.0's DemoteTo truncates.
    const hn::RebindToUnsigned<Narrow> u32;
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

}  // namespace HWY_NAMESPACE
}  // namespace pbsattn::cpu
HWY_AFTER_NAMESPACE();

#endif
