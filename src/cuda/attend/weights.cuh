// A block's weights as packed for the product with values.
#pragma once

#include "cuda/attend/layer.cuh"
#include "cuda/attend/tile.cuh"

namespace pbsattn::cuda::attention {

// Returns whether one of packed weights, none of them negative, exceeds the largest or is no number, in any lane of the
// warp.
template <class Element, int count>
__device__ bool any_exceeds(const std::uint32_t (&weights)[count]) {
  std::uint32_t most[2] = {0, 0};  // of each half
#pragma unroll
  for (int i = 0; i < count; i += 2) most[i / 2 % 2] = __vimax3_u16x2(most[i / 2 % 2], weights[i], weights[i + 1]);
  most[0] = __vmaxu2(most[0], most[1]);
  constexpr std::uint32_t limit = Bits<Element>::largest_weight;
  return __any_sync(0xFFFFFFFF, (most[0] & 0xFFFF) > limit || most[0] >> 16 > limit);
}

// Weighs products whose logits are capped. Returns whether the layer's polynomial holds for all of the warp's.
template <class Element, int scores>
__device__ bool weigh_products(const CappedLayer& layer, const float (&s)[scores], const float (&offset)[2],
                               std::uint32_t (&weights)[scores / 2]) {
  std::uint32_t largest = 0;  // square, by its bits, where NaN is above all numbers
#pragma unroll
  for (int i = 0; i < scores / 2; ++i) {
    float weight[2];
    std::uint32_t squares[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float score = s[2 * i + c];
      const float square = score * score;
      float factor = layer.term[tanh_terms - 1];
#pragma unroll
      for (int term = tanh_terms - 2; term >= 0; --term) factor = fmaf(factor, square, layer.term[term]);
      weight[c] = sm90::exp2_fast(fmaf(score, factor, -offset[i % 2]));
      squares[c] = __float_as_uint(square);
    }
    weights[i] = pack<Element>(weight[0], weight[1]);
    largest = __vimax3_u32(largest, squares[0], squares[1]);
  }
  return __all_sync(0xFFFFFFFF, largest <= __float_as_uint(layer.reach)) != 0;
}

}  // namespace pbsattn::cuda::attention
