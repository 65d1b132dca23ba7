// Blocks of 8 and one dimension, so that a block is one patch wide and everything is worked out by hand.
#include <gtest/gtest.h>

#include <cmath>

#include "reference/by_hand.h"

namespace pbsattn::reference {
namespace {

Geometry geometry(std::int64_t q_len, std::int64_t kv_len, int segment = 8) {
  return {.shape = {.q_len = q_len, .kv_len = kv_len, .head_dim = 1}, .block = 8, .segment = segment};
}

Head head(std::int64_t q_len, std::int64_t kv_len) {
  return {.q = Matrix(q_len, 1), .k = Matrix(kv_len, 1), .v = Matrix(kv_len, 1)};
}

TEST(Antidiagonal, FirstQueryMeetsLastKey) {
  Head h = head(16, 16);
  h.q[8][0] = 1;                // the row's first query stands opposite each patch's last key
  h.k[7][0] = 8 * std::log(3);  // a patch's score is the mean over its antidiagonal of 8
  h.k[0][0] = 1000;             // not opposite it
  const auto causal = antidiagonal_scores(h, geometry(16, 16), 1, identity(16), true, Logits(1.0));
  ASSERT_EQ(causal.size(), 2);
  EXPECT_NEAR(causal[0], 0.75, 1e-15);
  EXPECT_NEAR(causal[1], 0.25, 1e-15);
  const auto before = antidiagonal_scores(h, geometry(16, 16), 1, identity(16), false, Logits(1.0));
  ASSERT_EQ(before.size(), 1);
  EXPECT_EQ(before[0], 1);
}

TEST(Antidiagonal, LastQueryMeetsFirstKeyInTheGivenOrder) {
  Head h = head(24, 24);
  h.q[23][0] = 2;
  h.k[3][0] = 4 * std::log(4);
  auto order = identity(24);
  std::swap(order[3], order[8]);  // token 3 is the second block's first key
  const auto scores = antidiagonal_scores(h, geometry(24, 24), 2, order, false, Logits(1.0));
  ASSERT_EQ(scores.size(), 2);
  EXPECT_NEAR(scores[0], 1.0 / 5, 1e-15);  // 2 * 4 log 4 / 8 against 0
  EXPECT_NEAR(scores[1], 4.0 / 5, 1e-15);
}

TEST(Antidiagonal, TheMeanOfAPatchIsCapped) {
  Head h = head(24, 24);
  h.q[16][0] = 1;
  h.k[7][0] = 8 * to_log3;  // the mean of its patch is an eighth
  h.k[15][0] = to_log9;     // an eighth is far over the cap too
  const auto causal = antidiagonal_scores(h, geometry(24, 24), 2, identity(24), true, Logits(1, softcap));
  ASSERT_EQ(causal.size(), 3);
  for (std::size_t b = 0; b < 3; ++b) EXPECT_NEAR(causal[b], (std::vector<double>{3, 9, 1})[b] / 13, 1e-15) << b;
  const auto before = antidiagonal_scores(h, geometry(24, 24), 2, identity(24), false, Logits(1, softcap));
  EXPECT_NEAR(before[0], 3.0 / 12, 1e-15);
}

TEST(Antidiagonal, RowsOfPatchesAreAveraged) {
  Head h = head(32, 32);
  h.q[16][0] = 1;  // of two rows of patches in the second block of 16, only the first has a preference
  h.k[7][0] = 8 * std::log(3);
  const Geometry g{.shape = {.q_len = 32, .kv_len = 32, .head_dim = 1}, .block = 16, .segment = 16};
  const auto scores = antidiagonal_scores(h, g, 1, identity(32), true, Logits(1.0));
  // Row of patches 2 sees patches 0, 1 and 2 with weights 3, 1, 1; row 3 sees four alike.
  EXPECT_NEAR(scores[0], (4.0 / 5 + 2.0 / 4) / 2, 1e-15);
  EXPECT_NEAR(scores[1], (1.0 / 5 + 2.0 / 4) / 2, 1e-15);
}

TEST(Antidiagonal, WhatIsAlwaysKeptCountsFirst) {
  const Options options{
      .score = BlockScore::antidiagonal_causal, .keep = KeepRule::top_p, .top_p = 0.5F, .block = 8, .segment = 8};
  const auto select = [&](const std::vector<double>& scores) {
    return select_blocks(options, geometry(40, 40), 4, {scores}, identity(40));
  };
  EXPECT_EQ(select({0.25, 0.125, 0.125, 0.25, 0.25}), (List{0, 4})) << "they reach it alone";
  EXPECT_EQ(select({0.125, 0.125, 0.125, 0.5, 0.125}), (List{0, 3, 4}));
  EXPECT_EQ(select({0.0, 0.3, 0.1, 0.4, 0.2}), (List{0, 3, 4}));
  EXPECT_EQ(select({0.0, 0.3, 0.2, 0.4, 0.1}), (List{0, 3, 4})) << "reaching is enough";
}

TEST(Antidiagonal, ChunksCountTheirOwnQueries) {
  Head h = head(4, 16);  // tokens 12 .. 15: half a patch
  h.q[3][0] = 1;
  h.k[0][0] = 8 * std::log(3);
  const auto scores = antidiagonal_scores(h, geometry(4, 16), 0, identity(16), true, Logits(1.0));
  EXPECT_NEAR(scores[0], 0.75, 1e-15);
  EXPECT_NEAR(scores[1], 0.25, 1e-15);
}

}  // namespace
}  // namespace pbsattn::reference
