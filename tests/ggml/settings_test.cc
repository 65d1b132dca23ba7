#include "settings.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "core/options/c_options.h"
#include "support/options.h"

namespace pbsattn::ggml {
namespace {

using namespace std::string_view_literals;

struct Outcome {
  Settings settings;
  std::string error;
};

Outcome read(const std::map<std::string, std::string>& variables) {
  Outcome outcome;
  const auto lookup = [&](const char* name) -> const char* {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  };
  outcome.settings = read_environment(lookup, &outcome.error);
  return outcome;
}

TEST(Settings, DefaultsAreAutoWithBfloat16Products) {
  const Outcome outcome = read({});
  EXPECT_EQ(outcome.error, "");
  const Config& config = outcome.settings.config;
  EXPECT_EQ(config.mode, GGML_PBSATTN_MODE_PBSATTN);
  Options expected = method("auto");
  expected.precision = Precision::bf16;
  EXPECT_TRUE(pbsattn::test::same(to_cpp(config.options), expected));
  EXPECT_EQ(config.min_tokens, 512);
  EXPECT_EQ(config.workspace_cap, SIZE_MAX);
  EXPECT_FALSE(config.check);
  EXPECT_EQ(outcome.settings.cache_cap, std::size_t{1} << 30);
  EXPECT_EQ(outcome.settings.stats_target, "");
}

TEST(Settings, AutoMayFallBackToFull) {
  const Outcome outcome = read({{"PBSATTN_METHOD", "auto"}});
  EXPECT_EQ(outcome.error, "");
  EXPECT_EQ(outcome.settings.config.options.fallback, PBSATTN_FALLBACK_WHEN_FASTER);
  EXPECT_EQ(outcome.settings.config.options.precision, PBSATTN_PRECISION_BF16);
}

TEST(Settings, EveryVariableIsHeard) {
  const Outcome outcome = read({{"PBSATTN_MODE", "ggml"},
                                {"PBSATTN_METHOD", "pbs-unpermuted"},
                                {"PBSATTN_TOP_P", "0.75"},
                                {"PBSATTN_SEGMENT", "512"},
                                {"PBSATTN_DENSE_LAST_ROWS", "2"},
                                {"PBSATTN_EXPECTED_DENSITY", "0.25"},
                                {"PBSATTN_MIN_TOKENS", "1024"},
                                {"PBSATTN_PRECISION", "f32"},
                                {"PBSATTN_CHECK", "1"},
                                {"PBSATTN_WORKSPACE_CAP_MIB", "64"},
                                {"PBSATTN_CACHE_MIB", "0"},
                                {"PBSATTN_STATS", "/somewhere/stats.txt"},
                                {"PBSATTN_VERBOSE", "1"}});
  EXPECT_EQ(outcome.error, "");
  const Config& config = outcome.settings.config;
  EXPECT_EQ(config.mode, GGML_PBSATTN_MODE_GGML);
  EXPECT_EQ(config.options.permutation, PBSATTN_PERMUTATION_NONE);
  EXPECT_EQ(config.options.top_p, 0.75F);
  EXPECT_EQ(config.options.segment, 512);
  EXPECT_EQ(config.options.dense_last_rows, 2);
  EXPECT_EQ(config.options.expected_density, 0.25F);
  EXPECT_EQ(config.min_tokens, 1024);
  EXPECT_EQ(config.options.precision, PBSATTN_PRECISION_F32);
  EXPECT_TRUE(config.check);
  EXPECT_EQ(config.workspace_cap, std::size_t{64} << 20);
  EXPECT_EQ(outcome.settings.cache_cap, 0);
  EXPECT_EQ(outcome.settings.stats_target, "/somewhere/stats.txt");
  EXPECT_TRUE(outcome.settings.verbose);
}

TEST(Settings, EveryOptionHasItsVariableAndItsKey) {
  pbsattn_options base = default_config().options;
  set_method("pbs", &base);
  pbsattn::test::each_option_value([&](const OptionInfo& info, const std::string& value, Options expected) {
    if (info.name != "precision") expected.precision = Precision::bf16;
    const std::string name(info.name), method = "pbs:" + name + "=" + value;
    using Variables = std::map<std::string, std::string>;
    for (const auto& variables :
         {Variables{{"PBSATTN_METHOD", "pbs"}, {variable_of(name), value}}, Variables{{"PBSATTN_METHOD", method}}})
      EXPECT_TRUE(pbsattn::test::same(to_cpp(read(variables).settings.config.options), expected)) << method;
    if (name == "softcap" || name == "window") return;  // refused there
    for (const auto& [key, text] : {std::pair{name, value}, {"method", method}}) {
      const std::string json = R"({"*": {"*": {")" + key + R"(": ")" + text + R"("}}})";
      EXPECT_TRUE(pbsattn::test::same(to_cpp(LayerSettings::parse(json, base).heads(0, 1, {base})[0]), expected))
          << json;
    }
  });
  EXPECT_EQ(variable_of("dense_last_rows"), "PBSATTN_DENSE_LAST_ROWS");
}

TEST(Settings, AMethodMayBringOptionsOfItsOwn) {
  const Outcome outcome =
      read({{"PBSATTN_METHOD", "pbs+:top_p=0.95:precision=f32:segment=512"}, {"PBSATTN_SEGMENT", "384"}});
  EXPECT_EQ(outcome.error, "");
  const pbsattn_options& options = outcome.settings.config.options;
  EXPECT_EQ(options.score, PBSATTN_SCORE_ANTIDIAGONAL);
  EXPECT_EQ(options.top_p, 0.95F);
  EXPECT_EQ(options.precision, PBSATTN_PRECISION_F32) << "said, so bf16 isn't taken";
  EXPECT_EQ(options.segment, 384) << "a variable comes after the method";
}

TEST(Settings, EmptyIsUnset) {
  EXPECT_EQ(read({{"PBSATTN_TOP_P", ""}, {"PBSATTN_STATS", ""}, {"PBSATTN_METHOD", ""}}).error, "");
}

TEST(Settings, BadValuesAreNamedAndTurnThePlugInOff) {
  const std::map<std::pair<std::string, std::string>, std::string> complaints = {
      {{"PBSATTN_MODE", "on"}, "one of pbsattn, ggml, off"},
      {{"PBSATTN_METHOD", "pbz"}, "did you mean \"pbs\""},
      {{"PBSATTN_METHOD", "pbs:top_p"}, "PBSATTN_METHOD: pbs:top_p: \"top_p\" is no OPTION=VALUE"},
      {{"PBSATTN_METHOD", "pbs:top_q=1"}, "PBSATTN_METHOD: option \"top_q\": no such option"},
      {{"PBSATTN_KEEP", "most"}, "PBSATTN_KEEP \"most\": not one of all, top_p, threshold"},
      {{"PBSATTN_SINK_BLOCKS", "2.5"}, "PBSATTN_SINK_BLOCKS \"2.5\": not a whole number of blocks"},
      {{"PBSATTN_SCALE", "-1"}, "scale -1: not a finite, non-negative number"},
      {{"PBSATTN_SOFTCAP", "30"}, "softcap 30: the model's own counts; leave it out"},
      {{"PBSATTN_SOFTCAP", "-1"}, "softcap -1: the model's own counts"},
      {{"PBSATTN_SOFTCAP", "nan"}, "softcap nan: the model's own counts"},
      {{"PBSATTN_WINDOW", "4096"}, "window 4096: the model's own counts; leave it out"},
      {{"PBSATTN_METHOD", "pbs:softcap=inf"}, "softcap inf: the model's own counts"},
      {{"PBSATTN_TOP_P", "1.5"}, "top_p 1.5: outside (0, 1]"},
      {{"PBSATTN_TOP_P", "much"}, "PBSATTN_TOP_P \"much\": not a number"},
      {{"PBSATTN_TOP_P", "0.9x"}, "PBSATTN_TOP_P \"0.9x\": not a number"},
      {{"PBSATTN_TOP_P", "nan"}, "top_p nan: outside (0, 1]"},
      {{"PBSATTN_SEGMENT", "300"}, "segment 300: no multiple of the block"},
      {{"PBSATTN_DENSE_LAST_ROWS", "-1"}, "dense_last_rows -1: negative"},
      {{"PBSATTN_MIN_TOKENS", "1"}, "min_tokens 1: under 257"},
      {{"PBSATTN_MIN_TOKENS", "99999999999999999999"}, "PBSATTN_MIN_TOKENS"},
      {{"PBSATTN_PRECISION", "fp8"}, "one of bf16, f32, automatic"},
      {{"PBSATTN_CHECK", "yes"}, "one of 0, 1"},
      {{"PBSATTN_WORKSPACE_CAP_MIB", "-5"}, "PBSATTN_WORKSPACE_CAP_MIB \"-5\""},
      {{"PBSATTN_CACHE_MIB", "1G"}, "PBSATTN_CACHE_MIB \"1G\": not a whole number of MiB"},
  };
  for (const auto& [variable, complaint] : complaints) {
    const Outcome outcome = read({{variable.first, variable.second}});
    EXPECT_NE(outcome.error.find(complaint), std::string::npos) << variable.second << " gave: " << outcome.error;
    EXPECT_EQ(outcome.error.find('\n'), std::string::npos);
    EXPECT_EQ(outcome.settings.config.mode, GGML_PBSATTN_MODE_OFF) << variable.first << "=" << variable.second;
  }
}

std::string refusal_of(const std::string& json) {
  try {
    LayerSettings::parse(json, default_config().options);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "none";
}

TEST(LayerSettings, LayersOverrideEveryLayerAndHeadsEveryHead) {
  const pbsattn_options base = default_config().options;
  const auto settings = LayerSettings::parse(
      R"({"*": {"*": {"top_p": 0.8}, "1": {"top_p": 0.7, "keep": "all"}},
          "3": {"*": {"top_p": 0.6}, "2": {"sink_blocks": 4}},
          "4": {"*": {"top_k": 5, "method": "minference"}}})",
      base);
  auto heads = settings.heads(0, 4, {base});
  ASSERT_EQ(heads.size(), 4U);
  EXPECT_EQ(heads[0].top_p, 0.8F);
  EXPECT_EQ(heads[1].top_p, 0.7F);
  EXPECT_EQ(heads[1].keep, PBSATTN_KEEP_ALL);
  heads = settings.heads(3, 4, {base});
  EXPECT_EQ(heads[0].top_p, 0.6F);
  EXPECT_EQ(heads[1].top_p, 0.6F);
  EXPECT_EQ(heads[1].keep, PBSATTN_KEEP_ALL) << "what the layer doesn't name stays";
  EXPECT_EQ(heads[2].sink_blocks, 4);
  heads = settings.heads(4, 4, {base});
  EXPECT_EQ(heads[0].score, PBSATTN_SCORE_VERTICAL_SLASH) << "a method comes first";
  EXPECT_EQ(heads[0].top_k, 5);
  EXPECT_EQ(heads[0].precision, PBSATTN_PRECISION_BF16);
  EXPECT_EQ(settings.heads(-1, 2, {base})[0].top_p, 0.8F) << "an op that doesn't tell its layer";
  EXPECT_THROW(static_cast<void>(settings.heads(3, 2, {base})), std::runtime_error) << "no head 2";
  EXPECT_EQ(LayerSettings::parse(R"({"0": {"*": {"top_p": 0.5}}})", base).heads(0, 4, {base}).size(), 1U)
      << "one for all";
}

// As in Python (tests/python/test_settings.py).
TEST(LayerSettings, AMethodLeavesThePrecisionThatTheOneBeforeNamed) {
  const pbsattn_options base = default_config().options;
  const auto settings = LayerSettings::parse(
      R"({"*": {"*": {"method": "pbs:precision=f32"}}, "0": {"1": {"method": "full"}, "2": {"method": "full:precision=bf16"}}})",
      base);
  const auto heads = settings.heads(0, 3, {base});
  ASSERT_EQ(heads.size(), 3U);
  EXPECT_EQ(heads[1].keep, PBSATTN_KEEP_ALL);
  EXPECT_EQ(heads[1].precision, PBSATTN_PRECISION_F32);
  EXPECT_EQ(heads[2].precision, PBSATTN_PRECISION_BF16);
}

TEST(LayerSettings, WhatIsWrongIsNamed) {
  EXPECT_NE(refusal_of("{").find("not JSON"), std::string::npos);
  EXPECT_NE(refusal_of("[]").find("not an object"), std::string::npos);
  EXPECT_NE(refusal_of(R"({"first": {}})").find("layer \"first\""), std::string::npos);
  EXPECT_NE(refusal_of(R"({"1": {"-2": {}}})").find("head \"-2\""), std::string::npos);
  EXPECT_NE(refusal_of(R"({"1": {"2": {"top_q": 1}}})").find("layer 1, head 2: option \"top_q\""), std::string::npos);
  EXPECT_NE(refusal_of(R"({"1": {"*": {"keep": "most"}}})").find("keep \"most\""), std::string::npos);
  EXPECT_NE(refusal_of(R"({"1": {"*": {"top_k": 2.5}}})").find("not a whole number"), std::string::npos);
  EXPECT_NE(refusal_of(R"({"1": {"*": {"top_k": [1]}}})").find("neither a number nor a name"), std::string::npos);
  EXPECT_NE(refusal_of(R"({"1": {"*": {"method": "pbz"}}})").find("did you mean"), std::string::npos);
  EXPECT_NE(refusal_of(R"({"1": {"2": {"softcap": 30}}})").find("layer 1, head 2: softcap 30: the model's own counts"),
            std::string::npos);
  EXPECT_NE(refusal_of(R"({"1": {"*": {"window": 0}}})").find("layer 1, head *: window 0: the model's own counts"),
            std::string::npos);
  EXPECT_NE(refusal_of(R"({"1": {"*": {"method": "pbs:softcap=30"}}})").find("layer 1, head *: softcap 30"),
            std::string::npos);
  const Outcome outcome = read({{"PBSATTN_SETTINGS", "/nowhere/settings.json"}});
  EXPECT_NE(outcome.error.find("/nowhere/settings.json: can't be read"), std::string::npos) << outcome.error;
  EXPECT_EQ(outcome.settings.config.mode, GGML_PBSATTN_MODE_OFF);
}

TEST(LayerSettings, MessagesAreOneLineWhateverTheKeys) {
  for (const std::string json :
       {R"({"a\nb": {}})", R"({"a\nb": 1})", R"({"1": {"a\nb": {}}})", R"({"1": {"a\nb": 1}})",
        R"({"1": {"2": {"a\nb": 1}}})", R"({"1": {"2": {"a\nb": []}}})", R"({"1": {"2": {"a\nb": 1e999}}})",
        R"({"1\n": {"2\n": {"\n": [}}})", R"({"1": {"2": {"keep": "a\nb"}}})", R"({"1": {"2": {"method": "a\nb"}}})"}) {
    const std::string message = refusal_of(json);
    EXPECT_NE(message, "none") << json;
    for (const char c : message) EXPECT_GE(static_cast<unsigned char>(c), 0x20) << json << " gave: " << message;
  }
  EXPECT_NE(refusal_of(R"({"a\nb": {}})").find("layer \"a?b\": not a number"), std::string::npos);
}

TEST(LayerSettings, NamesDoNotEndAtANul) {
  const std::string rule = " contains a NUL character, which no option has; take it out";
  EXPECT_EQ(refusal_of(R"({"3": {"*": {"top_k\u0000x": 2}}})"), "layer 3, head *: \"top_k?x\"" + rule);
  EXPECT_EQ(refusal_of(R"({"3": {"1": {"keep": "all\u0000"}}})"), "layer 3, head 1: \"all?\"" + rule);
  EXPECT_EQ(refusal_of(R"({"*": {"1": {"method": "pbs\u0000x"}}})"), "layer *, head 1: \"pbs?x\"" + rule);
  EXPECT_NE(refusal_of(R"({"3\u0000": {}})").find("layer \"3?\": not a number"), std::string::npos);
  EXPECT_NE(refusal_of(R"({"3": {"1\u0000": {}}})").find("head \"1?\": not a number"), std::string::npos);
}

// Numbers that overflow a double are no parse errors to the JSON library, but exceptions of another kind.
constexpr const char* overflows = R"({"0": {"7": {"top_p": 0.8}}, "3": {"*": {"threshold": 1e999}}})";

TEST(LayerSettings, NumberThatOverflowsIsNamedByEveryWayIn) {
  const std::string complaint =
      "layer 3, head *, threshold: number overflow parsing '1e999'; write one that a double holds";
  EXPECT_EQ(refusal_of(overflows), complaint);

  EXPECT_FALSE(ggml_backend_pbsattn_set_layers(overflows));
  EXPECT_EQ(ggml_backend_pbsattn_last_error(), complaint);

  const auto file = std::filesystem::path(testing::TempDir()) / "pbsattn-settings-overflow.json";
  std::ofstream(file) << overflows;
  const Outcome outcome = read({{"PBSATTN_SETTINGS", file.string()}});
  std::filesystem::remove(file);
  EXPECT_EQ(outcome.error, "PBSATTN_SETTINGS " + file.string() + ": " + complaint);
  EXPECT_EQ(outcome.settings.config.mode, GGML_PBSATTN_MODE_OFF);
}

TEST(LayerSettings, NoFileEndsTheProcess) {
  // The plug-in's first call, as ggml makes it when it loads the file: in a process that starts anew.
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto file = std::filesystem::path(testing::TempDir()) / "pbsattn-settings-bad.json";
  for (const std::string_view text :
       {std::string_view(overflows), "{"sv, ""sv, "[1e999]"sv, "{\"0\": {\"*\": {\"top_p\": \"\xff\"}}}"sv, "\0"sv}) {
    std::ofstream(file, std::ios::binary) << text;
    EXPECT_EXIT(
        {
          setenv("PBSATTN_SETTINGS", file.c_str(), 1);
          ggml_backend_pbsattn_reg();
          ggml_pbsattn_config config{.struct_size = sizeof config};
          ggml_backend_pbsattn_get_config(&config);
          std::_Exit(config.mode == GGML_PBSATTN_MODE_OFF ? 0 : 1);
        },
        testing::ExitedWithCode(0), "pbsattn-settings-bad.json: .*attention stays with ggml's own kernel")
        << text;
  }
  std::filesystem::remove(file);
}

}  // namespace
}  // namespace pbsattn::ggml
