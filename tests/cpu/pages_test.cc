// Keys and values in pages of a cache give the bits that they give where they lie contiguous: on every code path, and
// in the reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "cpu/path.h"
#include "support/cache.h"
#include "support/case.h"

namespace pbsattn::test {
namespace {

constexpr std::array layouts{
    CacheLayout{.page_size = 16, .one_row = true},
    CacheLayout{.page_size = 16, .heads_first = true, .one_row = true},
    CacheLayout{.page_size = 48, .heads_first = true, .gap = 5},  // blocks begin inside pages
    CacheLayout{.page_size = 80, .one_row = true, .gap = 7},
    CacheLayout{.page_size = 128},
    CacheLayout{.page_size = 128, .heads_first = true, .one_row = true, .gap = 64},
    CacheLayout{.page_size = 1024},  // more than there are tokens
};

std::vector<std::string> devices() {
  std::vector<std::string> paths = describe_cpu().paths;
  paths.emplace_back("reference");
  return paths;
}

class PagesOnDevice : public testing::TestWithParam<std::string> {
 protected:
  PagesOnDevice() {
    if (!reference()) forced_.emplace(GetParam());
  }
  bool reference() const { return GetParam() == "reference"; }
  Device device() const { return reference() ? Device::reference() : Device::cpu(2); }

  // Expects of these inputs, whose keys and values lie in pages, what the problem's own give.
  void expect_same(const Options& options, Problem& problem, const Inputs& paged) const {
    const RunResult contiguous = run(options, problem, {.device = device()});
    const auto out = problem.out.bytes();
    const auto lse = problem.lse;
    const auto order = problem.order;

    const Plan plan = Plan::create(options, problem.shape, device());
    std::vector<std::byte> workspace(plan.workspace_size(), std::byte{0xFF});
    problem.out.fill(std::nan(""));
    std::ranges::fill(problem.lse, 0.0F);
    for (std::size_t i = 0; i < problem.order.size(); ++i)
      if (static_cast<std::int64_t>(i % (problem.order.size() / (problem.shape.batch * problem.shape.kv_heads))) >=
          problem.known)
        problem.order[i] = -1;
    Trace trace;
    plan.run(paged, problem.outputs(), workspace, nullptr, &trace);
    EXPECT_EQ(trace.order, contiguous.trace.order);
    EXPECT_EQ(trace.row_start, contiguous.trace.row_start);
    EXPECT_EQ(trace.block, contiguous.trace.block);
    EXPECT_EQ(problem.out.bytes(), out);
    EXPECT_EQ(problem.lse, lse);
    EXPECT_EQ(problem.order, order);
  }

 private:
  std::optional<ForcedPath> forced_;
};
INSTANTIATE_TEST_SUITE_P(Paths, PagesOnDevice, testing::ValuesIn(devices()),
                         [](const auto& test) { return test.param; });

Options small(const Options& method) {
  Options options = method;
  options.block = 32;
  options.segment = 64;
  return options;
}

TEST_P(PagesOnDevice, EveryLayout) {
  for (const CacheLayout& layout : layouts)
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      SCOPED_TRACE(testing::PrintToString(layout) + ", dtype " + std::to_string(static_cast<int>(dtype)));
      ProblemSpec spec = alike(shape_of(150, 210, 40, 4, 2, 2), dtype);
      spec.shape.head_dim_v = 24;
      Problem problem(spec);
      expect_same(small(pbs()), problem, PagedCache(problem, layout).inputs(problem));
      if (HasFailure()) return;
    }
}

TEST_P(PagesOnDevice, KeysOfAnotherDtypeThanValues) {
  for (const CacheLayout& layout : layouts) {
    SCOPED_TRACE(testing::PrintToString(layout));
    Problem problem({.shape = shape_of(90, 210, 16, 4, 2, 2), .q = DType::bf16, .k = DType::f16, .v = DType::f32});
    expect_same(small(pbs()), problem, PagedCache(problem, layout).inputs(problem));
    if (HasFailure()) return;
  }
}

// Every score, rule and permutation of the table.
TEST_P(PagesOnDevice, EveryMethod) {
  std::size_t i = 0;
  for (const MethodInfo& method : methods()) {
    const CacheLayout& layout = layouts[i++ % layouts.size()];
    SCOPED_TRACE(std::string(method.name) + ", " + testing::PrintToString(layout));
    Problem problem({.shape = shape_of(140, 330, 16, 4, 2, 2), .sinks = true, .order_weights = true});
    expect_same(small(method.options), problem, PagedCache(problem, layout).inputs(problem));
    if (HasFailure()) return;
  }
}

TEST_P(PagesOnDevice, LearnedOrdersThoseOfArrivalAndCorrections) {
  Options options = small(method("pbs"));
  options.order_scope = OrderScope::kv_head;
  options.top_p = 0.5F;
  for (const Permutation permutation : {Permutation::learned, Permutation::arrival})
    for (const Correction correction : {Correction::none, Correction::mean}) {
      SCOPED_TRACE(testing::Message() << "permutation " << static_cast<int>(permutation) << ", correction "
                                      << static_cast<int>(correction));
      options.permutation = permutation;
      options.correction = correction;
      Problem problem(
          {.shape = shape_of(140, 330, 16, 4, 2, 2), .order_weights = true, .kept_segment = 64, .known = 128});
      expect_same(options, problem, PagedCache(problem, {.page_size = 48, .one_row = true}).inputs(problem));
    }
}

TEST_P(PagesOnDevice, WindowsAndCappedLogits) {
  Options options = small(method("pbs"));
  options.window = 100;
  options.softcap = 20;
  Problem problem({.shape = shape_of(140, 330, 16, 4, 2, 2), .sinks = true});
  expect_same(options, problem, PagedCache(problem, {.page_size = 16, .heads_first = true}).inputs(problem));
}

// As requests do that begin alike.
TEST_P(PagesOnDevice, BatchEntriesMayShareTheirPages) {
  Problem problem({.shape = shape_of(60, 210, 16, 2, 2, 2)});
  for (std::int64_t h = 0; h < 2; ++h)
    for (std::int64_t t = 0; t < 210; ++t)
      for (std::int64_t d = 0; d < 16; ++d) {
        problem.k.set(1, h, t, d, problem.k.get(0, h, t, d));
        problem.v.set(1, h, t, d, problem.v.get(0, h, t, d));
      }
  const PagedCache cache(problem, {.page_size = 32, .one_row = true});
  Inputs shared = cache.inputs(problem);
  shared.pages.batch_stride = 0;
  expect_same(small(pbs()), problem, shared);
}

}  // namespace
}  // namespace pbsattn::test
