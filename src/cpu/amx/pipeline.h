// The schedule that keeps the tile unit busy. Work comes as a stream of *units*: 32 queries against up to 128
// keys of one block. A step of the pipeline does, interleaved product by product,
//
//     S^T = K Q^T           of the unit at hand, for some groups of 32 keys,
//     P = exp2(c S - ref)   of the groups of the step before, and
//     O^T += V^T P          of the unit before that, for some tiles of head_dim.
//
// Units follow one another without a gap across blocks, strips, rows and heads.
//
// Layouts, all in tiles of 1 KiB whose rows are 64 bytes:
//     keys     [group of 32][head_dim / 32][half][16 keys][32 of head_dim]
//     values   [group of 32][head_dim / 16][16 of head_dim][16 pairs]: pair j is keys j and j + 16
//     queries  [head_dim / 32][half][16 pairs of head_dim][16 queries][2]
//     P        [group of 32][half][16 pairs][16 queries][2], the pairs as in values
//     S        [half of keys][half of queries][16 keys][16 queries] float
//     O        [head_dim / 16][half][16 of head_dim][16 queries] float
//
// The softmax measures a query's scores from their maximum over the strip's first 32 keys, once and for all:
// float32 and bf16 have the range to take what comes later, and if they should not, complete() sees it in the
// sum and the strip is done again with care (careful.h).
#pragma once

#include <array>
#include <utility>

#include "cpu/amx/isa.h"

namespace pbsattn::cpu::amx {
namespace {

constexpr int group_keys = 32;
constexpr int unit_groups = 4;
constexpr int max_tile_pairs = max_head_dim / 32;

// 32 queries of a row in the making.
struct Strip {
  std::byte* queries = nullptr;  // packed
  std::byte* out = nullptr;
  float* origin = nullptr;  // [strip]: what scores are measured from, in base 2 and scaled
  float* sum = nullptr;     // [strip]
  const AttendRow* row = nullptr;
  int first = 0;  // query of the row
  int count = 0;
};

struct Unit {
  const std::byte* keys = nullptr;
  const std::byte* values = nullptr;
  Strip* strip = nullptr;
  int groups = 0;      // of keys; 0 where there is no unit
  bool first = false;  // of its strip
  bool last = false;
  bool causal = false;
  std::int64_t diagonal = 0;  // key i is masked for query j of the strip where i > j + diagonal
  // What is to be fetched into the second-level cache meanwhile: Pipeline::fetched_bytes from each, two in a step.
  std::array<const std::byte*, 2 * unit_groups> fetched{};
  std::byte* weights = nullptr;  // P; the pipeline's
};

template <int Begin, int End, class Body>
PBSATTN_INLINE void unroll(Body&& body) {
  if constexpr (Begin < End) {
    body(std::integral_constant<int, Begin>{});
    unroll<Begin + 1, End>(body);
  }
}

// Hides keys after a query: for a group of scores whose key 0 is `ahead` tokens after query 0 of the strip.
inline void mask_group(std::byte* scores, std::int64_t ahead) {
  const I32 lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int tile = 0; tile < 4; ++tile) {
    for (int key = 0; key < tile_rows; ++key) {
      F32& s = f32_at(scores + tile * tile_bytes + key * tile_row_bytes);
      std::int64_t blind = ahead + tile / 2 * tile_rows + key - tile % 2 * lanes;
      blind = blind < 0 ? 0 : blind > lanes ? lanes : blind;
      s = lane >= static_cast<std::int32_t>(blind) ? s : splat(-__builtin_inff());
    }
  }
}

// Computes S of one group of keys.
inline void multiply_group(const std::byte* keys, const std::byte* queries, int pairs, std::byte* scores,
                           std::int64_t half_stride, std::int64_t tile_stride, std::int64_t row_stride) {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int pair = 0; pair < pairs; ++pair) {
    tile_load<4>(keys + pair * 2 * tile_bytes);
    tile_load<5>(keys + (pair * 2 + 1) * tile_bytes);
    tile_load<6>(queries + pair * 2 * tile_bytes);
    tile_load<7>(queries + (pair * 2 + 1) * tile_bytes);
    tile_product<0, 4, 6>();
    tile_product<1, 4, 7>();
    tile_product<2, 5, 6>();
    tile_product<3, 5, 7>();
  }
  tile_store<0>(scores, row_stride);
  tile_store<1>(scores + tile_stride, row_stride);
  tile_store<2>(scores + half_stride, row_stride);
  tile_store<3>(scores + half_stride + tile_stride, row_stride);
}

