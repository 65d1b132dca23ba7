#include "attention_graph.h"

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>

namespace pbsattn::ggml::test {
namespace {

template <class Function>
Function procedure(ggml_backend_t backend, const char* name) {
  ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
  return reinterpret_cast<Function>(ggml_backend_reg_get_proc_address(reg, name));
}

void fill(ggml_tensor* tensor, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(ggml_nelements(tensor)));
  for (float& value : values) value = normal(random);
  if (tensor->type == GGML_TYPE_F32) {
    ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
    return;
  }
  std::vector<std::uint8_t> bytes(ggml_nbytes(tensor));
  const std::int64_t rows = ggml_nelements(tensor) / tensor->ne[0];
  ggml_quantize_chunk(tensor->type, values.data(), bytes.data(), 0, rows, tensor->ne[0], nullptr);
  ggml_backend_tensor_set(tensor, bytes.data(), 0, bytes.size());
}

}  // namespace

void load_ggml() {
  if (ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) == nullptr)
    ggml_backend_load_all_from_path(PBSATTN_TEST_GGML_FOLDER);
  if (ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) == nullptr)
    throw std::runtime_error("no CPU backend in " PBSATTN_TEST_GGML_FOLDER);
}

AttentionGraph::AttentionGraph(const Case& c) : case_(c) {
  const std::int64_t value_dim = c.value_dim == 0 ? c.head_dim : c.value_dim;
  context_ = ggml_init({.mem_size = std::size_t{1} << 20, .mem_buffer = nullptr, .no_alloc = true});

  // Storage in llama.cpp's order: tokens outermost, heads within a token; the op gets permuted views.
  ggml_tensor* q_storage = ggml_new_tensor_4d(context_, GGML_TYPE_F32, c.head_dim, c.q_heads, c.n_q, c.streams);
  ggml_tensor* k_cache = ggml_new_tensor_3d(context_, c.kv_type, c.head_dim * c.kv_heads, c.n_kv, c.streams);
  ggml_tensor* v_cache = ggml_new_tensor_3d(context_, c.kv_type, value_dim * c.kv_heads, c.n_kv, c.streams);
  ggml_set_name(k_cache, c.cache_name.c_str());
  if (c.masked) mask_ = ggml_new_tensor_4d(context_, GGML_TYPE_F16, c.n_kv, c.n_q, 1, c.streams);
  ggml_tensor* sinks = c.sinks != 0 ? ggml_new_tensor_1d(context_, c.sink_type, c.sinks) : nullptr;
  ggml_tensor* positions = ggml_new_tensor_1d(context_, GGML_TYPE_I32, 4 * c.n_q);  // as MROPE has them, for all
  buffer_ = ggml_backend_alloc_ctx_tensors_from_buft(context_, ggml_backend_cpu_buffer_type());

  const auto head_view = [&](ggml_tensor* cache, std::int64_t dim) {
    ggml_tensor* heads = ggml_view_4d(context_, cache, dim, c.kv_heads, c.n_kv, c.streams,
                                      ggml_row_size(cache->type, dim), cache->nb[1], cache->nb[2], 0);
    return ggml_permute(context_, heads, 0, 2, 1, 3);
  };
  ggml_tensor* scaled = ggml_scale(context_, q_storage, 2.0F);
  if (c.rope_mode >= 0) scaled = rope(scaled, positions);
  ggml_tensor* q = ggml_permute(context_, scaled, 0, 2, 1, 3);
  op_ = ggml_flash_attn_ext(context_, q, head_view(k_cache, c.head_dim), head_view(v_cache, value_dim), mask_,
                            1.0F / std::sqrt(static_cast<float>(c.head_dim)), c.max_bias, c.soft_cap);
  if (c.n_kv_max != 0) ggml_flash_attn_ext_set_n_kv_max(op_, c.n_kv_max);
  op_->src[4] = sinks;  // ggml_flash_attn_ext_add_sinks() ends the process over wrong ones
  if (c.more_source != 0) op_->src[c.more_source] = q_storage;
  if (c.parameter != 0) op_->op_params[c.parameter] = 1;
  ggml_tensor* flat = ggml_reshape_2d(context_, op_, value_dim * c.q_heads, c.n_q * c.streams);
  result_ = ggml_scale(context_, flat, 1.0F);
  ggml_set_output(result_);
  graph_ = ggml_new_graph(context_);
  ggml_build_forward_expand(graph_, result_);

  fill(q_storage, 1);
  fill(k_cache, 2);
  fill(v_cache, 3);
  std::vector<std::int32_t> places(static_cast<std::size_t>(4 * c.n_q));
  for (std::size_t i = 0; i < places.size(); ++i)
    places[i] = static_cast<std::int32_t>(i) % static_cast<std::int32_t>(c.n_q);
  ggml_backend_tensor_set(positions, places.data(), 0, ggml_nbytes(positions));
  if (sinks != nullptr) fill(sinks, 4);
  if (c.masked)
    set_mask(c.visible ? c.visible : [offset = c.offset](std::int64_t i, std::int64_t j) { return j <= offset + i; });
}

