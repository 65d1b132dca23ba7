// What a run finds in its SegmentCache and leaves there, for every backend. What lies in it, and where, is the
// backend's own.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "core/executor.h"

namespace pbsattn::detail {

// Tells whether what is made of a segment lasts: its order doesn't change with every call.
inline bool keeps_segments(const Options& options) {
  return options.permutation != Permutation::last_queries;
}

// Returns the most blocks that `fits` is true of, as it is of all fewer ones.
template <class Fits>
std::int64_t most_blocks(const Fits& fits) {
  std::int64_t blocks = 0;
  std::int64_t step = 1;
  while (fits(step)) step *= 2;
  for (; step > 0; step /= 2)
    if (fits(blocks + step)) blocks += step;
  return blocks;
}

// Returns all that contents depend on besides the caller's keys, values, weights and orders. `path`: names the backend
// and its code path; `means`: those that are kept.
inline std::array<std::int64_t, 16> made_by(const PlanSpec& spec, const Inputs& inputs, const void* path,
                                            std::int64_t means) {
  const Options& o = spec.options;
  const Shape& s = spec.geometry.shape;
  return {static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(path)),
          means,
          s.batch,
          s.kv_heads,
          s.head_dim,
          value_dim(s),
          o.block,
          o.segment,
          static_cast<std::int64_t>(o.permutation),
          static_cast<std::int64_t>(o.correction),
          static_cast<std::int64_t>(inputs.k.dtype),
          static_cast<std::int64_t>(inputs.v.dtype)};
}

// A run's use of a cache: whole segments that earlier runs made, which it reads, and those that it makes.
class KeptBlocks {
 public:
  KeptBlocks() = default;  // without a cache
  // Forgets what others made, and what the caller doesn't know an order of arrival of.
  KeptBlocks(const PlanSpec& spec, const Outputs& outputs, const std::array<std::int64_t, 16>& made_by)
      : cache_(outputs.cache.cache), block_(spec.geometry.block) {
    std::int64_t kept = cache_->tokens();
    if (auto& before = CacheAccess::made_by(*cache_); before != made_by) {
      before = made_by;
      kept = 0;
    }
    if (spec.options.permutation == Permutation::arrival) kept = std::min(kept, outputs.order.known);
    count_ = kept / spec.geometry.segment * (spec.geometry.segment / block_);
    CacheAccess::tokens(*cache_) = count_ * block_;
  }

  bool any() const { return cache_ != nullptr; }
  // Returns how many blocks, the first, earlier runs made.
  std::int64_t count() const { return count_; }
  // Leaves to the next run the first `made` blocks that this one has, and what there was already.
  void finish(std::int64_t made) const {
    if (cache_ != nullptr) CacheAccess::tokens(*cache_) = std::max(count_, made) * block_;
  }

 private:
  SegmentCache* cache_ = nullptr;
  std::int64_t block_ = 0;
  std::int64_t count_ = 0;
};

}  // namespace pbsattn::detail
