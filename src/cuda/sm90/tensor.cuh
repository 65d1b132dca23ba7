// The caller's tensors in kernels.
#pragma once

#include <cstdint>

namespace pbsattn::cuda {

struct Tensor {
  const void* data;
  std::int64_t batch_stride, head_stride, token_stride;

  template <class T>
  __device__ const T* head(std::int64_t batch, std::int64_t head_index) const {
    return static_cast<const T*>(data) + batch * batch_stride + head_index * head_stride;
  }
};

}  // namespace pbsattn::cuda
