#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <span>

#include "core/score_traits.h"
#include "cpu/select/scores/last_queries.h"
#include "cpu/select/scores/means.h"
#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {
namespace {

// Returns the square root of the Jensen-Shannon divergence; 0 log 0 is 0.
double distance(const float* p, double p_total, const float* q, std::int64_t count) {
  double divergence = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double a = static_cast<double>(p[i]) / p_total;
    const auto b = static_cast<double>(q[i]);
    const double mean = (a + b) / 2;
    if (a != 0) divergence += 0.5 * a * std::log(a / mean);
    if (b != 0) divergence += 0.5 * b * std::log(b / mean);
  }
  return std::sqrt(std::max(divergence, 0.0));
}

// Multiplies up to a strip of mean queries by the blocks' mean keys, into sums, and caps them.
void score_pooled(const StageContext& c, std::int64_t head, const float* queries, int count, std::int64_t blocks,
                  const SelectScratch& scratch) {
  const int dim = c.head_dim();
  c.f32_kernels.pack.queries({queries, DType::f32, dim, nullptr}, count, dim, scratch.packed);
  multiply_means(c, c.pooled_own(head), blocks, scratch, scratch.sums);
  c.cap(scratch.sums, blocks * strip);
}

// Calls body(row, cells) for each row's pooled attention of the blocks up to its own.
template <class Body>
void for_each_row(const StageContext& c, std::int64_t head, const SelectScratch& scratch, Body&& body) {
  const Geometry& g = c.geometry();
  for (std::int64_t first = 0; first < g.rows(); first += strip) {
    const auto rows = static_cast<int>(std::min<std::int64_t>(strip, g.rows() - first));
    for (int i = 0; i < rows; ++i) pool_query(c, head, first + i, scratch.pooled_q + i * c.head_dim());
    score_pooled(c, head, scratch.pooled_q, rows, g.diagonal(first + rows - 1) + 1, scratch);
    for (int i = 0; i < rows; ++i) {
      const std::span cells(scratch.weights, static_cast<std::size_t>(g.diagonal(first + i) + 1));
      const double total = exponentials(scratch.sums, i, std::ssize(cells), c.scale_left(), scratch.weights);
      for (float& cell : cells) cell = total > 0 ? static_cast<float>(static_cast<double>(cell) / total) : 0.0F;
      body(first + i, cells);
    }
  }
}

// Of the cells of a head: all whose bits are at least `from`, and the first `ties` whose bits are `tie`.
struct CellCut {
  std::uint64_t from = 0;
  std::uint32_t tie = 0;
  std::int64_t ties = 0;
};

// Finds the highest cells whose sum stays within `most`. There are as many as pairs of blocks, so they aren't kept but
// made again for each eleven bits of the least: cells aren't negative, so that their bits order as they do.
CellCut find_cut(const StageContext& c, std::int64_t head, double most, const SelectScratch& scratch) {
  CellCut cut;
  double above = 0;
  std::uint32_t known = 0;  // the higher bits of the least
  std::int64_t equal = 0;   // cells that share them
  for (int shift = 21; shift > -11; shift -= 11) {
    const int low = std::max(shift, 0);
    const std::uint64_t end = std::uint64_t{1} << (shift + 11);  // of what lies in one range
    std::fill_n(scratch.bins, cell_bins, CellBin{});
    for_each_row(c, head, scratch, [&](std::int64_t, std::span<const float> cells) {
      for (const float cell : cells) {
        const std::uint32_t offset = std::bit_cast<std::uint32_t>(cell) - known;
        if (offset >= end) continue;
        CellBin& bin = scratch.bins[offset >> low];
        bin.sum += static_cast<double>(cell);
        ++bin.count;
      }
    });
    auto i = static_cast<std::int64_t>((end - 1) >> low);
    for (; i >= 0 && above + scratch.bins[i].sum <= most; --i) above += scratch.bins[i].sum;
    cut.from = known + (static_cast<std::uint64_t>(i + 1) << low);
    if (i < 0) return cut;
    known += static_cast<std::uint32_t>(i << low);
    equal = scratch.bins[i].count;
  }
  cut.tie = known;
  const auto value = static_cast<double>(std::bit_cast<float>(known));
  while (cut.ties < equal && (above += value) <= most) ++cut.ties;
  return cut;
}

