#include "cpu/path.h"

#include <cstdlib>

namespace pbsattn::test {
namespace {

constexpr const char* variable = "PBSATTN_CPU_PATH";

}  // namespace

ForcedPath::ForcedPath(const std::string& name) {
  setenv(variable, name.c_str(), 1);
}
ForcedPath::~ForcedPath() {
  unsetenv(variable);
}

Precision products_of(const std::string& path) {
  return path.find("bf16") == std::string::npos ? Precision::f32 : Precision::bf16;
}

}  // namespace pbsattn::test
