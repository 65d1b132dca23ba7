// Stage two on Hopper: the key blocks of each row, in one launch.
//
// A CTA takes up to 16 rows of one head. Its 16 warps first multiply the rows' pooled queries by all pooled keys they
// may prune (mma, operands straight from L2) and leave the scaled scores in shared memory:
//     S[row][block] = pooled Q . pooled K * scale * log2(e)
// Then a warp takes a row: softmax, the keep rule, and its list (select_rules.cuh).
//
// Scores other than mean_pool come from launches of their own (score_per_query.cu, score_mass.cu), which leave a row's
// scores where its list will be. Those that share out a row's whole attention go on to the row's diagonal: what is
// always kept then counts first.
#include <algorithm>
#include <cmath>

#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/select_rules.cuh"
#include "cuda/stages.h"

namespace pbsattn::cuda {
namespace {

constexpr int select_threads = 512;
constexpr int warps = select_threads / 32;
constexpr int mma_rows = 16;
constexpr int max_shared_bytes = 224 * 1024;

struct Params {
  const void* pooled_k;
  const void* pooled_q;
  const std::int32_t* sink_block;
  std::int64_t* row_start;
  std::int32_t* row_count;
  std::int32_t* block;
  std::int64_t rows, first_row, causal_blocks;
  std::int64_t key_blocks;          // pooled keys of a head
  int q_heads, group, order_group;  // query heads of an order
  int blocks_per_segment;
  int rows_at_once;  // of a CTA
  int score_stride;
  float scale_log2;
  HeadRules rules;
  const float* given_scores;  // of tile [batch][q_head][row] where its list will be; null: from pooled queries
  bool to_diagonal;           // given for all causal blocks
};

// Scores of rows [row, row + rows_at_once) against blocks [0, columns). Lane 4 g + t of a warp holds for rows g and
// g + 8 of Q and for row g of K the 16-byte chunks t, t + 4, ...: any order of the sum does, if Q and K agree on it.
template <class T, int head_dim>
__device__ void score_rows(const Params& p, const T* pooled_q, const T* pooled_k, std::int64_t row, int columns,
                           float* scores) {
  constexpr int chunks = head_dim / 32;  // of a lane
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const auto load_row = [&](uint4(&to)[chunks], const T* matrix, std::int64_t index, bool present) {
    const uint4* from = reinterpret_cast<const uint4*>(matrix + (present ? index : 0) * head_dim) + t;
#pragma unroll
    for (int i = 0; i < chunks; ++i) to[i] = present ? __ldg(from + 4 * i) : make_uint4(0, 0, 0, 0);
  };
  uint4 q_low[chunks], q_high[chunks];
  load_row(q_low, pooled_q, row + g, g < p.rows_at_once && row + g < p.rows);
  load_row(q_high, pooled_q, row + g + 8, g + 8 < p.rows_at_once && row + g + 8 < p.rows);
  for (int n8 = warp; n8 * 8 < columns; n8 += warps) {
    uint4 k[chunks];
    load_row(k, pooled_k, n8 * 8 + g, n8 * 8 + g < p.key_blocks);
    float d[4] = {};
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      multiply_add<T>(d, q_low[i].x, q_high[i].x, q_low[i].y, q_high[i].y, k[i].x, k[i].y);
      multiply_add<T>(d, q_low[i].z, q_high[i].z, q_low[i].w, q_high[i].w, k[i].z, k[i].w);
    }
    float* to = scores + g * p.score_stride + n8 * 8 + 2 * t;
    if (g < p.rows_at_once) *reinterpret_cast<float2*>(to) = make_float2(d[0] * p.scale_log2, d[1] * p.scale_log2);
    if (g + 8 < p.rows_at_once)
      *reinterpret_cast<float2*>(to + 8 * p.score_stride) = make_float2(d[2] * p.scale_log2, d[3] * p.scale_log2);
  }
}

template <class T, int head_dim>
__global__ void __launch_bounds__(select_threads) select_rows(const __grid_constant__ Params p) {
  extern __shared__ float scores[];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const std::int64_t head = blockIdx.y;  // of all batch entries
  const std::int64_t order_head = head / p.order_group;
  // The last rows have the most blocks, so they start first.
  const std::int64_t first_row = static_cast<std::int64_t>(gridDim.x - 1 - blockIdx.x) * p.rows_at_once;
  const std::int64_t last_row = min(first_row + p.rows_at_once, p.rows) - 1;
  const auto own_begin = [&](std::int64_t row) {
    return static_cast<int>((p.first_row + row) / p.blocks_per_segment * p.blocks_per_segment);
  };

  wait_for_earlier_kernels();
  const Rule& rule = p.rules.of(head);
  const std::int64_t first_dense_row = rule.keep == KeepRule::all ? 0 : p.rows - rule.dense_last_rows;
  if (first_row < first_dense_row && rule.keep != KeepRule::none && p.given_scores == nullptr)
    score_rows<T, head_dim>(p, static_cast<const T*>(p.pooled_q) + head * p.rows * head_dim,
                            static_cast<const T*>(p.pooled_k) + order_head * p.key_blocks * head_dim, first_row,
                            own_begin(last_row), scores);
  __syncthreads();

  for (std::int64_t row = first_row + warp; row <= last_row; row += warps) {
    float* row_scores = scores + (row - first_row) * p.score_stride;
    const int prunable = own_begin(row);
    const bool dense = row >= first_dense_row || prunable == 0;
    const std::int64_t start = head * p.causal_blocks + row * p.first_row + row * (row + 1) / 2;
    const int diagonal = static_cast<int>(p.first_row + row);
    const int sink = prunable > 0 ? p.sink_block[order_head] : 0;
    Threshold threshold = keep_all();
    if (!dense) {
      const Weights all = rule.keep == KeepRule::none ? Weights{}
                          : p.given_scores == nullptr ? exponentiate(row_scores, prunable, lane)
                                                      : take(p.given_scores + start, row_scores, prunable,
                                                             p.to_diagonal ? diagonal + 1 : prunable, lane);
      __syncwarp();
      threshold = find_threshold(rule, row_scores, all, prunable, diagonal, sink, lane);
    }
    __syncwarp();
    const int length = write_list(rule, row_scores, threshold, prunable, diagonal, sink, p.block + start, lane);
    if (lane == 0) {
      p.row_start[head * p.rows + row] = start;
      p.row_count[head * p.rows + row] = length;
    }
  }
}

// Scores that have launches of their own.
cudaError_t score_blocks(const ScoreArgs& args, cudaStream_t stream) {
  switch (args.score) {
    case BlockScore::vertical_slash: return score_vertical_slash(args, stream);
    case BlockScore::flexible: return score_flexible(args, stream);
    case BlockScore::per_query: return score_per_query(args, stream);
    case BlockScore::sampled:
      if (const cudaError_t error = score_per_query(args, stream); error != cudaSuccess) return error;
      return score_mass(args, stream);
    default: return score_mass(args, stream);
  }
}

}  // namespace

