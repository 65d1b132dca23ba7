// BlockScore::flexible on Hopper (FlexPrefill): each head goes by pooled attention, or by the columns and distances of
// its last queries. After the masses (last_queries.cu) five launches:
//   1. judge: which of the two, and the masses by block.
//   2. cut_masses: how heavy the least of a head's columns, or distances, is that it keeps.
//   3. score_cells: of heads that go by pooling, each row's pooled attention, where its list will be.
//   4. cut_cells: how much the least of a head's cells has that it keeps.
//   5. write_scores: 1 for the blocks that are kept, over the cells.
#include <algorithm>
#include <cmath>

#include "cuda/limits.h"
#include "cuda/select/pooled_product.cuh"
#include "cuda/select/scores/cut.cuh"
#include "cuda/select/scores/last_queries.h"
#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/lanes.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor.cuh"

namespace pbsattn::cuda {
namespace {

constexpr int last_queries = 128;  // FlexPrefill's
constexpr int threads = 256;
constexpr int judge_threads = cut_threads;

enum class Way : std::int32_t { everything, pooling, masses };

struct Params {
  OptionsOfHeads options;
  Tensor q;
  const void *pooled_q, *pooled_k;  // [batch][q_heads][rows][head_dim], [batch][kv_heads][blocks][head_dim]
  Masses masses;
  Way* way;             // [head]
  float* by_block;      // [head][2][blocks]: masses of columns, and of distances, where the longest fill whole blocks
  float* predicted;     // [head][blocks]
  std::uint64_t* cuts;  // [head][3]: of columns, distances and cells
  float* scores;
  std::int64_t q_len, kv_len, rows, first_row, blocks, causal_blocks;
  int q_heads, group, queries, blocks_per_segment;
  float scale;

  __device__ bool takes(std::int64_t head) const { return options.of(head).keep == KeepRule::coverage; }
  // Blocks of columns, and of distances, that the head keeps at least.
  __device__ std::int64_t least(std::int64_t head) const {
    return min((static_cast<std::int64_t>(options.of(head).min_budget) + block_tokens - 1) / block_tokens, blocks);
  }
  __device__ std::int64_t entries_before(std::int64_t row) const { return row * first_row + row * (row + 1) / 2; }
};

// ----------------------------------------------------------------------------------------------------------- judge

// The sum over the thread block, in a fixed order; all threads call it and get the same.
__device__ inline double block_sum(double x) {
  __shared__ double sums[32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(threadIdx.x % 32 < judge_threads / 32 ? sums[threadIdx.x % 32] : 0.0);
}
__device__ inline float block_max(float x) {
  __shared__ float largest[32];
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_max(threadIdx.x % 32 < judge_threads / 32 ? largest[threadIdx.x % 32] : -INFINITY);
}

// x log(x / y), 0 where x is 0.
__device__ inline double divergence(double x, double y) {
  return x == 0 ? 0 : x * log(x / y);
}

template <class T, int head_dim>
__global__ void __launch_bounds__(judge_threads) judge(const __grid_constant__ Params p) {
  __shared__ float query[head_dim];
  const std::int64_t head = blockIdx.x;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head)) return;
  if (p.blocks <= max(std::int64_t{2}, p.least(head))) {
    if (threadIdx.x == 0) p.way[head] = Way::everything;
    return;
  }
  if (threadIdx.x < head_dim) {
    const T* from = p.q.head<T>(head / p.q_heads, head % p.q_heads) + threadIdx.x;
    float sum = 0;
#pragma unroll 8
    for (int i = 0; i < p.queries; ++i) sum += static_cast<float>(from[(p.q_len - p.queries + i) * p.q.token_stride]);
    query[threadIdx.x] = sum / static_cast<float>(p.queries);
  }
  __syncthreads();

