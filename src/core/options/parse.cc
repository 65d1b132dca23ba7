#include "pbsattn/options.hpp"

#include <fmt/format.h>

#include <charconv>
#include <string>
#include <type_traits>

#include "core/options/shown.h"

namespace pbsattn {
namespace {

template <class... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> message, Args&&... args) {
  throw Error(ErrorCode::invalid_argument, fmt::format(message, std::forward<Args>(args)...));
}

template <class Field>
void read(Field& field, std::string_view name, std::string_view value) {
  if constexpr (std::is_enum_v<Field>) {
    std::string known;
    for (const std::string_view& one : Names<Field>::values) {
      if (one == value) {
        field = static_cast<Field>(&one - Names<Field>::values.data());
        return;
      }
      known += fmt::format("{}{}", known.empty() ? "" : ", ", one);
    }
    refuse("{} \"{}\": no such value; there are {}", name, shown(value), known);
  } else {
    Field number{};
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (error != std::errc() || end != value.data() + value.size())
      refuse("{} \"{}\": not a{} number", name, shown(value), std::is_integral_v<Field> ? " whole" : "");
    field = number;
  }
}

}  // namespace

void set_option(Options& options, std::string_view name, std::string_view value) {
  bool found = false;
  std::string known;
  visit_options(options, [&](std::string_view field_name, auto& field) {
    known += fmt::format("{}{}", known.empty() ? "" : ", ", field_name);
    if (found || field_name != name) return;
    found = true;
    read(field, name, value);
  });
  if (!found) refuse("option \"{}\": no such option of a method; there are {}", shown(name), known);
}

MethodText split_method(std::string_view text) {
  std::size_t end = text.find(':');
  MethodText parts{.name = text.substr(0, end), .options = {}};
  while (end != std::string_view::npos) {
    const std::size_t begin = end + 1;
    end = text.find(':', begin);
    const std::string_view part = text.substr(begin, end == std::string_view::npos ? end : end - begin);
    const std::size_t equals = part.find('=');
    if (equals == std::string_view::npos)
      refuse("{}: \"{}\" is no OPTION=VALUE; write, say, pbs:top_p=0.95", shown(text), shown(part));
    parts.options.emplace_back(part.substr(0, equals), part.substr(equals + 1));
  }
  return parts;
}

Options parse_method(std::string_view text) {
  const MethodText parts = split_method(text);
  Options options = method(parts.name);
  for (const auto& [name, value] : parts.options) set_option(options, name, value);
  return options;
}

}  // namespace pbsattn
