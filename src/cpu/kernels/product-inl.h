// Register tiles of the two products and the steps of softmax, in float32, for f32.cc: compiled
// once for each Highway target.
#if defined(PBSATTN_CPU_PRODUCT_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef PBSATTN_CPU_PRODUCT_INL_H
#undef PBSATTN_CPU_PRODUCT_INL_H
#else
#define PBSATTN_CPU_PRODUCT_INL_H
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <limits>

#include "cpu/kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace pbsattn::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F = hn::ScalableTag<float>;
using Vec = hn::Vec<F>;
constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
constexpr F f32;
constexpr int lanes = static_cast<int>(hn::MaxLanes(f32));
constexpr int strip_vectors = strip / lanes;

// A tile is tile_rows rows of K, or columns of V, by tile_vectors vectors of queries: its accumulators, an operand
// for each vector and a broadcast fill 16 registers below AVX-512. Where tile_rows doesn't divide a count,
// a multiple of row_tile, one or two smaller tiles go first.
constexpr int tile_rows = lanes >= 16 ? 8 : 6;
constexpr int tile_rest = lanes >= 16 ? 8 : 4;
constexpr int tile_vectors = 2;
static_assert(strip_vectors % tile_vectors == 0);
static_assert(row_tile % 8 == 0);

// Some queries of a strip, and the vectors of a tile that takes them.
template <int vectors>
struct Lanes {
  static constexpr int step = vectors * lanes;
  int first = 0, last = strip;
};
constexpr int half_vectors = std::min(tile_vectors, half_strip / lanes);

// Writes out[i][:] = rows[i][:] . queries[:][:] for `count` rows of head_dim elements; queries is [head_dim][strip].
template <int count, int vectors = tile_vectors>
HWY_INLINE void score_tile(const float* const* rows, int head_dim, const float* HWY_RESTRICT queries,
                           float* HWY_RESTRICT out, Lanes<vectors> part = {}) {
  const float* HWY_RESTRICT row[count];
  HWY_UNROLL(8)
  for (int i = 0; i < count; ++i) row[i] = rows[i];
  for (int lane = part.first; lane < part.last; lane += part.step) {
    Vec total[count][vectors];
    HWY_UNROLL(8)
    for (int i = 0; i < count; ++i) {
      HWY_UNROLL(2)
      for (int j = 0; j < vectors; ++j) total[i][j] = hn::Zero(f32);
    }
    for (int d = 0; d < head_dim; ++d) {
      Vec query[vectors];
      HWY_UNROLL(2)
      for (int j = 0; j < vectors; ++j) query[j] = hn::Load(f32, queries + d * strip + lane + j * lanes);
      HWY_UNROLL(8)
      for (int i = 0; i < count; ++i) {
        const Vec key = hn::Set(f32, row[i][d]);
        HWY_UNROLL(2)
        for (int j = 0; j < vectors; ++j) total[i][j] = hn::MulAdd(key, query[j], total[i][j]);
      }
    }
    HWY_UNROLL(8)
    for (int i = 0; i < count; ++i) {
      HWY_UNROLL(2)
      for (int j = 0; j < vectors; ++j) hn::Store(total[i][j], f32, out + i * strip + lane + j * lanes);
    }
  }
}

// Writes out[i][:] = rescale[:] * out[i][:] + sum over keys of rows[key][i] * weights[key][:] for `count` columns i.
template <int count>
HWY_INLINE void value_tile(const float* const* rows, int first, int keys, const float* HWY_RESTRICT weights,
                           const float* HWY_RESTRICT rescale, float* HWY_RESTRICT out) {
  for (int lane = 0; lane < strip; lane += tile_vectors * lanes) {
    Vec total[count][tile_vectors];
    HWY_UNROLL(8)
    for (int i = 0; i < count; ++i) {
      HWY_UNROLL(2)
      for (int j = 0; j < tile_vectors; ++j)
        total[i][j] = hn::Mul(hn::Load(f32, rescale + lane + j * lanes),
                              hn::Load(f32, out + (first + i) * strip + lane + j * lanes));
    }
    for (int key = 0; key < keys; ++key) {
      const float* HWY_RESTRICT value = rows[key] + first;
      Vec weight[tile_vectors];
      HWY_UNROLL(2)
      for (int j = 0; j < tile_vectors; ++j) weight[j] = hn::Load(f32, weights + key * strip + lane + j * lanes);
      HWY_UNROLL(8)
      for (int i = 0; i < count; ++i) {
        const Vec column = hn::Set(f32, value[i]);
        HWY_UNROLL(2)
        for (int j = 0; j < tile_vectors; ++j) total[i][j] = hn::MulAdd(column, weight[j], total[i][j]);
      }
    }
    HWY_UNROLL(8)
    for (int i = 0; i < count; ++i) {
      HWY_UNROLL(2)
      for (int j = 0; j < tile_vectors; ++j) hn::Store(total[i][j], f32, out + (first + i) * strip + lane + j * lanes);
    }
  }
}

