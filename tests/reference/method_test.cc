// What must hold of whole calls, whatever the numbers.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "reference/definition.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

constexpr int block = 4;
constexpr int segment = 8;
const RunOptions on_reference{.device = Device::reference()};

Options small(std::string_view name) {
  Options options = method(name);
  options.block = block;
  options.segment = segment;
  return options;
}

Problem small_problem(std::int64_t q_len = 45, std::int64_t kv_len = 45, std::uint64_t seed = 1) {
  return Problem({.shape = {.batch = 1, .q_heads = 2, .kv_heads = 1, .q_len = q_len, .kv_len = kv_len, .head_dim = 5},
                  .seed = seed});
}

std::vector<double> output(const Options& options, Problem problem) {
  run(options, problem, on_reference);
  return outputs_of(problem).out;
}

void expect_near(const std::vector<double>& a, const std::vector<double>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-6) << "at " << i;
}

// Outputs of tokens begin .. end-1 of query head h, of 45 in all.
std::vector<double> tokens_of(const std::vector<double>& out, std::int64_t h, std::int64_t begin, std::int64_t end) {
  return {out.begin() + (h * 45 + begin) * 5, out.begin() + (h * 45 + end) * 5};
}

TEST(Method, AnyOrderWithinEarlierSegmentsGivesTheSameDenseOutput) {
  Problem problem = small_problem();
  const Options options = resolved(small("full"), problem.shape);
  const Geometry geometry = geometry_of(options, problem.shape);
  Trace trace = reference::decide(problem.inputs(), options, geometry);
  const Values dense = attend_exact(problem, options, trace);
  std::mt19937_64 random(7);
  for (int repeat = 0; repeat < 5; ++repeat) {
    for (auto begin = trace.order.begin(); begin < trace.order.end(); begin += problem.shape.kv_len)
      for (std::int64_t slot = 0; slot < geometry.permuted_len(); slot += segment)
        std::shuffle(begin + slot, begin + slot + segment, random);
    const Values shuffled = attend_exact(problem, options, trace);
    for (std::size_t i = 0; i < dense.out.size(); ++i) ASSERT_NEAR(shuffled.out[i], dense.out[i], 1e-13);
    for (std::size_t i = 0; i < dense.lse.size(); ++i) ASSERT_NEAR(shuffled.lse[i], dense.lse[i], 1e-13);
  }
}

// The paper permutes a row's own segment too, visits all its blocks, and masks by original index.
TEST(Method, ThePapersFormulationGivesTheSameOutput) {
  Problem problem = small_problem();
  const Options options = resolved(small("pbs"), problem.shape);
  const Geometry geometry = geometry_of(options, problem.shape);
  const Trace trace = reference::decide(problem.inputs(), options, geometry);
  const Values ours = attend_exact(problem, options, trace);
  ASSERT_LT(trace.block.size(), 2 * geometry.causal_blocks_per_head()) << "nothing was left out";

  for (std::int64_t h = 0; h < problem.shape.q_heads; ++h) {
    const auto head = reference::load_head(problem.inputs(), geometry, 0, h);
    const auto order = head_order(trace, h, problem.shape.kv_len);
    for (std::int64_t token = 0; token < problem.shape.q_len; ++token) {
      const auto list = row_list(trace, h, token / block);
      const std::int64_t own_begin = token / segment * (segment / block);
      std::vector<double> sum(6, 0.0);
      for (std::int64_t slot = 0; slot < problem.shape.kv_len; ++slot) {
        const std::int64_t b = slot / block;
        const bool own = b >= own_begin && b < own_begin + segment / block;
        if (!own && !std::ranges::binary_search(list, b)) continue;
        if (token < order[slot]) continue;
        const double weight = std::exp(reference::dot(head.q[token], head.k[order[slot]]) * options.scale);
        for (int d = 0; d < 5; ++d) sum[d] += weight * head.v[order[slot]][d];
        sum[5] += weight;
      }
      for (int d = 0; d < 5; ++d) ASSERT_NEAR(sum[d] / sum[5], ours.out[(h * 45 + token) * 5 + d], 1e-12);
    }
  }
}

