// Structs of the C interface as its callers make them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "bytes.h"
#include "pbsattn/pbsattn.h"

namespace pbsattn::fuzz {

template <class Struct>
Struct sized() {
  Struct value{};
  value.struct_size = sizeof(Struct);
  return value;
}

// A struct as callers with another header have it, in memory that ends where it does: now and then shorter, or with
// fields that aren't known here, of which some are set.
template <class Struct>
class OtherVersion {
 public:
  OtherVersion(Struct value, Bytes& bytes) {
    if (bytes.take_rarely(8)) value.struct_size = static_cast<std::size_t>(bytes.take_near(0, sizeof(Struct)));
    if (bytes.take_rarely(8)) value.struct_size = sizeof(Struct) + 8 * static_cast<std::size_t>(bytes.take_near(1, 8));
    memory_.resize(std::max(value.struct_size, sizeof(std::size_t)));
    std::memcpy(memory_.data(), &value, std::min(memory_.size(), sizeof(Struct)));
    if (memory_.size() > sizeof(Struct) && bytes.take_rarely(2)) memory_.back() = bytes.take<std::byte>();
    memory_.shrink_to_fit();
  }

  // Whether it can be understood here as it was meant.
  bool known() const { return memory_.size() <= sizeof(Struct) || memory_.back() == std::byte{0}; }
  bool whole() const { return memory_.size() >= sizeof(Struct); }
  const Struct* get() const { return static_cast<const Struct*>(static_cast<const void*>(memory_.data())); }

 private:
  std::vector<std::byte> memory_;
};

}  // namespace pbsattn::fuzz