// Returns 2^x for x <= 0 (or NaN, kept), relative error below 2e-7: x = n + f with n whole and f in [-1/2, 1/2], a
// minimax polynomial for 2^f, times 2^n. Below 2^-126 the result is 0.
HWY_INLINE Vec exp2_nonpositive(Vec x) {
  const hn::RebindToUnsigned<F> u32;
  const Vec least = hn::Set(f32, -127.0F);
  x = hn::IfThenElse(hn::Lt(x, least), least, x);
  // Adding this rounds to whole numbers, and leaves n + 127 in the lowest bits: the exponent of 2^n, where
  // -127 stands for 0.
  const Vec magic = hn::Set(f32, 0x1.8p23F + 127.0F);
  const Vec shifted = hn::Add(x, magic);
  const Vec f = hn::Sub(x, hn::Sub(shifted, magic));
  Vec p = hn::Set(f32, 1.32647273e-3F);
  p = hn::MulAdd(p, f, hn::Set(f32, 9.67151299e-3F));
  p = hn::MulAdd(p, f, hn::Set(f32, 5.55073358e-2F));
  p = hn::MulAdd(p, f, hn::Set(f32, 2.40222424e-1F));
  p = hn::MulAdd(p, f, hn::Set(f32, 6.93147004e-1F));
  p = hn::MulAdd(p, f, hn::Set(f32, 1.0F));
  return hn::Mul(p, hn::BitCast(f32, hn::ShiftLeft<23>(hn::BitCast(u32, shifted))));
}

HWY_INLINE Vec max_or_zero(Vec max) {
  // A query that has seen nothing yet has max -inf; -inf - -inf would be NaN, so it is measured from 0.
  return hn::IfThenElse(hn::Eq(max, hn::Set(f32, minus_infinity)), hn::Zero(f32), max);
}

// Returns the unnormalised softmax weight of a score. Subtracting before scaling keeps the exponent from rounding
// above 0, however large the scores are.
HWY_INLINE Vec weight_of(Vec score, Vec origin, Vec scale) {
  return exp2_nonpositive(hn::Mul(hn::Sub(score, origin), scale));
}

// Returns the mask of queries, in the vector that begins at `lane`, that see a key of the block: those from its own
// token on, up to where the window leaves it behind.
HWY_INLINE hn::Mask<F> sees(const BlockArgs& args, std::int64_t key, int lane) {
  const auto clamped = [](std::int64_t query) {
    return hn::Set(f32, static_cast<float>(std::clamp<std::int64_t>(query, 0, strip)));
  };
  const Vec query = hn::Iota(f32, static_cast<float>(lane));
  return hn::And(hn::Ge(query, clamped(key - args.diagonal)), hn::Lt(query, clamped(key - args.edge)));
}

// Hides from each query of a strip the keys that it doesn't see.
HWY_INLINE void hide_unseen(const BlockArgs& args, int first, int count, float* scores) {
  for (int key = 0; key < count; ++key) {
    for (int lane = 0; lane < strip; lane += lanes) {
      float* const s = scores + key * strip + lane;
      const auto visible = sees(args, first + key, lane);
      hn::Store(hn::IfThenElse(visible, hn::Load(f32, s), hn::Set(f32, minus_infinity)), f32, s);
    }
  }
}

// Hides those after the first seen[query].
HWY_INLINE void hide_unseen(const std::int32_t* seen, int first, int count, float* scores) {
  const hn::RebindToSigned<F> i32;
  for (int lane = 0; lane < strip; lane += lanes) {
    const auto keys = hn::LoadU(i32, seen + lane);
    for (int key = 0; key < count; ++key) {
      float* const s = scores + key * strip + lane;
      const auto visible = hn::RebindMask(f32, hn::Lt(hn::Set(i32, first + key), keys));
      hn::Store(hn::IfThenElse(visible, hn::Load(f32, s), hn::Set(f32, minus_infinity)), f32, s);
    }
  }
}

