// Stage three: softmax attention of each query over the keys of its row's blocks.
#include <algorithm>
#include <cmath>
#include <limits>

#include "reference/stages.h"

namespace pbsattn::reference {
namespace {

// Tokens that a query sees: of blocks before its own segment, whatever stands in their slots; of its own
// segment, in original order, those up to itself.
std::vector<std::int32_t> visible_tokens(const Geometry& geometry, std::int64_t query,
                                         std::span<const std::int32_t> order, std::span<const std::int32_t> list) {
  const std::int64_t token = geometry.q_offset() + query;
  const std::int64_t own_begin = token / geometry.segment * geometry.segment / geometry.block;
  std::vector<std::int32_t> tokens;
  for (const std::int32_t b : list) {
    const std::int64_t begin = std::int64_t{b} * geometry.block;
    const std::int64_t end = begin + geometry.block;
    for (std::int64_t slot = begin; slot < end; ++slot) {
      if (b < own_begin)
        tokens.push_back(order[slot]);
      else if (slot <= token)
        tokens.push_back(static_cast<std::int32_t>(slot));
    }
  }
  return tokens;
}

}  // namespace

QueryResult attend_query(const Head& head, const Geometry& geometry, double scale, std::int64_t query,
                         std::span<const std::int32_t> order, std::span<const std::int32_t> list) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const std::vector<std::int32_t> tokens = visible_tokens(geometry, query, order, list);

  std::vector<double> weight;
  weight.reserve(tokens.size());
  for (const std::int32_t n : tokens) weight.push_back(dot(head.q[query], head.k[n]) * scale);

  QueryResult result{std::vector<double>(head.v.columns, 0.0), -infinity};
  if (std::ranges::all_of(weight, [](double s) { return s == -infinity; })) return result;

  double max = -infinity;
  for (const double s : weight) max = std::max(max, s);
  double sum = 0;
  for (double& w : weight) sum += w = std::exp(w - max);
  for (std::size_t i = 0; i < tokens.size(); ++i)
    for (std::int64_t d = 0; d < head.v.columns; ++d) result.out[d] += weight[i] / sum * head.v[tokens[i]][d];
  result.lse = max + std::log(sum);
  return result;
}

}  // namespace pbsattn::reference
