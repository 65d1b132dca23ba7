// Orders that a model of the key gives, and orders that segments keep from call to call.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/path.h"
#include "support/case.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

Options small(Permutation permutation) {
  Options options = method("two-step");
  options.permutation = permutation;
  options.order_scope = OrderScope::kv_head;
  options.block = 32;
  options.segment = 64;
  options.threshold = 0.15F;
  return options;
}

const Shape shape = shape_of(400, 400, 64, 4, 2, 2);

class Orders : public testing::TestWithParam<Device::Kind> {
 protected:
  RunResult run_here(const Options& options, Problem& problem) const {
    return run(options, problem, {.device = {GetParam(), 2}});
  }
};
INSTANTIATE_TEST_SUITE_P(Devices, Orders, testing::Values(Device::Kind::cpu, Device::Kind::reference),
                         [](const auto& test) { return test.param == Device::Kind::cpu ? "cpu" : "reference"; });

TEST_P(Orders, InOneCallArrivalIsTheOrderOfTheLastQueries) {
  Problem kept({.shape = shape, .kept_segment = 64});
  Problem alone({.shape = shape});
  const RunResult arrival = run_here(small(Permutation::arrival), kept);
  const RunResult last_queries = run_here(small(Permutation::last_queries), alone);
  EXPECT_EQ(arrival.trace.order, last_queries.trace.order);
  EXPECT_EQ(arrival.trace.block, last_queries.trace.block);
  EXPECT_EQ(kept.out.bytes(), alone.out.bytes());
  // What is written is what a trace shows: 384 of 400 tokens lie in complete segments.
  for (std::int64_t head = 0; head < 4; ++head) {
    const auto traced = head_order(arrival.trace, head * 2, 400);
    EXPECT_TRUE(std::equal(traced.begin(), traced.begin() + 384, kept.order.begin() + head * 384)) << head;
  }
}

TEST_P(Orders, ChunksKeepTheOrderThatASegmentArrivedIn) {
  const Problem whole({.shape = shape});
  const Options options = small(Permutation::arrival);
  // Chunks that begin and end inside blocks and segments; the third completes none.
  std::vector<std::int32_t> before;
  std::int64_t known = 0;
  std::int64_t begin = 0;
  for (const std::int64_t end : {150, 280, 310, 400}) {
    SCOPED_TRACE(end);
    Problem chunk = first_tokens(whole, end - begin, end, 64);
    const std::int64_t tokens = end / 64 * 64;
    for (std::int64_t head = 0; head < 4; ++head)
      std::copy_n(before.begin() + head * known, known, chunk.order.begin() + head * tokens);
    chunk.known = known;
    const RunResult result = run_here(options, chunk);
    expect_right(chunk, result, products_of(result.path));
    for (std::int64_t head = 0; head < 4; ++head) {
      const auto traced = head_order(result.trace, head * 2, end);
      EXPECT_TRUE(std::equal(traced.begin(), traced.begin() + known, before.begin() + head * known));
      EXPECT_TRUE(std::equal(traced.begin(), traced.begin() + tokens, chunk.order.begin() + head * tokens));
    }
    // A new segment stands as in a call that knows nothing.
    Problem alone = first_tokens(whole, end - begin, end, 64);
    run_here(options, alone);
    for (std::int64_t head = 0; head < 4; ++head)
      EXPECT_TRUE(std::equal(chunk.order.begin() + head * tokens + known, chunk.order.begin() + (head + 1) * tokens,
                             alone.order.begin() + head * tokens + known));
    EXPECT_EQ(known > 0 && tokens > 0, chunk.order != alone.order) << "earlier chunks' queries see other keys as heavy";
    before = chunk.order;
    known = tokens;
    begin = end;
  }
}

TEST_P(Orders, WeightsOfZeroLeaveAHeadAsItIs) {
  Problem problem({.shape = shape, .order_weights = true});
  std::fill_n(problem.order_weights.begin(), 96, 0.0F);  // of KV head 0, though -0 is zero too
  problem.order_weights[5] = -0.0F;
  problem.k.set(0, 0, 70, 3, std::nan(""));
  problem.k.set(0, 0, 80, 3, HUGE_VAL);
  const RunResult result = run_here(small(Permutation::learned), problem);
  std::vector<std::int32_t> identity(400);
  std::iota(identity.begin(), identity.end(), 0);
  for (const std::int64_t flat : {0, 1, 4, 5}) EXPECT_EQ(head_order(result.trace, flat, 400), identity) << flat;
  for (const std::int64_t flat : {2, 3, 6, 7}) EXPECT_NE(head_order(result.trace, flat, 400), identity) << flat;
  // All heads without weights: the plan without a permutation.
  Problem still({.shape = shape, .order_weights = true});
  Problem unpermuted({.shape = shape});
  std::ranges::fill(still.order_weights, 0.0F);
  EXPECT_EQ(run_here(small(Permutation::learned), still).trace.block,
            run_here(small(Permutation::none), unpermuted).trace.block);
  EXPECT_EQ(still.out.bytes(), unpermuted.out.bytes());
}

TEST_P(Orders, OfKeysThatAreNotFiniteNanIsLast) {
  Problem problem({.shape = shape_of(200, 200, 8, 1, 1), .order_weights = true});
  problem.order_weights.assign(12, 0.5F);
  problem.k.set(0, 0, 3, 0, std::nan(""));
  problem.k.set(0, 0, 5, 1, HUGE_VAL);
  problem.k.set(0, 0, 6, 1, -HUGE_VAL);  // its pair's length is inf
  problem.k.set(0, 0, 9, 0, std::nan(""));
  const auto order = head_order(run_here(small(Permutation::learned), problem).trace, 0, 200);
  EXPECT_EQ(order[0], 5);
  EXPECT_EQ((std::vector<std::int32_t>(order.begin() + 61, order.begin() + 64)), (std::vector<std::int32_t>{3, 6, 9}));
}

TEST_P(Orders, EqualKeysKeepTheirPlaces) {
  Problem problem({.shape = shape_of(200, 200, 24, 2, 1), .order_weights = true, .pairs = RopePairs::neighbours});
  problem.k.fill(0.75);
  const RunResult result = run_here(small(Permutation::learned), problem);
  std::vector<std::int32_t> identity(200);
  std::iota(identity.begin(), identity.end(), 0);
  EXPECT_EQ(head_order(result.trace, 0, 200), identity);
}

TEST(CpuOrders, PassesAndThreadsChangeNothing) {
  for (const Permutation permutation : {Permutation::learned, Permutation::arrival}) {
    const auto run_with = [&](std::size_t cap, int threads) {
      Problem problem({.shape = shape, .order_weights = true, .kept_segment = 64, .known = 128});
      const Options options = small(permutation);
      const RunResult result = run(options, problem, {.device = Device::cpu(threads), .cap = cap});
      return std::tuple(problem.out.bytes(), result.trace.order, result.trace.block, problem.order,
                        result.workspace_size);
    };
    const auto whole = run_with(Plan::no_cap, 3);
    const auto passes = run_with(std::get<4>(whole) - 1, 1);
    EXPECT_LT(std::get<4>(passes), std::get<4>(whole));
    EXPECT_EQ(std::get<0>(passes), std::get<0>(whole));
    EXPECT_EQ(std::get<1>(passes), std::get<1>(whole));
    EXPECT_EQ(std::get<2>(passes), std::get<2>(whole));
    EXPECT_EQ(std::get<3>(passes), std::get<3>(whole));
  }
}

}  // namespace
}  // namespace pbsattn::test
