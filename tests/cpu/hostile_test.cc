// Values that break careless softmax: ties, infinities, NaN, huge and late maxima.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "cpu/path.h"
#include "support/hostile.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
const double nan = std::nan("");

// 330 tokens of bf16, so that bf16 paths read them exactly: segments at 0, 128 and the rest from 256.
constexpr Shape small_shape{.q_heads = 2, .kv_heads = 1, .q_len = 330, .kv_len = 330, .head_dim = 64};
constexpr int small_block = 64;

Problem make() {
  return Problem({.shape = small_shape, .q = DType::bf16, .k = DType::bf16, .v = DType::bf16});
}

Options small(std::string_view name, float top_p = 0.7F) {
  Options options = method(name);
  options.block = small_block;
  options.segment = 2 * small_block;
  options.top_p = top_p;
  if (options.score == BlockScore::two_step) options.threshold = 0.2F;
  return options;
}

RunResult run_here(const Options& options, Problem& problem) {
  return run(options, problem);
}

class Hostile : public testing::TestWithParam<std::string> {
 private:
  ForcedPath forced_{GetParam()};
};
INSTANTIATE_TEST_SUITE_P(Paths, Hostile, testing::ValuesIn(describe_cpu().paths),
                         [](const auto& test) { return test.param; });

TEST_P(Hostile, DenseAndSparseAgreeWithTheReference) {
  for (const HostileCase& hostile : hostile_cases(small_shape, small_block)) {
    for (const char* name : {"full", "pbs", "pbs-unpermuted", "oracle", "pbs-sampled", "pbs-two-step"}) {
      SCOPED_TRACE(hostile.name + ", " + name);
      Problem problem = make();
      hostile.change(problem);
      expect_right(problem, run(small(name), problem), products_of(GetParam()));
    }
  }
}

TEST_P(Hostile, EqualKeysKeepTheirOrder) {
  expect_equal_keys_keep_their_order(make(), small("pbs"), products_of(GetParam()), run_here);
}

TEST_P(Hostile, AllMinusInfinityGivesZero) {
  Problem problem = make();
  problem.q.fill(1.0);
  problem.k.fill(-infinity);
  run(method("full"), problem);
  const Values values = outputs_of(problem);
  EXPECT_EQ(values.out, std::vector<double>(values.out.size(), 0.0));
  EXPECT_EQ(values.lse, std::vector<double>(values.lse.size(), -infinity));
}

TEST_P(Hostile, SinksGoFromNothingToEverything) {
  for (const char* name : {"full", "pbs"})
    for (const auto& [first, second] : {std::pair{-infinity, 1e30}, {60.0, -1e30}, {nan, infinity}, {0.0, -200.0}}) {
      SCOPED_TRACE(testing::Message() << name << ", " << first << " and " << second);
      Problem problem = make();
      problem.sinks = {static_cast<float>(first), static_cast<float>(second)};
      expect_right(problem, run(small(name), problem), products_of(GetParam()));
      problem.k.fill(-infinity);  // then the sink is all that there is
      problem.q.fill(1.0);
      expect_right(problem, run(small(name), problem), products_of(GetParam()));
    }
}

TEST_P(Hostile, Windows) {
  for (const HostileCase& hostile : hostile_cases(small_shape, small_block))
    for (const int window : {5, 64, 150}) {
      SCOPED_TRACE(testing::Message() << hostile.name << ", " << window);
      Problem problem = make();
      hostile.change(problem);
      Options options = small("pbs");
      options.window = window;
      const RunResult result = run(options, problem);
      expect_right(problem, result, products_of(result.path));
    }
}

// A value that isn't finite spoils those who see it, and nobody outside of the window.
TEST_P(Hostile, NoValueBehindTheWindowSpoils) {
  for (const double value : {infinity, nan})
    for (const int window : {5, 64, 150}) {
      Problem problem = make();
      problem.v.set(0, 0, 100, 7, value);
      Options options = small("full");
      options.window = window;
      run(options, problem);
      for (std::int64_t token = 0; token < 330; ++token)
        for (std::int64_t d = 0; d < 64; ++d)
          ASSERT_EQ(std::isfinite(problem.out.get(0, 1, token, d)), d != 7 || token < 100 || token >= 100 + window)
              << "window " << window << ", token " << token << ", " << d;
    }
}

TEST_P(Hostile, CappedLogits) {
  for (const HostileCase& hostile : hostile_cases(small_shape, small_block))
    for (const char* name : {"full", "pbs"}) {
      SCOPED_TRACE(hostile.name + ", " + name);
      Problem problem = make();
      hostile.change(problem);
      Options options = small(name);
      options.softcap = 5;
      const RunResult result = run(options, problem);
      expect_right(problem, result, products_of(result.path));
    }
}

// Values of weight zero in float32 multiply infinity too, so whether a column becomes inf or NaN depends on
// rounding; it must not stay finite, and nobody else may be spoiled.
TEST_P(Hostile, InfiniteValueSpoilsOneColumn) {
  Problem problem = make();
  problem.v.set(0, 0, 160, 7, infinity);
  run(method("full"), problem);
  for (const std::int64_t h : {0, 1})
    for (std::int64_t token = 0; token < 330; ++token)
      for (std::int64_t d = 0; d < 64; ++d)
        ASSERT_EQ(std::isfinite(problem.out.get(0, h, token, d)), token < 160 || d != 7) << token << ", " << d;
}

// float16's own infinities, NaN, subnormals and overflow, which not every processor converts by itself.
TEST_P(Hostile, EdgesOfFloat16) {
  for (const double edge : {-infinity, infinity, nan, 0x1p-24, -0x1.8p-15, 65504.0}) {
    SCOPED_TRACE(edge);
    Problem problem({.shape = {.q_heads = 1, .kv_heads = 1, .q_len = 300, .kv_len = 300, .head_dim = 64},
                     .q = DType::f16,
                     .k = DType::f16,
                     .v = DType::f16,
                     .out = DType::f16});
    problem.q.fill(0.125);
    problem.k.set(0, 0, 130, 5, edge);
    problem.v.set(0, 0, 20, 7, std::isfinite(edge) ? edge : 1.0);
    const RunResult result = run(method("pbs"), problem);
    expect_right(problem, result, products_of(GetParam()));
  }
  // A softmax over one key gives its value back, to the bit.
  Problem single({.shape = {.q_len = 1, .kv_len = 1, .head_dim = 8}, .v = DType::f16, .out = DType::f16});
  const std::vector<double> values{0x1p-24, -0x1p-24, 0x1.8p-15, 65504.0, -65504.0, 0.0, 0x1p-14, 1.0};
  for (std::int64_t d = 0; d < 8; ++d) single.v.set(0, 0, 0, d, values[d]);
  if (products_of(GetParam()) == DType::bf16) return;  // rounds 65504, and its products flush subnormals
  run(method("full"), single);
  EXPECT_EQ(outputs_of(single).out, values);
}

TEST_P(Hostile, EverythingNan) {
  expect_nan_goes_by_the_rules(make(), small("pbs"), run_here);
}

}  // namespace
}  // namespace pbsattn::test