TEST(Method, TopPOfOneEqualsDense) {
  for (const char* name : {"pbs", "pbs-unpermuted"}) {
    Options options = small(name);
    options.top_p = 1.0F;
    Problem problem = small_problem();
    EXPECT_EQ(run(options, problem, on_reference).stats.density(), 1.0);
    expect_near(outputs_of(problem).out, output(small("full"), small_problem()));
  }
}

TEST(Method, SparseDiffersFromDense) {
  Options options = small("pbs");
  options.top_p = 0.5F;
  Problem problem = small_problem();
  EXPECT_LT(run(options, problem, on_reference).stats.density(), 0.9);
  const auto dense = output(small("full"), small_problem());
  EXPECT_GT(distance(outputs_of(problem).out, dense).largest, 1e-3);
}

TEST(Method, FirstSegmentEqualsDense) {
  Options options = small("pbs");
  options.top_p = 0.1F;
  const auto sparse = output(options, small_problem());
  const auto dense = output(small("full"), small_problem());
  for (const int h : {0, 1}) EXPECT_EQ(tokens_of(sparse, h, 0, segment), tokens_of(dense, h, 0, segment));
}

TEST(Method, NoLongerThanASegmentIsDense) {
  Problem problem = small_problem(8, 8);
  Problem twin = small_problem(8, 8);
  EXPECT_EQ(run(small("pbs"), problem, on_reference).stats.density(), 1.0);
  run(small("full"), twin, on_reference);
  EXPECT_EQ(problem.out.bytes(), twin.out.bytes());
}

TEST(Method, DenseLastRowsEqualDense) {
  Options options = small("pbs");
  options.top_p = 0.3F;
  const auto sparse = output(options, small_problem());
  options.dense_last_rows = 2;  // tokens 40 .. 44, in blocks 10 and 11
  const auto ended = output(options, small_problem());
  const auto dense = output(small("full"), small_problem());
  for (const int h : {0, 1}) {
    EXPECT_EQ(tokens_of(ended, h, 0, 40), tokens_of(sparse, h, 0, 40));
    expect_near(tokens_of(ended, h, 40, 45), tokens_of(dense, h, 40, 45));
    EXPECT_GT(distance(tokens_of(sparse, h, 40, 45), tokens_of(dense, h, 40, 45)).largest, 1e-3);
  }
}

// Changes q, k and v of one token.
Problem changed_at(std::int64_t token, bool only_v = false) {
  Problem problem = small_problem();
  for (int d = 0; d < 5; ++d) {
    problem.v.set(0, 0, token, d, 3.0);
    if (only_v) continue;
    problem.k.set(0, 0, token, d, -problem.k.get(0, 0, token, d));
    for (const int h : {0, 1}) problem.q.set(0, h, token, d, 2.0 - problem.q.get(0, h, token, d));
  }
  return problem;
}

TEST(Causality, DenseOutputsNeverSeeLaterTokens) {
  const auto before = output(small("full"), small_problem());
  for (const std::int64_t token : {1, 7, 8, 30, 44}) {
    const auto after = output(small("full"), changed_at(token));
    for (const int h : {0, 1}) {
      EXPECT_EQ(tokens_of(after, h, 0, token), tokens_of(before, h, 0, token));
      EXPECT_NE(tokens_of(after, h, token, 45), tokens_of(before, h, token, 45));
    }
  }
}

TEST(Causality, NoMethodLetsAnOutputSeeALaterValue) {
  for (const char* name : {"pbs", "pbs-unpermuted"}) {
    const auto before = output(small(name), small_problem());
    for (const std::int64_t token : {1, 7, 8, 30, 44}) {
      const auto after = output(small(name), changed_at(token, true));
      for (const int h : {0, 1}) EXPECT_EQ(tokens_of(after, h, 0, token), tokens_of(before, h, 0, token));
    }
  }
}

