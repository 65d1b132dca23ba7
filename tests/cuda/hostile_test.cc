// Values that break careless softmax, sorting and selection, on the GPU.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "cuda/device_run.h"
#include "support/hostile.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

const double nan = std::nan("");

// 600 tokens: segments at 0 and 256, and the rest from 512.
constexpr Shape shape{.q_heads = 2, .kv_heads = 1, .q_len = 600, .kv_len = 600, .head_dim = 64};
constexpr int block = 128;

Problem make() {
  return Problem({.shape = shape, .q = DType::bf16, .k = DType::bf16, .v = DType::bf16, .out = DType::bf16});
}

class CudaHostileInputs : public testing::TestWithParam<HostileCase> {};

TEST_P(CudaHostileInputs, DenseAndSparseAgreeWithTheReference) {
  for (const char* name :
       {"full", "pbs", "pbs-unpermuted", "pbs+", "pbs-threshold", "xattention", "oracle", "pbs-sampled"}) {
    SCOPED_TRACE(name);
    Problem problem = make();
    GetParam().change(problem);
    Options options = method(name);
    options.top_p = 0.7F;
    expect_right(problem, run_on_device(options, problem), Precision::bf16);
  }
}

INSTANTIATE_TEST_SUITE_P(Values, CudaHostileInputs, testing::ValuesIn(hostile_cases(shape, block)),
                         [](const auto& test) { return test.param.name; });

TEST(CudaHostile, EqualKeysKeepTheirOrder) {
  Problem problem = make();
  problem.k.fill(0.25);
  const RunResult result = run_on_device(method("pbs"), problem);
  std::vector<std::int32_t> identity(600);
  std::iota(identity.begin(), identity.end(), 0);
  EXPECT_EQ(head_order(result.trace, 0, 600), identity);
  EXPECT_EQ(row_list(result.trace, 0, 4), (std::vector<std::int32_t>{0, 1, 2, 3, 4}));  // .9 takes 4 of 4 quarters
  expect_right(problem, result, Precision::bf16);
  Options half = method("pbs");
  half.top_p = 0.5F;
  EXPECT_EQ(row_list(run_on_device(half, problem).trace, 0, 4), (std::vector<std::int32_t>{0, 1, 4}));
}

TEST(CudaHostile, EverythingNan) {
  for (const Rules rules : {Rules::reference_code, Rules::paper}) {
    Problem problem = make();
    problem.q.fill(nan);
    problem.k.fill(nan);
    problem.v.fill(nan);
    Options options = method("pbs");
    options.rules = rules;
    const RunResult result = run_on_device(options, problem);
    expect_lists(problem, result.options, result.trace, {});
    EXPECT_EQ(row_list(result.trace, 1, 4).size(), rules == Rules::paper ? 5 : 2);
    EXPECT_TRUE(std::isnan(problem.out.get(0, 1, 599, 63)));
  }
}

}  // namespace
}  // namespace pbsattn::test
