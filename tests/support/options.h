// Options for tests that go through all there are, by the library's own table.
#pragma once

#include <string>
#include <type_traits>

#include "pbsattn/options.hpp"

namespace pbsattn::test {

// Whether all options have the same value.
inline bool same(const Options& a, const Options& b) {
  bool all = true;
  visit_option_rows([&](const OptionInfo&, auto x, auto y) { all = all && x == y; }, a, b);
  return all;
}

// Calls visit(info, value as text, options) for values of each option that "pbs" hasn't: every other name of an enum,
// and a number that is in every number's range. `options` are those of "pbs" with that value.
template <class Visitor>
void each_option_value(Visitor&& visit) {
  const Options pbs = method("pbs");
  const auto changed = [&](const OptionInfo& info, const std::string& value) {
    Options options = pbs;
    set_option(options, info.name, value);
    visit(info, value, options);
  };
  visit_option_rows(
      [&](const OptionInfo& info, auto field) {
        using Field = decltype(field);
        if constexpr (std::is_enum_v<Field>) {
          for (const std::string_view name : Names<Field>::values)
            if (name != name_of(field)) changed(info, std::string(name));
        } else if constexpr (std::is_integral_v<Field>) {
          changed(info, std::to_string(field + 128));  // a block of 256 goes with the segment of 256
        } else {
          changed(info, std::to_string(field / 2 + 0.125F));
        }
      },
      pbs);
}

}  // namespace pbsattn::test
