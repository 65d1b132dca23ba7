// Inputs that break careless softmax, sorting and selection: one list for every backend's tests.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "support/judge.h"
#include "support/problem.h"

namespace pbsattn::test {

struct HostileCase {
  std::string name;
  std::function<void(Problem&)> change;  // of a problem of random values of 16 bits, without batch
};

// Lists cases for problems of at least three segments of two blocks, the last one incomplete.
std::vector<HostileCase> hostile_cases(const Shape& shape, int block);

void set_row(Tensor& tensor, std::int64_t token, double value);

using Runner = std::function<RunResult(const Options&, Problem&)>;

// The rest is of problems like the above whose fifth row begins their third segment; `pbs` has their block and segment.

// Expects that keys that are all alike stay where they are, and of blocks that are, the first are kept.
void expect_equal_keys_keep_their_order(Problem problem, Options pbs, DType products, const Runner& run);
// Expects that where everything is NaN, `reference_code` keeps no block by score, `paper` all; the output is NaN.
void expect_nan_goes_by_the_rules(Problem problem, Options pbs, const Runner& run);

}  // namespace pbsattn::test
