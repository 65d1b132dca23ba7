// Programs compiled with another version of ggml-pbsattn.h: with 0.2, whose structs are kept here, and with a later
// one.
#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <string>

#include "attention_graph.h"
#include "interface.h"

namespace pbsattn::ggml::test {
namespace {

// ------------------------------------------------------------------------------------- kept as they were; never edited

struct Config02 {
  std::size_t struct_size;
  void* options;
  std::int64_t min_tokens;
  std::size_t workspace_cap;
  std::int32_t mode, device, check, reserved;
};

struct LayerStats02 {
  std::size_t struct_size;
  std::int32_t layer, reserved;
  std::int64_t calls, q_len, kv_len, queries, visited_blocks, causal_blocks;
  double permute_seconds, select_seconds, attend_seconds, mask_seconds, total_seconds;
  std::int64_t reasons[32];
  std::int64_t checks;
  double check_max_abs, check_rel_rms;
};

#define SAME_PLACE(now, then, field) \
  static_assert(offsetof(now, field) == offsetof(then, field) && sizeof(now::field) == sizeof(then::field))
#define SAME_PLACE_CONFIG(field) SAME_PLACE(ggml_pbsattn_config, Config02, field)
#define SAME_PLACE_STATS(field) SAME_PLACE(ggml_pbsattn_layer_stats, LayerStats02, field)
static_assert(sizeof(ggml_pbsattn_config) >= sizeof(Config02));
static_assert(sizeof(ggml_pbsattn_layer_stats) >= sizeof(LayerStats02));
SAME_PLACE_CONFIG(struct_size);
SAME_PLACE_CONFIG(options);
SAME_PLACE_CONFIG(min_tokens);
SAME_PLACE_CONFIG(workspace_cap);
SAME_PLACE_CONFIG(mode);
SAME_PLACE_CONFIG(device);
SAME_PLACE_CONFIG(check);
SAME_PLACE_CONFIG(reserved);
SAME_PLACE_STATS(struct_size);
SAME_PLACE_STATS(layer);
SAME_PLACE_STATS(reserved);
SAME_PLACE_STATS(calls);
SAME_PLACE_STATS(q_len);
SAME_PLACE_STATS(kv_len);
SAME_PLACE_STATS(queries);
SAME_PLACE_STATS(visited_blocks);
SAME_PLACE_STATS(causal_blocks);
SAME_PLACE_STATS(permute_seconds);
SAME_PLACE_STATS(select_seconds);
SAME_PLACE_STATS(attend_seconds);
SAME_PLACE_STATS(mask_seconds);
SAME_PLACE_STATS(total_seconds);
SAME_PLACE_STATS(reasons);
SAME_PLACE_STATS(checks);
SAME_PLACE_STATS(check_max_abs);
SAME_PLACE_STATS(check_rel_rms);
static_assert(GGML_PBSATTN_MODE_OFF == 0 && GGML_PBSATTN_MODE_PBSATTN == 1 && GGML_PBSATTN_MODE_GGML == 2);
static_assert(GGML_PBSATTN_TAKEN == 0 && GGML_PBSATTN_BY_MODE == 1 && GGML_PBSATTN_FEW_TOKENS == 2 &&
              GGML_PBSATTN_TYPES == 3 && GGML_PBSATTN_HEAD_DIM == 4 && GGML_PBSATTN_LAYOUT == 5 &&
              GGML_PBSATTN_SINKS == 6 && GGML_PBSATTN_SOFT_CAP == 7 && GGML_PBSATTN_ALIBI == 8 &&
              GGML_PBSATTN_TOP_K == 9 && GGML_PBSATTN_NO_MASK == 10 && GGML_PBSATTN_MASK_NOT_CAUSAL == 11 &&
              GGML_PBSATTN_PLAN_REFUSED == 12 && GGML_PBSATTN_RUN_FAILED == 13);

// ----------------------------------------------------------------------------------------------------------------
// tests

// A struct as a later header has it.
template <class T>
struct Later {
  T known;
  std::array<unsigned char, 16> added;
};

// A struct of any version, as the plug-in gets it.
template <class T, class Version>
T* as(Version& version) {
  void* address = &version;
  return static_cast<T*>(address);
}

bool says(const std::string& text) {
  return std::string(ggml_backend_pbsattn_last_error()).find(text) != std::string::npos;
}

class GgmlAbi : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(configure(default_config()));
    ggml_backend_pbsattn_stats_reset();
  }
};

TEST_F(GgmlAbi, AProgramOfVersion02) {
  pbsattn_options options{.struct_size = sizeof options};
  Config02 config{.struct_size = sizeof config, .options = &options};
  ASSERT_TRUE(ggml_backend_pbsattn_get_config(as<ggml_pbsattn_config>(config)));
  EXPECT_EQ(config.struct_size, sizeof config);
  EXPECT_EQ(config.min_tokens, 512);
  EXPECT_EQ(config.mode, 1);
  EXPECT_EQ(options.top_p, 0.9F);
  options.top_p = 1.0F;
  config.min_tokens = 300;
  ASSERT_TRUE(ggml_backend_pbsattn_configure(as<ggml_pbsattn_config>(config))) << ggml_backend_pbsattn_last_error();

  AttentionGraph({.n_q = 400, .n_kv = 512}).compute(Backends(true).all());
  std::array<LayerStats02, 2> layers{};
  for (LayerStats02& layer : layers) layer.struct_size = sizeof layer;
  EXPECT_EQ(ggml_backend_pbsattn_stats_get(as<ggml_pbsattn_layer_stats>(layers), layers.size()), 1U);
  EXPECT_EQ(layers[0].layer, 3);
  EXPECT_EQ(layers[0].reasons[GGML_PBSATTN_TAKEN], 1);
  EXPECT_GT(layers[0].visited_blocks, 0);
  EXPECT_EQ(layers[0].visited_blocks, layers[0].causal_blocks) << "at top_p 1";
}

