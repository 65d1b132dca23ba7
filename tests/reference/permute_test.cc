// Blocks of 2, segments of 4, one dimension, scale 1: everything is worked out by hand.
#include <gtest/gtest.h>

#include <cmath>

#include "reference/by_hand.h"

namespace pbsattn::reference {
namespace {

Geometry geometry(std::int64_t q_len, std::int64_t kv_len) {
  return {.shape = {.q_len = q_len, .kv_len = kv_len, .head_dim = 1}, .block = 2, .segment = 4};
}

TEST(KeyScores, MeanOfTheLastBlocksSoftmaxOverCompleteSegments) {
  // Queries 4 and 5 score keys 0 .. 3; keys 4 and 5 are in no complete segment. Query 5 weighs the keys
  // 1 : 2 : 3 : 4, query 4 weighs them equally.
  const Head head{.q = column({9, 9, 9, 9, 0, 1}),
                  .k = column({std::log(1), std::log(2), std::log(3), std::log(4), 50, 50}),
                  .v = column({0, 0, 0, 0, 0, 0})};
  const auto scores = key_scores(head, geometry(6, 6), Logits(1.0));
  ASSERT_EQ(scores.size(), 4);
  EXPECT_NEAR(scores[0], (0.25 + 0.1) / 2, 1e-15);
  EXPECT_NEAR(scores[1], (0.25 + 0.2) / 2, 1e-15);
  EXPECT_NEAR(scores[2], (0.25 + 0.3) / 2, 1e-15);
  EXPECT_NEAR(scores[3], (0.25 + 0.4) / 2, 1e-15);
}

TEST(KeyScores, NoCausalMaskAndFewerQueriesThanABlock) {
  // The only query is token 3; a second one, token 2, would still see key 3.
  const Head one{.q = column({1}), .k = column({0, 0, 0, std::log(5)}), .v = column({0, 0, 0, 0})};
  EXPECT_NEAR(key_scores(one, geometry(1, 4), Logits(1.0))[3], 5.0 / 8, 1e-15);
  const Head two{.q = column({1, 0}), .k = one.k, .v = one.v};
  EXPECT_NEAR(key_scores(two, geometry(2, 4), Logits(1.0))[3], (5.0 / 8 + 0.25) / 2, 1e-15);
}

TEST(KeyScores, ScaleMultipliesScores) {
  const Head head{.q = column({1}), .k = column({0, 0, 0, std::log(25)}), .v = column({0, 0, 0, 0})};
  EXPECT_NEAR(key_scores(head, geometry(1, 4), Logits(0.5))[3], 5.0 / 8, 1e-15);
}

TEST(KeyScores, CappedLogits) {
  // Query 5 weighs the keys 1 : 3 : 9 : 1/3, query 4 weighs them equally.
  const Head head{
      .q = column({0, 0, 0, 0, 0, 1}), .k = column({0, to_log3, to_log9, -to_log3, 0, 0}), .v = column({0})};
  const auto scores = key_scores(head, geometry(6, 6), Logits(1, softcap));
  const std::vector<double> third{3, 9, 27, 1};  // in thirds
  ASSERT_EQ(scores.size(), 4);
  for (std::size_t n = 0; n < 4; ++n) EXPECT_NEAR(scores[n], (0.25 + third[n] / 40) / 2, 1e-15) << n;
}

TEST(KeyScores, ACapMayChangeTheOrder) {
  // Query 4 weighs the keys 9 : 9 : 1 : 1; uncapped, key 0 has it all. Query 5 weighs them 3^-1.6 : 1/3 : 1 : 1, since
  // tanh(log 3) is 0.8; uncapped, about 0.09 : 0.3 : 1 : 1. So key 1 has the highest mean; uncapped, the lowest.
  const Head head{.q = column({0, 0, 0, 0, 1, -to_log3 / 500}), .k = column({1000, 500, 0, 0, 0, 0}), .v = column({0})};
  const Geometry g = geometry(6, 6);
  EXPECT_EQ(order_keys(g, key_scores(head, g, Logits(1, softcap))), (List{1, 0, 2, 3, 4, 5}));
  EXPECT_EQ(order_keys(g, key_scores(head, g, Logits(1))), (List{0, 2, 3, 1, 4, 5}));
}

TEST(KeyScores, OneNanSpoilsAll) {
  const Head head{.q = column({1}), .k = column({0, nan, 0, 1}), .v = column({0, 0, 0, 0})};
  for (const double score : key_scores(head, geometry(1, 4), Logits(1.0))) EXPECT_TRUE(std::isnan(score));
}

TEST(LearnedScores, WeighsPairsAndNumbers) {
  Head head{.q = Matrix(1, 4), .k = Matrix(4, 4), .v = Matrix(4, 4)};
  head.k.values = {3, 5, 4, 12, 3, 4, 5, 12, 0, 0, 0, 0, 1, 0, 0, -1};
  const Geometry g{.shape = {.q_len = 1, .kv_len = 4, .head_dim = 4}, .block = 2, .segment = 4};
  const std::vector<float> pairs{1, 100, 0, 0, 0, 0};
  // Of the first key (3, 4) and (5, 12) as halves, of the second as neighbours.
  EXPECT_EQ(learned_scores(head, g, pairs, RopePairs::halves)[0], 5 + 100 * 13);
  EXPECT_EQ(learned_scores(head, g, pairs, RopePairs::neighbours)[1], 5 + 100 * 13);
  EXPECT_EQ(learned_scores(head, g, pairs, RopePairs::halves)[3], 1 + 100 * 1);
  const std::vector<float> numbers{0, 0, 1, 10, 100, -1000};
  EXPECT_EQ(learned_scores(head, g, numbers, RopePairs::neighbours),
            (std::vector<double>{3 + 50 + 400 - 12'000, 3 + 40 + 500 - 12'000, 0, 1 + 1000}));
}

TEST(LearnedScores, OfAnOddWidthTheLastColumnHasNoPair) {
  Head head{.q = Matrix(1, 3), .k = Matrix(2, 3), .v = Matrix(2, 3)};
  head.k.values = {3, 4, 7, 0, 0, 1};
  const Geometry g{.shape = {.q_len = 1, .kv_len = 2, .head_dim = 3}, .block = 2, .segment = 2};
  EXPECT_EQ(learned_scores(head, g, std::vector<float>{1, 0, 0, 2}, RopePairs::halves),
            (std::vector<double>{5 + 14, 2}));
}

TEST(LearnedScores, WeightsOfZeroLeaveEveryKeyInItsPlace) {
  Head head{.q = Matrix(1, 2), .k = Matrix(4, 2), .v = Matrix(4, 2)};
  head.k.values = {1, 2, nan, 3, HUGE_VAL, 4, 9, 9};
  const Geometry g{.shape = {.q_len = 1, .kv_len = 4, .head_dim = 2}, .block = 2, .segment = 4};
  const auto zero = learned_scores(head, g, std::vector<float>(3, 0.0F), RopePairs::halves);
  EXPECT_EQ(zero, std::vector<double>(4, 0.0));
  EXPECT_EQ(order_keys(g, zero), identity(4));
  EXPECT_EQ(order_keys(g, learned_scores(head, g, std::vector<float>{1, 0, 0}, RopePairs::halves)), (List{3, 0, 1, 2}))
      << "0 * inf is NaN, which is last";
}

TEST(OrderKeys, DescendsWithinSegmentsAndKeepsTheTail) {
  const std::vector<double> scores{0.1, 0.2, 0.3, 0.4, 0.9, 0.0, 0.8, 0.7};
  EXPECT_EQ(order_keys(geometry(11, 11), scores), (std::vector<std::int32_t>{3, 2, 1, 0, 4, 6, 7, 5, 8, 9, 10}));
}

TEST(OrderKeys, TiesInTokenOrderAndNanLast) {
  EXPECT_EQ(order_keys(geometry(4, 4), std::vector<double>{0.2, 0.3, 0.2, 0.3}),
            (std::vector<std::int32_t>{1, 3, 0, 2}));
  EXPECT_EQ(order_keys(geometry(4, 4), std::vector<double>{nan, 0.0, nan, 0.1}),
            (std::vector<std::int32_t>{3, 1, 0, 2}));
  EXPECT_EQ(order_keys(geometry(4, 4), std::vector<double>(4, nan)), (std::vector<std::int32_t>{0, 1, 2, 3}));
}

TEST(OrderKeys, ShorterThanASegmentKeepsItsOrder) {
  EXPECT_EQ(order_keys(geometry(3, 3), {}), (std::vector<std::int32_t>{0, 1, 2}));
}

TEST(PoolKeys, MeansOfPermutedBlocks) {
  const Head head{.q = column({0}), .k = column({1, 2, 3, 4, 100}), .v = column({0, 0, 0, 0, 0})};
  const Matrix pooled = pool_keys(head, geometry(1, 5), std::vector<std::int32_t>{3, 0, 1, 2, 4});
  EXPECT_EQ(pooled.values, (std::vector<double>{2.5, 2.5}));  // the incomplete segment is never scored
}

TEST(PoolKeys, RoundsToTheKeysDtype) {
  Head head{.q = column({0}), .k = column({1, 1 + 0x1p-7, 0, 0}), .v = column({0, 0, 0, 0})};
  const std::vector<std::int32_t> order{0, 1, 2, 3};
  EXPECT_EQ(pool_keys(head, geometry(1, 4), order).values[0], 1 + 0x1p-8);
  head.k_dtype = DType::bf16;  // 8 bits: 1 + 2^-8 is halfway and goes to even
  EXPECT_EQ(pool_keys(head, geometry(1, 4), order).values[0], 1.0);
}

}  // namespace
}  // namespace pbsattn::reference
