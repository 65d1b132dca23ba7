// What layers of models carry beside keys and values, on the GPU against the reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <ranges>

#include "cuda/device_run.h"
#include "support/hostile.h"
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

constexpr const char* method_names[] = {"full",          "pbs",         "pbs-unpermuted", "pbs+",
                                        "pbs-threshold", "oracle",      "pbs-sampled",    "xattention",
                                        "mean-pool",     "prism",       "streaming",      "flashprefill",
                                        "minference",    "flexprefill", "two-step",       "pbs-two-step"};

std::vector<MethodCase> sinks() {
  std::vector<MethodCase> cases;
  for (const char* name : method_names)
    cases.push_back({label_of(name), with_sinks(alike(shape_of(900, 1100))), short_method(name)});
  for (const cuda::Widths widths : cuda::widths)
    for (const auto& [type, dtype] : {std::pair{"f16", DType::f16}, {"bf16", DType::bf16}})
      cases.push_back({type + std::string("_dim") + name_of(widths),
                       with_sinks(alike(with_widths(shape_of(300, 700, 0, 6, 2, 2), widths), dtype)), pbs()});
  cases.push_back({"one_query", with_sinks(alike(shape_of(1, 777))), pbs()});
  Options corrected = pbs(0.5F);
  corrected.correction = Correction::mean;
  cases.push_back({"corrected", with_sinks(alike(shape_of(900, 1100, 128))), corrected});
  return cases;
}

// Smaller than a block, than a segment, and larger; around whole blocks, where the edge lies in one block or in two.
// All of a method's choices are without effect, unless the window hides nothing.
std::vector<MethodCase> windows() {
  const auto windowed = [](int window) {
    Options options = pbs(0.5F);
    options.window = window;
    options.correction = Correction::mean;
    options.sink_blocks = 2;
    return options;
  };
  std::vector<MethodCase> cases;
  for (const int window : {1, 2, 63, 64, 65, 127, 128, 129, 130, 191, 255, 256, 257, 300, 384, 640, 1099, 1100, 4096})
    for (const std::int64_t q_len : {1, 130, 300, 1100})
      cases.push_back({"of" + std::to_string(window) + "_chunk" + std::to_string(q_len),
                       alike(shape_of(q_len, 1100, q_len == 130 ? 128 : 64)), windowed(window)});
  cases.push_back({"of4096", alike(shape_of(300, 9000, 128)), windowed(4096)});
  for (const int window : {100, 200, 512})
    for (const cuda::Widths widths : cuda::widths)
      cases.push_back(
          {"heads_f16_of" + std::to_string(window) + "_dim" + name_of(widths),
           with_sinks(alike(with_widths(shape_of(500, 900, 0, 6, 2, 2), widths), DType::f16, TensorLayout::bshd)),
           windowed(window)});
  // More tiles than processors, so that slots of tiles are used again.
  for (const int window : {50, 128, 700})
    cases.push_back({"many_tiles_of" + std::to_string(window), with_sinks(alike(shape_of(2048, 2048, 64, 12, 2))),
                     windowed(window)});
  return cases;
}

// A cap in every score, in orders and corrections: far below most logits, amid them, and far above.
std::vector<MethodCase> caps() {
  std::vector<MethodCase> cases;
  const auto add = [&](const std::string& name, const ProblemSpec& problem, Options options, float softcap) {
    options.softcap = softcap;
    cases.push_back({name + "_of" + std::to_string(static_cast<int>(10 * softcap)), problem, options});
  };
  const auto change = [](Options options, auto&& how) {
    how(options);
    return options;
  };
  for (const char* name : method_names)
    for (const float softcap : {0.5F, 6.0F, 1000.0F})
      add(label_of(name), alike(shape_of(900, 1100)), short_method(name), softcap);
  for (const std::int64_t dim : {64, 128})
    for (const auto& [type, dtype] : {std::pair{"f16", DType::f16}, {"bf16", DType::bf16}}) {
      const ProblemSpec problem = with_sinks(alike(shape_of(300, 700, dim, 6, 2, 2), dtype, TensorLayout::bshd));
      const std::string label = type + std::string("_dim") + std::to_string(dim);
      for (const char* name :
           {"pbs", "pbs+", "pbs-sampled", "mean-pool", "prism", "flashprefill", "minference", "pbs-two-step"})
        add(label_of(name) + "_" + label, problem, short_method(name), 5);
      add("per_query_" + label, problem, change(pbs(), [](Options& o) { o.score = BlockScore::per_query; }), 5);
    }
  for (const int segment : {128, 512})
    add("segment" + std::to_string(segment), alike(shape_of(900, 1100)),
        change(pbs(), [&](Options& o) { o.segment = segment; }), 5);
  add("shared_order", alike(shape_of(300, 1100, 64, 6, 2, 2)),
      change(pbs(), [](Options& o) { o.order_scope = OrderScope::kv_head; }), 5);
  add("corrected", with_sinks(alike(shape_of(900, 1100, 128))),
      change(pbs(0.4F), [](Options& o) { o.correction = Correction::mean; }), 5);
  for (const float tau : {0.0F, 1.0F})  // by masses, and by pooling
    add("flexible_tau" + std::to_string(static_cast<int>(tau)), alike(shape_of(900, 1100)),
        change(short_method("flexprefill"), [&](Options& o) { o.tau = tau; }), 5);
  for (const int window : {100, 300})
    add("window" + std::to_string(window), with_sinks(alike(shape_of(900, 1100, 128))),
        change(method("full"), [&](Options& o) { o.window = window; }), 5);
  add("scaled", alike(shape_of(900, 1100)), change(pbs(), [](Options& o) { o.scale = 0.4F; }), 5);
  return cases;
}

