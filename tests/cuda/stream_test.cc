// Runs between kernels of others in a stream: each must wait for those before it, though it may start before they end.
#include <gtest/gtest.h>

#include "cuda/device_run.h"

namespace pbsattn::test {
namespace {

struct Call {
  std::string name;
  Options options;
  std::int64_t q_heads = 8;
  cuda::Widths widths = cuda::widths[0];
  bool sinks = false;

  ProblemSpec spec(std::uint64_t seed) const {
    const Shape shape =
        with_widths({.batch = 4, .q_heads = q_heads, .kv_heads = 8, .q_len = 384, .kv_len = 384}, widths);
    ProblemSpec spec = alike(shape, DType::bf16, TensorLayout::bhsd, seed);
    spec.sinks = sinks;
    return spec;
  }
};

void PrintTo(const Call& call, std::ostream* stream) {
  *stream << call.name;
}

// Tiles dealt out in turns, and so many that a counter does.
std::vector<Call> calls() {
  const Options full = method("full");
  Options window = full;
  window.window = 100;
  std::vector<Call> all;
  for (const auto& [label, q_heads] : {std::pair{"few", 8}, {"counted", 48}})
    for (const cuda::Widths widths : cuda::widths) {
      const std::string name = label + ("_dim" + name_of(widths));
      all.push_back({name + "_full", full, q_heads, widths});
      all.push_back({name + "_sinks", full, q_heads, widths, true});
      all.push_back({name + "_window", window, q_heads, widths});
    }
  for (const char* name : {"pbs", "mean-pool", "xattention", "streaming", "pbs-two-step"}) {
    Options options = method(name);
    options.top_p = 0.5F;
    std::string label = name;
    std::erase(label, '-');
    all.push_back({label, options});
  }
  return all;
}

class CudaStreams : public testing::TestWithParam<Call> {};

TEST_P(CudaStreams, RunsWaitForWhoeverWritesTheirInputs) {
  Problem wanted(GetParam().spec(1));
  run_on_device(GetParam().options, wanted);

  Problem problem(GetParam().spec(1));
  const DeviceProblem source(problem);
  DeviceProblem device(problem);
  const Plan plan = Plan::create(GetParam().options, problem.shape, Device::cuda());
  const DeviceMemory workspace(plan.workspace_size());
  for (int run = 0; run < 5; ++run) {
    device.poison_inputs();
    device.poison_outputs();
    device.copy_inputs_slowly(source, nullptr);
    plan.run(device.inputs(), device.outputs(), {workspace.data(), workspace.size()});
    expect_success(cudaDeviceSynchronize());
    device.download_outputs(problem);
    ASSERT_EQ(problem.out.bytes(), wanted.out.bytes()) << "run " << run;
    ASSERT_EQ(problem.lse, wanted.lse) << "run " << run;
  }
}

TEST_P(CudaStreams, RunsWaitForWhoeverReadsTheirOutputs) {
  Problem first(GetParam().spec(1));
  run_on_device(GetParam().options, first);
  Problem second(GetParam().spec(2));
  run_on_device(GetParam().options, second);

  Problem problem(GetParam().spec(1));
  const DeviceProblem device(problem);
  const DeviceProblem other{Problem(GetParam().spec(2))};
  const Plan plan = Plan::create(GetParam().options, problem.shape, Device::cuda());
  const DeviceMemory workspace(plan.workspace_size());
  const std::span<std::byte> memory(workspace.data(), workspace.size());
  const DeviceMemory copy(device.output_bytes());
  for (int run = 0; run < 5; ++run) {
    plan.run(device.inputs(), device.outputs(), memory);
    device.copy_output_slowly(copy, nullptr);
    plan.run(other.inputs(), device.outputs(), memory);
    expect_success(cudaDeviceSynchronize());
    std::vector<std::byte> read(copy.size());
    copy.download(read.data());
    ASSERT_EQ(read, first.out.bytes()) << "run " << run;
    device.download_outputs(problem);
    ASSERT_EQ(problem.out.bytes(), second.out.bytes()) << "run " << run;
  }
}

INSTANTIATE_TEST_SUITE_P(Calls, CudaStreams, testing::ValuesIn(calls()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace pbsattn::test
