// A graph of one FLASH_ATTN_EXT as llama.cpp builds it, run through ggml's scheduler.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-pbsattn.h"
#include "ggml.h"

namespace pbsattn::ggml::test {

// Loads ggml's CPU backend, once.
void load_ggml();

// Whether query i sees key j.
using Visible = std::function<bool(std::int64_t i, std::int64_t j)>;

struct Case {
  std::int64_t head_dim = 64;
  std::int64_t value_dim = 0;  // 0: head_dim
  std::int64_t q_heads = 4;
  std::int64_t kv_heads = 2;
  std::int64_t n_q = 600;
  std::int64_t n_kv = 768;  // llama.cpp pads the used cache to 256
  std::int64_t streams = 1;
  ggml_type kv_type = GGML_TYPE_F16;
  Visible visible = {};  // empty: causal from offset
  std::int64_t offset = 0;
  bool masked = true;
  std::int64_t sinks = 0;  // their number; 0: none
  ggml_type sink_type = GGML_TYPE_F32;
  float max_bias = 0.0F;
  float soft_cap = 0.0F;
  std::int32_t n_kv_max = 0;
  int more_source = 0;  // a source of this number that no ggml of today has; 0: none
  int parameter = 0;    // the word of op_params to set, where ggml of today has none; 0: none
  std::string cache_name = "cache_k_l3";
  int rope_mode = -1;        // RoPE's on queries, as llama.cpp has it before the op; -1: none
  int rope_columns = 0;      // that it turns; 0: head_dim
  bool rope_normed = false;  // with a norm between RoPE and the op
};

// A case's tensors, inputs filled, ready to be computed any number of times.
class AttentionGraph {
 public:
  explicit AttentionGraph(const Case& c);
  ~AttentionGraph();
  AttentionGraph(const AttentionGraph&) = delete;
  AttentionGraph& operator=(const AttentionGraph&) = delete;

  void set_mask(const Visible& visible);
  const ggml_tensor* op() const { return op_; }

  struct Result {
    ggml_status status = GGML_STATUS_FAILED;
    std::vector<float> values;  // of the op, after a neighbour on each side has been computed
    bool routed = false;        // planning gave the op to our backend
  };
  // `backends` is what a context would have, the CPU last.
  Result compute(const std::vector<ggml_backend_t>& backends) const;

 private:
  ggml_tensor* rope(ggml_tensor* q, ggml_tensor* positions) const;

  Case case_;
  ggml_context* context_ = nullptr;
  ggml_backend_buffer_t buffer_ = nullptr;
  ggml_cgraph* graph_ = nullptr;
  ggml_tensor* mask_ = nullptr;
  ggml_tensor* op_ = nullptr;
  ggml_tensor* result_ = nullptr;
};

// The backends of one context.
class Backends {
 public:
  explicit Backends(bool with_pbsattn, int threads = 2);
  ~Backends();
  Backends(const Backends&) = delete;
  Backends& operator=(const Backends&) = delete;

  const std::vector<ggml_backend_t>& all() const { return backends_; }
  void start_graph();  // tells every backend its threads, as llama.cpp does before each graph
  void set_abort_callback(ggml_abort_callback callback, void* data);

 private:
  std::vector<ggml_backend_t> backends_;
  int threads_;
};

// sqrt(sum (a - b)^2 / sum b^2)
double relative_rms(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace pbsattn::ggml::test
