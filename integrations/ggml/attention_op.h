// FLASH_ATTN_EXT as ggml hands it over, read into our terms.
#pragma once

#include <cstdint>
#include <optional>

#include "ggml-pbsattn.h"
#include "ggml.h"
#include "pbsattn/pbsattn.hpp"

namespace pbsattn::ggml {

// Ops are told apart by name: their numbers drift between versions of ggml.
bool is_attention(const ggml_tensor* op);
bool computes_nothing(const ggml_tensor* op);  // NONE, VIEW, RESHAPE, PERMUTE, TRANSPOSE

// What can be said before the mask has data.
ggml_pbsattn_reason examine(const ggml_tensor* op, std::int64_t min_tokens);

// How RoPE turned a layer's queries, and with them its keys.
struct Rope {
  RopePairs pairs = RopePairs::halves;
  std::int64_t columns = 0;  // turned; those behind them stay
};

// An op that `examine` takes. Tensors, with ne[0] first:
//   q   F32 [head_dim, n_q, q_heads], any token and head strides (llama.cpp: token-major)
//   k,v F16, BF16 or F32 [head_dim, n_kv, kv_heads], views into the cache; n_kv is padded
//   mask F16 [n_kv, n_q], contiguous rows
//   sinks F32 [q_heads], or none
//   dst F32 [head_dim, q_heads, n_q], contiguous
struct AttentionOp {
  ggml_tensor* tensor;
  const ggml_tensor* q() const { return tensor->src[0]; }
  const ggml_tensor* k() const { return tensor->src[1]; }
  const ggml_tensor* v() const { return tensor->src[2]; }
  const ggml_tensor* mask() const { return tensor->src[3]; }

  std::int64_t queries() const { return q()->ne[1]; }
  std::int32_t layer() const;        // of the cache that k views; -1 if its name doesn't tell
  std::optional<Rope> rope() const;  // of the node that made q, where there is one
  float scale() const;
  float soft_cap() const;      // 0: none
  const float* sinks() const;  // null: none
  pbsattn_shape shape(std::int64_t kv_len) const;
  static pbsattn_view view(const ggml_tensor* qkv, std::int64_t first_token = 0);
  pbsattn_view output(float* data) const;  // like dst, at `data`
};

}  // namespace pbsattn::ggml