// Turns scores[count][strip] into weights measured from `max`, in place, after raising max to their maximum;
// sum becomes factor * sum + the weights' sums, where factor, which is stored, carries sum to the new max.
template <int vectors = tile_vectors>
HWY_INLINE void softmax_step(float* HWY_RESTRICT scores, int count, float scale_log2, float* HWY_RESTRICT max,
                             float* HWY_RESTRICT sum, float* HWY_RESTRICT factor, Lanes<vectors> part = {}) {
  const Vec scale = hn::Set(f32, scale_log2);
  for (int lane = part.first; lane < part.last; lane += part.step) {
    float* HWY_RESTRICT s = scores + lane;
    Vec old[vectors], origin[vectors], total[vectors], top[2][vectors];
    HWY_UNROLL(2)
    for (int j = 0; j < vectors; ++j) old[j] = top[0][j] = top[1][j] = hn::Load(f32, max + lane + j * lanes);
    for (int key = 0; key < count; key += 2) {  // two chains a vector: a maximum takes several cycles
      const int other = std::min(key + 1, count - 1);
      HWY_UNROLL(2)
      for (int j = 0; j < vectors; ++j) {
        top[0][j] = hn::Max(hn::Load(f32, s + key * strip + j * lanes), top[0][j]);
        top[1][j] = hn::Max(hn::Load(f32, s + other * strip + j * lanes), top[1][j]);
      }
    }
    HWY_UNROLL(2)
    for (int j = 0; j < vectors; ++j) {
      top[0][j] = hn::Max(top[0][j], top[1][j]);
      origin[j] = max_or_zero(top[0][j]);
      const Vec carry = weight_of(old[j], origin[j], scale);
      total[j] = hn::Mul(hn::Load(f32, sum + lane + j * lanes), carry);
      hn::Store(carry, f32, factor + lane + j * lanes);
    }
    for (int key = 0; key < count; ++key) {
      HWY_UNROLL(2)
      for (int j = 0; j < vectors; ++j) {
        float* const place = s + key * strip + j * lanes;
        const Vec weight = weight_of(hn::Load(f32, place), origin[j], scale);
        total[j] = hn::Add(total[j], weight);
        hn::Store(weight, f32, place);
      }
    }
    HWY_UNROLL(2)
    for (int j = 0; j < vectors; ++j) {
      hn::Store(top[0][j], f32, max + lane + j * lanes);
      hn::Store(total[j], f32, sum + lane + j * lanes);
    }
  }
}

// Writes out[j][i] = rows[i][j] for 4 rows i of `columns` elements, a multiple of 4.
HWY_INLINE void transpose4(const float* const* rows, int columns, float* HWY_RESTRICT out, std::int64_t out_stride) {
#if HWY_TARGET == HWY_SCALAR
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < columns; ++j) out[j * out_stride + i] = rows[i][j];
#else
  const hn::CappedTag<float, 4> four;
  const hn::Repartition<double, decltype(four)> two;
  for (int j = 0; j < columns; j += 4) {
    const auto a = hn::LoadU(four, rows[0] + j);
    const auto b = hn::LoadU(four, rows[1] + j);
    const auto c = hn::LoadU(four, rows[2] + j);
    const auto d = hn::LoadU(four, rows[3] + j);
    const auto ab_low = hn::BitCast(two, hn::InterleaveLower(four, a, b));
    const auto ab_high = hn::BitCast(two, hn::InterleaveUpper(four, a, b));
    const auto cd_low = hn::BitCast(two, hn::InterleaveLower(four, c, d));
    const auto cd_high = hn::BitCast(two, hn::InterleaveUpper(four, c, d));
    float* const column = out + j * out_stride;
    hn::StoreU(hn::BitCast(four, hn::InterleaveLower(two, ab_low, cd_low)), four, column);
    hn::StoreU(hn::BitCast(four, hn::InterleaveUpper(two, ab_low, cd_low)), four, column + out_stride);
    hn::StoreU(hn::BitCast(four, hn::InterleaveLower(two, ab_high, cd_high)), four, column + 2 * out_stride);
    hn::StoreU(hn::BitCast(four, hn::InterleaveUpper(two, ab_high, cd_high)), four, column + 3 * out_stride);
  }
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace pbsattn::cpu
HWY_AFTER_NAMESPACE();

#endif