  const T* pooled = static_cast<const T*>(p.pooled_k) + head / p.group * p.blocks * head_dim;
  float* predicted = p.predicted + head * p.blocks;
  float* columns = p.by_block + head * 2 * p.blocks;
  float* distances = columns + p.blocks;
  float max = -INFINITY;
  for (std::int64_t block = warp; block < p.blocks; block += judge_threads / 32) {
    float score = 0;
    float column = 0;
    float distance = 0;
#pragma unroll
    for (int d = lane; d < head_dim; d += 32) score += query[d] * static_cast<float>(pooled[block * head_dim + d]);
    // The block of distances that is `block`-th from the end; the longest one is kv_len - 1.
    for (int i = lane; i < block_tokens; i += 32) {
      const std::int64_t at = block * block_tokens + i;
      if (at >= p.kv_len) continue;
      column += p.masses.columns[head * p.kv_len + at];
      distance += p.masses.distances[head * p.kv_len + p.kv_len - 1 - at];
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      score += __shfl_xor_sync(~0U, score, offset);
      column += __shfl_xor_sync(~0U, column, offset);
      distance += __shfl_xor_sync(~0U, distance, offset);
    }
    score *= p.scale;
    max = fmaxf(max, score);
    if (lane == 0) {
      predicted[block] = score;
      columns[block] = column;
      distances[p.blocks - 1 - block] = distance;
    }
  }
  max = block_max(max);  // has a barrier, after which the arrays can be read
  double total = 0;
  for (std::int64_t b = threadIdx.x; b < p.blocks; b += judge_threads)
    total += exp(static_cast<double>(predicted[b]) - static_cast<double>(max));
  total = block_sum(total);
  double sum = 0;
  for (std::int64_t b = threadIdx.x; b < p.blocks; b += judge_threads) {
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
  const std::int64_t head = blockIdx.y;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head) || p.way[head] == Way::everything) return;
  const std::int64_t least = p.least(head);
  std::int64_t budget = least;
  if (p.way[head] == Way::masses) {
    // Blocks that the heaviest tokens would fill whose masses stay within top_p, and one more.
    const float* tokens = (blockIdx.x == 0 ? p.masses.columns : p.masses.distances) + head * p.kv_len;
    const Cut within = cut_within<Measure::sum>(static_cast<double>(p.options.of(head).top_p) * p.queries,
                                                static_cast<int>(p.kv_len), [&](int i) { return tokens[i]; });
    budget = min(max((within.count + std::int64_t{1}) / block_tokens + 1, least), p.blocks);
  }
  const float* blocks = p.by_block + (head * 2 + blockIdx.x) * p.blocks;
  const Cut cut =
      cut_within<Measure::number>(static_cast<double>(max(budget, std::int64_t{1})), static_cast<int>(p.blocks),
                                  [&](int i) { return i == 0 ? INFINITY : blocks[i]; });
  if (threadIdx.x == 0) p.cuts[head * 3 + blockIdx.x] = cut.least;
}

__global__ void __launch_bounds__(cut_threads) cut_cells(const __grid_constant__ Params p) {
  const std::int64_t head = blockIdx.x;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head) || p.way[head] != Way::pooling) return;
  const float* cells = p.scores + head * p.causal_blocks;
  const Cut cut = cut_within<Measure::sum>(static_cast<double>(p.options.of(head).top_p) * static_cast<double>(p.rows),
                                           static_cast<int>(p.causal_blocks), [&](int i) { return cells[i]; });
  if (threadIdx.x == 0) p.cuts[head * 3 + 2] = cut.least;
}

// ----------------------------------------------------------------------------------------------------------- cells

// Softmax of a row's scores in place, by a warp; zeros where it has no value.
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

template <class T, int head_dim>
__global__ void __launch_bounds__(threads) score_cells(const __grid_constant__ Params p) {
  const std::int64_t head = blockIdx.y;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head) || p.way[head] != Way::pooling) return;
  const std::int64_t first_row = static_cast<std::int64_t>(gridDim.x - 1 - blockIdx.x) * pooled_rows;
  const int rows = static_cast<int>(min(p.rows - first_row, std::int64_t{pooled_rows}));
  const auto diagonal = [&](int row) { return static_cast<int>(p.first_row + first_row) + row; };
  float* cells = p.scores + head * p.causal_blocks;
  const auto of_row = [&](int row) { return cells + p.entries_before(first_row + row); };
  const Means<T> queries{static_cast<const T*>(p.pooled_q) + (head * p.rows + first_row) * head_dim, rows};
  const Means<T> keys{static_cast<const T*>(p.pooled_k) + head / p.group * p.blocks * head_dim, p.blocks};
  const auto scale_log2 = static_cast<float>(p.scale * 1.4426950408889634);
  multiply_pooled<head_dim>(
      queries, keys, 0, diagonal(rows - 1) + 1, [](int) { return true; },
      [&](int row, int block, float2 products) {
        if (row >= rows) return;
        if (block <= diagonal(row)) of_row(row)[block] = products.x * scale_log2;
        if (block + 1 <= diagonal(row)) of_row(row)[block + 1] = products.y * scale_log2;
      });
  __syncthreads();
  for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += threads / 32)
    normalise(of_row(row), diagonal(row) + 1);
}

