// What the environment or the program asked for, shared by every context of the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "ggml-pbsattn.h"
#include "layer_settings.h"
#include "learned_layers.h"

namespace pbsattn::ggml {

// A ggml_pbsattn_config, with its options in it. `mode` and `device` may be wrong until broken_rule() has looked.
struct Config {
  std::int32_t mode = GGML_PBSATTN_MODE_PBSATTN;
  pbsattn_options options{.struct_size = sizeof(pbsattn_options)};
  std::int32_t device = PBSATTN_DEVICE_CPU;
  std::int64_t min_tokens = 512;
  std::size_t workspace_cap = SIZE_MAX;
  bool check = false;
};

struct Settings {
  Config config;
  std::shared_ptr<const LearnedLayers> learned;  // PBSATTN_LEARNED, or null
  std::shared_ptr<const LayerSettings> layers;   // PBSATTN_SETTINGS, or null
  std::size_t cache_cap = std::size_t{1} << 30;  // PBSATTN_CACHE_MIB: bytes a context may keep between micro-batches
  std::string stats_target;                      // PBSATTN_STATS: "" for none, "1" for the log, else a file's path
  bool verbose = false;                          // PBSATTN_VERBOSE: a log line for each op
};

struct Observer {
  ggml_pbsattn_observer call = nullptr;
  void* user = nullptr;
};

// The configuration of a process that sets nothing.
Config default_config();

// Returns the variable that sets an option: "PBSATTN_TOP_P" for "top_p".
std::string variable_of(std::string_view option);

// Reads the PBSATTN_* variables through `variable` (std::getenv, or a test's table; null for unset). On a
// bad value *error names it and the settings' mode is OFF.
Settings read_environment(const std::function<const char*(const char*)>& variable, std::string* error);

// The rule that `config` breaks, or nothing.
std::optional<std::string> broken_rule(const Config& config);

// Runs `body` of a function of the C interface: an exception becomes the calling thread's last error, and false.
void set_last_error(const char* message) noexcept;
template <class Body>
bool explained(Body&& body) noexcept {
  try {
    set_last_error("");
    body();
    return true;
  } catch (const std::exception& error) {
    set_last_error(error.what());
  } catch (...) {
    set_last_error("unknown exception");
  }
  return false;
}

// The process's settings. The first call reads the environment and logs what is wrong with it; no exception comes of
// it.
Settings current_settings();
Config current_config() noexcept;
// Puts a learned order in force from the next op on, for programs that have read it; null: none.
void set_learned(std::shared_ptr<const LearnedLayers> learned);
Observer current_observer();

}  // namespace pbsattn::ggml
