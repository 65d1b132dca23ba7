// What runs refuse of a SegmentCache.
#include <gtest/gtest.h>

#include <span>

#include "support/case.h"
#include "support/refusal.h"

namespace pbsattn::test {
namespace {

class CacheRefusals : public testing::TestWithParam<Device::Kind> {
 protected:
  void run(SegmentCache* cache, std::int64_t valid) {
    Outputs outputs = problem.outputs();
    outputs.cache = {cache, valid};
    plan.run(problem.inputs(), outputs, workspace);
  }
  std::string refusal(SegmentCache* cache, std::int64_t valid) {
    return refusal_of([&] { run(cache, valid); });
  }

  Problem problem{{.shape = shape_of(300, 700, 8)}};
  Plan plan = Plan::create(method("two-step"), problem.shape, {GetParam(), 1});
  std::vector<std::byte> workspace = std::vector<std::byte>(plan.workspace_size());
  std::vector<std::byte> memory = std::vector<std::byte>(1000);
};
INSTANTIATE_TEST_SUITE_P(Devices, CacheRefusals, testing::Values(Device::Kind::cpu, Device::Kind::reference),
                         [](const auto& test) { return test.param == Device::Kind::cpu ? "cpu" : "reference"; });

TEST_P(CacheRefusals, ValidTokensAreOfTheSequence) {
  SegmentCache cache(memory);
  run(&cache, 0);
  run(&cache, 700);
  EXPECT_EQ(refusal(&cache, 701),
            "cache: 701 valid tokens: outside 0 .. 700; give how many of the first it has seen, or 0");
  EXPECT_EQ(refusal(&cache, -1),
            "cache: -1 valid tokens: outside 0 .. 700; give how many of the first it has seen, or 0");
  EXPECT_EQ(refusal(nullptr, 1), "cache: 1 valid tokens: outside 0 .. 0; give how many of the first it has seen, or 0");
}

TEST_P(CacheRefusals, ItsMemoryIsApart) {
  if (plan.workspace_size() > 0) {
    SegmentCache over_workspace(std::span<std::byte>(workspace).last(1));
    EXPECT_NE(refusal(&over_workspace, 0).find("workspace: at"), std::string::npos);
  }
  const auto bytes_of = [](const Tensor& tensor) {
    return std::span<std::byte>(const_cast<std::byte*>(tensor.bytes().data()), tensor.bytes().size());
  };
  SegmentCache over_k(bytes_of(problem.k).first(8));
  EXPECT_NE(refusal(&over_k, 0).find("cache: at"), std::string::npos);
  SegmentCache over_out(bytes_of(problem.out).last(8));
  EXPECT_NE(refusal(&over_out, 0).find("out: at"), std::string::npos);
  SegmentCache none({});
  run(&none, 0);
}

// Or the caller's next chunk would find another sequence's.
TEST_P(CacheRefusals, ARunThatIsRefusedForgetsWhatIsNotValid) {
  if (GetParam() == Device::Kind::reference) return;  // which keeps nothing
  std::vector<std::byte> room(plan.cache_size(700));
  SegmentCache cache(room);
  run(&cache, 0);
  ASSERT_EQ(cache.tokens(), 512);
  workspace.pop_back();
  EXPECT_THROW(run(&cache, 300), Error);
  EXPECT_EQ(cache.tokens(), 300);
  EXPECT_THROW(run(&cache, -1), Error);
  EXPECT_EQ(cache.tokens(), 0);
}

TEST_P(CacheRefusals, ItsSizeIsOfASequence) {
  EXPECT_EQ(refusal_of([&] { plan.cache_size(-1); }),
            "cache of -1 tokens: outside 0 .. 1073741824; give the longest kv_len");
  EXPECT_EQ(refusal_of([&] { plan.cache_size((std::int64_t{1} << 30) + 1); }),
            "cache of 1073741825 tokens: outside 0 .. 1073741824; give the longest kv_len");
}

}  // namespace
}  // namespace pbsattn::test
