#include "core/fallback.h"

#include <gtest/gtest.h>

#include "pbsattn/options.hpp"

namespace pbsattn {
namespace {

// One block pair costs 1, a head's key block 4, a call 100.
constexpr CostModel model{.call = 100, .key_block = 4};

Options pbs_or_full() {
  Options options = method("pbs");
  options.fallback = Fallback::when_faster;
  return options;
}

KeepRule resolved(Options options, std::int64_t q_len, std::int64_t kv_len, std::int64_t heads = 8) {
  const detail::PlanSpec spec{
      .options = options,
      .geometry = {.shape = {.q_heads = heads, .kv_heads = heads, .q_len = q_len, .kv_len = kv_len, .head_dim = 64}}};
  const detail::PlanSpec made = with_fallback_resolved(spec, model);
  EXPECT_EQ(made.options.fallback, Fallback::never);
  return made.options.keep;
}

TEST(Fallback, ExpectedDensityFollowsThePaper) {
  const Options options = pbs_or_full();
  EXPECT_EQ(expected_density(options, 100), 1.0);
  EXPECT_EQ(expected_density(options, 512), 1.0);
  EXPECT_DOUBLE_EQ(expected_density(options, 8192), .579);
  EXPECT_DOUBLE_EQ(expected_density(options, 32'768), .405);
  EXPECT_NEAR(expected_density(options, 11'585), (.579 + .485) / 2, 1e-4);  // halfway between 8K and 16K by doublings
  EXPECT_EQ(expected_density(options, 131'072), .219);
  EXPECT_EQ(expected_density(options, 1 << 20), .219);
  double last = 1;
  for (std::int64_t n = 256; n < 1 << 18; n += 999) {
    EXPECT_LE(expected_density(options, n), last) << n;
    last = expected_density(options, n);
  }
}

TEST(Fallback, ExpectedDensityOfTwoStepIsOurMeasurement) {
  const Options options = method("auto");
  EXPECT_EQ(expected_density(options, 512), 1.0);
  EXPECT_DOUBLE_EQ(expected_density(options, 8192), .38);
  EXPECT_DOUBLE_EQ(expected_density(options, 16'384), (.38 + .14) / 2);
  EXPECT_DOUBLE_EQ(expected_density(options, 32'768), .14);
  EXPECT_EQ(expected_density(options, 1 << 20), .12);
}

TEST(Fallback, LongSequencesAreSparseAndShortOnesFull) {
  EXPECT_EQ(resolved(pbs_or_full(), 1024, 1024), KeepRule::all);
  EXPECT_EQ(resolved(pbs_or_full(), 32'768, 32'768), KeepRule::top_p);
}

// 64 blocks: 2080 pairs, and 256 + 100 / 8 before attend: more than a tenth, so a loss were possible.
TEST(Fallback, AnUnknownDensityMustNotRiskATenth) {
  Options options = pbs_or_full();
  EXPECT_EQ(resolved(options, 8192, 8192), KeepRule::all);
  options.expected_density = 0.5F;
  EXPECT_EQ(resolved(options, 8192, 8192), KeepRule::top_p) << "the caller answers for the density";
  options.expected_density = 0.9F;
  EXPECT_EQ(resolved(options, 8192, 8192), KeepRule::all);
}

TEST(Fallback, AShortChunkPermutesAllKeysForFewRows) {
  EXPECT_EQ(resolved(pbs_or_full(), 128, 32'768), KeepRule::all);
  EXPECT_EQ(resolved(pbs_or_full(), 16'384, 32'768), KeepRule::top_p);
}

TEST(Fallback, FewHeadsPayForTheCall) {
  Options options = pbs_or_full();
  options.expected_density = 0.8F;
  EXPECT_EQ(resolved(options, 8192, 8192, 8), KeepRule::top_p);
  EXPECT_EQ(resolved(options, 8192, 8192, 1), KeepRule::top_p);
  options.expected_density = 0.85F;  // 312 of 2080 pairs saved, 268 spent with 8 heads, 356 with one
  EXPECT_EQ(resolved(options, 8192, 8192, 8), KeepRule::top_p);
  EXPECT_EQ(resolved(options, 8192, 8192, 1), KeepRule::all);
}

TEST(Fallback, DenseRowsSaveNothing) {
  Options options = pbs_or_full();
  options.dense_last_rows = 1000;
  EXPECT_EQ(resolved(options, 32'768, 32'768), KeepRule::all);
}

// 64 blocks: 2080 pairs; 64 of them in the dense row, 268.5 before attend but for pairs.
TEST(Fallback, PairsHaveAPrice) {
  Options options = method("auto");
  options.expected_density = 0.8F;
  const auto keep = [&](double pair) {
    const detail::PlanSpec spec{
        .options = options,
        .geometry = {.shape = {.q_heads = 8, .kv_heads = 8, .q_len = 8192, .kv_len = 8192, .head_dim = 64}}};
    return with_fallback_resolved(spec, {.call = 100, .key_block = 4, .pair = pair}).options.keep;
  };
  EXPECT_EQ(keep(0), KeepRule::threshold);
  EXPECT_EQ(keep(.06), KeepRule::threshold) << "of 403 pairs saved 393 are spent";
  EXPECT_EQ(keep(.07), KeepRule::all);
}

TEST(Fallback, OnlyWhereAskedFor) {
  EXPECT_EQ(resolved(method("pbs"), 1024, 1024), KeepRule::top_p);
  EXPECT_EQ(resolved(method("full"), 32'768, 32'768), KeepRule::all);
}

// The pages tell these lengths: 19 rows of blocks, and 48 of pbs.
TEST(Fallback, OnACpuAutoIsFullUpTo2432Tokens) {
  const auto keep = [](const Options& options, std::int64_t tokens) {
    const Shape shape{.q_heads = 2, .q_len = tokens, .kv_len = tokens, .head_dim = 64};
    return Plan::create(options, shape, Device::cpu(1)).options().keep;
  };
  EXPECT_EQ(keep(method("auto"), 2432), KeepRule::all);
  EXPECT_EQ(keep(method("auto"), 2433), KeepRule::threshold);
  EXPECT_EQ(keep(parse_method("auto:top_p=1"), 32'768), KeepRule::all);
  EXPECT_EQ(keep(parse_method("auto:permutation=learned:order_scope=kv_head"), 2432), KeepRule::all);
  EXPECT_EQ(keep(parse_method("auto:permutation=learned:order_scope=kv_head"), 2433), KeepRule::threshold);
  EXPECT_EQ(keep(pbs_or_full(), 6144), KeepRule::all);
  EXPECT_EQ(keep(pbs_or_full(), 6145), KeepRule::top_p);
  EXPECT_EQ(keep(parse_method("auto:permutation=last_queries"), 8192), KeepRule::threshold);
  EXPECT_EQ(keep(parse_method("auto:permutation=last_queries"), 7168), KeepRule::all);
}

// A chunk, by its queries: the first prompts, whole segments of them, in which it is sparse.
TEST(Fallback, OnACpuSmallChunksOfLongPromptsAreSparse) {
  const auto keep = [](const char* options, std::int64_t queries, std::int64_t tokens) {
    const Shape shape{.q_heads = 2, .q_len = queries, .kv_len = tokens, .head_dim = 64};
    return Plan::create(parse_method(options), shape, Device::cpu(1)).options().keep;
  };
  for (const std::int64_t queries : {256, 512, 1024}) {
    EXPECT_EQ(keep("auto", queries, 1536), KeepRule::all) << queries;
    EXPECT_EQ(keep("auto", queries, 2048), KeepRule::threshold) << queries;
    EXPECT_EQ(keep("auto", queries, 131'072), KeepRule::threshold) << queries;
  }
  EXPECT_EQ(keep("auto", 128, 131'072), KeepRule::all) << "its one row is the last, which is dense";
  EXPECT_EQ(keep("auto:permutation=learned:order_scope=kv_head", 512, 131'072), KeepRule::all) << "keys move";
}

// A row's price counts the queries' rows, a key block's all keys: 4 rows over 64 blocks, 250 pairs of which 64 are
// dense and 37 saved.
TEST(Fallback, ARowHasAPriceOfItsOwn) {
  Options options = method("auto");
  options.expected_density = 0.8F;
  const auto keep = [&](const CostModel& costs) {
    const detail::PlanSpec spec{
        .options = options,
        .geometry = {.shape = {.q_heads = 8, .kv_heads = 8, .q_len = 512, .kv_len = 8192, .head_dim = 64}}};
    return with_fallback_resolved(spec, costs).options.keep;
  };
  EXPECT_EQ(keep({.row = 9}), KeepRule::threshold);
  EXPECT_EQ(keep({.row = 10}), KeepRule::all);
  EXPECT_EQ(keep({.key_block = .5}), KeepRule::threshold);
  EXPECT_EQ(keep({.key_block = .6}), KeepRule::all);
}

// What is taken is full attention to the last option, and the plan says so.
TEST(Fallback, PlansTellWhatTheyTook) {
  const Shape shape{.q_len = 700, .kv_len = 700, .head_dim = 64};
  const Plan plan = Plan::create(method("auto"), shape, Device::cpu(1));
  const Options full = Plan::create(method("full"), shape, Device::cpu(1)).options();
  EXPECT_EQ(plan.options().keep, full.keep);
  EXPECT_EQ(plan.options().permutation, full.permutation);
  EXPECT_EQ(plan.options().score, full.score);
  EXPECT_EQ(plan.options().scale, full.scale);
  EXPECT_EQ(Plan::create(method("auto"), shape, Device::reference()).options().keep, KeepRule::threshold);
}

}  // namespace
}  // namespace pbsattn
