// Stage three: softmax attention of each query over the keys of its row's blocks.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "reference/permute/permute.h"

namespace pbsattn::reference {

struct QueryResult {
  std::vector<double> out;  // [head_dim_v]
  double lse = 0;           // log of the sum of exp(logit) over the visible keys
};

// Attends one query to the blocks listed for its row. Exact: weights are not rounded to the input's dtype, and backends
// that do so are measured against this. Where every logit is -inf every weight is 0, of which values that are not
// finite make NaN. With pooled blocks (Correction::mean) each block before the own segment that isn't listed counts as
// `block` more keys that all are its mean key, with its mean value. The head's sink is one more key.
QueryResult attend_query(const Head& head, const Geometry& geometry, const Logits& logits, std::int64_t query,
                         std::span<const std::int32_t> order, std::span<const std::int32_t> list,
                         const PooledBlocks* pooled = nullptr);

}  // namespace pbsattn::reference
