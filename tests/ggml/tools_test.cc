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
    double perplexity = std::nan("");
    std::string output;
    std::vector<std::string> stats;  // lines, one for each layer
  };

  Outcome perplexity(int tokens, const std::vector<std::string>& environment) const {
    const auto stats = folder_ / "stats.txt";
    std::filesystem::remove(stats);
    const std::string size = std::to_string(tokens);
    std::string command = "env -u GGML_BACKEND_PATH PBSATTN_STATS=" + quoted(stats);
    for (const std::string& variable : environment) command += ' ' + quoted(variable);
    command += ' ' + quoted(perplexity_tool) + " -m " + quoted(model_path()) + " -f " + quoted(folder_ / "text.txt") +
               " --chunks 1 -t 2 -c " + size + " -b " + size + " -ub " + size + " 2>&1";
    Outcome outcome;
    std::FILE* pipe = popen(command.c_str(), "r");
    std::array<char, 4096> chunk{};
    while (std::fgets(chunk.data(), chunk.size(), pipe) != nullptr) outcome.output += chunk.data();
    EXPECT_EQ(pclose(pipe), 0) << command << "\n" << outcome.output;
    const std::string mark = "Final estimate: PPL = ";
    if (const auto at = outcome.output.find(mark); at != std::string::npos)
      outcome.perplexity = std::stod(outcome.output.substr(at + mark.size()));
    std::ifstream file(stats);
    for (std::string line; std::getline(file, line);) outcome.stats.push_back(line);
    return outcome;
  }

  static std::string quoted(const std::string& word) {
    std::string result = "'";
    for (const char letter : word) result += letter == '\'' ? std::string("'\\''") : std::string(1, letter);
    return result + "'";
  }

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
  const double expected = perplexity(2048, {}).perplexity;
  const Outcome loaded = perplexity(2048, {plugin, "PBSATTN_TOP_P=1"});
  expect_every_op_taken(loaded.stats);
  EXPECT_NEAR(loaded.perplexity / expected, 1.0, 5e-3);  // the noise of 2K tokens; see model_test.cc
}

TEST_F(Tools, PreloadLibraryLoadsThePlugIn) {
  const Outcome preloaded = perplexity(512, {"LD_PRELOAD=" PBSATTN_TEST_PRELOAD});
  expect_every_op_taken(preloaded.stats);
  EXPECT_EQ(preloaded.perplexity, perplexity(512, {plugin}).perplexity);
}

TEST_F(Tools, BadValueIsNamedAndEverythingLeftToGgml) {
  const Outcome refused = perplexity(512, {plugin, "PBSATTN_TOP_P=3"});
  EXPECT_TRUE(refused.stats.empty());
  EXPECT_EQ(refused.perplexity, perplexity(512, {}).perplexity);
  EXPECT_NE(refused.output.find("top_p 3: outside (0, 1]"), std::string::npos) << refused.output;
}

}  // namespace
}  // namespace pbsattn::ggml::test
