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
#include <cmath>

#include "cuda/geometry.cuh"
#include "cuda/select/pooled_product.cuh"
#include "cuda/select/scores/scores.h"
#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/online_sum.cuh"
#include "cuda/sm90/prologue.cuh"
#include "cuda/sm90/soft_cap.cuh"
#include "cuda/sm90/swizzled_tile.cuh"

namespace pbsattn::cuda {
namespace {

constexpr int threads = 256;
constexpr int stages = 2;

struct Params {
  RowGrid grid;
  ConstView q;
  Pooled pooled;
  float* scores;  // of tile [batch][q_head][row] where its list will be
  float scale_log2;
};

template <int head_dim>
struct Shared {
  alignas(1024) unsigned char q[SwizzledTile<head_dim>::bytes];
  alignas(1024) unsigned char k[stages][SwizzledTile<head_dim>::bytes];
};

// Returns log2 of the sum over the row's `count` queries of exp2(product * scale_log2), of this thread's block `r` of
// two; the same in the four lanes that share it. NaN where a product is, or is +inf.
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

template <class T, int head_dim, class Cap>
__global__ void __launch_bounds__(threads, 2)
    energies(const __grid_constant__ Params p, const __grid_constant__ Cap cap) {
  auto& shared = aligned_shared<Shared<head_dim>>();
  const RowGrid& grid = p.grid;
  const int head = static_cast<int>(blockIdx.x);
  // The last rows have the most blocks, so they start first.
  const int row = grid.first_sparse_row() + static_cast<int>(gridDim.y - 1 - blockIdx.y);
  const int diagonal = grid.diagonal(row);
  const int own_begin = grid.own_begin(diagonal);
  const Span present = grid.queries_of(diagonal);
  const int count = present.count();
  const int whole = present.end == block_tokens ? diagonal + 1 : diagonal;  // blocks that the last query sees
  const int tiles = (whole + tile_tokens - 1) / tile_tokens;
  float* const scores = p.scores + grid.list_start(head, row);

  const T* const queries = head_of<T>(p.q, head / grid.q_heads, head % grid.q_heads) +
                           (grid.first_query(diagonal) + present.begin) * p.q.token_stride;
  const T* const moved = means_of<T, head_dim>(p.pooled.k, grid.order_head(head), p.pooled.k_blocks, 0, own_begin).data;
  const T* const original = means_of<T, head_dim>(p.pooled.own, grid.kv_head(head), p.pooled.own_blocks, 0, whole).data;
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
    apply(cap, s);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float energy = log_energy(s, r, count, p.scale_log2);
      const int block = tile * tile_tokens + half + warp * 16 + lane / 4 + r * 8;
      if (lane % 4 == 0 && block < whole) scores[block] = energy;
    }
  }
}

}  // namespace

cudaError_t score_energy(const SelectArgs& args, cudaStream_t stream) {
  const RowGrid grid(args.geometry, args.permuted.order_heads);
  const std::int64_t rows = scored_rows(args) - grid.first_sparse_row();
  if (rows <= 0) return cudaSuccess;
  const Params p{.grid = grid,
                 .q = args.inputs.q,
                 .pooled = args.pooled,
                 .scores = scores_of(args),
                 .scale_log2 = scale_log2(args.options.scale)};
  const dim3 thread_blocks(grid.heads, static_cast<unsigned>(rows));
  return dispatch(p.q.dtype, args.geometry.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    return with_cap<dim>(args.options.softcap, args.options.scale, [&]<class Cap>(const Cap& cap) {
      return launch(energies<T, dim, Cap>, thread_blocks, threads, aligned_bytes<Shared<dim>>, stream,
                    Start::after_earlier_kernels, p, cap);
    });
  });
}

}  // namespace pbsattn::cuda
