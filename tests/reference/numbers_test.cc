#include "reference/numbers.h"

#include <gtest/gtest.h>

namespace pbsattn::reference {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

TEST(Numbers, F16KnownValues) {
  EXPECT_EQ(from_f16(0x3C00), 1.0);
  EXPECT_EQ(from_f16(0xC000), -2.0);
  EXPECT_EQ(from_f16(0x7BFF), 65504.0);
  EXPECT_EQ(from_f16(0x0001), 0x1p-24);
  EXPECT_EQ(from_f16(0x0400), 0x1p-14);
  EXPECT_EQ(from_f16(0xFC00), -infinity);
  EXPECT_TRUE(std::isnan(from_f16(0x7C01)));
  EXPECT_EQ(from_bf16(0x3F80), 1.0);
  EXPECT_EQ(from_bf16(0xC049), -3.140625);
}

TEST(Numbers, EveryValueSurvivesTheRoundTrip) {
  for (std::uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const auto b = static_cast<std::uint16_t>(bits);
    ASSERT_TRUE(std::isnan(from_f16(b)) || to_f16(from_f16(b)) == b) << b;
    ASSERT_TRUE(std::isnan(from_bf16(b)) || to_bf16(from_bf16(b)) == b) << b;
  }
  EXPECT_TRUE(std::isnan(from_f16(to_f16(std::nan("")))));
  EXPECT_TRUE(std::isnan(from_bf16(to_bf16(std::nan("")))));
}

TEST(Numbers, RoundsToNearestEven) {
  EXPECT_EQ(round_to(DType::f16, 1 + 0x1p-11), 1.0);             // half a unit: to even, down
  EXPECT_EQ(round_to(DType::f16, 1 + 3 * 0x1p-11), 1 + 0x1p-9);  // half a unit: to even, up
  EXPECT_EQ(round_to(DType::f16, 1 + 0x1p-11 + 0x1p-40), 1 + 0x1p-10);
  EXPECT_EQ(round_to(DType::bf16, 1 + 0x1p-8), 1.0);
  EXPECT_EQ(round_to(DType::bf16, -1 - 3 * 0x1p-8), -1 - 0x1p-6);
  EXPECT_EQ(round_to(DType::f32, 1 + 0x1p-24), 1.0);
}

TEST(Numbers, RangeEndsInSubnormalsAndInfinity) {
  EXPECT_EQ(round_to(DType::f16, 65519.9), 65504.0);
  EXPECT_EQ(round_to(DType::f16, 65520.0), infinity);
  EXPECT_EQ(round_to(DType::f16, 0x1p-25), 0.0);
  EXPECT_EQ(round_to(DType::f16, 0x1.8p-24), 0x1p-23);
  EXPECT_EQ(round_to(DType::bf16, -1e39), -infinity);
  EXPECT_EQ(round_to(DType::f32, 1e39), infinity);
  EXPECT_EQ(round_to(DType::f32, std::numeric_limits<float>::denorm_min()), std::numeric_limits<float>::denorm_min());
}

}  // namespace
}  // namespace pbsattn::reference
