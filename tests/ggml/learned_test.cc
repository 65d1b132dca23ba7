// Learned orders in the plug-in: whose file it is, how keys lie, and what its settings change.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "attention_graph.h"
#include "core/options/c_options.h"
#include "interface.h"
#include "support/learned.h"
#include "support/options.h"

namespace pbsattn::ggml::test {
namespace {

constexpr std::int64_t head_dim = 64, kv_heads = 2, q_heads = 4, layers = 5, features = 96;
constexpr std::size_t of_layer = kv_heads * features;

// Metadata of a file that the cases' ops fit.
pbsattn::test::Metadata metadata() {
  auto texts = pbsattn::test::learned_metadata();
  texts["layers"] = std::to_string(layers);
  texts["head_dim"] = std::to_string(head_dim);
  return texts;
}

class LearnedOrder : public testing::Test {
 protected:
  void SetUp() override {
    path_ = std::filesystem::path(testing::TempDir()) / "pbsattn-ggml-learned-test.pbs";
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (float& weight : weights_) weight = normal(random);
    Config config = default_config();
    set_method("pbs:permutation=learned:order_scope=kv_head:top_p=0.3:precision=f32", &config.options);
    ASSERT_TRUE(configure(config)) << ggml_backend_pbsattn_last_error();
    ggml_backend_pbsattn_stats_reset();
    ggml_log_set(&LearnedOrder::log, this);
  }
  void TearDown() override {
    ggml_backend_pbsattn_set_learned(nullptr, false);
    ggml_backend_pbsattn_set_layers(nullptr);
    ggml_backend_pbsattn_set_observer(nullptr, nullptr);
    ggml_log_set(nullptr, nullptr);
    std::filesystem::remove(path_);
  }

  bool give(const pbsattn::test::Metadata& texts, bool settings = false) {
    const std::int64_t count =
        std::stoll(texts.at("layers")) * std::stoll(texts.at("kv_heads")) * std::stoll(texts.at("head_dim")) * 3 / 2;
    std::ofstream(path_, std::ios::binary)
        << pbsattn::test::learned_file(texts, std::span(weights_).first(static_cast<std::size_t>(count)));
    return ggml_backend_pbsattn_set_learned(path_.c_str(), settings);
  }

  // Runs an op. Returns the reason for which ggml computed it, or TAKEN.
  ggml_pbsattn_reason reason_of(const Case& op) {
    ggml_backend_pbsattn_stats_reset();
    result_ = AttentionGraph(op).compute(Backends(true).all()).values;
    const auto stats = layer_stats();
    if (stats.size() != 1U) return GGML_PBSATTN_REASON_COUNT;
    for (int r = 0; r < GGML_PBSATTN_REASON_COUNT; ++r)
      if (stats[0].reasons[r] == 1) return static_cast<ggml_pbsattn_reason>(r);
    return GGML_PBSATTN_REASON_COUNT;
  }

  // Runs an op, and the library on the same tensors with these weights. Tells whether both give the same.
  bool equals_library(const Case& op, const std::vector<float>& weights, RopePairs pairs) {
    struct Check {
      const std::vector<float>& weights;
      RopePairs pairs;
      std::vector<float> out;
    } check{weights, pairs, {}};
    ggml_backend_pbsattn_set_observer(
        [](void* user, std::int32_t, const pbsattn_shape* shape, const pbsattn_view* q, const pbsattn_view* k,
           const pbsattn_view* v) {
          auto& made = *static_cast<Check*>(user);
          pbsattn_options options{.struct_size = sizeof options};
          ggml_pbsattn_config config{.struct_size = sizeof config, .options = &options};
          ASSERT_TRUE(ggml_backend_pbsattn_get_config(&config));
          const Plan plan = Plan::create(to_cpp(options), {.q_heads = shape->q_heads,
                                                           .kv_heads = shape->kv_heads,
                                                           .q_len = shape->q_len,
                                                           .kv_len = shape->kv_len,
                                                           .head_dim = shape->head_dim});
          const auto view = [](const pbsattn_view* from) {
            return ConstView{.data = from->data,
                             .dtype = static_cast<DType>(from->dtype),
                             .batch_stride = from->batch_stride,
                             .head_stride = from->head_stride,
                             .token_stride = from->token_stride};
          };
          made.out.resize(static_cast<std::size_t>(shape->q_heads * shape->q_len * shape->head_dim));
          std::vector<std::byte> workspace(plan.workspace_size());
          plan.run({.q = view(q), .k = view(k), .v = view(v), .order_weights = {made.weights, made.pairs}},
                   {.out = {.data = made.out.data(),
                            .head_stride = shape->head_dim,
                            .token_stride = shape->head_dim * shape->q_heads}},
                   workspace);
        },
        &check);
    EXPECT_EQ(reason_of(op), GGML_PBSATTN_TAKEN) << logged_;
    ggml_backend_pbsattn_set_observer(nullptr, nullptr);
    return check.out == result_;
  }

