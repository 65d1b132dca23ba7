#include "files.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
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

// The file that a path names at the end of its symbolic links, whether or not there is one yet.
std::string behind_links(std::filesystem::path path) {
  constexpr int most_links = 40;  // as Linux has it
  for (int links = 0; std::filesystem::is_symlink(path); ++links) {
    if (links == most_links) {
      throw Failure(fmt::format("output file {}: its symbolic links lead nowhere; name a file", path.string()));
    }
    path = path.parent_path() / std::filesystem::read_symlink(path);
  }
  return path.string();
}

bool is_standard_output(const std::string& path) {
  struct stat file {
  }, output{};
  return stat(path.c_str(), &file) == 0 && fstat(STDOUT_FILENO, &output) == 0 && file.st_dev == output.st_dev &&
         file.st_ino == output.st_ino;
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
  constexpr auto nothing = std::ifstream::traits_type::eof();
  if (file.peek() == nothing ? !file.eof() : !(text << file.rdbuf()))
    throw Failure(fmt::format("settings {}: {}; name a JSON file", path, std::strerror(errno)));
  return text.str();
}

std::shared_ptr<const pbsattn::learned::File> read_learned(const std::string& path) {
  try {
    return std::make_shared<const pbsattn::learned::File>(pbsattn::learned::read(path));
  } catch (const pbsattn::Error& error) {
    throw Failure(fmt::format("learned order {}", error.what()));
  }
}

void print(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0) return;
  if (errno == EPIPE) throw NobodyReads();
  throw Failure(fmt::format("standard output: {}; free some space or print to another place", std::strerror(errno)));
}

OutputFile::OutputFile(std::string path) : path_(std::move(path)) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  const fs::file_status status = fs::status(path_, ignored);
  const bool special = fs::exists(status) && !fs::is_regular_file(status);
  if (fs::is_regular_file(status) && is_standard_output(path_)) {
    throw Failure(fmt::format(
        "output file {}: it is the standard output; give --json no file to print there, or another file", path_));
  }
  target_ = special ? path_ : behind_links(path_);
  partial_ = special ? target_ : fmt::format("{}.partial-{}", target_, getpid());
  file_.open(partial_, std::ios::binary);
  if (!file_) fail("name a place that can be written");
}

OutputFile::~OutputFile() {
  std::error_code ignored;
  if (partial_ != target_) std::filesystem::remove(partial_, ignored);
}

void OutputFile::commit(const std::string& text) {
  throw_if_interrupted();
  file_ << text;
  file_.close();
  if (!file_ && errno == EPIPE) throw NobodyReads();
  if (!file_) fail("free some space or name another place");
  if (partial_ != target_ && std::rename(partial_.c_str(), target_.c_str()) != 0) fail("name another place");
}

void OutputFile::fail(const char* way_out) const {
  throw Failure(fmt::format("output file {}: {}; {}", path_, std::strerror(errno), way_out));
}

}  // namespace app
