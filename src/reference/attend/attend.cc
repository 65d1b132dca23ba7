#include "reference/attend/attend.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace pbsattn::reference {
namespace {

// Returns the tokens that a query sees: of blocks before its own segment, whatever stands in their slots; of its own
// segment, in original order, those up to itself. Where a window hides keys, all are in their original order.
std::vector<std::int32_t> visible_tokens(const Geometry& geometry, std::int64_t query,
                                         std::span<const std::int32_t> order, std::span<const std::int32_t> list) {
  const std::int64_t token = geometry.q_offset() + query;
  const std::int64_t own_begin = token / geometry.segment * geometry.segment / geometry.block;
  std::vector<std::int32_t> tokens;
  for (const std::int32_t b : list) {
    const std::int64_t begin = std::int64_t{b} * geometry.block;
    const std::int64_t end = begin + geometry.block;
    for (std::int64_t slot = begin; slot < end; ++slot) {
      if (slot < geometry.first_seen(token)) continue;
      if (b < own_begin)
        tokens.push_back(order[slot]);
      else if (slot <= token)
        tokens.push_back(static_cast<std::int32_t>(slot));
    }
  }
  return tokens;
}

struct Key {
  double logit;
  double count;  // that it stands for
  std::span<const double> value;
};

}  // namespace

QueryResult attend_query(const Head& head, const Geometry& geometry, const Logits& logits, std::int64_t query,
                         std::span<const std::int32_t> order, std::span<const std::int32_t> list,
                         const PooledBlocks* pooled) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  std::vector<Key> keys;
  for (const std::int32_t n : visible_tokens(geometry, query, order, list))
    keys.push_back({logits(dot(head.q[query], head.k[n])), 1, head.v[n]});
  if (pooled != nullptr) {
    const std::int64_t row = (geometry.q_offset() + query) / geometry.block - geometry.first_row();
    for (std::int64_t b = 0; b < geometry.own_begin(row); ++b)
      if (!std::ranges::binary_search(list, b))
        keys.push_back({logits(dot(head.q[query], pooled->k[b])), static_cast<double>(geometry.block), pooled->v[b]});
  }
  if (head.sink != -infinity) keys.push_back({head.sink, 1, {}});

  QueryResult result{std::vector<double>(head.v.columns, 0.0), -infinity};
  double max = -infinity;
  for (const Key& key : keys) max = std::max(max, key.logit);
  // Of logits that all are -inf every weight is 0, and still 0 times NaN or infinity is NaN.
  const bool hidden = std::ranges::all_of(keys, [](const Key& key) { return key.logit == -infinity; });
  const auto weight = [&](const Key& key) { return hidden ? 0.0 : key.count * std::exp(key.logit - max); };
  double sum = 0;
  for (const Key& key : keys) sum += weight(key);
  for (const Key& key : keys) {
    const double share = hidden ? 0.0 : weight(key) / sum;
    for (std::size_t d = 0; d < key.value.size(); ++d) result.out[d] += share * key.value[d];
  }
  if (hidden) return result;
  result.lse = max + std::log(sum);
  return result;
}

}  // namespace pbsattn::reference
