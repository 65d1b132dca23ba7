// Cuts memory into arrays on cache lines' borders; without memory it counts bytes.
#pragma once

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <limits>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn::cpu {

class Arena {
 public:
  static constexpr std::size_t alignment = 64;

  explicit Arena(std::byte* base) : base_(base) {
    if (base != nullptr) used_ = (alignment - reinterpret_cast<std::uintptr_t>(base) % alignment) % alignment;
  }
  template <class T>
  void take(T*& pointer, std::int64_t count) {
    if (base_ != nullptr) pointer = reinterpret_cast<T*>(base_ + used_);
    constexpr std::size_t most = std::numeric_limits<std::ptrdiff_t>::max() - 2 * alignment;
    if (static_cast<std::size_t>(count) > (most - used_) / sizeof(T))
      throw Error(ErrorCode::out_of_memory,
                  fmt::format("workspace: over {} bytes, more than can be addressed; take fewer heads or threads, or "
                              "split the prompt into chunks",
                              most));
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + alignment - 1) / alignment * alignment;
  }
  // Returns the bytes taken, with what alignment may cost where there was no memory.
  std::size_t bytes() const { return used_ + (base_ == nullptr ? alignment : 0); }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

}  // namespace pbsattn::cpu
