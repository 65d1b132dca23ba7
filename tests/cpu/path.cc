#include "cpu/path.h"

#include <cstdlib>

namespace pbsattn::test {
namespace {

constexpr const char* variable = "PBSATTN_CPU_PATH";

}  // namespace

ForcedPath::ForcedPath(const std::string& name) {
  if (const char* forced = std::getenv(variable)) before_ = forced;
  setenv(variable, name.c_str(), 1);
}
ForcedPath::~ForcedPath() {
  if (before_)
    setenv(variable, before_->c_str(), 1);
  else
    unsetenv(variable);
}

DType products_of(const std::string& path) {
  return path.find("bf16") == std::string::npos ? DType::f32 : DType::bf16;
}

}  // namespace pbsattn::test
