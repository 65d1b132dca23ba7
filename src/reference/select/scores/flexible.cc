#include <algorithm>
#include <cmath>

#include "core/score_traits.h"
#include "reference/select/scores/last_queries.h"

namespace pbsattn::reference {
namespace {

std::vector<double> sums_by_block(std::span<const double> values, std::int64_t block) {
  std::vector<double> sums((std::ssize(values) + block - 1) / block, 0.0);
  for (std::int64_t i = 0; i < std::ssize(values); ++i) sums[i / block] += values[i];
  return sums;
}

// Returns the square root of the Jensen-Shannon divergence; 0 log 0 is 0.
double distance(std::span<const double> p, std::span<const double> q) {
  double divergence = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double mean = (p[i] + q[i]) / 2;
    if (p[i] != 0) divergence += 0.5 * p[i] * std::log(p[i] / mean);
    if (q[i] != 0) divergence += 0.5 * q[i] * std::log(q[i] / mean);
  }
  return std::sqrt(std::max(divergence, 0.0));
}

// Returns how many blocks the heaviest tokens would fill whose masses stay within `share`, and one more.
std::int64_t blocks_of(std::span<const double> masses, double share, std::int64_t block, double* margin) {
  std::int64_t tokens = 1;
  double sum = 0;
  for (const std::int64_t i : descending(masses)) {
    sum += masses[i];
    note(margin, sum - share);
    if (sum > share) break;
    ++tokens;
  }
  return tokens / block + 1;
}

// Adds what of the rows' pooled attention, highest first, stays within top_p of it.
void keep_pooled(const Head& head, const Options& options, const Geometry& geometry, const Matrix& pooled_own,
                 Pattern& pattern, double* margin) {
  struct Cell {
    double score;
    std::int64_t row, block;
  };
  std::vector<Cell> cells;
  for (std::int64_t row = 0; row < geometry.rows(); ++row) {
    const auto scores =
        block_scores(pool_query(head, options, geometry, row), pooled_own, geometry.diagonal(row) + 1, Logits(options));
    for (std::int64_t b = 0; b < std::ssize(scores); ++b) cells.push_back({scores[b], row, b});
  }
  std::ranges::stable_sort(cells, [](const Cell& a, const Cell& b) { return a.score > b.score; });
  const auto rows = static_cast<double>(geometry.rows());
  double sum = 0;
  double last = 0;
  for (const Cell& cell : cells) {
    sum += cell.score;
    note(margin, sum / rows - static_cast<double>(options.top_p));
    if (sum > static_cast<double>(options.top_p) * rows) {
      if (last > 0) note(margin, gap(last, cell.score));
      break;
    }
    pattern[cell.row][cell.block] = true;
    last = cell.score;
  }
}

}  // namespace

Pattern flexible_pattern(const Head& head, const Options& options, const Geometry& geometry, const Matrix& pooled_own,
                         double* margin) {
  const std::int64_t block = geometry.block;
  const std::int64_t blocks = geometry.blocks();
  const std::int64_t least = std::min((options.min_budget + block - 1) / block, blocks);
  Pattern pattern = nothing_of(geometry);
  if (blocks <= std::max<std::int64_t>(flexible_whole_blocks, least)) {
    for (auto& row : pattern) row.assign(row.size(), true);
    return pattern;
  }

  auto masses = last_queries_masses(head, geometry, Logits(options), geometry.scoring_queries());
  // Distances in blocks, counted from the longest one, which ends at key 0.
  std::vector<double> by_distance = sums_by_block(std::vector(masses.diagonal.rbegin(), masses.diagonal.rend()), block);
  std::ranges::reverse(by_distance);
  const std::vector<double> by_column = sums_by_block(masses.column, block);

  std::vector<double> query(geometry.shape.head_dim, 0.0);
  for (std::int64_t i = 0; i < geometry.scoring_queries(); ++i)
    for (std::int64_t d = 0; d < geometry.shape.head_dim; ++d)
      query[d] += head.q[geometry.shape.q_len - 1 - i][d] / static_cast<double>(geometry.scoring_queries());
  const auto predicted = block_scores(query, pooled_own, blocks, Logits(options));
  const bool no_value = std::ranges::all_of(predicted, [](double s) { return s == 0; });
  const double apart = distance(predicted, by_column);
  const auto tau = static_cast<double>(options.tau);
  const bool by_pooling = !no_value && apart < tau;
  if (!no_value) note(margin, apart * apart - tau * tau);  // the root would magnify rounding near 0

  const auto share = static_cast<double>(options.top_p);
  const auto budget = [&](std::span<const double> tokens) {
    return by_pooling ? least : std::clamp(blocks_of(tokens, share, block, margin), least, blocks);
  };
  const auto columns = heaviest(by_column, std::max<std::int64_t>(budget(masses.column), 1), 1, margin);
  const auto distances = heaviest(by_distance, std::max<std::int64_t>(budget(masses.diagonal), 1), 1, margin);
  for (std::int64_t row = 0; row < geometry.rows(); ++row) {
    const std::int64_t diagonal = geometry.diagonal(row);
    for (std::int64_t b = 0; b <= diagonal; ++b)
      if (columns[b] || distances[diagonal - b]) pattern[row][b] = true;
  }
  if (by_pooling) keep_pooled(head, options, geometry, pooled_own, pattern, margin);
  return pattern;
}

}  // namespace pbsattn::reference
