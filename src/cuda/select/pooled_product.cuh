// Products of the means of blocks: up to 16 rows of queries with all keys that they may see.
#pragma once

#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/mma.cuh"

namespace pbsattn::cuda {

constexpr int pooled_rows = 16;  // of a product

// Means of one head, [count][head_dim].
template <class T>
struct Means {
  const T* data;
  std::int64_t count;
};

// Returns `count` of a head's means from the `first` on; `means` are [head][of_head][head_dim].
template <class T, int head_dim>
__device__ Means<T> means_of(const void* means, int head, std::int64_t of_head, std::int64_t first,
                             std::int64_t count) {
  return {static_cast<const T*>(means) + (head * of_head + first) * head_dim, count};
}

// Calls use(row, block, products[2]) for blocks from `begin` (rounded down to a multiple of 8) to `end` (rounded up),
// two at a time, and each of the 16 rows: products of query `row` with keys `block` and `block` + 1; zeros where there
// are none. Only those 16-byte chunks of a mean that counts(chunk) names are multiplied, or, of two units a chunk,
// those halves of chunks. The thread block's warps share the keys. Lane 4 g + t of a warp holds for rows g and g + 8 of
// Q and for row g of K the chunks t, t + 4, ...: any order of the sum does, if Q and K agree on it.
template <int head_dim, int units = 1, class T, class Counts, class Use>
__device__ void multiply_pooled(Means<T> queries, Means<T> keys, int begin, int end, Counts&& counts, Use&& use) {
  constexpr int chunks = head_dim / 32;  // of a lane
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const auto load_row = [&](uint4(&to)[chunks], const Means<T>& means, std::int64_t index) {
    const bool present = index < means.count;
    const uint4* from = reinterpret_cast<const uint4*>(means.data + (present ? index : 0) * head_dim) + t;
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      const auto load = [&](bool taken) { to[i] = taken ? __ldg(from + 4 * i) : make_uint4(0, 0, 0, 0); };
      if constexpr (units == 1) {
        load(present && counts(t + 4 * i));
      } else {
        const bool low = counts((t + 4 * i) * 2);
        const bool high = counts((t + 4 * i) * 2 + 1);
        load(present && (low || high));
        if (!low) to[i].x = to[i].y = 0;
        if (!high) to[i].z = to[i].w = 0;
      }
    }
  };
  uint4 q_low[chunks], q_high[chunks];
  load_row(q_low, queries, g);
  load_row(q_high, queries, g + 8);
  for (int n8 = begin / 8 + warp; n8 * 8 < end; n8 += warps) {
    uint4 k[chunks];
    load_row(k, keys, n8 * 8 + g);
    float d[4] = {};
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      mma<T>(d, q_low[i].x, q_high[i].x, q_low[i].y, q_high[i].y, k[i].x, k[i].y);
      mma<T>(d, q_low[i].z, q_high[i].z, q_low[i].w, q_high[i].w, k[i].z, k[i].w);
    }
    use(g, n8 * 8 + 2 * t, make_float2(d[0], d[1]));
    use(g + 8, n8 * 8 + 2 * t, make_float2(d[2], d[3]));
  }
}

}  // namespace pbsattn::cuda
