// BlockScore::exact and sampled: attention mass itself, of all of a row's queries or of eight.
#include "cpu/select/scores/mass.h"

#include <algorithm>

#include "core/score_traits.h"
#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {
namespace {

// Adds the masses by the softmax of up to a strip of queries, given by their place in the call.
void add_masses(const StageContext& c, std::int64_t head, std::int64_t row, const std::int32_t* tokens, int count,
                const SelectScratch& scratch, float* weights) {
  const Geometry& g = c.geometry();
  const int dim = c.head_dim();
  BlockMasses masses(c.f32_kernels, scratch, g.diagonal(row) + 1, c.logits());
  Rows queries = c.q_rows(head, 0);
  queries.index = tokens;
  c.f32_kernels.pack.queries(queries, count, dim, scratch.packed);
  const std::int64_t own_begin = g.own_begin(row);
  for (std::int64_t b = 0; b <= g.diagonal(row); ++b) {
    const int keys = pack_block(c, head, b, b < own_begin && c.layout.permuted, scratch.keys);
    if (b < own_begin)
      masses.add(b, scratch.keys, keys, dim, scratch.packed);
    else
      masses.add_masked(b, scratch.keys, keys, dim, scratch.packed, [&](int query, int key) {
        return query < count && b * g.block + key <= tokens[query] + g.q_offset();
      });
  }
  masses.finish(count);
  masses.add_to(weights, count);
}

}  // namespace

int pack_block(const StageContext& c, std::int64_t head, std::int64_t block, bool moved, float* keys) {
  const Geometry& g = c.geometry();
  const int count = c.block_keys(block);
  Rows rows = c.kv_rows(c.inputs.k, c.heads.kv_begin + c.kv_head(head), moved ? 0 : block * g.block);
  if (moved) rows.index = c.order(head, block);
  c.f32_kernels.pack.keys(rows, count, std::max(g.block, patch_tokens * row_tile), c.head_dim(), keys);
  return count;
}

void BlockMasses::add(std::int64_t b, const float* keys, int count, int dim, const float* queries) {
  kernels_.score_keys(keys, queries, count, dim, logits_, scratch_.scores + b * strip, scratch_.sums + b * strip,
                      scratch_.exps);
}

void BlockMasses::add_masked_exps(std::int64_t b, int count) {
  for (int query = 0; query < strip; ++query) {
    float max = -std::numeric_limits<float>::infinity();
    for (int key = 0; key < count; ++key) max = std::max(max, scratch_.exps[key * strip + query]);
    const float origin = std::isinf(max) && max < 0 ? 0.0F : max;
    float sum = 0;
    for (int key = 0; key < count; ++key) {
      float& score = scratch_.exps[key * strip + query];
      sum += score = std::exp2((score - origin) * logits_.scale_log2);
    }
    scratch_.scores[b * strip + query] = max;
    scratch_.sums[b * strip + query] = sum;
  }
}

void BlockMasses::finish(int queries) {
  kernels_.score_factors(scratch_.scores, scratch_.sums, blocks_, strip, logits_.scale_log2, queries);
}

void BlockMasses::add_to(float* weights, int queries) const {
  for (std::int64_t b = 0; b < blocks_; ++b)
    for (int i = 0; i < queries; ++i) weights[b] += scratch_.sums[b * strip + i] * factors(b)[i];
}

double score_exact(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const std::int64_t begin = g.row_begin(row) - g.q_offset();
  const std::int64_t queries = g.row_end(row) - g.row_begin(row);
  std::fill_n(scratch.weights, g.diagonal(row) + 1, 0.0F);
  for (std::int64_t first = 0; first < queries; first += strip) {
    const int count = static_cast<int>(std::min<std::int64_t>(strip, queries - first));
    for (int i = 0; i < count; ++i) scratch.index[i] = static_cast<std::int32_t>(begin + first + i);
    add_masses(c, head, row, scratch.index, count, scratch, scratch.weights);
  }
  return total_of(scratch, static_cast<double>(queries));
}

double score_sampled(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const std::int64_t begin = g.row_begin(row) - g.q_offset();
  const std::int64_t queries = g.row_end(row) - g.row_begin(row);
  const auto count = static_cast<int>(sampled_queries(queries));
  const double pooled_total = score_per_query(c, head, row, scratch);
  // Both count as much, so the pooled sums over all queries are brought to the number of sampled ones.
  for (std::int64_t b = 0; b <= g.diagonal(row); ++b) scratch.weights[b] *= static_cast<float>(count / pooled_total);
  for (int i = 0; i < count; ++i) scratch.index[i] = static_cast<std::int32_t>(begin + sampled_query(queries, i));
  add_masses(c, head, row, scratch.index, count, scratch, scratch.weights);
  return total_of(scratch, 2.0 * count);
}

}  // namespace pbsattn::cpu
