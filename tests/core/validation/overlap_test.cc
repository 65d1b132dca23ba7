// What a run writes lies apart from what it reads: found exactly, so that slices of one packed tensor pass.
#include "core/validation/overlap.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn {
namespace {

// Bytes that a region takes, one count for each row that has them.
std::vector<int> counts(const Region& region) {
  std::vector<int> bytes(1000);
  const auto& [batch, head, token] = region.axes;
  for (std::int64_t b = 0; b < batch.extent; ++b)
    for (std::int64_t h = 0; h < head.extent; ++h)
      for (std::int64_t t = 0; t < token.extent; ++t)
        for (std::int64_t i = 0; i < region.row_bytes; ++i)
          ++bytes.at(region.begin + b * batch.stride + h * head.stride + t * token.stride + i);
  return bytes;
}

TEST(Overlap, IsExact) {
  std::mt19937 engine(1);
  const auto below = [&](unsigned end) { return static_cast<std::int64_t>(engine() % end); };
  const auto random = [&] {
    Region region{.begin = static_cast<std::uintptr_t>(below(60)), .row_bytes = 1 + below(6)};
    for (auto& axis : region.axes) axis = {.stride = below(30), .extent = 1 + below(4)};
    return region;
  };
  int overlapping = 0;
  int folded = 0;
  constexpr int pairs = 20'000;
  for (int i = 0; i < pairs; ++i) {
    const Region a = random();
    const Region b = random();
    const auto of_a = counts(a);
    const auto of_b = counts(b);
    bool shared = false;
    bool twice = false;
    for (std::size_t byte = 0; byte < of_a.size(); ++byte) {
      shared |= of_a[byte] > 0 && of_b[byte] > 0;
      twice |= of_a[byte] > 1;
    }
    ASSERT_EQ(overlap(a, b), shared) << i;
    ASSERT_EQ(overlap(b, a), shared) << i;
    ASSERT_EQ(overlaps_itself(a), twice) << i;
    overlapping += shared ? 1 : 0;
    folded += twice ? 1 : 0;
  }
  EXPECT_GT(overlapping, pairs / 10);
  EXPECT_LT(overlapping, pairs - pairs / 10);
  EXPECT_GT(folded, pairs / 10);
  EXPECT_LT(folded, pairs - pairs / 10);
}

// Long tensors whose rows lie between each other's cost a few steps; only layouts without any order cost many, which
// are limited, and what isn't known to be apart then counts as overlapping.
TEST(Overlap, LongTensors) {
  constexpr std::int64_t tokens = 1 << 20;
  constexpr std::int64_t row = 256;
  constexpr std::int64_t heads = 32 + 2 * 8;
  const auto slice = [](std::int64_t first, std::int64_t count) {
    return Region{.begin = static_cast<std::uintptr_t>(1'000'000 + first * row),
                  .row_bytes = row,
                  .axes = {{{tokens * heads * row, 2}, {row, count}, {heads * row, tokens}}}};
  };
  EXPECT_FALSE(overlaps_itself(slice(0, 32)));
  EXPECT_FALSE(overlap(slice(0, 32), slice(32, 8)));
  EXPECT_FALSE(overlap(slice(0, 32), slice(40, 8)));
  EXPECT_TRUE(overlap(slice(0, 33), slice(32, 8)));
  EXPECT_TRUE(overlap(slice(0, 32), slice(heads + 31, 8)));
  EXPECT_TRUE(overlaps_itself(slice(0, heads + 1)));
  Region odd = slice(0, 1);
  odd.row_bytes = 1;
  odd.axes = {{{1'000'003, 1 << 20}, {999'983, 1 << 20}, {3, 1}}};
  Region other = odd;
  other.begin += 1;
  other.axes = {{{1'000'033, 1 << 20}, {999'979, 1 << 20}, {5, 1}}};
  EXPECT_TRUE(overlap(odd, other));
}

const Shape shape{.batch = 2, .q_heads = 4, .kv_heads = 2, .q_len = 100, .kv_len = 100, .head_dim = 64};

ConstView read_only(const View& view) {
  return {view.data, view.dtype, view.batch_stride, view.head_stride, view.token_stride};
}

// Tensors of a call, [batch][head][token][head_dim], with room after each.
struct Call {
  Call() {
    std::mt19937 engine(3);
    for (auto* numbers : {&q, &k, &v})
      for (float& x : *numbers) x = static_cast<float>(engine() % 1000) / 500 - 1;
  }
  static View view(std::vector<float>& numbers, std::int64_t heads) {
    return {numbers.data(), DType::f32, heads * 100 * 64, 100 * 64, 64};
  }
  void run(const Device& device = Device::cpu(2)) {
    const Plan plan = Plan::create(method("full"), shape, device);
    if (workspace.empty()) {
      own.resize(plan.workspace_size());
      workspace = own;
    }
    plan.run({.q = read_only(q_view), .k = read_only(k_view), .v = read_only(v_view)}, {.out = out_view, .lse = lse},
             workspace);
  }
  std::string refusal() {
    try {
      run();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument) << error.what();
      return error.what();
    }
    return "ran";
  }

  static constexpr std::size_t q_size = 2 * 4 * 100 * 64;
  std::vector<float> q = std::vector<float>(2 * q_size), k = std::vector<float>(q_size),
                     v = std::vector<float>(2 * q_size), out = std::vector<float>(2 * q_size);
  View q_view = view(q, 4), k_view = view(k, 2), v_view = view(v, 2), out_view = view(out, 4);
  float* lse = nullptr;
  std::vector<std::byte> own;
  std::span<std::byte> workspace;
};

TEST(Overlap, OutOverItselfIsRefused) {
  Call call;
  call.out_view.head_stride = 64;  // as the tokens
  EXPECT_NE(call.refusal().find("out: strides 25600, 64 and 64 of batch, head and token"), std::string::npos);
  call = {};
  call.out_view.batch_stride = 100 * 64;  // as the heads
  EXPECT_NE(call.refusal().find("memory of their own"), std::string::npos);
  call = {};
  call.out_view.head_stride = 99 * 64;  // the last token is the next head's first
  EXPECT_NE(call.refusal().find("memory of their own"), std::string::npos);
  call = {};
  call.out_view = {call.out.data(), DType::f32, 4 * 100 * 64, 64, 4 * 64};  // tokens outside heads
  EXPECT_EQ(call.refusal(), "ran");
  call = {};
  call.out_view = {call.out.data(), DType::f32, 64, 2 * 100 * 64, 2 * 64};  // batch entries between tokens
  EXPECT_EQ(call.refusal(), "ran");
}

TEST(Overlap, OutOverInputsIsRefused) {
  Call call;
  call.out_view = call.q_view;
  EXPECT_NE(call.refusal().find("over q at 0x"), std::string::npos);
  call = {};
  call.k_view.data = call.out.data() + 2 * call.q_size - 2 * 2 * 100 * 64;  // beyond out's end
  EXPECT_EQ(call.refusal(), "ran");
  call.k_view.data = call.out.data() + call.q_size - 1;  // on its last element
  EXPECT_NE(call.refusal().find("out: at 0x"), std::string::npos);
  call = {};
  call.out_view = Call::view(call.v, 4);
  EXPECT_NE(call.refusal().find("over v at 0x"), std::string::npos);
  // As v is head by head, and out token by token, a run under a cap would write over values that it needs.
  call = {};
  call.out_view = {call.v.data(), DType::f32, 4 * 100 * 64, 64, 4 * 64};
  EXPECT_NE(call.refusal().find("pass memory that they don't share"), std::string::npos);
}

TEST(Overlap, LogSumExpAndWorkspaceAreTensorsToo) {
  Call call;
  call.lse = call.out.data() + 5;
  EXPECT_NE(call.refusal().find("out: at 0x"), std::string::npos);
  call.lse = call.q.data() + 5;
  EXPECT_NE(call.refusal().find("lse: at 0x"), std::string::npos);
  call.lse = call.out.data() + call.q_size;  // right after out
  EXPECT_EQ(call.refusal(), "ran");
  call = {};
  const std::size_t size = Plan::create(method("full"), shape, Device::cpu(2)).workspace_size();
  std::vector<std::byte> memory(size + Call::q_size * sizeof(float));
  call.workspace = memory;
  call.k_view.data = memory.data() + size / 8 * 4;
  EXPECT_NE(call.refusal().find("workspace: at 0x"), std::string::npos);
  // What the plan leaves of a larger workspace is free.
  call.k_view.data = memory.data() + (size + 3) / 4 * 4;
  EXPECT_EQ(call.refusal(), "ran");
}

TEST(Overlap, InputsMayShareMemory) {
  Call call;
  call.v_view = call.k_view;
  EXPECT_EQ(call.refusal(), "ran");
  call.q_view = {call.k.data(), DType::f32, 0, 0, 0};
  EXPECT_EQ(call.refusal(), "ran");
}

// One tensor [token][q heads, KV heads twice, q heads][head_dim] holds q, k, v and out.
TEST(Overlap, SlicesOfAPackedTensorPass) {
  for (const Device& device : {Device::cpu(2), Device::reference()}) {
    Call apart;
    apart.run(device);
    std::vector<float> packed(2 * 100 * 12 * 64);
    const auto slice = [&](std::int64_t head) {
      return View{packed.data() + head * 64, DType::f32, 100 * 12 * 64, 64, 12 * 64};
    };
    const auto fill = [&](const View& to, const View& from, std::int64_t heads) {
      for (std::int64_t b = 0; b < 2; ++b)
        for (std::int64_t h = 0; h < heads; ++h)
          for (std::int64_t t = 0; t < 100; ++t)
            std::memcpy(
                static_cast<float*>(to.data) + b * to.batch_stride + h * to.head_stride + t * to.token_stride,
                static_cast<float*>(from.data) + b * from.batch_stride + h * from.head_stride + t * from.token_stride,
                64 * sizeof(float));
    };
    Call call;
    call.q_view = slice(0);
    call.k_view = slice(4);
    call.v_view = slice(6);
    call.out_view = slice(8);
    fill(call.q_view, apart.q_view, 4);
    fill(call.k_view, apart.k_view, 2);
    fill(call.v_view, apart.v_view, 2);
    call.run(device);
    std::vector<float> out(apart.out.size());
    fill(Call::view(out, 4), call.out_view, 4);
    EXPECT_EQ(out, apart.out);
    call.out_view = slice(7);
    EXPECT_NE(call.refusal().find("over v"), std::string::npos);
    call.out_view = {packed.data() + 8 * 64 - 1, DType::f32, 100 * 12 * 64, 64, 12 * 64};
    EXPECT_NE(call.refusal().find("over v"), std::string::npos);
  }
}

TEST(Overlap, StridesBeyondMemoryAreRefused) {
  Call call;
  call.q_view.batch_stride = std::int64_t{1} << 62;
  EXPECT_NE(call.refusal().find("q: batch stride 4611686018427387904"), std::string::npos);
  call = {};
  call.out_view.token_stride = INT64_MAX;
  EXPECT_NE(call.refusal().find("out: token stride 9223372036854775807"), std::string::npos);
}

}  // namespace
}  // namespace pbsattn
