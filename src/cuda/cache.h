// A SegmentCache on CUDA: which arrays of a pass lie in it, and what of them earlier runs have made. The runs of one
// cache follow each other on a stream, so that what one has enqueued is there for the next.
#pragma once

#include <cuda_runtime_api.h>

#include "core/keep_rule.h"
#include "core/kept_blocks.h"
#include "core/score_traits.h"
#include "cuda/limits.h"
#include "cuda/workspace.h"

namespace pbsattn::cuda {

// Arrays of a cache for so many blocks of a head, [batch][kv_heads] of each. Made without a base address, it counts
// bytes.
struct CachedArrays {
  CachedArrays() = default;
  CachedArrays(const detail::PlanSpec& spec, std::int64_t blocks, std::byte* base) {
    Carver carver(base);
    take_segments(carver, spec, spec.geometry, blocks * block_tokens, blocks, permuted, pooled);
    bytes = carver.bytes + alignment;
  }

  Permuted permuted;
  Pooled pooled;
  std::size_t bytes = 0;  // at whatever address its memory starts
};

// Tells whether runs of such options, of whatever length, make something that lasts.
inline bool keeps_segments(const detail::PlanSpec& spec) {
  const Options& options = spec.options;
  const bool chooses = std::ranges::any_of(spec.option_sets(), [](const Options& o) { return !keeps_every_block(o); });
  return detail::keeps_segments(options) && (options.permutation == Permutation::arrival || chooses) &&
         (options.permutation != Permutation::none || reads_means(options));
}

// Returns the bytes of a cache for so many tokens; 0 where runs use none.
inline std::size_t cache_bytes(const detail::PlanSpec& spec, std::int64_t tokens) {
  if (!keeps_segments(spec) || tokens == 0) return 0;
  return CachedArrays(spec, ceil_div(tokens, block_tokens), nullptr).bytes;
}

// A run's use of its cache, where it has one that all its blocks fit in.
class CacheRun {
 public:
  CacheRun(const detail::PlanSpec& spec, bool sparse, const Inputs& inputs, const Outputs& outputs) : spec_(spec) {
    if (outputs.cache.cache == nullptr || !sparse || !keeps_segments(spec)) return;
    const std::span<std::byte> memory = detail::CacheAccess::memory(*outputs.cache.cache);
    // The same for all of a sequence's plans, whatever their lengths.
    const std::int64_t blocks = detail::most_blocks(
        [&](std::int64_t count) { return CachedArrays(spec, count, nullptr).bytes <= memory.size(); });
    if (blocks < spec.geometry.blocks()) return;
    static constexpr char path = 0;  // its address names this backend
    arrays_ = CachedArrays(spec, blocks, aligned(memory.data()));
    const int means = (arrays_.pooled.k != nullptr ? 1 : 0) + (arrays_.pooled.own != nullptr ? 2 : 0);
    kept_ = detail::KeptBlocks(spec, outputs, detail::made_by(spec, inputs, &path, means));
  }

  // Returns how many blocks, the first, earlier runs made.
  std::int64_t kept_blocks() const { return kept_.count(); }
  // Puts what is kept of a pass's heads in the place of the workspace's.
  void enter(std::int64_t batch, std::int64_t kv_head, Layout& layout) const {
    if (!kept_.any()) return;
    const Shape& shape = spec_.geometry.shape;
    const std::int64_t head = batch * shape.kv_heads + kv_head;
    const auto rows = [&](void* first, std::int64_t of_head, std::int64_t width) -> void* {
      return first == nullptr ? nullptr : static_cast<std::byte*>(first) + head * of_head * width * element_bytes;
    };
    Permuted& permuted = layout.permuted;
    Pooled& pooled = layout.pooled;
    permuted.slots = arrays_.permuted.slots;
    permuted.k = rows(arrays_.permuted.k, permuted.slots, shape.head_dim);
    permuted.v = rows(arrays_.permuted.v, permuted.slots, value_dim(shape));
    if (permuted.k != nullptr) permuted.order = arrays_.permuted.order + head * permuted.slots;
    permuted.sink_block = arrays_.permuted.sink_block + head;
    pooled.k_blocks = arrays_.pooled.k_blocks;
    pooled.v_blocks = arrays_.pooled.v_blocks;
    pooled.own_blocks = arrays_.pooled.own_blocks;
    pooled.k = rows(arrays_.pooled.k, pooled.k_blocks, shape.head_dim);
    pooled.v = rows(arrays_.pooled.v, pooled.v_blocks, value_dim(shape));
    pooled.own = rows(arrays_.pooled.own, pooled.own_blocks, shape.head_dim);
  }
  // Leaves what the run has enqueued to the next one. What is captured has yet to be made, at each launch of its graph.
  cudaError_t finish(cudaStream_t stream) const {
    if (!kept_.any()) return cudaSuccess;
    cudaStreamCaptureStatus status{};
    const cudaError_t error = cudaStreamIsCapturing(stream, &status);
    if (error == cudaSuccess && status == cudaStreamCaptureStatusNone) kept_.finish(permuted_blocks(spec_.geometry));
    return error;
  }

 private:
  const detail::PlanSpec& spec_;
  detail::KeptBlocks kept_;
  CachedArrays arrays_;
};

}  // namespace pbsattn::cuda
