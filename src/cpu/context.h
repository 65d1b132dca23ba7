// What the stages of one pass are called with, each over all threads.
#pragma once

#include "cpu/workspace.h"

namespace pbsattn::cpu {

// What the stages of a pass share. They talk through the pass's arrays.
struct StageContext {
  const detail::PlanSpec& spec;
  const Kernels& kernels;      // of the plan's products
  const Kernels& f32_kernels;  // of pooled scores, and of what paths share
  const Inputs& inputs;
  const Outputs& outputs;
  Heads heads;
  const Pass& pass;

  const Geometry& geometry() const { return spec.geometry; }
  const Options& options(std::int64_t q_head) const { return spec.options_of(heads.q_begin + q_head); }
  float scale_log2() const { return spec.options.scale * 1.44269504088896340736F; }
  std::byte* scratch(int thread) const { return pass.scratch + thread * pass.scratch_bytes; }
  // Pass-relative KV head of a pass-relative query head.
  std::int64_t kv_head(std::int64_t q_head) const {
    return geometry().kv_head(heads.q_begin + q_head) - heads.kv_begin;
  }
  // The block that holds token 0.
  std::int64_t sink_block(std::int64_t q_head) const {
    return pass.permuted ? pass.sink_block[pass.far_head(q_head, kv_head(q_head))] : 0;
  }
  Rows q_rows(std::int64_t q_head, std::int64_t query) const {
    return rows_of(inputs.q, heads.q_begin + q_head, query);
  }
  Rows rows_of(const ConstView& view, std::int64_t head, std::int64_t token) const {
    const std::int64_t offset = heads.batch * view.batch_stride + head * view.head_stride + token * view.token_stride;
    return {static_cast<const std::byte*>(view.data) + offset * (view.dtype == DType::f32 ? 4 : 2), view.dtype,
            view.token_stride, nullptr};
  }
};

}  // namespace pbsattn::cpu
