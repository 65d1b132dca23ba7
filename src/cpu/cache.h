// A SegmentCache of the CPU backend: which arrays of a pass lie in it, and what of them earlier runs have made.
#pragma once

#include "core/kept_blocks.h"
#include "cpu/workspace.h"

namespace pbsattn::cpu {

// Returns the bytes of a cache for so many tokens, on whichever of these paths; 0 where the plan's order changes with
// every call.
std::size_t cache_bytes(const detail::PlanSpec& spec, std::span<const Kernels* const> paths, std::int64_t tokens);

// Arrays of a cache for so many blocks, [batch][kv_heads] of each: what Layout has of the same names, k and v as attend
// reads them, in the segments' order where the path copies.
struct CachedArrays {
  CachedArrays() = default;
  CachedArrays(const detail::PlanSpec& spec, const Kernels& kernels, std::int64_t blocks, std::byte* base);

  std::byte* k = nullptr;
  std::byte* v = nullptr;
  std::uint8_t* values_finite = nullptr;
  float* pooled_k = nullptr;
  float* pooled_v = nullptr;
  float* pooled_own = nullptr;
  std::int32_t* order = nullptr;
  std::int64_t blocks = 0;
  std::size_t bytes = 0;
};

// A run's use of its cache, where it has one that all its blocks fit in.
class CacheRun {
 public:
  CacheRun(const detail::PlanSpec& spec, const Kernels& kernels, const Layout& layout, const Inputs& inputs,
           const Outputs& outputs);

  // Puts what is kept of a pass's heads in the place of the workspace's.
  void enter(const Heads& heads, Layout& layout) const;
  // Leaves what the run has made to the next one.
  void finish() const { kept_.finish(made_blocks_); }

 private:
  const Shape& shape_;
  std::int64_t block_;
  std::int64_t made_blocks_;  // by this run or before
  detail::KeptBlocks kept_;
  CachedArrays arrays_;
};

}  // namespace pbsattn::cpu
