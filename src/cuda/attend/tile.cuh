// What the warps of attend.cu share: parameters, tiles, shared memory and its barriers.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/attend/parts.h"
#include "cuda/attend/softmax.cuh"
#include "cuda/attend/tile_order.h"
#include "cuda/geometry.cuh"
#include "cuda/memory/arrays.h"
#include "cuda/memory/kv_copy.cuh"
#include "cuda/memory/kv_rows.cuh"
#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/panel.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace pbsattn::cuda::attention {

constexpr int block = 128;      // queries of a tile, keys of a block
constexpr int consumers = 2;    // warpgroups
constexpr int tile_slots = 2;   // tiles in flight
constexpr int warpgroup = 128;  // threads
constexpr int threads = (1 + consumers) * warpgroup;
constexpr int consumer_warps = consumers * warpgroup / 32;
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
constexpr int producer_registers = 40;
constexpr int consumer_registers = 232;

struct AttendParams {
  TileOrder order;
  const int* tile_order;  // [place]; null: `order` gives it
  int* next_place;        // counts those beyond each thread block's first; null: there are none
  BlockLists lists;       // null: dense
  RowGrid grid;
  PageTable pages;  // of the caller's keys and values
  bool moved;       // keys before the own segment are permuted ones

  // Rows in parts.
  int places;      // of the order: tiles and further parts
  RowParts parts;  // of the last rows
  float* part_lse;

  float scale;
  float scale_log2;  // scale x log2(e)
  View out;
  float* lse;  // null: not wanted
  std::int64_t lse_batch_stride;
};

// Rank 5: (element of a panel, token, panel, head, batch); of pages (element of a panel, place, panel, head, page).
struct TensorMaps {
  CUtensorMap q, out;
  KvMap k, v;
  CUtensorMap permuted_k, permuted_v;
  CUtensorMap part_out;  // [part][128][head_dim_v] as tokens; read where there are parts
};

// Of a size that is a power of two: at 40 or 48 bytes plain kernels at 256 columns spilled registers.
struct alignas(64) Tile {
  int head;  // query head of its batch entry
  int batch;
  int token;          // of its first query; a multiple of 128, before the first query if a chunk starts inside a block
  int count;          // key blocks, of a row in parts its part's; 0 ends the work
  float sink;         // the logit of one more key of its head, which has no value; -inf: there is none
  std::int64_t list;  // where its list begins in memory
  // Of a row in parts:
  int part;  // from the diagonal block down, which is part 0's, as where a row is whole
  int slot;  // where the part's outputs go; -1: the row is whole
};

// What `load` needs of a tile besides. Worked out by `schedule`, ahead, for divisions would hold up `load`.
struct Source {
  int kv_head, order_head;  // of its batch entry
  int own_begin;            // block from which on keys are the caller's
};

template <class Element>
struct Bits;  // of infinity, which NaN's exceed, and of the largest weight that needs no new maximum; of elements not
              // below 0 they are in order; and of a pair of ones
template <>
struct Bits<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr std::uint32_t infinite = 0x7F80;
  static constexpr std::uint32_t largest_weight = 0x4B80;
  static constexpr std::uint32_t ones = 0x3F803F80;
};
template <>
struct Bits<__half> {
  using Pair = __half2;
  static constexpr std::uint32_t infinite = 0x7C00;
  static constexpr std::uint32_t largest_weight = 0x7400;
  static constexpr std::uint32_t ones = 0x3C003C00;
};

// `pieces`: keys and values may be in pages, rows in parts.
template <class Element_, int head_dim_, int head_dim_v_, int guards_, bool pieces>
struct Shared {
  using Element = Element_;
  static constexpr int head_dim = head_dim_;      // of queries and keys
  static constexpr int head_dim_v = head_dim_v_;  // of values and outputs
  static constexpr int guards = guards_;
  static constexpr bool parts = pieces && takes_parts(head_dim);
  static constexpr bool pages = pieces && (guards == 1 ? takes_pages(head_dim) : takes_pages_of_layers(head_dim));
  // Products take a block's keys all at once, or in two steps where outputs leave room in registers for half the
  // scores.
  static constexpr int step = head_dim_v > 128 ? 64 : block;
  static constexpr int steps = block / step;
  static constexpr int k_stages = head_dim >= 128 ? 2 : head_dim == 96 ? 3 : 4;  // steps in shared memory
  static constexpr int v_stages = k_stages;
  // Wide queries are in shared memory one tile at a time, and outputs go to device memory from registers, so that the
  // next tile's queries needn't wait for them.
  static constexpr bool wide = head_dim > 128;
  static constexpr int q_slots = wide ? 1 : tile_slots;
  static constexpr int panel = panel_of(head_dim);
  // Of narrow panels only half as much is ones, without which two blocks of 192 and 128 columns wouldn't fit.
  static constexpr int panel_v = head_dim > head_dim_v ? 32 : panel;
  static_assert(wide || head_dim == head_dim_v, "outputs take the queries' memory");
  using QTile = Element[head_dim / panel][64][panel];
  using KTile = Element[head_dim / panel][step][panel];
  using VTile = Element[head_dim_v / panel_v][step][panel_v];
  // V and behind it ones, so that P V has the sums of P in its last 8 columns. Panels are equally far apart, so ones
  // have a whole one, of which products read 16 bytes a row; the copy engine never writes there, so once set they stay.
  struct VStage {
    VTile tile;
    Element ones[step][panel_v];
  };

