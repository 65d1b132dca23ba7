// BlockScore::flexible on Hopper (FlexPrefill): each head goes by pooled attention, or by the columns and distances of
// its last queries. After the masses (last_queries.cu) five launches:
//   1. judge: which of the two, and the masses by block.
//   2. cut_masses: how heavy the least of a head's columns, or distances, is that it keeps.
//   3. score_cells: of heads that go by pooling, each row's pooled attention, where its list will be.
//   4. cut_cells: how much the least of a head's cells has that it keeps.
//   5. write_scores: 1 for the blocks that are kept, over the cells.
#include <algorithm>
#include <cmath>

#include "core/score_traits.h"
#include "cuda/geometry.cuh"
#include "cuda/select/pooled_product.cuh"
#include "cuda/select/scores/cut.cuh"
#include "cuda/select/scores/last_queries.h"
#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/lanes.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/soft_cap.cuh"

namespace pbsattn::cuda {
namespace {

constexpr int last_queries = block_tokens;  // the most that score
constexpr int threads = 256;
constexpr int judge_threads = cut_threads;

enum class Way : std::int32_t { everything, pooling, masses };

struct Params {
  OptionsOfHeads options;
  RowGrid grid;
  ConstView q;
  const void *pooled_q, *pooled_k;  // the latter of keys where they were,
  std::int64_t own_blocks;          // so many of a head
  Masses masses;
  Way* way;             // [head]
  float* by_block;      // [head][2][blocks]: masses of columns, and of distances, where the longest fill whole blocks
  float* predicted;     // [head][blocks]
  std::uint64_t* cuts;  // [head][3]: of columns, distances and cells
  float* scores;
  int queries;
  float scale;

  __device__ bool takes(int head) const { return options.of(head).keep == KeepRule::coverage; }
  // Returns how many blocks of columns, and of distances, the head keeps at least.
  __device__ int least(int head) const {
    const unsigned budget = options.of(head).min_budget;
    return min(static_cast<int>((budget + block_tokens - 1) / block_tokens), grid.blocks);
  }
};

// ----------------------------------------------------------------------------------------------------------- judge

// Reduces over the thread block, warp by warp and then over the warps, in a fixed order; all threads call it and get
// the same.
template <class T, class Reduce>
__device__ T reduce_block(T x, Reduce&& reduce) {
  static_assert(judge_threads == 32 * 32);
  __shared__ T of_warp[32];
  x = reduce(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  return reduce(of_warp[threadIdx.x % 32]);
}
__device__ inline double block_sum(double x) {
  return reduce_block(x, warp_sum<double>);
}

// Returns x log(x / y), 0 where x is 0.
__device__ inline double divergence(double x, double y) {
  return x == 0 ? 0 : x * log(x / y);
}

template <class T, int head_dim, class Cap>
__global__ void __launch_bounds__(judge_threads)
    judge(const __grid_constant__ Params p, const __grid_constant__ Cap cap) {
  __shared__ float query[head_dim];
  const int head = blockIdx.x;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t blocks = p.grid.blocks;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head)) return;
  if (blocks <= max(flexible_whole_blocks, p.least(head))) {
    if (threadIdx.x == 0) p.way[head] = Way::everything;
    return;
  }
  if (threadIdx.x < head_dim) {
    const T* from = head_of<T>(p.q, head / p.grid.q_heads, head % p.grid.q_heads) + threadIdx.x;
    float sum = 0;
#pragma unroll 8
    for (int i = 0; i < p.queries; ++i)
      sum += static_cast<float>(from[(p.grid.q_len - p.queries + i) * p.q.token_stride]);
    query[threadIdx.x] = sum / static_cast<float>(p.queries);
  }
  __syncthreads();

