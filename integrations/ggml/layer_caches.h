// What the layers of a context keep of their sequence from micro-batch to micro-batch, within a bound of memory.
//
// llama.cpp clears, shifts, trims and restores its caches behind the same pointers, so what is kept of a segment of
// tokens serves only while a checksum of all its keys and values is what it was.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "pbsattn/pbsattn.h"

namespace pbsattn::ggml {

class LayerCaches {
 public:
  struct Call {
    std::int32_t layer;
    const pbsattn_plan* plan;
    pbsattn_shape shape;
    const pbsattn_view *k, *v;
    std::int64_t most_tokens;  // that the context's cache holds
    std::span<const float> order_weights;
    std::int32_t pairs;  // of the weights
    int threads;
  };
  struct Use {
    pbsattn_segment_cache* cache = nullptr;  // null: none
    std::int64_t valid = 0;                  // tokens
  };

  // Finds or makes the cache of a call's layer, if the call has tokens before it, and checks what it holds. All caches
  // take at most `cap` bytes; a layer that gets none of them has none.
  Use before(const Call& call, std::size_t cap);
  // Notes what a call that ran has left in its cache.
  void after(const Call& call, const Use& use);
  // Gives back what a layer keeps.
  void drop(std::int32_t layer);

 private:
  struct Destroy {
    void operator()(pbsattn_segment_cache* cache) const { pbsattn_segment_cache_destroy(cache); }
  };
  struct Entry {
    std::unique_ptr<std::byte[]> memory;
    std::size_t size = 0;
    std::unique_ptr<pbsattn_segment_cache, Destroy> cache;
    std::int64_t segment = 0;         // tokens under a checksum
    std::vector<std::uint64_t> sums;  // of the segments it holds
    std::uint64_t weights = 0;        // a checksum of the order's
  };

  void make_room(Entry& entry, std::size_t size, std::size_t cap);

  std::map<std::int32_t, Entry> layers_;
  std::size_t used_ = 0;
};

}  // namespace pbsattn::ggml
