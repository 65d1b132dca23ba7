// What keeps exceptions out of ggml and of C programs: no extern "C" function lets one through, whatever it is.
#pragma once

#include <cstddef>
#include <exception>
#include <new>
#include <type_traits>

#include "log.h"

namespace pbsattn::ggml {

// Runs `body`; an exception becomes a log line and `otherwise`.
template <class Result, class Body>
Result guarded(Result otherwise, Body&& body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    try_log(GGML_LOG_LEVEL_ERROR, error.what());
  } catch (...) {
    try_log(GGML_LOG_LEVEL_ERROR, "unknown exception");
  }
  return otherwise;
}

// The process's one T. Never destroyed, since contexts may outlive static destruction, and in no memory that could
// be lacking.
template <class T>
T& immortal() noexcept {
  static_assert(std::is_nothrow_default_constructible_v<T>);
  alignas(T) static std::byte storage[sizeof(T)];
  static T* const made = new (storage) T;
  return *made;
}

}  // namespace pbsattn::ggml
