// Scores that mark blocks for a whole head, by columns and distances of its last queries, and options by head: the CUDA
// backend against the reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>

#include "cuda/device_run.h"
#include "support/hostile.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

// MInference with few columns and diagonals, because a test's sequence is short.
Options minference(int vertical = 40, int slash = 120) {
  Options options = method("minference");
  options.vertical = vertical;
  options.slash = slash;
  return options;
}

// FlexPrefill by columns and distances (tau 0) or by pooling (1).
Options flexprefill(float tau, float top_p = 0.8F, int min_budget = 1) {
  Options options = method("flexprefill");
  options.tau = tau;
  options.top_p = top_p;
  options.min_budget = min_budget;
  return options;
}

std::vector<MethodCase> patterns() {
  std::vector<MethodCase> cases;
  const auto add = [&](const std::string& what, const ProblemSpec& problem, auto&& change) {
    for (const auto& [name, options] : {std::pair{"minference_", minference()},
                                        {"flexprefill_", flexprefill(0)},
                                        {"flexprefill_pooled_", flexprefill(1)}}) {
      Options changed = options;
      change(changed);
      cases.push_back({name + what, problem, changed});
    }
  };
  const auto nothing = [](Options&) {};
  for (const cuda::Widths widths : cuda::widths) {
    for (const auto& [type, dtype] : {std::pair{"f16", DType::f16}, {"bf16", DType::bf16}})
      add(type + std::string("_dim") + name_of(widths), alike(with_widths(shape_of(700, 700), widths), dtype), nothing);
    // More than one thread block's share of keys, and a share that ends early.
    add("many_keys_dim" + name_of(widths), alike(with_widths(shape_of(70, 2700), widths)), nothing);
  }
  // Neither begins nor ends with a whole block.
  add("chunk", alike(shape_of(301, 1111)), nothing);
  add("chunk_that_ends_a_block", alike(shape_of(200, 768)), nothing);
  // Fewer queries than score.
  for (const std::int64_t q_len : {1, 31, 100})
    add("queries" + std::to_string(q_len), alike(shape_of(q_len, 777)), nothing);
  add("heads", alike(shape_of(300, 600, 128, 6, 2, 2), DType::bf16, TensorLayout::bshd), nothing);
  add("cache", alike(shape_of(300, 600, 64, 4, 2, 2), DType::bf16, TensorLayout::cache), nothing);
  add("segment384", alike(shape_of(900, 1000)), [](Options& o) { o.segment = 384; });
  add("paper", alike(shape_of(500, 700)), [](Options& o) { o.rules = Rules::paper; });
  add("scaled", alike(shape_of(500, 700)), [](Options& o) { o.scale = 0.2F; });
  add("always_kept", alike(shape_of(900, 1000)), [](Options& o) {
    o.dense_last_rows = 1;
    o.sink_blocks = 2;
    o.local_blocks = 2;
  });

  const ProblemSpec problem = alike(shape_of(900, 1100));
  for (const auto& [vertical, slash] :
       {std::pair{0, 0}, {30, 50}, {31, 101}, {300, 100}, {30, 500}, {1099, 50}, {0, 1099}, {2000, 2000}})
    cases.push_back(
        {"minference_" + std::to_string(vertical) + "_" + std::to_string(slash), problem, minference(vertical, slash)});
  for (const float top_p : {0.01F, 0.5F, 0.95F, 0.999F})
    for (const float tau : {0.0F, 0.3F, 1.0F}) {
      const std::string name =
          std::to_string(static_cast<int>(top_p * 1000)) + "_tau" + std::to_string(static_cast<int>(tau * 10));
      cases.push_back({"flexprefill_" + name, problem, flexprefill(tau, top_p)});
    }
  for (const int budget : {0, 129, 700, 1024, 5000})
    cases.push_back({"flexprefill_budget" + std::to_string(budget), problem, flexprefill(0.3F, 0.7F, budget)});
  cases.push_back({"streaming", alike(shape_of(1000, 1500)), method("streaming")});
  return cases;
}