// Computes 16 rows of O^T (+)= V^T P, over some groups of keys; `value_tiles` lie between one group's and the next's.
inline void accumulate_tile(const std::byte* values, const std::byte* weights, int value_tiles, int groups, bool first,
                            std::byte* out) {
  if (first) {
    tile_zero<0>();
    tile_zero<1>();
  } else {
    tile_load<0>(out);
    tile_load<1>(out + tile_bytes);
  }
  for (int group = 0; group < groups; ++group) {
    tile_load<4>(values + group * value_tiles * tile_bytes);
    tile_load<6>(weights + group * 2 * tile_bytes);
    tile_load<7>(weights + (group * 2 + 1) * tile_bytes);
    tile_product<0, 4, 6>();
    tile_product<1, 4, 7>();
  }
  tile_store<0>(out);
  tile_store<1>(out + tile_bytes);
}

// Head_dim is up to 32 * Pairs.
template <int Pairs>
class Pipeline {
 public:
  static constexpr int step_groups = Pairs % 4 == 0 ? 1 : Pairs % 2 == 0 ? 2 : 4;  // so that step_out_tiles is even
  static constexpr int steps = unit_groups / step_groups;
  static constexpr int step_out_tiles = 2 * Pairs / steps;                      // of head_dim, in each step
  static constexpr int key_rounds = Pairs * step_groups;                        // of 32 keys by 32 of head_dim
  static constexpr int rounds = key_rounds + step_out_tiles / 2 * unit_groups;  // then of 32 of head_dim by 32 keys
  static constexpr int step_products = 4 * rounds;
  static constexpr int fetches = 2 * steps;                         // of a unit
  static constexpr int fetched_bytes = step_products * cache_line;  // of each; no more than a strip's queries take
  static constexpr int score_bytes = step_groups * 4 * tile_bytes;
  static constexpr int weight_bytes = unit_groups * 2 * tile_bytes;
  static constexpr int scratch_bytes = 2 * score_bytes + 2 * weight_bytes;

  Pipeline(std::byte* scratch, float scale) : scale_(scale) {
    for (int i = 0; i < 2; ++i) {
      scores_[i] = scratch + i * score_bytes;
      weights_[i] = scratch + 2 * score_bytes + i * weight_bytes;
    }
  }

  // Takes in a unit, and calls complete(strip) for a strip whose last unit is through. A unit without groups
  // only moves the others along; two of them drain the pipeline.
  template <class Complete>
  void push(const Unit& unit, Complete&& complete) {
    units_[2] = units_[1];
    units_[1] = units_[0];
    units_[0] = unit;
    units_[0].weights = weights_[parity_ ^= 1];
    for (int step = 0; step < steps; ++step) {
      const Unit& exp = step == 0 ? units_[1] : units_[0];
      const Unit& out = step == 0 ? units_[2] : units_[1];
      const int behind = (step + steps - 1) % steps;
      std::swap(scores_[0], scores_[1]);  // [0] is written, [1] is read
      if (exp.groups > behind * step_groups) prepare(exp, behind * step_groups);
      if (unit.groups == unit_groups && exp.groups == unit_groups && out.groups == unit_groups)
        run_full(unit, step, exp, behind, out);
      else
        run_parts(unit, step * step_groups, exp, behind * step_groups, out, behind);
      if (step == 0 && out.last) {
        complete(*out.strip);
        loaded_ = nullptr;
      }
    }
  }

 private:
  // Masks a step's scores, and finds what a strip's first are to be measured from.
  void prepare(const Unit& unit, int group) {
    for (int g = 0; unit.causal && g < step_groups; ++g)
      mask_group(scores_[1] + g * 4 * tile_bytes, (group + g) * group_keys - unit.diagonal);
    if (!unit.first || group != 0) return;
    for (int half = 0; half < 2; ++half) {
      const std::byte* const s = scores_[1] + half * tile_bytes;
      F32 a = f32_at(s);
      F32 b = f32_at(s + 2 * tile_bytes);
      for (int key = 1; key < tile_rows; ++key) {
        a = larger(a, f32_at(s + key * tile_row_bytes));
        b = larger(b, f32_at(s + 2 * tile_bytes + key * tile_row_bytes));
      }
      f32_at(unit.strip->origin + half * lanes) = larger(a, b) * scale_;
      f32_at(unit.strip->sum + half * lanes) = F32{};
    }
  }

  // The exponentials of one step, to be called for by pieces: piece i is a vector of 16 queries for each of two
  // keys.
  struct Exponentials {
    static constexpr int pieces = step_groups * 32;

