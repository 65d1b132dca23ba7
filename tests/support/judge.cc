#include "support/judge.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "core/keep_rule.h"
#include "reference/definition.h"

namespace pbsattn::test {
namespace {

using reference::Head;

template <class Body>
void for_each_head(const Problem& problem, const Geometry& geometry, Body&& body) {
  for (std::int64_t b = 0; b < problem.shape.batch; ++b)
    for (std::int64_t h = 0; h < problem.shape.q_heads; ++h) {
      SCOPED_TRACE("batch " + std::to_string(b) + ", query head " + std::to_string(h));
      body(b * problem.shape.q_heads + h, reference::load_head(problem.inputs(), geometry, b, h));
      if (testing::Test::HasFailure()) return;  // one head's failure says enough
    }
}

// Expects that of keys of one block whose scores are equal, the earlier token comes first: equal keys have equal
// weights there in every precision.
void expect_ties_by_token(const Geometry& geometry, const std::vector<double>& scores,
                          const std::vector<std::int32_t>& order) {
  for (std::int64_t slot = 1; slot < geometry.permuted_len(); ++slot) {
    const std::int32_t before = order[slot - 1];
    if (slot % geometry.segment == 0 || scores[order[slot]] != scores[before] ||
        order[slot] / geometry.block != before / geometry.block)
      continue;
    if (order[slot] < before) {
      ADD_FAILURE() << "slot " << slot << ": token " << order[slot] << " after " << before << " of the same score";
      return;  // what follows is no news
    }
  }
}

void expect_close(const std::vector<double>& values, const std::vector<double>& plain, const std::vector<double>& truth,
                  const char* what, double least = 0, double ulps = 1) {
  double scale = 0;
  for (std::size_t i = 0; i < truth.size(); ++i) {
    ASSERT_EQ(std::isnan(values[i]), std::isnan(truth[i])) << what << " at " << i;
    if (std::isinf(truth[i]) || std::isinf(values[i])) {
      ASSERT_EQ(values[i], truth[i]) << what << " at " << i;
    }
    if (std::isfinite(truth[i])) scale = std::max(scale, std::abs(truth[i]));
  }
  const double floor = std::max(scale * ulps * 0x1p-23, least);
  const Distance ours = distance(values, truth);
  const Distance theirs = distance(plain, truth);
  EXPECT_LE(ours.largest, 2 * theirs.largest + floor) << what << ", largest error";
  EXPECT_LE(ours.root_mean_square, 2 * theirs.root_mean_square + floor) << what << ", root mean square error";
}

}  // namespace

Tolerance tolerance_for(const Problem& problem, DType products) {
  const auto wide = [&](DType dtype) { return dtype == DType::f32; };
  Tolerance tolerance;
  if (!wide(problem.q.dtype) || !wide(problem.k.dtype)) tolerance.block_score = 5e-3;
  const bool exact_products = products == DType::f32 || (problem.q.dtype == products && problem.k.dtype == products);
  // A weight is rounded to bf16, by 2^-8 of itself at most. It, and the query's sum of weights as they were before
  // that, come from an exponential good to 7.5e-5. A mean of weights is off by no more; two keys may be off towards
  // each other.
  if (products == DType::bf16) tolerance.key_score += 2 * (0x1p-8 + 2 * 7.5e-5);
  if (!exact_products) tolerance.key_score = 0.2;
  return tolerance;
}

void expect_order(const Problem& problem, const Options& options, const Trace& trace, const Tolerance& tolerance) {
  const Geometry geometry = geometry_of(options, problem.shape);
  ASSERT_EQ(trace.order.size(), problem.lse.size() / problem.shape.q_len * problem.shape.kv_len);
  for_each_head(problem, geometry, [&](std::int64_t flat, const Head&) {
    const auto order = head_order(trace, flat, problem.shape.kv_len);
    const bool moves = options.permutation != Permutation::none;
    for (std::int64_t slot = 0; slot < problem.shape.kv_len; ++slot)
      if (!moves || slot >= geometry.permuted_len()) {
        ASSERT_EQ(order[slot], slot);
      }
    if (!moves) return;
    auto sorted = order;
    for (std::int64_t begin = 0; begin < geometry.permuted_len(); begin += geometry.segment)
      std::sort(sorted.begin() + begin, sorted.begin() + begin + geometry.segment);
    for (std::int64_t slot = 0; slot < problem.shape.kv_len; ++slot)
      ASSERT_EQ(sorted[slot], slot) << "a segment keeps its keys";
    const auto scores = ordering_scores(problem.inputs(), options, geometry, flat, problem.kept_order());
    if (std::ranges::any_of(scores, [](double s) { return std::isnan(s); })) {
      EXPECT_EQ(order, reference::order_keys(geometry, scores));
    } else {
      const bool learned = options.permutation == Permutation::learned;  // in float32 whatever the products
      EXPECT_LE(farthest_swap(geometry, scores, order), learned ? 1e-5 : tolerance.key_score)
          << "by this share key scores differ that stand in the wrong order";
      expect_ties_by_token(geometry, scores, order);
    }
  });
}

void expect_lists(const Problem& problem, const Options& options, const Trace& trace, const Tolerance& tolerance) {
  const Geometry geometry = geometry_of(options, problem.shape);
  ASSERT_EQ(trace.first_row, geometry.first_row());
  ASSERT_EQ(trace.rows, geometry.rows());
  ASSERT_EQ(trace.blocks, geometry.blocks());
  ASSERT_EQ(trace.row_start.size(), problem.shape.batch * problem.shape.q_heads * geometry.rows() + 1);
  ASSERT_EQ(trace.row_start.front(), 0);
  ASSERT_EQ(trace.row_start.back(), trace.block.size());
  for_each_head(problem, geometry, [&](std::int64_t flat, const Head& head) {
    const auto order = head_order(trace, flat, problem.shape.kv_len);
    const auto scoring = reference::prepare_scores(head, options, geometry, order);
    for (std::int64_t row = 0; row < geometry.rows(); ++row) {
      SCOPED_TRACE("row " + std::to_string(row));
      const auto list = row_list(trace, flat, row);
      EXPECT_TRUE(tie_behind(head, options, geometry, row, scoring, order, list, tolerance.block_score))
          << testing::PrintToString(list) << " where the reference lists "
          << testing::PrintToString(reference::select_blocks(
                 options, geometry, row, reference::row_scores(head, options, geometry, row, order, scoring), order));
    }
  });
}

void expect_output(const Problem& problem, const Options& options, const Trace& trace, DType products) {
  const Values ours = outputs_of(problem);
  const Values plain = attend_plain(problem, options, trace, products);
  const Values truth = attend_exact(problem, options, trace);
  expect_close(ours.out, plain.out, truth.out, "out");
  // Weights that are alike round alike, by up to 2^-11 in f16: half of that is allowed besides twice the plain error,
  // which luck may make small. And 4 ulps, since tensor cores truncate a score's sum.
  if (products == DType::f16)
    expect_close(ours.lse, plain.lse, truth.lse, "log-sum-exp", 0x1p-12, 4);
  else
    expect_close(ours.lse, plain.lse, truth.lse, "log-sum-exp");
}

void expect_right(const Problem& problem, const RunResult& result, DType products) {
  Tolerance tolerance = tolerance_for(problem, products);
  // Of a block's share by the second step's products: inputs rounded to 16 bits, exponentials good to 7.5e-5.
  if (result.options.score == BlockScore::two_step && products != DType::f32) tolerance.block_score = 5e-3;
  expect_order(problem, result.options, result.trace, tolerance);
  if (testing::Test::HasFatalFailure()) return;
  expect_lists(problem, result.options, result.trace, tolerance);
  if (testing::Test::HasFatalFailure()) return;
  expect_output(problem, result.options, result.trace, products);
  const Geometry geometry = geometry_of(result.options, problem.shape);
  EXPECT_EQ(result.stats.visited_blocks, result.trace.block.size());
  EXPECT_EQ(result.stats.causal_blocks,
            problem.shape.batch * problem.shape.q_heads * geometry.causal_blocks_per_head());
}

Distance distance(const std::vector<double>& values, const std::vector<double>& truth) {
  Distance result;
  double squares = 0;
  std::size_t count = 0;
  for (std::size_t i = 0; i < truth.size(); ++i) {
    if (!std::isfinite(truth[i]) || !std::isfinite(values[i])) continue;
    const double error = std::abs(values[i] - truth[i]);
    result.largest = std::max(result.largest, error);
    squares += error * error;
    ++count;
  }
  if (count > 0) result.root_mean_square = std::sqrt(squares / static_cast<double>(count));
  return result;
}

Values outputs_of(const Problem& problem) {
  Values values{.out = {}, .lse = {problem.lse.begin(), problem.lse.end()}};
  const Shape& s = problem.shape;
  for (std::int64_t b = 0; b < s.batch; ++b)
    for (std::int64_t h = 0; h < s.q_heads; ++h)
      for (std::int64_t t = 0; t < s.q_len; ++t)
        for (std::int64_t d = 0; d < value_dim(s); ++d) values.out.push_back(problem.out.get(b, h, t, d));
  return values;
}

}  // namespace pbsattn::test
