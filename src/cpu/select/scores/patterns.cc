// What a head keeps by its columns and diagonals (reference/vertical_slash.cc defines both patterns), from two passes
// over the keys: one for the softmax's maxima and sums, one for its weights.
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <span>

#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {
namespace {

constexpr float above_all = 2;  // masses are means of softmax weights

// columns[n] and diagonals[distance]: mean softmax weights of the call's last `queries` queries.
void find_masses(const StageContext& c, std::int64_t head, std::int64_t queries, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  std::fill_n(scratch.columns, g.shape.kv_len, 0.0F);
  std::fill_n(scratch.diagonals, g.shape.kv_len, 0.0F);
  for (std::int64_t first = g.shape.kv_len - queries; first < g.shape.kv_len; first += strip) {
    const auto count = static_cast<int>(std::min<std::int64_t>(strip, g.shape.kv_len - first));
    c.f32_kernels.pack_queries(c.q_rows(head, first - g.q_offset()), count, dim, scratch.packed);
    BlockMasses masses(c.f32_kernels, scratch, g.blocks(), c.scale_log2());
    const auto add = [&](std::int64_t b) {
      const std::int64_t key = b * g.block;
      const auto keys = static_cast<int>(std::min<std::int64_t>(g.block, g.shape.kv_len - key));
      c.f32_kernels.pack_keys(c.rows_of(c.inputs.k, c.heads.kv_begin + c.kv_head(head), key), keys, g.block, dim,
                              scratch.keys);
      if (key + g.block <= first)
        masses.add(b, scratch.keys, keys, dim, scratch.packed);
      else
        masses.add_masked(b, scratch.keys, keys, dim, scratch.packed,
                          [&](int query, int i) { return query < count && key + i <= first + query; });
      return keys;
    };
    for (std::int64_t b = 0; b < g.blocks(); ++b) add(b);
    masses.finish(count);
    // The second pass overwrites maxima, whose place the factors took.
    std::copy_n(scratch.scores, g.blocks() * strip, scratch.patches);
    for (std::int64_t b = 0; b < g.blocks(); ++b) {
      const int keys = add(b);
      for (int i = 0; i < keys; ++i) {
        const std::int64_t n = b * g.block + i;
        for (int query = 0; query < count && n <= first + count - 1; ++query) {
          const float factor = scratch.patches[b * strip + query];
          if (std::isnan(factor) || n > first + query) continue;  // NaN makes its query count nothing
          const float mass = scratch.exps[i * strip + query] * factor / static_cast<float>(queries);
          scratch.columns[n] += mass;
          scratch.diagonals[first + query - n] += mass;
        }
      }
    }
  }
}

// Sorts 0 .. masses.size()-1 by descending mass, of equal ones the lower first.
std::span<std::int32_t> rank(std::span<const float> masses, std::int32_t* memory) {
  const std::span order(memory, masses.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(
      order, [&](std::int32_t a, std::int32_t b) { return masses[a] != masses[b] ? masses[a] > masses[b] : a < b; });
  return order;
}

// Replaces the masses by 1 for the `count` heaviest, the first `forced` before all others, and by 0.
void mark_heaviest(std::span<float> masses, std::int64_t count, std::int64_t forced, std::int32_t* memory) {
  const auto size = static_cast<std::int64_t>(masses.size());
  std::fill_n(masses.begin(), std::min(forced, size), above_all);
  const auto order = rank(masses, memory);
  for (std::int64_t i = 0; i < size; ++i) masses[order[i]] = i < count ? 1.0F : 0.0F;
}

std::uint64_t* mask_of(const StageContext& c, std::int64_t head, std::int64_t row) {
  return c.pass.mask + (head * c.geometry().rows() + row) * c.pass.mask_words;
}

void mark_vertical_slash(const StageContext& c, std::int64_t head, const SelectScratch& scratch) {
  constexpr std::int64_t last = 64;
  constexpr std::int64_t least_columns = 30;
  constexpr std::int64_t least_diagonals = 50;
  constexpr std::int64_t near = 100;
  const Geometry& g = c.geometry();
  const Options& options = c.options(head);
  const auto tokens = static_cast<std::size_t>(g.shape.kv_len);
  find_masses(c, head, std::min<std::int64_t>(last, g.shape.q_len), scratch);
  mark_heaviest({scratch.columns, tokens}, std::max<std::int64_t>(options.vertical, least_columns), least_columns,
                scratch.ranked);
  mark_heaviest({scratch.diagonals, tokens}, std::max<std::int64_t>(options.slash, least_diagonals), near,
                scratch.ranked);
  // before[d]: kept diagonals of distance under d.
  std::int32_t* const before = scratch.ranked;
  before[0] = 0;
  for (std::size_t d = 0; d < tokens; ++d) before[d + 1] = before[d] + (scratch.diagonals[d] != 0 ? 1 : 0);
  for (std::int64_t row = 0; row < g.rows(); ++row) {
    std::uint64_t* const mask = mask_of(c, head, row);
    for (std::int64_t b = 0; b < g.own_begin(row); ++b) {
      const float* const column = scratch.columns + b * g.block;
      // Distances from the row's queries to the block's keys.
      const std::int64_t least = g.row_begin(row) - ((b + 1) * g.block - 1);
      const std::int64_t most = g.row_end(row) - 1 - b * g.block;
      if (before[most + 1] > before[least] || std::any_of(column, column + g.block, [](float x) { return x != 0; }))
        set_bit(mask, b);
    }
  }
}

// Square root of the Jensen-Shannon divergence; 0 log 0 is 0.
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

// Products of up to a strip of mean queries with the blocks' mean keys, into sums.
void score_pooled(const StageContext& c, std::int64_t head, const float* queries, int count, std::int64_t blocks,
                  const SelectScratch& scratch) {
  const auto dim = static_cast<int>(c.geometry().shape.head_dim);
  const std::int64_t stored = ceil_div(c.geometry().blocks(), row_tile) * row_tile;
  const auto scored = static_cast<int>(ceil_div(blocks, row_tile) * row_tile);
  c.f32_kernels.pack_queries({queries, DType::f32, dim, nullptr}, count, dim, scratch.packed);
  c.f32_kernels.scores(c.pass.original_pooled + c.kv_head(head) * stored * dim, scratch.packed, scored, dim,
                       scratch.sums);
}

// weights[b] = exp(the query's score of block b - max); returns their sum.
double exponentiate(const float* sums, int query, std::int64_t blocks, float scale, float* weights) {
  float max = -std::numeric_limits<float>::infinity();
  for (std::int64_t b = 0; b < blocks; ++b) max = std::max(max, sums[b * strip + query] * scale);
  double total = 0;
  for (std::int64_t b = 0; b < blocks; ++b) total += weights[b] = std::exp(sums[b * strip + query] * scale - max);
  return total;
}

// Calls body(row, cells) for each row's pooled attention of the blocks up to its own.
template <class Body>
void for_each_row(const StageContext& c, std::int64_t head, const SelectScratch& scratch, Body&& body) {
  const Geometry& g = c.geometry();
  for (std::int64_t first = 0; first < g.rows(); first += strip) {
    const auto rows = static_cast<int>(std::min<std::int64_t>(strip, g.rows() - first));
    for (int i = 0; i < rows; ++i) pool_queries(c, head, first + i, scratch.pooled + i * g.shape.head_dim);
    score_pooled(c, head, scratch.pooled, rows, g.diagonal(first + rows - 1) + 1, scratch);
    for (int i = 0; i < rows; ++i) {
      const std::span cells(scratch.weights, static_cast<std::size_t>(g.diagonal(first + i) + 1));
      const double total = exponentiate(scratch.sums, i, std::ssize(cells), c.spec.options.scale, scratch.weights);
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

// The highest cells whose sum stays within `most`. There are as many as pairs of blocks, so they aren't kept but made
// again for each eleven bits of the least: cells aren't negative, so that their bits order as they do.
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

// Of the rows' pooled attention, highest first, what stays within top_p of it.
void mark_pooled(const StageContext& c, std::int64_t head, const SelectScratch& scratch) {
  const double most = static_cast<double>(c.options(head).top_p) * static_cast<double>(c.geometry().rows());
  CellCut cut = find_cut(c, head, most, scratch);
  for_each_row(c, head, scratch, [&](std::int64_t row, std::span<const float> cells) {
    std::uint64_t* const mask = mask_of(c, head, row);
    for (std::size_t b = 0; b < cells.size(); ++b) {
      const auto bits = std::bit_cast<std::uint32_t>(cells[b]);
      if (bits >= cut.from || (bits == cut.tie && cut.ties-- > 0)) set_bit(mask, static_cast<std::int64_t>(b));
    }
  });
}

// Blocks that the heaviest tokens would fill whose masses stay within `share`, and one more.
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

void mark_flexible(const StageContext& c, std::int64_t head, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const Options& options = c.options(head);
  const auto tokens = static_cast<std::size_t>(g.shape.kv_len);
  const std::int64_t blocks = g.blocks();
  const std::int64_t least = std::min(ceil_div(options.min_budget, g.block), blocks);
  if (blocks <= std::max<std::int64_t>(2, least)) {
    for (std::int64_t row = 0; row < g.rows(); ++row)
      for (std::int64_t b = 0; b <= g.diagonal(row); ++b) set_bit(mask_of(c, head, row), b);
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

  const auto dim = static_cast<int>(g.shape.head_dim);
  const auto queries = static_cast<int>(g.scoring_queries());
  c.f32_kernels.sum_rows(c.q_rows(head, g.shape.q_len - queries), queries, dim, scratch.pooled);
  for (int d = 0; d < dim; ++d) scratch.pooled[d] /= static_cast<float>(queries);
  score_pooled(c, head, scratch.pooled, 1, blocks, scratch);
  const double total = exponentiate(scratch.sums, 0, blocks, c.spec.options.scale, scratch.weights);
  const bool by_pooling =
      total > 0 && distance(scratch.weights, total, scratch.columns, blocks) < static_cast<double>(options.tau);
  if (by_pooling) columns = distances = least;

  mark_heaviest({scratch.columns, static_cast<std::size_t>(blocks)}, std::max<std::int64_t>(columns, 1), 1,
                scratch.ranked);
  mark_heaviest({scratch.diagonals, static_cast<std::size_t>(blocks)}, std::max<std::int64_t>(distances, 1), 1,
                scratch.ranked);
  for (std::int64_t row = 0; row < g.rows(); ++row)
    for (std::int64_t b = 0; b <= g.diagonal(row); ++b)
      if (scratch.columns[b] != 0 || scratch.diagonals[g.diagonal(row) - b] != 0) set_bit(mask_of(c, head, row), b);
  if (by_pooling) mark_pooled(c, head, scratch);
}

}  // namespace

void mark_pattern(const StageContext& c, std::int64_t head, const SelectScratch& scratch) {
  if (c.spec.options.score == BlockScore::vertical_slash)
    mark_vertical_slash(c, head, scratch);
  else
    mark_flexible(c, head, scratch);
}

}  // namespace pbsattn::cpu