  alignas(1024) QTile q[q_slots][consumers];  // then the outputs, if not wide
  alignas(1024) KTile k[k_stages];
  alignas(1024) VStage v[v_stages];
  Tile tile[tile_slots];
  int any_bad[tile_slots];
  int first_bad[tile_slots][head_dim_v];  // of plain layers, if any_bad: first key of the diagonal block whose V is not
                                          // finite, or 128
  sm90::Barrier tile_full[tile_slots], tile_free[tile_slots];
  sm90::Barrier v_asked[tile_slots][guards], guarded[tile_slots][guards];
  sm90::Barrier q_full[q_slots][consumers], q_free[q_slots][consumers], out_full[q_slots][consumers];
  sm90::Barrier k_full[k_stages], k_free[k_stages], v_full[v_stages], v_free[v_stages];
  Source source[tile_slots];

  // To be called by one thread, with the thread block's first tile.
  __device__ void init_tiles(const Tile& first, const Source& of) {
    for (sm90::Barrier& barrier : tile_full) barrier.init(1);
    tile[0] = first;
    source[0] = of;
    tile_full[0].arrive();
  }
  // To be called by one thread; the rest.
  __device__ void init_barriers() {
    for (int slot = 0; slot < tile_slots; ++slot) {
      tile_free[slot].init(32 * (consumer_warps + (wide ? 2 : 3)));  // and load, guard, and store
      for (sm90::Barrier& barrier : v_asked[slot]) barrier.init(1);
      for (sm90::Barrier& barrier : guarded[slot]) barrier.init(32);
      for (int wg = 0; wg < consumers && slot < q_slots; ++wg) {
        q_full[slot][wg].init(1);
        q_free[slot][wg].init(wide ? warpgroup / 32 : 32);
        out_full[slot][wg].init(warpgroup);
      }
    }
    for (sm90::Barrier& barrier : k_full) barrier.init(1);
    for (sm90::Barrier& barrier : v_full) barrier.init(1);
    for (sm90::Barrier& barrier : k_free) barrier.init(consumer_warps);
    for (sm90::Barrier& barrier : v_free) barrier.init(consumer_warps);
    sm90::fence_barrier_init();
  }
  // To be called by all threads.
  __device__ void init_ones() {
    constexpr std::uint32_t ones = Bits<Element>::ones;
    for (int i = static_cast<int>(threadIdx.x); i < v_stages * step; i += threads) {
      const int row = i % step;
      auto* const eight = &v[i / step].ones[row][swizzled<panel_v>(0, row) * 8];
      *reinterpret_cast<uint4*>(eight) = make_uint4(ones, ones, ones, ones);
    }
    sm90::fence_async_shared();
  }
  // Returns where the queries of the tile in a slot are, and their barriers' parity.
  __device__ static Ring<q_slots> queries_of(const Ring<tile_slots>& slot) {
    if constexpr (wide)
      return {.at = 0, .parity = slot.at};  // which changes with each tile, too
    else
      return {.at = slot.at, .parity = slot.parity};
  }
};

// Returns the tile in a slot once it is there; the last one has no blocks.
template <class Shared>
__device__ Tile next_tile(Shared& shared, const Ring<tile_slots>& slot) {
  shared.tile_full[slot.at].wait(slot.parity);
  return shared.tile[slot.at];
}

// Calls each(tile, slot) for the tiles of this thread block, then frees the tile's slot.
template <class Shared, class Each>
__device__ void for_each_tile(Shared& shared, Each&& each) {
  for (Ring<tile_slots> slot;; slot.next()) {
    const Tile tile = next_tile(shared, slot);
    if (tile.count == 0) return;
    each(tile, slot);
    shared.tile_free[slot.at].arrive();
  }
}

}  // namespace pbsattn::cuda::attention
