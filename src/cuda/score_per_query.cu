// Block scores of BlockScore::per_query on Hopper: for each row the mean over its queries of softmax over blocks of
// query . pooled key.
//
// An *item* is two rows of one head, so that the pooled keys brought in serve 256 queries. Four *consumer* warpgroups
// take 64 queries each and go through the row's pooled keys, 128 at a time, twice:
//     S[query][block] = Q K^T      max and sum of exp2 of each query, in registers
//     S^T[block][query] = K Q^T    weights exp2(S^T - log-sum-exp), summed over queries: no exchange between warps
// The second product costs less than keeping the first would: 128 queries' scores of 1024 blocks are 512 KiB. Beside
// them a *producer* thread brings queries and keys through the copy engine, ahead over items and passes. A thread block
// stays resident and takes every n-th item; long rows come first, and heads side by side share L2.
//
// The least work at 128K tokens, 32 heads, head_dim 128: 2 x 0.55 TFLOP of products and 2 x 2.1 G exponentials, which
// take as long as each other and overlap: 1.1 to 1.4 ms.
#include <algorithm>
#include <cmath>

#include "cuda/permute_common.cuh"
#include "cuda/ring.cuh"
#include "cuda/tensor_map.h"

namespace pbsattn::cuda {
namespace {

using sm90::Barrier;

constexpr int rows_of_item = 2;
constexpr int consumers = 4;
constexpr int consumer_warps = consumers * 4;
constexpr int threads = (consumers + 1) * 128;
constexpr int producer_registers = 32;
constexpr int consumer_registers = 112;  // all of a thread block share what it was launched with: 96 for each of 640
constexpr int slots = 2;                 // items whose queries are in shared memory

struct Params {
  float* scores;  // of tile [batch][q_head][row] where its list will be
  int heads;      // batch x query heads
  int q_heads;
  int heads_of_order;
  int first_pair, last_pair;  // of token blocks 2 i and 2 i + 1
  int first_row, first_dense_row;
  int blocks_per_segment;
  std::int64_t causal_blocks;
  std::int64_t q_offset, q_len;
  float scale_log2;

  __device__ int items() const { return (last_pair - first_pair + 1) * heads; }
};

struct Maps {
  CUtensorMap q, pooled_k;
};

template <int head_dim>
struct Shared {
  static constexpr int stages = head_dim == 128 ? 2 : 4;
  alignas(1024) unsigned char q[slots][rows_of_item][Tile<head_dim>::bytes];
  alignas(1024) unsigned char k[stages][Tile<head_dim>::bytes];
  LogSum log_sums[slots][rows_of_item][128];
  Barrier q_full[slots], q_free[slots], k_full[stages], k_free[stages];

  __device__ void init() {
    for (Barrier& barrier : q_full) barrier.init(1);
    for (Barrier& barrier : k_full) barrier.init(1);
    for (Barrier& barrier : q_free) barrier.init(consumer_warps);
    for (Barrier& barrier : k_free) barrier.init(consumer_warps);
    sm90::fence_barrier_init();
  }
};

struct Item {
  __device__ Item(const Params& p, int index)
      : head(index % p.heads), block((p.last_pair - index / p.heads) * rows_of_item) {
    static_assert(rows_of_item == 2);
    tiles = (max(visible_of(p, block), visible_of(p, block + 1)) + tile_tokens - 1) / tile_tokens;
  }
  // Blocks that the row of token block `of` may prune; none where it isn't scored.
  __device__ static int visible_of(const Params& p, int of) {
    const bool scored = of >= p.first_row && of < p.first_row + p.first_dense_row;
    return scored ? of / p.blocks_per_segment * p.blocks_per_segment : 0;
  }
  int head;   // of all batch entries
  int block;  // token block of the first row
  int tiles;  // of keys that some row sees
};

template <int head_dim>
__device__ void produce(const Params& p, const Maps& maps, Shared<head_dim>& shared) {
  Ring<slots> slot;
  Ring<Shared<head_dim>::stages> stage;
  for (int index = blockIdx.x; index < p.items(); index += gridDim.x, slot.next()) {
    const Item item(p, index);
    const int batch = item.head / p.q_heads;
    const int head = item.head % p.q_heads;
    shared.q_free[slot.at].wait(slot.parity ^ 1);
    shared.q_full[slot.at].arrive_expecting(sizeof(shared.q[0]));
    for (int i = 0; i < rows_of_item; ++i)
      sm90::tma_load(shared.q[slot.at][i], maps.q, shared.q_full[slot.at], 0,
                     static_cast<int>((item.block + i) * std::int64_t{block_tokens} - p.q_offset), 0, head, batch);
    for (int step = 0; step < 2 * item.tiles; ++step, stage.next()) {
      const int tile = step < item.tiles ? step : step - item.tiles;
      shared.k_free[stage.at].wait(stage.parity ^ 1);
      shared.k_full[stage.at].arrive_expecting(sizeof(shared.k[0]));
      sm90::tma_load(shared.k[stage.at], maps.pooled_k, shared.k_full[stage.at], 0, tile * tile_tokens, 0,
                     head / p.heads_of_order, batch);
    }
  }
}

// Folds a product into the state of this thread's two queries; columns from `valid` on aren't there.
__device__ inline void fold(float (&s)[64], int valid, float scale_log2, Statistics (&statistics)[2]) {
  if (valid < tile_tokens) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if (i / 4 * 8 + column + i % 2 >= valid) s[i] = -INFINITY;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float max[2] = {statistics[r].max, -INFINITY};
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      max[0] = fmaxf(max[0], s[i + 2 * r]);
      max[1] = fmaxf(max[1], s[i + 2 * r + 1]);
    }
    const float larger = fmaxf(max[0], max[1]);
    const float shift = Statistics::finite_or_zero(larger);
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      sum[0] += sm90::exp2_fast((s[i + 2 * r] - shift) * scale_log2);
      sum[1] += sm90::exp2_fast((s[i + 2 * r + 1] - shift) * scale_log2);
    }
    statistics[r].sum =
        statistics[r].sum * sm90::exp2_fast((statistics[r].max - shift) * scale_log2) + (sum[0] + sum[1]);
    statistics[r].max = larger;
  }
}

