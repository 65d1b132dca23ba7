// BlockScore::two_step (reference/select/scores/two_step.cc defines it). Rows that follow one another read much the
// same blocks, so in the second step a few of them share a strip, which the path's own products take over the blocks
// that attention will read too.
#include "cpu/select/scores/two_step.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "core/keep_rule.h"
#include "core/score_traits.h"
#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {
namespace {

// Writes the places in the call of a row's sampled queries, up to a strip, from the one numbered `first` on. Returns
// their number.
int sample(const Geometry& g, std::int64_t row, std::int64_t most, std::int64_t first, std::int32_t* index) {
  const std::int64_t queries = g.row_end(row) - g.row_begin(row);
  const auto count = static_cast<int>(std::min<std::int64_t>(strip, sampled_queries(queries, most) - first));
  for (int i = 0; i < count; ++i)
    index[i] = static_cast<std::int32_t>(g.row_begin(row) - g.q_offset() + sampled_query(queries, first + i, most));
  return count;
}

// Rows of one head, and which of their exact queries lie in the strip: row i's from lane begin[i] on.
class Group {
 public:
  Group(const StageContext& c, std::int64_t head, std::int64_t first_row, int rows, const SelectScratch& scratch)
      : c_(c), g_(c.geometry()), head_(head), first_row_(first_row), rows_(rows), scratch_(scratch) {}

  // Takes the first step for row i: its weights add up to the number of its exact queries. Returns whether they have a
  // value.
  bool score_by_means(int i) {
    const Options& options = c_.options(head_);
    const std::int64_t row = first_row_ + i;
    const std::int64_t queries = g_.row_end(row) - g_.row_begin(row);
    const std::int64_t sampled = sampled_queries(queries, options.two_step_queries);
    const std::int64_t diagonal = g_.diagonal(row);
    float* const weights = two_step_weights(c_, i, scratch_);
    std::fill_n(weights, diagonal + 1, 0.0F);
    Rows rows = c_.q_rows(head_, 0);
    rows.index = scratch_.index;
    for (std::int64_t first = 0; first < sampled; first += strip) {
      const int count = sample(g_, row, options.two_step_queries, first, scratch_.index);
      if (!add_pooled_shares(c_, head_, row, rows, count, scratch_, weights)) return false;
    }
    const double least = row_threshold(options, diagonal) / options.two_step_reach * static_cast<double>(sampled);
    const auto exact = static_cast<float>(sampled_queries(queries, options.two_step_exact));
    for (std::int64_t b = 0; b <= diagonal; ++b) {
      if (b >= g_.own_begin(row) || static_cast<double>(weights[b]) >= least) scratch_.readers[b] |= 1U << i;
      weights[b] *= exact / static_cast<float>(sampled);
    }
    return true;
  }

  // Adds to the rows' weights the masses by a strip of exact queries, from those numbered `first` on.
  void add_masses(std::int64_t first) {
    for (int i = 0; i < rows_; ++i)
      begin_[i + 1] =
          begin_[i] + sample(g_, first_row_ + i, c_.options(head_).two_step_exact, first, scratch_.index + begin_[i]);
    Rows queries = c_.q_rows(head_, 0);
    queries.index = scratch_.index;
    c_.f32_kernels.pack.queries(queries, begin_[rows_], c_.head_dim(), scratch_.packed);
    c_.kernels.pack.queries(queries, begin_[rows_], c_.head_dim(), scratch_.exact);
    const std::int64_t end = g_.diagonal(first_row_ + rows_ - 1) + 1;
    put_means(end);
    for (std::int64_t b = 0; b < g_.own_begin(first_row_ + rows_ - 1); ++b) put_keys(b);
    for (std::int64_t b = g_.own_begin(first_row_); b < end; ++b) put_own_keys(b);
    c_.f32_kernels.score_factors(scratch_.scores, scratch_.sums, end, strip, c_.scale_log2(), begin_[rows_]);
    for (int i = 0; i < rows_; ++i) {
      float* const weights = two_step_weights(c_, i, scratch_);
      for (std::int64_t b = 0; b <= g_.diagonal(first_row_ + i); ++b)
        if (reads(i, b))
          for (int lane = begin_[i]; lane < begin_[i + 1]; ++lane)
            weights[b] += scratch_.sums[b * strip + lane] * scratch_.scores[b * strip + lane];
    }
  }

 private:
  bool reads(int i, std::int64_t b) const { return (scratch_.readers[b] >> i & 1U) != 0; }

