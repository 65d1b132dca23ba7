// What a layer's attention may have beside queries, keys and values. Kernels are compiled for each of these types, so
// that those for layers without have none of its instructions.
//
// A list's *places* are counted from its end, the diagonal block, as tiles go through it. V is *guarded* at places of
// which some query of the tile doesn't see every key: there a value that is not finite must not meet its weight of 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/attend/tile.cuh"
#include "cuda/memory/arrays.h"
#include "cuda/sm90/online_sum.cuh"
#include "cuda/sm90/soft_cap.cuh"

namespace pbsattn::cuda::attention {

// Nothing: of each block but the diagonal one every query sees every key.
struct PlainLayer {
  static constexpr bool plain = true;
  static constexpr bool caps = false;
  static constexpr int guards = 1;

  __device__ static int blocks(const RowGrid&, int diagonal) { return diagonal + 1; }
  __device__ static constexpr bool has_edge(int) { return false; }
  __device__ static constexpr int guarded_place(int) { return 0; }
};

struct Layer {
  static constexpr bool plain = false;
  static constexpr bool caps = false;
  static constexpr int guards = 3;  // the diagonal block, and two that the window's edge may pass through

  // Returns the logit of one more key of a query head, which has no value.
  __device__ float sink(int head) const { return sinks == nullptr ? -infinity : sinks[head]; }

  // Returns how many blocks a row sees where it has no list.
  __device__ int blocks(const RowGrid& grid, int diagonal) const {
    const int first_query = max(diagonal * block, grid.q_offset);
    return diagonal + 1 - max(first_query - window + 1, 0) / block;
  }
  // Tells whether the window's edge may pass through the block at a place.
  __device__ bool has_edge(int place) const { return place >= edge; }
  __device__ int guarded_place(int guard) const { return guard == 0 ? 0 : max(edge, 1) + guard - 1; }
  // Returns the guard of a place; below 1: it has none, or that of the diagonal block.
  __device__ int guard_of(int place) const { return place - max(edge, 1) + 1; }

  // Tells whether a query of a tile sees a value of this column that is not finite, in guarded blocks or near them.
  // From memory, key by key: that is rare.
  template <class Element, bool may_be_paged>
  __device__ bool sees_bad(const RowGrid& grid, const Tile& tile, int row, int column) const {
    const Rows<std::uint16_t> values(v, pages, tile.batch, grid.kv_head(tile.head));
    const auto any_bad = [&](int begin, int end) {
      constexpr std::uint32_t exponent = Bits<Element>::infinite;
      for (int key = begin; key < end; ++key)
        if (((may_be_paged ? values.at(key) : values.contiguous(key))[column] & exponent) == exponent) return true;
      return false;
    };
    const int token = tile.token + row;
    const int first_seen = max(token - window + 1, 0);
    return any_bad(first_seen, tile.token - (guarded_place(1) - 1) * block) ||
           any_bad(max(first_seen, tile.token), min(token + 1, grid.kv_len));
  }

  const float* sinks;  // [q_heads]; null: none
  int window;          // tokens that a query sees, itself the last
  int edge;            // the first place that the window's edge may pass through
  ConstView v;
  PageTable pages;
};

// With capped logits besides.
struct CappedLayer : Layer {
  static constexpr bool caps = true;

  SoftCap cap;
  // A product times this polynomial in its square is its weight's exponent of base 2, up to a square of `reach`: where
  // the logit is its cap.
  float term[tanh_terms];
  float reach;
};

inline Layer layer_of(const Inputs& inputs, const Geometry& g) {
  return {.sinks = inputs.sinks.empty() ? nullptr : inputs.sinks.data(),
          .window = static_cast<int>(g.window),
          .edge = static_cast<int>(g.window / block),
          .v = inputs.v,
          .pages = {inputs.pages, g.shape.kv_len}};
}
inline CappedLayer capped_layer_of(const Layer& layer, float softcap, float scale) {
  CappedLayer capped{layer, soft_cap_of(softcap, scale), {}, {}};
  constexpr double most = std::numeric_limits<float>::max();
  const double inner = capped.cap.inner;
  double reach = 1;  // of product * inner
  for (int i = 0; i < tanh_terms; ++i) {
    const double term = tanh_term(i) * std::pow(inner, 2 * i) * scale_log2(scale);
    capped.term[i] = static_cast<float>(std::clamp(term, -most, most));
    // Caps far above any logit have terms that float32 can't hold. They are left out, for products so small that it
    // makes no difference.
    if (std::abs(term) >= std::numeric_limits<float>::min()) continue;
    capped.term[i] = 0;
    reach = std::min(reach, std::pow(0x1p-21 / std::abs(tanh_term(i)), 1.0 / (2 * i)));
  }
  capped.reach = static_cast<float>(std::min(reach / inner * (reach / inner), most));
  return capped;
}

}  // namespace pbsattn::cuda::attention
