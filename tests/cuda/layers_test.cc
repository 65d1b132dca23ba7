// What layers of models carry beside keys and values, on the GPU against the reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/device_run.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

ProblemSpec with_sinks(ProblemSpec problem) {
  problem.sinks = true;
  return problem;
}

std::string label_of(std::string name) {
  std::ranges::replace_if(
      name, [](char c) { return c == '-' || c == '+'; }, '_');
  return name;
}

// Every score, with numbers that leave blocks out of short sequences.
Options short_method(const char* name) {
  Options options = method(name);
  options.top_p = 0.6F;
  options.threshold = options.keep == KeepRule::relative ? 0.5F : 0.1F;
  options.dense_last_rows = std::min(options.dense_last_rows, 1);
  options.local_blocks = std::min(options.local_blocks, 1);
  options.sink_blocks = 0;
  options.vertical = 10;
  options.slash = 110;
  options.min_budget = 1;
  return options;
}

constexpr const char* method_names[] = {"full",      "pbs",          "pbs-unpermuted", "pbs+",       "pbs-threshold",
                                        "oracle",    "pbs-sampled",  "xattention",     "mean-pool",  "prism",
                                        "streaming", "flashprefill", "minference",     "flexprefill"};

std::vector<MethodCase> sinks() {
  std::vector<MethodCase> cases;
  for (const char* name : method_names)
    cases.push_back({label_of(name), with_sinks(alike(shape_of(900, 1100))), short_method(name)});
  for (const std::int64_t dim : {64, 128})
    for (const auto& [type, dtype] : {std::pair{"f16", DType::f16}, {"bf16", DType::bf16}})
      cases.push_back({type + std::string("_dim") + std::to_string(dim),
                       with_sinks(alike(shape_of(300, 700, dim, 6, 2, 2), dtype)), pbs()});
  cases.push_back({"one_query", with_sinks(alike(shape_of(1, 777))), pbs()});
  Options corrected = pbs(0.5F);
  corrected.correction = Correction::mean;
  cases.push_back({"corrected", with_sinks(alike(shape_of(900, 1100, 128))), corrected});
  return cases;
}

class CudaLayers : public testing::TestWithParam<MethodCase> {};

TEST_P(CudaLayers, AgreesWithTheReference) {
  Problem problem(GetParam().problem);
  const RunResult result = run_on_device(GetParam().options, problem);
  expect_right(problem, result, GetParam().problem.q);
}

const auto name_of = [](const auto& test) { return test.param.name; };
INSTANTIATE_TEST_SUITE_P(Sinks, CudaLayers, testing::ValuesIn(sinks()), name_of);

// A sink far above every logit takes all weight, one of -inf none, and one that is no number spoils its head.
TEST(CudaSinks, AtTheirEnds) {
  for (const Correction correction : {Correction::none, Correction::mean})
    for (const float end : {-infinity, -1e30F, 1e6F, 2e38F, infinity, std::nanf("")}) {
      SCOPED_TRACE(end);
      Options options = pbs(0.5F);
      options.correction = correction;
      Problem problem(alike(shape_of(400, 700)));
      run_on_device(options, problem);
      const Values without = outputs_of(problem);
      problem.sinks = {-infinity, end};
      expect_right(problem, run_on_device(options, problem), DType::bf16);
      const Values with = outputs_of(problem);
      const std::size_t same = end == -infinity ? 2 : 1;  // heads
      for (std::size_t i = 0; i < with.out.size() / 2 * same; ++i) ASSERT_EQ(with.out[i], without.out[i]);
      for (std::size_t i = 0; i < with.lse.size() / 2 * same; ++i) ASSERT_EQ(with.lse[i], without.lse[i]);
    }
}

// Each pass finds the sinks of its own heads.
TEST(CudaSinks, CapsGiveTheSameBits) {
  for (const OrderScope scope : {OrderScope::query_head, OrderScope::kv_head}) {
    Options options = pbs(0.7F);
    options.order_scope = scope;
    const ProblemSpec spec = with_sinks(alike(shape_of(500, 900, 64, 6, 2, 2)));
    Problem problem(spec);
    const RunResult all = run_on_device(options, problem);
    for (const std::size_t parts : {2, 4}) {
      Problem again(spec);
      run_on_device(options, again, {.cap = all.workspace_size / parts + 16'384});
      EXPECT_EQ(again.out.bytes(), problem.out.bytes());
      EXPECT_EQ(again.lse, problem.lse);
    }
  }
}

}  // namespace
}  // namespace pbsattn::test
