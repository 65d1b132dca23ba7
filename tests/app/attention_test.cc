#include "attention.h"

#include <gtest/gtest.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/options/c_options.h"
#include "errors.h"
#include "layer_settings.h"
#include "session.h"
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
  return attention_named(spec, flags, role);
}

// The options of a query head of layer 0 when the file of the learned order has these settings.
pbsattn::Options of_head(Attention attention, const std::string& of_file, std::size_t head) {
  attention.learned = std::make_shared<const pbsattn::learned::File>(pbsattn::learned::File{.settings = of_file});
  const pbsattn_options base = pbsattn::to_c(attention.options);
  auto heads = learned_layers(attention)->heads(0, 4, {base});
  if (!attention.settings.empty())
    heads = pbsattn::ggml::LayerSettings::parse(attention.settings, base).heads(0, 4, heads);
  return pbsattn::to_cpp(heads[heads.size() == 1 ? 0 : head]);
}

TEST(AttentionFlags, LearnedIsWhatTheFileSaysUnderTheCommandLine) {
  for (const char* name : {"learned", "auto"}) {
    EXPECT_TRUE(with_file({}, name).by_learned);
    EXPECT_EQ(with_file({}, name, Role::compared).options.permutation, pbsattn::Permutation::learned);
  }
  const Attention plain = with_file({}, std::string(default_method));
  EXPECT_EQ(plain.options.fallback, pbsattn::Fallback::when_faster);
  EXPECT_EQ(plain.options.permutation, pbsattn::Permutation::learned);
  EXPECT_EQ(plain.options.precision, pbsattn::Precision::bf16);
  EXPECT_EQ(plain.over, Given{});
  const Attention changed = with_file({"--dense-last-rows", "5", "--top-p=0.5"}, "auto:top_p=0.25");
  EXPECT_EQ(changed.options.dense_last_rows, 5);
  EXPECT_EQ(changed.options.top_p, 0.25F);
  const std::string of_file = R"({"*": {"*": {"top_p": 0.7, "sink_blocks": 3}, "2": {"dense_last_rows": 2}}})";
  for (const std::size_t head : {0, 2}) {
    EXPECT_EQ(of_head(plain, of_file, head).top_p, 0.7F);
    EXPECT_EQ(of_head(changed, of_file, head).top_p, 0.25F);
    EXPECT_EQ(of_head(changed, of_file, head).dense_last_rows, 5);
    EXPECT_EQ(of_head(changed, of_file, head).sink_blocks, 3);
  }
  EXPECT_EQ(of_head(plain, of_file, 2).dense_last_rows, 2);
  EXPECT_THROW(static_cast<void>(of_head(plain, "{", 0)), Failure);
  const Attention other = with_file({"--top-p=0.5"}, "two-step:permutation=learned:order_scope=kv_head");
  EXPECT_FALSE(other.by_learned);
  EXPECT_EQ(other.over, Given{});
  EXPECT_EQ(of_head(other, of_file, 0).top_p, 0.5F) << "a method names all options";
  EXPECT_EQ(learned_layers(other), nullptr);
}

TEST(AttentionFlags, SettingsOfTheCommandLineStandOverItsFlags) {
  const auto file = std::filesystem::path(testing::TempDir()) / "pbsattn-attention-test.json";
  const auto with_settings = [&](const std::string& text) {
    std::ofstream(file) << text;
    Attention made = with_file({"--top-p", "0.5", "--dense-last-rows", "1"}, "learned:settings=" + file.string());
    EXPECT_EQ(made.settings, text);
    return of_head(std::move(made), R"({"*": {"*": {"top_p": 0.7, "dense_last_rows": 2}}})", 0);
  };
  const pbsattn::Options of_another = with_settings(R"({"3": {"*": {"top_p": 0.25}}})");
  EXPECT_EQ(of_another.top_p, 0.5F);
  EXPECT_EQ(of_another.dense_last_rows, 1);
  const pbsattn::Options changed = with_settings(R"({"*": {"*": {"top_p": 0.25}, "2": {"top_p": 0.75}}})");
  EXPECT_EQ(changed.top_p, 0.25F);
  EXPECT_EQ(changed.dense_last_rows, 1);
  EXPECT_EQ(with_settings(R"({"*": {"*": {"method": "pbs"}}})").top_p, pbsattn::method("pbs").top_p);
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
