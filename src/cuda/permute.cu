// Stage one on Hopper: keys in the order of the attention that the last queries pay them, in two launches.
//
// 1. score_statistics: log-sum-exp of each scoring query over all keys of complete segments, in parts. A CTA takes one
//    *unit* of keys and two query heads that share them. Each of its two warpgroups multiplies one head's 128 queries,
//    64 at a time, so that the softmax of one half runs under the product of the other:
//        S[query][key] = Q K^T (wgmma, both from shared memory), max and sum of exp2 per query, in registers.
//    A third warpgroup meanwhile pools Q, which is bound by memory as the others are by arithmetic.
// 2. reorder: a CTA takes one segment of one KV head and goes through its query heads:
//        S^T[key][query] = K Q^T, score[key] = sum over queries of exp2(S^T - log-sum-exp), rank of each key by
//        counting the keys before it, then K and V written in that order, 16 bytes a thread, with K's block means.
//    Two CTAs share a multiprocessor, so one computes while the other writes.
//
// Scores are never divided by the number of queries or heads: that would not change their order.
// The least traffic is Q, K and V once, permuted K and V once for each order: 3.8 GB at 128K tokens, 32/8 heads and
// head_dim 128, an order for each query head.
#include <cmath>

#include "cuda/pool.cuh"
#include "cuda/shared_product.cuh"
#include "cuda/stages.h"

namespace pbsattn::cuda {
namespace {

constexpr int max_units = 16;  // parts of a log-sum-exp
constexpr int min_unit_keys = 1024;

// How keys are cut for score_statistics: by the sequence's length alone, so that the same input gives the same bits
// however heads are grouped.
struct Units {
  std::int64_t keys;  // of one unit: whole tiles
  int count;
};
Units units_of(const Geometry& g) {
  const std::int64_t even = ceil_div(ceil_div(g.permuted_len(), max_units), tile_tokens) * tile_tokens;
  const std::int64_t keys = std::max<std::int64_t>(even, min_unit_keys);
  return {keys, static_cast<int>(ceil_div(g.permuted_len(), keys))};
}

struct Tensor {
  const void* data;
  std::int64_t batch_stride, head_stride, token_stride;

  template <class T>
  __device__ const T* head(std::int64_t batch, std::int64_t head_index) const {
    return static_cast<const T*>(data) + batch * batch_stride + head_index * head_stride;
  }
};

struct Params {
  Tensor scoring_queries, k, v;
  int q_heads, kv_heads, group, batch;
  int queries;  // that score, 1 .. 128
  int segment;
  std::int64_t permuted_len;
  std::int64_t unit_keys;
  int units;
  float scale_log2;
  bool shared_order;  // one order for the query heads of a KV head
  PoolArgs pool_q;
  float2* statistics;  // [batch][q_heads][units][128]: max and sum, in base 2
  void *permuted_k, *permuted_v, *pooled_k;
  std::int32_t* order;
  std::int32_t* sink_block;
};

// ------------------------------------------------------------------------------------------ tiles in shared memory

__device__ inline void copy_async(std::uint32_t to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0) : "memory");
}
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int pending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Starts the copy of `rows` rows; the tile's other rows become zero.
template <class T, int head_dim, int threads>
__device__ void load_tile(unsigned char* tile, const T* from, std::int64_t stride, int rows, int thread) {
  using Layout = Tile<head_dim>;
  const std::uint32_t to = sm90::shared_address(tile);
#pragma unroll
  for (int i = 0; i < tile_tokens * Layout::chunks / threads; ++i) {
    const int row = (i * threads + thread) / Layout::chunks;
    const int chunk = thread % Layout::chunks;
    copy_async(to + Layout::offset(row, chunk), row < rows ? from + row * stride + chunk * 8 : from, row < rows);
  }
}

// ----------------------------------------------------------------------------------------------- score_statistics

// The online softmax's state of a query: largest score so far and sum of exp2(score - max).
struct Statistics {
  float max = -INFINITY;
  float sum = 0;

  // Scores of -inf alone leave max at -inf; subtracting 0 instead keeps NaN out of the sum.
  __device__ static float finite_or_zero(float x) { return x == -INFINITY ? 0.0F : x; }

