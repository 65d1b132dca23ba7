#include "files.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <string_view>
#include <utility>

#include "errors.h"

namespace app {
namespace {

constexpr std::size_t largest_prompt = std::size_t{64} << 20;

// Where the text stops being UTF-8, if anywhere.
std::optional<std::size_t> first_bad_utf8(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  for (std::size_t i = 0; i < text.size();) {
    const unsigned char lead = byte(i);
    const std::size_t length = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : lead >> 3 == 30 ? 4 : 0;
    if (length == 0 || i + length > text.size()) return i;
    unsigned code = length == 1 ? lead : lead & (0x7FU >> length);
    for (std::size_t j = 1; j < length; ++j) {
      if (byte(i + j) >> 6 != 2) return i;
      code = code << 6 | (byte(i + j) & 0x3FU);
    }
    constexpr unsigned smallest[] = {0, 0, 0x80, 0x800, 0x10000};
    const bool surrogate = code >= 0xD800 && code <= 0xDFFF;
    if (code < smallest[length] || code > 0x10FFFF || surrogate) return i;
    i += length;
  }
  return std::nullopt;
}

}  // namespace

std::string read_prompt(const std::string& path) {
  if (std::filesystem::is_directory(path)) {
    throw Failure(fmt::format("prompt file {}: a directory; name a text file", path));
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Failure(fmt::format("prompt file {}: {}; name a readable text file", path, std::strerror(errno)));
  std::string text;
  std::string chunk(std::size_t{1} << 20, '\0');
  while (file.read(chunk.data(), static_cast<std::streamsize>(chunk.size())) || file.gcount() > 0) {
    text.append(chunk, 0, static_cast<std::size_t>(file.gcount()));
    if (text.size() > largest_prompt) {
      throw Failure(fmt::format("prompt file {}: over {} MiB, more than any model's context; pass a part of it", path,
                                largest_prompt >> 20));
    }
  }
  if (file.bad()) throw Failure(fmt::format("prompt file {}: reading it failed; check the disk", path));
  if (text.empty()) throw Failure(fmt::format("prompt file {}: empty; pass a text longer than one segment", path));
  if (const auto bad = first_bad_utf8(text)) {
    throw Failure(
        fmt::format("prompt file {}: byte {} (0x{:02X}) is not UTF-8; convert the text, as with iconv -t UTF-8", path,
                    *bad, static_cast<unsigned char>(text[*bad])));
  }
  return text;
}

std::string read_settings(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  if (!file || !(text << file.rdbuf()))
    throw Failure(fmt::format("settings {}: {}; name a JSON file", path, std::strerror(errno)));
  return text.str();
}

OutputFile::OutputFile(std::string path) : path_(std::move(path)) {
  const bool special = std::filesystem::exists(path_) && !std::filesystem::is_regular_file(path_);
  partial_ = special ? path_ : fmt::format("{}.partial-{}", path_, getpid());
  if (!std::ofstream(partial_, std::ios::binary)) {
    throw Failure(fmt::format("output file {}: {}; name a place that can be written", path_, std::strerror(errno)));
  }
}

OutputFile::~OutputFile() {
  std::error_code ignored;
  if (partial_ != path_) std::filesystem::remove(partial_, ignored);
}

void OutputFile::commit(const std::string& text) {
  std::ofstream file(partial_, std::ios::binary);
  file << text;
  file.close();
  if (!file) {
    throw Failure(
        fmt::format("output file {}: {}; free some space or name another place", path_, std::strerror(errno)));
  }
  if (partial_ != path_) std::filesystem::rename(partial_, path_);
}

}  // namespace app
