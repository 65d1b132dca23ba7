// What the environment or the program asked for, shared by every context of the process.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "ggml-pbsattn.h"
#include "layer_settings.h"

namespace pbsattn::ggml {

struct Settings {
  ggml_pbsattn_config config{};
  std::shared_ptr<const LayerSettings> layers;  // PBSATTN_SETTINGS, or null
  std::string stats_target;                     // PBSATTN_STATS: "" for none, "1" for the log, else a file's path
  bool verbose = false;                         // PBSATTN_VERBOSE: a log line for each op
};

struct Observer {
  ggml_pbsattn_observer call = nullptr;
  void* user = nullptr;
};

// The configuration of a process that sets nothing.
ggml_pbsattn_config default_config();

// Reads the PBSATTN_* variables through `variable` (std::getenv, or a test's table; null for unset). On a
// bad value *error names it and the settings' mode is OFF.
Settings read_environment(const std::function<const char*(const char*)>& variable, std::string* error);

// The rule that `config` breaks, or nothing.
std::optional<std::string> broken_rule(const ggml_pbsattn_config& config);

// The process's settings. The first call reads the environment and logs what is wrong with it.
Settings current_settings();
Observer current_observer();

}  // namespace pbsattn::ggml
