// BlockScore::vertical_slash on Hopper (MInference): the heaviest columns and diagonals of a head, as blocks. After the
// masses (last_queries.cu) three launches:
//   1. cut_masses: a thread block finds how heavy the least of a head's columns, or diagonals, is that it keeps.
//   2. mark_blocks: a warp reduces 128 of either to what blocks need to know of them.
//   3. write_scores: 1 for the blocks of a row that a column stands in or a diagonal passes through.
#include <algorithm>

#include "cuda/limits.h"
#include "cuda/select/scores/cut.cuh"
#include "cuda/select/scores/last_queries.h"
#include "cuda/sm90/launch.h"

namespace pbsattn::cuda {
namespace {

// MInference's numbers.
constexpr int last_queries = 64;
constexpr int least_columns = 30;  // the first ones come before all others
constexpr int least_diagonals = 50;
constexpr int near = 100;  // diagonals of a distance under this come before all others

constexpr int threads = 256;

// Of the 128 keys, and of the 128 distances, from block * 128 up.
struct Marks {
  std::int16_t column;       // whether a kept one is among the keys
  std::int16_t least, most;  // of the kept distances, less block * 128; 128 and -1: none
};

struct Params {
  OptionsOfHeads options;
  const float *columns, *distances;
  std::uint64_t* cuts;  // [head][2]: keys of columns and diagonals from where they are kept
  Marks* marks;         // [head][blocks]
  float* scores;
  std::int64_t kv_len, q_offset, first_row, blocks, causal_blocks;
  int blocks_per_segment;

  __device__ bool takes(std::int64_t head) const { return options.of(head).keep == KeepRule::vertical_slash; }
  __device__ float column(std::int64_t head, std::int64_t i) const {
    return i < least_columns ? INFINITY : columns[head * kv_len + i];
  }
  __device__ float distance(std::int64_t head, std::int64_t i) const {
    return i < near ? INFINITY : distances[head * kv_len + i];
  }
};

__global__ void __launch_bounds__(cut_threads) cut_masses(const __grid_constant__ Params p) {
  const std::int64_t head = blockIdx.y;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head)) return;
  const HeadOptions& options = p.options.of(head);
  const bool columns = blockIdx.x == 0;
  const int count = columns ? max(options.vertical, least_columns) : max(options.slash, least_diagonals);
  const Cut cut = cut_within<Measure::number>(count, static_cast<int>(p.kv_len), [&](std::int64_t i) {
    return columns ? p.column(head, i) : p.distance(head, i);
  });
  if (threadIdx.x == 0) p.cuts[head * 2 + blockIdx.x] = cut.least;
}

__global__ void __launch_bounds__(threads) mark_blocks(const __grid_constant__ Params p) {
  const std::int64_t head = blockIdx.y;
  const std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head) || block >= p.blocks) return;
  Marks marks{.column = 0, .least = block_tokens, .most = -1};
#pragma unroll
  for (int part = 0; part < block_tokens; part += 32) {
    const std::int64_t i = block * block_tokens + part + lane;
    const bool present = i < p.kv_len;
    const unsigned columns =
        __ballot_sync(~0U, present && cut_key(p.column(head, present ? i : 0), i) >= p.cuts[head * 2]);
    const unsigned distances =
        __ballot_sync(~0U, present && cut_key(p.distance(head, present ? i : 0), i) >= p.cuts[head * 2 + 1]);
    if (columns != 0) marks.column = 1;
    if (distances != 0) {
      if (marks.most < 0) marks.least = static_cast<std::int16_t>(part + __ffs(static_cast<int>(distances)) - 1);
      marks.most = static_cast<std::int16_t>(part + 31 - __clz(static_cast<int>(distances)));
    }
  }
  if (lane == 0) p.marks[head * p.blocks + block] = marks;
}

__global__ void __launch_bounds__(threads) write_scores(const __grid_constant__ Params p) {
  const std::int64_t head = blockIdx.y;
  const std::int64_t row = blockIdx.x;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head)) return;
  const std::int64_t diagonal = p.first_row + row;
  const std::int64_t own_begin = diagonal / p.blocks_per_segment * p.blocks_per_segment;
  // Distances from the row's queries to the keys of block b: from (diagonal - b - 1) * 128 + nearest to
  // (diagonal - b) * 128 + farthest.
  const auto nearest = static_cast<int>(max(p.q_offset - diagonal * block_tokens, std::int64_t{0})) + 1;
  const auto farthest = static_cast<int>(min(p.kv_len - diagonal * block_tokens, std::int64_t{block_tokens})) - 1;
  const Marks* marks = p.marks + head * p.blocks;
  float* to = p.scores + head * p.causal_blocks + row * p.first_row + row * (row + 1) / 2;
  for (std::int64_t b = threadIdx.x; b < own_begin; b += threads) {
    const bool kept =
        marks[b].column != 0 || marks[diagonal - b - 1].most >= nearest || marks[diagonal - b].least <= farthest;
    to[b] = kept ? 1.0F : 0.0F;
  }
}

struct Scratch {
  Scratch(const Geometry& g, std::byte* base) : masses(g, last_queries, base), bytes(masses.bytes) {
    const std::int64_t heads = g.shape.batch * g.shape.q_heads;
    const auto take = [&]<class T>(T*& pointer, std::int64_t count) {
      if (base != nullptr) pointer = reinterpret_cast<T*>(base + bytes);
      bytes += static_cast<std::size_t>(count) * sizeof(T);
    };
    take(cuts, heads * 2);
    take(marks, heads * g.blocks());
  }
  Masses masses;
  std::size_t bytes;
  std::uint64_t* cuts = nullptr;
  Marks* marks = nullptr;
};

}  // namespace

std::size_t vertical_slash_scratch_size(const Geometry& geometry) {
  return Scratch(geometry, nullptr).bytes;
}

cudaError_t score_vertical_slash(const ScoreArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const Scratch scratch(g, static_cast<std::byte*>(args.scratch));
  cudaError_t error = find_masses(args, KeepRule::vertical_slash, std::min<std::int64_t>(last_queries, g.shape.q_len),
                                  last_queries, scratch.masses, stream);
  const Params p{.options = args.options,
                 .columns = scratch.masses.columns,
                 .distances = scratch.masses.distances,
                 .cuts = scratch.cuts,
                 .marks = scratch.marks,
                 .scores = args.scores,
                 .kv_len = g.shape.kv_len,
                 .q_offset = g.q_offset(),
                 .first_row = g.first_row(),
                 .blocks = g.blocks(),
                 .causal_blocks = g.causal_blocks_per_head(),
                 .blocks_per_segment = g.segment / g.block};
  const auto heads = static_cast<unsigned>(g.shape.batch * g.shape.q_heads);
  if (error == cudaSuccess) error = launch(cut_masses, dim3(2, heads), cut_threads, 0, stream, Start::early, p);
  const auto warps = static_cast<unsigned>(ceil_div(p.blocks, threads / 32));
  if (error == cudaSuccess) error = launch(mark_blocks, dim3(warps, heads), threads, 0, stream, Start::early, p);
  const auto rows = static_cast<unsigned>(g.rows());
  if (error == cudaSuccess) error = launch(write_scores, dim3(rows, heads), threads, 0, stream, Start::early, p);
  return error;
}

}  // namespace pbsattn::cuda
