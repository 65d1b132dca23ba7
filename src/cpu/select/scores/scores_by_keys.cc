// Block scores by softmax over keys themselves: of all of a row's queries, of eight, or of patches' antidiagonals.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {
namespace {

constexpr int patch = 8;  // queries and keys of a patch

// Packs a block's keys as the row sees them, zeros after the last. Returns how many there are.
int pack_block(const StageContext& c, std::int64_t head, std::int64_t block, bool moved, float* keys) {
  const Geometry& g = c.geometry();
  const std::int64_t first = block * g.block;
  const auto count = static_cast<int>(std::min<std::int64_t>(g.block, g.shape.kv_len - first));
  const std::int64_t kv_head = c.kv_head(head);
  Rows rows = c.rows_of(c.inputs.k, c.heads.kv_begin + kv_head, moved ? 0 : first);
  if (moved) rows.index = c.pass.order + c.pass.far_head(head, kv_head) * g.permuted_len() + first;
  c.f32_kernels.pack_keys(rows, count, std::max(g.block, patch * row_tile), static_cast<int>(g.shape.head_dim), keys);
  return count;
}

// Adds the masses by the softmax of queries given by their tokens, up to a strip of them.
void add_masses(const StageContext& c, std::int64_t head, std::int64_t row, const std::int32_t* tokens, int count,
                const SelectScratch& scratch, float* weights) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  BlockMasses masses(c.f32_kernels, scratch, g.diagonal(row) + 1, c.scale_log2());
  Rows queries = c.q_rows(head, 0);
  queries.index = tokens;
  c.f32_kernels.pack_queries(queries, count, dim, scratch.packed);
  const std::int64_t own_begin = g.own_begin(row);
  for (std::int64_t b = 0; b <= g.diagonal(row); ++b) {
    const int keys = pack_block(c, head, b, b < own_begin && c.pass.permuted, scratch.keys);
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
  return static_cast<double>(queries);
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
  return std::isnan(pooled_total) ? pooled_total : 2.0 * count;
}

// Lane g of patches[i * head_dim + d] is the i-th query from the end of the row's g-th patch, so that its product with
// 8 consecutive keys is the antidiagonal. Returns the number of patches; those without queries are left out.
int pack_patches(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  const std::int64_t row_token = g.diagonal(row) * g.block;
  std::fill_n(scratch.patches, patch * dim * strip, 0.0F);
  int lane = 0;
  for (std::int64_t first = row_token; first < g.row_end(row); first += patch) {
    if (first + patch <= g.row_begin(row)) continue;
    for (int i = 0; i < patch; ++i) {
      const std::int64_t token = first + patch - 1 - i;
      if (token < g.row_begin(row) || token >= g.row_end(row)) continue;
      c.f32_kernels.pack_keys(c.q_rows(head, token - g.q_offset()), 1, 1, dim, scratch.pooled);
      for (int d = 0; d < dim; ++d) scratch.patches[(i * dim + d) * strip + lane] = scratch.pooled[d];
    }
    scratch.index[lane++] = static_cast<std::int32_t>(first / patch);
  }
  return lane;
}

double score_antidiagonal(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim) * patch;
  const bool causal = c.spec.options.score == BlockScore::antidiagonal_causal;
  const std::int64_t own_begin = g.own_begin(row);
  const std::int64_t blocks = causal ? g.diagonal(row) + 1 : own_begin;
  const int lanes = pack_patches(c, head, row, scratch);
  const int patches = g.block / patch;
  BlockMasses masses(c.f32_kernels, scratch, blocks, c.scale_log2() / patch);
  for (std::int64_t b = 0; b < blocks; ++b) {
    pack_block(c, head, b, b < own_begin && c.pass.permuted, scratch.keys);
    if (b < own_begin && patches % row_tile == 0)
      masses.add(b, scratch.keys, patches, dim, scratch.patches);
    else
      masses.add_masked(b, scratch.keys, patches, dim, scratch.patches, [&](int query, int key) {
        return query < lanes && (b < own_begin || b * patches + key <= scratch.index[query]);
      });
  }
  masses.finish(lanes);
  std::fill_n(scratch.weights, g.diagonal(row) + 1, 0.0F);
  masses.add_to(scratch.weights, lanes);
  return lanes;
}

}  // namespace

void BlockMasses::add(std::int64_t b, const float* keys, int count, int dim, const float* queries) {
  kernels_.score_keys(keys, queries, count, dim, scale_log2_, scratch_.scores + b * strip, scratch_.sums + b * strip,
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
      sum += score = std::exp2((score - origin) * scale_log2_);
    }
    scratch_.scores[b * strip + query] = max;
    scratch_.sums[b * strip + query] = sum;
  }
}

void BlockMasses::finish(int queries) {
  kernels_.score_factors(scratch_.scores, scratch_.sums, blocks_, strip, scale_log2_, queries);
}

void BlockMasses::add_to(float* weights, int queries) const {
  for (std::int64_t b = 0; b < blocks_; ++b)
    for (int i = 0; i < queries; ++i) weights[b] += scratch_.sums[b * strip + i] * factors(b)[i];
}

double score_by_keys(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const auto score = c.spec.options.score == BlockScore::exact     ? score_exact
                     : c.spec.options.score == BlockScore::sampled ? score_sampled
                                                                   : score_antidiagonal;
  const double total = score(c, head, row, scratch);
  // A query without a softmax has made every weight NaN.
  return std::isnan(scratch.weights[0]) ? std::numeric_limits<double>::quiet_NaN() : total;
}

}  // namespace pbsattn::cpu
