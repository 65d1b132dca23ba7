// Means of blocks of tokens, a warp for each block: every lane adds 8 columns of each row, or of every second or
// fourth.
#pragma once

#include "cuda/limits.h"
#include "cuda/memory/kv_rows.cuh"
#include "cuda/sm90/copy.cuh"
#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/swizzled_tile.cuh"
#include "pbsattn/pbsattn.hpp"

namespace pbsattn::cuda {

// One tensor's rows to be pooled: block `row` of a head holds tokens [first + row * 128, + 128) cut to [0, tokens).
struct PoolArgs {
  ConstView view;
  PageTable pages = {};  // of keys or values
  std::int64_t heads, rows;
  std::int64_t first, tokens;  // first <= 0: where a head's first block begins, relative to its first token
  bool divide_by_count;        // by the tokens present, else by 128
  std::int64_t skipped = 0;    // of each head the first rows, which are pooled elsewhere
  void* out;                   // [batch][heads][out_rows][width]
  std::int64_t out_rows;       // at least `rows`
};

template <int width>
constexpr int pool_copies = width > 192 ? 8 : 16;  // of a lane, in one stage
constexpr int pool_stages = 2;                     // under way at a time
template <int width>
constexpr int pool_stage_bytes = pool_stages* pool_copies<width> * 512;  // of a warp, all its stages

// Pools items warp, warp + warps, ... of [batch][heads][rows]. Copies go through shared memory, so that bytes under way
// cost no registers; a lane reads only what it copied itself, so warps need no barrier.
template <class T, int width, bool may_be_paged>
__device__ void pool_rows_staged(const PoolArgs& args, std::int64_t batch, int warp, int warps, unsigned char* stages) {
  constexpr int copies = pool_copies<width>;
  constexpr int chunks = SwizzledTile<width>::chunks;
  constexpr int lanes = SwizzledTile<width>::threads;              // of one token
  constexpr int tokens_at_once = 32 / lanes;                       // of one load of the warp
  constexpr int parts = block_tokens / (copies * tokens_at_once);  // stages of one item
  const int lane = threadIdx.x % 32;
  const std::uint64_t policy = evict_first();
  const std::uint32_t to = sm90::shared_address(stages) + lane * 16;
  const int skipped = static_cast<int>(args.skipped);
  const int rows = static_cast<int>(args.rows) - skipped;
  const int heads = static_cast<int>(args.heads);
  const int items = static_cast<int>(batch) * heads * rows;

  const auto row_of = [&](int item) { return skipped + item % rows; };
  const auto begin_of = [&](int item) { return max(args.first + row_of(item) * block_tokens, std::int64_t{0}); };
  const auto count_of = [&](int item) {
    return static_cast<int>(min(args.first + (row_of(item) + 1) * block_tokens, args.tokens) - begin_of(item));
  };
  const auto copy = [&](int step) {
    const int item = warp + step / parts * warps;
    if (item < items) {
      const int first = step % parts * copies * tokens_at_once + lane / lanes;
      const int count = count_of(item);
      const auto has = [&](int i) {
        return first + i * tokens_at_once < count && (chunks == lanes || lane % lanes < chunks);
      };
      const std::uint32_t stage = to + step % pool_stages * copies * 512;
      const Rows<T> of_head(args.view, args.pages, item / rows / heads, item / rows % heads);
      const int begin = static_cast<int>(begin_of(item)) + first;
      const T* source = of_head.contiguous(begin) + lane % lanes * 8;
      if (may_be_paged && of_head.paged()) {
#pragma unroll 4
        for (int i = 0; i < copies; ++i) {
          if (has(i)) source = of_head.in_pages(begin + i * tokens_at_once) + lane % lanes * 8;
          copy_async(stage + i * 512, source, has(i), policy);
        }
      } else {
#pragma unroll 4
        for (int i = 0; i < copies; ++i) {
          copy_async(stage + i * 512, has(i) ? source : args.view.data, has(i), policy);
          source += tokens_at_once * args.view.token_stride;
        }
      }
    }
    commit_copies();
  };

  copy(0);
  float sum[8] = {};
  for (int step = 0; warp + step / parts * warps < items; ++step) {
    copy(step + 1);
    wait_copies<1>();
#pragma unroll 4
    for (int i = 0; i < copies; ++i)
      add_to<T>(sum, *reinterpret_cast<const uint4*>(stages + (step % pool_stages * copies + i) * 512 + lane * 16));
    if (step % parts < parts - 1) continue;

    const int item = warp + step / parts * warps;
    add_across_lanes<lanes>(sum);
    if (lane < chunks) {
      const float divisor = static_cast<float>(args.divide_by_count ? count_of(item) : block_tokens);
      uint4 mean;
      mean.x = pack<T>(sum[0] / divisor, sum[1] / divisor);
      mean.y = pack<T>(sum[2] / divisor, sum[3] / divisor);
      mean.z = pack<T>(sum[4] / divisor, sum[5] / divisor);
      mean.w = pack<T>(sum[6] / divisor, sum[7] / divisor);
      const std::int64_t to_row = item / rows * args.out_rows + row_of(item);
      reinterpret_cast<uint4*>(static_cast<T*>(args.out) + to_row * width)[lane] = mean;
    }
#pragma unroll
    for (float& x : sum) x = 0;
  }
}

}  // namespace pbsattn::cuda
