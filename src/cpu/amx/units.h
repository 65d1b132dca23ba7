// How a row's work is cut into units, and the slow but safe way to do them.
#pragma once

#include "cpu/amx/pipeline.h"

namespace pbsattn::cpu::amx {
namespace {

constexpr int unit_keys = unit_groups * group_keys;

inline int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// Counts the tile pairs of a head_dim; the packed rows are padded with zeros up to them.
inline int tile_pairs(int head_dim) {
  return ceil_div(head_dim, 32);
}

inline const std::byte* k_of(const AttendRow& row, std::int64_t block, std::int64_t block_bytes) {
  return (block < row.permuted_end ? row.permuted_k : row.k) + block * block_bytes;
}
inline const std::byte* v_of(const AttendRow& row, std::int64_t block, std::int64_t block_bytes) {
  return (block < row.permuted_end ? row.permuted_v : row.v) + block * block_bytes;
}

// Makes unit `part` of the row's i-th block for a strip; without groups where it lies wholly in the future. Other
// masked keys cost less than an uneven pipeline.
inline Unit make_unit(Strip& strip, const AttendArgs& args, int i, int part) {
  const AttendRow& row = *strip.row;
  const std::int64_t block = row.blocks[i];
  const std::int64_t skipped = part * std::int64_t{unit_keys} * tile_pairs(args.head_dim) * tile_row_bytes;
  Unit unit;
  unit.keys = k_of(row, block, args.block_bytes) + skipped;
  unit.values = v_of(row, block, args.block_bytes) + skipped;
  unit.strip = &strip;
  const int left = ceil_div(args.block - part * unit_keys, group_keys);
  unit.groups = left < unit_groups ? left : unit_groups;
  unit.causal = i == row.block_count - 1;
  if (unit.causal) {
    unit.diagonal = row.diagonal + strip.first - part * unit_keys;
    if (unit.diagonal + strip.count <= 0) unit.groups = 0;
  }
  return unit;
}

// What attend_with_care needs: a unit's scores, then its weights, each the sum of two bf16.
constexpr int careful_bytes = unit_groups * 8 * tile_bytes;

// Cuts x to bf16's 8 bits, to nearest, as float32. It is finite or NaN, and not near float32's end.
PBSATTN_INLINE F32 rounded_to_bf16(F32 x) {
  return as_f32((as_u32(x) + 0x8000U) & 0xFFFF0000U);
}

inline F32 zero_if_minus_infinity(F32 max) {
  return max == splat(-__builtin_inff()) ? F32{} : max;
}

// Adds V^T P to O^T over visible pairs only: a masked value may be infinite or NaN, and 0 * inf is NaN.
inline void accumulate_visible(const Unit& unit, int pairs, const std::byte* weights, std::byte* out) {
  const I32 lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int key = 0; key < unit.groups * group_keys; ++key) {
    const int group = key / group_keys;
    const int pair = key % tile_rows;
    const int shift = key % group_keys < tile_rows ? 16 : 0;  // the bf16 at hand as the high half of a float
    for (int half = 0; half < 2; ++half) {
      std::int64_t blind = key - unit.diagonal - half * lanes;
      blind = blind < 0 ? 0 : blind > lanes ? lanes : blind;
      const I32 visible = lane >= static_cast<std::int32_t>(blind);
      U32 bits;
      std::memcpy(&bits, weights + (group * 2 + half) * tile_bytes + pair * tile_row_bytes, sizeof bits);
      const F32 weight = as_f32(bits << shift & 0xFFFF0000U);
      for (int d = 0; d < 2 * pairs * tile_rows; ++d) {
        const int tile = d / tile_rows;
        const int row = d % tile_rows * tile_row_bytes;
        std::uint32_t value;
        std::memcpy(&value, unit.values + (group * 2 * pairs + tile) * tile_bytes + row + pair * 4, sizeof value);
        F32& o = f32_at(out + (tile * 2 + half) * tile_bytes + row);
        o = visible ? o + weight * as_f32(U32{} + (value << shift & 0xFFFF0000U)) : o;
      }
    }
  }
}

inline void attend_unit_with_care(const Unit& unit, int pairs, float scale, bool values_finite, bool fine,
                                  std::byte* scratch) {
  Strip& strip = *unit.strip;
  std::byte* const scores = scratch;
  std::byte* const weights = scratch + unit_groups * 4 * tile_bytes;
  for (int group = 0; group < unit.groups; ++group) {
    std::byte* const s = scores + group * 4 * tile_bytes;
    multiply_group(unit.keys + group * pairs * 2 * tile_bytes, strip.queries, pairs, s, 2 * tile_bytes, tile_bytes,
                   tile_row_bytes);
    if (unit.causal) mask_group(s, group * group_keys - unit.diagonal);
  }
  for (int half = 0; half < 2; ++half) {
    F32& max = f32_at(strip.origin + half * lanes);
    F32& sum = f32_at(strip.sum + half * lanes);
    const F32 old_max = max;
    const auto score = [&](int group, int key) -> const F32& {
      return f32_at(scores + (group * 4 + key / tile_rows * 2 + half) * tile_bytes + key % tile_rows * tile_row_bytes);
    };
    for (int group = 0; group < unit.groups; ++group)
      for (int key = 0; key < group_keys; ++key) max = larger(score(group, key), max);
    const F32 origin = zero_if_minus_infinity(max);
    // Subtracting before scaling keeps the exponent from rounding above 0, however large the scores are.
    const F32 factor = exp2_precise((old_max - origin) * scale);
    sum *= factor;
    for (int group = 0; group < unit.groups; ++group)
      for (int key = 0; key < tile_rows; ++key) {
        const F32 low = exp2_precise((score(group, key) - origin) * scale);
        const F32 high = exp2_precise((score(group, key + tile_rows) - origin) * scale);
        const F32 low_rounded = rounded_to_bf16(low);
        const F32 high_rounded = rounded_to_bf16(high);
        const U32 bits = cut_to_pairs(low_rounded, high_rounded);
        const U32 rest = cut_to_pairs(low - low_rounded, high - high_rounded);
        sum = add_pairs(sum, bits);
        if (fine) sum = add_pairs(sum, rest);
        std::byte* const at = weights + (group * 2 + half) * tile_bytes + key * tile_row_bytes;
        u32_at(at) = bits;
        u32_at(at + unit_groups * 2 * tile_bytes) = rest;
      }
    for (int tile = 0; tile < 2 * pairs; ++tile)
      for (int row = 0; row < tile_rows; ++row)
        f32_at(strip.out + (tile * 2 + half) * tile_bytes + row * tile_row_bytes) *= factor;
  }
  for (int i = 0; i < (fine ? 2 : 1); ++i) {
    const std::byte* const p = weights + i * unit_groups * 2 * tile_bytes;
    if (unit.causal && !values_finite)
      accumulate_visible(unit, pairs, p, strip.out);
    else
      for (int tile = 0; tile < 2 * pairs; ++tile)
        accumulate_tile(unit.values + tile * tile_bytes, p, 2 * pairs, unit.groups, false,
                        strip.out + tile * 2 * tile_bytes);
  }
}

// Attends a strip from its first block to its last with a running maximum, as a textbook has it. Where fine, weights
// have 16 bits: with infinite values around, the second 8 could turn an infinity into NaN.
inline void attend_with_care(Strip& strip, const AttendArgs& args, bool fine, std::byte* scratch) {
  const AttendRow& row = *strip.row;
  const int pairs = tile_pairs(args.head_dim);
  for (int half = 0; half < 2; ++half) {
    f32_at(strip.origin + half * lanes) = splat(-__builtin_inff());
    f32_at(strip.sum + half * lanes) = F32{};
  }
  std::memset(strip.out, 0, static_cast<std::size_t>(pairs) * 4 * tile_bytes);
  for (int i = 0; i < row.block_count; ++i)
    for (int part = 0; part < ceil_div(args.block, unit_keys); ++part) {
      const Unit unit = make_unit(strip, args, i, part);
      if (unit.groups > 0) attend_unit_with_care(unit, pairs, args.scale_log2, row.last_finite, fine, scratch);
    }
  for (int half = 0; half < 2; ++half) f32_at(strip.origin + half * lanes) *= args.scale_log2;
}

}  // namespace
}  // namespace pbsattn::cpu::amx
