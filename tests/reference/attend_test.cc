// Blocks of 2, segments of 4, small numbers: everything is worked out by hand.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "reference/by_hand.h"

namespace pbsattn::reference {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
const List in_order{0, 1, 2, 3, 4, 5};

// Makes six tokens, all of them queries of 1; weights of keys 0 .. 5 are 1 : 2 : 3 : 4 : 5 : 6; values (2^n, 1).
Head weighted() {
  Head head{
      .q = matrix(1, {1, 1, 1, 1, 1, 1}), .k = matrix(1, {0, 0, 0, 0, 0, 0}), .v = matrix(2, std::vector(12, 1.0))};
  for (int n = 0; n < 6; ++n) {
    head.k[n][0] = std::log(n + 1);
    head.v[n][0] = 1 << n;
  }
  return head;
}

Geometry geometry(std::int64_t q_len) {
  return {.shape = {.q_len = q_len, .kv_len = 6, .head_dim = 1}, .block = 2, .segment = 4};
}

TEST(AttendQuery, CausalInItsOwnSegment) {
  const auto first = attend_query(weighted(), geometry(6), Logits(1.0), 0, in_order, List{0});
  EXPECT_EQ(first.out, (std::vector<double>{1, 1}));
  EXPECT_EQ(first.lse, 0.0);
  // Token 2 sees keys 0, 1, 2: (1*1 + 2*2 + 3*4) / 6.
  const auto third = attend_query(weighted(), geometry(6), Logits(1.0), 2, in_order, List{0, 1});
  EXPECT_NEAR(third.out[0], 17.0 / 6, 1e-15);
  EXPECT_NEAR(third.out[1], 1.0, 1e-15);
  EXPECT_NEAR(third.lse, std::log(6), 1e-15);
}

TEST(AttendQuery, OnlyListedBlocks) {
  // Token 5 over block 1 (keys 2, 3) and its own block 2 (keys 4, 5):
  // (3*4 + 4*8 + 5*16 + 6*32) / 18.
  const auto result = attend_query(weighted(), geometry(6), Logits(1.0), 5, in_order, List{1, 2});
  EXPECT_NEAR(result.out[0], 316.0 / 18, 1e-14);
  EXPECT_NEAR(result.lse, std::log(18), 1e-14);
}

TEST(AttendQuery, EarlierBlocksArePermutedAndTheOwnSegmentIsNot) {
  const List order{3, 1, 0, 2, 4, 5};
  // Token 4 over block 0, which holds keys 3 and 1, and key 4: (4*8 + 2*2 + 5*16) / 11.
  EXPECT_NEAR(attend_query(weighted(), geometry(6), Logits(1.0), 4, order, List{0, 2}).out[0], 116.0 / 11, 1e-14);
  // Token 1's own segment is read in its original order, whatever the permutation: (1*1 + 2*2) / 3.
  EXPECT_NEAR(attend_query(weighted(), geometry(6), Logits(1.0), 1, order, List{0}).out[0], 5.0 / 3, 1e-15);
}

TEST(AttendQuery, ChunkQueriesAreTheLastTokens) {
  Head head = weighted();
  head.q = matrix(1, {1, 1});  // tokens 4 and 5
  EXPECT_NEAR(attend_query(head, geometry(2), Logits(1.0), 0, in_order, List{2}).out[0], 16.0, 1e-14);
  EXPECT_NEAR(attend_query(head, geometry(2), Logits(1.0), 1, in_order, List{2}).out[0], (5 * 16 + 6 * 32) / 11.0,
              1e-14);
}

TEST(AttendQuery, ScaleMultipliesScores) {
  Head head = weighted();
  for (double& k : head.k.values) k *= 4;
  EXPECT_NEAR(attend_query(head, geometry(6), Logits(0.25), 2, in_order, List{0, 1}).out[0], 17.0 / 6, 1e-14);
}

TEST(AttendQuery, HugeScoresDoNotOverflow) {
  Head head = weighted();
  for (int n = 0; n < 6; ++n) head.k[n][0] += 1e5;
  const auto result = attend_query(head, geometry(6), Logits(1.0), 2, in_order, List{0, 1});
  EXPECT_NEAR(result.out[0], 17.0 / 6, 1e-9);
  EXPECT_NEAR(result.lse, 1e5 + std::log(6), 1e-9);
}

TEST(AttendQuery, MinusInfinityHidesAKeyAndAllOfThemGiveZero) {
  Head head = weighted();
  head.k[1][0] = -infinity;
  EXPECT_NEAR(attend_query(head, geometry(6), Logits(1.0), 2, in_order, List{0, 1}).out[0], (1 * 1 + 3 * 4) / 4.0,
              1e-15);
  head.k[0][0] = -infinity;
  const auto nothing = attend_query(head, geometry(6), Logits(1.0), 1, in_order, List{0});
  EXPECT_EQ(nothing.out, (std::vector<double>{0, 0}));
  EXPECT_EQ(nothing.lse, -infinity);
}

TEST(AttendQuery, NanSpoilsThoseWhoSeeIt) {
  Head head = weighted();
  head.k[3][0] = nan;
  head.v[2][0] = infinity;
  EXPECT_TRUE(std::isnan(attend_query(head, geometry(6), Logits(1.0), 3, in_order, List{0, 1}).out[1]));
  EXPECT_EQ(attend_query(head, geometry(6), Logits(1.0), 2, in_order, List{0, 1}).out[0], infinity);
  EXPECT_NEAR(attend_query(head, geometry(6), Logits(1.0), 1, in_order, List{0}).out[0], 5.0 / 3, 1e-15);
  EXPECT_NEAR(attend_query(head, geometry(6), Logits(1.0), 5, in_order, List{0, 2}).out[0], 277.0 / 14, 1e-14);
  head.k[1][0] = infinity;
  EXPECT_TRUE(std::isnan(attend_query(head, geometry(6), Logits(1.0), 1, in_order, List{0}).out[0]));
}

TEST(AttendQuery, OfScoresOfMinusInfinityToo) {
  Head head = weighted();
  for (double& k : head.k.values) k = -infinity;
  head.v[1][0] = nan;
  head.v[3][1] = infinity;
  const auto out = [&](std::int64_t query, const List& list, const PooledBlocks* pooled = nullptr) {
    const auto result = attend_query(head, geometry(6), Logits(1.0), query, in_order, list, pooled);
    EXPECT_EQ(result.lse, -infinity);
    return result.out;
  };
  EXPECT_EQ(out(0, {0}), (std::vector<double>{0, 0}));
  EXPECT_TRUE(std::isnan(out(1, {0})[0]));
  EXPECT_EQ(out(1, {0})[1], 0);
  EXPECT_TRUE(std::isnan(out(3, {0, 1})[1]));
  EXPECT_EQ(out(4, {2}), (std::vector<double>{0, 0}));  // lists neither block
  const PooledBlocks pooled{pool_keys(head, geometry(6), in_order), pool_values(head, geometry(6), in_order)};
  EXPECT_TRUE(std::isnan(out(4, {2}, &pooled)[0]) && std::isnan(out(4, {2}, &pooled)[1]));
}

TEST(AttendQuery, LeftOutBlocksAnswerAsTheirMeans) {
  // Blocks of 2, segments of 2: query 5 lists blocks 0 and 2, so block 1 is two keys of its mean score log 3 and
  // value 7.
  Head head{.q = Matrix(6, 1), .k = Matrix(6, 1), .v = Matrix(6, 1)};
  head.q[5][0] = 1;
  head.k[2][0] = std::log(9);
  head.v[2][0] = 10;
  head.v[3][0] = 4;
  head.v[0][0] = 1;
  const Geometry g{.shape = {.q_len = 6, .kv_len = 6, .head_dim = 1}, .block = 2, .segment = 2};
  const std::vector<std::int32_t> order{0, 1, 2, 3, 4, 5};
  const PooledBlocks pooled{pool_keys(head, g, order), pool_values(head, g, order)};
  const std::vector<std::int32_t> list{0, 2};
  const QueryResult result = attend_query(head, g, Logits(1.0), 5, order, list, &pooled);
  EXPECT_NEAR(result.out[0], (1 + 2 * 3 * 7) / (4 + 2 * 3.0), 1e-7);
  EXPECT_NEAR(result.lse, std::log(10), 1e-7);
  // What is listed isn't counted again, and a mean of its keys alone is exact where they are alike.
  EXPECT_NEAR(attend_query(head, g, Logits(1.0), 5, order, std::vector<std::int32_t>{0, 1, 2}, &pooled).lse,
              attend_query(head, g, Logits(1.0), 5, order, std::vector<std::int32_t>{0, 1, 2}).lse, 0);
  EXPECT_NEAR(attend_query(head, g, Logits(1.0), 3, order, std::vector<std::int32_t>{1}, &pooled).lse, std::log(4),
              1e-7);
}

}  // namespace
}  // namespace pbsattn::reference
