#include "support/judge.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/keep_rule.h"
#include "reference/stages.h"

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

// Scores that the order of query head `flat` follows.
std::vector<double> ordering_scores(const Problem& problem, const Options& options, const Geometry& geometry,
                                    std::int64_t flat) {
  const std::int64_t batch = flat / problem.shape.q_heads;
  const std::int64_t h = flat % problem.shape.q_heads;
  const bool shared = options.order_scope == OrderScope::kv_head;
  const std::int64_t first = shared ? geometry.kv_head(h) * geometry.group() : h;
  const std::int64_t count = shared ? geometry.group() : 1;
  std::vector<double> mean(geometry.permuted_len(), 0.0);
  for (std::int64_t i = first; i < first + count; ++i) {
    const auto scores =
        reference::key_scores(reference::load_head(problem.inputs(), geometry, batch, i), geometry, options.scale);
    for (std::size_t n = 0; n < mean.size(); ++n) mean[n] += scores[n] / static_cast<double>(count);
  }
  return mean;
}

void expect_descending_blocks(const Geometry& geometry, const std::vector<double>& scores,
                              const std::vector<std::int32_t>& order, double tolerance) {
  constexpr double float_underflow = 1e-37;
  for (std::int64_t slot = geometry.block; slot < geometry.permuted_len(); slot += geometry.block) {
    if (slot % geometry.segment == 0) continue;
    double lowest = std::numeric_limits<double>::infinity();
    double highest = 0;
    for (std::int64_t i = 0; i < geometry.block; ++i) {
      lowest = std::min(lowest, scores[order[slot - geometry.block + i]]);
      highest = std::max(highest, scores[order[slot + i]]);
    }
    EXPECT_GE(lowest, highest * (1 - tolerance) - float_underflow) << "between the blocks that meet at slot " << slot;
  }
}

// Whether keeping exactly `kept` follows the top-p rule but for near ties.
bool follows_top_p(const std::vector<double>& scores, const std::vector<bool>& kept, double top_p, double tolerance) {
  double mass = 0;
  double lowest_kept = std::numeric_limits<double>::infinity();
  double highest_dropped = 0;
  for (std::size_t b = 0; b < scores.size(); ++b) {
    if (kept[b]) {
      mass += scores[b];
      lowest_kept = std::min(lowest_kept, scores[b]);
    } else {
      highest_dropped = std::max(highest_dropped, scores[b]);
    }
  }
  if (mass == 0) return false;
  return lowest_kept >= highest_dropped - tolerance && mass >= top_p - tolerance &&
         mass - lowest_kept < top_p + tolerance;
}

// The same of the threshold rule: all scores above the threshold, and others only as the floor takes them.
bool follows_threshold(const Options& options, const std::vector<double>& scores, const std::vector<bool>& kept,
                       double tolerance) {
  bool more = false;
  double kept_mass = 0;
  for (std::size_t b = 0; b < scores.size(); ++b) {
    if (!kept[b] && scores[b] > options.threshold + tolerance) return false;
    if (kept[b] && scores[b] < options.threshold - tolerance) more = true;
    if (kept[b]) kept_mass += scores[b];
  }
  return more ? follows_top_p(scores, kept, options.floor_top_p, tolerance)
              : kept_mass >= options.floor_top_p - tolerance;
}

// The same of rules that keep the `count` highest scores.
bool follows_count(const std::vector<double>& scores, const std::vector<bool>& kept, std::int64_t count,
                   double tolerance) {
  if (std::ranges::count(kept, true) != count) return false;
  double lowest_kept = std::numeric_limits<double>::infinity();
  double highest_dropped = 0;
  for (std::size_t b = 0; b < scores.size(); ++b)
    if (kept[b])
      lowest_kept = std::min(lowest_kept, scores[b]);
    else
      highest_dropped = std::max(highest_dropped, scores[b]);
  return lowest_kept >= highest_dropped - tolerance;
}

