// The one conversion between Options and the pbsattn_options of the C interface.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "pbsattn/options.hpp"
#include "pbsattn/pbsattn.h"

namespace pbsattn {

// Returns the enumerator of a number from C. They travel as int32 so that a wrong value is data, not undefined
// behaviour: out of range of the enum's byte becomes its last byte, which validation refuses.
template <class Enum>
constexpr Enum to_enum(std::int32_t value) {
  return static_cast<Enum>(value < 0 || value > 0xFF ? 0xFF : value);
}

constexpr pbsattn_options to_c(const Options& options) {
  pbsattn_options c{};
  c.struct_size = sizeof c;
  visit_option_rows(
      [](const OptionInfo&, auto& to, auto from) { to = static_cast<std::remove_reference_t<decltype(to)>>(from); }, c,
      options);
  return c;
}

constexpr Options to_cpp(const pbsattn_options& c) {
  Options options;
  visit_option_rows(
      [](const OptionInfo&, auto& to, auto from) {
        using Field = std::remove_reference_t<decltype(to)>;
        if constexpr (std::is_enum_v<Field>)
          to = to_enum<Field>(from);
        else
          to = from;
      },
      options, c);
  return options;
}

inline constexpr pbsattn_options default_options = to_c(Options{});

// Counts the bytes of all options' fields.
template <class AnyOptions>
consteval std::size_t option_bytes() {
  std::size_t bytes = 0;
  AnyOptions options{};
  visit_option_rows([&](const OptionInfo&, auto& field) { bytes += sizeof field; }, options);
  return bytes;
}
static_assert(option_bytes<Options>() == sizeof(Options), "a field of Options has no row in visit_option_rows");
static_assert(sizeof(std::size_t) + option_bytes<pbsattn_options>() == sizeof(pbsattn_options),
              "a field of pbsattn_options has no row in visit_option_rows");

}  // namespace pbsattn
