#include "core/score_traits.h"

#include <gtest/gtest.h>

#include <vector>

namespace pbsattn {
namespace {

std::vector<std::int64_t> frequencies(FrequencyBand band) {
  std::vector<std::int64_t> all;
  for (std::int64_t i = -1; i <= 100; ++i)
    if (band.has(i)) all.push_back(i);
  EXPECT_EQ(std::ssize(all), band.count());
  return all;
}

TEST(ScoreTraits, BandsAreTheFasterHalfAndTheSlowerThreeQuarters) {
  using List = std::vector<std::int64_t>;
  EXPECT_EQ(frequencies(fast_band(8)), (List{0, 1, 2, 3}));
  EXPECT_EQ(frequencies(slow_band(8)), (List{2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(frequencies(fast_band(7)), (List{0, 1, 2})) << "whole frequencies, rounded down";
  EXPECT_EQ(frequencies(slow_band(7)), (List{2, 3, 4, 5, 6}));
  EXPECT_EQ(frequencies(fast_band(1)), List{});
  EXPECT_EQ(frequencies(slow_band(1)), List{});
}

TEST(ScoreTraits, SampledQueriesAreEvenlySpacedAndEndWithTheLast) {
  for (const std::int64_t queries : {1, 5, 8, 9, 100, 128}) {
    SCOPED_TRACE(queries);
    const std::int64_t count = sampled_queries(queries);
    EXPECT_EQ(count, queries < 8 ? queries : 8);
    EXPECT_EQ(sampled_query(queries, count - 1), queries - 1);
    std::int64_t before = -1;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t gap = sampled_query(queries, i) - before;
      EXPECT_TRUE(gap == queries / count || gap == (queries + count - 1) / count) << gap;
      before += gap;
    }
  }
}

TEST(ScoreTraits, SampledQueriesOfAnyNumber) {
  EXPECT_EQ(sampled_queries(128, 32), 32);
  EXPECT_EQ(sampled_queries(20, 32), 20);
  EXPECT_EQ(sampled_query(128, 0, 32), 3);
  EXPECT_EQ(sampled_query(128, 31, 32), 127);
  EXPECT_EQ(sampled_query(100, 0, 1), 99);
}

}  // namespace
}  // namespace pbsattn
