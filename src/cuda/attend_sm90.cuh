// Block-sparse attention forward for one tile of 128 queries at a time, on Hopper (sm_90a).
//
//     for each tile (batch, query head, row):   for each key block in its list, diagonal first, then descending:
//         S = Q K^T    P = exp2(scale (S - m))    O = O + P V          (m: running row maximum, O rescaled when it
//         moves)
//     out = O / sum(P)    lse = scale m + log(sum(P))
//
// A thread block has three warpgroups and stays resident, taking tiles until none is left:
//   - two *consumers* of 64 queries each, with Q in registers. Each overlaps its softmax with its own P V of the block
//     before, and the two drift apart by themselves, so that one multiplies while the other exponentiates;
//   - one *producer*, of four warps with a role each: `schedule` takes tiles from a counter, `load` brings Q, K and V
//     into shared memory, `guard` looks for values on the diagonal that masked queries must not see, `store` takes
//     finished outputs away.
//
// Barriers, all in shared memory ("full": producer to consumer, "free": back):
//     tile_full/free [slot]      tile descriptions, two in flight
//     q_full/free    [slot][wg]  64 queries; the same memory then carries the 64 outputs, hence:
//     out_full       [slot][wg]  outputs are written (store waits, then frees q)
//     k_full/free, v_full/free [stage]  one key block's K or V
//     guarded        [slot]      the diagonal block's V is safe to multiply
#pragma once

#include <limits>

#include "cuda/sm90_ptx.cuh"
#include "cuda/sm90_wgmma.cuh"

namespace pbsattn::cuda::sm90 {

constexpr int block = 128;      // queries of a tile, keys of a block
constexpr int consumers = 2;    // warpgroups
constexpr int tile_slots = 2;   // tiles in flight
constexpr int panel = 64;       // elements of a 128-byte swizzled row
constexpr int warpgroup = 128;  // threads
constexpr int threads = (1 + consumers) * warpgroup;
constexpr int consumer_warps = consumers * warpgroup / 32;
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
// The reference maximum of a row may lag behind the true one by so many powers of two before sums are rescaled.
constexpr float rescale_slack = 8;
constexpr int producer_registers = 40;
constexpr int consumer_registers = 232;

// The order in which tiles are taken, when no array gives it: heads in sections whose K and V fit L2 together; in a
// section long rows first, and the section's heads side by side.
struct TileOrder {
  int rows = 0;
  int heads = 0;  // batch x query heads
  int section_heads = 0;

  __host__ __device__ int tiles() const { return rows * heads; }
  __host__ __device__ int tile(int place) const {
    const int section = place / (section_heads * rows);
    const int rest = place - section * section_heads * rows;
    const int first = section * section_heads;
    const int width = first + section_heads <= heads ? section_heads : heads - first;
    return (first + rest % width) * rows + rows - 1 - rest / width;
  }
};

struct AttendParams {
  TileOrder order;
  const int* tile_order;  // [place]; null: `order` gives it
  int* next_place;
  const std::int64_t* row_start;  // null: dense
  const std::int32_t* row_count;
  const std::int32_t* list;

  int q_heads;
  int heads_per_kv;        // query heads that share a head of the caller's K and V
  int heads_per_permuted;  // and of the permuted K and V
  int blocks_per_segment;  // 0: nothing is permuted
  int first_row;
  int q_offset;
  int q_len;

  float scale;
  float scale_log2;  // scale x log2(e)
  void* out;
  std::int64_t out_batch_stride, out_head_stride, out_token_stride;  // elements
  float* lse;                                                        // null: not wanted
  std::int64_t lse_batch_stride;
};

// Rank 5: (element of a panel, token, panel, head, batch).
struct TensorMaps {
  CUtensorMap q, k, v, k_permuted, v_permuted, out;
};

struct Tile {
  int head;  // query head
  int batch;
  int token;          // of its first query; a multiple of 128, before the first query if a chunk starts inside a block
  int count;          // key blocks; 0 ends the work
  std::int64_t list;  // place of its list
};

template <class Element>
struct Finite;  // how to tell NaN and infinity in packed pairs
template <>
struct Finite<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr std::uint32_t exponent = 0x7F80;
};
template <>
struct Finite<__half> {
  using Pair = __half2;
  static constexpr std::uint32_t exponent = 0x7C00;
};

template <class Element_, int head_dim_>
struct Shared {
  using Element = Element_;
  static constexpr int head_dim = head_dim_;
  static constexpr int panels = head_dim / panel;
  static constexpr int k_stages = head_dim == 128 ? 2 : 4;
  static constexpr int v_stages = head_dim == 128 ? 2 : 4;
  using QTile = Element[panels][64][panel];
  using KVTile = Element[panels][block][panel];

