#include "reference/select/select.h"

#include <algorithm>
#include <numeric>

#include "core/keep_rule.h"
#include "core/score_traits.h"

namespace pbsattn::reference {
namespace {

// Marks the highest scores up to and including the one that brings their sum, which begins at `sum`, to `mass`.
void keep_top_p(double mass, std::span<const double> scores, std::vector<bool>& keep, double sum) {
  if (sum > 0 && sum >= mass) return;
  for (const std::int64_t b : descending(scores)) {
    if (keep[b]) continue;
    keep[b] = true;
    sum += scores[b];
    if (sum >= mass) return;
  }
}

void keep_at_least(double least, std::span<const double> scores, std::vector<bool>& keep) {
  for (std::size_t b = 0; b < scores.size(); ++b)
    if (scores[b] >= least) keep[b] = true;
}

void keep_highest(std::int64_t count, std::span<const double> scores, std::vector<bool>& keep) {
  const auto blocks = descending(scores);
  for (std::int64_t i = 0; i < count; ++i) keep[blocks[i]] = true;
}

// Returns keep[b] for blocks 0 .. own_begin-1. `all_scores` may go on to the diagonal: then what is always kept counts
// first toward top_p, or competes with the rest (core/score_traits.h).
std::vector<bool> apply_rule(const Options& options, const Geometry& geometry, std::int64_t row,
                             std::int64_t sink_block, std::span<const double> all_scores) {
  const std::int64_t own_begin = geometry.own_begin(row);
  const std::span<const double> scores = all_scores.first(own_begin);
  std::vector<bool> keep(all_scores.size(), false);
  switch (options.keep) {
    case KeepRule::all:
    case KeepRule::none: break;
    case KeepRule::top_p: {
      const auto top_p = static_cast<double>(options.top_p);
      if (counts_kept_first(options.score)) {
        keep[sink_block] = true;
        keep_top_p(top_p, scores, keep,
                   std::accumulate(all_scores.begin() + own_begin, all_scores.end(), scores[sink_block]));
      } else {
        keep_top_p(top_p, all_scores, keep, 0);
      }
      break;
    }
    case KeepRule::threshold: {
      if (options.floor_top_p > 0) keep_top_p(static_cast<double>(options.floor_top_p), scores, keep, 0);
      keep_at_least(row_threshold(options, geometry.diagonal(row)), scores, keep);
      break;
    }
    case KeepRule::relative:
      keep_at_least(static_cast<double>(options.threshold) * std::ranges::max(all_scores), scores, keep);
      break;
    case KeepRule::top_k:
    case KeepRule::density: keep_highest(kept_count(options, own_begin, geometry.diagonal(row)), scores, keep); break;
    case KeepRule::vertical_slash:
    case KeepRule::coverage: keep_at_least(1, scores, keep); break;
  }
  keep.resize(own_begin);
  return keep;
}

// Does the same for a row's one or two scores. Scores that NaN made 0 keep nothing, or all.
std::vector<bool> apply_rule(const Options& options, const Geometry& geometry, std::int64_t row,
                             std::int64_t sink_block, const RowScores& scores) {
  const std::int64_t own_begin = geometry.own_begin(row);
  std::vector<bool> keep(own_begin, false);
  if (!reads_scores(options)) return keep;
  const auto apply = [&](std::span<const double> one) {
    const bool none = std::ranges::all_of(one, [](double s) { return s == 0; });
    if (none) return options.rules == Rules::paper ? keep.assign(own_begin, true) : void();
    const auto more = apply_rule(options, geometry, row, sink_block, one);
    for (std::int64_t b = 0; b < own_begin; ++b) keep[b] = keep[b] || more[b];
  };
  const bool counts = options.keep == KeepRule::top_k || options.keep == KeepRule::density;
  if (counts && scores.size() == 2) {  // the number is one of blocks, whichever score keeps them
    std::vector<double> higher = scores[0];
    for (std::size_t b = 0; b < higher.size(); ++b) higher[b] = std::max(higher[b], scores[1][b]);
    apply(higher);
  } else {
    for (const auto& one : scores) apply(one);
  }
  return keep;
}

}  // namespace

std::vector<std::int32_t> select_blocks(const Options& options, const Geometry& geometry, std::int64_t row,
                                        const RowScores& scores, std::span<const std::int32_t> order) {
  const std::int64_t own_begin = geometry.own_begin(row);
  const bool dense = keeps_every_block(options) || row >= geometry.rows() - options.dense_last_rows || own_begin == 0;
  const std::int64_t sink_block = (std::ranges::find(order, 0) - order.begin()) / geometry.block;
  std::vector<bool> keep =
      dense ? std::vector<bool>(own_begin, true) : apply_rule(options, geometry, row, sink_block, scores);
  if (own_begin > 0) keep[sink_block] = true;
  std::vector<std::int32_t> list;
  for (std::int64_t b = geometry.window_begin(row); b <= geometry.diagonal(row); ++b)
    if (b >= own_begin || keep[b] || b < options.sink_blocks || b > geometry.diagonal(row) - options.local_blocks)
      list.push_back(static_cast<std::int32_t>(b));
  return list;
}

}  // namespace pbsattn::reference
