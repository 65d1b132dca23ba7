// Block-sparse attention forward for one tile of 128 queries at a time, on Hopper (sm_90a).
//
//     for each tile (batch, query head, row):   for each key block in its list, diagonal first, then descending:
//         S = Q K^T    P = exp2(scale (S - m))
//         where a weight of a warp's 16 rows exceeds a limit, or a row's m is beyond fused arithmetic:
//             m before = m    m = max(m, rows of S)    O = O exp2(scale (m before - m))    P = exp2(scale (S - m))
//         O = O + P [V 1]
//     out = O / its last column    lse = scale m + log(O's last column)
//
// Where logits are capped S = cap(Q K^T), by a polynomial in P's exponent, and where that doesn't hold m is looked for.
// Where a head has a sink both are merged with a key of that logit and a value of zeros. A window's blocks are the
// list, and where its edge passes through a block the keys beyond it are hidden.
//
// So m, a row's maximum when it was last looked for, is seldom looked for again, and nothing waits for it. It begins as
// the maximum of the first 8 columns of a list's first block. The limit, 2^24 in bf16 and 2^14 in f16, is seldom
// exceeded, and the more weights exceed 1 the better small ones are kept; values above 2^104 / keys may overflow. The
// sums of P are of P as rounded for the product, so that a key with all the weight gives its value whatever m is. As a
// warp's rows decide together, a query's last bits depend on those beside it.
//
// A thread block has three warpgroups and stays resident, taking tiles until none is left:
//   - two *consumers* of 64 queries each. Each exponentiates a block beside its own P V of the block before, and the
//     two drift apart by themselves, so that one multiplies while the other exponentiates. A tile's end runs beside the
//     next one's first product;
//   - one *producer*, of four warps with a role each: `schedule` takes tiles, few dense ones in a fixed order, others,
//     after the first, from a counter; `load` brings Q, K and V into shared memory; `guard` looks for values that
//     masked queries must not see; `store` takes finished outputs away.
//
// Barriers, all in shared memory ("full": producer to consumer, "free": back):
//     tile_full/free [slot]      tile descriptions, two in flight
//     q_full/free    [slot][wg]  64 queries; after the last product the same memory carries the 64 outputs, hence:
//     out_full       [slot][wg]  outputs are written (store waits, then frees q)
//     k_full/free, v_full/free [stage]  one key block's K or V, or half a block's
//     v_asked        [slot][guard]  V of a block that some query doesn't see whole is on its way
//     guarded        [slot][guard]  that V is safe to multiply
// Those of a tile count threads; k_free and v_free, which cost most, and wide heads' q_free count warps.
//
// A row may be worked in parts (parts.h), each a tile whose outputs and log-sum-exps go to scratch.
//
// Beyond 128 columns (tile.cuh has the sizes) queries are in shared memory one tile at a time, free after the tile's
// last S, and outputs go to device memory from registers. Beyond 128 columns of values O leaves registers for half a
// block's S, so that a block is worked in two steps. The least that a block takes of a multiprocessor, both consumers
// together: clocks of the tensor cores at 2048 multiply-adds, with the columns of ones; clocks of exponentials at 16;
// bytes through shared memory, which moves 128 a clock, with those that the copy engine writes:
//
//     columns of K and V    tensor cores    exponentials    bytes      of 128 a clock    shared memory
//      64   64              1088            1024            116 KiB     .85              224 KiB
//      96   96              1600            1024            172 KiB     .86              216 KiB
//     128  128              2112            1024            228 KiB     .86              224 KiB
//     192  128              2624            1024            292 KiB     .89              224 KiB
//     256  256              4160            1024            516 KiB     .99              208 KiB

#include <algorithm>

#include "cuda/attend/attend.h"
#include "cuda/attend/consumer.cuh"
#include "cuda/attend/producer.cuh"
#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/lanes.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/prologue.cuh"
#include "cuda/sm90/tensor_map.h"