  __device__ void merge(Statistics other) {
    const float larger = fmaxf(max, other.max);
    const float shift = finite_or_zero(larger);
    sum = sum * sm90::exp2_fast(max - shift) + other.sum * sm90::exp2_fast(other.max - shift);
    max = larger;
  }
};

// Folds a product into the state of this thread's two queries.
__device__ inline void fold(const float (&s)[64], float scale_log2, Statistics (&statistics)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = s[2 * r];
#pragma unroll
    for (int i = 0; i < 64; i += 4) largest = fmaxf(largest, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
    Statistics part;
    part.max = largest * scale_log2;
    const float shift = Statistics::finite_or_zero(fmaxf(part.max, statistics[r].max));
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      sum[0] += sm90::exp2_fast(fmaf(s[i + 2 * r], scale_log2, -shift));
      sum[1] += sm90::exp2_fast(fmaf(s[i + 2 * r + 1], scale_log2, -shift));
    }
    statistics[r].sum = statistics[r].sum * sm90::exp2_fast(statistics[r].max - shift) + (sum[0] + sum[1]);
    statistics[r].max = fmaxf(part.max, statistics[r].max);
  }
}

constexpr int statistics_threads = 384;
constexpr int multiplying_threads = 256;
constexpr int heads_at_once = 2;
constexpr int key_stages = 3;
constexpr int tiles_of_round = 4;

// The barrier of the two warpgroups that multiply; barrier 0 is __syncthreads(), which the third would have to join.
__device__ inline void multiplying_barrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(multiplying_threads) : "memory");
}

template <int head_dim>
constexpr int statistics_shared_bytes = (heads_at_once + key_stages) * Tile<head_dim>::bytes + 1024;