  // Puts each block before a row's own segment as keys that all are its mean, and nothing after it.
  void put_means(std::int64_t end) {
    const std::int64_t before = g_.own_begin(first_row_ + rows_ - 1);
    c_.f32_kernels.scores(c_.pooled_k(head_), scratch_.packed, static_cast<int>(before), c_.head_dim(),
                          scratch_.scores);
    c_.cap(scratch_.scores, up_to_tile(before) * strip);
    const auto keys = static_cast<float>(g_.block);
    for (std::int64_t i = 0; i < before * strip; ++i)
      scratch_.sums[i] = std::isnan(scratch_.scores[i]) ? scratch_.scores[i] : keys;
    for (int i = 0; i < rows_; ++i)
      for (std::int64_t b = g_.own_begin(first_row_ + i); b < end; ++b) {
        std::fill(scratch_.scores + b * strip + begin_[i], scratch_.scores + b * strip + begin_[i + 1],
                  -std::numeric_limits<float>::infinity());
        std::fill(scratch_.sums + b * strip + begin_[i], scratch_.sums + b * strip + begin_[i + 1], 0.0F);
      }
  }

  // Puts a block's keys, as they were moved, in the place of its mean where rows read them.
  void put_keys(std::int64_t b) {
    put_sums(b, c_.layout.permuted, nullptr, [&](int i) { return reads(i, b) && b < g_.own_begin(first_row_ + i); });
  }

  // Puts a block's keys where they were, up to each query, for rows whose own segment it lies in.
  void put_own_keys(std::int64_t b) {
    alignas(cache_line) std::array<std::int32_t, strip> seen{};
    for (int lane = 0; lane < begin_[rows_]; ++lane)
      seen[lane] = static_cast<std::int32_t>(
          std::clamp<std::int64_t>(scratch_.index[lane] + g_.q_offset() - b * g_.block + 1, 0, c_.block_keys(b)));
    put_sums(b, false, seen.data(),
             [&](int i) { return b >= g_.own_begin(first_row_ + i) && b <= g_.diagonal(first_row_ + i); });
  }

  // Puts the keys of a block that the strip's queries see in the place of what stands for it, for the rows that take
  // them.
  template <class Takes>
  void put_sums(std::int64_t b, bool moved, const std::int32_t* seen, Takes&& takes) {
    int first = strip;
    int last = 0;
    for (int i = 0; i < rows_; ++i) {
      if (!takes(i) || begin_[i] == begin_[i + 1]) continue;
      first = std::min(first, begin_[i] / half_strip * half_strip);
      last = (begin_[i + 1] + half_strip - 1) / half_strip * half_strip;
    }
    if (first >= last) return;
    alignas(cache_line) std::array<float, strip> max;
    alignas(cache_line) std::array<float, strip> sum;
    c_.kernels.sum_exps({.block = c_.packed_block(head_, b, moved),
                         .queries = scratch_.exact,
                         .count = c_.block_keys(b),
                         .head_dim = c_.head_dim(),
                         .logits = c_.logits(),
                         .first = first,
                         .last = last,
                         .seen = seen},
                        max.data(), sum.data());
    for (int i = 0; i < rows_; ++i) {
      if (!takes(i)) continue;
      const auto count = static_cast<std::size_t>(begin_[i + 1] - begin_[i]);
      std::copy_n(max.data() + begin_[i], count, scratch_.scores + b * strip + begin_[i]);
      std::copy_n(sum.data() + begin_[i], count, scratch_.sums + b * strip + begin_[i]);
    }
  }

  const StageContext& c_;
  const Geometry& g_;
  std::int64_t head_, first_row_;
  int rows_;
  const SelectScratch& scratch_;
  std::array<int, most_two_step_rows + 1> begin_{};
};

}  // namespace

int two_step_rows(const Options& options) {
  return std::clamp(strip / options.two_step_exact, 1, most_two_step_rows);
}

float* two_step_weights(const StageContext& c, int i, const SelectScratch& scratch) {
  return scratch.weights + i * c.geometry().blocks();
}

std::array<double, most_two_step_rows> score_two_step(const StageContext& c, std::int64_t head, std::int64_t first_row,
                                                      int rows, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  Group group(c, head, first_row, rows, scratch);
  std::fill_n(scratch.readers, g.blocks(), 0);
  std::array<double, most_two_step_rows> totals{};
  std::int64_t most = 0;
  for (int i = 0; i < rows; ++i) {
    const std::int64_t row = first_row + i;
    const std::int64_t exact = sampled_queries(g.row_end(row) - g.row_begin(row), c.options(head).two_step_exact);
    totals[i] = group.score_by_means(i) ? 2.0 * static_cast<double>(exact) : std::nan("");
    most = std::max(most, exact);
  }
  for (std::int64_t first = 0; first < most; first += strip) group.add_masses(first);
  // A query without a softmax has made the weights of all that its row reads NaN, the diagonal among them.
  for (int i = 0; i < rows; ++i)
    if (std::isnan(two_step_weights(c, i, scratch)[g.diagonal(first_row + i)])) totals[i] = std::nan("");
  return totals;
}

}  // namespace pbsattn::cpu
