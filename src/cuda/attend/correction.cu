// Correction::mean on Hopper: of each row the blocks before its own segment that it doesn't list answer as their means.
//
//     S = Q mean(K)^T    O' = softmax(S) mean(V)    lse' = log-sum-exp(S) + log(keys of a block)
//
// over those blocks, merged by log-sum-exp into the outputs and log-sum-exps that attend() left. All queries of a row
// see these blocks whole, so there is nothing to mask but the listed ones.
//
// A thread block takes a row, two warpgroups 64 queries each, 128 means at a time while the next are on their way (not
// at 256 columns, of which shared memory holds no more).
// Tiles of listed blocks alone are passed over.
//
// The least work at 128K tokens, 32 heads of 128: 1.1 TFLOP, 1.4 ms, if every block is left out.
#include <cmath>

#include "cuda/attend/attend.h"
#include "cuda/attend/merger.cuh"
#include "cuda/attend/softmax.cuh"
#include "cuda/geometry.cuh"
#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/lanes.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/online_sum.cuh"
#include "cuda/sm90/prologue.cuh"
#include "cuda/sm90/soft_cap.cuh"
#include "cuda/sm90/swizzled_tile.cuh"

namespace pbsattn::cuda {
namespace {

constexpr int threads = 256;
constexpr int word_bits = 32;
constexpr int tile_words = tile_tokens / word_bits;

struct Params {
  RowGrid grid;
  ConstView q;
  View out;
  float* lse;
  std::int64_t lse_batch_stride;
  Pooled pooled;
  BlockLists lists;
  float scale, scale_log2;
};

template <int head_dim, int head_dim_v>
struct Shared {
  static constexpr int stages = head_dim_v > 128 ? 1 : 2;
  static constexpr int out_stride = head_dim_v + 4;  // so that a warp's rows are in different banks
  struct Stages {
    unsigned char k[stages][SwizzledTile<head_dim>::bytes], v[stages][SwizzledTile<head_dim_v>::bytes];
  };
  alignas(1024) unsigned char q[SwizzledTile<head_dim>::bytes];
  union {
    alignas(1024) Stages means;
    float out[tile_tokens][out_stride];  // once all are multiplied
  };
  float lse[tile_tokens];
  std::uint32_t left_out[max_blocks / word_bits];  // a bit for each block before the own segment
};

// The thread block's row.
struct Row {
  __device__ explicit Row(const RowGrid& grid)
      : head(static_cast<int>(blockIdx.x)),
        // The last rows have the most blocks, so they start first.
        row(grid.first_sparse_row() + static_cast<int>(gridDim.y - 1 - blockIdx.y)),
        diagonal(grid.diagonal(row)),
        own_begin(grid.own_begin(diagonal)) {
    const Span present = grid.queries_of(diagonal);
    first_query = grid.first_query(diagonal) + present.begin;
    queries = present.count();
  }
  int head, row;
  int diagonal, own_begin;
  int first_query, queries;
};

// Sets the bits of the blocks that the row doesn't list; false: it lists all.
template <class Shared>
__device__ bool find_left_out(const Params& p, const Row& at, Shared& shared) {
  const std::int64_t tile = std::int64_t{at.head} * p.grid.rows + at.row;
  const int listed = p.lists.row_count[tile] - (at.diagonal + 1 - at.own_begin);
  if (listed == at.own_begin) return false;
  const int words = (at.own_begin + tile_tokens - 1) / tile_tokens * tile_words;
  for (int word = static_cast<int>(threadIdx.x); word < words; word += threads) {
    const int present = at.own_begin - word * word_bits;
    shared.left_out[word] = present >= word_bits ? ~0U : present > 0 ? (1U << present) - 1 : 0U;
  }
  __syncthreads();
  const std::int32_t* const list = p.lists.block + p.lists.row_start[tile];
  for (int i = static_cast<int>(threadIdx.x); i < listed; i += threads)
    atomicAnd(&shared.left_out[list[i] / word_bits], ~(1U << list[i] % word_bits));
  __syncthreads();
  return true;
}

// Merges the row's outputs and log-sum-exps with those in shared memory.
template <class T, int head_dim, int head_dim_v>
__device__ void merge_row(const Params& p, const Row& at, const Shared<head_dim, head_dim_v>& shared) {
  using Swizzled = SwizzledTile<head_dim_v>;
  const int chunk = static_cast<int>(threadIdx.x) % Swizzled::threads;
  const int batch = at.head / p.grid.q_heads;
  const int head = at.head % p.grid.q_heads;
  T* const out = static_cast<T*>(p.out.data) + batch * p.out.batch_stride + head * p.out.head_stride +
                 at.first_query * p.out.token_stride + chunk * 8;
  float* const lse = p.lse + batch * p.lse_batch_stride + std::int64_t{head} * p.grid.q_len + at.first_query;
  for (int query = static_cast<int>(threadIdx.x) / Swizzled::threads; query < tile_tokens;
       query += threads / Swizzled::threads) {
    const bool present = query < at.queries && chunk < Swizzled::chunks;
    const Merger merger(present ? lse[query] : -INFINITY, shared.lse[query]);
    __syncwarp();  // all lanes of the query have read its sum
    if (!present) continue;
    auto* const to = reinterpret_cast<uint4*>(out + query * p.out.token_stride);
    float sums[8] = {};
    add_to<T>(sums, *to);  // NaN spoils them whatever its factor
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = merger.a * sums[i] + merger.b * shared.out[query][chunk * 8 + i];
    *to = make_uint4(pack<T>(sums[0], sums[1]), pack<T>(sums[2], sums[3]), pack<T>(sums[4], sums[5]),
                     pack<T>(sums[6], sums[7]));
    if (chunk == 0) lse[query] = merger.lse;
  }
}

template <class T, int head_dim, int head_dim_v, class Cap>
__global__ void __launch_bounds__(threads, 1)
    correct_rows(const __grid_constant__ Params p, const __grid_constant__ Cap cap) {
  auto& shared = aligned_shared<Shared<head_dim, head_dim_v>>();
  constexpr int stages = Shared<head_dim, head_dim_v>::stages;
  const Row at(p.grid);
  if (!find_left_out(p, at, shared)) return;

  const T* const queries =
      head_of<T>(p.q, at.head / p.grid.q_heads, at.head % p.grid.q_heads) + at.first_query * p.q.token_stride;
  const int order_head = p.grid.order_head(at.head);
  const T* const keys = static_cast<const T*>(p.pooled.k) + order_head * p.pooled.k_blocks * head_dim;
  const T* const values = static_cast<const T*>(p.pooled.v) + order_head * p.pooled.v_blocks * head_dim_v;
  const int tiles = (at.own_begin + tile_tokens - 1) / tile_tokens;
  const auto next_tile = [&](int tile) {
    const auto left_out = [&](int word) { return shared.left_out[tile * tile_words + word]; };
    while (tile < tiles && (left_out(0) | left_out(1) | left_out(2) | left_out(3)) == 0) ++tile;
    return tile;
  };
  // Means of listed blocks are left out, since values that are not finite would spoil sums with a weight of 0 too.
  const auto load_means = [&](int tile, int stage) {
    const auto row_of = [&](const T* means, int width) {
      return [=, &shared](int i) -> const T* {
        const bool left_out = (shared.left_out[tile * tile_words + i / word_bits] >> i % word_bits & 1) != 0;
        return left_out ? means + (tile * tile_tokens + static_cast<std::int64_t>(i)) * width : nullptr;
      };
    };
    gather_tile<T, head_dim, threads>(shared.means.k[stage], keys, row_of(keys, head_dim));
    gather_tile<T, head_dim_v, threads>(shared.means.v[stage], values, row_of(values, head_dim_v));
    commit_copies();
  };
  gather_tile<T, head_dim, threads>(
      shared.q, queries, [&](int i) -> const T* { return i < at.queries ? queries + i * p.q.token_stride : nullptr; });
  int tile = next_tile(0);
  load_means(tile, 0);

  constexpr int outputs = head_dim_v / 2;  // registers of O
  const int half = static_cast<int>(threadIdx.x) / 128 * 64;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int column = lane % 4 * 2;
  attention::Softmax softmax;
  float s[64], o[outputs];
#pragma unroll
  for (float& x : o) x = 0;
  for (int stage = 0; tile < tiles; stage ^= stages - 1) {
    wait_copies<0>();
    sm90::fence_async_shared();
    __syncthreads();  // and all products of the tile before are done, so its means may go
    std::uint32_t left_out[tile_words];
#pragma unroll
    for (int word = 0; word < tile_words; ++word) left_out[word] = shared.left_out[tile * tile_words + word];
    tile = next_tile(tile + 1);
    if (stages == 2 && tile < tiles) load_means(tile, stage ^ 1);

    start_product<T, head_dim>(s, shared.q, half, shared.means.k[stage]);
    sm90::wgmma_wait<0>();
    sm90::pin(s);
    apply(cap, s);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int bit = i / 4 * 8 + i % 2;  // and the thread's column
      if ((left_out[bit / word_bits] >> (bit % word_bits + column) & 1) == 0) s[i] = -INFINITY;
    }
    float factor[2];
    if (softmax.raise(s, p.scale_log2, factor)) {
#pragma unroll
      for (int i = 0; i < outputs; ++i) o[i] *= factor[i % 4 / 2];
    }
    softmax.weigh(s, p.scale_log2, factor);
    std::uint32_t weights[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) weights[i] = pack<T>(s[2 * i], s[2 * i + 1]);
    using Values = SwizzledTile<head_dim_v>;
    const std::uint64_t operand = sm90::operand<Values::panel>(shared.means.v[stage], Values::panel_bytes);
    sm90::pin(o);
    sm90::wgmma_fence();
#pragma unroll
    for (int key = 0; key < tile_tokens; key += 16)
      sm90::wgmma<T>(o, weights + key / 4, sm90::advance(operand, key * Values::row_bytes));
    sm90::wgmma_commit();
    sm90::wgmma_wait<0>();
    sm90::pin(o);
    if constexpr (stages == 1) {
      __syncthreads();  // all products are done
      if (tile < tiles) load_means(tile, stage);
    }
  }

