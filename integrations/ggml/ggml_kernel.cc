#include "ggml_kernel.h"

#include "log.h"

namespace pbsattn::ggml {
namespace {

template <class Function>
Function procedure(ggml_backend_t backend, const char* name) {
  ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
  return reinterpret_cast<Function>(ggml_backend_reg_get_proc_address(reg, name));
}

}  // namespace

GgmlKernel::~GgmlKernel() {
  ggml_free(context_);
  ggml_backend_free(backend_);
}

bool GgmlKernel::start() {
  if (graph_ != nullptr) return true;
  if (backend_ == nullptr) backend_ = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
  if (backend_ == nullptr) {
    log(GGML_LOG_LEVEL_ERROR, "no CPU backend is registered; load ggml's backends before computing");
    return false;
  }
  set_n_threads_ = procedure<ggml_backend_set_n_threads_t>(backend_, "ggml_backend_set_n_threads");
  set_abort_callback(abort_, abort_data_);
  context_ = ggml_init({.mem_size = ggml_graph_overhead_custom(1, false), .mem_buffer = nullptr, .no_alloc = true});
  if (context_ == nullptr) return false;
  graph_ = ggml_new_graph_custom(context_, 1, false);
  return true;
}

void GgmlKernel::set_abort_callback(ggml_abort_callback callback, void* data) {
  abort_ = callback;
  abort_data_ = data;
  if (backend_ == nullptr) return;
  const auto set = procedure<ggml_backend_set_abort_callback_t>(backend_, "ggml_backend_set_abort_callback");
  if (set != nullptr) set(backend_, callback, data);
}

ggml_status GgmlKernel::compute(ggml_tensor* op, int threads) {
  if (!start()) return GGML_STATUS_FAILED;
  if (set_n_threads_ != nullptr) set_n_threads_(backend_, threads);
  ggml_graph_clear(graph_);
  ggml_graph_add_node(graph_, op);
  return ggml_backend_graph_compute(backend_, graph_);
}

}  // namespace pbsattn::ggml
