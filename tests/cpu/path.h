// Runs a test on each code path of this machine, not only on the one it would choose.
#pragma once

#include <string>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn::test {

// Makes plans take a path by name, until destroyed.
class ForcedPath {
 public:
  explicit ForcedPath(const std::string& name);
  ~ForcedPath();
  ForcedPath(const ForcedPath&) = delete;
  ForcedPath& operator=(const ForcedPath&) = delete;
};

// What a path multiplies in, by its name.
Precision products_of(const std::string& path);

}  // namespace pbsattn::test
