#include "progress.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdio>
#include <string>

namespace app {
namespace {

// Tells of a step at this share until it has been asked three times.
void tell_three_times(std::FILE* file, double share) {
  std::atomic<int> told = 0;
  const Progress progress("pbs",
                          [&told, share] {
                            ++told;
                            told.notify_all();
                            return share;
                          },
                          {.file = file, .line_every = std::chrono::milliseconds(1)});
  for (int seen = told; seen < 3; seen = told) told.wait(seen);
}

TEST(Progress, TellsLinesWhereThereIsNoTerminal) {
  std::FILE* file = std::tmpfile();
  ASSERT_NE(file, nullptr);
  tell_three_times(file, 0.25);
  std::rewind(file);
  char text[256];
  int lines = 0;
  for (; std::fgets(text, sizeof text, file) != nullptr; ++lines) {
    EXPECT_TRUE(std::string(text).starts_with("pbs: 25 % after ")) << text;
    EXPECT_TRUE(std::string(text).ends_with(" s left\n")) << text;
  }
  EXPECT_GE(lines, 3);
  std::fclose(file);
}

TEST(Progress, EndsAtOnceWithoutALineWhereTheStepIsShort) {
  std::FILE* file = std::tmpfile();
  ASSERT_NE(file, nullptr);
  {
    const Progress progress("pbs", [] { return 0.5; }, {.file = file, .line_every = std::chrono::hours(1)});
  }
  EXPECT_EQ(std::ftell(file), 0);
  std::fclose(file);
}

TEST(Progress, StreamThatCannotBeWrittenEndsNothing) {
  std::FILE* file = std::fopen("/dev/full", "w");
  if (file == nullptr) GTEST_SKIP() << "no /dev/full here";
  tell_three_times(file, 0.5);
  std::fclose(file);
}

}  // namespace
}  // namespace app
