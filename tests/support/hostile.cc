#include "support/hostile.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

namespace pbsattn::test {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
const double nan = std::nan("");

// About the largest number of a tensor's type, and a very small one.
double huge(const Tensor& tensor) {
  return tensor.dtype == DType::f16 ? 6e4 : 1e30;
}
double tiny(const Tensor& tensor) {
  return tensor.dtype == DType::f16 ? 0x1p-24 : 1e-30;
}

// Scores in whole numbers of steps, so that a backend's rounding of weights doesn't grow with them.
void stairs(Problem& p, double query) {
  p.q.fill(query);
  constexpr std::int64_t step = 16;
  for (std::int64_t token = 0; token < p.shape.kv_len; ++token)
    set_row(p.k, token, 0.25 * static_cast<double>(token / step));
}

}  // namespace

void set_row(Tensor& tensor, std::int64_t token, double value) {
  for (std::int64_t h = 0; h < tensor.heads; ++h)
    for (std::int64_t d = 0; d < tensor.head_dim; ++d) tensor.set(0, h, token, d, value);
}

std::vector<HostileCase> hostile_cases(const Shape& shape, int block) {
  const std::int64_t n = shape.kv_len;
  const std::int64_t last = n - 1;
  std::vector<HostileCase> cases{
      {"all_zero",
       [](Problem& p) {
         p.q.fill(0);
         p.k.fill(0);
       }},
      {"huge_keys",
       [=](Problem& p) {
         for (const std::int64_t token : {std::int64_t{5}, n / 3, n / 2, 3 * n / 4, last}) {
           set_row(p.k, token, 0);
           p.k.set(0, 0, token, 0, token % 2 == 0 ? huge(p.k) : -huge(p.k));
         }
       }},
      {"huge_queries",
       [=](Problem& p) {
         for (const std::int64_t token : {std::int64_t{0}, std::int64_t{block} + 2, last})
           p.q.set(0, 0, token, 1, huge(p.q));
       }},
      {"huge_and_tiny_values",
       [=](Problem& p) {
         for (std::int64_t token = 0; token < n; ++token)
           p.v.set(0, 0, token, 3, token % 3 == 0 ? huge(p.v) : tiny(p.v));
       }},
      {"maximum_grows_with_every_block", [](Problem& p) { stairs(p, 0.5); }},
      {"maximum_falls_with_every_block", [](Problem& p) { stairs(p, -0.5); }},
      {"minus_infinity_hides_keys",
       [=](Problem& p) {
         p.q.fill(1.0);
         for (std::int64_t token = block - 14; token < n; token += 3) set_row(p.k, token, -infinity);
       }},
      {"whole_blocks_of_minus_infinity",
       [=](Problem& p) {
         p.q.fill(1.0);
         for (std::int64_t token = 0; token < 2 * block + block / 2; ++token) set_row(p.k, token, -infinity);
       }},
      {"all_minus_infinity",
       [](Problem& p) {
         p.q.fill(1.0);
         p.k.fill(-infinity);
       }},
      // Nobody weighs anything, and still who sees a value that is no number has none.
      {"all_minus_infinity_with_values_that_are_not_finite",
       [=](Problem& p) {
         p.q.fill(1.0);
         p.k.fill(-infinity);
         p.v.set(0, 0, block + 12, 7, nan);
         p.v.set(0, 0, n / 2, 9, infinity);
         p.v.set(0, 0, last, 11, -infinity);
       }},
      // One scoring query without any finite score leaves no order to speak of, whatever the others say.
      {"a_scoring_query_of_minus_infinity",
       [=](Problem& p) {
         p.k.fill(1.0);
         set_row(p.q, n - 30, -infinity);
       }},
      {"infinite_key",
       [=](Problem& p) {
         p.q.fill(1.0);
         set_row(p.k, block + 12, infinity);
       }},
  };
  const std::int64_t tokens[] = {0, block - 1, block, 5 * block / 2, n - 40, last};
  for (const std::int64_t token : tokens) {
    const std::string at = "_at_" + std::to_string(token);
    cases.push_back({"nan_key" + at, [=](Problem& p) { p.k.set(0, 0, token, 7, nan); }});
    cases.push_back({"nan_value" + at, [=](Problem& p) { p.v.set(0, 0, token, 7, nan); }});
    cases.push_back({"nan_query" + at, [=](Problem& p) { p.q.set(0, 1, token, 0, nan); }});
  }
  return cases;
}

void expect_equal_keys_keep_their_order(Problem problem, Options pbs, DType products, const Runner& run) {
  const std::int64_t n = problem.shape.kv_len;
  problem.k.fill(0.25);
  pbs.top_p = 0.5F;
  EXPECT_EQ(row_list(run(pbs, problem).trace, 0, 4), (std::vector<std::int32_t>{0, 1, 4}));
  pbs.top_p = 0.9F;
  const RunResult result = run(pbs, problem);
  std::vector<std::int32_t> identity(n);
  std::iota(identity.begin(), identity.end(), 0);
  EXPECT_EQ(head_order(result.trace, 0, n), identity);
  EXPECT_EQ(row_list(result.trace, 0, 4), (std::vector<std::int32_t>{0, 1, 2, 3, 4}));  // .9 takes 4 of 4 quarters
  expect_right(problem, result, products);
}

void expect_nan_goes_by_the_rules(Problem problem, Options pbs, const Runner& run) {
  for (const Rules rules : {Rules::reference_code, Rules::paper}) {
    problem.q.fill(nan);
    problem.k.fill(nan);
    problem.v.fill(nan);
    pbs.rules = rules;
    const RunResult result = run(pbs, problem);
    expect_lists(problem, result.options, result.trace, {});
    EXPECT_EQ(row_list(result.trace, 1, 4).size(), rules == Rules::paper ? 5 : 2);
    EXPECT_TRUE(std::isnan(problem.out.get(0, 1, problem.shape.q_len - 1, problem.shape.head_dim - 1)));
  }
}

}  // namespace pbsattn::test
