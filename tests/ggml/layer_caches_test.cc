// What layers keep from micro-batch to micro-batch serves only while every key and value of it is what it was.
#include "layer_caches.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "attention_graph.h"
#include "interface.h"

namespace pbsattn::ggml::test {
namespace {

constexpr std::int64_t heads = 2, dim = 8, tokens = 700, queries = 100, segment = 256;
constexpr std::size_t plenty = std::size_t{1} << 30;

// Where rows lie: strides from head to head and from token to token, in elements.
struct Strides {
  std::int64_t head, token;
};
constexpr std::array layouts{
    Strides{dim, heads* dim},             // llama.cpp's
    Strides{dim, heads* dim + 3},         // a gap after each token
    Strides{tokens * dim, dim},           // heads first
    Strides{tokens * (dim + 1), dim + 1}  // and a gap after each row
};

class Kept : public testing::TestWithParam<Strides> {
 protected:
  Kept() {
    double angle = 0;
    for (auto* values : {&q_, &k_, &v_}) {
      values->resize(static_cast<std::size_t>(heads * tokens * (dim + 3)));
      for (float& value : *values) value = static_cast<float>(2 * std::sin(angle += 1.7));
    }
    pbsattn_options options{.struct_size = sizeof options};
    EXPECT_EQ(pbsattn_method("two-step", &options), PBSATTN_OK);
    const pbsattn_device device{.struct_size = sizeof device, .threads = 1};
    pbsattn_plan* plan = nullptr;
    EXPECT_EQ(pbsattn_plan_create(&options, &shape_, &device, SIZE_MAX, &plan), PBSATTN_OK);
    plan_.reset(plan);
    workspace_.resize(pbsattn_plan_workspace_size(plan));
    out_.resize(static_cast<std::size_t>(heads * queries * dim));
  }

  LayerCaches::Call call(std::int32_t layer = 0) const {
    return {.layer = layer,
            .plan = plan_.get(),
            .shape = shape_,
            .k = &k_view_,
            .v = &v_view_,
            .most_tokens = tokens,
            .order_weights = weights_,
            .pairs = 0,
            .threads = 2};
  }

  // Runs a layer's call with what is kept. Returns how many tokens of it served.
  std::int64_t run(LayerCaches& caches, std::size_t cap = plenty, std::int32_t layer = 0) {
    const LayerCaches::Use use = caches.before(call(layer), cap);
    pbsattn_view q{.struct_size = sizeof q, .data = q_.data(), .head_stride = queries * dim, .token_stride = dim};
    pbsattn_view out = q;
    out.data = out_.data();
    const pbsattn_run run{.struct_size = sizeof run,
                          .q = &q,
                          .k = &k_view_,
                          .v = &v_view_,
                          .out = &out,
                          .workspace = workspace_.data(),
                          .workspace_size = workspace_.size(),
                          .cache = use.cache,
                          .cache_valid = use.valid};
    EXPECT_EQ(pbsattn_plan_run(plan_.get(), &run), PBSATTN_OK) << pbsattn_last_error();
    caches.after(call(layer), use);
    return use.cache == nullptr ? -1 : use.valid;
  }

  void lay_out(const Strides& strides) {
    for (pbsattn_view* view : {&k_view_, &v_view_}) {
      view->head_stride = strides.head;
      view->token_stride = strides.token;
    }
  }