bool follows_rule(const Options& options, const Geometry& geometry, std::int64_t row, const std::vector<double>& scores,
                  const std::vector<bool>& kept, double tolerance) {
  switch (options.keep) {
    case KeepRule::all:
    case KeepRule::vertical_slash:
    case KeepRule::coverage: break;
    case KeepRule::none: return std::ranges::count(kept, true) == 0;
    case KeepRule::top_p: return follows_top_p(scores, kept, options.top_p, tolerance);
    case KeepRule::threshold: return follows_threshold(options, scores, kept, tolerance);
    case KeepRule::relative: {
      Options absolute = options;
      absolute.threshold *= static_cast<float>(*std::ranges::max_element(scores));
      absolute.floor_top_p = 0;
      return follows_threshold(absolute, scores, kept, tolerance);
    }
    case KeepRule::top_k:
    case KeepRule::density:
      return follows_count(scores, kept, kept_count(options, geometry.own_begin(row), geometry.diagonal(row)),
                           tolerance);
  }
  return false;
}

// The blocks that a row lists whatever the rule says, of 0 .. diagonal.
std::vector<std::int64_t> forced_blocks(const Options& options, const Geometry& geometry, std::int64_t row,
                                        const std::vector<std::int32_t>& order) {
  const auto token_0 = (std::ranges::find(order, 0) - order.begin()) / geometry.block;
  std::vector<std::int64_t> forced;
  for (std::int64_t b = 0; b <= geometry.diagonal(row); ++b)
    if (b == token_0 || b < options.sink_blocks || b > geometry.diagonal(row) - options.local_blocks ||
        b >= geometry.own_begin(row))
      forced.push_back(b);
  return forced;
}

// Whether a list of blocks lies between those that the reference takes at a slightly lower and a slightly higher top_p.
bool brackets_top_p(const Options& options, const Geometry& geometry, std::int64_t row,
                    const reference::RowScores& scores, const std::vector<std::int32_t>& order,
                    const std::vector<std::int32_t>& list, double tolerance) {
  if (options.keep != KeepRule::top_p) return false;
  const auto at = [&](double change) {
    Options changed = options;
    changed.top_p = static_cast<float>(std::clamp(options.top_p + change, 1e-3, 0.9999));
    return reference::select_blocks(changed, geometry, row, scores, order);
  };
  return std::ranges::includes(list, at(-tolerance)) && std::ranges::includes(at(tolerance), list);
}

void expect_row_list(const Options& options, const Geometry& geometry, std::int64_t row,
                     const reference::RowScores& scores, const std::vector<std::int32_t>& order,
                     const std::vector<std::int32_t>& list, double tolerance) {
  const std::vector<std::int32_t> wanted = reference::select_blocks(options, geometry, row, scores, order);
  if (list == wanted) return;

  const std::int64_t own_begin = geometry.own_begin(row);
  ASSERT_TRUE(std::ranges::is_sorted(list, std::ranges::less_equal{})) << "ascending, each once";
  const auto own = std::ranges::lower_bound(list, own_begin);
  ASSERT_EQ(list.end() - own, geometry.diagonal(row) + 1 - own_begin) << "own segment, to the diagonal";
  ASSERT_TRUE(own == list.end() || list.back() == geometry.diagonal(row));
  const bool rule_decides = reads_scores(options) && row < geometry.rows() - options.dense_last_rows && own_begin > 0;
  ASSERT_TRUE(rule_decides) << "a dense row lists other blocks than the reference";
  const bool all_nan = std::ranges::all_of(
      scores, [](const auto& one) { return std::ranges::all_of(one, [](double s) { return s == 0.0; }); });
  ASSERT_FALSE(all_nan) << "a row without scores lists other blocks than the reference";
  if (brackets_top_p(options, geometry, row, scores, order, list, tolerance)) return;
  ASSERT_EQ(scores.size(), 1U) << testing::PrintToString(list) << " where the reference lists "
                               << testing::PrintToString(wanted);

  const auto& one = scores.front();
  std::vector<bool> kept(one.size(), false);
  for (const std::int32_t b : list)
    if (b < std::ssize(one)) kept[b] = true;
  auto forced = forced_blocks(options, geometry, row, order);
  std::erase_if(forced, [&](std::int64_t b) { return b >= std::ssize(one); });
  double lowest_kept = std::numeric_limits<double>::infinity();
  for (std::int64_t b = 0; b < std::ssize(one); ++b)
    if (kept[b] && !std::ranges::binary_search(forced, b)) lowest_kept = std::min(lowest_kept, one[b]);
  for (const std::int64_t b : forced) ASSERT_TRUE(kept[b]) << "block " << b << " must be there";
  // Such blocks may be there because the rule took them, or only because they must.
  bool right = follows_rule(options, geometry, row, one, kept, tolerance);
  for (const std::int64_t b : forced) kept[b] = one[b] >= lowest_kept;
  right = right || follows_rule(options, geometry, row, one, kept, tolerance);
  for (const std::int64_t b : forced) kept[b] = false;
  right = right || follows_rule(options, geometry, row, one, kept, tolerance);
  EXPECT_TRUE(right) << testing::PrintToString(list) << " where the reference lists " << testing::PrintToString(wanted);
}

