#include "settings.h"

#include <gtest/gtest.h>

#include <map>
#include <string>

namespace pbsattn::ggml {
namespace {

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

TEST(Settings, DefaultsArePbsWithBfloat16Products) {
  const Outcome outcome = read({});
  EXPECT_EQ(outcome.error, "");
  const ggml_pbsattn_config& config = outcome.settings.config;
  EXPECT_EQ(config.mode, GGML_PBSATTN_MODE_PBSATTN);
  EXPECT_EQ(config.options.keep, PBSATTN_KEEP_TOP_P);
  EXPECT_EQ(config.options.permutation, PBSATTN_PERMUTATION_LAST_QUERIES);
  EXPECT_EQ(config.options.precision, PBSATTN_PRECISION_BF16);
  EXPECT_EQ(config.min_tokens, 512);
  EXPECT_EQ(config.workspace_cap, SIZE_MAX);
  EXPECT_FALSE(config.check);
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
                                {"PBSATTN_STATS", "/somewhere/stats.txt"},
                                {"PBSATTN_VERBOSE", "1"}});
  EXPECT_EQ(outcome.error, "");
  const ggml_pbsattn_config& config = outcome.settings.config;
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
  EXPECT_EQ(outcome.settings.stats_target, "/somewhere/stats.txt");
  EXPECT_TRUE(outcome.settings.verbose);
}

TEST(Settings, EmptyIsUnset) {
  EXPECT_EQ(read({{"PBSATTN_TOP_P", ""}, {"PBSATTN_STATS", ""}, {"PBSATTN_METHOD", ""}}).error, "");
}

TEST(Settings, BadValuesAreNamedAndTurnThePlugInOff) {
  const std::map<std::pair<std::string, std::string>, std::string> complaints = {
      {{"PBSATTN_MODE", "on"}, "one of pbsattn, ggml, off"},
      {{"PBSATTN_METHOD", "pbz"}, "did you mean \"pbs\""},
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
  };
  for (const auto& [variable, complaint] : complaints) {
    const Outcome outcome = read({{variable.first, variable.second}});
    EXPECT_NE(outcome.error.find(complaint), std::string::npos) << variable.second << " gave: " << outcome.error;
    EXPECT_EQ(outcome.error.find('\n'), std::string::npos);
    EXPECT_EQ(outcome.settings.config.mode, GGML_PBSATTN_MODE_OFF) << variable.first << "=" << variable.second;
  }
}

}  // namespace
}  // namespace pbsattn::ggml
