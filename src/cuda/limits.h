// What this backend takes of a shape and of options, in numbers.
#pragma once

#include <cstdint>

#include "core/geometry.h"

namespace pbsattn::cuda {

// Elements of a key, which queries have too, and of a value, which outputs have too.
struct Widths {
  int keys, values;
};
inline constexpr Widths widths[] = {{64, 64}, {128, 128}};  // that kernels are compiled for

inline constexpr int block_tokens = 128;            // the only block size of this backend
inline constexpr std::int64_t max_segment = 8192;   // a segment's scores and order live in shared memory
inline constexpr std::int64_t max_blocks = 49'152;  // a row's scores live in shared memory: 6 M tokens

// Key blocks that may be left out: those of complete segments.
inline std::int64_t permuted_blocks(const Geometry& g) {
  return g.permuted_len() / block_tokens;
}

}  // namespace pbsattn::cuda
