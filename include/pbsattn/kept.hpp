// What is kept of a sequence from run to run. Part of pbsattn.hpp, which includes it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

namespace pbsattn {

namespace detail {
struct CacheAccess;
}

// The orders of Permutation::arrival, kept from call to call: token at each slot of the complete segments, [batch]
// [kv_heads][those tokens], strides in elements. A run reads those of the first `known` tokens, whole segments that
// earlier calls completed, and writes the others.
struct KeyOrder {
  std::int32_t* data = nullptr;  // optional where none is known
  std::int64_t batch_stride = 0, head_stride = 0;
  std::int64_t known = 0;
};

// Keeps what plans make of a sequence's complete segments - keys and values as the device packs them, in their order,
// and the means of their blocks - so that the run of a chunk makes it for new segments alone. A caller has one for each
// layer and sequence, or batch of sequences that are as long as each other. No result depends on it: a run that finds
// what another plan made, of other sizes, options or code path, begins anew, and one whose tokens don't fit leaves it
// as it is. Plans of Permutation::last_queries use none, since their orders change with every call, nor does the
// reference. One run at a time may have it; on CUDA runs that follow each other on a stream need no waiting between.
class SegmentCache {
 public:
  // Keeps in memory of the caller's, of the device, at any alignment, which must outlive it and belongs to it;
  // Plan::cache_size() tells how much. It may hold anything.
  explicit SegmentCache(std::span<std::byte> memory) noexcept : memory_(memory) {}
  SegmentCache(const SegmentCache&) = delete;
  SegmentCache& operator=(const SegmentCache&) = delete;

  // Returns how many of the sequence's first tokens it keeps; a run uses their whole segments.
  std::int64_t tokens() const noexcept { return tokens_; }
  // Forgets them.
  void clear() noexcept { tokens_ = 0; }

 private:
  friend struct detail::CacheAccess;
  std::span<std::byte> memory_;
  std::int64_t tokens_ = 0;
  std::array<std::int64_t, 16> made_by_{};  // what the contents depend on besides keys and values
};

// A cache as a run has it. Of the sequence's first tokens the first `valid` must be the same as in the run that had the
// cache last, or cached for them before it: their keys and values, order weights and orders of arrival. Who doesn't
// know passes 0, and the run makes everything anew.
struct CacheUse {
  SegmentCache* cache = nullptr;  // optional
  std::int64_t valid = 0;         // 0 .. kv_len
};

}  // namespace pbsattn

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
