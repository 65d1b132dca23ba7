// Block-sparse attention forward for one tile of 128 queries at a time, on Hopper (sm_90a).
//
//     for each tile (batch, query head, row):   for each key block in its list, diagonal first, then descending:
//         S = Q K^T    m = max(m, rows of S)    P = exp2(scale (S - m))    O = O exp2(scale (m before - m)) + P V
//     out = O / sum(P)    lse = scale m + log(sum(P))
//
// A thread block has three warpgroups and stays resident, taking tiles until none is left:
//   - two *consumers* of 64 queries each, with Q in registers. Each finds a block's maxima beside its own P V of the
//     block before, and the two drift apart by themselves, so that one multiplies while the other exponentiates;
//   - one *producer*, of four warps with a role each: `schedule` takes tiles, after the first from a counter, `load`
//     brings Q, K and V into shared memory, `guard` looks for values on the diagonal that masked queries must not see,
//     `store` takes finished outputs away.
//
// Barriers, all in shared memory ("full": producer to consumer, "free": back):
//     tile_full/free [slot]      tile descriptions, two in flight
//     q_full/free    [slot][wg]  64 queries; the same memory then carries the 64 outputs, hence:
//     out_full       [slot][wg]  outputs are written (store waits, then frees q)
//     k_full/free, v_full/free [stage]  one key block's K or V
//     v_asked        [slot]      the diagonal block's V is on its way
//     guarded        [slot]      the diagonal block's V is safe to multiply
// Those of a tile count threads; k_free and v_free, which cost most, count warps.

#include <algorithm>

#include "cuda/attend/attend.h"
#include "cuda/attend/consumer.cuh"
#include "cuda/attend/producer.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace pbsattn::cuda {
namespace {

using namespace sm90;

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

// K and V of a section's heads should stay in L2 while its rows are worked off. An H100 has 50 MB in two halves that
// may both hold a line.
constexpr std::int64_t section_bytes = 24 << 20;

struct Scratch {
  int next_place;
  int padding[3];
  int tile_order[];
};

TileOrder natural_order(const AttendArgs& args) {
  const Geometry& g = args.geometry;
  const bool by_query_head = args.permuted.k != nullptr && args.permuted.order_heads == g.shape.q_heads;
  const std::int64_t sharing = by_query_head ? 1 : g.group();
  const std::int64_t kv_bytes = g.shape.kv_len * g.shape.head_dim * 2 * 2;
  const std::int64_t heads = g.shape.batch * g.shape.q_heads;
  return {.rows = static_cast<int>(g.rows()),
          .heads = static_cast<int>(heads),
          .section_heads =
              static_cast<int>(std::min(heads, std::max<std::int64_t>(1, section_bytes / kv_bytes) * sharing))};
}

__global__ void reset_places(int* next_place) {
  let_next_kernel_start();
  *next_place = 0;
}

// Puts tiles of more than four times the mean work first, so that none of them is left for the end, and otherwise keeps
// the natural order. One thread block; each warp takes a stretch of places, 32 at a time.
__global__ void __launch_bounds__(1024) order_tiles(TileOrder order, const std::int32_t* row_count, Scratch* scratch) {
  __shared__ unsigned long long work;
  __shared__ int warp_heavy[32];
  const int tiles = order.tiles();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int each = (tiles + 1023) / 1024 * 32;
  const int begin = min(tiles, warp * each);
  const int end = min(tiles, begin + each);

  if (threadIdx.x == 0) {
    work = 0;
    scratch->next_place = 0;
  }
  __syncthreads();
  unsigned long long mine = 0;
#pragma unroll 8
  for (int tile = threadIdx.x; tile < tiles; tile += 1024) mine += row_count[tile];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) mine += __shfl_xor_sync(0xFFFFFFFF, mine, offset);
  if (lane == 0) atomicAdd(&work, mine);
  __syncthreads();
  const auto heavy = [&](int tile) {
    return row_count[tile] * static_cast<std::int64_t>(tiles) > 4 * static_cast<std::int64_t>(work);
  };

  int count = 0;
#pragma unroll 4
  for (int place = begin + lane; place < end; place += 32) count += heavy(order.tile(place));
  count = __reduce_add_sync(0xFFFFFFFF, count);
  if (lane == 0) warp_heavy[warp] = count;
  __syncthreads();
  int next_heavy = 0;
  int total = 0;
  for (int w = 0; w < 32; ++w) {
    if (w < warp) next_heavy += warp_heavy[w];
    total += warp_heavy[w];
  }
  int next_light = total + begin - next_heavy;
  const unsigned lanes_below = (1U << lane) - 1;
#pragma unroll 4
  for (int first = begin; first < end; first += 32) {
    const bool present = first + lane < end;
    const int tile = present ? order.tile(first + lane) : 0;
    const bool is_heavy = present && heavy(tile);
    const unsigned heavies = __ballot_sync(0xFFFFFFFF, is_heavy);
    const unsigned lights = __ballot_sync(0xFFFFFFFF, present && !is_heavy);
    if (is_heavy)
      scratch->tile_order[next_heavy + __popc(heavies & lanes_below)] = tile;
    else if (present)
      scratch->tile_order[next_light + __popc(lights & lanes_below)] = tile;
    next_heavy += __popc(heavies);
    next_light += __popc(lights);
  }
}