class CudaPattern : public testing::TestWithParam<MethodCase> {};

TEST_P(CudaPattern, AgreesWithTheReference) {
  Problem problem(GetParam().problem);
  const RunResult result = run_on_device(GetParam().options, problem);
  EXPECT_EQ(result.path, "sm90");
  expect_right(problem, result, GetParam().problem.q);
}

INSTANTIATE_TEST_SUITE_P(Methods, CudaPattern, testing::ValuesIn(patterns()),
                         [](const auto& test) { return test.param.name; });

TEST(CudaPatternHostile, AgreesWithTheReference) {
  const Shape small = shape_of(600, 600);
  for (const HostileCase& hostile : hostile_cases(small, 128))
    for (const auto& [name, options] : {std::pair{"minference", minference(30, 100)},
                                        {"flexprefill", flexprefill(0.1F, 0.7F)},
                                        {"flexprefill, pooled", flexprefill(1, 0.7F)}}) {
      SCOPED_TRACE(hostile.name + ", " + name);
      Problem problem(alike(small));
      hostile.change(problem);
      const RunResult result = run_on_device(options, problem);
      expect_lists(problem, result.options, result.trace, tolerance_for(problem, DType::bf16));
    }
}

// Equal masses: the first columns and the shortest distances come first.
TEST(CudaPatternHostile, TiesAreTheFirst) {
  Problem problem(alike(shape_of(1000, 1000)));
  problem.k.fill(0.25);
  for (const Options& options :
       {minference(200, 50), minference(30, 200), flexprefill(0, 0.5F), flexprefill(1, 0.5F)}) {
    const RunResult result = run_on_device(options, problem);
    expect_lists(problem, result.options, result.trace, {});
  }
}

// ------------------------------------------------------------------------------------------------- options by head

std::vector<Options> mixed(const Options& all, std::int64_t q_heads) {
  std::vector<Options> heads(static_cast<std::size_t>(q_heads), all);
  for (std::size_t h = 0; h < heads.size(); ++h) {
    Options& head = heads[h];
    if (all.keep == KeepRule::vertical_slash) {
      head.vertical = 30 + 40 * static_cast<int>(h);
      head.slash = std::max(300 - 30 * static_cast<int>(h), 0);
    } else if (all.keep == KeepRule::coverage) {
      head.tau = h % 2 == 0 ? 0.0F : 1.0F;
      head.top_p = 0.5F + 0.05F * static_cast<float>(h % 8);
    } else {
      head.top_p = 0.3F + 0.1F * static_cast<float>(h % 7);
    }
    if (h % 6 == 1) head.keep = KeepRule::all;
    if (h % 6 == 2) {
      head.keep = KeepRule::none;
      head.sink_blocks = 1;
      head.local_blocks = 2;
    }
    if (h % 6 == 3 && all.keep == KeepRule::top_p) {
      head.keep = KeepRule::top_k;
      head.top_k = 1;
    }
    if (h % 6 == 4) head.dense_last_rows = 2;
  }
  return heads;
}

struct HeadsRun {
  std::vector<std::byte> out;
  Trace trace;
  std::size_t workspace_size = 0;
};

HeadsRun run_by_head(const std::vector<Options>& heads, Problem& problem, std::size_t cap = Plan::no_cap) {
  const Plan plan = Plan::create(heads, problem.shape, Device::cuda(), cap);
  DeviceProblem device(problem);
  const DeviceMemory workspace(plan.workspace_size());
  HeadsRun run{.out = {}, .trace = {}, .workspace_size = plan.workspace_size()};
  plan.run(device.inputs(), device.outputs(), {workspace.data(), workspace.size()}, Stream{}, nullptr, &run.trace);
  expect_success(cudaDeviceSynchronize());
  EXPECT_TRUE(workspace.guards_intact());
  device.download_outputs(problem);
  run.out = problem.out.bytes();
  return run;
}

void expect_same_lists(const Trace& got, const Trace& wanted, std::int64_t flat_head) {
  for (std::int64_t row = 0; row < got.rows; ++row)
    EXPECT_EQ(row_list(got, flat_head, row), row_list(wanted, flat_head, row))
        << "head " << flat_head << ", row " << row;
}