TEST_F(GgmlAbi, ALaterProgramWhileItSetsNothingNew) {
  Later<ggml_pbsattn_config> config{};
  config.known.struct_size = sizeof config;
  config.added.fill(1);
  ASSERT_TRUE(ggml_backend_pbsattn_get_config(&config.known) == false && says("config: a field after reserved is set"));
  config.added.fill(0);
  ASSERT_TRUE(ggml_backend_pbsattn_get_config(&config.known)) << ggml_backend_pbsattn_last_error();
  EXPECT_EQ(config.known.struct_size, sizeof config);
  EXPECT_EQ(config.known.options, nullptr);
  EXPECT_TRUE(ggml_backend_pbsattn_configure(&config.known));
  Later<pbsattn_options> options{};
  options.known.struct_size = sizeof options;
  config.known.options = &options.known;
  ASSERT_TRUE(ggml_backend_pbsattn_get_config(&config.known));
  EXPECT_TRUE(ggml_backend_pbsattn_configure(&config.known));
  options.added.back() = 1;
  EXPECT_FALSE(ggml_backend_pbsattn_configure(&config.known));
  EXPECT_TRUE(says("config.options: a field after two_step_reach is set"));
  options.added.back() = 0;
  config.added.back() = 1;
  EXPECT_FALSE(ggml_backend_pbsattn_configure(&config.known));
  EXPECT_TRUE(says("config: a field after reserved is set that pbsattn ")) << ggml_backend_pbsattn_last_error();

  AttentionGraph({}).compute(Backends(true).all());
  AttentionGraph({.cache_name = "cache_k_l4"}).compute(Backends(true).all());
  std::array<Later<ggml_pbsattn_layer_stats>, 2> layers{};
  for (auto& layer : layers) {
    layer.known.struct_size = sizeof layer;
    layer.added.fill(1);
  }
  EXPECT_EQ(ggml_backend_pbsattn_stats_get(&layers[0].known, layers.size()), 2U);
  EXPECT_EQ(layers[0].known.layer, 3);
  EXPECT_EQ(layers[1].known.layer, 4);
  EXPECT_EQ(layers[1].added.back(), 0);
}

TEST_F(GgmlAbi, ASizeThatNobodySetIsRefused) {
  for (const std::size_t size : {std::size_t{0}, std::size_t{8}, SIZE_MAX}) {
    const std::string named = ".struct_size " + std::to_string(size) + ": ";
    pbsattn_options options{.struct_size = sizeof options};
    ggml_pbsattn_config config{.struct_size = size};
    EXPECT_FALSE(ggml_backend_pbsattn_get_config(&config));
    EXPECT_TRUE(says("config" + named) && says("sizeof(ggml_pbsattn_config)")) << ggml_backend_pbsattn_last_error();
    EXPECT_FALSE(ggml_backend_pbsattn_configure(&config));
    EXPECT_TRUE(says("config" + named));
    config.struct_size = sizeof config;
    ASSERT_TRUE(ggml_backend_pbsattn_get_config(&config));
    config.options = &options;
    options.struct_size = size;
    EXPECT_FALSE(ggml_backend_pbsattn_configure(&config));
    EXPECT_TRUE(says("config.options" + named) && says("sizeof(pbsattn_options)"));
    EXPECT_FALSE(ggml_backend_pbsattn_get_config(&config));
    std::array<ggml_pbsattn_layer_stats, 2> layers{};
    for (auto& layer : layers) layer.struct_size = size;
    EXPECT_EQ(ggml_backend_pbsattn_stats_get(layers.data(), layers.size()), SIZE_MAX);
    EXPECT_TRUE(says("layers[0]" + named) && says("sizeof(ggml_pbsattn_layer_stats)"));
    layers[0].struct_size = sizeof layers[0];
    EXPECT_EQ(ggml_backend_pbsattn_stats_get(layers.data(), layers.size()), SIZE_MAX);
    EXPECT_TRUE(says("layers[1]" + named));
  }
  EXPECT_FALSE(ggml_backend_pbsattn_get_config(nullptr));
  EXPECT_TRUE(says("config: null pointer"));
  EXPECT_FALSE(ggml_backend_pbsattn_configure(nullptr));
}

TEST_F(GgmlAbi, WhatIsNeitherOneNorZeroIsRefused) {
  ggml_pbsattn_config config{.struct_size = sizeof config};
  ASSERT_TRUE(ggml_backend_pbsattn_get_config(&config));
  config.check = 2;
  EXPECT_FALSE(ggml_backend_pbsattn_configure(&config));
  EXPECT_TRUE(says("config.check 2: "));
  config.check = 0;
  config.reserved = 1;
  EXPECT_FALSE(ggml_backend_pbsattn_configure(&config));
  EXPECT_TRUE(says("config.reserved 1: "));
  config.reserved = 0;
  config.mode = 9;
  EXPECT_FALSE(ggml_backend_pbsattn_configure(&config));
  EXPECT_TRUE(says("mode 9: "));
}

}  // namespace
}  // namespace pbsattn::ggml::test
