// Structs of the C interfaces. Each begins with struct_size, its size in the header that the caller was compiled with,
// and grows only at its end: of an older caller's the missing fields have their defaults, of a newer one's the fields
// that aren't known here must be zero. This is the one place that reads or writes them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn {

// Of such a struct: name, last_field, and first_size, which it had in the first version that had it. Fields are so
// ordered, or followed by `reserved`, that no byte of it is padding: padding could be anything, and become a field.
template <class T>
struct SizedStruct;

#define PBSATTN_SIZED_STRUCT(type, last, first)                                                                   \
  template <>                                                                                                     \
  struct pbsattn::SizedStruct<type> {                                                                             \
    static constexpr const char* name = #type;                                                                    \
    static constexpr const char* last_field = #last;                                                              \
    static constexpr std::size_t first_size = first;                                                              \
    static_assert(offsetof(type, struct_size) == 0 && offsetof(type, last) + sizeof(type::last) == sizeof(type)); \
    static_assert(first_size <= sizeof(type) && first_size % alignof(type) == 0);                                 \
  }

inline constexpr std::size_t largest_struct = 4096;  // more than any will have; more is a size that nobody set

[[noreturn]] inline void refuse(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

inline void require_pointer(const void* pointer, const std::string& what) {
  if (pointer == nullptr) refuse(what + ": null pointer");
}

// Of fields that stand where padding would.
inline void require_zero(std::int32_t reserved, const std::string& what) {
  if (reserved != 0)
    refuse(what + ".reserved " + std::to_string(reserved) + ": not 0, which it is for later versions; set it to 0");
}

// What the caller set, if it can be right.
template <class T>
std::size_t size_of_struct(const T* caller, const std::string& what) {
  using Struct = SizedStruct<T>;
  require_pointer(caller, what);
  std::size_t size = 0;
  std::memcpy(&size, caller, sizeof size);
  if (size < Struct::first_size || size > largest_struct || size % alignof(T) != 0)
    refuse(what + ".struct_size " + std::to_string(size) + ": no size that a " + Struct::name + " can have (" +
           std::to_string(Struct::first_size) + " to " + std::to_string(largest_struct) + ", a multiple of " +
           std::to_string(alignof(T)) + "); set it to sizeof(" + Struct::name + ")");
  return size;
}

// The caller's struct, over the defaults.
template <class T>
T read_struct(const T* caller, const std::string& what, T value = {}) {
  using Struct = SizedStruct<T>;
  const std::size_t size = size_of_struct(caller, what);
  const void* from = caller;
  const auto* bytes = static_cast<const unsigned char*>(from);
  for (std::size_t i = sizeof(T); i < size; ++i)
    if (bytes[i] != 0)
      refuse(what + ": a field after " + Struct::last_field + " is set that pbsattn " + std::string(version()) +
             " doesn't know (byte " + std::to_string(i) + " of " + std::to_string(size) +
             "); leave it zero, or use the library that your header came with");
  std::memcpy(&value, from, std::min(size, sizeof(T)));
  value.struct_size = sizeof(T);
  return value;
}

// Fills the caller's struct; what it has no field for is left out.
template <class T>
void write_struct(T* caller, const std::string& what, const T& value) {
  const std::size_t size = size_of_struct(caller, what), known = std::min(size, sizeof(T));
  void* to = caller;
  const void* from = &value;
  std::memcpy(static_cast<char*>(to) + sizeof size, static_cast<const char*>(from) + sizeof size, known - sizeof size);
  std::memset(static_cast<char*>(to) + known, 0, size - known);
}

// The same for settings, which mean something else without the fields left out unless these have their defaults.
template <class T>
void write_settings(T* caller, const std::string& what, const T& value, const T& defaults) {
  const std::size_t size = size_of_struct(caller, what);
  const void *set = &value, *unset = &defaults;
  if (size < sizeof(T) &&
      std::memcmp(static_cast<const char*>(set) + size, static_cast<const char*>(unset) + size, sizeof(T) - size) != 0)
    refuse(what + ".struct_size " + std::to_string(size) + ": too small to hold these settings, which need " +
           std::to_string(sizeof(T)) + "; compile with the header of pbsattn " + std::string(version()));
  write_struct(caller, what, value);
}

// An array of the caller's structs: they lie as far apart as the caller's size says, which all have.
template <class T>
struct StructArray {
  StructArray(T* first, std::size_t length, const std::string& array_name)
      : array(array_name), count(length), stride(length == 0 ? 0 : size_of_struct(first, name(0))), first_(first) {
    for (std::size_t i = 1; i < count; ++i)
      if (const std::size_t size = size_of_struct((*this)[i], name(i)); size != stride)
        refuse(name(i) + ".struct_size " + std::to_string(size) + ": not that of " + name(0) + ", " +
               std::to_string(stride) + "; set it to sizeof(" + SizedStruct<std::remove_const_t<T>>::name +
               ") in each");
  }

  T* operator[](std::size_t i) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    using Void = std::conditional_t<std::is_const_v<T>, const void, void>;
    return static_cast<T*>(static_cast<Void*>(static_cast<Byte*>(static_cast<Void*>(first_)) + i * stride));
  }
  std::string name(std::size_t i) const { return array + "[" + std::to_string(i) + "]"; }

  std::string array;
  std::size_t count, stride;

 private:
  T* first_;
};

}  // namespace pbsattn