class CudaLayers : public testing::TestWithParam<MethodCase> {};

TEST_P(CudaLayers, AgreesWithTheReference) {
  Problem problem(GetParam().problem);
  const RunResult result = run_on_device(GetParam().options, problem);
  expect_right(problem, result, GetParam().problem.q);
}

const auto case_name = [](const auto& test) { return test.param.name; };
INSTANTIATE_TEST_SUITE_P(Sinks, CudaLayers, testing::ValuesIn(sinks()), case_name);
INSTANTIATE_TEST_SUITE_P(Caps, CudaLayers, testing::ValuesIn(caps()), case_name);
INSTANTIATE_TEST_SUITE_P(Windows, CudaLayers, testing::ValuesIn(windows()), case_name);

constexpr Shape hostile_shape{.q_heads = 2, .kv_heads = 1, .q_len = 600, .kv_len = 600, .head_dim = 64};

// Under a cap even infinite products have logits.
class CudaHostileCaps : public testing::TestWithParam<HostileCase> {};

TEST_P(CudaHostileCaps, AgreeWithTheReference) {
  for (const char* name :
       {"full", "pbs", "pbs-threshold", "pbs-sampled", "xattention", "mean-pool", "flashprefill", "pbs-two-step"}) {
    SCOPED_TRACE(name);
    Problem problem(with_sinks(alike(hostile_shape)));
    GetParam().change(problem);
    Options options = short_method(name);
    options.softcap = 4;
    const RunResult result = run_on_device(options, problem);
    const Tolerance tolerance = tolerance_for(problem, DType::bf16);
    expect_order(problem, result.options, result.trace, tolerance);
    expect_lists(problem, result.options, result.trace, tolerance);
    // Where many logits are the cap, their weights are rounded alike, by 2^-8 at most.
    const Values ours = outputs_of(problem);
    const Values truth = attend_exact(problem, result.options, result.trace);
    for (std::size_t i = 0; i < truth.out.size(); ++i)
      ASSERT_EQ(std::isnan(ours.out[i]), std::isnan(truth.out[i])) << "out at " << i;
    for (std::size_t i = 0; i < truth.lse.size(); ++i)
      ASSERT_EQ(std::isnan(ours.lse[i]), std::isnan(truth.lse[i])) << "log-sum-exp at " << i;
    EXPECT_LT(distance(ours.lse, truth.lse).largest, 0x1.1p-8);
    const auto finite = [](double x) { return std::isfinite(x) ? std::abs(x) : 0.0; };
    EXPECT_LE(distance(ours.out, truth.out).largest,
              0.02 * std::ranges::max(truth.out | std::views::transform(finite)));
  }
}

// Infinite values that a query weighs are infinite outputs by the definition, and NaN by the interface.
std::vector<HostileCase> hostile_under_a_cap() {
  std::vector<HostileCase> cases = hostile_cases(hostile_shape, 128);
  std::erase_if(cases, [](const HostileCase& c) { return c.name.ends_with("values_that_are_not_finite"); });
  return cases;
}

// Values that are no numbers spoil who sees them, and nobody else.
class CudaHostileWindows : public testing::TestWithParam<HostileCase> {};

TEST_P(CudaHostileWindows, AgreeWithTheReference) {
  for (const int window : {1, 40, 128, 150, 300})
    for (const cuda::Widths widths : cuda::widths) {
      SCOPED_TRACE(name_of(widths) + ", window " + std::to_string(window));
      Problem problem(with_sinks(alike(with_widths(hostile_shape, widths))));
      GetParam().change(problem);
      Options options = method("full");
      options.window = window;
      expect_right(problem, run_on_device(options, problem), DType::bf16);
    }
}

INSTANTIATE_TEST_SUITE_P(Values, CudaHostileCaps, testing::ValuesIn(hostile_under_a_cap()), case_name);
INSTANTIATE_TEST_SUITE_P(Values, CudaHostileWindows, testing::ValuesIn(hostile_cases(hostile_shape, 128)), case_name);

TEST(CudaWindows, BadValuesAtEachPlaceOfABlock) {
  const Shape shape{.q_heads = 1, .q_len = 520, .kv_len = 520, .head_dim = 64};
  for (const int window : {30, 128, 200}) {
    SCOPED_TRACE(window);
    Problem problem(alike(shape));
    for (std::int64_t token = 0; token < shape.kv_len; ++token) {
      const std::int64_t column = token * 7 % 61;
      if (token % 3 == 0) problem.v.set(0, 0, token, column, std::nan(""));
    }
    Options options = method("full");
    options.window = window;
    expect_right(problem, run_on_device(options, problem), DType::bf16);
  }
}

// A window's plan says so, takes no more than dense attention's, and lists its blocks.
TEST(CudaWindows, AreAllThatTheirPlanComputes) {
  const Shape shape{.q_heads = 2, .q_len = 1000, .kv_len = 1000, .head_dim = 64};
  Options options = pbs(0.5F);
  options.window = 200;
  const Plan plan = Plan::create(options, shape, Device::cuda());
  EXPECT_EQ(plan.path(), "sm90_dense");
  EXPECT_EQ(plan.workspace_size(), Plan::create(method("full"), shape, Device::cuda()).workspace_size());
  Problem problem(alike(shape));
  const RunResult result = run_on_device(options, problem);
  EXPECT_EQ(result.options.keep, KeepRule::all);
  EXPECT_EQ(row_list(result.trace, 1, 1), (std::vector<std::int32_t>{0, 1}));
  EXPECT_EQ(row_list(result.trace, 1, 7), (std::vector<std::int32_t>{5, 6, 7}));  // token 896 sees 697 .. 896
  EXPECT_EQ(result.stats.visited_blocks, 2 * (1 + 2 + 6 * 3));
}

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
