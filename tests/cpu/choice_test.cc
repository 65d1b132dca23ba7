// Which path a plan takes, and when the system is asked for one that it must permit.
#include <gtest/gtest.h>

#include "cpu/kernels/kernels.h"
#include "cpu/path.h"

namespace pbsattn::cpu {
namespace {

int asked = 0;
bool permits = true;
constexpr Permission counted{.ask =
                                 [] {
                                   ++asked;
                                   return permits;
                                 },
                             .refused = [] { return false; }};

Kernels named(std::string_view name, const Permission* permission) {
  Kernels kernels{};
  kernels.name = name;
  kernels.permission = permission;
  return kernels;
}

class Choice : public testing::Test {
 protected:
  Choice() {
    asked = 0;
    permits = true;
  }
  test::ForcedPath none_{""};  // whatever the environment forces
  Kernels tiles_ = named("tiles", &counted), plain_ = named("plain", nullptr), slow_ = named("slow", nullptr);
};

TEST_F(Choice, AsksForWhatItTakes) {
  const KernelList list{&tiles_, &plain_, &slow_};
  EXPECT_EQ(choose(list).name, "tiles");
  EXPECT_EQ(asked, 1);
}

TEST_F(Choice, TakesTheNextWhereRefused) {
  permits = false;
  const KernelList list{&tiles_, &plain_, &slow_};
  EXPECT_EQ(choose(list).name, "plain");
  EXPECT_EQ(asked, 1);
}

TEST_F(Choice, AsksForNothingBelowTheFirst) {
  const KernelList list{&plain_, &tiles_};
  EXPECT_EQ(choose(list).name, "plain");
  EXPECT_EQ(asked, 0);
}

TEST_F(Choice, SaysWhereNothingIsPermitted) {
  permits = false;
  const KernelList list{&tiles_};
  try {
    choose(list);
    FAIL() << "chose";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_NE(std::string(error.what()).find("path tiles"), std::string::npos) << error.what();
  }
}

// On whatever processor: what needs permission stands before what doesn't, which stands last.
TEST_F(Choice, EveryListEndsInAPathThatNeedsNoPermission) {
  for (const Precision products : {Precision::f32, Precision::bf16}) {
    const KernelList list = candidates(products);
    ASSERT_FALSE(list.empty());
    for (const Kernels* kernels : list) EXPECT_EQ(kernels->permission == nullptr, kernels == list.back());
  }
  EXPECT_EQ(candidates(Precision::f32).size(), 1U);
}

}  // namespace
}  // namespace pbsattn::cpu
