// Runs of a sequence's chunks with a SegmentCache in device memory, beside runs without one.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <optional>

#include "cuda/device_cache.h"
#include "pbsattn/options.hpp"

namespace pbsattn::test {

// A cache whose memory begins at an odd address and is followed by bytes that nobody may touch.
struct Cached {
  explicit Cached(std::size_t size) : memory(size + 1), cache(std::span(memory.data() + 1, size)) {}
  DeviceMemory memory;
  SegmentCache cache;
};

struct CachedRunOptions {
  std::size_t cap = Plan::no_cap;
  std::optional<CacheLayout> pages = {};  // that keys and values of the run with the cache lie in
};

// Returns the bytes of a cache for so many tokens of a shape's heads.
std::size_t cache_size(const Options& options, const Shape& shape, std::int64_t tokens);

// Runs a problem with a cache.
RunResult run_cached(const Options& options, Problem& problem, Cached& cached, std::int64_t valid,
                     const CachedRunOptions& how = {});

// Returns whether a run with the cache gives what one without it does.
testing::AssertionResult same(const Options& options, Problem& problem, Cached& cached, std::int64_t valid,
                              const CachedRunOptions& how = {});

// Grows a sequence in chunks that begin and end inside blocks and segments, and expects of each what it is without a
// cache; the third completes no segment of 256.
void grow(const Options& options, const Problem& whole, const CachedRunOptions& how = {});

// Orders that last, options with one, and a problem with weights for those that are learned.
inline constexpr std::array lasting{Permutation::none, Permutation::learned, Permutation::arrival};
Options ordered(Permutation permutation, Options options = parse_method("two-step:threshold=0.05:dense_last_rows=0"));
Problem problem_of(const Shape& shape, DType dtype = DType::bf16, std::uint64_t seed = 1);

}  // namespace pbsattn::test
