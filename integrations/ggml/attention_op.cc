#include "attention_op.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <optional>
#include <string_view>

#include "settings.h"

namespace pbsattn::ggml {
namespace {

ggml_op op_named(std::string_view name) {
  for (int op = 0; op < GGML_OP_COUNT; ++op)
    if (name == ggml_op_name(static_cast<ggml_op>(op))) return static_cast<ggml_op>(op);
  return GGML_OP_COUNT;
}

std::optional<pbsattn_dtype> dtype_of(ggml_type type) {
  switch (type) {
    case GGML_TYPE_F32: return PBSATTN_F32;
    case GGML_TYPE_F16: return PBSATTN_F16;
    case GGML_TYPE_BF16: return PBSATTN_BF16;
    default: return std::nullopt;
  }
}

// Strides are whole elements and the head_dim axis is contiguous.
bool strided(const ggml_tensor* t) {
  const std::size_t element = ggml_type_size(t->type);
  return t->nb[0] == element && t->nb[1] % element == 0 && t->nb[2] % element == 0 && t->ne[3] == 1;
}

// op_params of FLASH_ATTN_EXT, all of them: the words that have no meaning yet must be zero.
struct Params {
  float scale;
  float max_bias;
  float soft_cap;
  std::int32_t precision;  // ggml_prec
  std::int32_t n_kv_max;
  std::int32_t without_meaning[GGML_MAX_OP_PARAMS / sizeof(std::int32_t) - 5];
};
Params params_of(const ggml_tensor* op) {
  static_assert(sizeof(Params) == sizeof(op->op_params));
  Params params;
  std::memcpy(&params, op->op_params, sizeof params);
  return params;
}

// Sources are q, k, v, mask and sinks. A ggml that hands over more means more by the op than we compute.
constexpr int known_sources = 5;

bool has_unknown_inputs(const ggml_tensor* op, const Params& params) {
  const auto is_zero = [](std::int32_t word) { return word == 0; };
  return std::any_of(op->src + known_sources, op->src + GGML_MAX_SRC,
                     [](const auto* source) { return source != nullptr; }) ||
         (params.precision != GGML_PREC_DEFAULT && params.precision != GGML_PREC_F32) ||
         !std::ranges::all_of(params.without_meaning, is_zero);
}

}  // namespace

bool is_attention(const ggml_tensor* op) {
  static const ggml_op attention = op_named("FLASH_ATTN_EXT");
  return op->op == attention;
}

bool computes_nothing(const ggml_tensor* op) {
  static const ggml_op none = op_named("NONE"), view = op_named("VIEW"), reshape = op_named("RESHAPE"),
                       permute = op_named("PERMUTE"), transpose = op_named("TRANSPOSE");
  return op->op == none || op->op == view || op->op == reshape || op->op == permute || op->op == transpose;
}

ggml_pbsattn_reason examine(const ggml_tensor* op, std::int64_t min_tokens) {
  const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3], *sinks = op->src[4];
  if (q->ne[1] < min_tokens) return GGML_PBSATTN_FEW_TOKENS;
  const Params params = params_of(op);
  if (has_unknown_inputs(op, params)) return GGML_PBSATTN_UNKNOWN_INPUTS;
  if (q->type != GGML_TYPE_F32 || k->type != v->type || !dtype_of(k->type) || op->type != GGML_TYPE_F32)
    return GGML_PBSATTN_TYPES;
  const std::int64_t head_dim = q->ne[0];
  if (k->ne[0] != head_dim || v->ne[0] != head_dim || head_dim % 8 != 0 || head_dim > 256) return GGML_PBSATTN_HEAD_DIM;
  if (sinks != nullptr && (sinks->type != GGML_TYPE_F32 || !ggml_is_contiguous(sinks) || sinks->ne[0] != q->ne[2] ||
                           ggml_nelements(sinks) != q->ne[2]))
    return GGML_PBSATTN_SINKS;
  if (!std::isfinite(params.soft_cap) || params.soft_cap < 0.0F) return GGML_PBSATTN_SOFT_CAP;
  if (params.max_bias != 0.0F) return GGML_PBSATTN_ALIBI;
  if (params.n_kv_max != 0) return GGML_PBSATTN_TOP_K;
  if (mask == nullptr) return GGML_PBSATTN_NO_MASK;
  if (!strided(q) || !strided(k) || !strided(v) || !ggml_is_contiguous(op) || !(params.scale > 0.0F) ||
      k->ne[1] != v->ne[1] || k->ne[2] != v->ne[2] || q->ne[2] % k->ne[2] != 0 || mask->type != GGML_TYPE_F16 ||
      mask->nb[0] != sizeof(std::uint16_t) || mask->ne[0] != k->ne[1] || mask->ne[1] < q->ne[1] || mask->ne[2] != 1 ||
      mask->ne[3] != 1)
    return GGML_PBSATTN_LAYOUT;
  return GGML_PBSATTN_TAKEN;
}

