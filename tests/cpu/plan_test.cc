// What a CPU plan promises around its numbers: the same bits always, bounded memory, and what it refuses.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstring>
#include <fstream>
#include <limits>
#include <thread>

#include "cpu/path.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

Problem make(DType dtype = DType::f32) {
  return Problem({.shape = {.batch = 2, .q_heads = 6, .kv_heads = 2, .q_len = 500, .kv_len = 700, .head_dim = 64},
                  .q = dtype,
                  .k = dtype,
                  .v = dtype});
}

// Bits of everything that a run gives.
struct Bits {
  std::vector<std::byte> out;
  std::vector<std::byte> lse;
  std::vector<std::int32_t> order, block;
  bool operator==(const Bits&) const = default;
};

Bits bits_of(const Options& options, const RunOptions& how, DType dtype = DType::f32) {
  Problem problem = make(dtype);
  const RunResult result = run(options, problem, how);
  std::vector<std::byte> lse(problem.lse.size() * sizeof(float));
  std::memcpy(lse.data(), problem.lse.data(), lse.size());
  return {problem.out.bytes(), lse, result.trace.order, result.trace.block};
}

class SameBits : public testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(DTypes, SameBits, testing::Values(DType::f32, DType::bf16),
                         [](const auto& test) { return test.param == DType::f32 ? "f32" : "bf16"; });

TEST_P(SameBits, WhateverTheThreadCount) {
  const Bits one = bits_of(method("pbs"), {.device = Device::cpu(1)}, GetParam());
  for (const int threads : {2, 3, 7})
    EXPECT_TRUE(bits_of(method("pbs"), {.device = Device::cpu(threads)}, GetParam()) == one) << threads << " threads";
}

TEST_P(SameBits, RunAfterRun) {
  Problem problem = make(GetParam());
  const Plan plan = Plan::create(method("pbs"), problem.shape, Device::cpu(2));
  std::vector<std::byte> workspace(plan.workspace_size());
  plan.run(problem.inputs(), problem.outputs(), workspace);
  const auto first = problem.out.bytes();
  const auto first_lse = problem.lse;
  for (int repeat = 0; repeat < 3; ++repeat) {
    std::ranges::fill(workspace, static_cast<std::byte>(0x55 * repeat));
    plan.run(problem.inputs(), problem.outputs(), workspace);
    EXPECT_EQ(problem.out.bytes(), first);
    EXPECT_EQ(problem.lse, first_lse);
  }
}

TEST_P(SameBits, WhateverTheAlignmentOfTheWorkspace) {
  const Bits aligned = bits_of(method("pbs"), {.misalign = 0}, GetParam());
  for (const std::size_t misalign : {1, 2, 31, 63})
    EXPECT_TRUE(bits_of(method("pbs"), {.misalign = misalign}, GetParam()) == aligned) << misalign;
}

TEST_P(SameBits, WithTwoRunsOfOnePlanAtOnce) {
  Problem a = make(GetParam());
  Problem b = make(GetParam());
  const Plan plan = Plan::create(method("pbs"), a.shape, Device::cpu(2));
  const auto run_plan = [&](Problem& problem) {
    std::vector<std::byte> workspace(plan.workspace_size());
    for (int repeat = 0; repeat < 3; ++repeat) plan.run(problem.inputs(), problem.outputs(), workspace);
  };
  std::thread other([&] { run_plan(b); });
  run_plan(a);
  other.join();
  EXPECT_EQ(a.out.bytes(), b.out.bytes());
  run_plan(b);
  EXPECT_EQ(a.out.bytes(), b.out.bytes());
}

TEST_P(SameBits, UnderAnyCapThatSuffices) {
  Options shared = method("pbs");
  shared.order_scope = OrderScope::kv_head;
  for (const Options& options : {method("pbs"), shared, method("full")}) {
    const Bits uncapped = bits_of(options, {}, GetParam());
    const std::size_t size = Plan::create(options, make().shape, Device::cpu(2)).workspace_size();
    int accepted = 0;
    for (const std::size_t percent : {99, 60, 50, 40, 30, 20, 15, 10, 5}) {
      const std::size_t cap = size / 100 * percent;
      try {
        EXPECT_TRUE(bits_of(options, {.cap = cap}, GetParam()) == uncapped) << "cap of " << percent << " %";
        ++accepted;
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::out_of_memory);
      }
    }
    EXPECT_GE(accepted, 1);
  }
}