template <class Element>
cudaError_t launch_head_dim(const AttendParams& params, const TensorMaps& maps, int thread_blocks,
                            std::int64_t head_dim, cudaStream_t stream) {
  // Dense tiles are known beforehand, so work on the first ones may start beside reset_places.
  const Start start =
      params.tile_order == nullptr && params.next_place != nullptr ? Start::early : Start::after_earlier_kernels;
  const auto start_kernel = [&]<int dim>(std::integral_constant<int, dim>) {
    constexpr int shared_bytes = sizeof(Shared<Element, dim>) + 1024;  // to align it
    static_assert(shared_bytes <= 227 * 1024);
    return launch(attend_kernel<Element, dim>, dim3(thread_blocks), threads, shared_bytes, stream, start, params, maps);
  };
  return head_dim == 128 ? start_kernel(std::integral_constant<int, 128>{})
                         : start_kernel(std::integral_constant<int, 64>{});
}

}  // namespace

std::size_t attend_scratch_size(const Geometry& g) {
  return sizeof(Scratch) + static_cast<std::size_t>(g.shape.batch * g.shape.q_heads * g.rows()) * sizeof(int);
}

cudaError_t attend(const AttendArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const Shape& shape = g.shape;
  const bool permuted = args.permuted.k != nullptr && g.permuted_len() > 0;
  constexpr float log2_e = 1.4426950408889634F;
  auto* scratch = static_cast<Scratch*>(args.scratch);

  AttendParams params{
      .order = natural_order(args),
      .tile_order = args.lists != nullptr ? scratch->tile_order : nullptr,
      .next_place = &scratch->next_place,
      .row_start = args.lists != nullptr ? args.lists->row_start : nullptr,
      .row_count = args.lists != nullptr ? args.lists->row_count : nullptr,
      .list = args.lists != nullptr ? args.lists->block : nullptr,
      .q_heads = static_cast<int>(shape.q_heads),
      .heads_per_kv = static_cast<int>(g.group()),
      .heads_per_permuted = permuted ? static_cast<int>(shape.q_heads / args.permuted.order_heads) : 1,
      .blocks_per_segment = permuted ? g.segment / g.block : 0,
      .first_row = static_cast<int>(g.first_row()),
      .q_offset = static_cast<int>(g.q_offset()),
      .q_len = static_cast<int>(shape.q_len),
      .scale = args.scale,
      .scale_log2 = args.scale * log2_e,
      .out = args.out.data,
      .out_batch_stride = args.out.batch_stride,
      .out_head_stride = args.out.head_stride,
      .out_token_stride = args.out.token_stride,
      .lse = args.lse,
      .lse_batch_stride = args.lse_batch_stride,
  };

  TensorMaps maps;
  const auto map = [&](CUtensorMap& into, const auto& view, std::int64_t heads, std::int64_t tokens, int box_tokens) {
    return make_tensor_map(into, view, shape.batch, heads, tokens, shape.head_dim, box_tokens);
  };
  const auto contiguous = [&](const void* data) {
    const std::int64_t head = g.permuted_len() * shape.head_dim;
    return ConstView{data, args.inputs.k.dtype, args.permuted.order_heads * head, head, shape.head_dim};
  };
  const bool encoded =
      map(maps.q, args.inputs.q, shape.q_heads, shape.q_len, 64) &&
      map(maps.out, args.out, shape.q_heads, shape.q_len, 64) &&
      map(maps.k, args.inputs.k, shape.kv_heads, shape.kv_len, block) &&
      map(maps.v, args.inputs.v, shape.kv_heads, shape.kv_len, block) &&
      (!permuted ||
       (map(maps.k_permuted, contiguous(args.permuted.k), args.permuted.order_heads, g.permuted_len(), block) &&
        map(maps.v_permuted, contiguous(args.permuted.v), args.permuted.order_heads, g.permuted_len(), block)));
  if (!encoded) return cudaErrorInvalidValue;

  int device = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int tiles = params.order.tiles();
  if (args.lists != nullptr) {
    error = launch(order_tiles, dim3(1), 1024, 0, stream, Start::after_earlier_kernels, params.order, params.row_count,
                   scratch);
  } else if (tiles <= multiprocessors) {
    params.next_place = nullptr;
  } else {
    error = launch(reset_places, dim3(1), 1, 0, stream, Start::after_earlier_kernels, params.next_place);
  }
  if (error != cudaSuccess) return error;
  const int thread_blocks = std::min(tiles, multiprocessors);
  return args.inputs.q.dtype == DType::bf16
             ? launch_head_dim<__nv_bfloat16>(params, maps, thread_blocks, shape.head_dim, stream)
             : launch_head_dim<__half>(params, maps, thread_blocks, shape.head_dim, stream);
}

}  // namespace pbsattn::cuda
