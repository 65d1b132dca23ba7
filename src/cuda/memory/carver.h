// Arrays one after the other in a piece of memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pbsattn::cuda {

// Made without a base, whose alignment is the largest that is asked for, it counts bytes.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<std::byte*>(base)) {}

  // Points at room for `count` elements, at a multiple of `alignment` bytes from the base.
  template <class T>
  void take(T*& pointer, std::int64_t count, std::size_t alignment = alignof(T)) {
    bytes = (bytes + alignment - 1) / alignment * alignment;
    if (base_ != nullptr) pointer = reinterpret_cast<T*>(base_ + bytes);
    bytes += static_cast<std::size_t>(count) * sizeof(T);
  }

  std::size_t bytes = 0;  // taken so far

 private:
  std::byte* base_;
};

}  // namespace pbsattn::cuda
