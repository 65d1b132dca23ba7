#include "cuda/cached_run.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "support/case.h"

namespace pbsattn::test {
namespace {

// Returns the tokens that a run leaves in a cache, which had some that are valid: those of complete segments.
std::int64_t kept_of(const Options& options, const Shape& shape, std::int64_t before) {
  const Plan plan = Plan::create(options, shape, Device::cuda());
  return plan.path() == "sm90" && plan.cache_size(shape.kv_len) > 0 ? geometry_of(options, shape).permuted_len()
                                                                    : before;
}

}  // namespace

std::size_t cache_size(const Options& options, const Shape& shape, std::int64_t tokens) {
  return Plan::create(options, shape, Device::cuda()).cache_size(tokens);
}

RunResult run_cached(const Options& options, Problem& problem, Cached& cached, std::int64_t valid,
                     const CachedRunOptions& how) {
  const Plan plan = Plan::create(options, problem.shape, Device::cuda(), how.cap);
  RunResult result = result_of(plan);
  problem.out.fill(std::nan(""));
  std::ranges::fill(problem.lse, 0.0F);
  DeviceProblem device(problem);
  Inputs inputs = device.inputs();
  std::optional<PagedCache> pages;
  std::optional<DeviceCache> device_pages;
  if (how.pages) {
    device_pages.emplace(pages.emplace(problem, *how.pages));
    inputs = device_pages->inputs(inputs);
  }
  const DeviceMemory workspace(plan.workspace_size());
  Outputs outputs = device.outputs();
  outputs.cache = {&cached.cache, valid};
  poison_shared_memory();
  plan.run(inputs, outputs, {workspace.data(), workspace.size()}, Stream{}, &result.stats, &result.trace);
  expect_success(cudaDeviceSynchronize());
  EXPECT_TRUE(workspace.guards_intact());
  device.download_outputs(problem);
  return result;
}

testing::AssertionResult same(const Options& options, Problem& problem, Cached& cached, std::int64_t valid,
                              const CachedRunOptions& how) {
  const RunResult alone = run_on_device(options, problem, {.cap = how.cap});
  const auto out = problem.out.bytes();
  const auto lse = problem.lse;
  const auto order = problem.order;
  forget_written(problem);
  const RunResult with = run_cached(options, problem, cached, valid, how);
  if (problem.out.bytes() != out || problem.lse != lse) return testing::AssertionFailure() << "other outputs";
  if (with.trace.order != alone.trace.order || problem.order != order)
    return testing::AssertionFailure() << "another order";
  if (with.trace.row_start != alone.trace.row_start || with.trace.block != alone.trace.block)
    return testing::AssertionFailure() << "other blocks";
  if (with.stats.visited_blocks != alone.stats.visited_blocks) return testing::AssertionFailure() << "other statistics";
  if (!cached.memory.guards_intact()) return testing::AssertionFailure() << "bytes around the cache are written";
  return testing::AssertionSuccess();
}

void grow(const Options& options, const Problem& whole, const CachedRunOptions& how) {
  Cached cached(cache_size(options, whole.shape, whole.shape.kv_len));
  const std::int64_t heads = whole.shape.batch * whole.shape.kv_heads;
  const bool arrives = options.permutation == Permutation::arrival;
  std::vector<std::int32_t> before;
  std::int64_t known = 0;
  std::int64_t begin = 0;
  for (const std::int64_t end : {std::int64_t{300}, std::int64_t{700}, std::int64_t{760}, whole.shape.kv_len}) {
    SCOPED_TRACE(end);
    Problem chunk = first_tokens(whole, end - begin, end, arrives ? options.segment : 0);
    const std::int64_t tokens = end / options.segment * options.segment;
    for (std::int64_t head = 0; head < heads; ++head)
      std::copy_n(before.begin() + head * known, known, chunk.order.begin() + head * tokens);
    chunk.known = known;
    const std::int64_t kept = kept_of(options, chunk.shape, cached.cache.tokens());
    EXPECT_TRUE(same(options, chunk, cached, begin, how));
    EXPECT_EQ(cached.cache.tokens(), kept);
    before = chunk.order;
    known = arrives ? tokens : 0;
    begin = end;
  }
}

Options ordered(Permutation permutation, Options options) {
  options.permutation = permutation;
  options.order_scope = OrderScope::kv_head;
  return options;
}

Problem problem_of(const Shape& shape, DType dtype, std::uint64_t seed) {
  ProblemSpec spec = alike(shape, dtype, TensorLayout::bhsd, seed);
  spec.order_weights = true;
  return Problem(spec);
}

}  // namespace pbsattn::test
