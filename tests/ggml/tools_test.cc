// Unmodified llama.cpp programs with nothing but the environment set.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "real_text.h"

namespace pbsattn::ggml::test {
namespace {

// llama-perplexity's numbers are nan where it printed none, and nan fails every comparison.
class Tools : public testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(perplexity_tool))
      GTEST_SKIP() << perplexity_tool << " isn't there: build llama.cpp's target llama-perplexity";
    if (model_path().empty()) GTEST_SKIP() << no_model;
    if (real_text().empty()) GTEST_SKIP() << no_text;
    folder_ = std::filesystem::temp_directory_path() /
              ("pbsattn-" + std::string(testing::UnitTest::GetInstance()->current_test_info()->name()));
    std::filesystem::create_directories(folder_);
    std::ofstream(folder_ / "text.txt", std::ios::binary) << real_text();
  }
  void TearDown() override {
    if (!folder_.empty()) std::filesystem::remove_all(folder_);
  }

  struct Outcome {
    std::string output;
    std::vector<std::string> stats;  // lines, one for each layer

    double number_after(const std::string& mark) const {
      const auto at = output.find(mark);
      return at == std::string::npos ? std::nan("") : std::stod(output.substr(at + mark.size()));
    }
    double perplexity() const { return number_after("Final estimate: PPL = "); }
    double divergence() const { return number_after("Mean    KLD: "); }
    double change() const { return number_after("Mean ln(PPL(Q)/PPL(base))     : "); }
  };

  Outcome run(int tokens, const std::vector<std::string>& environment, const std::string& options = "") const {
    const auto stats = folder_ / "stats.txt";
    std::filesystem::remove(stats);
    const std::string size = std::to_string(tokens);
    std::string command = "env -u GGML_BACKEND_PATH PBSATTN_STATS=" + quoted(stats);
    for (const std::string& variable : environment) command += ' ' + quoted(variable);
    command += ' ' + quoted(perplexity_tool) + " -m " + quoted(model_path()) + " -f " + quoted(folder_ / "text.txt") +
               " --chunks 1 -t 2 -c " + size + " -b " + size + " -ub " + size + ' ' + options + " 2>&1";
    Outcome outcome;
    std::FILE* pipe = popen(command.c_str(), "r");
    std::array<char, 4096> chunk{};
    while (std::fgets(chunk.data(), chunk.size(), pipe) != nullptr) outcome.output += chunk.data();
    EXPECT_EQ(pclose(pipe), 0) << command << "\n" << outcome.output;
    std::ifstream file(stats);
    for (std::string line; std::getline(file, line);) outcome.stats.push_back(line);
    return outcome;
  }

  static std::string quoted(const std::string& word) {
    std::string result = "'";
    for (const char letter : word) result += letter == '\'' ? std::string("'\\''") : std::string(1, letter);
    return result + "'";
  }

  std::string logits_file() const { return quoted(folder_ / "logits.bin"); }

  const std::string perplexity_tool = PBSATTN_TEST_GGML_FOLDER "/llama-perplexity";

 private:
  std::filesystem::path folder_;
};

void expect_every_op_taken(const std::vector<std::string>& stats) {
  EXPECT_FALSE(stats.empty());
  for (const std::string& line : stats) EXPECT_NE(line.find(", 1 taken"), std::string::npos) << line;
}

const std::string plugin = "GGML_BACKEND_PATH=" PBSATTN_TEST_PLUGIN;

TEST_F(Tools, PerplexityThroughThePlugInIsLlamaCpps) {
  // Roundings alone let distributions wander, by how much depends on the processor: measured here between ggml's own
  // two ways to compute attention, as model_test.cc explains. A divergence is as the square of a difference.
  const Outcome base = run(2048, {}, "-fa on --save-all-logits " + logits_file());
  ASSERT_GT(base.perplexity(), 1.0) << base.output;
  const std::string compared = " --kl-divergence --kl-divergence-base " + logits_file();
  const Outcome without_flash = run(2048, {}, "-fa off" + compared);
  const Outcome loaded = run(2048, {plugin, "PBSATTN_TOP_P=1"}, "-fa on" + compared);
  expect_every_op_taken(loaded.stats);
  ASSERT_GT(without_flash.divergence(), 0.0) << without_flash.output;
  EXPECT_LE(loaded.divergence(), 2.25 * without_flash.divergence()) << loaded.output;
  // Each of the 1023 scored tokens wanders by sqrt(2 divergence), either way; six standard errors of their mean.
  EXPECT_LE(std::abs(loaded.change()), 6 * std::sqrt(2 * loaded.divergence() / 1023)) << loaded.output;
}

TEST_F(Tools, PreloadLibraryLoadsThePlugIn) {
  const Outcome preloaded = run(512, {"LD_PRELOAD=" PBSATTN_TEST_PRELOAD});
  expect_every_op_taken(preloaded.stats);
  EXPECT_EQ(preloaded.perplexity(), run(512, {plugin}).perplexity());
}

TEST_F(Tools, BadValueIsNamedAndEverythingLeftToGgml) {
  const Outcome refused = run(512, {plugin, "PBSATTN_TOP_P=3"});
  EXPECT_TRUE(refused.stats.empty());
  EXPECT_EQ(refused.perplexity(), run(512, {}).perplexity());
  EXPECT_NE(refused.output.find("top_p 3: outside (0, 1]"), std::string::npos) << refused.output;
}

}  // namespace
}  // namespace pbsattn::ggml::test
