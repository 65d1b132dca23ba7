// Soft-capped logits: c tanh(product * scale / c).
//
// Of the ways to a tanh, the chip's own (tanh.approx) is off by 2^-11 of itself, a weight under a cap of 50 then by a
// hundredth, ten times as much as its rounding to bf16. A polynomial is exact to float32 where logits stay below the
// cap, and costs multiply-adds alone; beyond it two more of the special functions do.
#pragma once

#include <algorithm>

#include "cuda/limits.h"
#include "cuda/sm90/ptx.cuh"

namespace pbsattn::cuda {

// tanh(u) is u times this polynomial in u^2 for |u| <= 1, to 5.9e-7 of itself (minimax).
constexpr int tanh_terms = 6;
__host__ __device__ constexpr float tanh_term(int i) {
  constexpr float term[tanh_terms] = {0.999999414F,   -0.333290423F, 0.132814335F,
                                      -0.0516056637F, 0.0167431039F, -0.00306705592F};
  return term[i];
}

// Leaves products as they are.
struct NoCap {
  static constexpr bool caps = false;
  __device__ float operator()(float product) const { return product; }
};

// Makes of each product the one that, scaled, is its capped logit. +-inf become +-c; NaN stays.
struct SoftCap {
  static constexpr bool caps = true;
  __device__ float operator()(float product) const {
    const float u = product * inner;
    const float square = u * u;
    float near = tanh_term(tanh_terms - 1);
#pragma unroll
    for (int i = tanh_terms - 2; i >= 0; --i) near = fmaf(near, square, tanh_term(i));
    constexpr float two_log2_e = 2.8853900817779268F;
    const float far = fmaf(-2.0F, sm90::reciprocal_fast(1.0F + sm90::exp2_fast(u * two_log2_e)), 1.0F);
    return outer * (square <= 1.0F ? u * near : far);
  }

  float inner, outer;  // scale / c, c / scale
};

// Puts products through a cap, in place.
template <class Cap, int n>
__device__ inline void apply(const Cap& cap, float (&products)[n]) {
  if constexpr (Cap::caps) {
#pragma unroll
    for (float& x : products) x = cap(x);
  }
}

// Caps that float32 can't divide by are as good as these.
inline SoftCap soft_cap_of(float softcap, float scale) {
  const float cap = std::clamp(softcap, 1e-30F, 1e30F);
  return {.inner = scale / cap, .outer = cap / scale};
}

// Calls f with what products go through before they are scaled; a softcap of 0: nothing.
template <int head_dim, class F>
auto with_cap(float softcap, float scale, F&& f) {
  if constexpr (takes_caps(head_dim))
    if (softcap != 0.0F) return f(soft_cap_of(softcap, scale));
  return f(NoCap{});
}

// Does the same of what scores that are logarithms of base 2 go through once they are scaled.
template <int head_dim, class F>
auto with_log2_cap(float softcap, F&& f) {
  return with_cap<head_dim>(softcap * 1.4426950408889634F, 1.0F, f);
}

}  // namespace pbsattn::cuda