cudaError_t select(const SelectArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const Options& options = args.options;
  const std::int64_t rows = g.rows();
  const std::int64_t columns = g.own_begin(rows - 1);
  // Eight words more than a multiple of 32 put the rows of a product's float2 writes in different banks.
  const std::int64_t stride = ceil_div(columns, 32) * 32 + 8;
  const bool given = options.score != BlockScore::mean_pool;
  const auto heads = args.heads.empty() ? std::span(&options, 1) : args.heads;
  const HeadRules rules{.all = rule_of(options), .each = args.rules, .q_heads = static_cast<int>(g.shape.q_heads)};
  if (given && reads_scores(heads)) {
    const ScoreArgs score{.geometry = g,
                          .order_heads = args.order_heads,
                          .score = options.score,
                          .scale = options.scale,
                          .dense_last_rows = common_dense_rows(heads),
                          .rules = rules,
                          .pooled_q = args.pooled_q,
                          .pooled_k = args.pooled_k,
                          .pooled_own = args.pooled_own,
                          .pooled_blocks = args.pooled_blocks,
                          .permuted_k = args.permuted_k,
                          .q = args.q,
                          .k = args.k,
                          .scratch = args.scratch,
                          .scratch_bytes = args.scratch_bytes,
                          .scores = reinterpret_cast<float*>(args.block)};
    if (const cudaError_t error = score_blocks(score, stream); error != cudaSuccess) return error;
  }
  constexpr std::int64_t smallest_share = 16 * 1024;
  const std::int64_t row_bytes = stride * sizeof(float);
  const int rows_at_once = static_cast<int>(std::clamp<std::int64_t>(max_shared_bytes / row_bytes, 1, mma_rows));
  const std::size_t shared_bytes = std::max(rows_at_once * row_bytes, smallest_share);
  const Params p{.pooled_k = args.pooled_k,
                 .pooled_q = args.pooled_q,
                 .sink_block = args.sink_block,
                 .row_start = args.row_start,
                 .row_count = args.row_count,
                 .block = args.block,
                 .rows = rows,
                 .first_row = g.first_row(),
                 .causal_blocks = g.causal_blocks_per_head(),
                 .key_blocks = args.pooled_blocks,
                 .q_heads = static_cast<int>(g.shape.q_heads),
                 .group = static_cast<int>(g.group()),
                 .order_group = static_cast<int>(g.shape.q_heads / args.order_heads),
                 .blocks_per_segment = g.segment / g.block,
                 .rows_at_once = rows_at_once,
                 .score_stride = static_cast<int>(stride),
                 .scale_log2 = static_cast<float>(options.scale / std::log(2.0)),
                 .rules = rules,
                 .given_scores = given ? reinterpret_cast<const float*>(args.block) : nullptr,
                 .to_diagonal = counts_kept_first(options.score)};
  return dispatch(args.dtype, g.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    const dim3 grid(static_cast<unsigned>(ceil_div(rows, rows_at_once)),
                    static_cast<unsigned>(g.shape.batch * g.shape.q_heads));
    return launch(select_rows<T, dim>, grid, select_threads, shared_bytes, stream, Start::early, p);
  });
}

}  // namespace pbsattn::cuda
