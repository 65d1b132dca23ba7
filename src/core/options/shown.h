// Text that a caller sent, as messages show it.
#pragma once

#include <string>
#include <string_view>

namespace pbsattn {

// Its beginning, without a part of a character of UTF-8 at the end, and "?" for what would break the line.
inline std::string shown(std::string_view text) {
  constexpr std::size_t longest = 64;  // bytes
  std::size_t end = text.size();
  if (end > longest)
    for (end = longest; end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U;) --end;
  std::string result(text.substr(0, end));
  for (char& c : result)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  return result;
}

}  // namespace pbsattn
