// Each refusal names the value, the rule and the way out.
#include "core/validation/validate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "pbsattn/options.hpp"
#include "support/refusal.h"

namespace pbsattn {
namespace {

const Shape good_shape{.batch = 2, .q_heads = 4, .kv_heads = 2, .q_len = 300, .kv_len = 400, .head_dim = 64};

void expect_error(const std::function<void()>& body, ErrorCode code, const std::vector<std::string>& parts) {
  const std::string message = test::refusal_of(body, code);
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  for (const auto& part : parts) EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
}

void expect_bad_options(const std::function<void(Options&)>& change, const std::vector<std::string>& parts) {
  Options options = method("pbs");
  change(options);
  expect_error([&] { Plan::create(options, good_shape); }, ErrorCode::invalid_argument, parts);
}

void expect_bad_shape(const std::function<void(Shape&)>& change, const std::vector<std::string>& parts) {
  Shape shape = good_shape;
  change(shape);
  expect_error([&] { Plan::create(method("pbs"), shape); }, ErrorCode::invalid_argument, parts);
}

TEST(Validate, Options) {
  expect_bad_options([](Options& o) { o.top_p = 0; }, {"top_p 0", "(0, 1]", "0.9"});
  expect_bad_options([](Options& o) { o.top_p = 1.5F; }, {"top_p 1.5", "(0, 1]"});
  expect_bad_options([](Options& o) { o.top_p = std::nanf(""); }, {"top_p nan", "(0, 1]"});
  expect_bad_options([](Options& o) { o.threshold = -0.1F; }, {"threshold -0.1", "[0, 1]"});
  expect_bad_options([](Options& o) { o.threshold = 2; }, {"threshold 2", "[0, 1]"});
  expect_bad_options([](Options& o) { o.threshold = std::nanf(""); }, {"threshold nan", "[0, 1]"});
  expect_bad_options([](Options& o) { o.floor_top_p = 1.01F; }, {"floor_top_p 1.01", "[0, 1]"});
  expect_bad_options([](Options& o) { o.top_k = -1; }, {"top_k -1"});
  expect_bad_options([](Options& o) { o.density = 1.5F; }, {"density 1.5", "[0, 1]"});
  expect_bad_options([](Options& o) { o.sink_blocks = -1; }, {"sink_blocks -1", "0"});
  expect_bad_options([](Options& o) { o.local_blocks = -1; }, {"local_blocks -1", "0"});
  expect_bad_options([](Options& o) { o.block = 0; }, {"block 0", "128"});
  expect_bad_options([](Options& o) { o.block = -128; }, {"block -128"});
  expect_bad_options([](Options& o) { o.segment = 300; }, {"segment 300", "128", "256"});
  expect_bad_options([](Options& o) { o.segment = 64; }, {"segment 64", "128"});
  expect_bad_options([](Options& o) { o.segment = 2'147'483'520; },
                     {"segment 2147483520", "1073741824", "keeps every"});
  expect_bad_options([](Options& o) { o.dense_last_rows = -1; }, {"dense_last_rows -1", "0"});
  expect_bad_options([](Options& o) { o.scale = -1; }, {"scale -1", "head_dim"});
  expect_bad_options([](Options& o) { o.fallback = static_cast<Fallback>(2); }, {"fallback 2"});
  expect_bad_options([](Options& o) { o.expected_density = 1.5F; }, {"expected_density 1.5", "[0, 1]"});
  expect_bad_options([](Options& o) { o.expected_density = std::numeric_limits<float>::quiet_NaN(); },
                     {"expected_density nan"});
  expect_bad_options([](Options& o) { o.scale = std::numeric_limits<float>::infinity(); }, {"scale inf"});
  expect_bad_options([](Options& o) { o.window = 0; }, {"window 0", "not positive", "1073741824 hides none"});
  expect_bad_options([](Options& o) { o.window = -1; }, {"window -1"});
  expect_bad_options([](Options& o) { o.softcap = -1; }, {"softcap -1", "positive", "0 stands for none"});
  expect_bad_options([](Options& o) { o.softcap = std::nanf(""); }, {"softcap nan"});
  expect_bad_options([](Options& o) { o.softcap = std::numeric_limits<float>::infinity(); }, {"softcap inf"});
  expect_bad_options([](Options& o) { o.score = BlockScore::none; }, {"top_p", "mean_pool"});
  expect_bad_options(
      [](Options& o) {
        o.score = BlockScore::none;
        o.keep = KeepRule::threshold;
      },
      {"threshold", "per_query"});
  expect_bad_options(
      [](Options& o) {
        o.score = BlockScore::antidiagonal;
        o.block = 12;
        o.segment = 24;
      },
      {"block 12", "multiples of 8"});
  expect_bad_options([](Options& o) { o.threshold_tokens = -1; }, {"threshold_tokens -1", "0 turns it off"});
  expect_bad_options([](Options& o) { o.threshold_tokens = std::nanf(""); }, {"threshold_tokens nan"});
  expect_bad_options([](Options& o) { o.threshold_tokens = std::numeric_limits<float>::infinity(); },
                     {"threshold_tokens inf"});
  expect_bad_options([](Options& o) { o.two_step_queries = 0; }, {"two_step_queries 0", "positive", "16"});
  expect_bad_options([](Options& o) { o.two_step_exact = -3; }, {"two_step_exact -3", "4"});
  expect_bad_options([](Options& o) { o.two_step_reach = 0; }, {"two_step_reach 0", "4"});
  expect_bad_options([](Options& o) { o.score = BlockScore::two_step; },
                     {"two_step", "top_p", "set keep to threshold"});
  for (const Permutation permutation : {Permutation::learned, Permutation::arrival})
    expect_bad_options([&](Options& o) { o.permutation = permutation; },
                       {"order_scope query_head", std::string(name_of(permutation)), "set order_scope to kv_head"});
  expect_bad_options([](Options& o) { o.vertical = -1; }, {"vertical -1"});
  expect_bad_options([](Options& o) { o.slash = -1; }, {"slash -1"});
  expect_bad_options([](Options& o) { o.tau = 1.5F; }, {"tau 1.5", "[0, 1]"});
  expect_bad_options([](Options& o) { o.tau = std::nanf(""); }, {"tau nan"});
  expect_bad_options([](Options& o) { o.min_budget = -1; }, {"min_budget -1"});
  expect_bad_options([](Options& o) { o.score = BlockScore::vertical_slash; }, {"vertical_slash", "top_p", "alone"});
  expect_bad_options([](Options& o) { o.keep = KeepRule::coverage; }, {"coverage", "mean_pool", "flexible"});
  expect_bad_options(
      [](Options& o) {
        o = method("minference");
        o.permutation = Permutation::last_queries;
      },
      {"vertical_slash", "last_queries", "none"});
  expect_bad_options([](Options& o) { o.correction = static_cast<Correction>(2); }, {"correction 2"});
  expect_bad_options([](Options& o) { o.keep = static_cast<KeepRule>(9); }, {"keep 9"});
  expect_bad_options([](Options& o) { o.permutation = static_cast<Permutation>(4); }, {"permutation 4"});
  expect_bad_options([](Options& o) { o.score = static_cast<BlockScore>(200); }, {"score 200"});
  expect_bad_options([](Options& o) { o.rules = static_cast<Rules>(2); }, {"rules 2"});
  expect_bad_options([](Options& o) { o.order_scope = static_cast<OrderScope>(2); }, {"order_scope 2"});
  expect_bad_options([](Options& o) { o.precision = static_cast<Precision>(3); }, {"precision 3"});
}

TEST(Validate, OptionsOfEachHead) {
  std::vector<Options> heads(4, method("pbs"));
  const auto expect = [&](const std::vector<std::string>& parts) {
    expect_error([&] { Plan::create(heads, good_shape); }, ErrorCode::invalid_argument, parts);
  };
  heads[3].top_p = 2;
  expect({"top_p 2"});
  heads[3] = method("pbs");
  heads[3].segment = 512;
  expect({"segment of head 3", "head 0", "keep, top_p"});
  heads[3] = method("streaming");
  expect({"of head 3", "head 0"});
  heads.pop_back();
  expect({"options of 3 heads", "q_heads is 4"});
  heads.clear();
  expect({"options of 0 heads"});
  heads.assign(4, method("pbs"));
  heads[1].keep = KeepRule::all;
  heads[2].keep = KeepRule::none;
  heads[3].local_blocks = 2;
  EXPECT_NO_THROW(Plan::create(heads, good_shape));
}

TEST(Validate, Shapes) {
  expect_bad_shape([](Shape& s) { s.batch = 0; }, {"batch 0", "1 .. "});
  expect_bad_shape([](Shape& s) { s.q_heads = 0; }, {"q_heads 0"});
  expect_bad_shape([](Shape& s) { s.kv_heads = 3; }, {"kv_heads 3", "q_heads 4"});
  expect_bad_shape([](Shape& s) { s.kv_heads = 8; }, {"kv_heads 8", "q_heads 4"});
  expect_bad_shape([](Shape& s) { s.kv_len = 0; }, {"kv_len 0"});
  expect_bad_shape([](Shape& s) { s.kv_len = std::int64_t{1} << 31; }, {"kv_len 2147483648"});
  expect_bad_shape([](Shape& s) { s.q_len = 0; }, {"q_len 0"});
  expect_bad_shape([](Shape& s) { s.q_len = 401; }, {"q_len 401", "kv_len 400", "last q_len"});
  expect_bad_shape([](Shape& s) { s.head_dim = 0; }, {"head_dim 0"});
  expect_bad_shape([](Shape& s) { s.head_dim_v = -8; }, {"head_dim_v -8", "0 stands for head_dim"});
  expect_bad_shape([](Shape& s) { s.head_dim_v = std::numeric_limits<std::int64_t>::max(); }, {"head_dim_v 92233"});
  expect_bad_shape([](Shape& s) { s.head_dim = std::numeric_limits<std::int64_t>::max(); }, {"head_dim 92233"});
}

TEST(Validate, Sinks) {
  const auto plan = Plan::create(method("pbs"), good_shape);
  std::vector<float> data(2 * 4 * 400 * 64), out(2 * 4 * 300 * 64);
  const auto view = [&](auto* at, std::int64_t tokens) {
    return BasicView<std::remove_pointer_t<decltype(at)>>{at, DType::f32, 4 * tokens * 64, tokens * 64, 64};
  };
  std::vector<std::byte> workspace(plan.workspace_size());
  const auto expect = [&](std::span<const float> sinks, const std::vector<std::string>& parts) {
    const ConstView in = view(static_cast<const void*>(data.data()), 400);
    expect_error(
        [&] {
          plan.run({.q = in, .k = in, .v = in, .sinks = sinks}, {.out = view(static_cast<void*>(out.data()), 300)},
                   workspace);
        },
        ErrorCode::invalid_argument, parts);
  };
  expect(std::span(data).first(3), {"sinks of 3 heads", "q_heads is 4", "or none"});
  expect(std::span(data).first(8), {"sinks of 8 heads"});
  expect({reinterpret_cast<const float*>(reinterpret_cast<const char*>(data.data()) + 1), 4}, {"sinks", "aligned"});
  expect(std::span(out).subspan(5, 4), {"out", "over sinks"});
}

TEST(Validate, WhatOnlyTheCpuRefuses) {
  Shape odd = good_shape;
  odd.head_dim = 100;
  expect_error([&] { Plan::create(method("pbs"), odd); }, ErrorCode::unsupported,
               {"head_dim 100", "multiples of 8", "Device::reference()"});
  odd.head_dim = 264;
  expect_error([&] { Plan::create(method("pbs"), odd); }, ErrorCode::unsupported, {"head_dim 264", "256"});
  EXPECT_NO_THROW(Plan::create(method("pbs"), odd, Device::reference()));
  odd = good_shape;
  odd.head_dim_v = 60;
  expect_error([&] { Plan::create(method("pbs"), odd); }, ErrorCode::unsupported,
               {"head_dim_v 60", "multiples of 8", "Device::reference()"});
  EXPECT_NO_THROW(Plan::create(method("pbs"), odd, Device::reference()));
  Options options = method("pbs");
  options.block = 48;
  options.segment = 96;
  expect_error([&] { Plan::create(options, good_shape); }, ErrorCode::unsupported, {"block 48", "multiples of 32"});
  EXPECT_NO_THROW(Plan::create(options, good_shape, Device::reference()));
}

TEST(Validate, Devices) {
  expect_error([] { Plan::create(method("pbs"), good_shape, Device::cpu(-1)); }, ErrorCode::invalid_argument,
               {"threads -1", "0"});
  expect_error([] { Plan::create(method("pbs"), good_shape, Device::cpu(10'000)); }, ErrorCode::invalid_argument,
               {"threads 10000", "8192"});
  EXPECT_NO_THROW(Plan::create(method("pbs"), good_shape, Device::cpu(3000)));
  expect_error(
      [] {
        Plan::create(method("pbs"), good_shape, {static_cast<Device::Kind>(77), 1});
      },
      ErrorCode::invalid_argument, {"device kind 77"});
}

// Pointers and strides are checked when a plan runs.
class ValidateRun : public testing::Test {
 protected:
  void expect_refused(ErrorCode code, const std::vector<std::string>& parts) {
    const Plan plan = Plan::create(method("pbs"), shape_);
    workspace_.resize(plan.workspace_size() + 1);
    expect_error(
        [&] {
          plan.run({.q = q_, .k = k_, .v = v_}, {.out = out_, .lse = lse_},
                   std::span(workspace_).first(plan.workspace_size() - missing_));
        },
        code, parts);
  }

  Shape shape_{.batch = 1, .q_heads = 2, .kv_heads = 1, .q_len = 4, .kv_len = 4, .head_dim = 8};
  std::vector<float> numbers_ = std::vector<float>(64 * 5);
  ConstView q_{numbers_.data(), DType::f32, 64, 32, 8};
  ConstView k_{numbers_.data(), DType::f32, 32, 32, 8};
  ConstView v_{numbers_.data(), DType::f32, 32, 32, 8};
  View out_{numbers_.data() + 128, DType::f32, 64, 32, 8};
  std::vector<std::byte> workspace_;
  float* lse_ = nullptr;
  std::size_t missing_ = 0;
};

TEST_F(ValidateRun, NullPointers) {
  q_.data = nullptr;
  expect_refused(ErrorCode::invalid_argument, {"q: null pointer", "1 x 2 x 4 x 8"});
  q_.data = numbers_.data();
  v_.data = nullptr;
  expect_refused(ErrorCode::invalid_argument, {"v: null pointer", "1 x 1 x 4 x 8"});
  v_.data = numbers_.data();
  out_.data = nullptr;
  expect_refused(ErrorCode::invalid_argument, {"out: null pointer"});
}

TEST_F(ValidateRun, Alignment) {
  k_.data = reinterpret_cast<const std::byte*>(numbers_.data()) + 1;
  expect_refused(ErrorCode::invalid_argument, {"k:", "not aligned", "4 bytes"});
  k_.data = numbers_.data();
  lse_ = reinterpret_cast<float*>(reinterpret_cast<std::byte*>(numbers_.data()) + 2);
  expect_refused(ErrorCode::invalid_argument, {"lse:", "not aligned", "4 bytes"});
}

TEST_F(ValidateRun, Strides) {
  out_.token_stride = 7;
  expect_refused(ErrorCode::invalid_argument, {"out: token stride 7", "head_dim_v 8", "overlap"});
  out_.token_stride = 8;
  q_.head_stride = -32;
  expect_refused(ErrorCode::invalid_argument, {"q: head stride -32", "negative"});
  q_.head_stride = 32;
  shape_.head_dim_v = 16;
  out_.token_stride = 16;
  out_.head_stride = 24;  // over the token after
  expect_refused(ErrorCode::invalid_argument, {"out: strides 64, 24 and 16", "head_dim_v 16", "over each other"});
}

TEST_F(ValidateRun, DTypes) {
  v_.dtype = static_cast<DType>(7);
  expect_refused(ErrorCode::invalid_argument, {"dtype 7"});
}

TEST_F(ValidateRun, WorkspaceTooSmall) {
  missing_ = 1;
  expect_refused(ErrorCode::out_of_memory, {"workspace of ", "workspace_size()", "cap"});
}

TEST(Validate, ACapTooSmallToPlanIn) {
  expect_error([] { Plan::create(method("pbs"), good_shape, Device::cpu(2), 1000); }, ErrorCode::out_of_memory,
               {"1000"});
}

}  // namespace
}  // namespace pbsattn