  __syncthreads();  // the outputs take the means' place
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(softmax.sum[r]);
    const float inverse = sum == 0 ? 0 : 1 / sum;
    const int query = half + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane / 4 + 8 * r;
    if (lane % 4 == 0)
      shared.lse[query] =
          sum == 0 ? -INFINITY : fmaf(softmax.maximum[r], p.scale, logf(sum * static_cast<float>(block_tokens)));
#pragma unroll
    for (int i = 0; i < outputs; i += 4)
#pragma unroll
      for (int c = 0; c < 2; ++c) shared.out[query][i * 2 + column + c] = o[i + 2 * r + c] * inverse;
  }
  __syncthreads();
  merge_row<T>(p, at, shared);
}

}  // namespace

cudaError_t correct(const AttendArgs& args, const Pooled& pooled, std::int64_t dense_last_rows, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const RowGrid grid(g, args.permuted.order_heads);
  const std::int64_t rows = g.rows() - dense_last_rows - grid.first_sparse_row();
  if (rows <= 0) return cudaSuccess;
  const Params p{.grid = grid,
                 .q = args.inputs.q,
                 .out = args.outputs.out,
                 .lse = args.outputs.lse,
                 .lse_batch_stride = args.lse_batch_stride,
                 .pooled = pooled,
                 .lists = args.lists,
                 .scale = args.scale,
                 .scale_log2 = scale_log2(args.scale)};
  return dispatch(p.q.dtype, g.shape, [&](auto element, auto keys, auto values) {
    constexpr int shared_bytes = aligned_bytes<Shared<keys(), values()>>;
    static_assert(shared_bytes <= 227 * 1024);
    const dim3 thread_blocks(grid.heads, static_cast<unsigned>(rows));
    return with_cap<keys()>(args.softcap, args.scale, [&]<class Cap>(const Cap& cap) {
      return launch(correct_rows<decltype(element), keys(), values(), Cap>, thread_blocks, threads, shared_bytes,
                    stream, Start::after_earlier_kernels, p, cap);
    });
  });
}

}  // namespace pbsattn::cuda