__global__ void __launch_bounds__(threads) write_scores(const __grid_constant__ Params p) {
  const std::int64_t head = blockIdx.y;
  const std::int64_t row = blockIdx.x;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head)) return;
  const Way way = p.way[head];
  const std::int64_t diagonal = p.first_row + row;
  const std::int64_t own_begin = diagonal / p.blocks_per_segment * p.blocks_per_segment;
  const std::int64_t before = p.entries_before(row);
  float* to = p.scores + head * p.causal_blocks + before;
  const auto among = [&](int which, std::int64_t b) {
    const float mass = b == 0 ? INFINITY : p.by_block[(head * 2 + which) * p.blocks + b];
    return cut_key(mass, b) >= p.cuts[head * 3 + which];
  };
  for (std::int64_t b = threadIdx.x; b < own_begin; b += threads) {
    const bool kept = way == Way::everything || among(0, b) || among(1, diagonal - b) ||
                      (way == Way::pooling && cut_key(to[b], before + b) >= p.cuts[head * 3 + 2]);
    to[b] = kept ? 1.0F : 0.0F;
  }
}

// --------------------------------------------------------------------------------------------------------- launches

struct Scratch {
  Scratch(const Geometry& g, std::byte* base) : masses(g, last_queries, base), bytes(masses.bytes) {
    const std::int64_t heads = g.shape.batch * g.shape.q_heads;
    const auto take = [&]<class T>(T*& pointer, std::int64_t count) {
      if (base != nullptr) pointer = reinterpret_cast<T*>(base + bytes);
      bytes += static_cast<std::size_t>(count) * sizeof(T);
    };
    take(cuts, heads * 3);
    take(way, heads);
    take(by_block, heads * 2 * g.blocks());
    take(predicted, heads * g.blocks());
  }
  Masses masses;
  std::size_t bytes;
  std::uint64_t* cuts = nullptr;
  Way* way = nullptr;
  float *by_block = nullptr, *predicted = nullptr;
};

}  // namespace

std::size_t flexible_scratch_size(const Geometry& geometry) {
  return Scratch(geometry, nullptr).bytes;
}

cudaError_t score_flexible(const ScoreArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const Scratch scratch(g, static_cast<std::byte*>(args.scratch));
  cudaError_t error = find_masses(args, KeepRule::coverage, g.scoring_queries(), last_queries, scratch.masses, stream);
  if (error != cudaSuccess) return error;
  const Params p{.options = args.options,
                 .q = {args.q.data, args.q.batch_stride, args.q.head_stride, args.q.token_stride},
                 .pooled_q = args.pooled_q,
                 .pooled_k = args.pooled_own,
                 .masses = scratch.masses,
                 .way = scratch.way,
                 .by_block = scratch.by_block,
                 .predicted = scratch.predicted,
                 .cuts = scratch.cuts,
                 .scores = args.scores,
                 .q_len = g.shape.q_len,
                 .kv_len = g.shape.kv_len,
                 .rows = g.rows(),
                 .first_row = g.first_row(),
                 .blocks = g.blocks(),
                 .causal_blocks = g.causal_blocks_per_head(),
                 .q_heads = static_cast<int>(g.shape.q_heads),
                 .group = static_cast<int>(g.group()),
                 .queries = static_cast<int>(g.scoring_queries()),
                 .blocks_per_segment = g.segment / g.block,
                 .scale = args.scale};
  const auto heads = static_cast<unsigned>(g.shape.batch * g.shape.q_heads);
  const auto rows = static_cast<unsigned>(p.rows);
  const auto rows_of_product = static_cast<unsigned>(ceil_div(p.rows, pooled_rows));
  const auto by_type = [&](auto&& launch_typed) { return dispatch(args.q.dtype, g.shape.head_dim, launch_typed); };
  error = by_type([&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    return launch(judge<T, dim>, dim3(heads), judge_threads, 0, stream, Start::early, p);
  });
  if (error == cudaSuccess) error = launch(cut_masses, dim3(2, heads), cut_threads, 0, stream, Start::early, p);
  if (error == cudaSuccess)
    error = by_type([&]<class T, int dim>(T, std::integral_constant<int, dim>) {
      return launch(score_cells<T, dim>, dim3(rows_of_product, heads), threads, 0, stream, Start::early, p);
    });
  if (error == cudaSuccess) error = launch(cut_cells, dim3(heads), cut_threads, 0, stream, Start::early, p);
  if (error == cudaSuccess) error = launch(write_scores, dim3(rows, heads), threads, 0, stream, Start::early, p);
  return error;
}

}  // namespace pbsattn::cuda
