// What `pbsattn prefill` says of times, made-up ones.
#include "prefill_report.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace app {
namespace {

std::vector<ggml_pbsattn_layer_stats> layers_taking(double seconds) {
  std::vector<ggml_pbsattn_layer_stats> layers(2, {.struct_size = sizeof(ggml_pbsattn_layer_stats)});
  for (auto& layer : layers) layer.total_seconds = seconds / 2;
  return layers;
}

Run run(const std::string& name, double attention, double other) {
  Run made{.attention = {.name = name, .by_ggml = name == "ggml", .options = {}, .settings = {}}};
  made.first_token_seconds = attention + other;
  made.layers = layers_taking(attention);
  return made;
}

PrefillReport report(std::vector<Run> runs) {
  return {.model = {}, .prompt_file = "text.txt", .reference = "full", .runs = std::move(runs)};
}

bool says(const PrefillReport& report, const std::string& words) {
  return table(report).find(words) != std::string::npos;
}

TEST(PrefillReport, SaysWhatShareOfTheBoundIsReached) {
  const auto calm = report({run("ggml", 8, 2), run("full", 2, 2.5), run("pbs", 0.5, 2)});
  EXPECT_EQ(calm.disturbed(), nullptr);
  EXPECT_TRUE(says(calm, "after 2.00 s instead of 10.00 s: 5.00x. pbs reaches 4.00x, 80 % of that.")) << table(calm);
  EXPECT_FALSE(says(calm, "Disturbed"));
  EXPECT_FALSE(says(calm, "times"));
  EXPECT_EQ(to_json(calm)["disturbed"], false);
}

TEST(PrefillReport, SpeedUpAboveTheBoundIsDisturbanceOfTheBaseline) {
  // At 4x of a bound of 2.67x: everything but attention took 4.5 s of ggml's run, but under 3 of the
  // others'.
  const auto busy = report({run("ggml", 7.5, 4.5), run("full", 1, 2.75), run("pbs", 0.5, 2.5)});
  ASSERT_EQ(busy.disturbed(), &busy.runs[0]);
  EXPECT_TRUE(says(busy, "pbs reaches 4.00x, which is more than can be.")) << table(busy);
  EXPECT_TRUE(says(busy, "took 2.50 to 4.50 s, in ggml longer"));
  EXPECT_FALSE(says(busy, "150 %"));
  EXPECT_EQ(to_json(busy)["disturbed"], true);
  EXPECT_EQ(to_json(busy)["runs"][0]["other_seconds"], 4.5);
}

TEST(PrefillReport, DisturbanceOfAnotherRunIsFoundToo) {
  const auto busy = report({run("ggml", 2, 2), run("full", 1, 2), run("pbs", 0.5, 9)});
  ASSERT_EQ(busy.disturbed(), &busy.runs[2]);
  EXPECT_TRUE(says(busy, "took 2.00 to 9.00 s, in pbs longer")) << table(busy);
}

TEST(PrefillReport, NoiseOfAShortPromptIsNoDisturbance) {
  const auto calm = report({run("ggml", 0.02, 2.0), run("pbs", 0.01, 1.985)});
  EXPECT_EQ(calm.disturbed(), nullptr);
  EXPECT_TRUE(says(calm, "pbs reaches 1.01x, 100 % of that.")) << table(calm);
}

TEST(PrefillReport, RunAloneIsNeverDisturbed) {
  EXPECT_EQ(report({run("ggml", 8, 2)}).disturbed(), nullptr);
}

TEST(PrefillReport, BetterTimeCounts) {
  auto busy = report({run("ggml", 8, 9), run("pbs", 1, 2)});
  ASSERT_NE(busy.disturbed(), nullptr);
  busy.disturbed()->time_again(20, layers_taking(8));
  EXPECT_EQ(busy.runs[0].first_token_seconds, 17);
  busy.disturbed()->time_again(10, layers_taking(7.5));
  EXPECT_EQ(busy.disturbed(), nullptr);
  EXPECT_EQ(busy.runs[0].first_token_seconds, 10);
  EXPECT_EQ(busy.runs[0].attention_seconds(), 7.5);
  EXPECT_TRUE(says(busy, "ggml was timed 3 times, of which the best counts")) << table(busy);
  EXPECT_TRUE(says(busy, "pbs reaches 3.33x, 83 % of that."));
  EXPECT_EQ(to_json(busy)["runs"][0]["repeats"], 2);
}

}  // namespace
}  // namespace app
