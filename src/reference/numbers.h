// The three dtypes as doubles. Every value of each is a double exactly; the way back rounds once, to nearest
// even.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn::reference {

struct Format {
  int significand_bits;   // with the leading one
  int smallest_exponent;  // of the smallest subnormal, as a power of two
  double largest;
};

constexpr Format format(DType dtype) {
  switch (dtype) {
    case DType::f16: return {11, -24, 65504.0};
    case DType::bf16: return {8, -133, 0x1.FEp127};
    case DType::f32: break;
  }
  return {24, -149, std::numeric_limits<float>::max()};
}

// Returns the nearest value of the dtype, infinity beyond its range.
inline double round_to(DType dtype, double x) {
  if (!std::isfinite(x) || x == 0.0) return x;
  const Format f = format(dtype);
  int exponent = 0;
  std::frexp(x, &exponent);  // 2^(exponent-1) <= |x| < 2^exponent
  const int unit = std::max(exponent - f.significand_bits, f.smallest_exponent);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  return std::abs(rounded) > f.largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}

inline double from_f16(std::uint16_t bits) {
  const double sign = (bits & 0x8000U) != 0 ? -1.0 : 1.0;
  const int exponent = (bits >> 10) & 0x1F;
  const int fraction = bits & 0x3FF;
  if (exponent == 0x1F)
    return fraction == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  return exponent == 0 ? sign * std::ldexp(fraction, -24) : sign * std::ldexp(1024 + fraction, exponent - 25);
}

inline std::uint16_t to_f16(double x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000U : 0U;
  if (std::isnan(x)) return 0x7E00U;
  const double magnitude = std::abs(round_to(DType::f16, x));
  if (std::isinf(magnitude)) return sign | 0x7C00U;
  if (magnitude < 0x1p-14)  // zero or subnormal
    return static_cast<std::uint16_t>(sign | static_cast<int>(std::ldexp(magnitude, 24)));
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int fraction = static_cast<int>(std::ldexp(magnitude, 11 - exponent)) - 1024;
  return static_cast<std::uint16_t>(sign | (exponent + 14) << 10 | fraction);
}

// bf16 is the upper half of a float.
inline double from_bf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}
inline std::uint16_t to_bf16(double x) {
  if (std::isnan(x)) return 0x7FC0U;
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(static_cast<float>(round_to(DType::bf16, x))) >> 16);
}

inline double load(DType dtype, const void* data, std::int64_t index) {
  switch (dtype) {
    case DType::f16: return from_f16(static_cast<const std::uint16_t*>(data)[index]);
    case DType::bf16: return from_bf16(static_cast<const std::uint16_t*>(data)[index]);
    case DType::f32: break;
  }
  return static_cast<const float*>(data)[index];
}

inline void store(DType dtype, void* data, std::int64_t index, double x) {
  switch (dtype) {
    case DType::f16: static_cast<std::uint16_t*>(data)[index] = to_f16(x); return;
    case DType::bf16: static_cast<std::uint16_t*>(data)[index] = to_bf16(x); return;
    case DType::f32: break;
  }
  static_cast<float*>(data)[index] = static_cast<float>(round_to(DType::f32, x));
}

}  // namespace pbsattn::reference
