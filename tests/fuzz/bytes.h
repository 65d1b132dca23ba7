// Values drawn from a fuzzer's input; zeros when it runs out.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace pbsattn::fuzz {

class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {
    for (std::size_t i = 0; i < size; ++i) hash_ = (hash_ ^ data[i]) * 0x100000001B3U;  // FNV-1a
  }

  template <class T>
  T take() {
    T value{};
    const std::size_t count = sizeof(T) < size_ ? sizeof(T) : size_;
    if (count > 0) std::memcpy(&value, data_, count);
    data_ += count;
    size_ -= count;
    return value;
  }
  // True for one in so many.
  bool take_rarely(int one_in) { return take<std::uint8_t>() % one_in == one_in - 1; }

  // From here on the values below may be anything, now and then. Without it they keep to their ranges: an input of many
  // fields of which any may be wrong is nearly always refused, and then nothing behind the refusal is reached.
  void allow_hostile() { hostile_ = true; }
  bool hostile() const { return hostile_; }

  // One of low .. high; of hostile bytes also anything of 52 bits, which small products don't overflow.
  std::int64_t take_near(std::int64_t low, std::int64_t high) {
    if (hostile_ && take<std::uint8_t>() == 0xFF) return take<std::int64_t>() >> 12;
    return low + take<std::uint16_t>() % (high - low + 1);
  }
  // One of 0, 1/steps, .. 1; of hostile bytes also any float.
  float take_share(int steps) {
    if (hostile_ && take<std::uint8_t>() == 0xFF) return std::bit_cast<float>(take<std::uint32_t>());
    return static_cast<float>(take<std::uint16_t>() % (steps + 1)) / static_cast<float>(steps);
  }

  // Of the whole input, what was taken among it.
  std::uint64_t hash() const { return hash_; }
  const std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::string_view rest() const { return {reinterpret_cast<const char*>(data_), size_}; }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  bool hostile_ = false;
  std::uint64_t hash_ = 0xCBF29CE484222325U;
};

}  // namespace pbsattn::fuzz