namespace pbsattn::cuda {
namespace {

using namespace attention;

constexpr int scheduler = 96;  // thread

template <class Element, int head_dim, int head_dim_v, class Layer, bool pieces>
__global__ void __launch_bounds__(threads, 1)
    attend_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ TensorMaps maps,
                  const __grid_constant__ Layer layer) {
  using OfTile = Shared<Element, head_dim, head_dim_v, Layer::guards, pieces>;
  auto& shared = aligned_shared<OfTile>();
  switch (threadIdx.x) {  // two warps at once
    case 0:
      let_next_kernel_start();  // which then gets ready where thread blocks of this one have ended
      for (const CUtensorMap* map : {&maps.q, &maps.k.map, &maps.v.map, &maps.permuted_k, &maps.permuted_v, &maps.out})
        sm90::prefetch_map(*map);
      shared.init_barriers();
      break;
    case scheduler: {
      // order_tiles writes the order, and kernels before may have written the sinks. With a counter those are done:
      // reset_places or order_tiles has waited for them.
      if (p.tile_order != nullptr || (!Layer::plain && p.next_place == nullptr)) wait_for_earlier_kernels();
      const Tile first = tile_at<OfTile>(p, layer, static_cast<int>(blockIdx.x));
      shared.init_tiles(first, source_of(p, first));
      break;
    }
    default: break;
  }
  shared.init_ones();
  __syncthreads();
  const int role = threadIdx.x / warpgroup;
  if (role == 0) {
    sm90::give_registers<producer_registers>();
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;  // a switch would read a table of addresses first
    if (warp == 0)
      load(p, maps, layer, shared, lane);
    else if (warp == 1)
      store(p, maps, shared, lane);
    else if (warp == 2)
      guard(layer, shared, lane);
    else if (lane == 0)
      schedule(p, layer, shared);
  } else {
    sm90::take_registers<consumer_registers>();
    consume(p, layer, shared, role - 1);
  }
}

// K and V of a section's heads should stay in L2 while its rows are worked off. An H100 has 50 MB in two halves that
// may both hold a line.
constexpr std::int64_t section_bytes = 24 << 20;

// Up to so many dense tiles a multiprocessor are dealt out in a fixed order, which saves setting a counter to zero.
constexpr int few_tiles = 4;

struct Scratch {
  int next_place;
  int padding[3];
  int tile_order[];
};

// Returns the bytes of the order; parts lie behind it.
std::size_t order_bytes(const Geometry& g, const RowParts& parts) {
  const std::int64_t heads = g.shape.batch * g.shape.q_heads;
  const std::int64_t places = heads * (g.rows() + std::int64_t{parts.rows} * (parts.each - 1));
  const std::size_t bytes = sizeof(Scratch) + static_cast<std::size_t>(places) * sizeof(int);
  return parts.rows == 0 ? bytes : (bytes + 255) / 256 * 256;
}

TileOrder natural_order(const Geometry& g, const RowGrid& grid) {
  const std::int64_t kv_bytes = g.shape.kv_len * (g.shape.head_dim + value_dim(g.shape)) * 2;
  const std::int64_t sections = std::max<std::int64_t>(1, section_bytes / kv_bytes) * grid.order_group;
  return {.rows = grid.rows,
          .heads = grid.heads,
          .section_heads = static_cast<int>(std::min<std::int64_t>(grid.heads, sections))};
}

__global__ void reset_places(int* next_place) {
  let_next_kernel_start();
  *next_place = 0;
}

// Up to so many tiles a multiprocessor are taken in the order of their work, or some long row is left for the end. More
// than that are taken in the natural order, by which thread blocks read the same keys at the same time.
constexpr int sorted_tiles = 32;
constexpr int classes = 16;  // of work; those of one class stay in the natural order

// Writes the order of tiles: where `sorted`, by classes of their work, each a quarter of an octave, from four times the
// mean down to a quarter; otherwise those of more than four times the mean come first, and then all others. A row in
// parts has its first part in the first class, and the further ones come before all. One thread block; each warp takes
// a stretch of places, 32 at a time.
__global__ void __launch_bounds__(1024)
    order_tiles(TileOrder order, RowParts parts, bool sorted, const std::int32_t* row_count, Scratch* scratch) {
  __shared__ unsigned long long work;
  __shared__ int next[classes][32];  // of each warp: first how many tiles it has, then where its next one goes
  __shared__ int class_tiles[classes];
  const int tiles = order.tiles();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int each = (tiles + 1023) / 1024 * 32;
  const int begin = min(tiles, warp * each);
  const int end = min(tiles, begin + each);

  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (threadIdx.x == 0) {
    work = 0;
    scratch->next_place = 0;
  }
  if (threadIdx.x < classes * 32) next[threadIdx.x / 32][lane] = 0;
  __syncthreads();
  unsigned long long mine = 0;
#pragma unroll 8
  for (int tile = threadIdx.x; tile < tiles; tile += 1024) mine += row_count[tile];
  mine = warp_sum(mine);
  if (lane == 0) atomicAdd(&work, mine);
  __syncthreads();

  const float of_mean = static_cast<float>(tiles) / static_cast<float>(work);
  // Calls take(present, tile, its class, lanes that have one of that class) for 32 places at a time; with all lanes.
  const auto for_each_tile_of_warp = [&](auto&& take) {
#pragma unroll 4
    for (int first = begin; first < end; first += 32) {
      const bool present = first + lane < end;
      const int tile = present ? order.tile(first + lane) : 0;
      const float share = static_cast<float>(row_count[tile]) * of_mean;
      int tile_class = share > 4.0F ? 0 : classes - 1;
      if (sorted) tile_class = min(max(static_cast<int>(4.0F * (2.0F - __log2f(share))), 0), classes - 1);
      if (tile % order.rows >= order.rows - parts.rows) tile_class = 0;
      const unsigned same = __match_any_sync(0xFFFFFFFF, present ? tile_class : -1);
      take(present, tile, tile_class, same);
      __syncwarp();
    }
  };
  const unsigned lanes_below = (1U << lane) - 1;
  for_each_tile_of_warp([&](bool present, int, int tile_class, unsigned same) {
    if (present && (same & lanes_below) == 0) next[tile_class][warp] += __popc(same);
  });
  __syncthreads();
  if (warp < classes) {  // sums of the warps before, then of the classes before
    const int count = next[warp][lane];
    int sum = count;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(0xFFFFFFFF, sum, distance);
      if (lane >= distance) sum += before;
    }
    next[warp][lane] = sum - count;
    if (lane == 31) class_tiles[warp] = sum;
  }
  // Those of a part side by side, since they read the same keys.
  const int cut = order.heads * parts.rows;
  const int further = cut * (parts.each - 1);
  for (int i = static_cast<int>(threadIdx.x); i < further; i += 1024) {
    const int tile = i % cut / parts.rows * order.rows + order.rows - 1 - i % parts.rows;
    scratch->tile_order[i] = tile + (1 + i / cut) * tiles;
  }
  __syncthreads();
  if (warp < classes) {
    int before = further;
    for (int earlier = 0; earlier < warp; ++earlier) before += class_tiles[earlier];
    next[warp][lane] += before;
  }
  __syncthreads();
  for_each_tile_of_warp([&](bool present, int tile, int tile_class, unsigned same) {
    const int place = next[tile_class][warp];
    __syncwarp();
    if (present) scratch->tile_order[place + __popc(same & lanes_below)] = tile;
    if (present && (same & lanes_below) == 0) next[tile_class][warp] = place + __popc(same);
  });
}