// Sums over the queries [first, last) of the weights of this thread's two blocks, in all four lanes that share them.
__device__ inline void sum_weights(const float (&s)[64], float scale_log2, const LogSum* log_sums, int first, int last,
                                   float (&sum)[2]) {
  const int column = threadIdx.x % 4 * 2;
  const bool whole = first == 0 && last == tile_tokens;
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
    const int query = i * 2 + column;
    const float4 pair = *reinterpret_cast<const float4*>(log_sums + query);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float low = sm90::exp2_fast(fmaf(s[i + 2 * r] - pair.x, scale_log2, -pair.y));
      const float high = sm90::exp2_fast(fmaf(s[i + 2 * r + 1] - pair.z, scale_log2, -pair.w));
      if (whole) {
        sum[r] += low + high;
      } else {  // what isn't there may be NaN
        if (query >= first && query < last) sum[r] += low;
        if (query + 1 >= first && query + 1 < last) sum[r] += high;
      }
    }
  }
#pragma unroll
  for (float& x : sum) {
    x += __shfl_xor_sync(~0U, x, 1);
    x += __shfl_xor_sync(~0U, x, 2);
  }
}

template <class T, int head_dim>
__device__ void consume(const Params& p, Shared<head_dim>& shared) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x % 128 / 32;
  const int warpgroup = threadIdx.x / 128;
  const int row_of_item = warpgroup / 2;
  const int half = warpgroup % 2;
  Ring<slots> slot;
  Ring<Shared<head_dim>::stages> stage;
  // Calls use(keys, columns there are) for each tile of keys that the row sees, and passes over the item's others.
  const auto for_each_tile = [&](const Item& item, int visible, auto&& use) {
    for (int tile = 0; tile < item.tiles; ++tile, stage.next()) {
      shared.k_full[stage.at].wait(stage.parity);
      use(shared.k[stage.at], visible - tile * tile_tokens, tile, [&] {
        if (lane == 0) shared.k_free[stage.at].arrive();
      });
    }
  };

  for (int index = blockIdx.x; index < p.items(); index += gridDim.x, slot.next()) {
    const Item item(p, index);
    const int visible = Item::visible_of(p, item.block + row_of_item);
    const unsigned char* queries = shared.q[slot.at][row_of_item];
    LogSum* log_sums = shared.log_sums[slot.at][row_of_item];
    const int row = item.block + row_of_item - p.first_row;
    // Of the row's 128 tokens, those that are queries of this call.
    const std::int64_t first_token = (item.block + row_of_item) * std::int64_t{block_tokens} - p.q_offset;
    const int first = static_cast<int>(max(-first_token, std::int64_t{0}));
    const int last = static_cast<int>(min(p.q_len - first_token, std::int64_t{block_tokens}));
    shared.q_full[slot.at].wait(slot.parity);

    Statistics statistics[2];
    for_each_tile(item, visible, [&](const unsigned char* keys, int valid, int, auto&& release) {
      if (valid <= 0) return release();
      float s[64];
      start_product<T, head_dim>(s, queries, half * 64, keys);
      sm90::wait<0>();
      sm90::pin(s);
      release();
      fold(s, valid, p.scale_log2, statistics);
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      statistics[r].merge_across_lanes(p.scale_log2);
      const int query = half * 64 + warp * 16 + lane / 4 + r * 8;
      if (lane % 4 == 0) log_sums[query] = {statistics[r].max, log2f(statistics[r].sum)};
    }
    sm90::named_wait(1 + row_of_item, 256);  // the other half of the row's queries

    float* scores = p.scores + item.head * p.causal_blocks + row * static_cast<std::int64_t>(p.first_row) +
                    row * (row + std::int64_t{1}) / 2;
    for_each_tile(item, visible, [&](const unsigned char* keys, int valid, int tile, auto&& release) {
      if (valid <= half * 64) return release();
      float s[64];
      start_product<T, head_dim>(s, keys, half * 64, queries);
      sm90::wait<0>();
      sm90::pin(s);
      release();
      float sum[2] = {};
      sum_weights(s, p.scale_log2, log_sums, first, last, sum);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int block = half * 64 + warp * 16 + lane / 4 + r * 8;
        if (lane % 4 == 0 && block < valid)
          scores[tile * tile_tokens + block] = sum[r] / static_cast<float>(last - first);
      }
    });
    if (lane == 0) shared.q_free[slot.at].arrive();
  }
}

