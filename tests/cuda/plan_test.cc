// The host side of the CUDA backend: what it refuses, caps, streams, graphs, determinism.
#include <gtest/gtest.h>

#include <array>
#include <memory>

#include "cuda/attend/parts.h"
#include "cuda/device_run.h"
#include "pbsattn/options.hpp"
#include "support/judge.h"
#include "support/refusal.h"

namespace pbsattn::test {
namespace {

constexpr Shape small{.batch = 2, .q_heads = 6, .kv_heads = 2, .q_len = 500, .kv_len = 900, .head_dim = 64};

// Every kind of launch: keys in an order, scores of means in scratch, a correction.
std::vector<Options> kinds() {
  Options prism = method("prism");
  prism.top_p = 0.7F;
  Options corrected = method("flashprefill");
  corrected.dense_last_rows = 0;
  corrected.threshold = 0.5F;
  corrected.local_blocks = 1;
  Options permuted = pbs(0.7F);
  permuted.score = BlockScore::energy;
  permuted.correction = Correction::mean;
  Options two_step = method("pbs-two-step");
  two_step.threshold = 0.2F;
  return {pbs(0.7F), prism, corrected, permuted, two_step};
}

class OwnedStream {
 public:
  OwnedStream() { expect_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  ~OwnedStream() { cudaStreamDestroy(stream); }
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;
  cudaStream_t stream = nullptr;
};

// A plan, and all that a run of it takes.
struct SmallRun {
  const Plan plan = Plan::create(pbs(0.7F), small, Device::cuda());
  Problem problem{alike(small)};
  const DeviceProblem device{problem};
  const DeviceMemory workspace{plan.workspace_size()};
  const std::span<std::byte> memory{workspace.data(), workspace.size()};
};

TEST(CudaPlan, RefusesWhatItCannotDo) {
  const auto create = [](const Options& options, Shape shape) {
    return refusal_of([&] { Plan::create(options, shape, Device::cuda()); }, ErrorCode::unsupported);
  };
  Shape wide = small;
  wide.head_dim = 100;
  EXPECT_NE(create(pbs(0.7F), wide).find("head_dim 100"), std::string::npos);
  Options options = pbs(0.7F);
  options.block = 64;
  EXPECT_NE(create(options, small).find("block 64"), std::string::npos);
  options = pbs(0.7F);
  options.precision = Precision::f32;
  EXPECT_NE(create(options, small).find("precision f32"), std::string::npos);
  Shape narrow = small;
  narrow.head_dim_v = 32;
  EXPECT_NE(create(pbs(0.7F), narrow).find("head_dim_v 32"), std::string::npos);
  Shape square = small;
  square.head_dim = 192;
  EXPECT_NE(create(pbs(0.7F), square).find("head_dim_v 192: the CUDA backend takes 128 beside"), std::string::npos);
  Shape capped = small;
  capped.head_dim = 256;
  options = pbs(0.7F);
  options.softcap = 30;
  EXPECT_NE(create(options, capped).find("softcap 30: the CUDA backend takes 0 at a head_dim of 256"),
            std::string::npos);
  options = pbs(0.7F);
  options.segment = 16'384;
  EXPECT_NE(create(options, small).find("segment 16384"), std::string::npos);
  Shape many = small;
  many.batch = 20'000;
  EXPECT_NE(create(pbs(0.7F), many).find("split the batch"), std::string::npos);
  Shape endless = small;
  endless.q_len = endless.kv_len = 7'000'000;
  EXPECT_NE(create(pbs(0.7F), endless).find("kv_len 7000000"), std::string::npos);
  endless.q_len = endless.kv_len = 4'000'000;
  EXPECT_NE(create(method("prism"), endless).find("block score dual_band"), std::string::npos);
  refusal_of([] { Plan::create(pbs(0.7F), small, Device::cuda(4096)); }, ErrorCode::unsupported);
  refusal_of([] { Plan::create(pbs(0.7F), small, Device::cuda(-1)); }, ErrorCode::unsupported);
  refusal_of([] { Plan::create(pbs(0.7F), small, Device::cuda(), 1000); }, ErrorCode::out_of_memory);
}

// Dense where so few rows could save blocks that permuting costs more; sparse once there are many.
TEST(CudaPlan, AutoIsDenseWhereItIsShort) {
  Shape shape{.batch = 1, .q_heads = 32, .kv_heads = 8, .q_len = 4096, .kv_len = 4096, .head_dim = 128};
  const Plan dense = Plan::create(method("auto"), shape, Device::cuda());
  EXPECT_EQ(dense.path(), "sm90_dense");
  EXPECT_EQ(dense.options().keep, KeepRule::all);
  shape.q_len = shape.kv_len = 32'768;
  const Plan sparse = Plan::create(method("auto"), shape, Device::cuda());
  EXPECT_EQ(sparse.path(), "sm90");
  EXPECT_EQ(sparse.options().keep, KeepRule::threshold);
  const auto path = [&](const char* text, std::int64_t tokens) {
    shape.q_len = shape.kv_len = tokens;
    return Plan::create(parse_method(text), shape, Device::cuda()).path();
  };
  // The pages tell these lengths.
  constexpr const char* learned = "auto:permutation=learned:order_scope=kv_head";
  struct Longest {
    cuda::Widths widths;
    std::int64_t unordered, ordered;
  };
  for (const auto& [widths, unordered, ordered] : {Longest{{64, 64}, 13'696, 15'104},
                                                   {{96, 96}, 12'288, 13'696},
                                                   {{192, 128}, 10'624, 12'160},
                                                   {{256, 256}, 8320, 9856},
                                                   {{128, 128}, 10'112, 11'648}}) {
    SCOPED_TRACE(name_of(widths));
    shape = with_widths(shape, widths);
    EXPECT_EQ(path("auto", unordered), "sm90_dense");
    EXPECT_EQ(path("auto", unordered + 1), "sm90");
    EXPECT_EQ(path(learned, ordered), "sm90_dense");
    EXPECT_EQ(path(learned, ordered + 1), "sm90");
  }
  Options known = method("auto");
  known.expected_density = 0.4F;
  shape.q_len = shape.kv_len = 8192;
  EXPECT_EQ(Plan::create(known, shape, Device::cuda()).path(), "sm90");
}

TEST(CudaPlan, RefusesBadBuffers) {
  SmallRun run;
  auto& [plan, problem, device, workspace, memory] = run;

  Inputs inputs = device.inputs();
  inputs.k = problem.inputs().k;
  EXPECT_NE(
      refusal_of([&] { plan.run(inputs, device.outputs(), memory); }, ErrorCode::invalid_argument).find("k: not in"),
      std::string::npos);
  inputs = device.inputs();
  inputs.v.data = static_cast<const std::byte*>(inputs.v.data) + 2;
  refusal_of([&] { plan.run(inputs, device.outputs(), memory); }, ErrorCode::unsupported);
  inputs = device.inputs();
  inputs.v.data = nullptr;
  refusal_of([&] { plan.run(inputs, device.outputs(), memory); }, ErrorCode::invalid_argument);
  inputs = device.inputs();
  inputs.q.token_stride -= 1;
  refusal_of([&] { plan.run(inputs, device.outputs(), memory); }, ErrorCode::unsupported);
  inputs = device.inputs();
  inputs.q.dtype = DType::f32;
  refusal_of([&] { plan.run(inputs, device.outputs(), memory); }, ErrorCode::unsupported);
  inputs = device.inputs();
  inputs.k.dtype = DType::f16;
  refusal_of([&] { plan.run(inputs, device.outputs(), memory); }, ErrorCode::unsupported);
  inputs = device.inputs();
  const std::vector<float> sinks(static_cast<std::size_t>(problem.shape.q_heads));
  inputs.sinks = sinks;
  EXPECT_NE(refusal_of([&] { plan.run(inputs, device.outputs(), memory); }, ErrorCode::invalid_argument)
                .find("sinks: not in"),
            std::string::npos);
  inputs.sinks = {reinterpret_cast<const float*>(memory.data()), sinks.size() - 1};
  EXPECT_NE(refusal_of([&] { plan.run(inputs, device.outputs(), memory); }, ErrorCode::invalid_argument)
                .find("sinks of 5 heads"),
            std::string::npos);
  Outputs outputs = device.outputs();
  outputs.lse = problem.lse.data();
  refusal_of([&] { plan.run(device.inputs(), outputs, memory); }, ErrorCode::invalid_argument);
  outputs = device.outputs();
  outputs.lse = reinterpret_cast<float*>(reinterpret_cast<std::byte*>(outputs.lse) + 1);
  refusal_of([&] { plan.run(device.inputs(), outputs, memory); }, ErrorCode::invalid_argument);
  outputs = device.outputs();
  outputs.out.data = const_cast<void*>(device.inputs().q.data);
  EXPECT_NE(refusal_of([&] { plan.run(device.inputs(), outputs, memory); }, ErrorCode::invalid_argument).find("over q"),
            std::string::npos);
  outputs.out = device.outputs().out;
  outputs.lse = reinterpret_cast<float*>(memory.data());
  EXPECT_NE(
      refusal_of([&] { plan.run(device.inputs(), outputs, memory); }, ErrorCode::invalid_argument).find("lse: at"),
      std::string::npos);
  refusal_of([&] { plan.run(device.inputs(), device.outputs(), memory.subspan(1)); }, ErrorCode::out_of_memory);
  std::vector<std::byte> host(plan.workspace_size());
  refusal_of([&] { plan.run(device.inputs(), device.outputs(), host); }, ErrorCode::invalid_argument);
  plan.run(device.inputs(), device.outputs(), memory);
  expect_success(cudaDeviceSynchronize());
}

TEST(CudaPlan, ReportsEarlierErrors) {
  SmallRun run;
  auto& [plan, problem, device, workspace, memory] = run;
  ASSERT_NE(cudaSetDevice(4096), cudaSuccess);
  const std::string message =
      refusal_of([&] { plan.run(device.inputs(), device.outputs(), memory); }, ErrorCode::internal);
  EXPECT_NE(message.find("before this run"), std::string::npos);
  EXPECT_NE(cudaGetLastError(), cudaSuccess) << "the error stays with its owner";
  plan.run(device.inputs(), device.outputs(), memory);
  expect_success(cudaDeviceSynchronize());
}

// Whoever asks the run-time library for errors after a call of its own isn't to find ours.
TEST(CudaPlan, TakesItsErrorsBack) {
  SmallRun run;
  auto& [plan, problem, device, workspace, memory] = run;
  const OwnedStream on;
  expect_success(cudaStreamBeginCapture(on.stream, cudaStreamCaptureModeGlobal));
  Stats stats;  // would wait, which a capture can't
  refusal_of([&] { plan.run(device.inputs(), device.outputs(), memory, Stream{on.stream}, &stats); },
             ErrorCode::internal);
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  cudaGraph_t graph = nullptr;
  EXPECT_NE(cudaStreamEndCapture(on.stream, &graph), cudaSuccess);
  EXPECT_NE(cudaGetLastError(), cudaSuccess) << "that is the caller's own";
  plan.run(device.inputs(), device.outputs(), memory, Stream{on.stream});
  expect_success(cudaStreamSynchronize(on.stream));
}

TEST(CudaPlan, CapsGiveTheSameBits) {
  for (const OrderScope scope : {OrderScope::query_head, OrderScope::kv_head}) {
    Options options = pbs(0.7F);
    options.order_scope = scope;
    Problem problem(alike(small));
    const RunResult all = run_on_device(options, problem);
    const std::vector<std::byte> wanted = problem.out.bytes();
    expect_right(problem, all, DType::bf16);
    for (const std::size_t parts : {2, 4, 6, 12}) {
      if (scope == OrderScope::kv_head && parts > 4) continue;
      SCOPED_TRACE(parts);
      Problem again(alike(small));
      const RunResult capped = run_on_device(options, again, {.cap = all.workspace_size / parts + 16'384});
      EXPECT_EQ(again.out.bytes(), wanted);
      EXPECT_EQ(again.lse, problem.lse);
      EXPECT_EQ(capped.trace.order, all.trace.order);
      EXPECT_EQ(capped.trace.row_start, all.trace.row_start);
      EXPECT_EQ(capped.trace.block, all.trace.block);
      EXPECT_EQ(capped.stats.visited_blocks, all.stats.visited_blocks);
    }
  }
}

TEST(CudaPlan, CapsGiveTheSameBitsOfEveryKind) {
  for (const cuda::Widths widths : cuda::widths)
    for (const Options& options : kinds()) {
      SCOPED_TRACE(name_of(widths) + ", score " + std::to_string(static_cast<int>(options.score)));
      const ProblemSpec spec = alike(with_widths(small, widths));
      Problem problem(spec);
      const RunResult all = run_on_device(options, problem);
      Problem again(spec);
      const RunResult capped = run_on_device(options, again, {.cap = all.workspace_size * 3 / 4});
      EXPECT_EQ(again.out.bytes(), problem.out.bytes());
      EXPECT_EQ(again.lse, problem.lse);
      EXPECT_EQ(capped.trace.block, all.trace.block);
    }
}

// A chunk's dense last row is cut by the whole call's shape, and so the same way in every pass.
TEST(CudaPlan, CapsGiveTheSameBitsOfRowsInParts) {
  const Shape chunk = shape_of(300, 8300, 64, 4, 2);
  Options options = pbs(0.7F);
  options.dense_last_rows = 1;
  const cuda::RowParts parts = cuda::row_parts(geometry_of(resolved(options, chunk), chunk), options.dense_last_rows);
  EXPECT_EQ(parts.rows, 1);
  EXPECT_EQ(parts.each, 2);
  Problem problem(alike(chunk));
  const RunResult all = run_on_device(options, problem);
  expect_right(problem, all, DType::bf16);
  for (const std::size_t passes : {2, 4}) {
    SCOPED_TRACE(passes);
    Problem again(alike(chunk));
    run_on_device(options, again, {.cap = all.workspace_size / passes + 65'536});
    EXPECT_EQ(again.out.bytes(), problem.out.bytes());
    EXPECT_EQ(again.lse, problem.lse);
  }
}

// Calls are cut where their last rows would be at work long after all others.
TEST(RowParts, AreForCallsThatAreShortBesideTheirKeys) {
  const auto parts = [](Shape shape, std::int64_t dense_rows, Options options = pbs()) {
    const cuda::RowParts cut = cuda::row_parts(geometry_of(resolved(options, shape), shape), dense_rows);
    return std::pair(cut.rows, cut.each);
  };
  const std::pair whole(0, 1);
  EXPECT_EQ(parts(shape_of(8192, 131'072, 128, 12, 2), 1), std::pair(1, 2));
  EXPECT_EQ(parts(shape_of(2048, 131'072, 128, 12, 2), 1), std::pair(1, 6));
  EXPECT_EQ(parts(shape_of(512, 131'072, 128, 12, 2), 2), std::pair(2, 22));
  EXPECT_EQ(parts(shape_of(512, 16'384, 128, 12, 2), 1), std::pair(1, 4)) << "of 32 blocks at least";
  EXPECT_EQ(parts(shape_of(512, 4096, 128, 12, 2), 1), whole) << "too short";
  EXPECT_EQ(parts(shape_of(8192, 131'072, 128, 32, 8), 1), whole) << "others take longer";
  EXPECT_EQ(parts(shape_of(131'072, 131'072, 128, 32, 8), 1), whole);
  EXPECT_EQ(parts(shape_of(2048, 131'072, 128, 12, 2), 0), whole) << "no dense row";
  EXPECT_EQ(parts(shape_of(2048, 131'072, 256, 12, 2), 1), whole) << "outputs from registers";
  Options windowed = pbs();
  windowed.window = 4096;
  EXPECT_EQ(parts(shape_of(2048, 131'072, 128, 12, 2), 1, windowed), whole);
}

// A correction merges by log-sum-exps, which then are the plan's own.
TEST(CudaPlan, CorrectsWhereNobodyAsksForLogSumExps) {
  for (const Options& options : kinds()) {
    Problem problem(alike(small));
    run_on_device(options, problem);
    DeviceProblem device(problem);
    device.poison_outputs();
    const Plan plan = Plan::create(options, small, Device::cuda());
    const DeviceMemory workspace(plan.workspace_size());
    Outputs outputs = device.outputs();
    outputs.lse = nullptr;
    plan.run(device.inputs(), outputs, {workspace.data(), workspace.size()});
    expect_success(cudaDeviceSynchronize());
    Problem without(alike(small));
    device.download_outputs(without);
    EXPECT_EQ(without.out.bytes(), problem.out.bytes());
  }
}

TEST(CudaPlan, AnyWorkspaceAlignment) {
  for (const std::size_t misalign : {0, 1, 16, 255}) {
    Problem problem(alike(small));
    expect_right(problem, run_on_device(pbs(0.7F), problem, {.misalign = misalign}), DType::bf16);
  }
}

TEST(CudaPlan, LongSequencesPlanUnderACap) {
  const Shape million{.batch = 1, .q_heads = 32, .kv_heads = 8, .q_len = 1 << 20, .kv_len = 1 << 20, .head_dim = 128};
  constexpr std::size_t gib = std::size_t{1} << 30;
  EXPECT_LE(Plan::create(pbs(0.7F), million, Device::cuda(), gib).workspace_size(), gib);
  Shape eighth = million;
  eighth.q_len = eighth.kv_len = 1 << 17;
  EXPECT_LE(Plan::create(pbs(0.7F), eighth, Device::cuda()).workspace_size(), gib * 5 / 2);
  EXPECT_LE(Plan::create(pbs(0.7F), eighth, Device::cuda(), gib / 2).workspace_size(), gib / 2);
}

class CudaWidths : public testing::TestWithParam<cuda::Widths> {};
INSTANTIATE_TEST_SUITE_P(Widths, CudaWidths, testing::ValuesIn(cuda::widths),
                         [](const auto& test) { return "dim" + name_of(test.param); });

TEST_P(CudaWidths, TwentyRunsGiveTheSameBits) {
  Problem problem(alike(with_widths({.q_heads = 8, .kv_heads = 2, .q_len = 3000, .kv_len = 3000}, GetParam())));
  DeviceProblem device(problem);
  const Plan plan = Plan::create(pbs(0.7F), problem.shape, Device::cuda());
  DeviceMemory workspace(plan.workspace_size());
  std::vector<std::byte> first;
  std::vector<float> first_lse;
  for (int i = 0; i < 20; ++i) {
    device.poison_outputs();
    workspace.poison();
    plan.run(device.inputs(), device.outputs(), {workspace.data(), workspace.size()});
    expect_success(cudaDeviceSynchronize());
    device.download_outputs(problem);
    if (i == 0) {
      first = problem.out.bytes();
      first_lse = problem.lse;
    }
    ASSERT_EQ(problem.out.bytes(), first) << "run " << i;
    ASSERT_EQ(problem.lse, first_lse) << "run " << i;
  }
}

TEST(CudaPlan, GraphReplaysWithNewContents) {
  for (const Options& options : kinds()) {
    Problem problem(alike(small));
    DeviceProblem device(problem);
    const Plan plan = Plan::create(options, small, Device::cuda());
    const DeviceMemory workspace(plan.workspace_size());
    const OwnedStream on;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    expect_success(cudaStreamBeginCapture(on.stream, cudaStreamCaptureModeGlobal));
    plan.run(device.inputs(), device.outputs(), {workspace.data(), workspace.size()}, Stream{on.stream});
    expect_success(cudaStreamEndCapture(on.stream, &graph));
    expect_success(cudaGraphInstantiate(&executable, graph, 0));
    for (const std::uint64_t seed : {1, 2, 3}) {
      Problem contents(alike(small, DType::bf16, TensorLayout::bhsd, seed));
      device.upload_inputs(contents);
      device.poison_outputs();
      expect_success(cudaGraphLaunch(executable, on.stream));
      expect_success(cudaStreamSynchronize(on.stream));
      device.download_outputs(contents);
      Problem direct(alike(small, DType::bf16, TensorLayout::bhsd, seed));
      run_on_device(options, direct);
      EXPECT_EQ(contents.out.bytes(), direct.out.bytes());
      EXPECT_EQ(contents.lse, direct.lse);
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  }
}

TEST(CudaPlan, TwoStreamsAtOnce) {
  const Plan plan = Plan::create(pbs(0.7F), small, Device::cuda());
  struct Side {
    explicit Side(std::uint64_t seed, std::size_t bytes)
        : problem(alike(small, DType::bf16, TensorLayout::bhsd, seed)), device(problem), workspace(bytes) {}
    Problem problem;
    DeviceProblem device;
    DeviceMemory workspace;
    OwnedStream on;
  };
  std::array<std::unique_ptr<Side>, 2> sides;
  for (std::size_t i = 0; i < sides.size(); ++i) sides[i] = std::make_unique<Side>(i + 1, plan.workspace_size());
  for (int repeat = 0; repeat < 10; ++repeat)
    for (const auto& side : sides)
      plan.run(side->device.inputs(), side->device.outputs(), {side->workspace.data(), side->workspace.size()},
               Stream{side->on.stream});
  expect_success(cudaDeviceSynchronize());
  for (std::size_t i = 0; i < sides.size(); ++i) {
    sides[i]->device.download_outputs(sides[i]->problem);
    Problem alone(alike(small, DType::bf16, TensorLayout::bhsd, i + 1));
    run_on_device(pbs(0.7F), alone);
    EXPECT_EQ(sides[i]->problem.out.bytes(), alone.out.bytes());
  }
}

}  // namespace
}  // namespace pbsattn::test