// Describes what the copy engine moves: 64 queries or outputs, and keys or values of a step.
bool make_maps(TensorMaps& maps, const AttendArgs& args, std::int64_t order_heads, bool permuted, int step, int panel_v,
               const PartOutputs& parts) {
  const Geometry& g = args.geometry;
  const Shape& shape = g.shape;
  const std::int64_t dim = shape.head_dim;
  const std::int64_t dim_v = value_dim(shape);
  const auto map = [&](CUtensorMap& into, const auto& view, std::int64_t heads, std::int64_t tokens, std::int64_t width,
                       int box_tokens, int panel) {
    return make_tensor_map(into, view, shape.batch, heads, tokens, width,
                           Box{.tokens = box_tokens, .columns = static_cast<int>(width), .panel = panel});
  };
  const PageTable pages(args.inputs.pages, shape.kv_len);
  const auto map_kv = [&](KvMap& into, const ConstView& view, std::int64_t width, int panel) {
    return make_kv_map(into, view, pages, shape, width,
                       Box{.tokens = step, .columns = static_cast<int>(width), .panel = panel});
  };
  const auto map_permuted = [&](CUtensorMap& into, const void* data, std::int64_t width, int panel) {
    const std::int64_t head = args.permuted.slots * width;
    const ConstView view{data, args.inputs.k.dtype, order_heads * head, head, width};
    return !permuted || map(into, view, order_heads, g.permuted_len(), width, step, panel);
  };
  const auto map_parts = [&] {
    const std::int64_t queries = args.parts.count(shape.batch * shape.q_heads) * block;
    const View view{parts.out, args.outputs.out.dtype, queries * dim_v, queries * dim_v, dim_v};
    return queries == 0 ||
           make_tensor_map(maps.part_out, view, 1, 1, queries, dim_v,
                           Box{.tokens = 64, .columns = static_cast<int>(dim_v), .panel = panel_of(dim_v)});
  };
  const int panel = panel_of(dim);
  return map(maps.q, args.inputs.q, shape.q_heads, shape.q_len, dim, 64, panel) &&
         map(maps.out, args.outputs.out, shape.q_heads, shape.q_len, dim_v, 64, panel_of(dim_v)) && map_parts() &&
         map_kv(maps.k, args.inputs.k, dim, panel) && map_kv(maps.v, args.inputs.v, dim_v, panel_v) &&
         map_permuted(maps.permuted_k, args.permuted.k, dim, panel) &&
         map_permuted(maps.permuted_v, args.permuted.v, dim_v, panel_v);
}

}  // namespace

