#include "attention.h"

#include <gtest/gtest.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "support/options.h"

namespace app {
namespace {

// What a command line of these flags makes of "pbs"; nothing where it is refused.
std::optional<pbsattn::Options> parsed(std::vector<std::string> arguments, const std::string& spec = "pbs",
                                       Role role = Role::under_test) {
  CLI::App command;
  AttentionFlags flags;
  flags.add_to(command);
  try {
    std::ranges::reverse(arguments);  // as CLI11 wants them
    command.parse(arguments);
    return attention_named(spec, flags, role).options;
  } catch (const CLI::ParseError&) {
  } catch (const pbsattn::Error&) {
  }
  return std::nullopt;
}

bool library_takes(const pbsattn::Options& options) {
  try {
    pbsattn::Plan::create(options, {.q_len = 1, .kv_len = 1, .head_dim = 8}, pbsattn::Device::reference());
  } catch (const pbsattn::Error&) {
    return false;
  }
  return true;
}

TEST(AttentionFlags, EveryOptionHasItsFlagInBothSpellings) {
  int taken = 0;
  pbsattn::test::each_option_value(
      [&](const pbsattn::OptionInfo& info, const std::string& value, pbsattn::Options expected) {
        if (info.name != "precision") expected.precision = pbsattn::Precision::bf16;
        const std::string name(info.name);
        std::string dashed = name;
        std::ranges::replace(dashed, '_', '-');
        const bool takes = library_takes(expected);
        taken += takes ? 1 : 0;
        for (const auto& options : {parsed({"--" + dashed, value}), parsed({"--" + name + "=" + value}),
                                    parsed({}, "pbs:" + name + "=" + value)}) {
          ASSERT_EQ(options.has_value(), takes) << name << " " << value;
          EXPECT_TRUE(!takes || pbsattn::test::same(*options, expected)) << name << " " << value;
        }
      });
  EXPECT_GT(taken, 24);
}

TEST(AttentionFlags, AMethodsOwnOptionsComeAfterTheFlags) {
  const auto options = parsed({"--top-p", "0.5", "--segment", "512"}, "pbs:top_p=0.25");
  ASSERT_TRUE(options.has_value());
  EXPECT_EQ(options->top_p, 0.25F);
  EXPECT_EQ(options->segment, 512);
}

TEST(AttentionFlags, PartsAreTheMethodsUnderTestAlone) {
  using pbsattn::KeepRule;
  const std::vector<std::string> flags{"--permutation", "none", "--score",    "per_query", "--keep",  "top_k",
                                       "--correction",  "mean", "--fallback", "never",     "--top-k", "7",
                                       "--precision",   "f32",  "--segment",  "512"};
  pbsattn::Options tested = pbsattn::method("auto");
  tested.permutation = pbsattn::Permutation::none;
  tested.score = pbsattn::BlockScore::per_query;
  tested.keep = KeepRule::top_k;
  tested.correction = pbsattn::Correction::mean;
  tested.fallback = pbsattn::Fallback::never;
  for (const char* name : {"full", "auto"}) {
    pbsattn::Options compared = pbsattn::method(name);
    for (pbsattn::Options* options : {&tested, &compared}) {
      options->top_k = 7;
      options->precision = pbsattn::Precision::f32;
      options->segment = 512;
    }
    const auto of_compared = parsed(flags, name, Role::compared);
    ASSERT_TRUE(of_compared.has_value()) << name;
    EXPECT_TRUE(pbsattn::test::same(*of_compared, compared)) << name;
  }
  const auto of_tested = parsed(flags, "auto");
  ASSERT_TRUE(of_tested.has_value());
  EXPECT_TRUE(pbsattn::test::same(*of_tested, tested));
}

// What a command line with a learned order's file makes of a name.
Attention with_file(std::vector<std::string> arguments, const std::string& spec, Role role = Role::under_test) {
  CLI::App command;
  AttentionFlags flags;
  flags.add_to(command);
  arguments.insert(arguments.begin(), {"--learned", "model.pbs"});
  std::ranges::reverse(arguments);
  command.parse(arguments);
  EXPECT_EQ(flags.default_method(), "learned");
  return attention_named(spec, flags, role);
}

TEST(AttentionFlags, LearnedIsWhatTheFileSaysUnderTheCommandLine) {
  using nlohmann::json;
  const Attention plain = with_file({}, "learned");
  EXPECT_TRUE(plain.by_learned);
  EXPECT_EQ(plain.learned, "model.pbs");
  EXPECT_EQ(plain.options.permutation, pbsattn::Permutation::learned);
  EXPECT_EQ(plain.options.precision, pbsattn::Precision::bf16);
  EXPECT_EQ(json::parse(plain.settings), json::parse(R"({"*": {"*": {}}})"));
  const Attention changed = with_file({"--dense-last-rows", "5", "--top-p=0.5"}, "learned:top_p=0.25");
  EXPECT_EQ(changed.options.dense_last_rows, 5);
  EXPECT_EQ(changed.options.top_p, 0.25F);
  EXPECT_EQ(json::parse(changed.settings), json::parse(R"({"*": {"*": {"dense_last_rows": "5", "top_p": "0.25"}}})"));
  const Attention other = with_file({}, "two-step:permutation=learned:order_scope=kv_head");
  EXPECT_FALSE(other.by_learned);
  EXPECT_EQ(other.learned, "model.pbs");
  EXPECT_EQ(other.settings, "");
  EXPECT_TRUE(with_file({}, "ggml").learned.empty());
}

TEST(AttentionFlags, SettingsOfTheCommandLineStandOverItsFlags) {
  using nlohmann::json;
  const auto file = std::filesystem::path(testing::TempDir()) / "pbsattn-attention-test.json";
  const auto settings_of = [&](const std::string& text) {
    std::ofstream(file) << text;
    return with_file({"--top-p", "0.5", "--dense-last-rows", "1"}, "learned:settings=" + file.string()).settings;
  };
  EXPECT_EQ(json::parse(settings_of(R"({"3": {"*": {"keep": "all"}}})")),
            json::parse(R"({"3": {"*": {"keep": "all"}}, "*": {"*": {"top_p": "0.5", "dense_last_rows": "1"}}})"));
  EXPECT_EQ(json::parse(settings_of(R"({"*": {"*": {"top_p": 0.7}, "2": {"top_k": 3}}})")),
            json::parse(R"({"*": {"*": {"top_p": 0.7, "dense_last_rows": "1"}, "2": {"top_k": 3}}})"));
  const std::string replacing = R"({"*":{"*":{"method":"pbs"}}})";
  EXPECT_EQ(settings_of(replacing), replacing);
  for (const std::string wrong : {"{", "[]", R"({"*": 3})", R"({"*": {"*": 3}})"}) EXPECT_EQ(settings_of(wrong), wrong);
  std::filesystem::remove(file);
}

TEST(AttentionFlags, JsonHasEveryOption) {
  pbsattn::test::each_option_value(
      [](const pbsattn::OptionInfo& info, const std::string&, const pbsattn::Options& options) {
        pbsattn::Options read = pbsattn::method("full");
        const nlohmann::json json = to_json(options);
        for (const auto& [name, value] : json.items())
          pbsattn::set_option(read, name, value.is_string() ? value.get<std::string>() : value.dump());
        EXPECT_TRUE(pbsattn::test::same(read, options)) << info.name;
      });
}

}  // namespace
}  // namespace app
