// What tests on inputs worked out by hand are written in.
#pragma once

#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "reference/definition.h"

namespace pbsattn::reference {

using List = std::vector<std::int32_t>;

inline const double nan = std::nan("");

inline Matrix matrix(std::int64_t columns, std::vector<double> values) {
  Matrix result(static_cast<std::int64_t>(values.size()) / columns, columns);
  result.values = std::move(values);
  return result;
}

inline Matrix column(std::vector<double> values) {
  return matrix(1, std::move(values));
}

inline List identity(std::int64_t count) {
  List order(count);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

}  // namespace pbsattn::reference
