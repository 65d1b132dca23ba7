// Runs a test on each code path of this machine, not only on the one it would choose.
#pragma once

#include <optional>
#include <string>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn::test {

// Makes plans take a path by name, until destroyed: then what the environment had forced holds again.
class ForcedPath {
 public:
  explicit ForcedPath(const std::string& name);
  ~ForcedPath();
  ForcedPath(const ForcedPath&) = delete;
  ForcedPath& operator=(const ForcedPath&) = delete;

 private:
  std::optional<std::string> before_;
};

// Tells what a path multiplies in, by its name.
DType products_of(const std::string& path);

}  // namespace pbsattn::test
