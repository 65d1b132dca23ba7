// Softmax over keys themselves, and the attention mass that it gives blocks.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/context.h"
#include "cpu/select/scratch.h"

namespace pbsattn::cpu {

// Packs a block's keys as a row sees them, zeros after the last. Returns how many there are.
int pack_block(const StageContext& c, std::int64_t head, std::int64_t block, bool moved, float* keys);

// Returns `total`, or NaN where a query without a softmax has made every weight NaN.
inline double total_of(const SelectScratch& scratch, double total) {
  return std::isnan(scratch.weights[0]) ? std::numeric_limits<double>::quiet_NaN() : total;
}

// Softmax of a strip of queries over blocks of keys, as the blocks' masses. NaN throughout for a query that has a NaN
// or +inf among its scores, or no other than -inf.
class BlockMasses {
 public:
  BlockMasses(const Kernels& kernels, const SelectScratch& scratch, std::int64_t blocks, const Logits& logits)
      : kernels_(kernels), scratch_(scratch), blocks_(blocks), logits_(logits) {}

  // Adds block b with keys that all queries see: packed rows, as many as a multiple of row_tile.
  void add(std::int64_t b, const float* keys, int count, int dim, const float* queries);
  // Adds it where sees(query, key) says which; rows are padded to a multiple of row_tile.
  template <class Sees>
  void add_masked(std::int64_t b, const float* keys, int count, int dim, const float* queries, Sees&& sees);

  // Turns what was added into factors of its exponentials: the softmax weight of a key is exps * factor.
  void finish(int queries);
  const float* factors(std::int64_t b) const { return scratch_.scores + b * strip; }
  // Adds to weights[b] the masses of the first `queries` queries.
  void add_to(float* weights, int queries) const;

 private:
  void add_masked_exps(std::int64_t b, int count);

  const Kernels& kernels_;
  const SelectScratch& scratch_;
  std::int64_t blocks_;
  Logits logits_;
};

template <class Sees>
void BlockMasses::add_masked(std::int64_t b, const float* keys, int count, int dim, const float* queries, Sees&& sees) {
  kernels_.scores(keys, queries, (count + row_tile - 1) / row_tile * row_tile, dim, scratch_.exps);
  if (logits_.softcap != 0) kernels_.cap(scratch_.exps, std::int64_t{count} * strip, logits_);
  for (int key = 0; key < count; ++key)
    for (int query = 0; query < strip; ++query)
      if (!sees(query, key)) scratch_.exps[key * strip + query] = -std::numeric_limits<float>::infinity();
  add_masked_exps(b, count);
}

}  // namespace pbsattn::cpu
