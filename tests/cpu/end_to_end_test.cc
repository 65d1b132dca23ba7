// The CPU backend's decisions against the reference's own, order included, over everything that a plan can say.
#include <gtest/gtest.h>

#include <iostream>

#include "cpu/path.h"
#include "support/end_to_end.h"

namespace pbsattn::test {
namespace {

class EndToEnd : public testing::TestWithParam<std::string> {
 private:
  ForcedPath forced_{GetParam()};
};

std::vector<std::string> f32_paths() {
  std::vector<std::string> paths = describe_cpu().paths;
  std::erase_if(paths, [](const std::string& path) { return products_of(path) != DType::f32; });
  return paths;
}

#ifdef __SANITIZE_ADDRESS__
constexpr int most_each = 2;  // what it looks for isn't in decisions
#else
constexpr int most_each = 16;
#endif

// Scores of a few tens have a relative error of a few 1e-7 in float32.
constexpr Tolerance rounding{.key_score = 1e-5, .block_score = 1e-5};

void expect_reference_decisions(const std::vector<RandomPlan>& plans) {
  int threads = 1;
  const Backend cpu = [&](const RandomPlan& plan, Problem& problem) {
    threads = 3 - threads;
    return run(plan.heads, problem, {.device = Device::cpu(threads)});
  };
  Agreement agreement;
  for (const RandomPlan& plan : plans) {
    SCOPED_TRACE(testing::PrintToString(plan));
    expect_reference_decisions(plan, cpu, rounding, 1e-5, agreement);
    if (testing::Test::HasFailure()) break;
  }
  std::cout << agreement << "\n";
  EXPECT_GT(4 * agreement.sparse_rows, agreement.rows) << "plans that keep everything compare nothing";
}

TEST_P(EndToEnd, DecisionsAreTheReferences) {
  const bool most = GetParam() == f32_paths().front();  // the others differ in kernels alone
  expect_reference_decisions(random_plans({.dtypes = {DType::f32, DType::bf16},
                                           .head_dims = {8, 24, 40, 64},
                                           .value_widths = true,
                                           .layers = true,
                                           .blocks = {32, 64, 96},
                                           .most_keys = 300,
                                           .most_queries = 300,
                                           .precision = Precision::f32},
                                          most ? most_each : 1));
}

INSTANTIATE_TEST_SUITE_P(Paths, EndToEnd, testing::ValuesIn(f32_paths()), [](const auto& test) { return test.param; });

TEST(EndToEndOnTheGpusPlans, DecisionsAreTheReferences) {
  const ForcedPath none("");  // products in f32, whatever the environment forces
  std::vector<RandomPlan> plans = plans_for_cuda();
  for (RandomPlan& plan : plans)
    for (Options& head : plan.heads) head.precision = Precision::f32;
  expect_reference_decisions(plans);
}

}  // namespace
}  // namespace pbsattn::test
