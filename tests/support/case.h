// What the backends' tests with parameters go through.
#pragma once

#include <ostream>
#include <string>

#include "support/problem.h"

namespace pbsattn::test {

// A method on a problem, by which a test is named.
struct MethodCase {
  std::string name;
  ProblemSpec problem;
  Options options;
};

inline void PrintTo(const MethodCase& c, std::ostream* stream) {
  *stream << c.name;
}

// Returns a problem's description whose tensors are all of one dtype and layout.
inline ProblemSpec alike(const Shape& shape, DType dtype = DType::bf16, TensorLayout layout = TensorLayout::bhsd,
                         std::uint64_t seed = 1) {
  return {.shape = shape, .q = dtype, .k = dtype, .v = dtype, .out = dtype, .layout = layout, .seed = seed};
}

inline Shape shape_of(std::int64_t q_len, std::int64_t kv_len, std::int64_t head_dim = 64, std::int64_t q_heads = 2,
                      std::int64_t kv_heads = 1, std::int64_t batch = 1) {
  return {
      .batch = batch, .q_heads = q_heads, .kv_heads = kv_heads, .q_len = q_len, .kv_len = kv_len, .head_dim = head_dim};
}

inline Options pbs(float top_p = 0.8F) {
  Options options = method("pbs");
  options.top_p = top_p;
  return options;
}

}  // namespace pbsattn::test
