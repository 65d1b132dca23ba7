// Values that break careless softmax: ties, infinities, NaN, huge and late maxima.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "cpu/path.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
const double nan = std::nan("");

class Hostile : public testing::TestWithParam<std::string> {
 protected:
  Hostile() : forced_(GetParam()) {}

  // 330 tokens of bf16, so that bf16 paths read them exactly: segments at 0, 128 and the rest from 256.
  static Problem make() {
    return Problem({.shape = {.q_heads = 2, .kv_heads = 1, .q_len = 330, .kv_len = 330, .head_dim = 64},
                    .q = DType::bf16,
                    .k = DType::bf16,
                    .v = DType::bf16});
  }
  static void set_row(Tensor& tensor, std::int64_t token, double value) {
    for (std::int64_t h = 0; h < tensor.heads; ++h)
      for (std::int64_t d = 0; d < tensor.head_dim; ++d) tensor.set(0, h, token, d, value);
  }
  static Options small(std::string_view name, float top_p = 0.7F) {
    Options options = method(name);
    options.block = 64;
    options.segment = 128;
    options.top_p = top_p;
    return options;
  }
  // Runs dense and sparse and compares each with the reference.
  static void expect_right_under_all(const std::function<void(Problem&)>& change) {
    for (const char* name : {"full", "pbs", "pbs-unpermuted"}) {
      SCOPED_TRACE(name);
      Problem problem = make();
      change(problem);
      expect_right(problem, run(small(name), problem), products_of(GetParam()));
    }
  }

 private:
  ForcedPath forced_;
};

INSTANTIATE_TEST_SUITE_P(Paths, Hostile, testing::ValuesIn(describe_cpu().paths),
                         [](const auto& test) { return test.param; });

TEST_P(Hostile, EqualKeysKeepTheirOrder) {
  Problem problem = make();
  problem.k.fill(0.25);
  EXPECT_EQ(row_list(run(small("pbs", 0.5F), problem).trace, 0, 4), (std::vector<std::int32_t>{0, 1, 4}));
  const RunResult result = run(small("pbs", 0.9F), problem);
  std::vector<std::int32_t> identity(330);
  std::iota(identity.begin(), identity.end(), 0);
  EXPECT_EQ(head_order(result.trace, 0, 330), identity);
  EXPECT_EQ(row_list(result.trace, 0, 4), (std::vector<std::int32_t>{0, 1, 2, 3, 4}));  // .9 takes 4 of 4 quarters
  expect_right(problem, result, products_of(GetParam()));
}

TEST_P(Hostile, AllZero) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(0);
    p.k.fill(0);
  });
}

TEST_P(Hostile, HugeKeys) {
  expect_right_under_all([](Problem& p) {
    for (const std::int64_t token : {5, 100, 160, 255, 329}) {
      set_row(p.k, token, 0);
      p.k.set(0, 0, token, 0, token % 2 == 0 ? 1e30 : -1e30);
    }
  });
}

TEST_P(Hostile, HugeQueries) {
  expect_right_under_all([](Problem& p) {
    for (const std::int64_t token : {0, 70, 329}) p.q.set(0, 0, token, 1, 1e30);
  });
}

TEST_P(Hostile, HugeAndTinyValues) {
  expect_right_under_all([](Problem& p) {
    for (std::int64_t token = 0; token < 330; ++token) p.v.set(0, 0, token, 3, token % 3 == 0 ? 1e30 : 1e-30);
  });
}

TEST_P(Hostile, MaximumGrowsWithEveryBlock) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(0.5);
    for (std::int64_t token = 0; token < 330; ++token) {
      const std::int64_t step = token / 8;
      set_row(p.k, token, 0.25 * static_cast<double>(step));
    }
  });
}

TEST_P(Hostile, MaximumFallsWithEveryBlock) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(-0.5);
    for (std::int64_t token = 0; token < 330; ++token) {
      const std::int64_t step = token / 8;
      set_row(p.k, token, 0.25 * static_cast<double>(step));
    }
  });
}

TEST_P(Hostile, MinusInfinityHidesKeys) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(1.0);
    for (std::int64_t token = 50; token < 330; token += 3) set_row(p.k, token, -infinity);
  });
}

TEST_P(Hostile, WholeBlocksOfMinusInfinity) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(1.0);
    for (std::int64_t token = 0; token < 160; ++token) set_row(p.k, token, -infinity);
  });
}

TEST_P(Hostile, AllMinusInfinityGivesZero) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(1.0);
    p.k.fill(-infinity);
  });
  Problem problem = make();
  problem.q.fill(1.0);
  problem.k.fill(-infinity);
  run(method("full"), problem);
  const Values values = outputs_of(problem);
  EXPECT_EQ(values.out, std::vector<double>(values.out.size(), 0.0));
  EXPECT_EQ(values.lse, std::vector<double>(values.lse.size(), -infinity));
}

// One scoring query without any finite score leaves no order to speak of, whatever the others say.
TEST_P(Hostile, AScoringQueryOfMinusInfinity) {
  expect_right_under_all([](Problem& p) {
    p.k.fill(1.0);
    set_row(p.q, 300, -infinity);
  });
}

TEST_P(Hostile, NanKeySpoilsThoseWhoSeeIt) {
  for (const std::int64_t token : {0, 63, 64, 160, 290, 329}) {
    SCOPED_TRACE(token);
    expect_right_under_all([&](Problem& p) { p.k.set(0, 0, token, 7, nan); });
  }
}

TEST_P(Hostile, NanValueSpoilsOneColumn) {
  for (const std::int64_t token : {0, 63, 64, 160, 290, 329}) {
    SCOPED_TRACE(token);
    expect_right_under_all([&](Problem& p) { p.v.set(0, 0, token, 7, nan); });
  }
}

TEST_P(Hostile, NanQuerySpoilsItsOwnOutput) {
  for (const std::int64_t token : {0, 70, 160, 280, 329}) {
    SCOPED_TRACE(token);
    expect_right_under_all([&](Problem& p) { p.q.set(0, 1, token, 0, nan); });
  }
}

TEST_P(Hostile, InfiniteKeySpoilsThoseWhoSeeIt) {
  expect_right_under_all([](Problem& p) {
    p.q.fill(1.0);
    set_row(p.k, 75, infinity);
  });
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
  if (products_of(GetParam()) == Precision::bf16) return;  // rounds 65504, and its products flush subnormals
  run(method("full"), single);
  EXPECT_EQ(outputs_of(single).out, values);
}

TEST_P(Hostile, EverythingNan) {
  for (const Rules rules : {Rules::reference_code, Rules::paper}) {
    Problem problem = make();
    problem.q.fill(nan);
    problem.k.fill(nan);
    problem.v.fill(nan);
    Options options = small("pbs");
    options.rules = rules;
    const RunResult result = run(options, problem);
    expect_lists(problem, result.options, result.trace, {});
    EXPECT_EQ(row_list(result.trace, 1, 4).size(), rules == Rules::paper ? 5 : 2);
    EXPECT_TRUE(std::isnan(problem.out.get(0, 1, 329, 63)));
  }
}

}  // namespace
}  // namespace pbsattn::test
