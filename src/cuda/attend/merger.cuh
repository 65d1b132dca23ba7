// How two parts of a query's attention become one.
#pragma once

#include <cmath>

namespace pbsattn::cuda {

// Merges two parts of a query's attention, over disjoint sets of keys: says what the parts' outputs are multiplied by,
// from their log-sum-exps, and the log-sum-exp of both. Of two parts without any weight nothing is left: factors of 0
// and -inf. A NaN makes all three NaN.
struct Merger {
  Merger() = default;
  __device__ Merger(float lse_a, float lse_b) {
    const float top = fmaxf(lse_a, lse_b);
    if (lse_a == -INFINITY && lse_b == -INFINITY) return;
    const float weight_a = expf(lse_a - top);
    const float weight_b = expf(lse_b - top);
    const float sum = weight_a + weight_b;
    a = weight_a / sum;
    b = weight_b / sum;
    lse = top + logf(sum);
  }
  float a = 0, b = 0, lse = -INFINITY;
};

}  // namespace pbsattn::cuda