// Without a permutation a row's choice depends on its own queries and on earlier segments, so all rows
// before the changed token's row stay; within that row the pooled query has seen the change.
TEST(Causality, UnpermutedRowsNeverSeeLaterRows) {
  Options options = small("pbs-unpermuted");
  options.top_p = 0.5F;
  const auto before = output(options, small_problem());
  for (const std::int64_t token : {9, 30, 44}) {
    const auto after = output(options, changed_at(token));
    const std::int64_t row_begin = token / block * block;
    for (const int h : {0, 1}) EXPECT_EQ(tokens_of(after, h, 0, row_begin), tokens_of(before, h, 0, row_begin));
  }
}

// The permutation is made from the last queries, so which blocks an earlier row attends to may change with
// them; what it may attend to (earlier tokens only) does not, as the test of values above shows.
TEST(Causality, LastQueriesMayChangeWhatEarlierRowsChoose) {
  Options options = small("pbs");
  options.top_p = 0.5F;
  Problem problem = small_problem();
  Problem changed = changed_at(44);
  const Trace before = run(options, problem, on_reference).trace;
  const Trace after = run(options, changed, on_reference).trace;
  EXPECT_NE(before.order, after.order);
  EXPECT_NE(tokens_of(outputs_of(problem).out, 0, 16, 44), tokens_of(outputs_of(changed).out, 0, 16, 44));
}

TEST(Method, ChunksOfDenseAreSlicesOfTheWhole) {
  const auto whole = output(small("full"), small_problem());
  for (const std::int64_t q_len : {1, 2, 5, 13, 44}) {
    Problem chunk = small_problem();
    Problem part({.shape = {.q_heads = 2, .kv_heads = 1, .q_len = q_len, .kv_len = 45, .head_dim = 5}});
    part.k = chunk.k;
    part.v = chunk.v;
    for (const int h : {0, 1})
      for (std::int64_t t = 0; t < q_len; ++t)
        for (int d = 0; d < 5; ++d) part.q.set(0, h, t, d, chunk.q.get(0, h, 45 - q_len + t, d));
    run(small("full"), part, on_reference);
    const auto out = outputs_of(part).out;
    for (const int h : {0, 1})
      EXPECT_EQ(std::vector(out.begin() + h * q_len * 5, out.begin() + (h + 1) * q_len * 5),
                tokens_of(whole, h, 45 - q_len, 45));
  }
}

TEST(Method, ASharedOrderIsOneOrderForTheGroup) {
  Options options = small("pbs");
  Problem problem = small_problem();
  const Trace own = run(options, problem, on_reference).trace;
  EXPECT_NE(head_order(own, 0, 45), head_order(own, 1, 45));
  options.order_scope = OrderScope::kv_head;
  const Trace shared = run(options, problem, on_reference).trace;
  EXPECT_EQ(head_order(shared, 0, 45), head_order(shared, 1, 45));
}

TEST(Method, GroupedHeadsEqualRepeatedOnes) {
  Problem grouped = small_problem();
  Problem repeated({.shape = {.q_heads = 2, .kv_heads = 2, .q_len = 45, .kv_len = 45, .head_dim = 5}});
  repeated.q = grouped.q;
  for (const int h : {0, 1})
    for (std::int64_t t = 0; t < 45; ++t)
      for (int d = 0; d < 5; ++d) {
        repeated.k.set(0, h, t, d, grouped.k.get(0, 0, t, d));
        repeated.v.set(0, h, t, d, grouped.v.get(0, 0, t, d));
      }
  EXPECT_EQ(output(small("pbs"), grouped), output(small("pbs"), repeated));
}

TEST(Method, LayoutsAndBatchDoNotMatter) {
  const Shape shape{.batch = 2, .q_heads = 4, .kv_heads = 2, .q_len = 20, .kv_len = 33, .head_dim = 5};
  const auto contiguous = output(small("pbs"), Problem({.shape = shape}));
  for (const TensorLayout layout : {TensorLayout::bshd, TensorLayout::padded, TensorLayout::cache})
    EXPECT_EQ(output(small("pbs"), Problem({.shape = shape, .layout = layout})), contiguous);
}

}  // namespace
}  // namespace pbsattn::test