// Sanitizers reserve address space of their own, which a limit would take from them.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST(CpuPlan, RunsOnTheThreadsThereAreWhereNoMoreCanBeMade) {
  Problem problem = make();
  const Bits one = bits_of(method("pbs"), {.device = Device::cpu(1)});
  const Plan plan = Plan::create(method("pbs"), problem.shape, Device::cpu(64));
  std::vector<std::byte> workspace(plan.workspace_size());
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_AS, &before), 0);
  std::int64_t pages = 0;
  ASSERT_TRUE(std::ifstream("/proc/self/statm") >> pages);
  // Room for small things, but for no 57 stacks of 8 MiB.
  const rlimit tight{static_cast<rlim_t>(pages) * 4096 + (rlim_t{32} << 20), before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_AS, &tight), 0);
  plan.run(problem.inputs(), problem.outputs(), workspace);
  ASSERT_EQ(setrlimit(RLIMIT_AS, &before), 0);
  EXPECT_EQ(problem.out.bytes(), one.out);
}
#endif

// With automatic precision a run's inputs decide on its path, and paths keep different things in the workspace: those
// of bf16 a copy of permuted keys for each query head.
TEST(CpuPlan, WorkspaceServesInputsOfAnyDType) {
  const ForcedPath none("");  // the inputs choose, whatever the environment forces
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Problem problem({.shape = {.q_heads = 8, .kv_heads = 1, .q_len = 128, .kv_len = 1024, .head_dim = 256},
                     .q = dtype,
                     .k = dtype,
                     .v = dtype});
    const RunResult result = run(method("pbs"), problem, {.device = Device::cpu(1)});
    expect_right(problem, result, dtype == DType::bf16 ? DType::bf16 : DType::f32);
  }
}

TEST(CpuPlan, OutputWithoutLogSumExpStatsOrTrace) {
  Problem with = make();
  Problem without = make();
  const Plan plan = Plan::create(method("pbs"), with.shape, Device::cpu(2));
  std::vector<std::byte> workspace(plan.workspace_size());
  plan.run(with.inputs(), with.outputs(), workspace);
  plan.run(without.inputs(), {.out = without.out.view()}, workspace);
  EXPECT_EQ(with.out.bytes(), without.out.bytes());
}

TEST(CpuPlan, PrecisionChoosesThePath) {
  const DeviceInfo device = describe_cpu();
  for (const Precision precision : {Precision::automatic, Precision::f32, Precision::bf16}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Options options = method("pbs");
      options.precision = precision;
      Problem problem({.shape = {.q_heads = 2, .kv_heads = 1, .q_len = 600, .kv_len = 600, .head_dim = 64},
                       .q = dtype,
                       .k = dtype,
                       .v = dtype});
      const bool bf16 = precision == Precision::bf16 || (precision == Precision::automatic && dtype == DType::bf16);
      expect_right(problem, run(options, problem), products_of(bf16 ? device.bf16_path : device.f32_path));
    }
  }
}

