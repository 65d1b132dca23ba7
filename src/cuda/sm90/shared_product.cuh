// Products of two tiles in shared memory by warpgroup instructions (wgmma): scores of keys and queries.
#pragma once

#include <cstdint>

#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace pbsattn::cuda {

constexpr int tile_tokens = 128;  // keys or queries of one tile

// 128 rows of head_dim elements as wgmma wants them: panels of 64 columns, whose 16-byte chunks are swizzled.
template <int head_dim>
struct Tile {
  static constexpr int panel_bytes = tile_tokens * 128;
  static constexpr int bytes = head_dim / 64 * panel_bytes;
  static constexpr int chunks = head_dim / 8;  // of a row

  __device__ static int offset(int row, int chunk) {
    return chunk / 8 * panel_bytes + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
  }
};

// s = 64 rows of tile a (from row `first`) times all 128 rows of tile b, started and committed, not awaited.
template <class T, int head_dim>
__device__ void start_product(float (&s)[64], const unsigned char* a, int first, const unsigned char* b) {
  sm90::start();
  const std::uint64_t rows_a = sm90::operand(a + first * 128);
  const std::uint64_t rows_b = sm90::operand(b);
#pragma unroll
  for (int k16 = 0; k16 < head_dim / 16; ++k16) {
    const int bytes = k16 / 4 * Tile<head_dim>::panel_bytes + k16 % 4 * 32;
    sm90::multiply<T>(s, sm90::advance(rows_a, bytes), sm90::advance(rows_b, bytes), k16 > 0);
  }
  sm90::commit();
}

}  // namespace pbsattn::cuda
