// A SegmentCache changes no bit of any result on CUDA either, in whatever way a sequence grows, is cut or changed
// behind it (tests/cpu/segment_cache_test.cc has the CPU's).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>

#include "cuda/cached_run.h"
#include "support/case.h"
#include "support/refusal.h"

namespace pbsattn::test {
namespace {

TEST(CudaSegmentCaches, GrowChunkByChunkUnderEveryMethod) {
  ProblemSpec spec = alike(shape_of(1341, 1341, 64, 4, 2, 2));
  spec.sinks = true;
  const Problem whole(spec);
  for (const MethodInfo& method : methods()) {
    SCOPED_TRACE(method.name);
    Options options = method.options;
    options.fallback = Fallback::never;
    grow(options, whole);
    if (HasFailure()) return;
  }
}

TEST(CudaSegmentCaches, KeepOrdersAndMeansOfEveryKind) {
  const Problem whole = problem_of(shape_of(1101, 1101, 64, 4, 2, 2));
  for (const Permutation permutation : lasting)
    for (const BlockScore score : {BlockScore::mean_pool, BlockScore::mean_pool_causal, BlockScore::per_query,
                                   BlockScore::energy, BlockScore::exact, BlockScore::dual_band, BlockScore::two_step})
      for (const Correction correction : {Correction::none, Correction::mean}) {
        if (score == BlockScore::dual_band && correction != Correction::none) continue;
        SCOPED_TRACE(testing::Message() << "permutation " << static_cast<int>(permutation) << ", score "
                                        << static_cast<int>(score) << ", correction " << static_cast<int>(correction));
        Options options = score == BlockScore::two_step ? ordered(permutation) : ordered(permutation, pbs(0.5F));
        options.score = score;
        options.correction = correction;
        grow(options, whole);
        if (HasFailure()) return;
      }
}

// In pages where attend takes them.
TEST(CudaSegmentCaches, OfEveryWidthAndType) {
  for (const cuda::Widths widths : cuda::widths)
    for (const DType dtype : {DType::bf16, DType::f16})
      for (const Permutation permutation : lasting) {
        SCOPED_TRACE(name_of(widths) + ", dtype " + std::to_string(static_cast<int>(dtype)) + ", permutation " +
                     std::to_string(static_cast<int>(permutation)));
        CachedRunOptions how;
        if (cuda::takes_pages(widths.keys)) how.pages = CacheLayout{.page_size = 128, .one_row = true};
        grow(ordered(permutation), problem_of(with_widths(shape_of(905, 905, 0, 2, 1), widths), dtype), how);
        if (HasFailure()) return;
      }
}

TEST(CudaSegmentCaches, OfPages) {
  const Problem whole = problem_of(shape_of(1101, 1101, 128, 4, 2, 2));
  for (const Permutation permutation : lasting)
    for (const CacheLayout& layout : {CacheLayout{.page_size = 16, .heads_first = true}, {.page_size = 48, .gap = 8}}) {
      SCOPED_TRACE(testing::PrintToString(layout));
      grow(ordered(permutation), whole, {.pages = layout});
    }
}

TEST(CudaSegmentCaches, OfSegmentsOfOtherLengths) {
  const Problem whole = problem_of(shape_of(1341, 1341, 64, 4, 2));
  for (const int segment : {128, 384, 1024})
    for (const Permutation permutation : lasting) {
      SCOPED_TRACE(testing::Message() << segment << ", permutation " << static_cast<int>(permutation));
      Options options = ordered(permutation);
      options.segment = segment;
      grow(options, whole);
    }
}

// Those of some KV heads of an entry, and of some query heads of a KV head.
TEST(CudaSegmentCaches, OfPassesOfSomeHeads) {
  const Problem whole = problem_of(shape_of(905, 905, 64, 6, 2, 2));
  for (const Permutation permutation : lasting) {
    SCOPED_TRACE(static_cast<int>(permutation));
    const Options options = ordered(permutation, pbs(0.6F));
    Shape head = shape_of(400, 905, 64, permutation == Permutation::none ? 1 : 3);  // the longest chunk's
    for (const std::int64_t factor : {1, 2}) {
      head.kv_heads = factor;
      head.q_heads *= factor;
      const std::size_t cap = Plan::create(options, head, Device::cuda()).workspace_size();
      Shape all = head;
      all.batch = 2;
      all.q_heads = 6;
      all.kv_heads = 2;
      ASSERT_LT(cap, Plan::create(options, all, Device::cuda()).workspace_size());
      grow(options, whole, {.cap = cap});
    }
  }
}

TEST(CudaSegmentCaches, WithCappedLogitsAndWindows) {
  const Problem whole = problem_of(shape_of(1101, 1101, 128, 4, 2, 2));
  for (const Permutation permutation : lasting) {
    Options options = ordered(permutation);
    options.softcap = 20;
    grow(options, whole);
    options.window = 200;
    grow(options, whole);
  }
}

// What comes before the changed token is all that a caller knows to be the same.
TEST(CudaSegmentCaches, KeysAndValuesChangePositionByPosition) {
  for (const Permutation permutation : lasting) {
    SCOPED_TRACE(static_cast<int>(permutation));
    const Options options = ordered(permutation);
    ProblemSpec spec = alike(shape_of(400, 1101, 64, 2, 1));
    spec.order_weights = true;
    spec.kept_segment = options.segment;
    Problem problem(spec);
    Cached cached(cache_size(options, problem.shape, 1101));
    run_cached(options, problem, cached, 0);
    // Up and down again, so that counts fall.
    for (const std::int64_t token : {0, 127, 128, 255, 256, 511, 767, 768, 1023, 1024, 1100, 600, 256, 1}) {
      problem.k.set(0, 0, token, token % 8, 3 + problem.k.get(0, 0, token, token % 8));
      problem.v.set(0, 0, token, token % 8, 5);
      problem.known = permutation == Permutation::arrival ? token / options.segment * options.segment : 0;
      ASSERT_TRUE(same(options, problem, cached, token)) << token;
      ASSERT_EQ(cached.cache.tokens(), 1024);
    }
  }
}

// A caller that says what isn't so gets what was.
TEST(CudaSegmentCaches, WhatIsKeptIsNotReadAgain) {
  constexpr std::int64_t kept = 512;
  for (const Permutation permutation : {Permutation::learned, Permutation::arrival}) {
    SCOPED_TRACE(static_cast<int>(permutation));
    const Options options = ordered(permutation);
    const bool arrives = permutation == Permutation::arrival;
    const Problem whole = problem_of(shape_of(1101, 1101, 64, 4, 2, 2));
    Cached cached(cache_size(options, whole.shape, 1101));
    Problem first = first_tokens(whole, 700, 700, arrives ? options.segment : 0);
    run_cached(options, first, cached, 0);
    Problem second = first_tokens(whole, 401, 1101, arrives ? options.segment : 0);
    for (std::int64_t head = 0; arrives && head < 4; ++head)
      std::copy_n(first.order.begin() + head * kept, kept, second.order.begin() + head * 1024);
    second.known = arrives ? kept : 0;
    run_on_device(options, second);
    const auto wanted = second.out.bytes();
    // No row's own segment is among them, whose keys are read where they were. By keys of all segments the last queries
    // order the new ones that arrive.
    for (std::int64_t b = 0; b < 2; ++b)
      for (std::int64_t h = 0; h < 2; ++h)
        for (std::int64_t t = 0; t < kept; ++t)
          for (std::int64_t d = 0; d < 64; ++d) {
            if (!arrives) second.k.set(b, h, t, d, std::nan(""));
            second.v.set(b, h, t, d, std::nan(""));
          }
    forget_written(second);
    run_cached(options, second, cached, 700);
    EXPECT_EQ(second.out.bytes(), wanted);
    forget_written(second);
    run_cached(options, second, cached, 0);
    EXPECT_NE(second.out.bytes(), wanted);
  }
}

// Nor are the means of keys that stay.
TEST(CudaSegmentCaches, MeansAreNotMadeAgain) {
  for (const BlockScore score : {BlockScore::mean_pool, BlockScore::mean_pool_causal}) {
    Options options = ordered(Permutation::none, pbs(0.5F));
    options.score = score;
    Problem problem = problem_of(shape_of(300, 1101, 64, 4, 2, 2));
    Cached cached(cache_size(options, problem.shape, 1101));
    const RunResult wanted = run_cached(options, problem, cached, 0);
    for (std::int64_t t = 0; t < 512; ++t) problem.k.set(1, 1, t, 3, 100 * (t / 128 % 2));
    EXPECT_EQ(run_cached(options, problem, cached, 1101).trace.block, wanted.trace.block);
    EXPECT_NE(run_cached(options, problem, cached, 0).trace.block, wanted.trace.block);
  }
}

TEST(CudaSegmentCaches, AreCutAndGrowAgain) {
  for (const Permutation permutation : {Permutation::none, Permutation::learned}) {
    SCOPED_TRACE(static_cast<int>(permutation));
    const Options options = ordered(permutation);
    const Shape shape = shape_of(1341, 1341, 64, 4, 2, 2);
    const Problem one = problem_of(shape);
    const Problem other = problem_of(shape, DType::bf16, 2);
    Cached cached(cache_size(options, shape, 1341));
    Problem problem = first_tokens(one, 1341, 1341);
    EXPECT_TRUE(same(options, problem, cached, 0));
    // Another end after the same 600 tokens, of which a run without a use for the cache sees 100 more.
    for (std::int64_t b = 0; b < 2; ++b)
      for (std::int64_t h = 0; h < 2; ++h)
        for (std::int64_t t = 600; t < 1341; ++t)
          for (std::int64_t d = 0; d < 64; ++d) problem.k.set(b, h, t, d, other.k.get(b, h, t, d));
    Problem part = first_tokens(problem, 100, 700);
    EXPECT_TRUE(same(pbs(), part, cached, 600));
    EXPECT_EQ(cached.cache.tokens(), 600);
    part = first_tokens(problem, 641, 1341);
    EXPECT_TRUE(same(options, part, cached, 700));
    EXPECT_EQ(cached.cache.tokens(), 1280);
    // And of the first sequence again, dense where it is short.
    part = first_tokens(one, 50, 650);
    EXPECT_TRUE(same(method("auto"), part, cached, 600));
    EXPECT_EQ(cached.cache.tokens(), 600);
    EXPECT_TRUE(same(options, part, cached, 600));
    EXPECT_EQ(cached.cache.tokens(), 512);
    part = first_tokens(one, 30, 800);
    EXPECT_TRUE(same(options, part, cached, 650));
    // One that ends inside what is kept, its own segment among it.
    part = first_tokens(one, 30, 768);
    EXPECT_TRUE(same(options, part, cached, 768));
    EXPECT_EQ(cached.cache.tokens(), 768);
  }
}

TEST(CudaSegmentCaches, OfAnotherPlanBeginAnew) {
  std::vector<Options> all(6, ordered(Permutation::learned));
  all[1].segment = 384;
  all[2].correction = Correction::mean;
  all[3] = ordered(Permutation::none);
  all[4] = ordered(Permutation::learned, pbs(0.6F));
  all[5] = method("flexprefill");
  const Problem whole = problem_of(shape_of(1101, 1101, 64, 4, 2, 2));
  Cached cached(cache_size(all[2], whole.shape, 3000));
  for (std::size_t i = 0; i < 2 * all.size(); ++i) {
    SCOPED_TRACE(i);
    Problem problem = first_tokens(whole, 300, 1101);
    EXPECT_TRUE(same(all[i % all.size()], problem, cached, 1101));
    EXPECT_TRUE(same(all[i % all.size()], problem, cached, 1101));
  }
  for (const DType dtype : {DType::f16, DType::bf16, DType::f16}) {
    Problem problem = problem_of(shape_of(300, 1101, 64, 4, 2, 2), dtype);
    EXPECT_TRUE(same(all[0], problem, cached, 1101)) << static_cast<int>(dtype);
  }
  for (const auto& [heads, batch, width] : {std::tuple{4, 1, 64}, {2, 2, 64}, {1, 4, 64}, {1, 2, 128}, {1, 2, 64}}) {
    Problem problem = problem_of(shape_of(300, 1101, width, 4, heads, batch));
    EXPECT_TRUE(same(all[0], problem, cached, 1101)) << heads;
  }
}

TEST(CudaSegmentCaches, WithoutRoomServeForNothing) {
  for (const Permutation permutation : lasting) {
    const Options options = ordered(permutation);
    Problem problem = problem_of(shape_of(300, 1101, 64, 4, 2, 2));
    const std::size_t size = cache_size(options, problem.shape, 1101);
    for (const std::size_t room : {std::size_t{0}, std::size_t{1}, size / 2, size - 1, size}) {
      SCOPED_TRACE(room);
      Cached cached(room);
      EXPECT_TRUE(same(options, problem, cached, 0));
      EXPECT_EQ(cached.cache.tokens(), room == size ? 1024 : 0);
      EXPECT_TRUE(same(options, problem, cached, 1101));
    }
  }
}

TEST(CudaSegmentCaches, SizesAreWhatIsKept) {
  const Shape shape = shape_of(300, 1101, 64, 4, 2, 2);
  const auto size = [&](const Options& options, std::int64_t tokens) { return cache_size(options, shape, tokens); };
  constexpr std::size_t heads = 4;
  constexpr std::size_t mean = 64 * 2;
  constexpr std::size_t slack = 2048;
  // 9 blocks of each head.
  const std::size_t still = size(ordered(Permutation::none), 1101);
  EXPECT_GE(still, heads * 9 * mean);
  EXPECT_LE(still, heads * 9 * mean + slack);
  const std::size_t moved = size(ordered(Permutation::learned), 1101);
  const std::size_t of_moved = heads * 9 * (2 * mean + 128 * (64 * 2 * 2 + 4));
  EXPECT_GE(moved, of_moved);
  EXPECT_LE(moved, of_moved + slack);
  EXPECT_EQ(size(ordered(Permutation::learned), 1152), moved);
  EXPECT_EQ(size(ordered(Permutation::learned), 0), 0);
  for (const Options& options : {pbs(), method("full"), method("minference"), method("streaming")})
    EXPECT_EQ(size(options, 1101), 0);
}

TEST(CudaSegmentCaches, AreInTheDevicesMemory) {
  const Problem problem = problem_of(shape_of(300, 1101, 64, 4, 2));
  const DeviceProblem device(problem);
  const Plan plan = Plan::create(ordered(Permutation::learned), problem.shape, Device::cuda());
  const DeviceMemory workspace(plan.workspace_size());
  std::vector<std::byte> memory(plan.cache_size(1101));
  SegmentCache cache(memory);
  Outputs outputs = device.outputs();
  outputs.cache = {&cache, 0};
  const auto run = [&] { plan.run(device.inputs(), outputs, {workspace.data(), workspace.size()}); };
  EXPECT_EQ(refusal_of(run, ErrorCode::invalid_argument),
            "cache: not in the memory of CUDA device 0; pass a tensor of that device");
  SegmentCache over({workspace.data(), 8});
  outputs.cache = {&over, 0};
  EXPECT_NE(refusal_of(run, ErrorCode::invalid_argument).find("workspace: at"), std::string::npos);
  SegmentCache none({});
  outputs.cache = {&none, 0};
  run();
  expect_success(cudaDeviceSynchronize());
}

// The chunks of a sequence one behind the other on a stream, each in the same workspace, while nobody waits.
TEST(CudaSegmentCaches, NoRunWaits) {
  for (const Permutation permutation : {Permutation::none, Permutation::learned}) {
    SCOPED_TRACE(static_cast<int>(permutation));
    const Options options = ordered(permutation, pbs(0.6F));
    const Problem whole = problem_of(shape_of(1341, 1341, 128, 8, 4, 2));
    Cached cached(cache_size(options, whole.shape, 1341));
    std::deque<Problem> chunks;
    std::deque<DeviceProblem> devices;
    std::deque<Plan> plans;
    std::size_t most = 0;
    for (const std::int64_t end : {400, 600, 800, 1000, 1341}) {
      const std::int64_t begin = chunks.empty() ? 0 : chunks.back().shape.kv_len;
      chunks.push_back(first_tokens(whole, end - begin, end));
      devices.emplace_back(chunks.back());
      plans.push_back(Plan::create(options, chunks.back().shape, Device::cuda()));
      most = std::max(most, plans.back().workspace_size());
    }
    const DeviceMemory workspace(most);
    for (int round = 0; round < 3; ++round) {
      for (DeviceProblem& device : devices) device.poison_outputs();
      std::int64_t valid = 0;
      for (std::size_t i = 0; i < plans.size(); ++i) {
        Outputs outputs = devices[i].outputs();
        outputs.cache = {&cached.cache, valid};
        plans[i].run(devices[i].inputs(), outputs, {workspace.data(), workspace.size()});
        valid = chunks[i].shape.kv_len;
      }
      expect_success(cudaDeviceSynchronize());
      for (std::size_t i = 0; i < plans.size(); ++i) {
        SCOPED_TRACE(i);
        devices[i].download_outputs(chunks[i]);
        const auto out = chunks[i].out.bytes();
        run_on_device(options, chunks[i]);
        EXPECT_EQ(chunks[i].out.bytes(), out);
      }
    }
  }
}

// A captured graph does at each launch what the captured run did: it reads what was kept then, and makes the rest.
TEST(CudaSegmentCaches, AreReadByGraphs) {
  const Options options = ordered(Permutation::learned);
  const Problem whole = problem_of(shape_of(1101, 1101, 64, 4, 2));
  Cached cached(cache_size(options, whole.shape, 1101));
  Problem first = first_tokens(whole, 700, 700);
  Problem second = first_tokens(whole, 401, 1101);
  run_cached(options, first, cached, 0);
  run_on_device(options, second);
  const auto wanted = second.out.bytes();
  DeviceProblem device(second);
  const Plan plan = Plan::create(options, second.shape, Device::cuda());
  const DeviceMemory workspace(plan.workspace_size());
  Outputs outputs = device.outputs();
  outputs.cache = {&cached.cache, 700};
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  expect_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  expect_success(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  plan.run(device.inputs(), outputs, {workspace.data(), workspace.size()}, Stream{stream});
  expect_success(cudaStreamEndCapture(stream, &graph));
  expect_success(cudaGraphInstantiate(&executable, graph, 0));
  // Nothing has run, so the cache has no more than before.
  EXPECT_EQ(cached.cache.tokens(), 512);
  for (int launch = 0; launch < 2; ++launch) {
    device.poison_outputs();
    expect_success(cudaGraphLaunch(executable, stream));
    expect_success(cudaStreamSynchronize(stream));
    device.download_outputs(second);
    EXPECT_EQ(second.out.bytes(), wanted);
  }
  EXPECT_EQ(cached.cache.tokens(), 512);
  run_cached(options, second, cached, 1101);
  EXPECT_EQ(second.out.bytes(), wanted);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace pbsattn::test
