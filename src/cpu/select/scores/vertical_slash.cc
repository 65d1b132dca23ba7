#include <algorithm>

#include "core/score_traits.h"
#include "cpu/select/scores/last_queries.h"
#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {

void mark_vertical_slash(const StageContext& c, std::int64_t head, const SelectScratch& scratch) {
  using namespace minference;
  const Geometry& g = c.geometry();
  const Options& options = c.options(head);
  const auto tokens = static_cast<std::size_t>(g.shape.kv_len);
  find_masses(c, head, std::min<std::int64_t>(last_queries, g.shape.q_len), scratch);
  mark_heaviest({scratch.columns, tokens}, std::max(options.vertical, least_columns), least_columns, scratch.ranked);
  mark_heaviest({scratch.diagonals, tokens}, std::max(options.slash, least_diagonals), near_diagonals, scratch.ranked);
  // before[d]: kept diagonals of distance under d.
  std::int32_t* const before = scratch.ranked;
  before[0] = 0;
  for (std::size_t d = 0; d < tokens; ++d) before[d + 1] = before[d] + (scratch.diagonals[d] != 0 ? 1 : 0);
  for (std::int64_t row = 0; row < g.rows(); ++row) {
    std::uint64_t* const mask = c.mask(head, row);
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

}  // namespace pbsattn::cpu