template <class T, int head_dim>
__global__ void __launch_bounds__(threads, 1)
    score_queries(const __grid_constant__ Params p, const __grid_constant__ Maps maps) {
  extern __shared__ unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<head_dim>*>(memory + (1024 - sm90::shared_address(memory) % 1024) % 1024);
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  if (threadIdx.x / 128 < consumers) {
    sm90::take_registers<consumer_registers>();
    consume<T, head_dim>(p, shared);
  } else {
    sm90::give_registers<producer_registers>();
    if (threadIdx.x % 128 == 0) produce<head_dim>(p, maps, shared);
  }
}

}  // namespace

cudaError_t score_per_query(const ScoreArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const int blocks_per_segment = g.segment / g.block;
  const std::int64_t first_dense_row = std::max<std::int64_t>(g.rows() - args.dense_last_rows, 0);
  const std::int64_t first_block = std::max<std::int64_t>(g.first_row(), blocks_per_segment);
  const std::int64_t last_block = g.first_row() + first_dense_row - 1;
  if (last_block < first_block) return cudaSuccess;
  const Params p{.scores = args.scores,
                 .heads = static_cast<int>(g.shape.batch * g.shape.q_heads),
                 .q_heads = static_cast<int>(g.shape.q_heads),
                 .heads_of_order = static_cast<int>(g.shape.q_heads / args.order_heads),
                 .first_pair = static_cast<int>(first_block / rows_of_item),
                 .last_pair = static_cast<int>(last_block / rows_of_item),
                 .first_row = static_cast<int>(g.first_row()),
                 .first_dense_row = static_cast<int>(first_dense_row),
                 .blocks_per_segment = blocks_per_segment,
                 .causal_blocks = g.causal_blocks_per_head(),
                 .q_offset = g.q_offset(),
                 .q_len = g.shape.q_len,
                 .scale_log2 = static_cast<float>(args.scale / std::log(2.0))};
  const std::int64_t pooled_head = permuted_blocks(g) * g.shape.head_dim;
  const ConstView pooled{args.pooled_k, args.q.dtype, args.order_heads * pooled_head, pooled_head, g.shape.head_dim};
  Maps maps;
  if (!make_tensor_map(maps.q, args.q, g.shape.batch, g.shape.q_heads, g.shape.q_len, g.shape.head_dim, tile_tokens) ||
      !make_tensor_map(maps.pooled_k, pooled, g.shape.batch, args.order_heads, permuted_blocks(g), g.shape.head_dim,
                       tile_tokens))
    return cudaErrorInvalidValue;

  int device = 0;
  int multiprocessors = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess)
    return error;
  return dispatch(args.q.dtype, g.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    constexpr int shared_bytes = sizeof(Shared<dim>) + 1024;  // to align it
    static_assert(shared_bytes <= 227 * 1024);
    const auto kernel = score_queries<T, dim>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    const int items = (p.last_pair - p.first_pair + 1) * p.heads;
    kernel<<<std::min(items, multiprocessors), threads, shared_bytes, stream>>>(p, maps);
    return cudaGetLastError();
  });
}

}  // namespace pbsattn::cuda
