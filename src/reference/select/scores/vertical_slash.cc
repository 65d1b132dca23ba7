#include <algorithm>

#include "reference/select/scores/last_queries.h"

namespace pbsattn::reference {

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

}  // namespace pbsattn::reference
