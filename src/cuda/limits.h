// What this backend takes of a shape and of options, in numbers.
#pragma once

#include <cstdint>

#include "core/geometry.h"

namespace pbsattn::cuda {

// Elements of a key, which queries have too, and of a value, which outputs have too: those that kernels are compiled
// for.
struct Widths {
  int keys, values;
};
inline constexpr Widths widths[] = {{64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};

// Tells whether kernels of keys so wide are compiled with a cap on logits too. Those of other widths would not have
// enough registers.
constexpr bool takes_caps(std::int64_t head_dim) {
  return head_dim == 64 || head_dim == 128;
}

// Tells whether attend's kernels of keys so wide read them in pages, and where a layer has sinks, a window or a cap
// besides. The others would not have enough registers.
constexpr bool takes_pages(std::int64_t head_dim) {
  return head_dim <= 192;
}
constexpr bool takes_pages_of_layers(std::int64_t head_dim) {
  return head_dim <= 128;
}

inline constexpr int block_tokens = 128;            // the only block size of this backend
inline constexpr std::int64_t max_segment = 8192;   // a segment's scores and order live in shared memory
inline constexpr std::int64_t max_blocks = 49'152;  // a row's scores live in shared memory: 6 M tokens

// Key blocks that may be left out: those of complete segments.
inline std::int64_t permuted_blocks(const Geometry& g) {
  return g.permuted_len() / block_tokens;
}

}  // namespace pbsattn::cuda
