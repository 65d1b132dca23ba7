#include <algorithm>

#include "core/score_traits.h"
#include "reference/select/scores/last_queries.h"

namespace pbsattn::reference {

Pattern vertical_slash_pattern(const Head& head, const Options& options, const Geometry& geometry, double* margin) {
  using namespace minference;
  const auto masses =
      last_queries_masses(head, geometry, Logits(options), std::min<std::int64_t>(last_queries, geometry.shape.q_len));
  const auto columns = heaviest(masses.column, std::max(options.vertical, least_columns), least_columns, margin);
  const auto diagonals = heaviest(masses.diagonal, std::max(options.slash, least_diagonals), near_diagonals, margin);

  Pattern pattern = nothing_of(geometry);
  for (std::int64_t row = 0; row < geometry.rows(); ++row)
    for (std::int64_t token = geometry.row_begin(row); token < geometry.row_end(row); ++token)
      for (std::int64_t n = 0; n <= token; ++n)
        if (columns[n] || diagonals[token - n]) pattern[row][n / geometry.block] = true;
  return pattern;
}

}  // namespace pbsattn::reference
