// What is refused of learned orders' weights and of orders that are kept from call to call.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "core/validation/validate.h"
#include "support/refusal.h"

namespace pbsattn {
namespace {

// Two batch entries of two KV heads, 200 tokens in segments of 64: three are complete.
class ValidateOrder : public testing::TestWithParam<Device::Kind> {
 protected:
  ValidateOrder() {
    options_.block = 32;
    options_.segment = 64;
    options_.order_scope = OrderScope::kv_head;
    for (std::size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<std::int32_t>(i % 192);
  }

  void run(Permutation permutation) {
    options_.permutation = permutation;
    const Plan plan = Plan::create(options_, shape_, {GetParam(), 1});
    workspace_.resize(plan.workspace_size());
    plan.run({.q = view(q_, 2), .k = view(k_, 2), .v = view(k_, 2), .order_weights = weights_of()},
             {.out = view(out_, 2), .order = kept_}, workspace_);
  }
  std::string refusal(Permutation permutation) {
    return test::refusal_of([&] { run(permutation); });
  }
  void expect(Permutation permutation, const std::vector<std::string>& parts) {
    const std::string message = refusal(permutation);
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    for (const auto& part : parts) EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
  }

  View view(std::vector<float>& numbers, std::int64_t heads) const {
    return {numbers.data(), DType::f32, heads * 200 * 8, 200 * 8, 8};
  }
  ConstView view(const std::vector<float>& numbers, std::int64_t heads) const {
    return {numbers.data(), DType::f32, heads * 200 * 8, 200 * 8, 8};
  }
  OrderWeights weights_of() const { return {weights_, pairs_}; }

  Options options_ = method("pbs");
  Shape shape_{.batch = 2, .q_heads = 2, .kv_heads = 2, .q_len = 200, .kv_len = 200, .head_dim = 8};
  const std::vector<float> q_ = std::vector<float>(2 * 2 * 200 * 8, 0.5F);
  const std::vector<float> k_ = q_;
  std::vector<float> out_ = q_;
  std::vector<float> weights_ = std::vector<float>(2 * 12, 1.0F);
  RopePairs pairs_ = RopePairs::halves;
  std::vector<std::int32_t> order_ = std::vector<std::int32_t>(4 * 192);
  KeyOrder kept_{.data = order_.data(), .batch_stride = 2 * 192, .head_stride = 192, .known = 128};
  std::vector<std::byte> workspace_;
};
INSTANTIATE_TEST_SUITE_P(Devices, ValidateOrder, testing::Values(Device::Kind::cpu, Device::Kind::reference),
                         [](const auto& test) { return test.param == Device::Kind::cpu ? "cpu" : "reference"; });

TEST_P(ValidateOrder, WhatIsRightIsTaken) {
  EXPECT_NO_THROW(run(Permutation::learned));
  EXPECT_NO_THROW(run(Permutation::arrival));
  kept_ = {};
  EXPECT_NO_THROW(run(Permutation::arrival));
  kept_ = {.data = order_.data(), .batch_stride = 192, .head_stride = 2 * 192, .known = 192};
  EXPECT_NO_THROW(run(Permutation::arrival)) << "KV heads first";
}

TEST_P(ValidateOrder, Weights) {
  weights_.pop_back();
  expect(Permutation::learned, {"order_weights of 23 numbers", "2 x 12", "head_dim", "last_queries"});
  weights_.clear();
  expect(Permutation::learned, {"order_weights of 0 numbers"});
  weights_.assign(2 * 12, 0.0F);
  for (const float bad : {std::nanf(""), -std::numeric_limits<float>::infinity()}) {
    weights_[17] = bad;
    expect(Permutation::learned, {"order_weights: ", std::isnan(bad) ? "nan" : "-inf", "finite"});
  }
  weights_[17] = 0;
  pairs_ = static_cast<RopePairs>(2);
  expect(Permutation::learned, {"pairs 2", "neighbours"});
}

TEST_P(ValidateOrder, KnownTokens) {
  for (const std::int64_t known : {std::int64_t{-64}, std::int64_t{100}, std::int64_t{256}}) {
    kept_.known = known;
    expect(Permutation::arrival, {"order: known " + std::to_string(known), "segment of 64", "192"});
  }
  kept_.known = 64;
  kept_.data = nullptr;
  expect(Permutation::arrival, {"order: null pointer", "64 known tokens", "or 0"});
}

TEST_P(ValidateOrder, Tokens) {
  for (const std::int32_t token : {-1, 64, 192, 3, std::numeric_limits<std::int32_t>::min()}) {
    order_[192 + 5] = token;  // 3 stands there twice
    expect(Permutation::arrival, {"token " + std::to_string(token) + " at slot 5 of batch entry 0, KV head 1",
                                  "0 to 63", "pass what a run wrote"});
  }
  order_[192 + 5] = 5;
  order_[2 * 192 + 150] = -7;  // not known, so it is written
  EXPECT_NO_THROW(run(Permutation::arrival));
  EXPECT_EQ(order_[2 * 192 + 150], 150) << "keys are all alike";
}

TEST_P(ValidateOrder, Strides) {
  kept_.head_stride = 191;
  expect(Permutation::arrival, {"order: head stride 191", "overlap"});
  kept_.head_stride = -192;
  expect(Permutation::arrival, {"order: head stride -192", "negative"});
  kept_.head_stride = 192;
  kept_.batch_stride = 192;
  expect(Permutation::arrival, {"order: strides 192 and 192", "its own"});
  kept_.batch_stride = 2 * 192;
  kept_.data = reinterpret_cast<std::int32_t*>(reinterpret_cast<std::byte*>(order_.data()) + 1);
  expect(Permutation::arrival, {"order: pointer not aligned"});
}

TEST_P(ValidateOrder, Overlaps) {
  kept_.data = reinterpret_cast<std::int32_t*>(out_.data());
  kept_.known = 0;
  expect(Permutation::arrival, {"out: ", "over order"});
  kept_.data = reinterpret_cast<std::int32_t*>(const_cast<float*>(k_.data()));
  expect(Permutation::arrival, {"order: ", "over k"});
}

TEST_P(ValidateOrder, OtherPermutationsLeaveBothAlone) {
  weights_.clear();
  const auto before = order_ = std::vector<std::int32_t>(order_.size(), -1);
  kept_.known = 7;
  for (const Permutation permutation : {Permutation::none, Permutation::last_queries})
    EXPECT_NO_THROW(run(permutation));
  EXPECT_EQ(order_, before);
}

}  // namespace
}  // namespace pbsattn
