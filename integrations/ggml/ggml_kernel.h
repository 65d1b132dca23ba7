// ggml's own kernel, for what isn't ours and as the yardstick of `check`.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

namespace pbsattn::ggml {

// A CPU backend of our own that computes single ops in place.
class GgmlKernel {
 public:
  GgmlKernel() = default;
  ~GgmlKernel();
  GgmlKernel(const GgmlKernel&) = delete;
  GgmlKernel& operator=(const GgmlKernel&) = delete;

  void set_abort_callback(ggml_abort_callback callback, void* data);

  // Computes op->data with `threads` threads.
  ggml_status compute(ggml_tensor* op, int threads);

 private:
  bool start();

  ggml_backend_t backend_ = nullptr;  // made when first needed: by then every backend is registered
  ggml_backend_set_n_threads_t set_n_threads_ = nullptr;
  ggml_context* context_ = nullptr;
  ggml_cgraph* graph_ = nullptr;  // of one node
  ggml_abort_callback abort_ = nullptr;
  void* abort_data_ = nullptr;
};

}  // namespace pbsattn::ggml