  alignas(1024) QTile q[tile_slots][consumers];  // then the outputs
  alignas(1024) KVTile k[k_stages];
  alignas(1024) KVTile v[v_stages];
  Tile tile[tile_slots];
  int any_bad[tile_slots];
  int first_bad[tile_slots][head_dim];  // if any_bad: first key of the diagonal block whose V is not finite, or 128
  Barrier tile_full[tile_slots], tile_free[tile_slots], guarded[tile_slots];
  Barrier q_full[tile_slots][consumers], q_free[tile_slots][consumers], out_full[tile_slots][consumers];
  Barrier k_full[k_stages], k_free[k_stages], v_full[v_stages], v_free[v_stages];

  __device__ void init() {
    for (int slot = 0; slot < tile_slots; ++slot) {
      tile_full[slot].init(1);
      tile_free[slot].init(consumer_warps + 3);  // load, store and guard
      guarded[slot].init(1);
      for (int wg = 0; wg < consumers; ++wg) {
        q_full[slot][wg].init(1);
        q_free[slot][wg].init(1);
        out_full[slot][wg].init(consumer_warps / consumers);
      }
    }
    for (Barrier& barrier : k_full) barrier.init(1);
    for (Barrier& barrier : v_full) barrier.init(1);
    for (Barrier& barrier : k_free) barrier.init(consumer_warps);
    for (Barrier& barrier : v_free) barrier.init(consumer_warps);
    fence_barrier_init();
  }
};

// A place in a ring of n, and the parity of its turn.
template <int n>
struct Ring {
  unsigned at = 0;
  std::uint32_t parity = 0;

  __device__ void next(unsigned steps = 1) {
    at += steps;
    parity ^= at / n & 1;
    at %= n;
  }
};

// ------------------------------------------------------------------------------------------------------- producer

template <class Shared>
__device__ void schedule(const AttendParams& p, Shared& shared) {
  Ring<tile_slots> slot;
  for (bool more = true; more; slot.next()) {
    Tile tile{};
    const int place = atomicAdd(p.next_place, 1);
    more = place < p.order.tiles();
    if (more) {
      const int index = p.tile_order != nullptr ? p.tile_order[place] : p.order.tile(place);
      const int head = index / p.order.rows;
      const int row = p.first_row + index % p.order.rows;
      tile.head = head % p.q_heads;
      tile.batch = head / p.q_heads;
      tile.token = row * block;
      tile.count = p.row_start != nullptr ? p.row_count[index] : row + 1;
      tile.list = p.row_start != nullptr ? p.row_start[index] : 0;
    }
    shared.tile_free[slot.at].wait(slot.parity ^ 1);
    shared.tile[slot.at] = tile;
    shared.tile_full[slot.at].arrive();
  }
}

// Calls each(tile, slot) for the tiles of this thread block, then frees the tile's slot once a warp.
template <class Shared, class Each>
__device__ void for_each_tile(Shared& shared, int lane, Each&& each) {
  for (Ring<tile_slots> slot;; slot.next()) {
    shared.tile_full[slot.at].wait(slot.parity);
    const Tile tile = shared.tile[slot.at];
    if (tile.count == 0) return;
    each(tile, slot);
    __syncwarp();
    if (lane == 0) shared.tile_free[slot.at].arrive();
  }
}

