#include "core/fallback.h"

#include <gtest/gtest.h>

namespace pbsattn {
namespace {

// One block pair costs 1, a head's key block 4, a call 100.
constexpr CostModel model{.call = 100, .key_block = 4};

KeepRule resolved(Options options, std::int64_t q_len, std::int64_t kv_len, std::int64_t heads = 8) {
  const detail::PlanSpec spec{
      .options = options,
      .geometry = {.shape = {.q_heads = heads, .kv_heads = heads, .q_len = q_len, .kv_len = kv_len, .head_dim = 64}}};
  const detail::PlanSpec made = with_fallback_resolved(spec, model);
  EXPECT_EQ(made.options.fallback, Fallback::never);
  return made.options.keep;
}

TEST(Fallback, ExpectedDensityFollowsThePaper) {
  const Options options = method("auto");
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

TEST(Fallback, LongSequencesAreSparseAndShortOnesFull) {
  EXPECT_EQ(resolved(method("auto"), 1024, 1024), KeepRule::all);
  EXPECT_EQ(resolved(method("auto"), 32'768, 32'768), KeepRule::top_p);
}

// 64 blocks: 2080 pairs, and 256 + 100 / 8 before attend: more than a tenth, so a loss were possible.
TEST(Fallback, AnUnknownDensityMustNotRiskATenth) {
  Options options = method("auto");
  EXPECT_EQ(resolved(options, 8192, 8192), KeepRule::all);
  options.expected_density = 0.5F;
  EXPECT_EQ(resolved(options, 8192, 8192), KeepRule::top_p) << "the caller answers for the density";
  options.expected_density = 0.9F;
  EXPECT_EQ(resolved(options, 8192, 8192), KeepRule::all);
}

TEST(Fallback, AShortChunkPermutesAllKeysForFewRows) {
  EXPECT_EQ(resolved(method("auto"), 128, 32'768), KeepRule::all);
  EXPECT_EQ(resolved(method("auto"), 16'384, 32'768), KeepRule::top_p);
}

TEST(Fallback, FewHeadsPayForTheCall) {
  Options options = method("auto");
  options.expected_density = 0.8F;
  EXPECT_EQ(resolved(options, 8192, 8192, 8), KeepRule::top_p);
  EXPECT_EQ(resolved(options, 8192, 8192, 1), KeepRule::top_p);
  options.expected_density = 0.85F;  // 312 of 2080 pairs saved, 268 spent with 8 heads, 356 with one
  EXPECT_EQ(resolved(options, 8192, 8192, 8), KeepRule::top_p);
  EXPECT_EQ(resolved(options, 8192, 8192, 1), KeepRule::all);
}

TEST(Fallback, DenseRowsSaveNothing) {
  Options options = method("auto");
  options.dense_last_rows = 1000;
  EXPECT_EQ(resolved(options, 32'768, 32'768), KeepRule::all);
}

TEST(Fallback, OnlyWhereAskedFor) {
  EXPECT_EQ(resolved(method("pbs"), 1024, 1024), KeepRule::top_p);
  EXPECT_EQ(resolved(method("full"), 32'768, 32'768), KeepRule::all);
}

// The pages tell this length: 48 rows of blocks.
TEST(Fallback, OnACpuAutoIsFullUpTo6144Tokens) {
  const auto keep = [](std::int64_t tokens) {
    const Shape shape{.q_heads = 2, .q_len = tokens, .kv_len = tokens, .head_dim = 64};
    return Plan::create(method("auto"), shape, Device::cpu(1)).options().keep;
  };
  EXPECT_EQ(keep(6144), KeepRule::all);
  EXPECT_EQ(keep(6145), KeepRule::top_p);
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
  EXPECT_EQ(Plan::create(method("auto"), shape, Device::reference()).options().keep, KeepRule::top_p);
}

}  // namespace
}  // namespace pbsattn
