// Values drawn from a fuzzer's input; zeros when it runs out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace pbsattn::fuzz {

class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  template <class T>
  T take() {
    T value{};
    const std::size_t count = sizeof(T) < size_ ? sizeof(T) : size_;
    if (count > 0) std::memcpy(&value, data_, count);
    data_ += count;
    size_ -= count;
    return value;
  }
  // Usually one of low .. high; now and then anything of 52 bits, which small products don't overflow.
  std::int64_t take_near(std::int64_t low, std::int64_t high) {
    if (take<std::uint8_t>() == 0xFF) return take<std::int64_t>() >> 12;
    return low + take<std::uint16_t>() % (high - low + 1);
  }

  const std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

}  // namespace pbsattn::fuzz
