// What a layer's attention may have beside queries, keys and values. Kernels are compiled for each of these types, so
// that those for layers without have none of its instructions.
#pragma once

#include "cuda/attend/softmax.cuh"

namespace pbsattn::cuda::attention {

// Nothing.
struct PlainLayer {
  static constexpr bool plain = true;
};

struct Layer {
  static constexpr bool plain = false;

  // Returns the logit of one more key of a query head, which has no value.
  __device__ float sink(int head) const { return sinks == nullptr ? -infinity : __ldg(sinks + head); }

  const float* sinks;  // [q_heads]; null: none
};

}  // namespace pbsattn::cuda::attention
