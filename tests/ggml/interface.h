// The plug-in's C interface, as the tests call it.
#pragma once

#include <cstdlib>
#include <string_view>
#include <vector>

#include "ggml-pbsattn.h"
#include "settings.h"

namespace pbsattn::ggml::test {

inline bool configure(Config config) {
  const ggml_pbsattn_config asked{.struct_size = sizeof asked,
                                  .options = &config.options,
                                  .min_tokens = config.min_tokens,
                                  .workspace_cap = config.workspace_cap,
                                  .mode = config.mode,
                                  .device = config.device,
                                  .check = config.check,
                                  .reserved = 0};
  return ggml_backend_pbsattn_configure(&asked);
}

// A tolerance for products in f32, or what those in bf16 need where PBSATTN_CPU_PATH forces them on whoever asks for
// f32.
inline double f32_tolerance(double tolerance, double of_bf16) {
  const char* path = std::getenv("PBSATTN_CPU_PATH");
  return path != nullptr && std::string_view(path).find("bf16") != std::string_view::npos ? of_bf16 : tolerance;
}

inline std::vector<ggml_pbsattn_layer_stats> layer_stats() {
  std::vector<ggml_pbsattn_layer_stats> layers(ggml_backend_pbsattn_stats_get(nullptr, 0),
                                               {.struct_size = sizeof(ggml_pbsattn_layer_stats)});
  ggml_backend_pbsattn_stats_get(layers.data(), layers.size());
  return layers;
}

}  // namespace pbsattn::ggml::test
