// Block scores of BlockScore::energy on Hopper: of each row the sum over its queries of exp(query . pooled key *
// scale), as a logarithm of base 2, which select() exponentiates:
//     S^T[block][query] = K Q^T      log2 of the sum over queries of exp2(S^T * scale * log2(e))
// A block's sum needs no other block's, so one product does. Keys before the row's own segment are means of permuted
// keys, those in it of keys where they were. A block that the row's last query doesn't see whole has no energy.
//
// A thread block takes a row: two warpgroups, each half of the 128 pooled keys that are multiplied at a time, while the
// next are on their way. Two thread blocks a multiprocessor, so that one multiplies while the other exponentiates.
//
// The least work at 128K tokens, 32 heads of 128: 0.55 TFLOP and 2.1 G exponentials, 0.6 ms each.
#include <algorithm>
#include <cmath>

#include "cuda/limits.h"
#include "cuda/select/scores/scores.h"
#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/online_sum.cuh"
#include "cuda/sm90/swizzled_tile.cuh"

namespace pbsattn::cuda {
namespace {

constexpr int threads = 256;
constexpr int stages = 2;

struct Params {
  ConstView q;
  const void *pooled_k, *pooled_own;
  float* scores;  // of tile [batch][q_head][row] where its list will be
  std::int64_t q_offset, kv_len, causal_blocks;
  std::int64_t pooled_blocks, blocks;  // of a head in pooled_k, in pooled_own
  int first_row, first_scored_row;
  int q_heads, group, order_group;
  int blocks_per_segment;
  float scale_log2;
};

template <int head_dim>
struct Shared {
  alignas(1024) unsigned char q[SwizzledTile<head_dim>::bytes];
  alignas(1024) unsigned char k[stages][SwizzledTile<head_dim>::bytes];
};

// log2 of the sum over the row's `count` queries of exp2(product * scale_log2), of this thread's block `r` of two; the
// same in the four lanes that share it. NaN where a product is, or is +inf.
__device__ inline float log_energy(const float (&s)[64], int r, int count, float scale_log2) {
  const int column = threadIdx.x % 4 * 2;
  Statistics total;
  const auto product = [&](int i) {
    const int query = i / 4 * 8 + column + i % 2;
    return query < count ? s[i] : -INFINITY;
  };
#pragma unroll
  for (int i = 0; i < 64; ++i)
    if (i % 4 / 2 == r) total.max = fmaxf(total.max, product(i));
  const float shift = Statistics::finite_or_zero(total.max);
#pragma unroll
  for (int i = 0; i < 64; ++i)
    if (i % 4 / 2 == r) total.sum += sm90::exp2_fast((product(i) - shift) * scale_log2);
  total.merge_across_lanes(scale_log2);
  return total.max * scale_log2 + log2f(total.sum);
}

template <class T, int head_dim>
__global__ void __launch_bounds__(threads, 2) energies(const __grid_constant__ Params p) {
  extern __shared__ unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<head_dim>*>(memory + (1024 - sm90::shared_address(memory) % 1024) % 1024);
  const int head = static_cast<int>(blockIdx.x);  // of all batch entries
  // The last rows have the most blocks, so they start first.
  const int row = p.first_scored_row + static_cast<int>(gridDim.y - 1 - blockIdx.y);
  const int diagonal = p.first_row + row;
  const int own_begin = diagonal / p.blocks_per_segment * p.blocks_per_segment;
  const std::int64_t begin = max(diagonal * std::int64_t{block_tokens}, p.q_offset);  // tokens
  const std::int64_t end = min((diagonal + std::int64_t{1}) * block_tokens, p.kv_len);
  const int count = static_cast<int>(end - begin);
  const int whole = static_cast<int>(end / block_tokens);
  const int tiles = (whole + tile_tokens - 1) / tile_tokens;
  float* const scores = p.scores + head * p.causal_blocks + row * static_cast<std::int64_t>(p.first_row) +
                        row * (row + std::int64_t{1}) / 2;

  const T* const queries = static_cast<const T*>(p.q.data) + head / p.q_heads * p.q.batch_stride +
                           head % p.q_heads * p.q.head_stride + (begin - p.q_offset) * p.q.token_stride;
  const T* const moved = static_cast<const T*>(p.pooled_k) + head / p.order_group * p.pooled_blocks * head_dim;
  const T* const original = static_cast<const T*>(p.pooled_own) + head / p.group * p.blocks * head_dim;
  const auto load_keys = [&](int tile) {
    gather_tile<T, head_dim, threads>(shared.k[tile % stages], original, [&](int i) -> const T* {
      const int block = tile * tile_tokens + i;
      if (block >= whole) return nullptr;
      return (block < own_begin ? moved : original) + static_cast<std::int64_t>(block) * head_dim;
    });
    commit_copies();
  };
  gather_tile<T, head_dim, threads>(
      shared.q, queries, [&](int i) -> const T* { return i < count ? queries + i * p.q.token_stride : nullptr; });
  load_keys(0);
  if (threadIdx.x == 0 && whole == diagonal) scores[diagonal] = -INFINITY;

  const int half = static_cast<int>(threadIdx.x) / 128 * 64;
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<0>();
    sm90::fence_async_shared();
    __syncthreads();  // and all products of the tile before are done, so its keys may go
    if (tile + 1 < tiles) load_keys(tile + 1);
    float s[64];
    start_product<T, head_dim>(s, shared.k[tile % stages], half, shared.q);
    sm90::wgmma_wait<0>();
    sm90::pin(s);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float energy = log_energy(s, r, count, p.scale_log2);
      const int block = tile * tile_tokens + half + warp * 16 + lane / 4 + r * 8;
      if (lane % 4 == 0 && block < whole) scores[block] = energy;
    }
  }
}

}  // namespace

cudaError_t score_energy(const ScoreArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const std::int64_t first_scored_row = std::max<std::int64_t>(g.segment / g.block - g.first_row(), 0);
  const std::int64_t scored_rows = g.rows() - args.dense_last_rows - first_scored_row;
  if (scored_rows <= 0) return cudaSuccess;
  const Params p{.q = args.q,
                 .pooled_k = args.pooled_k,
                 .pooled_own = args.pooled_own,
                 .scores = args.scores,
                 .q_offset = g.q_offset(),
                 .kv_len = g.shape.kv_len,
                 .causal_blocks = g.causal_blocks_per_head(),
                 .pooled_blocks = args.pooled_blocks,
                 .blocks = g.blocks(),
                 .first_row = static_cast<int>(g.first_row()),
                 .first_scored_row = static_cast<int>(first_scored_row),
                 .q_heads = static_cast<int>(g.shape.q_heads),
                 .group = static_cast<int>(g.group()),
                 .order_group = static_cast<int>(g.shape.q_heads / args.order_heads),
                 .blocks_per_segment = g.segment / g.block,
                 .scale_log2 = static_cast<float>(args.scale / std::log(2.0))};
  return dispatch(args.q.dtype, g.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    constexpr int shared_bytes = sizeof(Shared<dim>) + 1024;  // to align it
    const dim3 grid(static_cast<unsigned>(g.shape.batch * g.shape.q_heads), static_cast<unsigned>(scored_rows));
    return launch(energies<T, dim>, grid, threads, shared_bytes, stream, Start::after_earlier_kernels, p);
  });
}

}  // namespace pbsattn::cuda
