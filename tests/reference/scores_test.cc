// Block scores of all causal blocks, on blocks of 2 and one dimension (or four, for bands): worked out by hand.
#include <gtest/gtest.h>

#include <cmath>

#include "core/score_traits.h"
#include "reference/by_hand.h"
#include "reference/select/scores/last_queries.h"

namespace pbsattn::reference {
namespace {

Geometry geometry(std::int64_t q_len, std::int64_t kv_len, int segment = 2, std::int64_t head_dim = 1) {
  return {.shape = {.q_len = q_len, .kv_len = kv_len, .head_dim = head_dim}, .block = 2, .segment = segment};
}

Options options_of(BlockScore score, Rules rules = Rules::reference_code) {
  return {.score = score, .keep = KeepRule::top_p, .rules = rules, .block = 2, .segment = 2, .scale = 1};
}

RowScores scores_of(const Options& options, const Head& head, const Geometry& g, std::int64_t row,
                    const List& order = {}) {
  const List whole = order.empty() ? identity(g.shape.kv_len) : order;
  return row_scores(head, options, g, row, whole, prepare_scores(head, options, g, whole));
}

void expect_near(const std::vector<double>& values, const std::vector<double>& wanted) {
  ASSERT_EQ(values.size(), wanted.size());
  for (std::size_t i = 0; i < values.size(); ++i)
    EXPECT_NEAR(values[i], wanted[i], 1e-7) << i;  // pooled values are rounded to float32
}

TEST(MeanPoolCausal, TheOwnBlockCompetes) {
  const Head head{.q = column({0, 0, 0, 0, 1, 1}),
                  .k = column({std::log(1), 0, std::log(9), 0, std::log(4), std::log(4)}),
                  .v = column({0})};
  const auto scores = scores_of(options_of(BlockScore::mean_pool_causal), head, geometry(6, 6), 2);
  ASSERT_EQ(scores.size(), 1);
  expect_near(scores[0], {1.0 / 8, 3.0 / 8, 4.0 / 8});
  Options half = options_of(BlockScore::mean_pool_causal);
  half.top_p = 0.49F;  // the own block alone has it, and block 0 is always kept
  EXPECT_EQ(select_blocks(half, geometry(6, 6), 2, scores, identity(6)), (List{0, 2}));
  half.top_p = 0.6F;
  EXPECT_EQ(select_blocks(half, geometry(6, 6), 2, scores, identity(6)), (List{0, 1, 2}));
}

TEST(MeanPoolCausal, TheOwnSegmentIsReadInItsOrder) {
  // Segments of 4, permuted: block 0 holds tokens 2 and 3. Row 3 (tokens 6 and 7) sees its own segment's blocks 2 and 3
  // as they were, whatever the order says.
  const Head head{.q = column({0, 0, 0, 0, 0, 0, 1, 1}),
                  .k = column({0, 0, std::log(2), std::log(2), std::log(3), std::log(3), std::log(4), std::log(4)}),
                  .v = column({0})};
  const auto scores =
      scores_of(options_of(BlockScore::mean_pool_causal), head, geometry(8, 8, 4), 3, {2, 3, 0, 1, 6, 7, 4, 5});
  expect_near(scores[0], {0.2, 0.1, 0.3, 0.4});
}

TEST(MeanPoolCausal, RulesDifferOnTheLastBlock) {
  const Head head{.q = column({0, 0, 1}), .k = column({0, 0, 2 * std::log(3)}), .v = column({0})};
  const Geometry g = geometry(3, 3);
  const auto code = scores_of(options_of(BlockScore::mean_pool_causal), head, g, 1);
  const double logit = 0.5 * std::log(3);  // query and key halved by the block's missing half
  expect_near(code[0], {1 / (1 + std::exp(logit)), std::exp(logit) / (1 + std::exp(logit))});
  const auto paper = scores_of(options_of(BlockScore::mean_pool_causal, Rules::paper), head, g, 1);
  expect_near(paper[0], {0.1, 0.9});
}

TEST(Energy, QueriesAreNotNormalisedOneByOne) {
  // Query 4 gives the blocks 1, 2, 1, query 5 gives them 1, 8, 1: their softmaxes would count alike.
  const Head head{
      .q = column({0, 0, 0, 0, 1, 3}), .k = column({0, 0, std::log(2), std::log(2), 0, 0}), .v = column({0})};
  const auto scores = scores_of(options_of(BlockScore::energy), head, geometry(6, 6), 2);
  expect_near(scores[0], {2.0 / 14, 10.0 / 14, 2.0 / 14});
}

TEST(Energy, ABlockThatIsNotWholeHasNone) {
  const Head head{.q = column({0, 0, 0, 0, 1}), .k = column({0, 0, std::log(3), std::log(3), 50}), .v = column({0})};
  expect_near(scores_of(options_of(BlockScore::energy), head, geometry(5, 5), 2)[0], {0.25, 0.75, 0});
  const Head first{.q = column({1}), .k = column({7}), .v = column({0})};
  EXPECT_EQ(scores_of(options_of(BlockScore::energy), first, geometry(1, 1), 0)[0], (std::vector<double>{0}));
}

TEST(Energy, RelativeToTheHighestOfAllBlocks) {
  Options options = options_of(BlockScore::energy);
  options.keep = KeepRule::relative;
  options.threshold = 0.25F;
  EXPECT_EQ(select_blocks(options, geometry(8, 8), 3, {{{0.0, 0.1, 0.2, 0.7}}}, identity(8)), (List{0, 2, 3}));
}

TEST(Sampled, EvenlySpacedTheLastAmongThem) {
  EXPECT_EQ(sampled_queries(3), 3);
  EXPECT_EQ(sampled_queries(128), 8);
  EXPECT_EQ(sampled_query(128, 0), 15);
  EXPECT_EQ(sampled_query(128, 7), 127);
  EXPECT_EQ(sampled_query(3, 0), 0);
  EXPECT_EQ(sampled_query(3, 2), 2);
  EXPECT_EQ(sampled_query(100, 7), 99);
}

TEST(Sampled, MeanOfExactAndPerQuery) {
  // Two queries: both are sampled. Without preferences each key has the same share, and each pooled one.
  const Head head{.q = column(std::vector<double>(6, 0.0)), .k = column(std::vector<double>(6, 1.0)), .v = column({0})};
  const double exact = (2.0 / 5 + 2.0 / 6) / 2;
  expect_near(scores_of(options_of(BlockScore::sampled), head, geometry(6, 6), 2)[0],
              {(exact + 1.0 / 3) / 2, (exact + 1.0 / 3) / 2, ((1.0 / 5 + 2.0 / 6) / 2 + 1.0 / 3) / 2});
}

TEST(Sampled, OfMoreThanEightQueriesOnlyEight) {
  Head head{.q = Matrix(32, 1), .k = Matrix(32, 1), .v = Matrix(32, 1)};
  const Geometry g{.shape = {.q_len = 32, .kv_len = 32, .head_dim = 1}, .block = 16, .segment = 16};
  Options options = options_of(BlockScore::sampled);
  const auto even = scores_of(options, head, g, 1)[0];
  head.q[16][0] = 50;  // not sampled: tokens 17, 19 .. 31 are. The mean key stays 0, so per_query sees nothing.
  head.k[0][0] = 1;
  head.k[1][0] = -1;
  EXPECT_EQ(scores_of(options, head, g, 1)[0], even);
  head.q[17][0] = 50;
  EXPECT_GT(scores_of(options, head, g, 1)[0][0], even[0] + 0.005);
}

// Row 2 of six tokens, whose first step goes by token 5: it gives the blocks 3, 1 and 1.
const Head two_steps{.q = column({0, 0, 0, 0, 0, 1}), .k = column({std::log(9), 0, 0, 0, 0, 0}), .v = column({0})};

Options two_step(float threshold, int exact = 2) {
  Options options = options_of(BlockScore::two_step);
  options.keep = KeepRule::threshold;
  options.threshold = threshold;
  options.two_step_queries = 1;
  options.two_step_exact = exact;
  options.two_step_reach = 2;
  return options;
}

TEST(TwoStep, LikelyBlocksByTheirKeysTheOthersByTheirMeans) {
  // From a share of 1/4 on blocks are read: block 0 and the own one. Of token 4 all keys weigh alike, of five, since
  // block 1 counts as two; token 5 gives block 0 9 + 1, block 1 2 and its own block 2.
  expect_near(scores_of(two_step(0.5F), two_steps, geometry(6, 6), 2)[0],
              {(3.0 / 5 + (2.0 / 5 + 10.0 / 14) / 2) / 2, 1.0 / 5 / 2, (1.0 / 5 + (1.0 / 5 + 2.0 / 14) / 2) / 2});
  // The last of the queries alone.
  expect_near(scores_of(two_step(0.5F, 1), two_steps, geometry(6, 6), 2)[0],
              {(3.0 / 5 + 10.0 / 14) / 2, 1.0 / 5 / 2, (1.0 / 5 + 2.0 / 14) / 2});
}

TEST(TwoStep, AShareAtTheReachIsRead) {
  const auto all = scores_of(two_step(0.399F), two_steps, geometry(6, 6), 2)[0];  // block 1 has 1/5
  EXPECT_NEAR(all[1], (1.0 / 5 + (2.0 / 5 + 2.0 / 14) / 2) / 2, 1e-7);
  const auto none = scores_of(two_step(1), two_steps, geometry(6, 6), 2)[0];
  EXPECT_NEAR(none[0], (3.0 / 5 + (2.0 / 5 + 10.0 / 14) / 2) / 2, 1e-7) << "3/5 is over the half of 1";
  Options close = two_step(1);
  close.two_step_reach = 1;  // nothing is read but the own block: block 0 counts as 3 + 3
  expect_near(scores_of(close, two_steps, geometry(6, 6), 2)[0],
              {3.0 / 5 / 2, 1.0 / 5 / 2, (1.0 / 5 + (1.0 / 5 + 2.0 / 10) / 2) / 2});
}

TEST(TwoStep, TheThresholdMayFollowTheTokens) {
  Options options = two_step(1);
  options.threshold_tokens = 3;  // of the six up to the row's end: as 0.5
  EXPECT_EQ(scores_of(options, two_steps, geometry(6, 6), 2), scores_of(two_step(0.5F), two_steps, geometry(6, 6), 2));
}

TEST(TwoStep, KeysAsTheyWereMoved) {
  // Segments of 4, blocks 0 and 1 exchanged: the keys of what is block 1 now are read.
  const Head head{.q = column({0, 0, 0, 0, 0, 1}), .k = two_steps.k, .v = column({0})};
  const auto scores = scores_of(two_step(0.5F, 1), head, geometry(6, 6, 4), 2, {2, 3, 0, 1, 4, 5})[0];
  expect_near(scores, {1.0 / 5 / 2, (3.0 / 5 + 10.0 / 14) / 2, (1.0 / 5 + 2.0 / 14) / 2});
}

TEST(NewScores, NanCountsAsZero) {
  for (const BlockScore score :
       {BlockScore::mean_pool_causal, BlockScore::energy, BlockScore::sampled, BlockScore::two_step}) {
    const Head head{.q = column({0, 0, 0, 0, nan, 1}), .k = column({0, 0, 1, 1, 2, 2}), .v = column({0})};
    EXPECT_EQ(scores_of(options_of(score), head, geometry(6, 6), 2)[0], (std::vector<double>{0, 0, 0}));
  }
}

// ------------------------------------------------------------------------------------------- capped logits

Options capped(BlockScore score) {
  Options options = options_of(score);
  options.softcap = static_cast<float>(softcap);
  return options;
}

// Makes a head whose row 2 has the queries 1 and `last`, of blocks with mean keys that weigh 3 : 9 : 1 to 1 and
// 1/3 : 1/9 : 1 to -1. Capped one by one, keys of block 0 would weigh about 5.8 and 1.
Head capped_means(double last) {
  return {.q = column({0, 0, 0, 0, 1, last}), .k = column({2 * to_log3, 0, to_log9, to_log9, 0, 0}), .v = column({0})};
}

TEST(CappedLogits, OfMeans) {
  expect_near(scores_of(capped(BlockScore::mean_pool), capped_means(1), geometry(6, 6), 2)[0], {3.0 / 12, 9.0 / 12});
  expect_near(scores_of(capped(BlockScore::mean_pool_causal), capped_means(1), geometry(6, 6), 2)[0],
              {3.0 / 13, 9.0 / 13, 1.0 / 13});
  // Query 5 has 3, 1 and 9 ninths.
  expect_near(scores_of(capped(BlockScore::per_query), capped_means(-1), geometry(6, 6), 2)[0],
              {3.0 / 13, 5.0 / 13, 5.0 / 13});
  // Sums of 3 + 1/3, 9 + 1/9 and 1 + 1.
  expect_near(scores_of(capped(BlockScore::energy), capped_means(-1), geometry(6, 6), 2)[0],
              {30.0 / 130, 82.0 / 130, 18.0 / 130});
}

TEST(CappedLogits, OfKeys) {
  // Keys weigh 3, 1, 9, 1, 1 and 1; the first query doesn't see the last.
  Head head{.q = column({0, 0, 0, 0, 1, 1}), .k = column({to_log3, 0, to_log9, 0, 0, 0}), .v = column({0})};
  expect_near(scores_of(capped(BlockScore::exact), head, geometry(6, 6), 2)[0],
              {(4.0 / 15 + 4.0 / 16) / 2, (10.0 / 15 + 10.0 / 16) / 2, (1.0 / 15 + 2.0 / 16) / 2});
  // 3, 3, 9, 9, 1 and 1, and their means 3, 9 and 1.
  head.k = column({to_log3, to_log3, to_log9, to_log9, 0, 0});
  expect_near(scores_of(capped(BlockScore::sampled), head, geometry(6, 6), 2)[0],
              {((6.0 / 25 + 6.0 / 26) / 2 + 3.0 / 13) / 2, ((18.0 / 25 + 18.0 / 26) / 2 + 9.0 / 13) / 2,
               ((1.0 / 25 + 2.0 / 26) / 2 + 1.0 / 13) / 2});
}

TEST(CappedLogits, OfBothSteps) {
  // As two_steps, but that the first step gives the blocks 9, 1 and 1; of its keys token 5 gives block 0 9 + 1.
  Head head = two_steps;
  head.k[0][0] = 2 * to_log9;
  Options options = two_step(0.5F);
  options.softcap = static_cast<float>(softcap);
  expect_near(scores_of(options, head, geometry(6, 6), 2)[0],
              {(9.0 / 11 + (2.0 / 5 + 10.0 / 14) / 2) / 2, 1.0 / 11 / 2, (1.0 / 11 + (1.0 / 5 + 2.0 / 14) / 2) / 2});
}

TEST(CappedLogits, OfColumnsAndDiagonals) {
  // The last two queries weigh the keys 1 : 3 : 9, and 1 : 3 : 9 : 1.
  const Head head{.q = column({0, 0, 1, 1}), .k = column({0, to_log3, to_log9, 0}), .v = column({0})};
  const Masses masses = last_queries_masses(head, geometry(4, 4), Logits(1, softcap), 2);
  expect_near(masses.column,
              {(1.0 / 13 + 1.0 / 14) / 2, (3.0 / 13 + 3.0 / 14) / 2, (9.0 / 13 + 9.0 / 14) / 2, 1.0 / 14 / 2});
  expect_near(masses.diagonal,
              {(9.0 / 13 + 1.0 / 14) / 2, (3.0 / 13 + 9.0 / 14) / 2, (1.0 / 13 + 3.0 / 14) / 2, 1.0 / 14 / 2});
}

// ---------------------------------------------------------------------------------------------- dual_band

// Makes a head of four columns: pairs (0, 2), fast, and (1, 3), slow. The fast band has pair 0, the slow one pair 1
// (three quarters of two pairs is one).
Head four_columns() {
  Head head{.q = Matrix(6, 4), .k = Matrix(6, 4), .v = Matrix(6, 4)};
  for (std::int64_t n = 0; n < 6; ++n) head.q[n][0] = head.q[n][1] = 1;
  for (std::int64_t n = 2; n < 4; ++n) head.k[n][0] = 2;  // block 1 in the fast band
  for (std::int64_t n = 0; n < 2; ++n) head.k[n][1] = 2;  // block 0 in the slow one
  return head;
}

TEST(DualBand, EachBandScoresByItself) {
  const auto scores = scores_of(options_of(BlockScore::dual_band), four_columns(), geometry(6, 6, 2, 4), 2);
  ASSERT_EQ(scores.size(), 2);
  // Each band has half the squares of queries and of keys: its factor is 1 / (2/4 * sqrt(1/2 * 4/2) ...) = 2.
  const double e = std::exp(4.0);
  expect_near(scores[0], {1 / (2 + e), e / (2 + e), 1 / (2 + e)});
  expect_near(scores[1], {e / (2 + e), 1 / (2 + e), 1 / (2 + e)});
}

TEST(DualBand, CapsTheProductsOfABand) {
  Head head = four_columns();
  for (double& x : head.k.values) x *= to_log3 / 4;  // logits are to_log3 where they were 4: their factors stay
  const auto scores = scores_of(capped(BlockScore::dual_band), head, geometry(6, 6, 2, 4), 2);
  expect_near(scores[0], {1.0 / 5, 3.0 / 5, 1.0 / 5});
  expect_near(scores[1], {3.0 / 5, 1.0 / 5, 1.0 / 5});
}

TEST(DualBand, ABlockIsKeptThatEitherKeeps) {
  Options options = options_of(BlockScore::dual_band);
  options.top_p = 0.5F;
  const RowScores scores{{0, 0.6, 0, 0.4, 0}, {0, 0, 0.6, 0.4, 0}};
  EXPECT_EQ(select_blocks(options, geometry(10, 10), 4, scores, identity(10)), (List{0, 1, 2, 4}));
  options.keep = KeepRule::top_k;  // counts by the higher of the two
  options.top_k = 1;
  EXPECT_EQ(select_blocks(options, geometry(10, 10), 4, scores, identity(10)), (List{0, 1, 4}));
}

TEST(DualBand, NothingToCalibrateByScoresNothing) {
  const Head head{.q = Matrix(6, 4), .k = Matrix(6, 4), .v = Matrix(6, 4)};
  for (const auto& scores : scores_of(options_of(BlockScore::dual_band), head, geometry(6, 6, 2, 4), 2))
    EXPECT_EQ(scores, (std::vector<double>{0, 0, 0}));
}

}  // namespace
}  // namespace pbsattn::reference