void expect_close(const std::vector<double>& values, const std::vector<double>& plain, const std::vector<double>& truth,
                  const char* what) {
  double scale = 0;
  for (std::size_t i = 0; i < truth.size(); ++i) {
    ASSERT_EQ(std::isnan(values[i]), std::isnan(truth[i])) << what << " at " << i;
    if (std::isinf(truth[i]) || std::isinf(values[i])) {
      ASSERT_EQ(values[i], truth[i]) << what << " at " << i;
    }
    if (std::isfinite(truth[i])) scale = std::max(scale, std::abs(truth[i]));
  }
  const double floor = scale * 0x1p-23;
  const Distance ours = distance(values, truth);
  const Distance theirs = distance(plain, truth);
  EXPECT_LE(ours.largest, 2 * theirs.largest + floor) << what << ", largest error";
  EXPECT_LE(ours.root_mean_square, 2 * theirs.root_mean_square + floor) << what << ", root mean square error";
}

}  // namespace

Tolerance tolerance_for(const Problem& problem, Precision products) {
  const auto wide = [&](DType dtype) { return dtype == DType::f32; };
  Tolerance tolerance;
  if (!wide(problem.q.dtype) || !wide(problem.k.dtype)) tolerance.block_score = 5e-3;
  const bool exact_products =
      products == Precision::f32 || (problem.q.dtype == DType::bf16 && problem.k.dtype == DType::bf16);
  if (products == Precision::bf16) tolerance.key_score = 4e-3;
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
    const auto scores = ordering_scores(problem, options, geometry, flat);
    if (std::ranges::any_of(scores, [](double s) { return std::isnan(s); }))
      EXPECT_EQ(order, reference::order_keys(geometry, scores));
    else
      expect_descending_blocks(geometry, scores, order, tolerance.key_score);
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
      const auto scores = reference::row_scores(head, options, geometry, row, order, scoring);
      expect_row_list(options, geometry, row, scores, order, row_list(trace, flat, row), tolerance.block_score);
    }
  });
}

void expect_output(const Problem& problem, const Options& options, const Trace& trace, Precision products) {
  const Values ours = outputs_of(problem);
  const Values plain = attend_plain(problem, options, trace, products);
  const Values truth = attend_exact(problem, options, trace);
  expect_close(ours.out, plain.out, truth.out, "out");
  expect_close(ours.lse, plain.lse, truth.lse, "log-sum-exp");
}

void expect_right(const Problem& problem, const RunResult& result, Precision products) {
  const Tolerance tolerance = tolerance_for(problem, products);
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
        for (std::int64_t d = 0; d < s.head_dim; ++d) values.out.push_back(problem.out.get(b, h, t, d));
  return values;
}

}  // namespace pbsattn::test