template <class Shared>
__device__ void load(const AttendParams& p, const TensorMaps& maps, Shared& shared, int lane) {
  Ring<Shared::k_stages> k;
  Ring<Shared::v_stages> v;
  const auto load_block = [&](auto& stage, auto& tiles, Barrier* full, Barrier* free, const CUtensorMap& map, int token,
                              int head, int batch) {
    free[stage.at].wait(stage.parity ^ 1);
    if (lane == 0) {
      full[stage.at].arrive_expecting(sizeof(tiles[0]));
      tma_load(tiles[stage.at], map, full[stage.at], 0, token, 0, head, batch);
    }
    stage.next();
  };

  for_each_tile(shared, lane, [&](const Tile& tile, Ring<tile_slots> slot) {
    const int diagonal = tile.token / block;
    const int own_begin = p.blocks_per_segment == 0 ? 0 : diagonal / p.blocks_per_segment * p.blocks_per_segment;
    const int head = tile.head / p.heads_per_kv;
    const int permuted_head = tile.head / p.heads_per_permuted;
    const auto load_k = [&](int b) {
      const bool own = b >= own_begin;
      load_block(k, shared.k, shared.k_full, shared.k_free, own ? maps.k : maps.k_permuted, b * block,
                 own ? head : permuted_head, tile.batch);
    };
    const auto load_v = [&](int b) {
      const bool own = b >= own_begin;
      load_block(v, shared.v, shared.v_full, shared.v_free, own ? maps.v : maps.v_permuted, b * block,
                 own ? head : permuted_head, tile.batch);
    };
    // Entry i of the list from its end; each lane holds one of 32.
    const std::int32_t* last = p.row_start != nullptr ? p.list + tile.list + tile.count - 1 : nullptr;
    const auto entries = [&](int i) { return i >= tile.count ? 0 : last != nullptr ? __ldg(last - i) : diagonal - i; };
    int now = entries(lane);
    int then = entries(32 + lane);

    for (int wg = 0; wg < consumers; ++wg) {
      shared.q_free[slot.at][wg].wait(slot.parity ^ 1);
      if (lane == 0) {
        shared.q_full[slot.at][wg].arrive_expecting(sizeof(shared.q[0][0]));
        tma_load(shared.q[slot.at][wg], maps.q, shared.q_full[slot.at][wg], 0, tile.token + wg * 64 - p.q_offset, 0,
                 tile.head, tile.batch);
      }
    }
    int before = 0;
    for (int i = 0; i < tile.count; ++i) {
      const int b = __shfl_sync(0xFFFFFFFF, now, i % 32);
      load_k(b);
      if (i > 0) load_v(before);
      before = b;
      if (i % 32 == 31) {
        now = then;
        then = entries(i + 33 + lane);
      }
    }
    load_v(before);
  });
}

// A masked query's P is zero, but zero times NaN or infinity is not. Finds such values in the diagonal block's V, puts
// zeros in their place and notes from which key on, that is from which query on, an output is spoilt.
template <class Shared>
__device__ void guard(Shared& shared, int lane) {
  using Pair = typename Finite<typename Shared::Element>::Pair;
  constexpr std::uint32_t exponent = Finite<typename Shared::Element>::exponent;
  constexpr int words = Shared::head_dim / 64;  // each lane looks after so many pairs of columns
  struct alignas(4 * words) Slice {
    std::uint32_t word[words];
  };
  const int column = lane * 2 * words;
  Ring<Shared::v_stages> v;
  for_each_tile(shared, lane, [&](const Tile& tile, Ring<tile_slots> slot) {
    shared.v_full[v.at].wait(v.parity);
    const auto slice = [&](int row) -> Slice& {
      auto* line = shared.v[v.at][column / panel][row];
      return *reinterpret_cast<Slice*>(line + (column % panel / 8 ^ row % 8) * 8 + column % 8);
    };
    Pair product[words] = {};  // with zero: NaN if any value is not finite
#pragma unroll 16
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
      for (int w = 0; w < words; ++w) {
        int first[2] = {block, block};
        for (int row = block - 1; row >= 0; --row) {
          std::uint32_t& bits = slice(row).word[w];
          for (int c = 0; c < 2; ++c) {
            if ((bits >> 16 * c & exponent) != exponent) continue;
            first[c] = row;
            bits &= c == 0 ? 0xFFFF0000 : 0x0000FFFF;
          }
        }
        for (int c = 0; c < 2; ++c) shared.first_bad[slot.at][column + 2 * w + c] = first[c];
      }
      fence_async_shared();
    }
    if (lane == 0) shared.any_bad[slot.at] = any_bad;
    __syncwarp();
    if (lane == 0) shared.guarded[slot.at].arrive();
    v.next(tile.count);
  });
}

// The copy engine takes no negative coordinate in a store, so the short first row of a chunk goes by hand.
template <class Shared>
__device__ void store_short_row(const AttendParams& p, const typename Shared::QTile& tile, const Tile& at, int query,
                                int lane) {
  using Element = typename Shared::Element;
  constexpr int chunks = Shared::head_dim / 8;  // of 16 bytes in a row
  auto* out = static_cast<Element*>(p.out) + at.batch * p.out_batch_stride + at.head * p.out_head_stride;
  for (int i = lane; i < 64 * chunks; i += 32) {
    const int row = i / chunks;
    const int chunk = i % chunks;
    if (query + row < 0 || query + row >= p.q_len) continue;
    const Element* from = tile[chunk / 8][row] + (chunk % 8 ^ row % 8) * 8;
    Element* to = out + (query + row) * p.out_token_stride + chunk * 8;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  }
}

