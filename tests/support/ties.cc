#include "support/ties.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "core/keep_rule.h"

namespace pbsattn::test {
namespace {

// Scores at most `change` higher for some blocks, and lower for the others.
reference::RowScores favouring(const std::vector<std::int32_t>& list, reference::RowScores scores, double change) {
  for (auto& one : scores)
    for (std::int64_t b = 0; b < std::ssize(one); ++b)
      one[b] = std::max(one[b] + (std::ranges::binary_search(list, b) ? change : -change), 0.0);
  return scores;
}

// Learned scores as exp(score / a bound of a key's terms), beyond that range infinite ones, and 0 for NaN.
std::vector<double> raised_scores(const reference::Head& head, const Inputs& inputs, const Geometry& geometry,
                                  std::int64_t kv_head) {
  const auto& [values, pairs] = inputs.order_weights;
  const std::size_t count = values.size() / static_cast<std::size_t>(geometry.shape.kv_heads);
  const auto weights = values.subspan(static_cast<std::size_t>(kv_head) * count, count);
  const auto size = [](double x) { return std::isfinite(x) ? std::abs(x) : 0; };
  double heaviest = 1e-37;
  for (const float w : weights) heaviest = std::max(heaviest, size(w));
  double largest = 0;
  for (std::int64_t n = 0; n < geometry.permuted_len(); ++n) {
    double sum = 0;  // a pair's length is no more than that of its two columns
    for (const double x : head.k[n]) sum += 2 * size(x) * heaviest;
    largest = std::max(largest, sum);
  }
  auto scores = reference::learned_scores(head, geometry, weights, pairs);
  for (double& s : scores)
    s = std::isnan(s) ? 0 : std::isinf(s) ? (s > 0 ? 1e9 : 1e-9) : std::exp(s / std::max(largest, 1e-37));
  return scores;
}

}  // namespace

std::vector<double> ordering_scores(const Inputs& inputs, const Options& options, const Geometry& geometry,
                                    std::int64_t flat, const KeyOrder& kept) {
  const std::int64_t batch = flat / geometry.shape.q_heads;
  const std::int64_t h = flat % geometry.shape.q_heads;
  const std::int64_t kv_head = geometry.kv_head(h);
  if (options.permutation == Permutation::learned)
    return raised_scores(reference::load_head(inputs, geometry, batch, h), inputs, geometry, kv_head);
  const bool shared = options.order_scope == OrderScope::kv_head;
  const std::int64_t first = shared ? kv_head * geometry.group() : h;
  const std::int64_t count = shared ? geometry.group() : 1;
  std::vector<double> mean(geometry.permuted_len(), 0.0);
  for (std::int64_t i = first; i < first + count; ++i) {
    const auto scores =
        reference::key_scores(reference::load_head(inputs, geometry, batch, i), geometry, reference::Logits(options));
    for (std::size_t n = 0; n < mean.size(); ++n) mean[n] += scores[n] / static_cast<double>(count);
  }
  for (std::int64_t slot = 0; options.permutation == Permutation::arrival && slot < kept.known; ++slot)
    mean[kept.data[batch * kept.batch_stride + kv_head * kept.head_stride + slot]] =
        static_cast<double>(geometry.segment - slot % geometry.segment);
  return mean;
}

double farthest_swap(const Geometry& geometry, const std::vector<double>& scores,
                     const std::vector<std::int32_t>& order) {
  constexpr double float_underflow = 1e-37;
  double farthest = 0;
  double lowest = 0;
  for (std::int64_t slot = 0; slot < geometry.permuted_len(); ++slot) {
    const double score = scores[order[slot]];
    lowest = slot % geometry.segment == 0 ? score : std::min(lowest, score);
    if (score > 0) farthest = std::max(farthest, (score - lowest - float_underflow) / score);
  }
  return farthest;
}

std::optional<double> tie_behind(const Options& options, const Geometry& geometry, std::int64_t row,
                                 const reference::Scoring& scoring, const reference::RowScores& scores,
                                 const std::vector<std::int32_t>& order, const std::vector<std::int32_t>& list,
                                 double tolerance) {
  if (reference::select_blocks(options, geometry, row, scores, order) == list) return 0.0;
  const bool rule_decides =
      reads_scores(options) && row < geometry.rows() - options.dense_last_rows && geometry.own_begin(row) > 0;
  const bool without_value = std::ranges::all_of(
      scores, [](const auto& one) { return std::ranges::all_of(one, [](double s) { return s == 0; }); });
  if (!rule_decides || without_value || !std::ranges::is_sorted(list)) return std::nullopt;
  if (options.keep == KeepRule::vertical_slash || options.keep == KeepRule::coverage)
    return scoring.pattern_margin <= tolerance ? std::optional(scoring.pattern_margin) : std::nullopt;

  // What is always kept may be there by the rule too, or only because it must.
  Options nothing = options;
  nothing.keep = KeepRule::none;
  std::vector<std::int32_t> by_rule;
  std::ranges::set_difference(list, reference::select_blocks(nothing, geometry, row, scores, order),
                              std::back_inserter(by_rule));
  // A change of each score changes the mass of the blocks that are kept by up to their number times as much.
  const float just_below_1 = std::nextafter(1.0F, 0.0F);
  constexpr double smallest_part = 1.0 / 256;
  for (double part = smallest_part; part <= 1; part *= 4) {
    const double change = part * tolerance;
    for (const auto& favoured : {list, by_rule}) {
      const reference::RowScores changed = favouring(favoured, scores, change);
      for (std::int64_t kept = -2; kept <= std::ssize(list) + 2; ++kept) {
        Options nearly = options;
        const auto shift = static_cast<float>(change * static_cast<double>(kept));
        nearly.top_p = std::clamp(options.top_p + shift, 1e-6F, just_below_1);
        if (options.floor_top_p > 0) nearly.floor_top_p = std::clamp(options.floor_top_p + shift, 1e-6F, just_below_1);
        if (reference::select_blocks(nearly, geometry, row, changed, order) == list) return change;
      }
    }
  }
  return std::nullopt;
}

std::optional<double> tie_behind(const reference::Head& head, const Options& options, const Geometry& geometry,
                                 std::int64_t row, const reference::Scoring& scoring,
                                 const std::vector<std::int32_t>& order, const std::vector<std::int32_t>& list,
                                 double tolerance) {
  const auto of_scores = [&](const Options& scored_by) {
    const auto scores = reference::row_scores(head, scored_by, geometry, row, order, scoring);
    return tie_behind(options, geometry, row, scoring, scores, order, list, tolerance);
  };
  const auto tie = of_scores(options);
  if (tie || options.score != BlockScore::two_step) return tie;
  constexpr double smallest_part = 1.0 / 256;
  for (double part = smallest_part; part <= 1; part *= 4)
    for (const double sign : {-1.0, 1.0}) {
      Options nearly = options;
      nearly.threshold_tokens = 0;
      nearly.threshold = static_cast<float>(row_threshold(options, geometry.diagonal(row)) +
                                            sign * part * tolerance * options.two_step_reach);
      if (const auto other = of_scores(nearly)) return std::max(*other, part * tolerance);
    }
  return std::nullopt;
}

}  // namespace pbsattn::test