// Marks of the rows' pooled attention, highest first, what stays within top_p of it.
void mark_pooled(const StageContext& c, std::int64_t head, const SelectScratch& scratch) {
  const double most = static_cast<double>(c.options(head).top_p) * static_cast<double>(c.geometry().rows());
  CellCut cut = find_cut(c, head, most, scratch);
  for_each_row(c, head, scratch, [&](std::int64_t row, std::span<const float> cells) {
    std::uint64_t* const mask = c.mask(head, row);
    for (std::size_t b = 0; b < cells.size(); ++b) {
      const auto bits = std::bit_cast<std::uint32_t>(cells[b]);
      if (bits >= cut.from || (bits == cut.tie && cut.ties-- > 0)) set_bit(mask, static_cast<std::int64_t>(b));
    }
  });
}

// Returns how many blocks the heaviest tokens would fill whose masses stay within `share`, and one more.
std::int64_t blocks_of(std::span<const float> masses, double share, std::int64_t block, std::int32_t* memory) {
  std::int64_t tokens = 1;
  double sum = 0;
  for (const std::int32_t i : rank(masses, memory)) {
    sum += static_cast<double>(masses[i]);
    if (sum > share) break;
    ++tokens;
  }
  return tokens / block + 1;
}

}  // namespace

void mark_flexible(const StageContext& c, std::int64_t head, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const Options& options = c.options(head);
  const auto tokens = static_cast<std::size_t>(g.shape.kv_len);
  const std::int64_t blocks = g.blocks();
  const std::int64_t least = std::min(ceil_div(options.min_budget, g.block), blocks);
  if (blocks <= std::max<std::int64_t>(flexible_whole_blocks, least)) {
    for (std::int64_t row = 0; row < g.rows(); ++row)
      for (std::int64_t b = 0; b <= g.diagonal(row); ++b) set_bit(c.mask(head, row), b);
    return;
  }
  find_masses(c, head, g.scoring_queries(), scratch);
  const auto share = static_cast<double>(options.top_p);
  const auto budget = [&](const float* masses) {
    return std::clamp(blocks_of({masses, tokens}, share, g.block, scratch.ranked), least, blocks);
  };
  std::int64_t columns = budget(scratch.columns);
  std::int64_t distances = budget(scratch.diagonals);

  // Sums by block, over the masses; distances in blocks count from the longest one, which ends at key 0.
  std::reverse(scratch.diagonals, scratch.diagonals + tokens);
  for (float* masses : {scratch.columns, scratch.diagonals})
    for (std::int64_t b = 0; b < blocks; ++b) {
      const auto end = std::min<std::int64_t>((b + 1) * g.block, g.shape.kv_len);
      masses[b] = std::accumulate(masses + b * g.block, masses + end, 0.0F);
    }
  std::reverse(scratch.diagonals, scratch.diagonals + blocks);

  const int dim = c.head_dim();
  const auto queries = static_cast<int>(g.scoring_queries());
  c.f32_kernels.sum_rows(c.q_rows(head, g.shape.q_len - queries), queries, dim, scratch.pooled_q);
  for (int d = 0; d < dim; ++d) scratch.pooled_q[d] /= static_cast<float>(queries);
  score_pooled(c, head, scratch.pooled_q, 1, blocks, scratch);
  const double total = exponentials(scratch.sums, 0, blocks, c.scale_left(), scratch.weights);
  const bool by_pooling =
      total > 0 && distance(scratch.weights, total, scratch.columns, blocks) < static_cast<double>(options.tau);
  if (by_pooling) columns = distances = least;

  mark_heaviest({scratch.columns, static_cast<std::size_t>(blocks)}, std::max<std::int64_t>(columns, 1), 1,
                scratch.ranked);
  mark_heaviest({scratch.diagonals, static_cast<std::size_t>(blocks)}, std::max<std::int64_t>(distances, 1), 1,
                scratch.ranked);
  for (std::int64_t row = 0; row < g.rows(); ++row)
    for (std::int64_t b = 0; b <= g.diagonal(row); ++b)
      if (scratch.columns[b] != 0 || scratch.diagonals[g.diagonal(row) - b] != 0) set_bit(c.mask(head, row), b);
  if (by_pooling) mark_pooled(c, head, scratch);
}

}  // namespace pbsattn::cpu
