// BlockScore::vertical_slash and flexible: what a head keeps follows from columns (keys that all queries look at) and
// diagonals (distances that all queries look back), found in its last queries.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "reference/numbers.h"
#include "reference/stages.h"

namespace pbsattn::reference {
namespace {

// Mean softmax weight of the last `queries` queries on each key, and on each distance from query to key.
struct Masses {
  std::vector<double> column, diagonal;
};

// A NaN makes its query count nothing.
Masses last_queries_masses(const Head& head, const Geometry& geometry, double scale, std::int64_t queries) {
  const std::int64_t keys = geometry.shape.kv_len;
  Masses masses{std::vector<double>(keys, 0.0), std::vector<double>(keys, 0.0)};
  std::vector<double> share;
  for (std::int64_t token = keys - queries; token < keys; ++token) {
    share.resize(token + 1);
    for (std::int64_t n = 0; n <= token; ++n) share[n] = dot(head.q[token - geometry.q_offset()], head.k[n]) * scale;
    softmax(share);
    if (std::isnan(share[0])) continue;
    for (std::int64_t n = 0; n <= token; ++n) {
      masses.column[n] += share[n] / static_cast<double>(queries);
      masses.diagonal[token - n] += share[n] / static_cast<double>(queries);
    }
  }
  return masses;
}

std::vector<std::int64_t> descending(std::span<const double> values) {
  std::vector<std::int64_t> index(values.size());
  std::iota(index.begin(), index.end(), std::int64_t{0});
  std::ranges::stable_sort(index, [&](std::int64_t a, std::int64_t b) { return values[a] > values[b]; });
  return index;
}

void note(double* margin, double distance) {
  if (margin != nullptr) *margin = std::min(*margin, std::abs(distance));
}

// How far two masses are from a tie, as a share of the heavier one.
double gap(double heavier, double lighter) {
  return heavier > 0 ? (heavier - lighter) / heavier : 0.0;
}

// Marks the `count` heaviest, the first `forced` before all others.
std::vector<bool> heaviest(std::vector<double> masses, std::int64_t count, std::int64_t forced, double* margin) {
  for (std::int64_t i = 0; i < std::min<std::int64_t>(forced, std::ssize(masses)); ++i)
    masses[i] = 2;  // above any mass
  std::vector<bool> marked(masses.size(), false);
  const auto order = descending(masses);
  for (std::int64_t i = 0; i < std::min<std::int64_t>(count, std::ssize(order)); ++i) marked[order[i]] = true;
  if (count < std::ssize(order)) note(margin, gap(masses[order[count - 1]], masses[order[count]]));
  return marked;
}

std::vector<double> sums_by_block(std::span<const double> values, std::int64_t block) {
  std::vector<double> sums((std::ssize(values) + block - 1) / block, 0.0);
  for (std::int64_t i = 0; i < std::ssize(values); ++i) sums[i / block] += values[i];
  return sums;
}

// Square root of the Jensen-Shannon divergence; 0 log 0 is 0.
double distance(std::span<const double> p, std::span<const double> q) {
  double divergence = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double mean = (p[i] + q[i]) / 2;
    if (p[i] != 0) divergence += 0.5 * p[i] * std::log(p[i] / mean);
    if (q[i] != 0) divergence += 0.5 * q[i] * std::log(q[i] / mean);
  }
  return std::sqrt(std::max(divergence, 0.0));
}

// Blocks that the heaviest tokens would fill whose masses stay within `share`, and one more.
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

Pattern nothing_of(const Geometry& geometry) {
  Pattern pattern;
  for (std::int64_t row = 0; row < geometry.rows(); ++row) pattern.emplace_back(geometry.diagonal(row) + 1, false);
  return pattern;
}

// Adds what of the rows' pooled attention, highest first, stays within top_p of it.
void keep_pooled(const Head& head, const Options& options, const Geometry& geometry, const Matrix& pooled_keys,
                 Pattern& pattern, double* margin) {
  struct Cell {
    double score;
    std::int64_t row, block;
  };
  std::vector<Cell> cells;
  for (std::int64_t row = 0; row < geometry.rows(); ++row) {
    const auto scores = block_scores(pool_query(head, geometry, Rules::paper, row), pooled_keys,
                                     geometry.diagonal(row) + 1, options.scale);
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

Pattern vertical_slash_pattern(const Head& head, const Options& options, const Geometry& geometry, double* margin) {
  constexpr std::int64_t last = 64;  // all of this is MInference's
  constexpr std::int64_t least_columns = 30;
  constexpr std::int64_t least_diagonals = 50;
  constexpr std::int64_t near = 100;
  const auto masses =
      last_queries_masses(head, geometry, options.scale, std::min<std::int64_t>(last, geometry.shape.q_len));
  const auto columns =
      heaviest(masses.column, std::max<std::int64_t>(options.vertical, least_columns), least_columns, margin);
  const auto diagonals =
      heaviest(masses.diagonal, std::max<std::int64_t>(options.slash, least_diagonals), near, margin);

  Pattern pattern = nothing_of(geometry);
  for (std::int64_t row = 0; row < geometry.rows(); ++row)
    for (std::int64_t token = geometry.row_begin(row); token < geometry.row_end(row); ++token)
      for (std::int64_t n = 0; n <= token; ++n)
        if (columns[n] || diagonals[token - n]) pattern[row][n / geometry.block] = true;
  return pattern;
}

Pattern flexible_pattern(const Head& head, const Options& options, const Geometry& geometry, double* margin) {
  const std::int64_t block = geometry.block;
  const std::int64_t blocks = geometry.blocks();
  const std::int64_t least = std::min((options.min_budget + block - 1) / block, blocks);
  Pattern pattern = nothing_of(geometry);
  if (blocks <= std::max<std::int64_t>(2, least)) {
    for (auto& row : pattern) row.assign(row.size(), true);
    return pattern;
  }

  auto masses = last_queries_masses(head, geometry, options.scale, geometry.scoring_queries());
  // Distances in blocks, counted from the longest one, which ends at key 0.
  std::vector<double> by_distance = sums_by_block(std::vector(masses.diagonal.rbegin(), masses.diagonal.rend()), block);
  std::ranges::reverse(by_distance);
  const std::vector<double> by_column = sums_by_block(masses.column, block);

  const Matrix pooled_keys = pool_original_keys(head, geometry, Rules::paper);
  std::vector<double> query(geometry.shape.head_dim, 0.0);
  for (std::int64_t i = 0; i < geometry.scoring_queries(); ++i)
    for (std::int64_t d = 0; d < geometry.shape.head_dim; ++d)
      query[d] += head.q[geometry.shape.q_len - 1 - i][d] / static_cast<double>(geometry.scoring_queries());
  const auto predicted = block_scores(query, pooled_keys, blocks, options.scale);
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
  if (by_pooling) keep_pooled(head, options, geometry, pooled_keys, pattern, margin);
  return pattern;
}

}  // namespace pbsattn::reference
