// The producer's four warps; attend.cu has the whole picture.
#pragma once

#include "cuda/attend/layer.cuh"
#include "cuda/attend/tile.cuh"
#include "cuda/sm90/launch.h"

namespace pbsattn::cuda::attention {

// Returns the tile at a place of the order; without blocks where there is none.
template <class Shared, class Layer>
__device__ Tile tile_at(const AttendParams& p, const Layer& layer, int place) {
  Tile tile{};
  if (place >= p.places) return tile;
  const int entry = p.tile_order != nullptr ? p.tile_order[place] : p.order.tile(place);
  const int index = Shared::parts ? entry % p.order.tiles() : entry;
  const int head = index / p.order.rows;
  const int row = index % p.order.rows;
  const int diagonal = p.grid.diagonal(row);
  tile.head = head % p.grid.q_heads;
  tile.batch = head / p.grid.q_heads;
  tile.token = diagonal * block;
  tile.count = p.lists.row_start != nullptr ? p.lists.row_count[index] : layer.blocks(p.grid, diagonal);
  tile.list = p.lists.row_start != nullptr ? p.lists.row_start[index] : 0;
  if constexpr (!Layer::plain) tile.sink = layer.sink(tile.head);
  if constexpr (!Shared::parts) return tile;
  tile.slot = -1;
  if (const int cut_row = row - (p.order.rows - p.parts.rows); cut_row >= 0) {
    const int each = p.parts.each;
    tile.part = entry / p.order.tiles();
    tile.slot = (head * p.parts.rows + cut_row) * each + tile.part;
    // From the list's end. Never empty, which would end the work: such a row lists a block for each part at least.
    const int begin = tile.count * tile.part / each;
    const int end = tile.count * (tile.part + 1) / each;
    tile.list += tile.count - end;
    tile.count = end - begin;
    if (tile.part > 0) tile.sink = -infinity;
  }
  return tile;
}

__device__ inline Source source_of(const AttendParams& p, const Tile& tile) {
  return {.kv_head = p.grid.kv_head(tile.head),
          .order_head = p.grid.order_head(tile.head),
          .own_begin = p.moved ? p.grid.own_begin(tile.token / block) : 0};
}

// Brings the tiles after the thread block's first one; there are as many places as thread blocks, or more.
template <class Layer, class Shared>
__device__ void schedule(const AttendParams& p, const Layer& layer, Shared& shared) {
  const int grid = static_cast<int>(gridDim.x);
  const int own = static_cast<int>(blockIdx.x);
  Ring<tile_slots> slot;
  for (int turn = 1;; ++turn) {
    Tile tile;
    slot.next();
    if (p.next_place == nullptr) {  // there and back: whose row was the longest has the shortest then
      tile = tile_at<Shared>(p, layer, grid * turn + (turn % 2 == 0 ? own : grid - 1 - own));
    } else {
      wait_for_earlier_kernels();  // they set the counter to zero
      tile = tile_at<Shared>(p, layer, grid + atomicAdd(p.next_place, 1));
    }
    const Source source = source_of(p, tile);
    shared.tile_free[slot.at].wait(slot.parity ^ 1);
    shared.tile[slot.at] = tile;
    shared.source[slot.at] = source;
    shared.tile_full[slot.at].arrive();
    if (tile.count == 0) return;
  }
}

template <class Layer, class Shared>
__device__ void load(const AttendParams& p, const TensorMaps& maps, const Layer& layer, Shared& shared, int lane) {
  if (p.next_place == nullptr) wait_for_earlier_kernels();  // else reset_places or the scheduler did
  Ring<Shared::k_stages> k;
  Ring<Shared::v_stages> v;
  const PagedCopy<Shared::step> pages(p.pages, lane);
  // Loads a part of block b from the caller's keys or values, or from permuted ones where those aren't null.
  const auto load_part = [&]<int panels, int panel>(auto& stage,
                                                    typename Shared::Element(&tile)[panels][Shared::step][panel],
                                                    sm90::Barrier* full, sm90::Barrier* free, const KvMap& map,
                                                    const CUtensorMap* permuted, int b, int part, int head, int batch) {
    const bool from_pages = Shared::pages && permuted == nullptr && p.pages.entries != nullptr;
    const int page = from_pages ? pages.page(batch, b) : 0;  // comes while the warp waits
    free[stage.at].wait(stage.parity ^ 1);
    if (lane == 0) full[stage.at].arrive_expecting(sizeof(tile));
    if (from_pages)
      pages.template start<panels, panel>(tile, map, full[stage.at], b, part, head, page);
    else if (lane == 0)
      sm90::tma_load(tile, permuted == nullptr ? map.map : *permuted, full[stage.at], 0,
                     b * block + part * Shared::step, 0, head, batch);
    stage.next();
  };

  for_each_tile(shared, [&](const Tile& tile, Ring<tile_slots> slot) {
    const Source copy = shared.source[slot.at];
    const Source& at = Shared::wide ? shared.source[slot.at] : copy;
    const auto load_k = [&](int b, int part) {
      const bool own = b >= at.own_begin;
      load_part(k, shared.k[k.at], shared.k_full, shared.k_free, maps.k, own ? nullptr : &maps.permuted_k, b, part,
                own ? at.kv_head : at.order_head, tile.batch);
    };
    const auto load_v = [&](int b, int part) {
      const bool own = b >= at.own_begin;
      load_part(v, shared.v[v.at].tile, shared.v_full, shared.v_free, maps.v, own ? nullptr : &maps.permuted_v, b, part,
                own ? at.kv_head : at.order_head, tile.batch);
    };
    // Entry i of the list from its end; each lane holds one of 32.
    const auto entries = [&](int i) {
      const Tile& again = shared.tile[slot.at];  // which holds no registers
      if (i >= again.count) return 0;
      return p.lists.row_start != nullptr ? __ldg(p.lists.block + again.list + again.count - 1 - i)
                                          : again.token / block - i;
    };
    int now = entries(lane);
    int then = entries(32 + lane);

    const auto load_queries = [&] {
      const Ring<Shared::q_slots> q = Shared::queries_of(slot);
      for (int wg = 0; wg < consumers; ++wg) {
        shared.q_free[q.at][wg].wait(q.parity ^ 1);
        if (lane == 0) {
          shared.q_full[q.at][wg].arrive_expecting(sizeof(shared.q[0][0]));
          sm90::tma_load(shared.q[q.at][wg], maps.q, shared.q_full[q.at][wg], 0, tile.token + wg * 64 - p.grid.q_offset,
                         0, tile.head, tile.batch);
        }
      }
    };
    if constexpr (!Shared::wide) load_queries();
    // Tells a guard that V is on its way.
    const auto announce_v = [&](int guard) {
      if (lane == 0) shared.v_asked[slot.at][guard].arrive();
    };
    constexpr int last_part = Shared::steps - 1;
    int before = 0;
    for (int i = 0; i < tile.count; ++i) {
      const int b = __shfl_sync(0xFFFFFFFF, now, i % 32);
      load_k(b, 0);
      if (Shared::wide && i == 0) load_queries();  // the place is free later than one of keys
      if (i > 0) load_v(before, last_part);
      if (i == 1) announce_v(0);
#pragma unroll
      for (int guard = 1; guard < Layer::guards; ++guard)
        if (i == layer.guarded_place(guard) + 1) announce_v(guard);
      if constexpr (last_part > 0) {
        load_k(b, last_part);
        load_v(b, 0);
      }
      before = b;
      if (i % 32 == 31) {
        now = then;
        then = entries(i + 33 + lane);
      }
    }
    load_v(before, last_part);
    if (tile.count == 1) announce_v(0);
#pragma unroll
    for (int guard = 1; guard < Layer::guards; ++guard)  // and of places beyond the list, of which none will come
      if (tile.count <= layer.guarded_place(guard) + 1) announce_v(guard);
  });
}

// A masked query's P is zero, but zero times NaN or infinity is not. Finds such values in V of the blocks that some
// query doesn't see whole, puts zeros in their place and notes, where that is the diagonal block alone, from which key
// on, that is from which query on, an output is spoilt.
template <class Layer, class Shared>
__device__ void guard(const Layer& layer, Shared& shared, int lane) {
  using Pair = typename Bits<typename Shared::Element>::Pair;
  constexpr std::uint32_t exponent = Bits<typename Shared::Element>::infinite;
  constexpr int panel = Shared::panel_v;
  constexpr int steps = Shared::steps;
  // Each lane looks after so many pairs of columns; the last ones may have none.
  constexpr int words = Shared::head_dim_v <= 64 ? 1 : Shared::head_dim_v <= 128 ? 2 : 4;
  struct alignas(4 * words) Slice {
    std::uint32_t word[words];
  };
  constexpr int lanes = Shared::head_dim_v / (2 * words);
  const bool present = lanes == 32 || lane < lanes;
  const int column = present ? lane * 2 * words : 0;
  Ring<Shared::v_stages> v;
  for_each_tile(shared, [&](const Tile& tile, Ring<tile_slots> slot) {
    Ring<Shared::v_stages> last;  // of the steps of the block at v
    const auto slice = [&](int key) -> Slice& {
      const int row = key % Shared::step;
      auto* line = shared.v[key < Shared::step ? v.at : last.at].tile[column / panel][row];
      return *reinterpret_cast<Slice*>(line + swizzled<panel>(column % panel / 8, row) * 8 + column % 8);
    };
    // Puts zeros in place of bad values; returns whether there are any.
    const auto clean = [&] {
      Pair product[words] = {};  // with zero: NaN if any value is not finite
#pragma unroll(Layer::plain ? 16 : 8)
      for (int row = 0; row < block; ++row) {
        const Slice values = slice(row);
#pragma unroll
        for (int w = 0; w < words; ++w) {
          product[w] = __hfma2(reinterpret_cast<const Pair&>(values.word[w]), Pair{}, product[w]);
        }
      }
      bool bad = false;
#pragma unroll
      for (int w = 0; w < words; ++w) bad = bad || __hisnan(product[w].x) || __hisnan(product[w].y);
      const bool any_bad = __any_sync(0xFFFFFFFF, bad);
      if (any_bad) {
        for (int w = 0; w < words && present; ++w) {
          int first[2] = {block, block};
          for (int row = block - 1; row >= 0; --row) {
            std::uint32_t& bits = slice(row).word[w];
            for (int c = 0; c < 2; ++c) {
              if ((bits >> 16 * c & exponent) != exponent) continue;
              first[c] = row;
              bits &= c == 0 ? 0xFFFF0000 : 0x0000FFFF;
            }
          }
          if constexpr (Layer::plain)
            for (int c = 0; c < 2; ++c) shared.first_bad[slot.at][column + 2 * w + c] = first[c];
        }
        sm90::fence_async_shared();
      }
      return any_bad;
    };
    bool any_bad = false;
    int place = 0;
    const auto look = [&](int guard) {
      // Only once the copy is under way: until then v_full counts copies of the tile before, and a phase of theirs may
      // have this parity.
      shared.v_asked[slot.at][guard].wait(slot.parity);
      if (const int at = layer.guarded_place(guard); guard == 0 || at < tile.count) {
        if (guard > 0) v.next((at - place) * steps);
        place = at;
        last = v;
        last.next(steps - 1);
        shared.v_full[v.at].wait(v.parity);
        if constexpr (steps > 1) shared.v_full[last.at].wait(last.parity);
        any_bad = ((!Shared::parts || tile.part == 0) && clean()) || any_bad;  // of other parts every query sees all
      }
      if (lane == 0) shared.any_bad[slot.at] = any_bad;
      shared.guarded[slot.at][guard].arrive();
    };
    if constexpr (Layer::plain) {
      look(0);
    } else {
#pragma unroll 1  // unrolled, it would need more registers than the producer has
      for (int guard = 0; guard < Layer::guards; ++guard) look(guard);
    }
    v.next((tile.count - place) * steps);
  });
}

// Stores the short first row of a chunk by hand, since the copy engine takes no negative coordinate in a store.
template <class Shared>
__device__ void store_short_row(const AttendParams& p, const typename Shared::QTile& tile, const Tile& at, int query,
                                int lane) {
  using Element = typename Shared::Element;
  constexpr int chunks = Shared::head_dim_v / 8;  // of 16 bytes in a row
  constexpr int of_panel = Shared::panel / 8;
  auto* out = static_cast<Element*>(p.out.data) + at.batch * p.out.batch_stride + at.head * p.out.head_stride;
  for (int i = lane; i < 64 * chunks; i += 32) {
    const int row = i / chunks;
    const int chunk = i % chunks;
    if (query + row < 0 || query + row >= p.grid.q_len) continue;
    const Element* from = tile[chunk / of_panel][row] + swizzled<Shared::panel>(chunk % of_panel, row) * 8;
    Element* to = out + (query + row) * p.out.token_stride + chunk * 8;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  }
}

template <class Shared>
__device__ void store(const AttendParams& p, const TensorMaps& maps, Shared& shared, int lane) {
  if constexpr (Shared::wide) return;  // consumers write
  for_each_tile(shared, [&](const Tile& tile, Ring<tile_slots> slot) {
    for (int wg = 0; wg < consumers; ++wg) {
      shared.out_full[slot.at][wg].wait(slot.parity);
      const int query = tile.token + wg * 64 - p.grid.q_offset;
      if (Shared::parts && tile.slot >= 0) {
        if (lane == 0) sm90::tma_store(maps.part_out, shared.q[slot.at][wg], 0, tile.slot * block + wg * 64, 0, 0, 0);
      } else if (query < 0) {
        store_short_row<Shared>(p, shared.q[slot.at][wg], tile, query, lane);
      } else if (lane == 0) {
        sm90::tma_store(maps.out, shared.q[slot.at][wg], 0, query, 0, tile.head, tile.batch);
      }
    }
    if (lane == 0) sm90::tma_store_wait_read();
    __syncwarp();
    for (int wg = 0; wg < consumers; ++wg) shared.q_free[slot.at][wg].arrive();
  });
}

}  // namespace pbsattn::cuda::attention
