// A SegmentCache of the C interface, drawn from a fuzzer's bytes.
#pragma once

#include <memory>

#include "bytes.h"
#include "expect.h"
#include "pbsattn/pbsattn.h"
#include "pbsattn/pbsattn.hpp"

namespace pbsattn::fuzz {

// A cache for a plan's run, or one that is too small, and how much of it that run finds valid.
struct Cache {
  struct Destroy {
    void operator()(pbsattn_segment_cache* made) const { pbsattn_segment_cache_destroy(made); }
  };
  Cache(const pbsattn_plan* plan, const Shape& shape, Bytes& bytes) {
    if (!bytes.take_rarely(3)) return;
    std::size_t size = 0;
    const std::int64_t tokens = shape.kv_len + bytes.take<std::uint8_t>() % 200;
    require(pbsattn_plan_cache_size(plan, tokens, &size) == PBSATTN_OK, "a cache has a size");
    if (bytes.take_rarely(8)) size = size * bytes.take<std::uint8_t>() / 256;
    memory.reset(new std::byte[size]);
    pbsattn_segment_cache* made = nullptr;
    require(pbsattn_segment_cache_create(memory.get(), size, &made) == PBSATTN_OK, "a cache is made");
    cache.reset(made);
  }
  std::unique_ptr<std::byte[]> memory;
  std::unique_ptr<pbsattn_segment_cache, Destroy> cache;
  std::int64_t valid = 0;
};

}  // namespace pbsattn::fuzz
