// A learned order that is in force: the file's weights for each layer, as the model's keys need them, and its settings.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "attention_op.h"
#include "layer_settings.h"
#include "learned_file.h"

namespace pbsattn::ggml {

class LearnedLayers {
 public:
  // A file's settings change options only `with_settings`, and `over` goes over those; `base` is what each option
  // starts from. Throws std::runtime_error naming what is wrong with the settings.
  LearnedLayers(std::shared_ptr<const learned::File> file, bool with_settings, const pbsattn_options& base,
                LayerSettings::Changes over = {});

  // Options of the query heads of a layer over `base`, as LayerSettings has them.
  std::vector<pbsattn_options> heads(std::int32_t layer, std::int64_t q_heads,
                                     const std::vector<pbsattn_options>& base) const;

  // Whether every op has to be of the file's model, since its settings count for all of them.
  bool with_settings() const { return settings_.has_value(); }

  // Throws std::runtime_error, with both numbers, where the op can't be of the model that the file was fitted on.
  void require_model(std::int32_t layer, const pbsattn_shape& shape) const;

  // The layer's weights [kv_heads][head_dim / 2 + head_dim] for keys that RoPE turned so. Throws std::runtime_error
  // where that isn't known, or can't be had from the file's.
  std::vector<float> weights(std::int32_t layer, const std::optional<Rope>& rope) const;

 private:
  std::shared_ptr<const learned::File> file_;
  std::optional<LayerSettings> settings_;
  LayerSettings::Changes over_;
};

}  // namespace pbsattn::ggml