  const T* pooled = means_of<T, head_dim>(p.pooled_k, p.grid.kv_head(head), p.own_blocks, 0, blocks).data;
  float* predicted = p.predicted + head * blocks;
  float* columns = p.by_block + head * 2 * blocks;
  float* distances = columns + blocks;
  const float* columns_of = p.masses.columns + std::int64_t{head} * p.grid.kv_len;
  const float* distances_of = p.masses.distances + std::int64_t{head} * p.grid.kv_len;
  float max = -INFINITY;
  for (std::int64_t block = warp; block < blocks; block += judge_threads / 32) {
    float score = 0;
    float column = 0;
    float distance = 0;
#pragma unroll
    for (int d = lane; d < head_dim; d += 32) score += query[d] * static_cast<float>(pooled[block * head_dim + d]);
    // The block of distances that is `block`-th from the end; the longest one is kv_len - 1.
    for (int i = lane; i < block_tokens; i += 32) {
      const std::int64_t at = block * block_tokens + i;
      if (at >= p.grid.kv_len) continue;
      column += columns_of[at];
      distance += distances_of[p.grid.kv_len - 1 - at];
    }
    score = cap(warp_sum(score) * p.scale);
    column = warp_sum(column);
    distance = warp_sum(distance);
    max = fmaxf(max, score);
    if (lane == 0) {
      predicted[block] = score;
      columns[block] = column;
      distances[blocks - 1 - block] = distance;
    }
  }
  max = reduce_block(max, warp_max);  // has a barrier, after which the arrays can be read
  double total = 0;
  for (std::int64_t b = threadIdx.x; b < blocks; b += judge_threads)
    total += exp(static_cast<double>(predicted[b]) - static_cast<double>(max));
  total = block_sum(total);
  double sum = 0;
  for (std::int64_t b = threadIdx.x; b < blocks; b += judge_threads) {
    const double expected = exp(static_cast<double>(predicted[b]) - static_cast<double>(max)) / total;
    const double found = static_cast<double>(columns[b]) / p.queries;
    const double mean = (expected + found) / 2;
    sum += 0.5 * divergence(expected, mean) + 0.5 * divergence(found, mean);
  }
  sum = block_sum(sum);
  // A softmax without a value makes the total NaN.
  const bool by_pooling = total > 0 && sqrt(fmax(sum, 0.0)) < static_cast<double>(p.options.of(head).tau);
  if (threadIdx.x == 0) p.way[head] = by_pooling ? Way::pooling : Way::masses;
}

// ------------------------------------------------------------------------------------------------------------ cuts

__global__ void __launch_bounds__(cut_threads) cut_masses(const __grid_constant__ Params p) {
  const int head = blockIdx.y;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head) || p.way[head] == Way::everything) return;
  int budget = p.least(head);
  if (p.way[head] == Way::masses) {
    // Blocks that the heaviest tokens would fill whose masses stay within top_p, and one more.
    const float* tokens =
        (blockIdx.x == 0 ? p.masses.columns : p.masses.distances) + std::int64_t{head} * p.grid.kv_len;
    const Cut within = cut_within<Measure::sum>(static_cast<double>(p.options.of(head).top_p) * p.queries,
                                                p.grid.kv_len, [&](int i) { return tokens[i]; });
    budget = min(max((within.count + 1) / block_tokens + 1, budget), p.grid.blocks);
  }
  const float* blocks = p.by_block + (std::int64_t{head} * 2 + blockIdx.x) * p.grid.blocks;
  const Cut cut =
      cut_within<Measure::number>(max(budget, 1), p.grid.blocks, [&](int i) { return i == 0 ? INFINITY : blocks[i]; });
  if (threadIdx.x == 0) p.cuts[head * 3 + blockIdx.x] = cut.least;
}

__global__ void __launch_bounds__(cut_threads) cut_cells(const __grid_constant__ Params p) {
  const int head = blockIdx.x;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head) || p.way[head] != Way::pooling) return;
  const float* cells = p.scores + p.grid.list_start(head, 0);
  const Cut cut = cut_within<Measure::sum>(static_cast<double>(p.options.of(head).top_p) * p.grid.rows,
                                           static_cast<int>(p.grid.causal_blocks), [&](int i) { return cells[i]; });
  if (threadIdx.x == 0) p.cuts[head * 3 + 2] = cut.least;
}

// ----------------------------------------------------------------------------------------------------------- cells

// Makes a softmax of a row's scores in place, by a warp; zeros where it has no value.
__device__ inline void normalise(float* scores, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float max = -INFINITY;
  for (int i = lane; i < count; i += 32) max = fmaxf(max, scores[i]);
  max = warp_max(max);
  float sum = 0;
  for (int i = lane; i < count; i += 32) sum += exp2f(scores[i] - max);
  sum = warp_sum(sum);
  const bool valid = sum >= 1;
  for (int i = lane; i < count; i += 32) scores[i] = valid ? exp2f(scores[i] - max) / sum : 0;
}

template <class T, int head_dim, class Cap>
__global__ void __launch_bounds__(threads)
    score_cells(const __grid_constant__ Params p, const __grid_constant__ Cap cap) {
  const int head = blockIdx.y;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head) || p.way[head] != Way::pooling) return;
  const int first_row = static_cast<int>(gridDim.x - 1 - blockIdx.x) * pooled_rows;
  const int rows = min(p.grid.rows - first_row, pooled_rows);
  const auto diagonal = [&](int row) { return p.grid.diagonal(first_row + row); };
  const auto of_row = [&](int row) { return p.scores + p.grid.list_start(head, first_row + row); };
  const auto queries = means_of<T, head_dim>(p.pooled_q, head, p.grid.rows, first_row, rows);
  const auto keys = means_of<T, head_dim>(p.pooled_k, p.grid.kv_head(head), p.own_blocks, 0, p.grid.blocks);
  const auto scale_log2 = static_cast<float>(p.scale * 1.4426950408889634);
  multiply_pooled<head_dim>(
      queries, keys, 0, diagonal(rows - 1) + 1, [](int) { return true; },
      [&](int row, int block, float2 products) {
        if (row >= rows) return;
        if (block <= diagonal(row)) of_row(row)[block] = cap(products.x * scale_log2);
        if (block + 1 <= diagonal(row)) of_row(row)[block + 1] = cap(products.y * scale_log2);
      });
  __syncthreads();
  for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += threads / 32)
    normalise(of_row(row), diagonal(row) + 1);
}

