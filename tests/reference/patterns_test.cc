// Columns and diagonals: what a head keeps by its last queries.
#include <gtest/gtest.h>

#include <cmath>

#include "reference/definition.h"

namespace pbsattn::reference {
namespace {

using Row = std::vector<bool>;

Geometry geometry(std::int64_t q_len, std::int64_t kv_len, int block) {
  return {.shape = {.q_len = q_len, .kv_len = kv_len, .head_dim = 2}, .block = block, .segment = block};
}

// Makes a head whose queries all look at one key.
Head looking_at(std::int64_t q_len, std::int64_t kv_len, std::int64_t key) {
  Head head{.q = Matrix(q_len, 2), .k = Matrix(kv_len, 2), .v = Matrix(kv_len, 2)};
  for (std::int64_t i = 0; i < q_len; ++i) head.q[i][0] = 1;
  head.k[key][0] = 20;
  return head;
}

Options minference(int vertical, int slash) {
  Options options = method("minference");
  options.vertical = vertical;
  options.slash = slash;
  options.block = options.segment = 32;
  options.scale = 1;
  return options;
}

Row kept(const Pattern& pattern, std::int64_t row) {
  return pattern[row];
}

TEST(VerticalSlash, ColumnsAreKeptInEveryRow) {
  // 320 keys, 10 blocks. The column that all look at is in block 4; 30 columns go to the first ones whatever comes.
  const Head head = looking_at(320, 320, 140);
  const auto pattern = vertical_slash_pattern(head, minference(31, 50), geometry(320, 320, 32));
  for (std::int64_t row = 0; row < 10; ++row)
    for (std::int64_t b = 0; b <= row; ++b)
      // Distances under 50 reach two blocks back.
      EXPECT_EQ(kept(pattern, row)[b], b == 0 || b == 4 || b >= row - 2) << "row " << row << ", block " << b;
  const auto without = vertical_slash_pattern(head, minference(30, 50), geometry(320, 320, 32));
  EXPECT_FALSE(kept(without, 9)[4]) << "the first columns come before all others";
}

TEST(VerticalSlash, DiagonalsAreKeptAtTheirDistance) {
  // Query t looks at key t - 200 alone, by angles of 320 to the circle.
  constexpr double turn = 2 * 3.14159265358979323846 / 320;
  Head head{.q = Matrix(320, 2), .k = Matrix(320, 2), .v = Matrix(320, 2)};
  for (std::int64_t n = 0; n < 320; ++n) {
    head.k[n][0] = 200 * std::cos(turn * n);
    head.k[n][1] = 200 * std::sin(turn * n);
    head.q[n][0] = 200 * std::cos(turn * (n - 200));
    head.q[n][1] = 200 * std::sin(turn * (n - 200));
  }
  const auto pattern = vertical_slash_pattern(head, minference(30, 101), geometry(320, 320, 32));
  // Distance 200 of row 9 (tokens 288 .. 319) is keys 88 .. 119: blocks 2 and 3; distances under 100 reach block 5.
  EXPECT_EQ(kept(pattern, 9), (Row{true, false, true, true, false, true, true, true, true, true}));
  EXPECT_EQ(kept(pattern, 7), (Row{true, true, false, true, true, true, true, true})) << "keys 24 .. 55, 125 and up";
}

TEST(VerticalSlash, ChunksAndShortCalls) {
  const Head one = looking_at(1, 1, 0);
  EXPECT_EQ(kept(vertical_slash_pattern(one, minference(0, 0), geometry(1, 1, 32)), 0), (Row{true}));
  // A chunk of 40 of 320 tokens has rows 8 (8 of its queries) and 9.
  const auto pattern = vertical_slash_pattern(looking_at(40, 320, 140), minference(31, 50), geometry(40, 320, 32));
  ASSERT_EQ(pattern.size(), 2U);
  EXPECT_EQ(kept(pattern, 0), (Row{true, false, false, false, true, false, false, true, true}));
}

TEST(VerticalSlash, NanQueriesCountNothing) {
  Head head = looking_at(320, 320, 140);
  for (std::int64_t i = 256; i < 320; ++i) head.q[i][0] = std::nan("");
  const auto pattern = vertical_slash_pattern(head, minference(31, 50), geometry(320, 320, 32));
  EXPECT_EQ(kept(pattern, 9), (Row{true, false, false, false, false, false, false, true, true, true}));
}

Options flexprefill(float gamma, float tau, int min_budget) {
  Options options = method("flexprefill");
  options.top_p = gamma;
  options.tau = tau;
  options.min_budget = min_budget;
  options.block = options.segment = 2;
  options.scale = 1;
  return options;
}

Pattern flexible(const Head& head, const Options& options, const Geometry& of) {
  return flexible_pattern(head, options, of, pool_own_keys(head, options, of));
}

TEST(Flexible, ShortCallsAreDense) {
  const Head head = looking_at(4, 4, 0);
  EXPECT_EQ(flexible(head, flexprefill(0.5F, 0.1F, 1), geometry(4, 4, 2)), (Pattern{{true}, {true, true}}));
  const auto six = flexible(looking_at(6, 6, 0), flexprefill(0.5F, 0.1F, 6), geometry(6, 6, 2));
  EXPECT_EQ(six, (Pattern{{true}, {true, true}, {true, true, true}})) << "a budget of three blocks has all of them";
}

TEST(Flexible, ColumnsAndDistancesWhereTheyAreNotWhatPoolingPredicts) {
  // 16 keys. The last two queries look at key 6; pooling sees half of it.
  Head head = looking_at(16, 16, 6);
  const auto pattern = flexible(head, flexprefill(0.9F, 0.0F, 1), geometry(16, 16, 2));
  // One token has more than .9, so no token stays within it, and one block is taken: block 0, then the column's. Of the
  // distances 8 and 9 (queries 14 and 15) one is over .45, the next over .9: one stays, and one block more is taken,
  // the own and the one 4 back.
  Options options = flexprefill(0.9F, 0.0F, 1);
  EXPECT_FALSE(kept(pattern, 7)[3] && kept(pattern, 6)[3] && kept(pattern, 5)[3]) << "the budget is one block, block 0";
  options.min_budget = 4;
  const auto more = flexible(head, options, geometry(16, 16, 2));
  for (std::int64_t row = 3; row < 8; ++row) {
    EXPECT_TRUE(kept(more, row)[0]);
    EXPECT_TRUE(kept(more, row)[3]) << "the column's block, in every row";
    EXPECT_TRUE(kept(more, row)[row]);
  }
  EXPECT_TRUE(kept(more, 6)[2]) << "4 blocks back";
  EXPECT_FALSE(kept(more, 6)[4]);
}

TEST(Flexible, PooledAttentionWhereItPredictsTheColumns) {
  // Keys of a block are alike, so that pooling loses nothing, and the divergence is 0: also where other blocks' shares
  // are 0 in both distributions, since 0 log 0 is 0.
  for (const double weight : {20, 1000}) {
    Head head = looking_at(16, 16, 6);
    head.k[6][0] = head.k[7][0] = weight;
    const auto pattern = flexible(head, flexprefill(0.9F, 0.1F, 1), geometry(16, 16, 2));
    // Rows 0 .. 2 see nothing of it: their attention is even, and the last of it is left out.
    for (std::int64_t row = 3; row < 8; ++row) {
      EXPECT_TRUE(kept(pattern, row)[3]) << row;
      for (std::int64_t b = 1; b < row; ++b)
        EXPECT_EQ(kept(pattern, row)[b], b == 3) << weight << ": row " << row << ", block " << b;
    }
  }
}

TEST(Flexible, NanGoesByColumns) {
  Head head = looking_at(16, 16, 6);
  head.q[15][0] = std::nan("");
  const auto pattern = flexible(head, flexprefill(0.9F, 1.0F, 1), geometry(16, 16, 2));
  for (std::int64_t row = 0; row < 8; ++row) EXPECT_TRUE(kept(pattern, row)[0] && kept(pattern, row)[row]);
}

TEST(Flexible, GoesByTheMeansThatItIsHanded) {
  // By means that say that all keys are alike, the last row's attention is even, and comes last.
  const Head head = looking_at(16, 16, 6);
  const Options options = flexprefill(0.9F, 1.0F, 1);
  EXPECT_TRUE(kept(flexible(head, options, geometry(16, 16, 2)), 7)[3]);
  EXPECT_FALSE(kept(flexible_pattern(head, options, geometry(16, 16, 2), Matrix(8, 2)), 7)[3]);
}

// Two columns draw every query's attention, and there is room for one of them.
TEST(VerticalSlash, MarginTellsOfNearTies) {
  for (const double apart : {0.0, 1e-6, 0.1}) {
    SCOPED_TRACE(apart);
    Head head = looking_at(320, 320, 140);
    head.k[60][0] = 20 - apart;
    double margin = 1;
    vertical_slash_pattern(head, minference(31, 100), geometry(320, 320, 32), &margin);
    EXPECT_NEAR(margin, 1 - std::exp(-apart), 1e-9);
  }
}

}  // namespace
}  // namespace pbsattn::reference
