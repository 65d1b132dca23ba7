// Is a mask plain causal? The only way to know that an op is a prefill of one sequence: sliding windows,
// several sequences, shifted caches and bidirectional attention all come with tensors of the same shape and name.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace pbsattn::ggml {

// A mask of halves: 0 where a query sees a key, -inf where it doesn't.
struct Mask {
  const std::uint16_t* data = nullptr;
  std::int64_t queries = 0;     // rows that count
  std::int64_t keys = 0;        // entries of a row
  std::int64_t row_stride = 0;  // in entries
};

// p0 if row i of the mask is p0 + i + 1 zeros and then only -inf, for every i; else nothing. Reads every entry.
std::optional<std::int64_t> causal_offset(const Mask& mask, int threads);

// All layers of a graph share a mask, so its verdict is kept until the mask may have changed: until the next
// graph starts (next_graph), or an op comes whose layer isn't above the last one's.
class CausalMasks {
 public:
  void next_graph() { verdicts_.clear(); }
  std::optional<std::int64_t> offset(const Mask& mask, std::int32_t layer, int threads);

 private:
  struct Verdict {
    Mask mask;
    std::int32_t layer;
    std::optional<std::int64_t> offset;
  };
  std::vector<Verdict> verdicts_;
};

}  // namespace pbsattn::ggml
