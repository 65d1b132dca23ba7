// f32 products through Highway: one source, compiled for each of its targets, chosen at run time.
#include "cpu/kernels/kernels.h"

// AVX-512's later extensions bring nothing to float32, and what has no SSE4 takes scalar code.
#define HWY_DISABLED_TARGETS (HWY_AVX3_DL | HWY_SSSE3)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels/f32.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>

#include "cpu/kernels/convert-inl.h"
#include "cpu/kernels/product-inl.h"

HWY_BEFORE_NAMESPACE();
namespace pbsattn::cpu {
namespace HWY_NAMESPACE {

void pack_keys(const Rows& rows, int count, int padded, int head_dim, void* packed) {
  float* out = static_cast<float*>(packed);
  for (int i = 0; i < count; ++i, out += head_dim) convert_row(rows.at(i), rows.dtype, head_dim, out);
  std::fill(out, static_cast<float*>(packed) + static_cast<std::int64_t>(padded) * head_dim, 0.0F);
}

bool pack_values(const Rows& rows, int count, int padded, int head_dim, void* packed) {
  pack_keys(rows, count, padded, head_dim, packed);
  // x * 0 is 0 for every finite x and NaN for every other.
  const auto* values = static_cast<const float*>(packed);
  constexpr Narrow d32;
  auto zero = hn::Zero(d32);
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(count) * head_dim; i += narrow_lanes)
    zero = hn::MulAdd(hn::LoadU(d32, values + i), hn::Zero(d32), zero);
  return hn::AllTrue(d32, hn::Eq(zero, zero));
}

void pack_queries(const Rows& rows, int count, int head_dim, void* packed) {
  HWY_ALIGN float converted[4][max_head_dim];
  const float* const four[4] = {converted[0], converted[1], converted[2], converted[3]};
  auto* const out = static_cast<float*>(packed);
  for (int i = 0; i < strip; i += 4) {
    for (int j = 0; j < 4; ++j) {
      if (i + j < count)
        convert_row(rows.at(i + j), rows.dtype, head_dim, converted[j]);
      else
        std::fill_n(converted[j], head_dim, 0.0F);
    }
    transpose4(four, head_dim, out + i, strip);
  }
}

const float* row_of(const std::byte* rows, const std::int32_t* index, int i, int head_dim) {
  return reinterpret_cast<const float*>(rows) + static_cast<std::int64_t>(index == nullptr ? i : index[i]) * head_dim;
}

// Fetches what is read next, some lines with every tile: many at once would occupy the buffers that the tiles' own
// misses need.
class Fetcher {
 public:
  Fetcher(const BlockArgs& args, int steps)
      : block_(args.next),
        row_(args.next_begin),
        end_(args.next_end),
        head_dim_(args.head_dim),
        head_dim_v_(args.head_dim_v),
        longer_(std::max(head_dim_, head_dim_v_)) {
    const int lines = (end_ - row_) * ((longer_ + line - 1) / line);
    per_step_ = (lines + steps - 1) / steps;
  }
  HWY_INLINE void step() {
    for (int left = per_step_; left > 0 && row_ < end_; --left) {
      if (d_ < head_dim_) __builtin_prefetch(row_of(block_.keys, block_.index, row_, head_dim_) + d_, 0, 2);
      if (d_ < head_dim_v_) __builtin_prefetch(row_of(block_.values, block_.index, row_, head_dim_v_) + d_, 0, 2);
      d_ += line;
      if (d_ < longer_) continue;
      d_ = 0;
      ++row_;
    }
  }