std::int32_t AttentionOp::layer() const {
  constexpr std::string_view prefix = "cache_k_l";
  if (k()->view_src == nullptr) return -1;
  const std::string_view name = k()->view_src->name;
  if (!name.starts_with(prefix)) return -1;
  std::int32_t layer = -1;
  const auto [end, code] = std::from_chars(name.data() + prefix.size(), name.data() + name.size(), layer);
  return code == std::errc() && end == name.data() + name.size() && layer >= 0 ? layer : -1;
}

std::optional<Rope> AttentionOp::rope() const {
  static const ggml_op rope_op = op_named("ROPE");
  constexpr int longest_way = 16;  // of nodes that view, scale or normalise what RoPE turned
  const ggml_tensor* node = q();
  for (int i = 0; i < longest_way && node != nullptr && node->op != rope_op; ++i) node = node->src[0];
  if (node == nullptr || node->op != rope_op) return std::nullopt;
  const std::int64_t columns = node->op_params[1];
  switch (node->op_params[2]) {
    case GGML_ROPE_TYPE_NORMAL: return Rope{RopePairs::neighbours, columns};
    case GGML_ROPE_TYPE_NEOX:
    case GGML_ROPE_TYPE_MROPE:
    case GGML_ROPE_TYPE_IMROPE: return Rope{RopePairs::halves, columns};
    default: return std::nullopt;
  }
}

float AttentionOp::scale() const {
  return params_of(tensor).scale;
}

float AttentionOp::soft_cap() const {
  return params_of(tensor).soft_cap;
}

const float* AttentionOp::sinks() const {
  const ggml_tensor* sinks = tensor->src[4];
  return sinks == nullptr ? nullptr : static_cast<const float*>(sinks->data);
}

pbsattn_shape AttentionOp::shape(std::int64_t kv_len) const {
  return {.struct_size = sizeof(pbsattn_shape),
          .batch = 1,
          .q_heads = q()->ne[2],
          .kv_heads = k()->ne[2],
          .q_len = queries(),
          .kv_len = kv_len,
          .head_dim = q()->ne[0]};
}

pbsattn_view AttentionOp::view(const ggml_tensor* qkv, std::int64_t first_token) {
  const auto element = static_cast<std::int64_t>(ggml_type_size(qkv->type));
  return {.struct_size = sizeof(pbsattn_view),
          .data = static_cast<std::byte*>(qkv->data) + first_token * static_cast<std::int64_t>(qkv->nb[1]),
          .batch_stride = 0,
          .head_stride = static_cast<std::int64_t>(qkv->nb[2]) / element,
          .token_stride = static_cast<std::int64_t>(qkv->nb[1]) / element,
          .dtype = *dtype_of(qkv->type),
          .reserved = 0};
}

pbsattn_view AttentionOp::output(float* data) const {
  const std::int64_t head_dim = tensor->ne[0], heads = tensor->ne[1];
  return {.struct_size = sizeof(pbsattn_view),
          .data = data,
          .batch_stride = 0,
          .head_stride = head_dim,
          .token_stride = head_dim * heads,
          .dtype = PBSATTN_F32,
          .reserved = 0};
}

}  // namespace pbsattn::ggml

extern "C" ggml_pbsattn_reason ggml_backend_pbsattn_examine(const ggml_tensor* op) {
  const pbsattn::ggml::Config config = pbsattn::ggml::current_config();
  if (config.mode == GGML_PBSATTN_MODE_OFF || !pbsattn::ggml::is_attention(op)) return GGML_PBSATTN_BY_MODE;
  return pbsattn::ggml::examine(op, config.min_tokens);
}