ggml_tensor* AttentionGraph::rope(ggml_tensor* q, ggml_tensor* positions) const {
  const int columns = case_.rope_columns == 0 ? static_cast<int>(case_.head_dim) : case_.rope_columns;
  std::array<int, GGML_MROPE_SECTIONS> sections{columns / 2, 0, 0, 0};
  ggml_tensor* turned = nullptr;
  if (case_.rope_mode == GGML_ROPE_TYPE_NORMAL || case_.rope_mode == GGML_ROPE_TYPE_NEOX) {
    ggml_tensor* first = ggml_view_1d(context_, positions, case_.n_q, 0);
    turned = ggml_rope_ext(context_, q, first, nullptr, columns, case_.rope_mode, 0, 10000.0F, 1, 0, 1, 32, 1);
  } else {
    turned = ggml_rope_multi(context_, q, positions, nullptr, columns, sections.data(), case_.rope_mode, 0, 10000.0F, 1,
                             0, 1, 32, 1);
  }
  return case_.rope_normed ? ggml_rms_norm(context_, turned, 1e-5F) : turned;
}

AttentionGraph::~AttentionGraph() {
  ggml_backend_buffer_free(buffer_);
  ggml_free(context_);
}

void AttentionGraph::set_mask(const Visible& visible) {
  const float hidden = -std::numeric_limits<float>::infinity();
  std::vector<ggml_fp16_t> halves;
  for (std::int64_t stream = 0; stream < case_.streams; ++stream)
    for (std::int64_t i = 0; i < case_.n_q; ++i)
      for (std::int64_t j = 0; j < case_.n_kv; ++j) {
        const float bias = case_.max_bias > 0 ? -static_cast<float>(std::abs(case_.offset + i - j)) : 0.0F;
        halves.push_back(ggml_fp32_to_fp16(visible(i, j) ? bias : hidden));
      }
  ggml_backend_tensor_set(mask_, halves.data(), 0, ggml_nbytes(mask_));
}

AttentionGraph::Result AttentionGraph::compute(const std::vector<ggml_backend_t>& backends) const {
  std::vector<ggml_backend_t> list = backends;
  ggml_backend_sched_t sched =
      ggml_backend_sched_new(list.data(), nullptr, static_cast<int>(list.size()), 64, false, true);
  Result result;
  if (ggml_backend_sched_alloc_graph(sched, graph_)) {
    result.routed = ggml_backend_sched_get_tensor_backend(sched, op_) != backends.back();
    result.status = ggml_backend_sched_graph_compute(sched, graph_);
    result.values.resize(static_cast<std::size_t>(ggml_nelements(result_)));
    ggml_backend_tensor_get(result_, result.values.data(), 0, ggml_nbytes(result_));
  }
  ggml_backend_sched_free(sched);
  // The scheduler's memory is gone; let the next one allocate anew.
  for (int i = 0; i < ggml_graph_n_nodes(graph_); ++i) {
    ggml_tensor* node = ggml_graph_node(graph_, i);
    if (node->view_src != nullptr && node->view_src->buffer == buffer_) continue;
    node->data = nullptr;
    node->buffer = nullptr;
  }
  return result;
}

Backends::Backends(bool with_pbsattn, int threads) : threads_(threads) {
  load_ggml();
  if (with_pbsattn)
    backends_.push_back(ggml_backend_dev_init(ggml_backend_reg_dev_get(ggml_backend_pbsattn_reg(), 0), nullptr));
  backends_.push_back(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
  start_graph();
}

Backends::~Backends() {
  for (ggml_backend_t backend : backends_) ggml_backend_free(backend);
}

void Backends::start_graph() {
  for (ggml_backend_t backend : backends_)
    procedure<ggml_backend_set_n_threads_t>(backend, "ggml_backend_set_n_threads")(backend, threads_);
}

void Backends::set_abort_callback(ggml_abort_callback callback, void* data) {
  for (ggml_backend_t backend : backends_)
    procedure<ggml_backend_set_abort_callback_t>(backend, "ggml_backend_set_abort_callback")(backend, callback, data);
}

double relative_rms(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = static_cast<double>(a[i]) - b[i];
    error += difference * difference;
    norm += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(error / norm);
}

}  // namespace pbsattn::ggml::test