__global__ void __launch_bounds__(threads) write_scores(const __grid_constant__ Params p) {
  const int head = blockIdx.y;
  const int row = blockIdx.x;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head)) return;
  const Way way = p.way[head];
  const int diagonal = p.grid.diagonal(row);
  const int own_begin = p.grid.own_begin(diagonal);
  const std::int64_t before = p.grid.entries_before(row);
  float* to = p.scores + p.grid.list_start(head, row);
  const auto among = [&](int which, int b) {
    const float mass = b == 0 ? INFINITY : p.by_block[(std::int64_t{head} * 2 + which) * p.grid.blocks + b];
    return cut_key(mass, b) >= p.cuts[head * 3 + which];
  };
  for (int b = threadIdx.x; b < own_begin; b += threads) {
    const bool kept = way == Way::everything || among(0, b) || among(1, diagonal - b) ||
                      (way == Way::pooling && cut_key(to[b], before + b) >= p.cuts[head * 3 + 2]);
    to[b] = kept ? 1.0F : 0.0F;
  }
}

// --------------------------------------------------------------------------------------------------------- launches

struct Scratch {
  Scratch(const Geometry& g, void* base) : carver(base), masses(g, last_queries, carver) {
    const std::int64_t heads = g.shape.batch * g.shape.q_heads;
    carver.take(cuts, heads * 3);
    carver.take(way, heads);
    carver.take(by_block, heads * 2 * g.blocks());
    carver.take(predicted, heads * g.blocks());
  }
  Carver carver;
  Masses masses;
  std::uint64_t* cuts = nullptr;
  Way* way = nullptr;
  float *by_block = nullptr, *predicted = nullptr;
};

template <class T, int head_dim>
cudaError_t launch_all(const Params& p, float softcap, cudaStream_t stream) {
  const unsigned heads = p.grid.heads;
  const auto products = static_cast<unsigned>(ceil_div(p.grid.rows, pooled_rows));
  return in_order(
      [&] {
        return with_cap<head_dim>(softcap, 1.0F, [&]<class Cap>(const Cap& cap) {
          return launch(judge<T, head_dim, Cap>, dim3(heads), judge_threads, 0, stream, Start::early, p, cap);
        });
      },
      [&] { return launch(cut_masses, dim3(2, heads), cut_threads, 0, stream, Start::early, p); },
      [&] {
        return with_log2_cap<head_dim>(softcap, [&]<class Cap>(const Cap& cap) {
          return launch(score_cells<T, head_dim, Cap>, dim3(products, heads), threads, 0, stream, Start::early, p, cap);
        });
      },
      [&] { return launch(cut_cells, dim3(heads), cut_threads, 0, stream, Start::early, p); },
      [&] { return launch(write_scores, dim3(p.grid.rows, heads), threads, 0, stream, Start::early, p); });
}

}  // namespace

std::size_t flexible_scratch_size(const Geometry& geometry) {
  return Scratch(geometry, nullptr).carver.bytes;
}

cudaError_t score_flexible(const SelectArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const Scratch scratch(g, args.scratch);
  if (const cudaError_t error =
          find_masses(args, KeepRule::coverage, g.scoring_queries(), last_queries, scratch.masses, stream);
      error != cudaSuccess)
    return error;
  const Params p{.options = args.options_of_heads(),
                 .grid = {g, args.permuted.order_heads},
                 .q = args.inputs.q,
                 .pooled_q = args.pooled.q,
                 .pooled_k = args.pooled.own,
                 .own_blocks = args.pooled.own_blocks,
                 .masses = scratch.masses,
                 .way = scratch.way,
                 .by_block = scratch.by_block,
                 .predicted = scratch.predicted,
                 .cuts = scratch.cuts,
                 .scores = scores_of(args),
                 .queries = static_cast<int>(g.scoring_queries()),
                 .scale = args.options.scale};
  return dispatch(p.q.dtype, g.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    return launch_all<T, dim>(p, args.options.softcap, stream);
  });
}

}  // namespace pbsattn::cuda
