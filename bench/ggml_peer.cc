#include "ggml_peer.h"

#include <ggml-backend.h>
#include <ggml.h>

#include <cmath>
#include <cstring>
#include <stdexcept>

namespace bench {

struct GgmlAttention::State {
  ggml_backend_t backend = nullptr;
  ggml_context* context = nullptr;
  ggml_backend_buffer_t buffer = nullptr;
  ggml_cgraph* graph = nullptr;
  ggml_tensor* result = nullptr;
  std::vector<float> out;

  ~State() {
    ggml_backend_buffer_free(buffer);
    ggml_free(context);
    ggml_backend_free(backend);
  }
};

GgmlAttention::GgmlAttention(const Problem& problem, int threads) : state_(std::make_unique<State>()) {
  if (ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) == nullptr)
    ggml_backend_load_all_from_path(PBSATTN_GGML_FOLDER);
  ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  if (device == nullptr) throw std::runtime_error("no CPU backend of ggml in " PBSATTN_GGML_FOLDER);
  State& s = *state_;
  s.backend = ggml_backend_dev_init(device, nullptr);
  const auto set_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads"));
  set_threads(s.backend, threads);

  const auto& shape = problem.shape;
  const std::int64_t d = shape.head_dim;
  s.context = ggml_init(
      {.mem_size = 64 * ggml_tensor_overhead() + ggml_graph_overhead(), .mem_buffer = nullptr, .no_alloc = true});
  ggml_tensor* q = ggml_new_tensor_3d(s.context, GGML_TYPE_F32, d, shape.q_heads, shape.q_len);
  ggml_tensor* k = ggml_new_tensor_3d(s.context, GGML_TYPE_F16, d, shape.kv_heads, shape.kv_len);
  ggml_tensor* v = ggml_new_tensor_3d(s.context, GGML_TYPE_F16, d, shape.kv_heads, shape.kv_len);
  ggml_tensor* mask = ggml_new_tensor_2d(s.context, GGML_TYPE_F16, shape.kv_len, shape.q_len);
  const auto heads_outside = [&](ggml_tensor* t) { return ggml_permute(s.context, t, 0, 2, 1, 3); };
  s.result = ggml_flash_attn_ext(s.context, heads_outside(q), heads_outside(k), heads_outside(v), mask,
                                 1.0F / std::sqrt(static_cast<float>(d)), 0.0F, 0.0F);
  s.graph = ggml_new_graph(s.context);
  ggml_build_forward_expand(s.graph, s.result);
  s.buffer = ggml_backend_alloc_ctx_tensors(s.context, s.backend);
  if (s.buffer == nullptr) throw std::runtime_error("ggml could not allocate this problem's tensors");

  std::memcpy(q->data, problem.q.data(), ggml_nbytes(q));
  std::memcpy(k->data, problem.k.data(), ggml_nbytes(k));
  std::memcpy(v->data, problem.v.data(), ggml_nbytes(v));
  auto* const cell = static_cast<std::uint16_t*>(mask->data);
  for (std::int64_t i = 0; i < shape.q_len; ++i)
    for (std::int64_t j = 0; j < shape.kv_len; ++j)
      cell[i * shape.kv_len + j] = j <= shape.kv_len - shape.q_len + i ? 0x0000 : 0xFC00;
  s.out.resize(problem.q.size());
}

GgmlAttention::~GgmlAttention() = default;

void GgmlAttention::operator()() {
  if (ggml_backend_graph_compute(state_->backend, state_->graph) != GGML_STATUS_SUCCESS)
    throw std::runtime_error("ggml could not compute its attention");
}

const std::vector<float>& GgmlAttention::out() const {
  std::memcpy(state_->out.data(), state_->result->data, ggml_nbytes(state_->result));
  return state_->out;
}

}  // namespace bench