template <class Shared>
__device__ void store(const AttendParams& p, const TensorMaps& maps, Shared& shared, int lane) {
  for_each_tile(shared, lane, [&](const Tile& tile, Ring<tile_slots> slot) {
    for (int wg = 0; wg < consumers; ++wg) {
      shared.out_full[slot.at][wg].wait(slot.parity);
      const int query = tile.token + wg * 64 - p.q_offset;
      if (query < 0) {
        store_short_row<Shared>(p, shared.q[slot.at][wg], tile, query, lane);
      } else if (lane == 0) {
        tma_store(maps.out, shared.q[slot.at][wg], 0, query, 0, tile.head, tile.batch);
        tma_store_wait_read();
      }
      __syncwarp();
      if (lane == 0) shared.q_free[slot.at][wg].arrive();
    }
  });
}

// ------------------------------------------------------------------------------------------------------- consumer

// The running softmax of the two query rows that a thread holds parts of: row r = 0, 1 is query 8 r + lane / 4 of its
// warp's 16. Turns scores into weights in place.
struct Softmax {
  float maximum[2] = {-infinity, -infinity};  // reference of the exponents, unscaled
  float sum[2] = {0, 0};                      // this thread's part

  // Returns true when the reference moved; then everything summed before must be multiplied by factor[r].
  __device__ bool update(float (&s)[64], float scale_log2, float (&factor)[2]) {
    bool moved = false;
    float top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
      for (int i = 1; i < 16; ++i) top[r] = fmaxf(top[r], fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xFFFFFFFF, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xFFFFFFFF, top[r], 2));
      top[r] = fmaxf(top[r], maximum[r]);
      moved = moved || (top[r] - maximum[r]) * scale_log2 > rescale_slack;
    }
    moved = __any_sync(0xFFFFFFFF, moved);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float next = moved ? top[r] : maximum[r];
      // Of two -inf nothing was summed, and their difference is no number.
      factor[r] = next == -infinity ? 1.0F : exp2_fast((maximum[r] - next) * scale_log2);
      maximum[r] = next;
      sum[r] *= factor[r];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float offset = maximum[r] == -infinity ? 0.0F : maximum[r] * scale_log2;
      float part = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[4 * i + 2 * r + c];
          x = exp2_fast(fmaf(x, scale_log2, -offset));
          part += x;
        }
      }
      sum[r] += part;
    }
    return moved;
  }
};