 private:
  static constexpr int line = cache_line / static_cast<int>(sizeof(float));
  const PackedBlock& block_;
  int row_, end_, head_dim_, head_dim_v_, longer_;
  int d_ = 0;
  int per_step_;
};

struct NoFetcher {
  void step() {}
};

// Writes scores[i][:] for `count` rows, a multiple of row_tile.
template <class Fetch, int vectors = tile_vectors>
HWY_INLINE void score_rows(const float* const* rows, int count, int head_dim, const float* queries, float* scores,
                           Fetch& fetcher, Lanes<vectors> part = {}) {
  int i = 0;
  for (; (count - i) % tile_rows != 0; i += tile_rest) {
    score_tile<tile_rest>(rows + i, head_dim, queries, scores + i * strip, part);
    fetcher.step();
  }
  for (; i < count; i += tile_rows) {
    score_tile<tile_rows>(rows + i, head_dim, queries, scores + i * strip, part);
    fetcher.step();
  }
}

// Writes out[d][:] = rescale[:] * out[d][:] + the weighted sum of `count` rows, for all columns d.
template <class Fetch>
HWY_INLINE void add_values(const float* const* rows, int count, int head_dim, const float* weights,
                           const float* rescale, float* out, Fetch& fetcher) {
  int d = 0;
  for (; (head_dim - d) % tile_rows != 0; d += tile_rest) {
    value_tile<tile_rest>(rows, d, count, weights, rescale, out);
    fetcher.step();
  }
  for (; d < head_dim; d += tile_rows) {
    value_tile<tile_rows>(rows, d, count, weights, rescale, out);
    fetcher.step();
  }
}

void scores(const void* keys, const void* queries, int count, int head_dim, float* out) {
  const float* rows[row_tile];
  NoFetcher none;
  for (int i = 0; i < count; i += row_tile) {
    for (int j = 0; j < row_tile; ++j)
      rows[j] = static_cast<const float*>(keys) + static_cast<std::int64_t>(i + j) * head_dim;
    score_rows(rows, row_tile, head_dim, static_cast<const float*>(queries), out + i * strip, none);
  }
}

void cap(float* products, std::int64_t count, const Logits& logits) {
  const Vec scale = hn::Set(f32, logits.scale);
  const Vec most = hn::Set(f32, logits.softcap);
  for (std::int64_t i = 0; i < count; i += lanes) {
    const Vec logit = hn::Mul(hn::Load(f32, products + i), scale);
    hn::Store(hn::Mul(hn::Tanh(f32, hn::Div(logit, most)), most), f32, products + i);
  }
}

// Adds P V to O^T over visible pairs only, for blocks whose masked values would spoil the sum.
void accumulate_visible(const BlockArgs& args, const float* const* values, int first, int count, const float* weights,
                        float* out) {
  for (int key = 0; key < count; ++key) {
    for (int lane = 0; lane < strip; lane += lanes) {
      const auto visible = sees(args, first + key, lane);
      const Vec weight = hn::Load(f32, weights + key * strip + lane);
      for (int d = 0; d < args.head_dim_v; ++d) {
        float* o = out + d * strip + lane;
        const Vec old = hn::Load(f32, o);
        hn::Store(hn::IfThenElse(visible, hn::MulAdd(weight, hn::Set(f32, values[key][d]), old), old), f32, o);
      }
    }
  }
}

// Keys that go through scores, softmax and values at a time: so few that their values stay in the
// first-level cache while all columns pass.
constexpr int stretch = lanes >= 16 ? 64 : 32;

void attend_block(const BlockArgs& args, const StripState& state) {
  const int dim = args.head_dim;
  float* const weights = args.scratch;
  const float* keys[stretch];
  const float* values[stretch];
  HWY_ALIGN float rescale[strip];
  const int stretches = (args.count + stretch - 1) / stretch;
  Fetcher fetcher(args, (args.count + stretches * args.head_dim_v) / tile_rows);
  for (int first = 0; first < args.count; first += stretch) {
    const int count = std::min(stretch, args.count - first);
    for (int i = 0; i < count; ++i) {
      keys[i] = row_of(args.block.keys, args.block.index, first + i, dim);
      values[i] = row_of(args.block.values, args.block.index, first + i, args.head_dim_v);
    }
    score_rows(keys, count, dim, static_cast<const float*>(args.queries), weights, fetcher);
    if (args.logits.softcap != 0) cap(weights, count * strip, args.logits);
    if (args.masked) hide_unseen(args, first, count, weights);
    softmax_step(weights, count, args.logits.scale_log2, state.max, state.sum, rescale);

    const bool careful = args.masked && !args.values_finite;
    add_values(values, careful ? 0 : count, args.head_dim_v, weights, rescale, state.out, fetcher);
    if (careful) accumulate_visible(args, values, first, count, weights, state.out);
  }
}

void finish(const StripState& state, int count, int head_dim_v, float scale_log2, float sink, void* out, DType dtype,
            std::int64_t stride, float* lse) {
  constexpr float ln2 = 0.693147180559945F;
  HWY_ALIGN float rows[4][max_head_dim];
  const int size = dtype == DType::f32 ? 4 : 2;
  for (int first = 0; first < count; first += 4) {
    for (int d = 0; d < head_dim_v; d += 4) {
      const float* const o = state.out + d * strip + first;
      const float* const four[4] = {o, o + strip, o + 2 * strip, o + 3 * strip};
      transpose4(four, 4, rows[0] + d, max_head_dim);
    }
    for (int i = 0; i < std::min(4, count - first); ++i) {
      float origin = state.max[first + i] * scale_log2;
      float sum = state.sum[first + i];
      float factor = 1;
      if (sink != minus_infinity) {  // what is higher is what weights are measured from
        const float top = std::max(origin, sink / ln2);
        factor = std::exp2(origin - top);
        sum = sum * factor + std::exp2(sink / ln2 - top);
        origin = top;
      }
      const float inverse = sum == 0.0F ? 0.0F : factor / sum;
      for (int d = 0; d < head_dim_v; ++d) rows[i][d] *= inverse;
      store_row(rows[i], head_dim_v, dtype, static_cast<std::byte*>(out) + (first + i) * stride * size);
      if (lse != nullptr) lse[first + i] = sum == 0.0F ? minus_infinity : ln2 * (origin + std::log2(sum));
    }
  }
}

void score_keys(const void* keys, const void* queries, int count, int head_dim, const Logits& logits, float* max,
                float* sum, void* exps) {
  HWY_ALIGN float factor[strip];
  std::fill_n(max, strip, minus_infinity);
  std::fill_n(sum, strip, 0.0F);
  scores(keys, queries, count, head_dim, static_cast<float*>(exps));
  if (logits.softcap != 0) cap(static_cast<float*>(exps), count * strip, logits);
  softmax_step(static_cast<float*>(exps), count, logits.scale_log2, max, sum, factor);
}

template <int vectors>
void sum_exps_of(const SumArgs& args, Lanes<vectors> part, float* max, float* sum) {
  HWY_ALIGN float weights[stretch * strip];
  HWY_ALIGN float factor[strip];
  const float* rows[stretch];
  NoFetcher none;
  std::fill_n(max, strip, minus_infinity);
  std::fill_n(sum, strip, 0.0F);
  for (int first = 0; first < args.count; first += stretch) {
    const int keys = std::min(stretch, args.count - first);
    const int padded = (keys + row_tile - 1) / row_tile * row_tile;
    for (int i = 0; i < padded; ++i) rows[i] = row_of(args.block.keys, args.block.index, first + i, args.head_dim);
    score_rows(rows, padded, args.head_dim, static_cast<const float*>(args.queries), weights, none, part);
    if (args.logits.softcap != 0) cap(weights, padded * strip, args.logits);
    if (args.seen != nullptr) hide_unseen(args.seen, first, keys, weights);
    softmax_step(weights, keys, args.logits.scale_log2, max, sum, factor, part);
  }
}

void sum_exps(const SumArgs& args, float* max, float* sum) {
  if (args.by_half())
    sum_exps_of(args, Lanes<half_vectors>{args.first, args.last}, max, sum);
  else
    sum_exps_of(args, Lanes<tile_vectors>{}, max, sum);
}

void weigh_keys(const void* exps, int strips, int count, const float* factors, float* weights) {
  for (int key = 0; key < count; ++key) {
    Vec total = hn::Zero(f32);
    for (int s = 0; s < strips; ++s) {
      const float* const row = static_cast<const float*>(exps) + (static_cast<std::int64_t>(s) * count + key) * strip;
      HWY_UNROLL(4)
      for (int lane = 0; lane < strip; lane += lanes) {
        const Vec factor = hn::Load(f32, factors + s * strip + lane);
        const Vec share = hn::Mul(hn::Load(f32, row + lane), factor);
        // Eq, since Highway's Ne says false of a NaN on some targets.
        total = hn::Add(total, hn::IfThenZeroElse(hn::Eq(factor, hn::Zero(f32)), share));
      }
    }
    weights[key] += hn::GetLane(hn::SumOfLanes(f32, total));
  }
}

void score_factors(float* max, const float* sum, std::int64_t blocks, std::int64_t stride, float scale_log2,
                   int queries) {
  const Vec scale = hn::Set(f32, scale_log2);
  for (int lane = 0; lane < strip; lane += lanes) {
    Vec top = hn::Set(f32, minus_infinity);
    for (std::int64_t b = 0; b < blocks; ++b) top = hn::Max(hn::Load(f32, max + b * stride + lane), top);
    const Vec origin = max_or_zero(top);
    // A NaN score has made its block's sum NaN; 0 stays 0 where every score is -inf, and 0 / 0 is NaN.
    Vec total = hn::Zero(f32);
    for (std::int64_t b = 0; b < blocks; ++b) {
      const Vec carry = weight_of(hn::Load(f32, max + b * stride + lane), origin, scale);
      total = hn::MulAdd(hn::Load(f32, sum + b * stride + lane), carry, total);
      hn::Store(carry, f32, max + b * stride + lane);
    }
    const auto real = hn::Lt(hn::Iota(f32, static_cast<float>(lane)), hn::Set(f32, static_cast<float>(queries)));
    for (std::int64_t b = 0; b < blocks; ++b) {
      float* const factor = max + b * stride + lane;
      hn::Store(hn::IfThenElseZero(real, hn::Div(hn::Load(f32, factor), total)), f32, factor);
    }
  }
}

void sum_rows(const Rows& rows, int count, int head_dim, float* sum) {
  const void* all[max_block];
  for (int i = 0; i < count; ++i) all[i] = rows.at(i);
  if (rows.dtype == DType::f32)
    sum_rows_of<DType::f32>(all, count, head_dim, sum);
  else if (rows.dtype == DType::bf16)
    sum_rows_of<DType::bf16>(all, count, head_dim, sum);
  else
    sum_rows_of<DType::f16>(all, count, head_dim, sum);
}

void round_row(DType dtype, int count, float* row) {
  if (dtype == DType::f32) return;
  HWY_ALIGN std::uint16_t rounded[max_head_dim];
  store_row(row, count, dtype, rounded);
  convert_row(rounded, dtype, count, row);
}

void learned_scores(const Rows& rows, int count, int head_dim, const float* weights, RopePairs pairs, float* scores) {
  constexpr hn::CappedTag<float, 4> four;  // half of head_dim, a multiple of 8, is one of this
  const auto step = static_cast<int>(hn::Lanes(four));
  const int half = head_dim / 2;
  HWY_ALIGN float row[max_head_dim] = {};
  for (int i = 0; i < count; ++i) {
    convert_row(rows.at(i), rows.dtype, head_dim, row);
    auto total = hn::Zero(four);
    for (int d = 0; d < head_dim; d += step)
      total = hn::MulAdd(hn::LoadU(four, weights + half + d), hn::LoadU(four, row + d), total);
    for (int pair = 0; pair < half; pair += step) {
      auto a = hn::LoadU(four, row + pair), b = hn::LoadU(four, row + half + pair);
      if (pairs == RopePairs::neighbours) hn::LoadInterleaved2(four, row + 2 * pair, a, b);
      const auto length = hn::Sqrt(hn::MulAdd(a, a, hn::Mul(b, b)));
      total = hn::MulAdd(hn::LoadU(four, weights + pair), length, total);
    }
    scores[i] = hn::GetLane(hn::SumOfLanes(four, total));
  }
}

const Kernels* table() {
  static constexpr std::string_view name = HWY_TARGET == HWY_AVX3   ? "avx512_f32"
                                           : HWY_TARGET == HWY_AVX2 ? "avx2_f32"
                                           : HWY_TARGET == HWY_SSE4 ? "sse4_f32"
                                                                    : "baseline_f32";
  static constexpr Kernels kernels{.name = name,
                                   .products = Precision::f32,
                                   .element_size = sizeof(float),
                                   .gathers = true,
                                   .pack = {pack_keys, pack_values, pack_queries},
                                   .attend_block = attend_block,
                                   .score_keys = score_keys,
                                   .sum_exps = sum_exps,
                                   .weigh_keys = weigh_keys,
                                   .finish = finish,
                                   .score_factors = score_factors,
                                   .cap = cap,
                                   .scores = scores,
                                   .sum_rows = sum_rows,
                                   .round_row = round_row,
                                   .learned_scores = learned_scores};
  return &kernels;
}

}  // namespace HWY_NAMESPACE
}  // namespace pbsattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <hwy/targets.h>

namespace pbsattn::cpu {
HWY_EXPORT(table);

KernelList f32_kernels() {
  // Highway dispatches to the best target left enabled: disable them one by one, best first.
  KernelList found;
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