  struct Destroy {
    void operator()(pbsattn_plan* plan) const { pbsattn_plan_destroy(plan); }
  };
  pbsattn_shape shape_{.struct_size = sizeof(pbsattn_shape),
                       .batch = 1,
                       .q_heads = heads,
                       .kv_heads = heads,
                       .q_len = queries,
                       .kv_len = tokens,
                       .head_dim = dim};
  std::unique_ptr<pbsattn_plan, Destroy> plan_;
  std::vector<float> q_, k_, v_, out_, weights_;
  std::vector<std::byte> workspace_;
  pbsattn_view k_view_{.struct_size = sizeof(pbsattn_view),
                       .data = k_.data(),
                       .head_stride = dim,
                       .token_stride = heads * dim,
                       .dtype = PBSATTN_F32};
  pbsattn_view v_view_ = k_view_;
};

TEST_P(Kept, ServesUpToTheSegmentOfTheFirstChange) {
  k_view_.data = k_.data();
  v_view_.data = v_.data();
  lay_out(GetParam());
  LayerCaches caches;
  EXPECT_EQ(run(caches), 0);
  EXPECT_EQ(run(caches), 2 * segment);
  for (std::int64_t token = 0; token < tokens; ++token)
    for (auto* values : {&k_, &v_}) {
      const std::int64_t element = token % heads * GetParam().head + token * GetParam().token + token % dim;
      float& value = (*values)[static_cast<std::size_t>(element)];
      std::uint32_t bits = 0;
      std::memcpy(&bits, &value, sizeof bits);
      bits ^= 1;  // the lowest there is
      std::memcpy(&value, &bits, sizeof bits);
      ASSERT_EQ(run(caches), std::min(token / segment, std::int64_t{2}) * segment) << token;
      const std::vector<float> cached = out_;
      LayerCaches none;
      run(none);
      ASSERT_EQ(cached, out_) << token;
    }
  EXPECT_EQ(run(caches), 2 * segment) << "and again while nothing changes";
}
INSTANTIATE_TEST_SUITE_P(, Kept, testing::ValuesIn(layouts),
                         [](const auto& test) { return "Layout" + std::to_string(test.index); });

using KeptWithin = Kept;

TEST_P(KeptWithin, ABoundOfMemory) {
  k_view_.data = k_.data();
  v_view_.data = v_.data();
  std::size_t size = 0;
  ASSERT_EQ(pbsattn_plan_cache_size(plan_.get(), tokens, &size), PBSATTN_OK);
  LayerCaches caches;
  EXPECT_EQ(run(caches, size - 1), -1);
  EXPECT_EQ(run(caches, 2 * size - 1, 1), 0) << "the first layer to come has one";
  EXPECT_EQ(run(caches, 2 * size - 1, 0), -1);
  EXPECT_EQ(run(caches, 2 * size - 1, 1), 2 * segment);
  EXPECT_EQ(run(caches, 2 * size, 0), 0);
  EXPECT_EQ(run(caches, 0, 2), -1);
  EXPECT_EQ(run(caches, plenty, -1), -1) << "an op that doesn't tell its layer";
  weights_ = {1, 2, 3};
  EXPECT_EQ(run(caches, 2 * size, 0), 0) << "another order";
  EXPECT_EQ(run(caches, 2 * size, 0), 2 * segment);
}

TEST_P(KeptWithin, CallsThatContinue) {
  shape_.q_len = tokens;
  EXPECT_EQ(LayerCaches().before(call(), plenty).cache, nullptr) << "a whole prompt keeps nothing";
  shape_.q_len = tokens - segment + 1;
  EXPECT_EQ(LayerCaches().before(call(), plenty).cache, nullptr);
  shape_.q_len = tokens - segment;
  EXPECT_NE(LayerCaches().before(call(), plenty).cache, nullptr);
}
INSTANTIATE_TEST_SUITE_P(, KeptWithin, testing::Values(layouts[0]));

// Through ggml: a context's second call finds what the first left, and a changed cache behind the same pointers is
// seen.
TEST(KeptOfAContext, ChangedKeysAndValuesAreSeen) {
  Config config = default_config();
  ASSERT_EQ(pbsattn_method("two-step", &config.options), PBSATTN_OK);
  ASSERT_TRUE(configure(config)) << ggml_backend_pbsattn_last_error();
  const AttentionGraph graph({.q_heads = 2, .kv_heads = 1, .n_q = 512, .n_kv = 1536, .offset = 1000});
  const Backends context(true);
  const auto first = graph.compute(context.all());
  EXPECT_EQ(graph.compute(context.all()).values, first.values);
  std::vector<float> last = first.values;
  for (std::int64_t token = 3; token < 1512; token += 149)  // in every segment
    for (const int source : {1, 2}) {
      auto* const half = static_cast<std::uint16_t*>(graph.op()->src[source]->data) + token * 64 + token % 64;
      *half = 0x4500;  // 5
      const auto seen = graph.compute(context.all());
      ASSERT_EQ(seen.status, GGML_STATUS_SUCCESS);
      EXPECT_NE(seen.values, last) << token;
      EXPECT_EQ(seen.values, graph.compute(Backends(true).all()).values) << token;
      last = seen.values;
    }
}

TEST(KeptOfAContext, WindowsLeaveItAlone) {
  Config config = default_config();
  ASSERT_EQ(pbsattn_method("two-step", &config.options), PBSATTN_OK);
  ASSERT_TRUE(configure(config)) << ggml_backend_pbsattn_last_error();
  AttentionGraph graph({.q_heads = 2, .kv_heads = 1, .n_q = 512, .n_kv = 1536, .offset = 1000});
  const Visible causal = [](std::int64_t i, std::int64_t j) { return j <= 1000 + i; };
  const Visible window = [](std::int64_t i, std::int64_t j) { return j <= 1000 + i && 1000 + i - j < 300; };
  const Backends context(true);
  for (int round = 0; round < 3; ++round) {
    for (const Visible& visible : {causal, window}) {
      graph.set_mask(visible);
      EXPECT_EQ(graph.compute(context.all()).values, graph.compute(Backends(true).all()).values) << round;
    }
    auto* const half = static_cast<std::uint16_t*>(graph.op()->src[1]->data) + (900 - round * 300) * 64;
    *half = 0x4500;  // 5, while the window's layer is the last to have run
  }
}

}  // namespace
}  // namespace pbsattn::ggml::test
