// The workspace of a CUDA plan: how many heads a pass takes under the cap, and where its arrays lie.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/executor.h"
#include "cuda/attend/parts.h"
#include "cuda/memory/arrays.h"
#include "cuda/memory/carver.h"

namespace pbsattn::cuda {

struct HeadOptions;

inline constexpr std::int64_t element_bytes = 2;
inline constexpr std::size_t alignment = 256;  // of every array in the workspace, and in a cache

// Returns the first address from `pointer` on that an array may have.
inline std::byte* aligned(std::byte* pointer) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  return pointer + ((address + alignment - 1) / alignment * alignment - address);
}

// Heads of one pass.
struct Extent {
  std::int64_t batch, kv_heads, group;  // `group`: query heads of each KV head
};

// A pass's arrays. Made without a base address, it counts bytes.
struct Layout {
  Layout(const detail::PlanSpec& spec, bool sparse, const Extent& extent, std::byte* base);

  static Geometry geometry_of(Geometry g, const Extent& extent);
  static std::int64_t order_heads_of(const detail::PlanSpec& spec, const Geometry& g);

  Carver carver;
  HeadOptions* head_options = nullptr;  // of all heads of the plan, where they differ: at the same place in every pass
  Permuted permuted;
  Pooled pooled;
  BlockLists lists;
  RowParts parts;        // of attend
  int part_blocks = 0;   // of select
  float* lse = nullptr;  // of the pass, where the caller may want none and a correction needs it
  std::byte *permute_scratch = nullptr, *score_scratch = nullptr, *attend_scratch = nullptr;
  std::size_t score_scratch_bytes = 0;
};

// Takes what is made of segments alone, which may outlast a run, of the heads of a geometry: of `slots` tokens that may
// move and `blocks` blocks of each.
void take_segments(Carver& carver, const detail::PlanSpec& spec, const Geometry& g, std::int64_t slots,
                   std::int64_t blocks, Permuted& permuted, Pooled& pooled);

// Tells whether some row has a block that may be left out, or the caller may keep an order that a run makes.
bool is_sparse(const detail::PlanSpec& spec);

// Returns the largest pass that the cap allows. Throws out_of_memory if one head is too large.
Extent choose_extent(const detail::PlanSpec& spec, bool sparse);

// Returns the bytes of a whole plan, at whatever address its workspace starts.
std::size_t workspace_bytes(const detail::PlanSpec& spec, bool sparse, const Extent& extent);

}  // namespace pbsattn::cuda