template <class T, int head_dim>
__global__ void __launch_bounds__(statistics_threads, 1) score_statistics(const __grid_constant__ Params p) {
  using Layout = Tile<head_dim>;
  extern __shared__ unsigned char shared[];
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 2) {
    sm90::give_registers<88>();
    const int cta = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int ctas = gridDim.x * gridDim.y * gridDim.z;
    const std::int64_t items = p.batch * p.pool_q.heads * p.pool_q.rows;
    for (std::int64_t item = cta * 4 + threadIdx.x % 128 / 32; item < items; item += ctas * 4)
      pool_row<T, head_dim>(p.pool_q, item, threadIdx.x % 32);
  } else {
    sm90::take_registers<208>();
    unsigned char* queries = shared + (1024 - sm90::shared_address(shared) % 1024) % 1024;
    unsigned char* keys = queries + heads_at_once * Layout::bytes;
    const int batch = blockIdx.z / p.kv_heads;
    const int kv_head = blockIdx.z % p.kv_heads;
    const std::int64_t first_key = blockIdx.x * p.unit_keys;
    const int tiles = static_cast<int>(min(p.unit_keys, p.permuted_len - first_key) / tile_tokens);
    const T* source = p.k.head<T>(batch, kv_head) + first_key * p.k.token_stride;
    const auto load_keys = [&](int tile) {
      load_tile<T, head_dim, multiplying_threads>(keys + tile % key_stages * Layout::bytes,
                                                  source + tile * tile_tokens * p.k.token_stride, p.k.token_stride,
                                                  tile_tokens, threadIdx.x);
      commit_copies();
    };
    // The last head of an odd group has no partner: both warpgroups compute it, since a branch around the products
    // would make the compiler wait after each of them.
    const auto q_head = [&](int i) {
      return kv_head * p.group + min(static_cast<int>(blockIdx.y) * heads_at_once + i, p.group - 1);
    };
    for (int i = 0; i < heads_at_once; ++i)
      load_tile<T, head_dim, multiplying_threads>(queries + i * Layout::bytes,
                                                  p.scoring_queries.head<T>(batch, q_head(i)),
                                                  p.scoring_queries.token_stride, p.queries, threadIdx.x);
    load_keys(0);

    Statistics low[2], high[2];  // queries 0 .. 63 and 64 .. 127
    float s_low[64], s_high[64];
    const unsigned char* my_queries = queries + warpgroup * Layout::bytes;
    const auto start_half = [&](float(&scores)[64], int tile, int first_query) {
      start_product<T, head_dim>(scores, my_queries, first_query, keys + tile % key_stages * Layout::bytes);
    };
    // Waits for tile's keys. After the barrier every product of earlier tiles but the last is done, so the stage of
    // tile - 2 is free; it becomes that of tile + 1.
    const auto take_tile = [&](int tile) {
      wait_copies<0>();
      sm90::fence_async_shared();
      multiplying_barrier();
      if (tile + 1 < tiles) load_keys(tile + 1);
    };
    // The compiler keeps products in flight through straight code only, hence rounds of several tiles.
    const auto round = [&]<int length>(std::integral_constant<int, length>, int first_tile) {
      take_tile(first_tile);
      start_half(s_low, first_tile, 0);
#pragma unroll
      for (int i = 0; i < length; ++i) {
        const bool last = i + 1 == length;
        start_half(s_high, first_tile + i, 64);
        sm90::wait<1>();
        sm90::pin(s_low);
        fold(s_low, p.scale_log2, low);
        if (!last) {
          take_tile(first_tile + i + 1);
          start_half(s_low, first_tile + i + 1, 0);
          sm90::wait<1>();
        } else {
          sm90::wait<0>();
        }
        sm90::pin(s_high);
        fold(s_high, p.scale_log2, high);
      }
    };
    int tile = 0;
    for (; tile + tiles_of_round <= tiles; tile += tiles_of_round)
      round(std::integral_constant<int, tiles_of_round>{}, tile);
    for (; tile < tiles; ++tile) round(std::integral_constant<int, 1>{}, tile);

    const int lane = threadIdx.x % 32;
    const std::int64_t head = static_cast<std::int64_t>(batch) * p.q_heads + q_head(warpgroup);
    float2* out = p.statistics + (head * p.units + blockIdx.x) * 128;
    const bool writes = lane % 4 == 0 && blockIdx.y * heads_at_once + warpgroup < p.group;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Statistics total = i < 2 ? low[i] : high[i - 2];
      for (int offset = 1; offset < 4; offset *= 2) {
        Statistics other;
        other.max = __shfl_xor_sync(~0U, total.max, offset);
        other.sum = __shfl_xor_sync(~0U, total.sum, offset);
        total.merge(other);
      }
      const int query = i / 2 * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4 + i % 2 * 8;
      if (writes) out[query] = make_float2(total.max, total.sum);
    }
  }
}

// -------------------------------------------------------------------------------------------------------- reorder

constexpr int reorder_threads = 256;
constexpr int piece_tiles = 2;  // key tiles in shared memory at a time

template <int head_dim>
std::size_t reorder_shared_bytes(std::int64_t segment) {
  return (piece_tiles + 1) * Tile<head_dim>::bytes + 1024                              // keys, queries, alignment
         + segment * (sizeof(float) + sizeof(std::int32_t))                            // scores, order
         + 128 * sizeof(float) + 2 * reorder_threads / 32 * head_dim * sizeof(float);  // log-sum-exp, block sums
}

// Log-sum-exp of scoring query `query`, in base 2: +inf, so that its weights are 0, for one that isn't there.
__device__ inline float log_sum(const Params& p, std::int64_t head, int query) {
  if (query >= p.queries) return INFINITY;
  const float2* parts = p.statistics + head * p.units * 128 + query;
  Statistics total;
#pragma unroll 8
  for (int i = 0; i < p.units; ++i) {
    Statistics part;
    part.max = parts[i * 128].x;
    part.sum = parts[i * 128].y;
    total.merge(part);
  }
  return total.max + log2f(total.sum);
}

// What sorts descending as an integer: scores are not negative; NaN comes last.
__device__ inline int sortable(float score) {
  return isnan(score) ? -1 : __float_as_int(score);
}

// How many of four integers are at least `bound`.
__device__ inline int count_at_least(const int* values, int bound) {
  const int4 four = *reinterpret_cast<const int4*>(values);
  return (four.x >= bound) + (four.y >= bound) + (four.z >= bound) + (four.w >= bound);
}

