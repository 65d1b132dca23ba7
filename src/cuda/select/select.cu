// Stage two on Hopper: the key blocks of each row, in one launch.
//
// A CTA takes up to 16 rows of one head. Its 16 warps first multiply the rows' pooled queries by all pooled keys they
// may leave out (mma, operands straight from L2) and leave the scaled scores in shared memory:
//     S[row][block] = pooled Q . pooled K * scale * log2(e)
// Then a warp takes a row: softmax, the keep rule, and its list (keep.cuh).
//
// Scores other than mean_pool come from launches of their own, which leave a row's scores where its list will be, and
// the second of two scores in scratch. They are shares (per_query.cu, mass.cu, two_step.cu), or logarithms of them up
// to a constant of the row (means.cu, energy.cu). Those of all causal blocks go on to the row's diagonal: what is
// always kept then counts first, or competes with the rest (core/score_traits.h).
#include <algorithm>

#include "cuda/geometry.cuh"
#include "cuda/select/keep.cuh"
#include "cuda/select/pooled_product.cuh"
#include "cuda/select/scores/scores.h"
#include "cuda/select/select.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/online_sum.cuh"
#include "cuda/sm90/soft_cap.cuh"

namespace pbsattn::cuda {
namespace {

constexpr int select_threads = 512;
constexpr int warps = select_threads / 32;
constexpr int max_shared_bytes = 224 * 1024;

// Where a row's scores come from.
enum class Source {
  pooled,         // products of pooled queries and keys, here
  shares,         // given, of the blocks that may be left out
  causal_shares,  // given, of all causal blocks
  parts,          // the same of a whole of 1, of which they are no more than a part
  logarithms,     // given, of all causal blocks, of base 2
};

struct Params {
  RowGrid grid;
  Pooled pooled;
  const std::int32_t* sink_block;
  BlockLists lists;
  int rows_at_once;  // of a CTA
  int score_stride;
  float scale_log2;
  OptionsOfHeads options;
  Source source;
  const float* scores;         // given, of tile [batch][q_head][row] where its list will be
  const float* second_scores;  // logarithms in places alike, of a score that is two; else null
};

// `lists`: scores of a row; two are given, so that the element doesn't matter, and take the registers of two CTAs, as
// means of wide heads do.
template <class T, int head_dim, int lists, class Cap>
__global__ void __launch_bounds__(select_threads, head_dim > 128 ? 1 : 3 - lists)
    select_rows(const __grid_constant__ Params p, const __grid_constant__ Cap cap) {
  extern __shared__ float scores[];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int head = blockIdx.y;
  const int order_head = p.grid.order_head(head);
  // The last rows have the most blocks, so they start first.
  const int first_row = static_cast<int>(gridDim.x - 1 - blockIdx.x) * p.rows_at_once;
  const int last_row = min(first_row + p.rows_at_once, p.grid.rows) - 1;
  const auto own_begin = [&](int row) { return p.grid.own_begin(p.grid.diagonal(row)); };

  wait_for_earlier_kernels();
  const auto scored_rows = [&](const HeadOptions& options) {
    return options.keep == KeepRule::all || options.keep == KeepRule::none ? 0 : p.grid.rows - options.dense_last_rows;
  };
  if (p.source == Source::pooled && first_row < scored_rows(p.options.of(head)))
    multiply_pooled<head_dim>(
        means_of<T, head_dim>(p.pooled.q, head, p.grid.rows, first_row, last_row + 1 - first_row),
        means_of<T, head_dim>(p.pooled.k, order_head, p.pooled.k_blocks, 0, own_begin(last_row)), 0,
        own_begin(last_row), [](int) { return true; },
        [&](int row, int block, float2 products) {
          if (row < p.rows_at_once)
            *reinterpret_cast<float2*>(scores + row * p.score_stride + block) =
                make_float2(cap(products.x * p.scale_log2), cap(products.y * p.scale_log2));
        });
  __syncthreads();

  const HeadOptions& options = p.options.of(head);
  const int first_dense_row = options.keep == KeepRule::all ? 0 : p.grid.rows - options.dense_last_rows;
  for (int row = first_row + warp; row <= last_row; row += warps) {
    float* weights = scores + (row - first_row) * p.score_stride;
    const int candidates = own_begin(row);
    const bool dense = row >= first_dense_row || candidates == 0;
    const std::int64_t start = p.grid.list_start(head, row);
    const int diagonal = p.grid.diagonal(row);
    const int sink = candidates > 0 ? p.sink_block[order_head] : 0;
    float* const others = weights + p.rows_at_once * p.score_stride;  // of the second score
    Taker first{weights, dense ? keep_all() : keep_none()};
    Taker second{others, keep_none()};
    Weights all_others{};
#pragma unroll 1  // one copy of the keep rules
    for (int score = lists - 1; score >= 0 && row < scored_rows(options) && candidates > 0; --score) {
      const float* const given = (score == 0 ? p.scores : p.second_scores) + start;
      float* const to = score == 0 ? weights : others;
      Weights all = p.source == Source::pooled ? exponentiate(to, candidates, candidates, lane)
                    : p.source == Source::logarithms
                        ? exponentiate(given, to, candidates, diagonal + 1, lane)
                        : take(given, to, candidates, p.source == Source::shares ? candidates : diagonal + 1, lane);
      if (p.source == Source::parts && all.valid) all.total = 1;
      if (lists == 2 && options.counts()) {
        if (score == 1) {
          all_others = all;
          continue;
        }
        all = take_higher(weights, all, others, all_others, candidates, lane);
      }
      __syncwarp();
      const Threshold threshold = find_threshold(options, to, all, candidates, diagonal, sink, lane);
      if (score == 0)
        first.threshold = threshold;
      else
        second.threshold = threshold;
    }
    __syncwarp();
    const int length =
        write_list(options, first, second, lists == 2, candidates, diagonal, sink, p.lists.block + start, lane);
    if (const std::int64_t tile = std::int64_t{head} * p.grid.rows + row; lane == 0) {
      p.lists.row_start[tile] = start;
      p.lists.row_count[tile] = length;
    }
  }
}

Source source_of(BlockScore score) {
  switch (score) {
    case BlockScore::mean_pool: return Source::pooled;
    case BlockScore::mean_pool_causal:
    case BlockScore::energy:
    case BlockScore::dual_band: return Source::logarithms;
    case BlockScore::two_step: return Source::parts;
    default: return counts_kept_first(score) ? Source::causal_shares : Source::shares;
  }
}

// Enqueues a score that has launches of its own.
cudaError_t score_blocks(const SelectArgs& args, cudaStream_t stream) {
  switch (args.options.score) {
    case BlockScore::mean_pool: return cudaSuccess;
    case BlockScore::vertical_slash: return score_vertical_slash(args, stream);
    case BlockScore::flexible: return score_flexible(args, stream);
    case BlockScore::per_query: return score_per_query(args, stream);
    case BlockScore::two_step: return score_two_step(args, stream);
    case BlockScore::mean_pool_causal:
    case BlockScore::dual_band: return score_means(args, stream);
    case BlockScore::energy: return score_energy(args, stream);
    case BlockScore::sampled:
      if (const cudaError_t error = score_per_query(args, stream); error != cudaSuccess) return error;
      break;
    default: break;
  }
  return score_mass(args, stream);
}

}  // namespace

std::size_t score_scratch_size(const Options& options, const Geometry& geometry, std::int64_t order_heads,
                               std::int64_t dense_last_rows, int part_blocks) {
  switch (const BlockScore score = options.score) {
    case BlockScore::two_step:
      return two_step_scratch_size(options, geometry, order_heads, dense_last_rows, part_blocks);
    case BlockScore::dual_band: return dual_band_scratch_size(geometry);
    case BlockScore::vertical_slash: return vertical_slash_scratch_size(geometry);
    case BlockScore::flexible: return flexible_scratch_size(geometry);
    case BlockScore::antidiagonal:
    case BlockScore::antidiagonal_causal:
    case BlockScore::exact:
    case BlockScore::sampled: return mass_scratch_size(score, geometry, dense_last_rows);
    default: return 0;
  }
}

cudaError_t select(const SelectArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const BlockScore score = args.options.score;
  const Source source = source_of(score);
  const bool two = score == BlockScore::dual_band;
  // Those of a row's own segment compete with the others where scores are logarithms, and are only added up elsewhere.
  const std::int64_t columns = source == Source::logarithms ? g.blocks() : g.own_begin(g.rows() - 1);
  // Eight words more than a multiple of 32 put the rows of a product's float2 writes in different banks.
  const std::int64_t stride = ceil_div(columns, 32) * 32 + 8;
  if (reads_scores(args.option_sets()))
    if (const cudaError_t error = score_blocks(args, stream); error != cudaSuccess) return error;
  constexpr std::int64_t smallest_share = 16 * 1024;
  const std::int64_t row_bytes = (two ? 2 : 1) * stride * sizeof(float);
  const int rows_at_once = static_cast<int>(std::clamp<std::int64_t>(max_shared_bytes / row_bytes, 1, pooled_rows));
  const std::size_t shared_bytes = std::max(rows_at_once * row_bytes, smallest_share);
  const Params p{.grid = {g, args.permuted.order_heads},
                 .pooled = args.pooled,
                 .sink_block = args.permuted.sink_block,
                 .lists = args.lists,
                 .rows_at_once = rows_at_once,
                 .score_stride = static_cast<int>(stride),
                 .scale_log2 = scale_log2(args.options.scale),
                 .options = args.options_of_heads(),
                 .source = source,
                 .scores = scores_of(args),
                 .second_scores = two ? static_cast<const float*>(args.scratch) : nullptr};
  const dim3 grid(static_cast<unsigned>(ceil_div(g.rows(), rows_at_once)), static_cast<unsigned>(p.grid.heads));
  if (two)
    return launch(select_rows<__half, 64, 2, NoCap>, grid, select_threads, shared_bytes, stream, Start::early, p,
                  NoCap{});
  return dispatch(args.inputs.q.dtype, g.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    // Scores that are given are capped already.
    return with_log2_cap<dim>(source == Source::pooled ? args.options.softcap : 0.0F, [&]<class Cap>(const Cap& cap) {
      return launch(select_rows<T, dim, 1, Cap>, grid, select_threads, shared_bytes, stream, Start::early, p, cap);
    });
  });
}

}  // namespace pbsattn::cuda
