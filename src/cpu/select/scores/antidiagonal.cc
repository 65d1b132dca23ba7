// BlockScore::antidiagonal and antidiagonal_causal: patches of queries and keys by their antidiagonals.
#include <algorithm>

#include "cpu/select/scores/mass.h"
#include "cpu/select/scores/scores.h"

namespace pbsattn::cpu {
namespace {

// Packs patches: lane g of patches[i * head_dim + d] is the i-th query from the end of the row's g-th patch, so that
// its product with consecutive keys is the antidiagonal. Returns the number of patches; those without queries are
// left out.
int pack_patches(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const int dim = c.head_dim();
  const std::int64_t row_token = g.diagonal(row) * g.block;
  std::fill_n(scratch.patches, patch_tokens * dim * strip, 0.0F);
  int lane = 0;
  for (std::int64_t first = row_token; first < g.row_end(row); first += patch_tokens) {
    if (first + patch_tokens <= g.row_begin(row)) continue;
    for (int i = 0; i < patch_tokens; ++i) {
      const std::int64_t token = first + patch_tokens - 1 - i;
      if (token < g.row_begin(row) || token >= g.row_end(row)) continue;
      c.f32_kernels.pack.keys(c.q_rows(head, token - g.q_offset()), 1, 1, dim, scratch.pooled_q);
      for (int d = 0; d < dim; ++d) scratch.patches[(i * dim + d) * strip + lane] = scratch.pooled_q[d];
    }
    scratch.index[lane++] = static_cast<std::int32_t>(first / patch_tokens);
  }
  return lane;
}

}  // namespace

double score_antidiagonal(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch) {
  const Geometry& g = c.geometry();
  const auto dim = c.head_dim() * patch_tokens;
  const bool causal = c.spec.options.score == BlockScore::antidiagonal_causal;
  const std::int64_t own_begin = g.own_begin(row);
  const std::int64_t blocks = causal ? g.diagonal(row) + 1 : own_begin;
  const int lanes = pack_patches(c, head, row, scratch);
  const int patches = g.block / patch_tokens;
  BlockMasses masses(c.f32_kernels, scratch, blocks, c.logits(patch_tokens));
  for (std::int64_t b = 0; b < blocks; ++b) {
    pack_block(c, head, b, b < own_begin && c.layout.permuted, scratch.keys);
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
  return total_of(scratch, lanes);
}

}  // namespace pbsattn::cpu