// whole: the segment's keys fit in shared memory and are loaded once; else piece by piece for each head.
template <class T, int head_dim, bool whole>
__global__ void __launch_bounds__(reorder_threads, 2) reorder(const __grid_constant__ Params p) {
  using Layout = Tile<head_dim>;
  constexpr int warps = reorder_threads / 32;
  constexpr int rows_at_once = reorder_threads / Layout::chunks;
  extern __shared__ unsigned char shared[];
  unsigned char* keys = shared + (1024 - sm90::shared_address(shared) % 1024) % 1024;
  unsigned char* queries = keys + piece_tiles * Layout::bytes;
  int* score = reinterpret_cast<int*>(queries + Layout::bytes);  // floats, then sortable integers
  int* from = score + p.segment;                                 // slot -> key, both within the segment
  float* log_sums = reinterpret_cast<float*>(from + p.segment);
  float* block_sums = log_sums + 128;  // [2][warps][head_dim]

  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warpgroup = thread / 128;
  const int batch = blockIdx.z;
  const int kv_head = blockIdx.y;
  const std::int64_t first_token = static_cast<std::int64_t>(blockIdx.x) * p.segment;
  const T* source_k = p.k.head<T>(batch, kv_head) + first_token * p.k.token_stride;
  const T* source_v = p.v.head<T>(batch, kv_head) + first_token * p.v.token_stride;
  const int tiles = p.segment / tile_tokens;

  const auto load_queries = [&](int head) {
    load_tile<T, head_dim, reorder_threads>(queries, p.scoring_queries.head<T>(batch, kv_head * p.group + head),
                                            p.scoring_queries.token_stride, p.queries, thread);
  };
  const auto load_keys = [&](int piece) {
    for (int i = 0; i < min(piece_tiles, tiles - piece * piece_tiles); ++i)
      load_tile<T, head_dim, reorder_threads>(keys + i * Layout::bytes,
                                              source_k + (piece * piece_tiles + i) * tile_tokens * p.k.token_stride,
                                              p.k.token_stride, tile_tokens, thread);
  };

  load_queries(0);
  if constexpr (whole) load_keys(0);
  int parity = 0;
  for (int head = 0; head < p.group; ++head) {
    const std::int64_t q_head = static_cast<std::int64_t>(batch) * p.q_heads + kv_head * p.group + head;
    if (thread < 128) log_sums[thread] = log_sum(p, q_head, thread);
    for (int piece = 0; piece * piece_tiles < tiles; ++piece) {
      if constexpr (!whole) load_keys(piece);
      commit_copies();
      wait_copies<0>();
      sm90::fence_async_shared();
      __syncthreads();
      if (piece * piece_tiles + warpgroup < tiles) {
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          float s[64];
          start_product<T, head_dim>(s, keys + warpgroup * Layout::bytes, half * 64, queries);
          sm90::wait<0>();
          sm90::pin(s);
          float sum[2] = {};
#pragma unroll
          for (int i = 0; i < 64; i += 4) {
            const float2 log_sum_pair = *reinterpret_cast<const float2*>(log_sums + i * 2 + lane % 4 * 2);
#pragma unroll
            for (int r = 0; r < 2; ++r)
              sum[r] += sm90::exp2_fast(fmaf(s[i + 2 * r], p.scale_log2, -log_sum_pair.x)) +
                        sm90::exp2_fast(fmaf(s[i + 2 * r + 1], p.scale_log2, -log_sum_pair.y));
          }
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            sum[r] += __shfl_xor_sync(~0U, sum[r], 1);
            sum[r] += __shfl_xor_sync(~0U, sum[r], 2);
            const int key =
                (piece * piece_tiles + warpgroup) * tile_tokens + half * 64 + thread % 128 / 32 * 16 + lane / 4 + r * 8;
            if (lane % 4 == 0)
              score[key] = __float_as_int(sum[r] + (p.shared_order && head > 0 ? __int_as_float(score[key]) : 0.0F));
          }
        }
      }
      __syncthreads();
    }
    if (head + 1 < p.group) load_queries(head + 1);
    if (p.shared_order && head + 1 < p.group) continue;

    for (int key = thread; key < p.segment; key += reorder_threads) score[key] = sortable(__int_as_float(score[key]));
    __syncthreads();
    for (int key = thread; key < p.segment; key += reorder_threads) {
      const int mine = score[key];
      int rank = 0;
      // Of equal scores the earlier key comes first.
      const int warp_begin = key - lane;
      for (int other = 0; other < warp_begin; other += 4) rank += count_at_least(score + other, mine);
      for (int other = 0; other < 32; ++other)
        rank += score[warp_begin + other] >= mine + static_cast<int>(other >= lane);
      for (int other = warp_begin + 32; other < p.segment; other += 4) rank += count_at_least(score + other, mine + 1);
      from[rank] = key;
    }
    __syncthreads();

    const std::int64_t out_head = p.shared_order ? static_cast<std::int64_t>(batch) * p.kv_heads + kv_head : q_head;
    const std::int64_t out_token = out_head * p.permuted_len + first_token;
    for (int slot = thread; slot < p.segment; slot += reorder_threads) {
      p.order[out_token + slot] = static_cast<std::int32_t>(first_token) + from[slot];
      if (first_token == 0 && from[slot] == 0) p.sink_block[out_head] = slot / block_tokens;
    }
    const int chunk = thread % Layout::chunks;
    for (int block = 0; block < p.segment / block_tokens; ++block) {
      float sum[8] = {};
#pragma unroll 1
      for (int row = 0; row < block_tokens; row += 4 * rows_at_once) {
        uint4 k_chunk[4], v_chunk[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = from[block * block_tokens + row + i * rows_at_once + thread / Layout::chunks];
          if constexpr (whole)
            k_chunk[i] = *reinterpret_cast<const uint4*>(keys + key / tile_tokens * Layout::bytes +
                                                         Layout::offset(key % tile_tokens, chunk));
          else
            k_chunk[i] = __ldg(reinterpret_cast<const uint4*>(source_k + key * p.k.token_stride) + chunk);
          v_chunk[i] = __ldg(reinterpret_cast<const uint4*>(source_v + key * p.v.token_stride) + chunk);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const std::int64_t slot = out_token + block * block_tokens + row + i * rows_at_once + thread / Layout::chunks;
          static_cast<uint4*>(p.permuted_k)[slot * Layout::chunks + chunk] = k_chunk[i];
          static_cast<uint4*>(p.permuted_v)[slot * Layout::chunks + chunk] = v_chunk[i];
          add_to<T>(sum, k_chunk[i]);
        }
      }
      add_across_lanes<Layout::chunks>(sum);
      float* sums = block_sums + parity * warps * head_dim;
      if (lane < Layout::chunks) {
        float4* mine = reinterpret_cast<float4*>(sums + thread / 32 * head_dim + chunk * 8);
        mine[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        mine[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
      }
      // One barrier a block: the other half of block_sums is written next.
      __syncthreads();
      if (thread < head_dim / 2) {
        float2 total = {};
        for (int i = 0; i < warps; ++i) {
          const float2 part = *reinterpret_cast<const float2*>(sums + i * head_dim + thread * 2);
          total.x += part.x;
          total.y += part.y;
        }
        const std::int64_t out = (out_token / block_tokens + block) * (head_dim / 2) + thread;
        static_cast<std::uint32_t*>(p.pooled_k)[out] = pack<T>(total.x / block_tokens, total.y / block_tokens);
      }
      parity ^= 1;
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- pool

constexpr int pool_threads = 128;

template <class T, int head_dim>
__global__ void __launch_bounds__(pool_threads)
    pool_rows(const __grid_constant__ PoolArgs args, std::int64_t items, std::int32_t* sink_block, std::int64_t sinks) {
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (pool_threads / 32) + threadIdx.x / 32;
  if (item < items) pool_row<T, head_dim>(args, item, threadIdx.x % 32);
  const std::int64_t sink = static_cast<std::int64_t>(blockIdx.x) * pool_threads + threadIdx.x;
  if (sink < sinks) sink_block[sink] = 0;  // token 0 stays where it is
}

cudaError_t launch_pool(const PoolArgs& args, DType dtype, std::int64_t head_dim, std::int64_t batch,
                        std::int32_t* sink_block, std::int64_t sinks, cudaStream_t stream) {
  const std::int64_t items = batch * args.heads * args.rows;
  const dim3 grid(static_cast<unsigned>(std::max(ceil_div(items, pool_threads / 32), ceil_div(sinks, pool_threads))));
  return dispatch(dtype, head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    pool_rows<T, dim><<<grid, pool_threads, 0, stream>>>(args, items, sink_block, sinks);
    return cudaPeekAtLastError();
  });
}

Tensor tensor(const ConstView& view) {
  return {view.data, view.batch_stride, view.head_stride, view.token_stride};
}

}  // namespace

std::size_t permute_scratch_size(const Geometry& geometry) {
  return geometry.shape.batch * geometry.shape.q_heads * units_of(geometry).count * 128 * sizeof(float2);
}

cudaError_t permute(const PermuteArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const Units units = units_of(g);
  Params p{.scoring_queries = tensor(args.inputs.q),
           .k = tensor(args.inputs.k),
           .v = tensor(args.inputs.v),
           .q_heads = static_cast<int>(g.shape.q_heads),
           .kv_heads = static_cast<int>(g.shape.kv_heads),
           .group = static_cast<int>(g.group()),
           .batch = static_cast<int>(g.shape.batch),
           .queries = static_cast<int>(g.scoring_queries()),
           .segment = g.segment,
           .permuted_len = g.permuted_len(),
           .unit_keys = units.keys,
           .units = units.count,
           .scale_log2 = static_cast<float>(args.scale / std::log(2.0)),
           .shared_order = args.scope == OrderScope::kv_head,
           .pool_q = pool_queries(args),
           .statistics = static_cast<float2*>(args.scratch),
           .permuted_k = args.k,
           .permuted_v = args.v,
           .pooled_k = args.pooled_k,
           .order = args.order,
           .sink_block = args.sink_block};
  constexpr std::int64_t element_bytes = 2;
  p.scoring_queries.data = static_cast<const unsigned char*>(args.inputs.q.data) +
                           (g.shape.q_len - g.scoring_queries()) * args.inputs.q.token_stride * element_bytes;

  return dispatch(args.inputs.k.dtype, g.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    const auto launch = [&](auto* kernel, dim3 grid, int threads, std::size_t shared_bytes) {
      const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
      if (error != cudaSuccess) return error;
      cudaLaunchConfig_t config{};
      config.gridDim = grid;
      config.blockDim = dim3(threads);
      config.dynamicSmemBytes = shared_bytes;
      config.stream = stream;
      return cudaLaunchKernelEx(&config, kernel, p);
    };
    const dim3 statistics_grid(p.units, static_cast<unsigned>(ceil_div(p.group, heads_at_once)), p.batch * p.kv_heads);
    const cudaError_t error =
        launch(score_statistics<T, dim>, statistics_grid, statistics_threads, statistics_shared_bytes<dim>);
    if (error != cudaSuccess) return error;
    const dim3 reorder_grid(static_cast<unsigned>(g.complete_segments()), p.kv_heads, p.batch);
    const std::size_t shared_bytes = reorder_shared_bytes<dim>(g.segment);
    return g.segment <= piece_tiles * tile_tokens
               ? launch(reorder<T, dim, true>, reorder_grid, reorder_threads, shared_bytes)
               : launch(reorder<T, dim, false>, reorder_grid, reorder_threads, shared_bytes);
  });
}

cudaError_t pool(const PermuteArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const ConstView& k = args.inputs.k;
  const cudaError_t error =
      launch_pool(pool_queries(args), args.inputs.q.dtype, g.shape.head_dim, g.shape.batch, nullptr, 0, stream);
  if (error != cudaSuccess) return error;
  const PoolArgs keys{k.data, k.batch_stride,   k.head_stride, k.token_stride, g.shape.kv_heads, permuted_blocks(g),
                      0,      g.permuted_len(), false,         args.pooled_k};
  return launch_pool(keys, k.dtype, g.shape.head_dim, g.shape.batch, args.sink_block, g.shape.batch * g.shape.kv_heads,
                     stream);
}

}  // namespace pbsattn::cuda
