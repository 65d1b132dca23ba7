// Keys and values in pages of a cache give the bits that they give where they lie contiguous, whatever stands where no
// token is, and a table that is wrong harms nobody else (tests/cpu/pages_test.cc has the CPU and the reference).
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "cuda/device_cache.h"
#include "cuda/device_run.h"
#include "pbsattn/options.hpp"
#include "support/case.h"
#include "support/judge.h"
#include "support/refusal.h"

namespace pbsattn::test {
namespace {

// Runs a problem whose keys and values are in a cache; without statistics nothing waits in between.
RunResult run_paged(const Options& options, Problem& problem, const CacheLayout& layout,
                    std::size_t cap = Plan::no_cap) {
  const PagedCache cache(problem, layout);
  const DeviceCache device_cache(cache);
  const Plan plan = Plan::create(options, problem.shape, Device::cuda(), cap);
  RunResult result = result_of(plan);
  problem.out.fill(std::nan(""));
  std::ranges::fill(problem.lse, 0.0F);
  DeviceProblem device(problem);
  const DeviceMemory workspace(plan.workspace_size());
  poison_shared_memory();
  plan.run(device_cache.inputs(device.inputs()), device.outputs(), {workspace.data(), workspace.size()}, Stream{},
           &result.stats, &result.trace);
  expect_success(cudaDeviceSynchronize());
  EXPECT_TRUE(workspace.guards_intact());
  device.download_outputs(problem);
  return result;
}

void expect_same(const Options& options, const ProblemSpec& spec, const CacheLayout& layout) {
  SCOPED_TRACE(testing::PrintToString(layout));
  Problem problem(spec);
  const RunResult contiguous = run_on_device(options, problem);
  const auto out = problem.out.bytes();
  const auto lse = problem.lse;
  const auto order = problem.order;
  forget_written(problem);
  const RunResult paged = run_paged(options, problem, layout);
  EXPECT_EQ(paged.trace.order, contiguous.trace.order);
  EXPECT_EQ(paged.trace.row_start, contiguous.trace.row_start);
  EXPECT_EQ(paged.trace.block, contiguous.trace.block);
  EXPECT_EQ(paged.stats.visited_blocks, contiguous.stats.visited_blocks);
  EXPECT_EQ(problem.out.bytes(), out);
  EXPECT_EQ(problem.lse, lse);
  EXPECT_EQ(problem.order, order);
}

constexpr std::array layouts{
    CacheLayout{.page_size = 16, .one_row = true},
    CacheLayout{.page_size = 16, .heads_first = true},
    CacheLayout{.page_size = 48, .heads_first = true, .one_row = true, .gap = 8},  // blocks begin inside pages
    CacheLayout{.page_size = 64, .gap = 24},
    CacheLayout{.page_size = 128, .one_row = true},
    CacheLayout{.page_size = 128, .heads_first = true, .gap = 64},
    CacheLayout{.page_size = 256, .one_row = true},
    CacheLayout{.page_size = 272, .heads_first = true, .one_row = true},  // 16 tokens of a page at a time
    CacheLayout{.page_size = 4096},                                       // more than there are tokens
};

struct PagedMethod {
  std::string name;
  Options options;
};
void PrintTo(const PagedMethod& method, std::ostream* stream) {
  *stream << method.name;
}

// Those that serve prompts, and one of each other kind.
std::vector<PagedMethod> main_methods() {
  Options learned = method("two-step");
  learned.permutation = Permutation::learned;
  learned.order_scope = OrderScope::kv_head;
  Options arrival = learned;
  arrival.permutation = Permutation::arrival;
  return {{"full", method("full")},
          {"two_step", parse_method("two-step:threshold=0.05:dense_last_rows=0")},
          {"pbs", pbs(0.6F)},
          {"learned", learned},
          {"arrival", arrival}};
}

class CudaPages : public testing::TestWithParam<PagedMethod> {};

ProblemSpec spec_of(const Shape& shape, DType dtype = DType::bf16) {
  ProblemSpec spec = alike(shape, dtype);
  spec.order_weights = true;
  spec.kept_segment = 256;
  spec.known = 256;
  return spec;
}

TEST_P(CudaPages, OfEveryLayoutGiveTheBitsOfContiguousKeys) {
  for (const CacheLayout& layout : layouts)
    expect_same(GetParam().options, spec_of(shape_of(400, 1101, 128, 4, 2, 2)), layout);
}

TEST_P(CudaPages, OfEveryWidthAndType) {
  std::size_t i = 0;
  for (const cuda::Widths widths : cuda::widths)
    for (const DType dtype : {DType::bf16, DType::f16}) {
      if (!cuda::takes_pages(widths.keys)) continue;
      SCOPED_TRACE(name_of(widths) + ", dtype " + std::to_string(static_cast<int>(dtype)));
      expect_same(GetParam().options, spec_of(with_widths(shape_of(300, 905, 0, 2, 1), widths), dtype),
                  layouts[i++ % layouts.size()]);
    }
}

// Whole blocks, a token more or less than a page or a block, calls that are chunks and whole prompts.
TEST_P(CudaPages, OfEveryLength) {
  for (const std::int64_t kv_len : {512, 513, 527, 544, 639, 641, 768, 1000})
    for (const std::int64_t q_len : {std::int64_t{1}, std::int64_t{130}, kv_len})
      for (const std::int64_t size : {16, 48, 128}) {
        SCOPED_TRACE(testing::Message() << q_len << " queries of " << kv_len);
        expect_same(GetParam().options, spec_of(shape_of(q_len, kv_len, 64)), {.page_size = size, .one_row = true});
        if (HasFailure()) return;
      }
}

TEST_P(CudaPages, AgreeWithTheReference) {
  for (const std::int64_t size : {16, 128}) {
    Problem problem(spec_of(shape_of(500, 1300, 128, 4, 2, 2)));
    const RunResult result = run_paged(GetParam().options, problem, {.page_size = size, .one_row = true});
    expect_output(problem, result.options, result.trace, DType::bf16);
  }
}

// A pass begins at a batch entry and a head of its own.
TEST_P(CudaPages, CapsGiveTheSameBits) {
  const ProblemSpec spec = spec_of(shape_of(300, 1000, 64, 4, 2, 2));
  Problem problem(spec);
  const RunResult all = run_on_device(GetParam().options, problem);
  Problem again(spec);
  const RunResult capped = run_paged(GetParam().options, again, layouts[2], all.workspace_size / 3 + 65'536);
  EXPECT_EQ(capped.trace.block, all.trace.block);
  EXPECT_EQ(again.out.bytes(), problem.out.bytes());
}

// Entry 0's table names no page of the cache: its results mean nothing, but entry 1's are what they are, and nothing
// faults.
TEST_P(CudaPages, TablesOutOfRangeHarmNobodyElse) {
  const ProblemSpec spec = spec_of(shape_of(300, 1000, 128, 2, 1, 2));
  Problem problem(spec);
  run_on_device(GetParam().options, problem);
  const std::int64_t bytes = std::ssize(problem.out.bytes()) / 2;  // of an entry
  const std::vector<std::byte> wanted = problem.out.bytes();
  const PagedCache cache(problem, {.page_size = 16});
  const auto entries = cache.pages.batch_stride;
  const Plan plan = Plan::create(GetParam().options, spec.shape, Device::cuda());
  const DeviceMemory workspace(plan.workspace_size());
  for (const std::int32_t page : {-1, std::numeric_limits<std::int32_t>::min(), static_cast<int>(cache.pages.count),
                                  std::numeric_limits<std::int32_t>::max()}) {
    SCOPED_TRACE(page);
    forget_written(problem);
    DeviceCache device_cache(cache);
    auto table = cache.table;
    for (std::int64_t i = 0; i < entries; i += i % 3 + 1) table[i] = page;
    device_cache.upload_table(table);
    const DeviceProblem device(problem);
    plan.run(device_cache.inputs(device.inputs()), device.outputs(), {workspace.data(), workspace.size()});
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_TRUE(workspace.guards_intact());
    device.download_outputs(problem);
    const auto& got = problem.out.bytes();
    EXPECT_TRUE(std::equal(got.begin() + bytes, got.end(), wanted.begin() + bytes));
  }
}

INSTANTIATE_TEST_SUITE_P(Methods, CudaPages, testing::ValuesIn(main_methods()),
                         [](const auto& test) { return test.param.name; });

TEST(CudaPagesOf, EveryMethod) {
  std::size_t i = 0;
  for (const MethodInfo& method : methods()) {
    SCOPED_TRACE(std::string(method.name));
    ProblemSpec spec = spec_of(shape_of(300, 1341, 64, 4, 2, 2));
    spec.sinks = true;
    expect_same(method.options, spec, layouts[i++ % layouts.size()]);
  }
}

// Those that read keys by lines of their own, with every width.
TEST(CudaPagesOf, EveryScoreAndWidth) {
  std::size_t i = 0;
  for (const cuda::Widths widths : cuda::widths)
    for (const BlockScore score : {BlockScore::exact, BlockScore::sampled, BlockScore::antidiagonal_causal})
      for (const Permutation permutation : {Permutation::none, Permutation::learned}) {
        if (!cuda::takes_pages(widths.keys)) continue;
        SCOPED_TRACE(name_of(widths) + ", score " + std::to_string(static_cast<int>(score)));
        Options options = pbs(0.6F);
        options.score = score;
        options.permutation = permutation;
        options.order_scope = OrderScope::kv_head;
        expect_same(options, spec_of(with_widths(shape_of(300, 1101, 0, 2, 1), widths)), layouts[i++ % layouts.size()]);
      }
}

TEST(CudaPagesOf, LongSegmentsAndSharedOrders) {
  for (const int segment : {512, 1024})
    for (const OrderScope scope : {OrderScope::query_head, OrderScope::kv_head}) {
      Options options = pbs(0.6F);
      options.segment = segment;
      options.order_scope = scope;
      ProblemSpec spec = alike(shape_of(300, 1350, 64, 4, 2, 2));
      expect_same(options, spec, {.page_size = 48, .one_row = true});
      options.permutation = Permutation::learned;
      options.order_scope = OrderScope::kv_head;
      spec.order_weights = true;
      expect_same(options, spec, {.page_size = 16, .one_row = true});
    }
}

TEST(CudaPagesOf, Corrections) {
  for (const Permutation permutation : {Permutation::none, Permutation::last_queries, Permutation::learned}) {
    Options options = pbs(0.5F);
    options.permutation = permutation;
    options.order_scope = OrderScope::kv_head;
    options.correction = Correction::mean;
    expect_same(options, spec_of(shape_of(300, 1341, 64, 4, 2, 2)), layouts[2]);
  }
}

// Values that are not finite among those that a window hides, found again in memory.
TEST(CudaPagesOf, WindowsSinksAndCaps) {
  for (const cuda::Widths widths : cuda::widths)
    for (const float softcap : {0.0F, 20.0F}) {
      if (!cuda::takes_pages_of_layers(widths.keys) || (softcap > 0 && !cuda::takes_caps(widths.keys))) continue;
      SCOPED_TRACE(name_of(widths) + ", softcap " + std::to_string(softcap));
      Options options = method("full");
      options.window = 300;
      options.softcap = softcap;
      ProblemSpec spec = alike(with_widths(shape_of(700, 1101, 0, 4, 2, 2), widths));
      spec.sinks = true;
      for (const CacheLayout& layout : {layouts[0], layouts[7]}) {
        SCOPED_TRACE(testing::PrintToString(layout));
        Problem problem(spec);
        for (std::int64_t t = 5; t < 1101; t += 97) problem.v.set(0, 1, t, t % widths.values, std::nan(""));
        run_on_device(options, problem);
        const auto out = problem.out.bytes();
        run_paged(options, problem, layout);
        EXPECT_EQ(problem.out.bytes(), out);
      }
    }
}

TEST(CudaPagesOf, BatchEntriesMayShareThem) {
  Problem problem(alike(shape_of(200, 700, 64, 2, 1, 2)));
  for (std::int64_t t = 0; t < 700; ++t)
    for (std::int64_t d = 0; d < 64; ++d) {
      problem.k.set(1, 0, t, d, problem.k.get(0, 0, t, d));
      problem.v.set(1, 0, t, d, problem.v.get(0, 0, t, d));
    }
  run_on_device(pbs(), problem);
  const auto wanted = problem.out.bytes();
  const PagedCache cache(problem, {.page_size = 32, .one_row = true});
  const DeviceCache device_cache(cache);
  DeviceProblem device(problem);
  device.poison_outputs();
  const Plan plan = Plan::create(pbs(), problem.shape, Device::cuda());
  const DeviceMemory workspace(plan.workspace_size());
  Inputs inputs = device_cache.inputs(device.inputs());
  inputs.pages.batch_stride = 0;
  plan.run(inputs, device.outputs(), {workspace.data(), workspace.size()});
  expect_success(cudaDeviceSynchronize());
  device.download_outputs(problem);
  EXPECT_EQ(problem.out.bytes(), wanted);
}

TEST(CudaPagesOf, WhatCannotBeReadIsRefused) {
  Problem problem(alike(shape_of(200, 700, 64, 4, 2, 2)));
  const PagedCache cache(problem, {.page_size = 16, .one_row = true});
  const DeviceCache device_cache(cache);
  const DeviceProblem device(problem);
  const Plan plan = Plan::create(pbs(), problem.shape, Device::cuda());
  const DeviceMemory workspace(plan.workspace_size());
  const Inputs good = device_cache.inputs(device.inputs());
  const auto refusal = [&](auto&& change, ErrorCode code) {
    Inputs inputs = good;
    change(inputs);
    return refusal_of([&] { plan.run(inputs, device.outputs(), {workspace.data(), workspace.size()}); }, code);
  };
  const auto expect_refused = [&](const char* says, ErrorCode code, auto&& change) {
    const std::string refused = refusal(change, code);
    EXPECT_NE(refused.find(says), std::string::npos) << refused;
  };
  expect_refused("page table: not in the memory of CUDA device 0", ErrorCode::invalid_argument,
                 [&](Inputs& inputs) { inputs.pages.table = cache.table.data(); });
  expect_refused("k: page stride", ErrorCode::unsupported, [](Inputs& inputs) { inputs.k.batch_stride += 4; });
  expect_refused("v: place stride", ErrorCode::unsupported, [](Inputs& inputs) { inputs.v.token_stride += 4; });
  expect_refused("v: head stride", ErrorCode::unsupported, [](Inputs& inputs) { inputs.v.head_stride += 4; });
  expect_refused("k: data at", ErrorCode::unsupported,
                 [](Inputs& inputs) { inputs.k.data = static_cast<const std::byte*>(inputs.k.data) + 4; });
  expect_refused("pages: size 24", ErrorCode::invalid_argument, [](Inputs& inputs) { inputs.pages.size = 24; });
  plan.run(good, device.outputs(), {workspace.data(), workspace.size()});
  expect_success(cudaDeviceSynchronize());
}

TEST(CudaPagesOf, WideKeysAreRefused) {
  const auto refused = [](cuda::Widths widths, std::int64_t window, bool sinks) {
    ProblemSpec spec = alike(with_widths(shape_of(200, 700), widths));
    spec.sinks = sinks;
    Problem problem(spec);
    const PagedCache cache(problem, {.page_size = 16});
    const DeviceCache device_cache(cache);
    const DeviceProblem device(problem);
    Options options = method("full");
    if (window > 0) options.window = window;
    const Plan plan = Plan::create(options, spec.shape, Device::cuda());
    const DeviceMemory workspace(plan.workspace_size());
    return refusal_of(
        [&] {
          plan.run(device_cache.inputs(device.inputs()), device.outputs(), {workspace.data(), workspace.size()});
        },
        ErrorCode::unsupported);
  };
  for (const cuda::Widths widths : cuda::widths) {
    if (!cuda::takes_pages(widths.keys))
      EXPECT_NE(refused(widths, 0, false).find("takes none at a head_dim"), std::string::npos);
    else if (!cuda::takes_pages_of_layers(widths.keys))
      for (const bool sinks : {false, true})
        EXPECT_NE(refused(widths, sinks ? 0 : 100, sinks).find("takes none with sinks or a window"), std::string::npos);
  }
}

// A captured graph reads the table when it runs.
TEST(CudaPagesOf, GraphsReadTheTableThatThereIs) {
  for (const Options& options : {method("full"), pbs(0.6F)}) {
    Problem problem(alike(shape_of(300, 1000, 64, 4, 2)));
    const CacheLayout layout{.page_size = 64, .one_row = true};
    const PagedCache cache(problem, layout);
    DeviceCache device_cache(cache);
    DeviceProblem device(problem);
    const Plan plan = Plan::create(options, problem.shape, Device::cuda());
    const DeviceMemory workspace(plan.workspace_size());
    run_on_device(options, problem);
    const auto wanted = problem.out.bytes();
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    device_cache.upload_table(std::vector<std::int32_t>(cache.table.size(), 0));
    expect_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    expect_success(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    plan.run(device_cache.inputs(device.inputs()), device.outputs(), {workspace.data(), workspace.size()},
             Stream{stream});
    expect_success(cudaStreamEndCapture(stream, &graph));
    expect_success(cudaGraphInstantiate(&executable, graph, 0));
    device_cache.upload_table(cache.table);
    expect_success(cudaDeviceSynchronize());
    expect_success(cudaGraphLaunch(executable, stream));
    expect_success(cudaStreamSynchronize(stream));
    device.download_outputs(problem);
    EXPECT_EQ(problem.out.bytes(), wanted);
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
  }
}

}  // namespace
}  // namespace pbsattn::test