TEST(CpuPlan, NamesItsPathAndRefusesOthers) {
  const DeviceInfo device = describe_cpu();
  const Shape shape{.q_len = 8, .kv_len = 8, .head_dim = 64};
  EXPECT_EQ(Plan::create(method("full"), shape).path(), device.f32_path);
  const ForcedPath forced("mmx");
  try {
    Plan::create(method("full"), shape);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_NE(std::string(error.what()).find("mmx"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find(device.paths.front()), std::string::npos) << error.what();
  }
}

TEST(CpuPlan, AMillionTokensPlanUnderACap) {
  const Shape shape{.q_heads = 32, .kv_heads = 8, .q_len = 1 << 20, .kv_len = 1 << 20, .head_dim = 128};
  const std::size_t cap = std::size_t{4} << 30;
  const Plan plan = Plan::create(method("pbs"), shape, Device::cpu(2), cap);
  EXPECT_LE(plan.workspace_size(), cap);
}

// The memory of a method doesn't grow with the square of the length, but for a bit a pair of blocks and head.
TEST(CpuPlan, NoMethodTakesMoreThanABitAPair) {
  for (const MethodInfo& info : methods()) {
    const auto bytes = [&](std::int64_t tokens, int threads) {
      const Shape shape{.q_heads = 1, .kv_heads = 1, .q_len = tokens, .kv_len = tokens, .head_dim = 64};
      return static_cast<double>(Plan::create(info.options, shape, Device::cpu(threads)).workspace_size());
    };
    constexpr std::int64_t million = 1'000'000;
    constexpr double mask = 6.0 * million / 128 * 6 * million / 128 / 8;
    EXPECT_LT(bytes(6 * million, 16) - mask, 6.5 * bytes(million, 16)) << info.name;
    // A thread's own: by tokens, not by their square.
    EXPECT_LT(bytes(6 * million, 2) - bytes(6 * million, 1), 20.0 * 6 * million) << info.name;
  }
}

// At the limits of what validation accepts sizes either fit or are refused; nothing wraps around.
TEST(CpuPlan, NumbersAtTheirLimits) {
  constexpr int most = std::numeric_limits<int>::max();
  for (const MethodInfo& info : methods()) {
    Options options = info.options;
    options.top_k = options.vertical = options.slash = options.min_budget = most;
    options.dense_last_rows = options.sink_blocks = options.local_blocks = most;
    Problem problem({.shape = {.q_heads = 2, .kv_heads = 1, .q_len = 300, .kv_len = 700, .head_dim = 8}});
    for (const int segment : {options.segment, 1 << 30}) {
      options.segment = segment;
      const RunResult result = run(options, problem, {.device = Device::cpu(2)});
      EXPECT_EQ(result.stats.visited_blocks, result.stats.causal_blocks) << info.name;
      EXPECT_LT(result.workspace_size, std::size_t{8} << 20) << info.name;
    }
    const std::int64_t heads = 1 << 16;
    const std::int64_t tokens = 1 << 30;
    options.block = options.segment = 32;
    const Shape large{.q_heads = heads, .kv_heads = heads, .q_len = tokens, .kv_len = tokens, .head_dim = 256};
    for (const int threads : {1, 8192}) {
      const double least = static_cast<double>(tokens) * 256 * 2 * 2;  // of one head's keys and values in bf16
      const auto size = static_cast<double>(Plan::create(options, large, Device::cpu(threads)).workspace_size());
      EXPECT_GT(size, least) << info.name;
      EXPECT_LT(size, 1e18) << info.name;
    }
  }
}

TEST(Plan, HeadsKeepByTheirOwnRules) {
  // What each head lists is what a plan of its options lists for all heads, on both backends, whatever the passes.
  const Shape shape{.q_heads = 4, .kv_heads = 2, .q_len = 600, .kv_len = 600, .head_dim = 64};
  std::vector<Options> heads(4, method("pbs"));
  heads[0].keep = KeepRule::all;
  heads[1].top_p = 0.4F;
  heads[2].keep = KeepRule::none;
  heads[2].local_blocks = 2;
  heads[3].keep = KeepRule::top_k;
  heads[3].top_k = 1;
  heads[3].dense_last_rows = 1;
  for (const Device& device : {Device::reference(), Device::cpu(2)}) {
    Problem problem({.shape = shape});
    const auto trace_of = [&](const Plan& plan) {
      std::vector<std::byte> workspace(plan.workspace_size());
      Trace trace;
      plan.run(problem.inputs(), {.out = problem.out.view()}, workspace, nullptr, &trace);
      return trace;
    };
    const Trace mixed = trace_of(Plan::create(heads, shape, device));
    const std::int64_t rows = mixed.rows;
    for (std::int64_t h = 0; h < 4; ++h) {
      const Trace alike = trace_of(Plan::create(heads[h], shape, device));
      for (std::int64_t row = 0; row < rows; ++row) EXPECT_EQ(row_list(mixed, h, row), row_list(alike, h, row)) << h;
    }
  }
}

}  // namespace
}  // namespace pbsattn::test
