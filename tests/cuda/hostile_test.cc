// Values that break careless softmax, sorting and selection, on the GPU.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "cuda/device_run.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
const double nan = std::nan("");

// 600 tokens: segments at 0 and 256, and the rest from 512.
Problem make() {
  return Problem({.shape = {.q_heads = 2, .kv_heads = 1, .q_len = 600, .kv_len = 600, .head_dim = 64},
                  .q = DType::bf16,
                  .k = DType::bf16,
                  .v = DType::bf16,
                  .out = DType::bf16});
}

void set_row(Tensor& tensor, std::int64_t token, double value) {
  for (std::int64_t h = 0; h < tensor.heads; ++h)
    for (std::int64_t d = 0; d < tensor.head_dim; ++d) tensor.set(0, h, token, d, value);
}

void expect_right_under_all(const std::function<void(Problem&)>& change) {
  for (const char* name : {"full", "pbs", "pbs-unpermuted"}) {
    SCOPED_TRACE(name);
    Problem problem = make();
    change(problem);
    Options options = method(name);
    options.top_p = 0.7F;
    expect_right(problem, run_on_device(options, problem), Precision::bf16);
  }
}

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

TEST(CudaHostile, AllZero) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(0);
    p.k.fill(0);
  });
}

TEST(CudaHostile, HugeKeys) {
  expect_right_under_all([](Problem& p) {
    for (const std::int64_t token : {5, 200, 300, 511, 599}) {
      set_row(p.k, token, 0);
      p.k.set(0, 0, token, 0, token % 2 == 0 ? 1e30 : -1e30);
    }
  });
}

TEST(CudaHostile, HugeQueries) {
  expect_right_under_all([](Problem& p) {
    for (const std::int64_t token : {0, 130, 599}) p.q.set(0, 0, token, 1, 1e30);
  });
}

TEST(CudaHostile, MaximumGrowsWithEveryBlock) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(0.5);
    for (std::int64_t token = 0; token < 600; ++token) set_row(p.k, token, 0.25 * static_cast<double>(token / 16));
  });
}

TEST(CudaHostile, MaximumFallsWithEveryBlock) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(-0.5);
    for (std::int64_t token = 0; token < 600; ++token) set_row(p.k, token, 0.25 * static_cast<double>(token / 16));
  });
}

TEST(CudaHostile, MinusInfinityHidesKeys) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(1.0);
    for (std::int64_t token = 100; token < 600; token += 3) set_row(p.k, token, -infinity);
  });
}

TEST(CudaHostile, WholeBlocksOfMinusInfinity) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(1.0);
    for (std::int64_t token = 0; token < 300; ++token) set_row(p.k, token, -infinity);
  });
}

TEST(CudaHostile, AllMinusInfinityGivesZero) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(1.0);
    p.k.fill(-infinity);
  });
}

TEST(CudaHostile, NanKeySpoilsThoseWhoSeeIt) {
  for (const std::int64_t token : {0, 128, 300, 599}) {
    SCOPED_TRACE(token);
    expect_right_under_all([&](Problem& p) { p.k.set(0, 0, token, 7, nan); });
  }
}

TEST(CudaHostile, NanValueSpoilsOneColumn) {
  for (const std::int64_t token : {0, 128, 300, 599}) {
    SCOPED_TRACE(token);
    expect_right_under_all([&](Problem& p) { p.v.set(0, 0, token, 7, nan); });
  }
}

TEST(CudaHostile, NanQuerySpoilsItsOwnOutput) {
  for (const std::int64_t token : {0, 129, 500, 599}) {
    SCOPED_TRACE(token);
    expect_right_under_all([&](Problem& p) { p.q.set(0, 1, token, 0, nan); });
  }
}

TEST(CudaHostile, InfiniteKeySpoilsThoseWhoSeeIt) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(1.0);
    set_row(p.k, 140, infinity);
  });
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