    PBSATTN_INLINE Exponentials(const Unit& unit, int group, const std::byte* step_scores, float scale)
        : scores(step_scores), weights(unit.weights + group * 2 * tile_bytes), factor(splat(scale)) {
      for (int half = 0; half < 2; ++half) {
        minus_origin[half] = -f32_at(unit.strip->origin + half * lanes);
        sum[half] = f32_at(unit.strip->sum + half * lanes);
      }
    }
    PBSATTN_INLINE void piece(int i) {
      const int half = i % 2;
      const int key = i / 2 % tile_rows;
      const int group = i / 32;
      const std::byte* const s = scores + (group * 4 + half) * tile_bytes + key * tile_row_bytes;
      const F32 low = exp2_cubic(multiply_add(f32_at(s), factor, minus_origin[half]), bf16_half_ulp);
      const F32 high = exp2_cubic(multiply_add(f32_at(s + 2 * tile_bytes), factor, minus_origin[half]), bf16_half_ulp);
      const U32 pairs = cut_to_pairs(low, high);
      sum[half] = add_pairs(sum[half], pairs);  // as rounded, so that the quotient stays a weighted mean
      u32_at(weights + (group * 2 + half) * tile_bytes + key * tile_row_bytes) = pairs;
    }
    PBSATTN_INLINE void finish(const Unit& unit) {
      for (int half = 0; half < 2; ++half) f32_at(unit.strip->sum + half * lanes) = sum[half];
    }

    const std::byte* scores;
    std::byte* weights;
    F32 factor;
    F32 minus_origin[2];
    F32 sum[2];
  };

  // Runs one step of three whole units. Where that takes 32 keys, even ones go backwards, so that a step begins with
  // the right operands that the one before ended with. Longer steps gain nothing by it.
  void run_full(const Unit& qk, int step, const Unit& exp, int behind, const Unit& pv) {
    if (steps == unit_groups && step % 2 == 0)
      run_spread<true>(qk, step, exp, behind, pv);
    else
      run_spread<false>(qk, step, exp, behind, pv);
  }

  // Runs a step with its exponentials spread evenly over the products.
  template <bool Backwards>
  [[gnu::noinline]] void run_spread(const Unit& qk, int step, const Unit& exp, int behind, const Unit& pv) {
    constexpr int pieces = Exponentials::pieces;
    // A step that goes backwards ends with its scores, and the exponentials of the next can't begin at once.
    constexpr int wait = steps == unit_groups && !Backwards ? 4 : 0;
    const std::size_t place = 2 * static_cast<std::size_t>(step);
    const std::byte* const fetched[] = {qk.fetched[place], qk.fetched[place + 1]};
    Exponentials exps(exp, behind * step_groups, scores_[1], scale_);
    const auto after = [&](auto index) __attribute__((always_inline)) {
      constexpr int product = index.value;
      __builtin_prefetch(fetched[0] + product * cache_line, 0, 2);
      __builtin_prefetch(fetched[1] + product * cache_line, 0, 2);
      constexpr auto due = [](int products) {
        return products <= wait ? 0 : pieces * (products - wait) / (step_products - wait);
      };
      unroll<due(product), due(product + 1)>([&](auto i) __attribute__((always_inline)) { exps.piece(i.value); });
    };
    multiply_both<Backwards>(qk, step * step_groups, pv, behind, after);
    exps.finish(exp);
  }

  // Runs one step of whatever part of the units is there, one thing after the other.
  [[gnu::noinline]] void run_parts(const Unit& qk, int qk_group, const Unit& exp, int exp_group, const Unit& pv,
                                   int part) {
    loaded_ = nullptr;
    if (exp.groups > exp_group) {
      Exponentials exps(exp, exp_group, scores_[1], scale_);
      const int groups = exp.groups - exp_group < step_groups ? exp.groups - exp_group : step_groups;
      for (int i = 0; i < groups * 32; ++i) exps.piece(i);
      exps.finish(exp);
    }
    if (qk.groups > qk_group) multiply_keys(qk, qk_group);
    if (pv.groups > 0) multiply_values(pv, part);
  }

