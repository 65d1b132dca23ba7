// BlockScore::vertical_slash on Hopper (MInference): the heaviest columns and diagonals of a head, as blocks. After the
// masses (last_queries.cu) three launches:
//   1. cut_lines: a thread block finds how heavy the least of a head's columns, or diagonals, is that it keeps.
//   2. mark_blocks: a warp reduces 128 of either to what blocks need to know of them.
//   3. score_marked: 1 for the blocks of a row that a column stands in or a diagonal passes through.
#include <algorithm>

#include "core/score_traits.h"
#include "cuda/geometry.cuh"
#include "cuda/select/scores/cut.cuh"
#include "cuda/select/scores/last_queries.h"
#include "cuda/sm90/launch.h"

namespace pbsattn::cuda {
namespace {

using namespace minference;

constexpr int threads = 256;

// Of the 128 keys, and of the 128 distances, from block * 128 up.
struct Marks {
  std::int16_t column;       // whether a kept one is among the keys
  std::int16_t least, most;  // of the kept distances, less block * 128; 128 and -1: none
};

struct Params {
  OptionsOfHeads options;
  RowGrid grid;
  const float *columns, *distances;
  std::uint64_t* cuts;  // [head][2]: keys of columns and diagonals from where they are kept
  Marks* marks;         // [head][blocks]
  float* scores;

  __device__ bool takes(int head) const { return options.of(head).keep == KeepRule::vertical_slash; }
  __device__ float column(std::int64_t head, std::int64_t i) const {
    return i < least_columns ? INFINITY : columns[head * grid.kv_len + i];
  }
  __device__ float distance(std::int64_t head, std::int64_t i) const {
    return i < near_diagonals ? INFINITY : distances[head * grid.kv_len + i];
  }
};

__global__ void __launch_bounds__(cut_threads) cut_lines(const __grid_constant__ Params p) {
  const int head = blockIdx.y;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head)) return;
  const HeadOptions& options = p.options.of(head);
  const bool columns = blockIdx.x == 0;
  const int count = columns ? max(options.vertical, least_columns) : max(options.slash, least_diagonals);
  const Cut cut = cut_within<Measure::number>(
      count, p.grid.kv_len, [&](std::int64_t i) { return columns ? p.column(head, i) : p.distance(head, i); });
  if (threadIdx.x == 0) p.cuts[head * 2 + blockIdx.x] = cut.least;
}

__global__ void __launch_bounds__(threads) mark_blocks(const __grid_constant__ Params p) {
  const int head = blockIdx.y;
  const std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head) || block >= p.grid.blocks) return;
  Marks marks{.column = 0, .least = block_tokens, .most = -1};
#pragma unroll
  for (int part = 0; part < block_tokens; part += 32) {
    const std::int64_t i = block * block_tokens + part + lane;
    const bool present = i < p.grid.kv_len;
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
  if (lane == 0) p.marks[std::int64_t{head} * p.grid.blocks + block] = marks;
}

__global__ void __launch_bounds__(threads) score_marked(const __grid_constant__ Params p) {
  const int head = blockIdx.y;
  const int row = blockIdx.x;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head)) return;
  const int diagonal = p.grid.diagonal(row);
  // Distances from the row's queries to the keys of block b: from (diagonal - b - 1) * 128 + nearest to
  // (diagonal - b) * 128 + farthest.
  const Span queries = p.grid.queries_of(diagonal);
  const int nearest = queries.begin + 1;
  const int farthest = queries.end - 1;
  const Marks* marks = p.marks + std::int64_t{head} * p.grid.blocks;
  float* to = p.scores + p.grid.list_start(head, row);
  const int own_begin = p.grid.own_begin(diagonal);
#pragma unroll 1
  for (int b = threadIdx.x; b < own_begin; b += threads) {
    const bool kept =
        marks[b].column != 0 || marks[diagonal - b - 1].most >= nearest || marks[diagonal - b].least <= farthest;
    to[b] = kept ? 1.0F : 0.0F;
  }
}

struct Scratch {
  Scratch(const Geometry& g, void* base) : carver(base), masses(g, last_queries, carver) {
    const std::int64_t heads = g.shape.batch * g.shape.q_heads;
    carver.take(cuts, heads * 2);
    carver.take(marks, heads * g.blocks());
  }
  Carver carver;
  Masses masses;
  std::uint64_t* cuts = nullptr;
  Marks* marks = nullptr;
};

}  // namespace

std::size_t vertical_slash_scratch_size(const Geometry& geometry) {
  return Scratch(geometry, nullptr).carver.bytes;
}

cudaError_t score_vertical_slash(const SelectArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const Scratch scratch(g, args.scratch);
  const Params p{.options = args.options_of_heads(),
                 .grid = {g, args.permuted.order_heads},
                 .columns = scratch.masses.columns,
                 .distances = scratch.masses.distances,
                 .cuts = scratch.cuts,
                 .marks = scratch.marks,
                 .scores = scores_of(args)};
  const unsigned heads = p.grid.heads;
  const auto marking = static_cast<unsigned>(ceil_div(p.grid.blocks, threads / 32));
  return in_order(
      [&] {
        return find_masses(args, KeepRule::vertical_slash, std::min<std::int64_t>(last_queries, g.shape.q_len),
                           last_queries, scratch.masses, stream);
      },
      [&] { return launch(cut_lines, dim3(2, heads), cut_threads, 0, stream, Start::early, p); },
      [&] { return launch(mark_blocks, dim3(marking, heads), threads, 0, stream, Start::early, p); },
      [&] { return launch(score_marked, dim3(p.grid.rows, heads), threads, 0, stream, Start::early, p); });
}

}  // namespace pbsattn::cuda