class CudaHeads : public testing::TestWithParam<const char*> {
 protected:
  static std::vector<Options> heads_of(const Shape& shape) {
    Options all = method(GetParam());
    all.min_budget = 1;
    return mixed(all, shape.q_heads);
  }
};

// What a head lists is what a plan of its options lists for all heads.
TEST_P(CudaHeads, KeepByTheirOwnRules) {
  const Shape small = shape_of(650, 700, 64, 6, 2, 2);
  const std::vector<Options> heads = heads_of(small);
  Problem problem(alike(small));
  const HeadsRun together = run_by_head(heads, problem);
  for (std::int64_t h = 0; h < small.q_heads; ++h) {
    const RunResult alone = run_on_device(heads[h], problem);
    for (std::int64_t batch = 0; batch < small.batch; ++batch)
      expect_same_lists(together.trace, alone.trace, batch * small.q_heads + h);
  }
}

// Passes of fewer heads find the rules of theirs.
TEST_P(CudaHeads, CapsGiveTheSameBits) {
  const Shape small = shape_of(650, 700, 64, 6, 2, 2);
  const std::vector<Options> heads = heads_of(small);
  Problem problem(alike(small));
  const HeadsRun whole = run_by_head(heads, problem);
  for (const std::size_t parts : {2, 4, 6, 12}) {
    SCOPED_TRACE(parts);
    const HeadsRun capped = run_by_head(heads, problem, whole.workspace_size / parts + 16'384);
    EXPECT_EQ(capped.out, whole.out);
    EXPECT_EQ(capped.trace.row_start, whole.trace.row_start);
    EXPECT_EQ(capped.trace.block, whole.trace.block);
  }
}

// A captured graph keeps the rules when the plan is gone, and takes new contents.
TEST_P(CudaHeads, GraphOutlivesThePlan) {
  const Shape small = shape_of(500, 600, 64, 6, 2);
  const std::vector<Options> heads = heads_of(small);
  Problem problem(alike(small));
  DeviceProblem device(problem);
  auto plan = std::make_unique<Plan>(Plan::create(heads, small, Device::cuda()));
  DeviceMemory workspace(plan->workspace_size());
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  expect_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  expect_success(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  plan->run(device.inputs(), device.outputs(), {workspace.data(), workspace.size()}, Stream{stream});
  expect_success(cudaStreamEndCapture(stream, &graph));
  expect_success(cudaGraphInstantiate(&executable, graph, 0));
  plan.reset();
  for (const std::uint64_t seed : {1, 2}) {
    Problem contents(alike(small, DType::bf16, TensorLayout::bhsd, seed));
    device.upload_inputs(contents);
    device.poison_outputs();
    workspace.poison();
    expect_success(cudaGraphLaunch(executable, stream));
    expect_success(cudaStreamSynchronize(stream));
    device.download_outputs(contents);
    Problem direct(alike(small, DType::bf16, TensorLayout::bhsd, seed));
    EXPECT_EQ(run_by_head(heads, direct).out, contents.out.bytes());
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

INSTANTIATE_TEST_SUITE_P(Methods, CudaHeads, testing::Values("pbs", "minference", "flexprefill"),
                         [](const auto& test) { return std::string(test.param); });

// More heads than one launch writes the rules of.
TEST(CudaManyHeads, KeepByTheirOwnRules) {
  const Shape many = shape_of(300, 400, 64, 100, 4);
  const std::vector<Options> heads = mixed(minference(), many.q_heads);
  Problem problem(alike(many));
  const HeadsRun together = run_by_head(heads, problem);
  for (const std::size_t h : {std::size_t{0}, std::size_t{47}, std::size_t{48}, std::size_t{99}}) {
    const RunResult alone = run_on_device(heads[h], problem);
    expect_same_lists(together.trace, alone.trace, static_cast<std::int64_t>(h));
  }
}

}  // namespace
}  // namespace pbsattn::test
