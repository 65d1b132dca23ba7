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

// A soft-cap, a product that it makes log 3 of, since tanh(log(3) / 2) is a half, and one so large that it makes itself
// of it: log 9.
inline const double softcap = 2 * std::log(3);
inline const double to_log3 = std::log(3) * std::log(3);
inline constexpr double to_log9 = 1000;

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
