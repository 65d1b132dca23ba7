// The plug-in speaks only through ggml's logger, so a program that silences or redirects ggml does the same to us.
#pragma once

#include <string>

#include "ggml.h"

namespace pbsattn::ggml {

inline void log(ggml_log_level level, const std::string& line) {
  ggml_log_callback callback = nullptr;
  void* user_data = nullptr;
  ggml_log_get(&callback, &user_data);
  if (callback != nullptr) callback(level, ("pbsattn: " + line + "\n").c_str(), user_data);
}

// The same where no exception may leave: a line that there is no memory for is lost.
inline void try_log(ggml_log_level level, const char* line) noexcept {
  try {
    log(level, line);
  } catch (...) {
  }
}

// What the user asked to see (PBSATTN_STATS, PBSATTN_VERBOSE) goes out as a warning: llama.cpp's tools hide
// the information level of backends unless told otherwise.
constexpr ggml_log_level asked_for = GGML_LOG_LEVEL_WARN;

}  // namespace pbsattn::ggml
