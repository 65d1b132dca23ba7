// What the stages of one pass are called with.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "cpu/workspace.h"

namespace pbsattn::cpu {

// What the stages of a pass share. They talk through the layout's arrays. Heads are counted from the pass's first.
struct StageContext {
  const detail::PlanSpec& spec;
  const Kernels& kernels;      // of the plan's products
  const Kernels& f32_kernels;  // of pooled scores, and of what paths share
  const Inputs& inputs;
  const Outputs& outputs;
  Heads heads;
  const Layout& layout;

  const Geometry& geometry() const { return spec.geometry; }
  int head_dim() const { return static_cast<int>(spec.geometry.shape.head_dim); }
  int head_dim_v() const { return static_cast<int>(value_dim(spec.geometry.shape)); }
  // Counts the keys of a block, which are fewer in the last.
  int block_keys(std::int64_t block) const {
    return static_cast<int>(
        std::min<std::int64_t>(geometry().block, geometry().shape.kv_len - block * geometry().block));
  }
  const Options& options(std::int64_t q_head) const { return spec.options_of(heads.q_begin + q_head); }
  // Returns what makes logits of products, or of products that are `divisor` times too large.
  Logits logits(float divisor = 1) const {
    constexpr float log2_e = 1.44269504088896340736F;
    const float scale = spec.options.scale / divisor;
    const float softcap = spec.options.softcap;
    return {scale, softcap, f32_kernels.cap, softcap == 0 ? scale * log2_e : log2_e};
  }
  float scale_log2() const { return logits().scale_log2; }
  // Caps products where the plan does, a multiple of a strip.
  void cap(float* products, std::int64_t count) const {
    if (spec.options.softcap != 0) f32_kernels.cap(products, count, logits());
  }
  // Returns what makes logits of what cap() leaves.
  float scale_left() const { return spec.options.softcap == 0 ? spec.options.scale : 1; }
  // Returns a query head's sink, -inf if it has none.
  float sink(std::int64_t q_head) const {
    if (inputs.sinks.empty()) return -std::numeric_limits<float>::infinity();
    constexpr float largest = 2.3e38F;  // that a factor of log2(e) leaves finite
    const float sink = inputs.sinks[heads.q_begin + q_head];
    return std::isfinite(sink) ? std::clamp(sink, -largest, largest) : sink;
  }
  std::byte* scratch(int thread) const { return layout.scratch + thread * layout.scratch_bytes; }
  std::int64_t kv_head(std::int64_t q_head) const {
    return geometry().kv_head(heads.q_begin + q_head) - heads.kv_begin;
  }

  // Returns the index of a query head's permuted and pooled blocks and of its order.
  std::int64_t order_head(std::int64_t q_head) const {
    return layout.permuted && !layout.shared_order ? q_head : kv_head(q_head);
  }
  // Returns the tokens in a query head's slots from a permuted block's first on.
  const std::int32_t* order(std::int64_t q_head, std::int64_t block) const {
    return layout.order + order_head(q_head) * layout.order_stride + block * geometry().block;
  }
  // Returns a block of a query head's packed keys and values, as they were moved or where they were.
  PackedBlock packed_block(std::int64_t q_head, std::int64_t block, bool moved) const {
    const bool copied = moved && layout.copied;
    const std::int64_t first = kv_head(q_head) * layout.block_stride;
    const std::int64_t place = copied ? order_head(q_head) * layout.copy_stride + block : moved ? first : first + block;
    return {(copied ? layout.permuted_k : layout.k) + place * layout.k_block_bytes,
            (copied ? layout.permuted_v : layout.v) + place * layout.v_block_bytes,
            moved && !copied ? order(q_head, block) : nullptr};
  }
  // Returns the block that holds token 0.
  std::int64_t sink_block(std::int64_t q_head) const {
    return layout.permuted ? layout.sink_block[order_head(q_head)] : 0;
  }

  // Return the means of a query head's blocks, [block][head_dim or head_dim_v]: as they were permuted, and where they
  // were.
  const float* pooled_k(std::int64_t q_head) const { return layout.pooled_k + pooled_rows(q_head) * head_dim(); }
  const float* pooled_v(std::int64_t q_head) const { return layout.pooled_v + pooled_rows(q_head) * head_dim_v(); }
  const float* pooled_own(std::int64_t q_head) const {
    return layout.pooled_own + kv_head(q_head) * layout.pooled_own_stride * head_dim();
  }

  // Returns a row's mask. Bit b: the row sees block b.
  std::uint64_t* mask(std::int64_t q_head, std::int64_t row) const {
    return layout.mask + (q_head * geometry().rows() + row) * layout.mask_words;
  }
  // Calls body(block) for the blocks that a row sees, ascending. The last is its diagonal, which every row has.
  template <class Body>
  void for_each_block(std::int64_t q_head, std::int64_t row, Body&& body) const {
    const std::uint64_t* const words = mask(q_head, row);
    for (std::int64_t word = 0; word < layout.mask_words; ++word)
      for (std::uint64_t bits = words[word]; bits != 0; bits &= bits - 1)
        body(static_cast<std::int32_t>(word * 64 + std::countr_zero(bits)));
  }

  Rows q_rows(std::int64_t q_head, std::int64_t query) const {
    return rows_of(inputs.q, heads.batch, heads.q_begin + q_head, query);
  }
  // Returns the rows of keys, or of values, of a KV head of the call, from a token on.
  Rows kv_rows(const ConstView& view, std::int64_t kv_head, std::int64_t token) const {
    const Pages& pages = inputs.pages;
    if (pages.table == nullptr) return rows_of(view, heads.batch, kv_head, token);
    Rows rows = rows_of(view, 0, kv_head, 0);
    rows.pages = pages.table + heads.batch * pages.batch_stride;
    rows.page_stride = view.batch_stride;
    rows.page_size = static_cast<std::int32_t>(pages.size);
    rows.first = static_cast<std::int32_t>(token);
    return rows;
  }

 private:
  static Rows rows_of(const ConstView& view, std::int64_t batch, std::int64_t head, std::int64_t token) {
    const std::int64_t offset = batch * view.batch_stride + head * view.head_stride + token * view.token_stride;
    return {.data = static_cast<const std::byte*>(view.data) + offset * (view.dtype == DType::f32 ? 4 : 2),
            .dtype = view.dtype,
            .stride = view.token_stride};
  }
  std::int64_t pooled_rows(std::int64_t q_head) const { return order_head(q_head) * layout.pooled_stride; }
};

}  // namespace pbsattn::cpu
