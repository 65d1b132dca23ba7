// The CUDA backend's decisions against the reference's own, order included, over everything that a plan can say. The
// CPU backend is held to the same plans (tests/cpu/end_to_end_test.cc).
#include "support/end_to_end.h"

#include <gtest/gtest.h>

#include <iostream>

#include "cuda/device_run.h"

namespace pbsattn::test {
namespace {

TEST(CudaEndToEnd, DecisionsAreTheReferences) {
  const Backend cuda = [](const RandomPlan& plan, Problem& problem) { return run_on_device(plan.heads, problem); };
  constexpr Tolerance rounding{.key_score = 1e-4, .block_score = 1e-4};
  constexpr double output_error = 0.02;  // weights and outputs have 8 bits in bf16
  Agreement agreement;
  for (RandomPlan plan : plans_for_cuda()) {
    plan.problem.out = plan.problem.q;
    SCOPED_TRACE(testing::PrintToString(plan));
    expect_reference_decisions(plan, cuda, rounding, output_error, agreement);
    if (HasFailure()) break;
  }
  std::cout << agreement << "\n";
  EXPECT_GT(4 * agreement.sparse_rows, agreement.rows) << "plans that keep everything compare nothing";
}

}  // namespace
}  // namespace pbsattn::test
