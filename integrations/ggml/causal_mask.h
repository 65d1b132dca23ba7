// Is a mask plain causal, or that of a sliding window? The only way to know that an op is a prefill of one sequence:
// several sequences, shifted or reused caches and bidirectional attention all come with tensors of the same shape and
// name.
#pragma once

#include <cstdint>
#include <limits>
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

// Row i sees keys max(0, offset + i - window + 1) .. offset + i.
struct CausalRows {
  static constexpr std::int64_t no_window = std::numeric_limits<std::int32_t>::max();
  std::int64_t offset = 0;
  std::int64_t window = no_window;  // which hides keys of the last row at least, or none
  bool operator==(const CausalRows&) const = default;
};

// Returns what every row of the mask sees, where they are such rows and see and hide nothing else; else nothing. Reads
// every entry.
std::optional<CausalRows> causal_rows(const Mask& mask, int threads);

// All layers of a graph share a mask, so its verdict is kept until the mask may have changed: until the next
// graph starts (next_graph), or an op comes whose layer isn't above the last one's.
class CausalMasks {
 public:
  void next_graph() { verdicts_.clear(); }
  std::optional<CausalRows> rows(const Mask& mask, std::int32_t layer, int threads);

 private:
  struct Verdict {
    Mask mask;
    std::int32_t layer;
    std::optional<CausalRows> rows;
  };
  std::vector<Verdict> verdicts_;
};

}  // namespace pbsattn::ggml
