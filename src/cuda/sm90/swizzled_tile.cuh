// Tiles in shared memory as warpgroup products (wgmma) take them: their layout, copies into them, and products of two.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/sm90/copy.cuh"
#include "cuda/sm90/panel.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace pbsattn::cuda {

constexpr int tile_tokens = 128;  // keys or queries of one tile

// 128 rows of head_dim elements as wgmma wants them: panels of columns, whose 16-byte chunks are swizzled.
template <int head_dim>
struct SwizzledTile {
  static constexpr int panel = panel_of(head_dim);
  static constexpr int row_bytes = panel * 2;
  static constexpr int panel_bytes = tile_tokens * row_bytes;
  static constexpr int bytes = head_dim / panel * panel_bytes;
  static constexpr int chunks = head_dim / 8;                                   // of a row
  static constexpr int threads = std::bit_ceil(static_cast<unsigned>(chunks));  // that share a row: one each, or none

  __device__ static int offset(int row, int chunk) {
    constexpr int of_panel = panel / 8;
    return chunk / of_panel * panel_bytes + row * row_bytes + swizzled<panel>(chunk % of_panel, row) * 16;
  }
};

// Starts the copy of `rows` rows that lie `stride` elements apart; the tile's other rows become zero.
template <class T, int head_dim, int threads>
__device__ void load_tile(unsigned char* tile, const T* from, std::int64_t stride, int rows, int thread) {
  using Swizzled = SwizzledTile<head_dim>;
  constexpr int rows_at_once = threads / Swizzled::threads;
  static_assert(rows_at_once % 8 == 0, "swizzling repeats every 8 rows");
  const int first_row = thread / Swizzled::threads;
  const int chunk = thread % Swizzled::threads;
  if (chunk >= Swizzled::chunks) return;
  const std::uint32_t to = sm90::shared_address(tile) + Swizzled::offset(first_row, chunk);
  const T* row = from + first_row * stride + chunk * 8;
#pragma unroll 1  // unrolled, it would keep every row's address in registers
  for (int i = 0; i < tile_tokens / rows_at_once; ++i) {
    const bool present = first_row + i * rows_at_once < rows;
    copy_async(to + i * rows_at_once * Swizzled::row_bytes, present ? row : from, present);
    row += rows_at_once * stride;
  }
}

// Starts the copy of 128 rows that lie anywhere by all of the thread block's threads: from row(i), in device memory, or
// zeros where that is null.
template <class T, int head_dim, int threads, class Row>
__device__ void gather_tile(unsigned char* tile, const T* anywhere, Row&& row) {
  using Swizzled = SwizzledTile<head_dim>;
  constexpr int rows_at_once = threads / Swizzled::threads;
  const int chunk = static_cast<int>(threadIdx.x) % Swizzled::threads;
  if (chunk >= Swizzled::chunks) return;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x) / Swizzled::threads; i < tile_tokens; i += rows_at_once) {
    const T* const from = row(i);
    copy_async(sm90::shared_address(tile) + Swizzled::offset(i, chunk), from == nullptr ? anywhere : from + chunk * 8,
               from != nullptr);
  }
}

// Starts s = 64 rows of tile a (from row `first`) times all 128 rows of tile b, and commits it without waiting.
template <class T, int head_dim>
__device__ void start_product(float (&s)[64], const unsigned char* a, int first, const unsigned char* b) {
  using Swizzled = SwizzledTile<head_dim>;
  constexpr int panel = Swizzled::panel;
  sm90::wgmma_fence();
  const std::uint64_t rows_a = sm90::operand<panel>(a + first * Swizzled::row_bytes);
  const std::uint64_t rows_b = sm90::operand<panel>(b);
#pragma unroll
  for (int k16 = 0; k16 < head_dim / 16; ++k16) {
    const int bytes = k16 / (panel / 16) * Swizzled::panel_bytes + k16 % (panel / 16) * 32;
    sm90::wgmma<T>(s, sm90::advance(rows_a, bytes), sm90::advance(rows_b, bytes), k16 > 0);
  }
  sm90::wgmma_commit();
}

}  // namespace pbsattn::cuda
