// What one llama.cpp context computes here: the backend's state between ops.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "attention_op.h"
#include "causal_mask.h"
#include "ggml-backend.h"
#include "ggml_kernel.h"
#include "layer_caches.h"
#include "prompt_ends.h"
#include "settings.h"

namespace pbsattn::ggml {

// Plans of the shapes seen last. All layers of a graph share one, unless settings tell them apart.
class PlanCache {
 public:
  struct Key {
    std::vector<pbsattn_options> heads;  // one for all, or one for each query head
    pbsattn_shape shape;
    pbsattn_device device;
    std::size_t workspace_cap;
    bool operator==(const Key& other) const;
  };

  // Null if the plan was refused; *error is then why.
  const pbsattn_plan* find(const Key& key, std::string* error);

 private:
  struct Destroy {
    void operator()(pbsattn_plan* plan) const { pbsattn_plan_destroy(plan); }
  };
  struct Entry {
    Key key;
    std::unique_ptr<pbsattn_plan, Destroy> plan;
    std::string error;
  };
  std::list<Entry> entries_;  // most recently used first
};

class Computer {
 public:
  // llama.cpp calls this once before each graph.
  void set_n_threads(int threads) {
    threads_ = threads;
    masks_.next_graph();
  }
  void set_abort_callback(ggml_abort_callback callback, void* data);

  ggml_status compute(ggml_cgraph* graph);

 private:
  ggml_status compute(const AttentionOp& op);
  // By pbsattn, into dst, or into scratch_ when checking. TAKEN if it did.
  ggml_pbsattn_reason run(const AttentionOp& op, const CausalRows& rows, const Settings& settings,
                          ggml_pbsattn_layer_stats* stats);
  void compare(const AttentionOp& op, ggml_pbsattn_layer_stats* stats) const;
  // The weights that the op's keys are ordered by, where `heads` ask for some. Throws std::runtime_error.
  std::vector<float> order_weights(const AttentionOp& op, const Settings& settings, const pbsattn_shape& shape,
                                   const std::vector<pbsattn_options>& heads);
  void complain(const std::string& message) noexcept;  // once for each message

  int threads_ = 1;
  ggml_abort_callback abort_ = nullptr;
  void* abort_data_ = nullptr;
  CausalMasks masks_;
  PlanCache plans_;
  LayerCaches caches_;
  PromptEnds ends_;
  std::unique_ptr<std::byte[]> workspace_;
  std::size_t workspace_size_ = 0;
  std::vector<float> scratch_;
  GgmlKernel kernel_;
  std::optional<Rope> rope_;  // of the last layer that has any: models store the keys of all alike
  std::set<std::string> complaints_;
};

}  // namespace pbsattn::ggml