std::size_t attend_scratch_size(const Geometry& g, const RowParts& parts) {
  const std::size_t tiles = order_bytes(g, parts);
  return parts.rows == 0 ? tiles : tiles + part_bytes(parts, g);
}

cudaError_t attend(const AttendArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const Shape& shape = g.shape;
  const bool permuted = args.permuted.k != nullptr && g.permuted_len() > 0;
  const std::int64_t order_heads = permuted ? args.permuted.order_heads : shape.kv_heads;
  const bool dense = args.lists.row_start == nullptr;
  constexpr float log2_e = 1.4426950408889634F;
  auto* scratch = static_cast<Scratch*>(args.scratch);
  const RowGrid grid(g, order_heads);

  AttendParams params{
      .order = natural_order(g, grid),
      .tile_order = dense ? nullptr : scratch->tile_order,
      .next_place = &scratch->next_place,
      .lists = args.lists,
      .grid = grid,
      .pages = {args.inputs.pages, shape.kv_len},
      .moved = permuted,
      .scale = args.scale,
      .scale_log2 = args.scale * log2_e,
      .out = args.outputs.out,
      .lse = args.outputs.lse,
      .lse_batch_stride = args.lse_batch_stride,
  };
  const int tiles = params.order.tiles();
  params.parts = args.parts;
  params.places = tiles + params.order.heads * args.parts.rows * (args.parts.each - 1);
  const PartOutputs parts =
      part_outputs(args.parts, g, static_cast<std::byte*>(args.scratch) + order_bytes(g, args.parts));
  params.part_lse = parts.lse;

  int multiprocessors = 0;
  if (const cudaError_t error = count_multiprocessors(multiprocessors); error != cudaSuccess) return error;
  if (!dense) {
    if (const cudaError_t error =
            launch(order_tiles, dim3(1), 1024, 0, stream, Start::early, params.order, params.parts,
                   tiles <= sorted_tiles * multiprocessors, params.lists.row_count, scratch);
        error != cudaSuccess)
      return error;
  } else if (tiles <= few_tiles * multiprocessors) {
    params.next_place = nullptr;
  } else if (const cudaError_t error =
                 launch(reset_places, dim3(1), 1, 0, stream, Start::after_earlier_kernels, params.next_place);
             error != cudaSuccess) {
    return error;
  }
  // It gets ready beside the kernel before it. Dense tiles are known beforehand, so work on the first ones may start
  // beside reset_places; without a counter `load` waits for earlier kernels.
  const cudaError_t error = dispatch(args.inputs.q.dtype, shape, [&](auto element, auto keys, auto values) {
    using T = decltype(element);
    const auto launch_with = [&]<class L>(const L& layer, auto pieces) {
      using OfTile = Shared<T, keys(), values(), L::guards, pieces()>;
      constexpr int shared_bytes = aligned_bytes<OfTile>;
      static_assert(shared_bytes <= 227 * 1024);
      TensorMaps maps;
      if (!make_maps(maps, args, order_heads, permuted, OfTile::step, OfTile::panel_v, parts))
        return cudaErrorInvalidValue;
      return launch(attend_kernel<T, keys(), values(), L, pieces()>, dim3(std::min(params.places, multiprocessors)),
                    threads, shared_bytes, stream, Start::early, params, maps, layer);
    };
    // At 64 columns what pages and parts need costs those who have none: the compiler orders the loop otherwise.
    const auto launch_for = [&](const auto& layer) {
      if constexpr (keys() == 64)
        if (args.parts.rows == 0 && args.inputs.pages.table == nullptr) return launch_with(layer, std::false_type{});
      return launch_with(layer, std::true_type{});
    };
    const Layer layer = layer_of(args.inputs, g);
    if constexpr (takes_caps(keys()))
      if (args.softcap != 0.0F) return launch_for(capped_layer_of(layer, args.softcap, args.scale));
    if (args.inputs.sinks.empty() && !g.windowed()) return launch_for(PlainLayer{});
    return launch_for(layer);
  });
  return error != cudaSuccess || args.parts.rows == 0 ? error : merge_row_parts(args, parts, stream);
}

}  // namespace pbsattn::cuda
