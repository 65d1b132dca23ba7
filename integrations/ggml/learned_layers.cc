#include "learned_layers.h"

#include <fmt/format.h>

#include <stdexcept>
#include <utility>

namespace pbsattn::ggml {

LearnedLayers::LearnedLayers(std::shared_ptr<const learned::File> file, bool with_settings, const pbsattn_options& base,
                             LayerSettings::Changes over)
    : file_(std::move(file)), over_(std::move(over)) {
  if (!with_settings) return;
  try {
    settings_ = LayerSettings::parse(file_->settings, base);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(fmt::format("{}: settings: {}", file_->name, error.what()));
  }
}

std::vector<pbsattn_options> LearnedLayers::heads(std::int32_t layer, std::int64_t q_heads,
                                                  const std::vector<pbsattn_options>& base) const {
  if (!settings_) return base;
  std::vector<pbsattn_options> heads = settings_->heads(layer, q_heads, base);
  for (pbsattn_options& options : heads) LayerSettings::apply(over_, &options);
  return heads;
}

void LearnedLayers::require_model(std::int32_t layer, const pbsattn_shape& shape) const {
  if (layer < 0)
    throw std::runtime_error(
        fmt::format("{}: this attention doesn't tell its layer, so none of the file's is known to be its own; use it "
                    "without the file",
                    file_->name));
  if (layer >= file_->sizes.layers)
    throw std::runtime_error(
        fmt::format("{}: has {} layers, and this is the model's layer {}, counted from 0; name the "
                    "file that was fitted on this model",
                    file_->name, file_->sizes.layers, layer));
  learned::require_model(*file_, {.layers = file_->sizes.layers,  // an op doesn't tell how many there are
                                  .query_heads = shape.q_heads,
                                  .kv_heads = shape.kv_heads,
                                  .head_dim = shape.head_dim});
}

std::vector<float> LearnedLayers::weights(std::int32_t layer, const std::optional<Rope>& rope) const {
  if (!rope)
    throw std::runtime_error(
        fmt::format("{}: no RoPE is seen before this attention, so which of its columns are pairs isn't known; use it "
                    "without the file",
                    file_->name));
  if (rope->pairs != file_->pairs && rope->columns != file_->sizes.head_dim)
    throw std::runtime_error(
        fmt::format("{}: its pairs are {}, the model's {}, of {} columns alone: weights are converted where RoPE turns "
                    "all {}; use the model without the file",
                    file_->name, learned::name_of(file_->pairs), learned::name_of(rope->pairs), rope->columns,
                    file_->sizes.head_dim));
  return learned::in_pairs(file_->of_layer(layer), file_->sizes.head_dim, file_->pairs, rope->pairs);
}

}  // namespace pbsattn::ggml
