// Copies of rows that lie apart, as the tile that warpgroup products take.
#pragma once

#include "cuda/sm90/copy.cuh"
#include "cuda/sm90/shared_product.cuh"

namespace pbsattn::cuda {

// Starts the copy of 128 rows by all of the thread block's threads: from row(i), in device memory, or zeros where that
// is null.
template <class T, int head_dim, int threads, class Row>
__device__ void gather_tile(unsigned char* tile, const T* anywhere, Row&& row) {
  using Layout = Tile<head_dim>;
  constexpr int rows_at_once = threads / Layout::chunks;
  const int chunk = static_cast<int>(threadIdx.x) % Layout::chunks;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x) / Layout::chunks; i < tile_tokens; i += rows_at_once) {
    const T* const from = row(i);
    copy_async(sm90::shared_address(tile) + Layout::offset(i, chunk), from == nullptr ? anywhere : from + chunk * 8,
               from != nullptr);
  }
}

}  // namespace pbsattn::cuda
