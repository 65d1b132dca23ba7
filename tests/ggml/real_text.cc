#include "real_text.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

namespace pbsattn::ggml::test {
namespace {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::string contents(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

std::string model_path() {
  const std::string named = environment("PBSATTN_TEST_MODEL");
  return named.empty() ? PBSATTN_TEST_MODEL : named;
}

std::string real_text() {
  if (const std::string named = environment("PBSATTN_TEST_TEXT"); !named.empty()) return contents(named);
  const std::filesystem::path folder = "/usr/share/common-licenses";
  if (!std::filesystem::is_directory(folder)) return "";
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.is_regular_file() && !entry.is_symlink()) files.push_back(entry.path());
  std::ranges::sort(files);
  std::string text;
  for (const auto& file : files) text += contents(file);
  return text;
}

}  // namespace pbsattn::ggml::test
