// Inputs that break careless softmax, sorting and selection: one list for every backend's tests.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "support/problem.h"

namespace pbsattn::test {

struct HostileCase {
  std::string name;
  std::function<void(Problem&)> change;  // of a problem of random bf16 values, without batch
};

// For problems of at least three segments of two blocks, the last one incomplete.
std::vector<HostileCase> hostile_cases(const Shape& shape, int block);

void set_row(Tensor& tensor, std::int64_t token, double value);

}  // namespace pbsattn::test