  // Multiplies both products of a step, in rounds of 2 x 2 tile products: tiles 0 to 3 sum, 4 and 5 hold the left
  // operand, 6 and 7 the right one. The processor does not rename tiles far ahead, so every operand is loaded as soon
  // as its tile has been read for the last time, in an order that turns round every round, and a sum is stored just
  // before the next one begins in its tile.
  template <bool Backwards, class After>
  PBSATTN_INLINE void multiply_both(const Unit& qk, int qk_group, const Unit& pv, int part, const After& after) {
    static_assert(step_out_tiles % 2 == 0);
    const std::byte* const keys = qk.keys + qk_group * Pairs * 2 * tile_bytes;
    const std::byte* const queries = qk.strip->queries;
    const std::byte* const values = pv.values + part * step_out_tiles * tile_bytes;
    const std::byte* const weights = pv.weights;
    std::byte* const scores = scores_[0];
    std::byte* const out = pv.strip->out + part * step_out_tiles * 2 * tile_bytes;
    const bool first = pv.first;
    const auto left = [&](int r, int half) __attribute__((always_inline)) {
      if (r < key_rounds) return keys + (r * 2 + half) * tile_bytes;
      const int v = r - key_rounds;
      return values + (v % unit_groups * 2 * Pairs + v / unit_groups * 2 + half) * tile_bytes;
    };
    const auto right = [&](int r, int half) __attribute__((always_inline)) {
      return r < key_rounds ? queries + (r % Pairs * 2 + half) * tile_bytes
                            : weights + ((r - key_rounds) % unit_groups * 2 + half) * tile_bytes;
    };
    const auto sums = [&](int r) __attribute__((always_inline)) {  // four tiles that lie together
      return r < key_rounds ? scores + r / Pairs * 4 * tile_bytes
                            : out + (r - key_rounds) / unit_groups * 4 * tile_bytes;
    };
    if (constexpr int r = round_at(0, Backwards); right(r, 0) != loaded_) {
      tile_load<6>(right(r, 0));
      tile_load<7>(right(r, 1));
    }
    tile_stream<4>(left(round_at(0, Backwards), 0));
    tile_stream<5>(left(round_at(0, Backwards), 1));
    unroll<0, rounds>([&](auto index) __attribute__((always_inline)) {
      constexpr int i = index.value;
      constexpr int r = round_at(i, Backwards);
      constexpr int before = i > 0 ? round_at(i - 1, Backwards) : -1;
      constexpr bool more = i + 1 < rounds;
      constexpr int next = more ? round_at(i + 1, Backwards) : r;
      // Where sums begin, those before them are stored.
      constexpr bool begins = before < 0 || sum_of(r) != sum_of(before);
      const auto begin = [&](auto sum) __attribute__((always_inline)) {
        constexpr int t = sum.value;
        if constexpr (begins && before >= 0) tile_store<t>(sums(before) + t * tile_bytes);
        if constexpr (begins && r < key_rounds) {
          tile_zero<t>();
        } else if constexpr (begins) {
          if (first)
            tile_zero<t>();
          else
            tile_load<t>(sums(r) + t * tile_bytes);
        }
      };
      constexpr int a = i % 2;  // even rounds take sums 0 1 3 2, odd ones 1 0 2 3
      constexpr int b = 1 - a;
      begin(std::integral_constant<int, a>{});
      tile_product<a, 4, 6 + a>();
      after(std::integral_constant<int, 4 * i>{});
      begin(std::integral_constant<int, b>{});
      tile_product<b, 4, 6 + b>();
      after(std::integral_constant<int, 4 * i + 1>{});
      if constexpr (more) tile_stream<4>(left(next, 0));
      begin(std::integral_constant<int, 2 + b>{});
      tile_product<2 + b, 5, 6 + b>();
      after(std::integral_constant<int, 4 * i + 2>{});
      if constexpr (more) tile_load<6 + b>(right(next, b));
      begin(std::integral_constant<int, 2 + a>{});
      tile_product<2 + a, 5, 6 + a>();
      after(std::integral_constant<int, 4 * i + 3>{});
      if constexpr (more) tile_load<6 + a>(right(next, a));
      if constexpr (more) tile_stream<5>(left(next, 1));
    });
    constexpr int last = round_at(rounds - 1, Backwards);
    loaded_ = right(last, 0);
    unroll<0, 4>([&](auto sum)
                     __attribute__((always_inline)) { tile_store<sum.value>(sums(last) + sum.value * tile_bytes); });
  }
  // Tells which sums a round adds to, and which round is the i-th.
  static constexpr int sum_of(int r) {
    return r < key_rounds ? r / Pairs : step_groups + (r - key_rounds) / unit_groups;
  }
  static constexpr int round_at(int i, bool backwards) { return backwards ? rounds - 1 - i : i; }

  // Multiplies the products of a step one after the other, of whatever part of the units is there.
  void multiply_keys(const Unit& unit, int first_group) {
    const int end = unit.groups < first_group + step_groups ? unit.groups : first_group + step_groups;
    for (int group = first_group; group < end; ++group)
      multiply_group(unit.keys + group * Pairs * 2 * tile_bytes, unit.strip->queries, Pairs,
                     scores_[0] + (group - first_group) * 4 * tile_bytes, 2 * tile_bytes, tile_bytes, tile_row_bytes);
  }
  void multiply_values(const Unit& unit, int part) {
    for (int tile = part * step_out_tiles; tile < (part + 1) * step_out_tiles; ++tile)
      accumulate_tile(unit.values + tile * tile_bytes, unit.weights, 2 * Pairs, unit.groups, unit.first,
                      unit.strip->out + tile * 2 * tile_bytes);
  }

  const std::byte* loaded_ = nullptr;  // what tiles 6 and 7 hold of a step before
  float scale_;
  std::byte* scores_[2];
  std::byte* weights_[2];
  int parity_ = 0;
  Unit units_[3];  // newest first
};

}  // namespace
}  // namespace pbsattn::cpu::amx
