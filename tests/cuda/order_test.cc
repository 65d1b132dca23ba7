// Orders that a model of the key gives, and orders that segments keep from call to call (tests/cpu/order_test.cc has
// the CPU's and the reference's).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cuda/device_run.h"
#include "support/case.h"
#include "support/judge.h"
#include "support/refusal.h"

namespace pbsattn::test {
namespace {

Options ordered(Permutation permutation, int segment = 256, BlockScore score = BlockScore::mean_pool) {
  Options options = pbs(0.6F);
  options.permutation = permutation;
  options.order_scope = OrderScope::kv_head;
  options.segment = segment;
  options.score = score;
  return options;
}

ProblemSpec with_weights(const Shape& shape, DType dtype = DType::bf16, RopePairs pairs = RopePairs::halves) {
  ProblemSpec spec = alike(shape, dtype);
  spec.order_weights = true;
  spec.pairs = pairs;
  return spec;
}

ProblemSpec with_orders(const Shape& shape, int segment, std::int64_t known) {
  ProblemSpec spec = alike(shape);
  spec.kept_segment = segment;
  spec.known = known;
  return spec;
}

void expect_learned(const Shape& shape, int segment, DType dtype, RopePairs pairs) {
  SCOPED_TRACE(testing::Message() << "segment " << segment << ", head_dim " << shape.head_dim << ", dtype "
                                  << static_cast<int>(dtype) << ", pairs " << static_cast<int>(pairs));
  Problem problem(with_weights(shape, dtype, pairs));
  expect_right(problem, run_on_device(ordered(Permutation::learned, segment), problem), dtype);
}

// Segments that stay in shared memory and longer ones.
TEST(CudaOrders, LearnedAgreesWithTheReference) {
  for (const int segment : {128, 256, 384, 1024})
    for (const RopePairs pairs : {RopePairs::halves, RopePairs::neighbours})
      expect_learned(shape_of(140, 1100, 64, 2, 1), segment, DType::bf16, pairs);
}

TEST(CudaOrders, LearnedAgreesWithTheReferenceOfEveryType) {
  for (const cuda::Widths widths : cuda::widths)
    for (const DType dtype : {DType::bf16, DType::f16})
      for (const RopePairs pairs : {RopePairs::halves, RopePairs::neighbours})
        expect_learned(with_widths(shape_of(100, 700, 0, 4, 2, 2), widths), 256, dtype, pairs);
}

// With what goes by other means of the permuted keys and values.
TEST(CudaOrders, GoWithEveryScoreAndCorrection) {
  for (const BlockScore score : {BlockScore::per_query, BlockScore::exact, BlockScore::energy, BlockScore::sampled}) {
    SCOPED_TRACE(static_cast<int>(score));
    for (const Permutation permutation : {Permutation::learned, Permutation::arrival}) {
      ProblemSpec spec = with_orders(shape_of(150, 1000, 64, 4, 2), 256, 512);
      spec.order_weights = true;
      Problem problem(spec);
      Options options = ordered(permutation, 256, score);
      options.correction = Correction::mean;
      expect_right(problem, run_on_device(options, problem), DType::bf16);
    }
  }
}

TEST(CudaOrders, InOneCallArrivalIsTheOrderOfTheLastQueries) {
  for (const int segment : {256, 512}) {
    const Shape shape = shape_of(400, 1100, 64, 4, 2, 2);
    Problem kept(with_orders(shape, segment, 0));
    Problem alone(alike(shape));
    const RunResult arrival = run_on_device(ordered(Permutation::arrival, segment), kept);
    const RunResult last_queries = run_on_device(ordered(Permutation::last_queries, segment), alone);
    EXPECT_EQ(arrival.trace.order, last_queries.trace.order);
    EXPECT_EQ(arrival.trace.block, last_queries.trace.block);
    EXPECT_EQ(kept.out.bytes(), alone.out.bytes());
    // What is written is what a trace shows: 1024 of 1100 tokens lie in complete segments.
    for (std::int64_t head = 0; head < 4; ++head) {
      const auto traced = head_order(arrival.trace, head * 2, 1100);
      EXPECT_TRUE(std::equal(traced.begin(), traced.begin() + 1024, kept.order.begin() + head * 1024)) << head;
    }
  }
}

TEST(CudaOrders, ChunksKeepTheOrderThatASegmentArrivedIn) {
  const Problem whole(alike(shape_of(1100, 1100, 64, 2, 1, 2)));
  for (const int segment : {256, 384}) {
    SCOPED_TRACE(segment);
    const Options options = ordered(Permutation::arrival, segment);
    std::vector<std::int32_t> before;
    std::int64_t known = 0;
    std::int64_t begin = 0;
    // The first completes a segment and leaves nothing out; the third completes none.
    for (const std::int64_t end : {400, 800, 810, 1100}) {
      SCOPED_TRACE(end);
      Problem chunk = first_tokens(whole, end - begin, end, segment);
      const std::int64_t tokens = end / segment * segment;
      for (std::int64_t head = 0; head < 2; ++head)
        std::copy_n(before.begin() + head * known, known, chunk.order.begin() + head * tokens);
      chunk.known = known;
      const RunResult result = run_on_device(options, chunk);
      expect_right(chunk, result, DType::bf16);
      for (std::int64_t head = 0; head < 2; ++head) {
        const auto traced = head_order(result.trace, head * 2, end);
        EXPECT_TRUE(std::equal(traced.begin(), traced.begin() + known, before.begin() + head * known));
        EXPECT_TRUE(std::equal(traced.begin(), traced.begin() + tokens, chunk.order.begin() + head * tokens));
      }
      before = chunk.order;
      known = tokens;
      begin = end;
    }
  }
}

// The caller's orders may lie apart, as those of a cache that has room for more tokens.
TEST(CudaOrders, AreReadAndWrittenWhereTheCallerKeepsThem) {
  constexpr std::int64_t tokens = 1024;
  constexpr std::int64_t head_stride = 1500;
  constexpr std::int64_t batch_stride = 3100;
  Problem problem(with_orders(shape_of(400, 1100, 64, 4, 2, 2), 256, 512));
  Problem again(with_orders(shape_of(400, 1100, 64, 4, 2, 2), 256, 512));
  run_on_device(ordered(Permutation::arrival), problem);
  const DeviceProblem device(again);
  const Plan plan = Plan::create(ordered(Permutation::arrival), again.shape, Device::cuda());
  const DeviceMemory workspace(plan.workspace_size());
  std::vector<std::int32_t> apart(2 * batch_stride, -7);
  for (std::int64_t head = 0; head < 4; ++head)
    std::copy_n(again.order.begin() + head * tokens, 512,
                apart.begin() + head / 2 * batch_stride + head % 2 * head_stride);
  DeviceMemory memory(apart.size() * sizeof(std::int32_t));
  memory.upload(apart.data());
  Outputs outputs = device.outputs();
  outputs.order = {reinterpret_cast<std::int32_t*>(memory.data()), batch_stride, head_stride, 512};
  plan.run(device.inputs(), outputs, {workspace.data(), workspace.size()});
  expect_success(cudaDeviceSynchronize());
  memory.download(apart.data());
  std::int64_t untouched = 0;
  for (std::int64_t i = 0; i < std::ssize(apart); ++i) untouched += static_cast<std::int64_t>(apart[i] == -7);
  EXPECT_EQ(untouched, std::ssize(apart) - 4 * tokens);
  for (std::int64_t head = 0; head < 4; ++head)
    EXPECT_TRUE(std::equal(problem.order.begin() + head * tokens, problem.order.begin() + (head + 1) * tokens,
                           apart.begin() + head / 2 * batch_stride + head % 2 * head_stride));
}

TEST(CudaOrders, WithoutAPlaceToKeepThemTheyAreTheSame) {
  const Shape shape = shape_of(700, 1100, 128, 4, 2);
  Problem kept(with_orders(shape, 256, 0));
  Problem alone(alike(shape));
  run_on_device(ordered(Permutation::arrival), kept);
  run_on_device(ordered(Permutation::arrival), alone);
  EXPECT_EQ(kept.out.bytes(), alone.out.bytes());
}

TEST(CudaOrders, WeightsOfZeroLeaveAHeadAsItIs) {
  const Shape shape = shape_of(400, 1100, 64, 4, 2, 2);
  Problem problem(with_weights(shape));
  std::fill_n(problem.order_weights.begin(), 96, 0.0F);  // of KV head 0, though -0 is zero too
  problem.order_weights[5] = -0.0F;
  problem.k.set(0, 0, 70, 3, std::nan(""));
  problem.k.set(0, 0, 80, 3, HUGE_VAL);
  const RunResult result = run_on_device(ordered(Permutation::learned), problem);
  std::vector<std::int32_t> identity(1100);
  std::iota(identity.begin(), identity.end(), 0);
  for (const std::int64_t flat : {0, 1, 4, 5}) EXPECT_EQ(head_order(result.trace, flat, 1100), identity) << flat;
  for (const std::int64_t flat : {2, 3, 6, 7}) EXPECT_NE(head_order(result.trace, flat, 1100), identity) << flat;
  // All heads without weights: the plan without a permutation.
  Problem still(with_weights(shape));
  Problem unpermuted(alike(shape));
  std::ranges::fill(still.order_weights, 0.0F);
  EXPECT_EQ(run_on_device(ordered(Permutation::learned), still).trace.block,
            run_on_device(ordered(Permutation::none), unpermuted).trace.block);
  EXPECT_EQ(still.out.bytes(), unpermuted.out.bytes());
}

TEST(CudaOrders, OfKeysThatAreNotFiniteNanIsLast) {
  for (const int segment : {256, 384}) {
    Problem problem(with_weights(shape_of(400, 800, 64, 2, 1)));
    problem.order_weights.assign(96, 0.5F);
    problem.k.set(0, 0, 3, 0, std::nan(""));
    problem.k.set(0, 0, 5, 1, HUGE_VAL);
    problem.k.set(0, 0, 6, 1, -HUGE_VAL);  // its pair's length is inf
    problem.k.set(0, 0, 9, 0, std::nan(""));
    const auto order = head_order(run_on_device(ordered(Permutation::learned, segment), problem).trace, 0, 800);
    EXPECT_EQ(order[0], 5);
    EXPECT_EQ((std::vector<std::int32_t>(order.begin() + segment - 3, order.begin() + segment)),
              (std::vector<std::int32_t>{3, 6, 9}));
  }
}

TEST(CudaOrders, EqualKeysKeepTheirPlaces) {
  Problem problem(with_weights(shape_of(400, 1100, 128, 2, 1), DType::bf16, RopePairs::neighbours));
  problem.k.fill(0.75);
  const RunResult result = run_on_device(ordered(Permutation::learned, 512), problem);
  std::vector<std::int32_t> identity(1100);
  std::iota(identity.begin(), identity.end(), 0);
  EXPECT_EQ(head_order(result.trace, 0, 1100), identity);
}

TEST(CudaOrders, PassesChangeNothing) {
  for (const Permutation permutation : {Permutation::learned, Permutation::arrival}) {
    const auto run_with = [&](std::size_t cap) {
      ProblemSpec spec = with_orders(shape_of(500, 900, 64, 6, 2, 2), 256, 256);
      spec.order_weights = true;
      Problem problem(spec);
      const RunResult result = run_on_device(ordered(permutation), problem, {.cap = cap});
      return std::tuple(problem.out.bytes(), result.trace.order, result.trace.block, problem.order,
                        result.workspace_size);
    };
    const auto whole = run_with(Plan::no_cap);
    const auto passes = run_with(std::get<4>(whole) / 3);
    EXPECT_LT(std::get<4>(passes), std::get<4>(whole));
    EXPECT_EQ(std::get<0>(passes), std::get<0>(whole));
    EXPECT_EQ(std::get<1>(passes), std::get<1>(whole));
    EXPECT_EQ(std::get<2>(passes), std::get<2>(whole));
    EXPECT_EQ(std::get<3>(passes), std::get<3>(whole));
  }
}

// Device memory isn't looked at before a run: whatever stands there, nothing outside the segment is read.
TEST(CudaOrders, KnownOrdersThatAreNoneStayInTheirSegments) {
  Problem problem(with_orders(shape_of(500, 1100, 64, 4, 2), 256, 512));
  for (std::size_t i = 0; i < problem.order.size(); ++i) {
    constexpr std::int32_t nonsense[] = {-1, 1 << 30, -(1 << 30), 3, 1099};
    problem.order[i] = nonsense[i % std::size(nonsense)];
  }
  const RunResult result = run_on_device(ordered(Permutation::arrival), problem);
  for (std::int64_t slot = 0; slot < 512; ++slot)
    EXPECT_EQ(head_order(result.trace, 0, 1100)[slot] / 256, slot / 256) << slot;
}

TEST(CudaOrders, AreInTheDevicesMemory) {
  Problem problem(with_weights(shape_of(300, 900, 64, 2, 1)));
  const DeviceProblem device(problem);
  const Plan plan = Plan::create(ordered(Permutation::learned), problem.shape, Device::cuda());
  const DeviceMemory workspace(plan.workspace_size());
  const std::span<std::byte> memory{workspace.data(), workspace.size()};
  Inputs inputs = device.inputs();
  inputs.order_weights = problem.inputs().order_weights;
  EXPECT_NE(refusal_of([&] { plan.run(inputs, device.outputs(), memory); }, ErrorCode::invalid_argument)
                .find("order_weights: not in"),
            std::string::npos);
  Problem kept(with_orders(problem.shape, 256, 0));
  const Plan keeping = Plan::create(ordered(Permutation::arrival), problem.shape, Device::cuda());
  const DeviceMemory other(keeping.workspace_size());
  Outputs outputs = device.outputs();
  outputs.order = kept.kept_order();
  EXPECT_NE(refusal_of(
                [&] {
                  keeping.run(device.inputs(), outputs, {other.data(), other.size()});
                },
                ErrorCode::invalid_argument)
                .find("order: not in"),
            std::string::npos);
}

}  // namespace
}  // namespace pbsattn::test