template <class Element>
__device__ std::uint32_t pack(float low, float high) {
  std::uint32_t bits;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

template <class Shared>
__device__ void consume(const AttendParams& p, Shared& shared, int wg) {
  using Element = typename Shared::Element;
  constexpr int head_dim = Shared::head_dim;
  constexpr int outputs = head_dim / 2;  // registers of O
  constexpr int kv_panel_bytes = block * panel * sizeof(Element);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x % warpgroup / 32;
  const auto release = [&](Barrier& barrier) {
    if (lane == 0) barrier.arrive();
  };

  Ring<Shared::k_stages> k;
  Ring<Shared::v_stages> v;
  float s[64], o[outputs];
  std::uint32_t q[head_dim / 4];
  std::uint32_t weights[32];
#pragma unroll
  for (int i = 0; i < 64; ++i) s[i] = 0;

  // Q, 16 columns at a time: lane l addresses row l % 16 of the 16-byte chunk l / 16 of every two.
  const auto read_q = [&](const typename Shared::QTile& tile) {
    const int row = warp * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < head_dim / 16; ++i) {
      const int chunk = 2 * i + lane / 16;
      load_matrices(q + 4 * i, tile[chunk / 8][row] + (chunk % 8 ^ row % 8) * 8);
    }
  };
  // S = Q K^T
  const auto multiply_qk = [&] {
    shared.k_full[k.at].wait(k.parity);
    const std::uint64_t k_operand = operand(shared.k[k.at]);
    pin(s);
    start();
#pragma unroll
    for (int d = 0; d < head_dim; d += 16) {
      const int place = d / panel * kv_panel_bytes + d % panel * static_cast<int>(sizeof(Element));
      multiply<Element, 0>(s, q + d / 4, advance(k_operand, place), d > 0);
    }
    commit();
  };
  // O += P V
  const auto multiply_pv = [&] {
    shared.v_full[v.at].wait(v.parity);
    const std::uint64_t v_operand = operand(shared.v[v.at], kv_panel_bytes);
    pin(o);
    start();
#pragma unroll
    for (int key = 0; key < block; key += 16) {
      multiply<Element, 1>(o, weights + key / 4, advance(v_operand, key * panel * static_cast<int>(sizeof(Element))),
                           1);
    }
    commit();
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < 32; ++i) weights[i] = pack<Element>(s[2 * i], s[2 * i + 1]);
  };
  const auto free_k = [&] {
    release(shared.k_free[k.at]);
    k.next();
  };
  const auto free_v = [&] {
    release(shared.v_free[v.at]);
    v.next();
  };

  for_each_tile(shared, lane, [&](const Tile& tile, Ring<tile_slots> slot) {
    Softmax softmax;
    float factor[2] = {1, 1};
    const int row = wg * 64 + warp * 16 + lane / 4;  // of the tile, and 8 more
    const int column = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < outputs; ++i) o[i] = 0;

    // The diagonal block.
    shared.q_full[slot.at][wg].wait(slot.parity);
    read_q(shared.q[slot.at][wg]);
    multiply_qk();
    wait<0>();
    pin(s);
    free_k();
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if (i / 4 * 8 + column + i % 2 > row + i % 4 / 2 * 8) s[i] = -infinity;
    }
    softmax.update(s, p.scale_log2, factor);
    pack_weights();
    shared.guarded[slot.at].wait(slot.parity);

    // The blocks before it: this block's S and softmax beside the P V of the block after it.
    for (int i = 1; i < tile.count; ++i) {
      multiply_qk();
      multiply_pv();
      wait<1>();
      pin(s);
      free_k();
      const bool moved = softmax.update(s, p.scale_log2, factor);
      // The branch stands before the wait because the compiler would otherwise move the wait up, before the
      // exponentials.
      if (moved) {
        wait<0>();
        pin(o);
#pragma unroll
        for (int j = 0; j < outputs; ++j) o[j] *= factor[j % 4 / 2];
      } else {
        wait<0>();
        pin(o);
      }
      free_v();
      pack_weights();
    }
    multiply_pv();

    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = softmax.sum[r];
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
      inverse[r] = sum == 0 ? 0 : 1 / sum;
      const int query = tile.token + row + 8 * r - p.q_offset;
      if (p.lse != nullptr && lane % 4 == 0 && query >= 0 && query < p.q_len) {
        const float lse = sum == 0 ? -infinity : fmaf(softmax.maximum[r], p.scale, logf(sum));
        p.lse[tile.batch * p.lse_batch_stride + std::int64_t{tile.head} * p.q_len + query] = lse;
      }
    }
    wait<0>();
    pin(o);
    free_v();
#pragma unroll
    for (int i = 0; i < outputs; ++i) o[i] *= inverse[i % 4 / 2];
    if (shared.any_bad[slot.at] != 0) {
#pragma unroll
      for (int i = 0; i < outputs; ++i) {
        if (row + i % 4 / 2 * 8 >= shared.first_bad[slot.at][i / 4 * 8 + column + i % 2]) o[i] = not_a_number;
      }
    }

    // Q's memory takes the outputs, swizzled as the copy engine expects and addressed as in read_q.
    const int out_row = warp * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < outputs / 8; ++i) {
      const int chunk = 2 * i + lane / 16;
      Element* to = shared.q[slot.at][wg][chunk / 8][out_row] + (chunk % 8 ^ out_row % 8) * 8;
      const float* part = o + 8 * i;
      store_matrices(to, pack<Element>(part[0], part[1]), pack<Element>(part[2], part[3]),
                     pack<Element>(part[4], part[5]), pack<Element>(part[6], part[7]));
    }
    fence_async_shared();
    __syncwarp();
    release(shared.out_full[slot.at][wg]);
  });
}

// --------------------------------------------------------------------------------------------------------- kernel

template <class Element, int head_dim>
__global__ void __launch_bounds__(threads, 1)
    attend_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ TensorMaps maps) {
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<Shared<Element, head_dim>*>(memory + (1024 - shared_address(memory) % 1024) % 1024);
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  const int role = threadIdx.x / warpgroup;
  if (role == 0) {
    give_registers<producer_registers>();
    const int lane = threadIdx.x % 32;
    switch (threadIdx.x / 32) {
      case 0: load(p, maps, shared, lane); break;
      case 1: store(p, maps, shared, lane); break;
      case 2: guard(shared, lane); break;
      case 3:
        if (lane == 0) schedule(p, shared);
        break;
    }
  } else {
    take_registers<consumer_registers>();
    consume(p, shared, role - 1);
  }
}

}  // namespace pbsattn::cuda::sm90
