// What is refused of keys and values in pages.
#include <gtest/gtest.h>

#include <limits>

#include "support/cache.h"
#include "support/refusal.h"

namespace pbsattn {
namespace {

// Two batch entries of two KV heads, 200 tokens in 7 pages of 32 each, of 17 that there are.
class ValidatePages : public testing::TestWithParam<Device::Kind> {
 protected:
  void run() {
    Options options = method("pbs");
    options.block = 32;
    options.segment = 64;
    const Plan plan = Plan::create(options, problem_.shape, {GetParam(), 1});
    workspace_.resize(plan.workspace_size());
    plan.run(inputs_, problem_.outputs(), workspace_);
  }
  void expect(const std::vector<std::string>& parts) {
    const std::string message = test::refusal_of([&] { run(); });
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    for (const auto& part : parts) EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
  }

  test::Problem problem_{
      {.shape = {.batch = 2, .q_heads = 2, .kv_heads = 2, .q_len = 100, .kv_len = 200, .head_dim = 8}}};
  test::PagedCache cache_{problem_, {.page_size = 32, .one_row = true}};
  Inputs inputs_ = cache_.inputs(problem_);
  std::vector<std::byte> workspace_;
};
INSTANTIATE_TEST_SUITE_P(Devices, ValidatePages, testing::Values(Device::Kind::cpu, Device::Kind::reference),
                         [](const auto& test) { return test.param == Device::Kind::cpu ? "cpu" : "reference"; });

TEST_P(ValidatePages, WhatIsRightIsTaken) {
  EXPECT_NO_THROW(run());
  inputs_ = problem_.inputs();
  EXPECT_NO_THROW(run()) << "contiguous";
}

TEST_P(ValidatePages, Size) {
  for (const std::int64_t size : {std::int64_t{0}, std::int64_t{-16}, std::int64_t{8}, std::int64_t{33},
                                  std::int64_t{1} << 31, std::numeric_limits<std::int64_t>::max()}) {
    inputs_.pages.size = size;
    expect({"pages: size " + std::to_string(size), "multiple of 16", "contiguous"});
  }
}

TEST_P(ValidatePages, Table) {
  inputs_.pages.table = nullptr;
  expect({"page table: null pointer", "2 x 1 x 1 x 7"});
  inputs_.pages.table =
      reinterpret_cast<const std::int32_t*>(reinterpret_cast<const std::byte*>(cache_.table.data()) + 1);
  expect({"page table: pointer not aligned"});
  inputs_.pages.table = cache_.table.data();
  inputs_.pages.batch_stride = -7;
  expect({"page table: batch stride -7", "negative"});
}

TEST_P(ValidatePages, Count) {
  for (const std::int64_t count : {std::int64_t{0}, std::int64_t{-1}, std::int64_t{1} << 31}) {
    inputs_.pages.count = count;
    expect({"pages: count " + std::to_string(count), "how many"});
  }
}

TEST_P(ValidatePages, PagesThatThereAreNot) {
  for (const std::int32_t page :
       {-1, 17, std::numeric_limits<std::int32_t>::min(), std::numeric_limits<std::int32_t>::max()}) {
    cache_.table[7 + 6] = page;
    expect({"page table: page " + std::to_string(page) + " at entry 6 of batch entry 1", "pages 0 to 16"});
  }
  cache_.table[7 + 6] = 16;
  EXPECT_NO_THROW(run());
}

TEST_P(ValidatePages, Strides) {
  inputs_.k.batch_stride = 0;  // as where somebody thinks of batch entries
  expect({"k: strides 0, 16 and 32 of page, head and place", "page to page as batch_stride"});
  inputs_.k.batch_stride = 32 * 32 - 17;
  expect({"k: strides 1007, 16 and 32"});
  inputs_.k.batch_stride = cache_.k.batch_stride;
  inputs_.v.token_stride = 16;
  expect({"v: strides 1024, 16 and 16"});
  inputs_.v.token_stride = -32;
  expect({"v: token stride -32", "negative"});
  inputs_.v.token_stride = 32;
  inputs_.v.batch_stride = std::int64_t{1} << 60;
  expect({"v: batch stride", "beyond any memory", "17 of them"});
}

TEST_P(ValidatePages, Dtype) {
  inputs_.v.dtype = static_cast<DType>(3);
  expect({"dtype 3: no such value"});
}

TEST_P(ValidatePages, Overlaps) {
  const View out = problem_.out.view();
  inputs_.pages.table = static_cast<const std::int32_t*>(out.data);
  expect({"out: ", "over page table"});
  inputs_ = cache_.inputs(problem_);
  inputs_.v.data = out.data;
  expect({"out: ", "over v"});
}

}  // namespace
}  // namespace pbsattn