  std::vector<float> weights_of(std::size_t layer) const {
    return {weights_.begin() + static_cast<std::ptrdiff_t>(layer * of_layer),
            weights_.begin() + static_cast<std::ptrdiff_t>((layer + 1) * of_layer)};
  }

  static void log(ggml_log_level, const char* text, void* user) { static_cast<LearnedOrder*>(user)->logged_ += text; }

  std::filesystem::path path_;
  std::vector<float> weights_ = std::vector<float>(2 * layers * of_layer);
  std::vector<float> result_;
  std::string logged_;
};

constexpr std::int64_t tokens = 1024;

Case op_with(int mode) {
  return {.n_q = tokens, .n_kv = tokens, .rope_mode = mode};
}

TEST_F(LearnedOrder, KeysMoveByTheWeightsOfTheirLayer) {
  ASSERT_TRUE(give(metadata())) << ggml_backend_pbsattn_last_error();
  EXPECT_TRUE(equals_library(op_with(GGML_ROPE_TYPE_NEOX), weights_of(3), RopePairs::halves));
  EXPECT_FALSE(equals_library(op_with(GGML_ROPE_TYPE_NEOX), weights_of(2), RopePairs::halves));
  Case second = op_with(GGML_ROPE_TYPE_NEOX);
  second.cache_name = "cache_k_l2";
  EXPECT_TRUE(equals_library(second, weights_of(2), RopePairs::halves));
}

TEST_F(LearnedOrder, WeightsFollowTheModelsPairs) {
  const std::vector<float> halves = weights_of(3);
  std::vector<float> neighbours = halves;
  for (std::size_t head = 0; head < 2; ++head)
    for (std::size_t i = 0; i < 32; ++i) {
      neighbours[head * features + 32 + 2 * i] = halves[head * features + 32 + i];
      neighbours[head * features + 32 + 2 * i + 1] = halves[head * features + 64 + i];
    }
  ASSERT_TRUE(give(metadata()));
  EXPECT_TRUE(equals_library(op_with(GGML_ROPE_TYPE_NORMAL), neighbours, RopePairs::neighbours));
  EXPECT_FALSE(equals_library(op_with(GGML_ROPE_TYPE_NORMAL), halves, RopePairs::halves));
  for (const int mode : {GGML_ROPE_TYPE_MROPE, GGML_ROPE_TYPE_IMROPE})
    EXPECT_TRUE(equals_library(op_with(mode), halves, RopePairs::halves)) << mode;
  Case normed = op_with(GGML_ROPE_TYPE_NORMAL);
  normed.rope_normed = true;
  EXPECT_TRUE(equals_library(normed, neighbours, RopePairs::neighbours));
  auto texts = metadata();
  texts["pairs"] = "neighbours";
  ASSERT_TRUE(give(texts));
  EXPECT_TRUE(equals_library(op_with(GGML_ROPE_TYPE_NORMAL), halves, RopePairs::neighbours));
}

TEST_F(LearnedOrder, ColumnsThatStayLeaveEqualPairsAlone) {
  ASSERT_TRUE(give(metadata()));
  Case partly = op_with(GGML_ROPE_TYPE_NEOX);
  partly.rope_columns = 32;
  EXPECT_TRUE(equals_library(partly, weights_of(3), RopePairs::halves));
  partly.rope_mode = GGML_ROPE_TYPE_NORMAL;
  EXPECT_EQ(reason_of(partly), GGML_PBSATTN_PLAN_REFUSED);
  EXPECT_NE(logged_.find("its pairs are halves, the model's neighbours, of 32 columns alone"), std::string::npos)
      << logged_;
}

TEST_F(LearnedOrder, ALayerWithoutRopeHasThePairsOfTheOthers) {
  ASSERT_TRUE(give(metadata()));
  EXPECT_EQ(reason_of({.n_q = tokens, .n_kv = tokens}), GGML_PBSATTN_PLAN_REFUSED);
  EXPECT_NE(logged_.find("no RoPE is seen before this attention"), std::string::npos) << logged_;
  const Backends backends(true);
  ASSERT_EQ(AttentionGraph(op_with(GGML_ROPE_TYPE_NORMAL)).compute(backends.all()).status, GGML_STATUS_SUCCESS);
  ggml_backend_pbsattn_stats_reset();
  AttentionGraph({.n_q = tokens, .n_kv = tokens}).compute(backends.all());
  EXPECT_EQ(layer_stats()[0].reasons[GGML_PBSATTN_TAKEN], 1) << logged_;
}

TEST_F(LearnedOrder, AnotherModelsFileIsNamedAndLeftToGgml) {
  const std::pair<std::pair<std::string, std::string>, std::string> others[] = {
      {{"layers", "3"}, "has 3 layers, and this is the model's layer 3, counted from 0"},
      {{"query_heads", "6"}, "of tiny with 6 query heads, the model has 4"},
      {{"kv_heads", "4"}, "of tiny with 4 KV heads, the model has 2"},
      {{"head_dim", "32"}, "of tiny with 32 numbers in a head, the model has 64"}};
  const auto theirs = AttentionGraph(op_with(GGML_ROPE_TYPE_NEOX)).compute(Backends(false).all()).values;
  for (const auto& [changed, says] : others) {
    auto texts = metadata();
    texts[changed.first] = changed.second;
    ASSERT_TRUE(give(texts)) << ggml_backend_pbsattn_last_error();
    logged_.clear();
    EXPECT_EQ(reason_of(op_with(GGML_ROPE_TYPE_NEOX)), GGML_PBSATTN_PLAN_REFUSED);
    EXPECT_NE(logged_.find(path_.string() + ": " + says), std::string::npos) << logged_;
    EXPECT_EQ(result_, theirs);
  }
  ASSERT_TRUE(give(metadata()));
  Case unnamed = op_with(GGML_ROPE_TYPE_NEOX);
  unnamed.cache_name = "leaf_7";
  EXPECT_EQ(reason_of(unnamed), GGML_PBSATTN_PLAN_REFUSED);
  EXPECT_NE(logged_.find("doesn't tell its layer"), std::string::npos) << logged_;
}

TEST_F(LearnedOrder, WithoutAFileThereIsNone) {
  EXPECT_EQ(reason_of(op_with(GGML_ROPE_TYPE_NEOX)), GGML_PBSATTN_PLAN_REFUSED);
  EXPECT_NE(logged_.find("permutation learned: its weights are in a file; name it in PBSATTN_LEARNED"),
            std::string::npos)
      << logged_;
  EXPECT_FALSE(ggml_backend_pbsattn_set_learned("/nowhere/x.pbs", false));
  EXPECT_NE(std::string(ggml_backend_pbsattn_last_error()).find("/nowhere/x.pbs: can't be read"), std::string::npos);
}

TEST_F(LearnedOrder, TheFilesSettingsStandBetweenTheCallersOptionsAndLayers) {
  auto texts = metadata();
  texts["settings"] = R"({"3": {"*": {"keep": "all"}}})";
  ASSERT_TRUE(give(texts, true)) << ggml_backend_pbsattn_last_error();
  const auto visited = [&](const Case& op) {
    EXPECT_EQ(reason_of(op), GGML_PBSATTN_TAKEN) << logged_;
    return static_cast<double>(layer_stats()[0].visited_blocks) / static_cast<double>(layer_stats()[0].causal_blocks);
  };
  const Case third = op_with(GGML_ROPE_TYPE_NEOX);
  Case second = third;
  second.cache_name = "cache_k_l2";
  EXPECT_EQ(visited(third), 1.0);
  EXPECT_LT(visited(second), 1.0);
  ASSERT_TRUE(ggml_backend_pbsattn_set_layers(R"({"3": {"*": {"keep": "top_p"}}})"));
  EXPECT_LT(visited(third), 1.0);
  ASSERT_TRUE(ggml_backend_pbsattn_set_layers(nullptr));
  ASSERT_TRUE(give(texts, false));
  EXPECT_LT(visited(third), 1.0) << "the weights alone";
  texts["settings"] = R"({"3": {"*": {"keeps": "all"}}})";
  EXPECT_FALSE(give(texts, true));
  EXPECT_NE(std::string(ggml_backend_pbsattn_last_error()).find("settings: layer 3, head *: option \"keeps\""),
            std::string::npos)
      << ggml_backend_pbsattn_last_error();
}

TEST_F(LearnedOrder, VariablesStandOverTheFilesSettings) {
  auto texts = metadata();
  texts["settings"] = R"({"*": {"*": {"top_p": 0.5, "sink_blocks": 3}}, "1": {"*": {"method": "full"}}})";
  ASSERT_TRUE(give(texts));
  const auto options = [&](std::map<std::string, std::string> variables, std::int32_t layer) {
    variables["PBSATTN_LEARNED"] = path_.string();
    std::string error;
    const Settings settings = read_environment(
        [&](const char* name) {
          const auto found = variables.find(name);
          return found == variables.end() ? nullptr : found->second.c_str();
        },
        &error);
    EXPECT_EQ(error, "");
    auto heads = settings.learned->heads(layer, q_heads, {settings.config.options});
    if (settings.layers != nullptr) heads = settings.layers->heads(layer, q_heads, heads);
    EXPECT_EQ(heads.size(), 1U);
    return to_cpp(heads.front());
  };
  EXPECT_EQ(options({}, 0).permutation, Permutation::learned);
  EXPECT_EQ(options({}, 0).top_p, 0.5F);
  EXPECT_EQ(options({}, 0).sink_blocks, 3);
  EXPECT_EQ(options({}, 0).precision, Precision::bf16);
  EXPECT_EQ(options({}, 0).fallback, Fallback::when_faster);
  EXPECT_TRUE(pbsattn::test::same(options({{"PBSATTN_METHOD", "auto"}}, 0), options({}, 0)));
  EXPECT_EQ(options({{"PBSATTN_METHOD", "auto:top_p=0.25"}}, 0).top_p, 0.25F);
  EXPECT_EQ(options({{"PBSATTN_METHOD", "auto:top_p=0.25"}}, 0).sink_blocks, 3);
  EXPECT_EQ(options({{"PBSATTN_METHOD", "auto:top_p=0.25"}, {"PBSATTN_TOP_P", "0.75"}}, 0).top_p, 0.75F);
  EXPECT_EQ(options({{"PBSATTN_METHOD", "two-step"}}, 0).permutation, Permutation::none)
      << "a method names all options";
  EXPECT_EQ(options({{"PBSATTN_METHOD", "two-step"}}, 0).sink_blocks, 0);
  EXPECT_EQ(options({}, 1).keep, KeepRule::all);
  EXPECT_EQ(options({{"PBSATTN_TOP_P", "0.75"}}, 0).top_p, 0.75F);
  EXPECT_EQ(options({{"PBSATTN_TOP_P", "0.75"}}, 0).sink_blocks, 3);
  const auto file = std::filesystem::path(testing::TempDir()) / "pbsattn-ggml-learned-test.json";
  std::ofstream(file) << R"({"0": {"*": {"top_p": 0.25}}})";
  const std::map<std::string, std::string> both{{"PBSATTN_TOP_P", "0.75"}, {"PBSATTN_SETTINGS", file.string()}};
  EXPECT_EQ(options(both, 0).top_p, 0.25F);
  EXPECT_EQ(options(both, 2).top_p, 0.75F);
  std::filesystem::remove(file);
  const std::string method = "two-step:permutation=learned:order_scope=kv_head";
  EXPECT_EQ(options({{"PBSATTN_METHOD", method}}, 1).keep, KeepRule::threshold) << "a method names all options";
  EXPECT_EQ(options({{"PBSATTN_METHOD", method}}, 0).sink_blocks, 0);
}

TEST_F(LearnedOrder, ABadFileTurnsThePlugInOff) {
  std::ofstream(path_) << "nothing";
  std::string error;
  const std::string text = path_.string();
  const Settings settings = read_environment(
      [&](const char* name) { return std::string_view(name) == "PBSATTN_LEARNED" ? text.c_str() : nullptr; }, &error);
  EXPECT_EQ(settings.config.mode, GGML_PBSATTN_MODE_OFF);
  EXPECT_EQ(error.find("PBSATTN_LEARNED " + text + ": 7 bytes: shorter than the 8"), 0U) << error;
}

}  // namespace
}  // namespace pbsattn::ggml::test
