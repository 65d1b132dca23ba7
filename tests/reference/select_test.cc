// Blocks of 2, segments of 4, one dimension, scale 1: everything is worked out by hand.
#include <gtest/gtest.h>

#include <cmath>

#include "reference/by_hand.h"

namespace pbsattn::reference {
namespace {

const Options top_p_options{.score = BlockScore::mean_pool, .keep = KeepRule::top_p, .block = 2, .segment = 4};

Geometry geometry(std::int64_t q_len, std::int64_t kv_len) {
  return {.shape = {.q_len = q_len, .kv_len = kv_len, .head_dim = 1}, .block = 2, .segment = 4};
}

// Selects for row 4 (tokens 8 and 9) of ten tokens: scored blocks 0 .. 3, own segment from block 4.
List select_row_4(const Options& options, const std::vector<double>& scores, const List& order = identity(10)) {
  return select_blocks(options, geometry(10, 10), 4, {scores}, order);
}
List select_row_4(float top_p, const std::vector<double>& scores, const List& order = identity(10)) {
  Options options = top_p_options;
  options.top_p = top_p;
  return select_row_4(options, scores, order);
}

Options options_of(KeepRule keep, float threshold = 0) {
  Options options = top_p_options;
  options.keep = keep;
  options.threshold = threshold;
  return options;
}

TEST(PoolQuery, FullRowsAreMeans) {
  const Head head{.q = column({1, 3, 5, 9}), .k = column({0}), .v = column({0})};
  EXPECT_EQ(pool_query(head, {.rules = Rules::paper}, geometry(4, 4), 1), (std::vector<double>{7}));
  EXPECT_EQ(pool_query(head, {.rules = Rules::reference_code}, geometry(4, 4), 1), (std::vector<double>{7}));
}

TEST(PoolQuery, RulesDifferOnShortRows) {
  const Head tail{.q = column({1, 3, 6}), .k = column({0}), .v = column({0})};
  EXPECT_EQ(pool_query(tail, {.rules = Rules::paper}, geometry(3, 3), 1), (std::vector<double>{6}));
  EXPECT_EQ(pool_query(tail, {.rules = Rules::reference_code}, geometry(3, 3), 1), (std::vector<double>{3}));
  // A chunk of tokens 3, 4 and 5 starts inside block 1: its first row is token 3 alone.
  const Head chunk{.q = column({8, 1, 2}), .k = column({0}), .v = column({0})};
  EXPECT_EQ(pool_query(chunk, {.rules = Rules::paper}, geometry(3, 6), 0), (std::vector<double>{8}));
  EXPECT_EQ(pool_query(chunk, {.rules = Rules::reference_code}, geometry(3, 6), 0), (std::vector<double>{4}));
  EXPECT_EQ(pool_query(chunk, {.rules = Rules::reference_code}, geometry(3, 6), 1), (std::vector<double>{1.5}));
}

TEST(BlockScores, SoftmaxOverBlocksBeforeTheOwnSegment) {
  const Matrix keys = column({std::log(1), std::log(3), 77});
  const auto scores = block_scores(std::vector<double>{1}, keys, 2, Logits(1.0));
  ASSERT_EQ(scores.size(), 2);
  EXPECT_NEAR(scores[0], 0.25, 1e-15);
  EXPECT_NEAR(scores[1], 0.75, 1e-15);
  EXPECT_NEAR(block_scores(std::vector<double>{4}, keys, 2, Logits(0.25))[1], 0.75, 1e-15);
  EXPECT_TRUE(block_scores(std::vector<double>{1}, keys, 0, Logits(1.0)).empty());
}

TEST(BlockScores, NanCountsAsZero) {
  EXPECT_EQ(block_scores(std::vector<double>{1}, column({1, nan}), 2, Logits(1.0)), (std::vector<double>{0, 0}));
}

TEST(PerQueryScores, MeanOfEachQuerysSoftmax) {
  // Row 2 of six tokens: queries 0 and 1, blocks 0 to 2. Shares 1/3 each, and 1/5, 3/5, 1/5.
  const Matrix keys = column({0, std::log(3), 0});
  const Head head{.q = column({9, 9, 9, 9, 0, 1}), .k = column({0}), .v = column({0})};
  const auto scores = per_query_scores(head, geometry(6, 6), 2, keys, Logits(1.0));
  ASSERT_EQ(scores.size(), 3);
  EXPECT_NEAR(scores[0], 4.0 / 15, 1e-15);
  EXPECT_NEAR(scores[1], 7.0 / 15, 1e-15);
  EXPECT_NEAR(scores[2], 4.0 / 15, 1e-15);
  // A chunk of tokens 5 and later: row 0 is query 0 alone, and its mean is over one.
  const Head chunk{.q = column({2}), .k = column({0}), .v = column({0})};
  EXPECT_NEAR(per_query_scores(chunk, geometry(1, 6), 0, keys, Logits(0.5))[1], 0.6, 1e-15);
}

TEST(PerQueryScores, QueriesThatDisagreeAreNotAveragedAway) {
  // Their mean query is 0 and sees no difference between blocks.
  const Matrix keys = column({-1, 0, 0, 1, 0});
  const Head head{.q = column({0, 0, 0, 0, 0, 0, 0, 0, 40, -40}), .k = column({0}), .v = column({0})};
  const auto scores = per_query_scores(head, geometry(10, 10), 4, keys, Logits(1.0));
  EXPECT_NEAR(scores[0], 0.5, 1e-12);
  EXPECT_NEAR(scores[1], 0.0, 1e-12);
  EXPECT_NEAR(scores[3], 0.5, 1e-12);
}

TEST(ExactScores, TrueMassOfVisibleKeys) {
  // Row 2 of six tokens, segments of two blocks: query 4 sees keys 0 .. 4, query 5 all six.
  Head head{.q = column({9, 9, 9, 9, 0, 1}), .k = column({std::log(2), 0, 0, 0, 0, 0}), .v = column({0})};
  const auto scores = exact_scores(head, geometry(6, 6), 2, identity(6), Logits(1.0));
  ASSERT_EQ(scores.size(), 3);
  EXPECT_NEAR(scores[0], (2.0 / 5 + 3.0 / 7) / 2, 1e-15);
  EXPECT_NEAR(scores[1], (2.0 / 5 + 2.0 / 7) / 2, 1e-15);
  EXPECT_NEAR(scores[2], (1.0 / 5 + 2.0 / 7) / 2, 1e-15);
  // Keys 0 and 2 change places: the heavy one is in the second block.
  EXPECT_NEAR(exact_scores(head, geometry(6, 6), 2, List{2, 1, 0, 3, 4, 5}, Logits(1.0))[1], (2.0 / 5 + 3.0 / 7) / 2,
              1e-15);
}

TEST(PerQueryScores, NanCountsAsZero) {
  const Head head{.q = column({0, 0, 0, 0, 1, nan}), .k = column({0}), .v = column({0})};
  EXPECT_EQ(per_query_scores(head, geometry(6, 6), 2, column({1, 2, 3}), Logits(1.0)), (std::vector<double>{0, 0, 0}));
}

TEST(SelectBlocks, AThresholdMayFallWithTheTokens) {
  Options options = options_of(KeepRule::threshold, 1);
  options.threshold_tokens = 2.5F;  // of ten
  const std::vector<double> scores{0.0, 0.25, 0.24, 0.51};
  EXPECT_EQ(select_row_4(options, scores), (List{0, 1, 3, 4}));
  // The same row in a call that ends inside it, and in one that goes on.
  EXPECT_EQ(select_blocks(options, geometry(1, 9), 0, {scores}, identity(9)), (List{0, 1, 3, 4}));
  EXPECT_EQ(select_blocks(options, geometry(20, 20), 4, {scores}, identity(20)), (List{0, 1, 3, 4}));
  options.threshold = 0.2F;  // which is less
  EXPECT_EQ(select_row_4(options, scores), (List{0, 1, 2, 3, 4}));
  options.threshold_tokens = 1;
  EXPECT_EQ(select_row_4(options, {0.0, 0.11, 0.09, 0.8}), (List{0, 1, 3, 4}));
}

TEST(SelectBlocks, ThresholdKeepsScoresThatReachIt) {
  Options options = options_of(KeepRule::threshold, 0.25F);
  EXPECT_EQ(select_row_4(options, {0.0, 0.25, 0.5, 0.25}), (List{0, 1, 2, 3, 4}));
  EXPECT_EQ(select_row_4(options, {0.0, 0.24, 0.5, 0.26}), (List{0, 2, 3, 4}));
  EXPECT_EQ(select_row_4(options, {0, 0, 0, 0}), (List{0, 4}));
  options.threshold = 0.6F;
  EXPECT_EQ(select_row_4(options, {0.0, 0.25, 0.5, 0.25}), (List{0, 4}));
  options.threshold = 0;
  EXPECT_EQ(select_row_4(options, {0, 0, 1, 0}), (List{0, 1, 2, 3, 4}));
}

TEST(SelectBlocks, TheFloorKeepsMoreWhereTheThresholdKeepsLess) {
  Options options = options_of(KeepRule::threshold, 0.3F);
  options.floor_top_p = 0.7F;
  EXPECT_EQ(select_row_4(options, {0.0, 0.125, 0.5, 0.25}), (List{0, 2, 3, 4}));          // the floor takes block 3
  EXPECT_EQ(select_row_4(options, {0.375, 0.25, 0.375, 0.0}), (List{0, 2, 4}));           // both agree
  EXPECT_EQ(select_row_4(options, {0.0, 0.3125, 0.375, 0.3125}), (List{0, 1, 2, 3, 4}));  // the threshold takes block 3
  options.floor_top_p = 1;
  EXPECT_EQ(select_row_4(options, {0, 0, 1, 0}), (List{0, 1, 2, 3, 4}));
}

TEST(SelectBlocks, RelativeIsAShareOfTheHighest) {
  const Options options = options_of(KeepRule::relative, 0.5F);
  EXPECT_EQ(select_row_4(options, {0.0, 0.25, 0.5, 0.25}), (List{0, 1, 2, 3, 4}));
  EXPECT_EQ(select_row_4(options, {0.0, 0.125, 0.5, 0.375}), (List{0, 2, 3, 4}));
  EXPECT_EQ(select_row_4(options, {0, 0, 0, 0}), (List{0, 4}));
}

TEST(SelectBlocks, TopKTakesTheHighest) {
  Options options = options_of(KeepRule::top_k);
  const auto select = [&](int top_k, const std::vector<double>& scores) {
    options.top_k = top_k;
    return select_row_4(options, scores);
  };
  EXPECT_EQ(select(0, {0.0, 0.25, 0.5, 0.25}), (List{0, 4}));
  EXPECT_EQ(select(1, {0.0, 0.25, 0.5, 0.25}), (List{0, 2, 4}));
  EXPECT_EQ(select(2, {0.0, 0.25, 0.5, 0.25}), (List{0, 1, 2, 4})) << "of equal scores the lower block";
  EXPECT_EQ(select(9, {0.0, 0.25, 0.5, 0.25}), (List{0, 1, 2, 3, 4}));
  EXPECT_EQ(select(2, {0, 0, 0, 0}), (List{0, 4}));
  options.rules = Rules::paper;
  EXPECT_EQ(select(2, {0, 0, 0, 0}), (List{0, 1, 2, 3, 4}));
}

TEST(SelectBlocks, DensityCountsTheOwnSegment) {
  Options options = options_of(KeepRule::density);
  const std::vector<double> scores{0.0, 0.25, 0.5, 0.25};
  const auto select = [&](float density, std::int64_t row) {
    options.density = density;
    return select_blocks(options, geometry(12, 12), row, {scores}, identity(12));
  };
  EXPECT_EQ(select(0.6F, 4), (List{0, 1, 2, 4}));  // three of five blocks, one of them its own; 0 is token 0's
  EXPECT_EQ(select(0.61F, 4), (List{0, 1, 2, 3, 4}));
  EXPECT_EQ(select(0.5F, 5), (List{0, 2, 4, 5}));
  EXPECT_EQ(select(0.1F, 5), (List{0, 4, 5}));
  EXPECT_EQ(select(1.0F, 5), (List{0, 1, 2, 3, 4, 5}));
}

TEST(SelectBlocks, SinkAndLocalBlocks) {
  Options options = top_p_options;
  const std::vector<double> scores{0, 0, 1, 0};
  options.top_p = 0.5F;
  options.sink_blocks = 2;
  EXPECT_EQ(select_row_4(options, scores), (List{0, 1, 2, 4}));
  options.sink_blocks = 0;
  options.local_blocks = 2;
  EXPECT_EQ(select_row_4(options, scores), (List{0, 2, 3, 4}));
  EXPECT_EQ(select_blocks(options, geometry(12, 12), 5, {scores}, identity(12)), (List{0, 2, 4, 5}));
  options.local_blocks = options.sink_blocks = 99;
  EXPECT_EQ(select_row_4(options, scores), (List{0, 1, 2, 3, 4}));
}

TEST(SelectBlocks, KeepsUpToAndIncludingTheBlockThatCrosses) {
  const std::vector<double> scores{0.125, 0.0625, 0.5, 0.3125};
  EXPECT_EQ(select_row_4(0.25F, scores), (List{0, 2, 4}));  // 0 is token 0's block
  EXPECT_EQ(select_row_4(0.5F, scores), (List{0, 2, 4}));   // reaching is enough
  EXPECT_EQ(select_row_4(0.51F, scores), (List{0, 2, 3, 4}));
  EXPECT_EQ(select_row_4(0.95F, scores), (List{0, 1, 2, 3, 4}));
}

TEST(SelectBlocks, TiesKeepTheLowerIndex) {
  EXPECT_EQ(select_row_4(0.3F, {0.0, 0.25, 0.5, 0.25}), (List{0, 2, 4}));
  EXPECT_EQ(select_row_4(0.6F, {0.0, 0.25, 0.5, 0.25}), (List{0, 1, 2, 4}));
}

TEST(SelectBlocks, TopPOfOneKeepsBlocksOfNoMass) {
  EXPECT_EQ(select_row_4(1.0F, {0.0, 0.0, 1.0, 0.0}), (List{0, 1, 2, 3, 4}));
}

TEST(SelectBlocks, AlwaysTheBlockThatHoldsTokenZero) {
  EXPECT_EQ(select_row_4(0.5F, {0, 0, 1, 0}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}), (List{0, 2, 4}));
  EXPECT_EQ(select_row_4(0.5F, {0, 0, 1, 0}, {3, 2, 0, 1, 4, 5, 6, 7, 8, 9}), (List{1, 2, 4}));
}

TEST(SelectBlocks, OwnSegmentUpToTheDiagonal) {
  const Geometry g = geometry(12, 12);
  EXPECT_EQ(select_blocks(top_p_options, g, 0, {}, identity(12)), (List{0}));
  EXPECT_EQ(select_blocks(top_p_options, g, 1, {}, identity(12)), (List{0, 1}));
  EXPECT_EQ(select_blocks(top_p_options, g, 3, {std::vector<double>{0, 1}}, identity(12)), (List{0, 1, 2, 3}));
  EXPECT_EQ(select_blocks(top_p_options, g, 5, {std::vector<double>{1, 0, 0, 0}}, identity(12)), (List{0, 4, 5}));
}

TEST(SelectBlocks, RulesDifferWhereScoresNeverReachTopP) {
  Options options = top_p_options;
  const std::vector<double> nothing{0, 0, 0, 0};
  EXPECT_EQ(select_row_4(options, nothing), (List{0, 4}));
  options.rules = Rules::paper;
  EXPECT_EQ(select_row_4(options, nothing), (List{0, 1, 2, 3, 4}));
}

TEST(SelectBlocks, DenseLastRowsListEverything) {
  Options options = top_p_options;
  options.dense_last_rows = 1;
  const std::vector<double> scores{1, 0, 0, 0};
  const Geometry g = geometry(12, 12);
  EXPECT_EQ(select_blocks(options, g, 4, {scores}, identity(12)), (List{0, 4}));
  EXPECT_EQ(select_blocks(options, g, 5, {scores}, identity(12)), (List{0, 1, 2, 3, 4, 5}));
  options.dense_last_rows = 100;  // more than there are: all
  EXPECT_EQ(select_blocks(options, g, 4, {scores}, identity(12)), (List{0, 1, 2, 3, 4}));
}

TEST(SelectBlocks, KeepAllListsEverything) {
  EXPECT_EQ(select_blocks({.block = 2, .segment = 4}, geometry(10, 10), 4, {}, identity(10)), (List{0, 1, 2, 3, 4}));
}

}  // namespace
}  // namespace pbsattn::reference
