// A call of attention drawn from a fuzzer's bytes: one in four may have anything in any of its numbers, the others keep
// to what every device takes.
#pragma once

#include <vector>

#include "bytes.h"
#include "pbsattn/options.hpp"
#include "pbsattn/pbsattn.h"

namespace pbsattn::fuzz {

struct Call {
  std::vector<Options> heads;  // one for all of them, or one for each
  Shape shape;
  Device device;
  std::size_t cap = Plan::no_cap;
};

Call take_call(Bytes& bytes);

// As callers of the C interface have them.
pbsattn_options to_c(const Options& options);
pbsattn_shape to_c(const Shape& shape);
pbsattn_device to_c(const Device& device);

}  // namespace pbsattn::fuzz
