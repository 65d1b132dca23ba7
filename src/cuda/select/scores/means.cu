// Block scores from the means of blocks alone, of all causal blocks: BlockScore::mean_pool_causal and dual_band. As
// logarithms of base 2, which select() exponentiates:
//     S[row][block] = pooled Q . pooled K * factor * log2(e)
// with permuted keys before the row's own segment and keys where they were in it. dual_band takes two such products, of
// the columns of two bands of RoPE's frequencies, each with a factor for the head that makes up for what pooling left
// of the band; a launch before finds them from the means of the whole head (reference/dual_band.cc).
//
// The least work at 128K tokens, 32 heads of 128: 67 million products of means, 17 GFLOP, and 270 MB written.
#include <cmath>

#include "core/score_traits.h"
#include "cuda/geometry.cuh"
#include "cuda/memory/carver.h"
#include "cuda/select/pooled_product.cuh"
#include "cuda/select/scores/scores.h"
#include "cuda/sm90/lanes.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/online_sum.cuh"
#include "cuda/sm90/soft_cap.cuh"

namespace pbsattn::cuda {
namespace {

constexpr int product_threads = 256;
constexpr int calibrate_threads = 256;
constexpr int bands = 2;

struct Params {
  Pooled pooled;
  RowGrid grid;
  int scored_rows;
  float scale_log2;
  float* factors;        // [batch][q_heads][bands]; null: all columns, with scale_log2
  float* scores[bands];  // of tile [batch][q_head][row] where its list will be, and the second band's alike
};

// The fast and the slow band in units of columns, 16-byte chunks or halves of such, and as shares of all: of types that
// kernels read.
template <int head_dim>
struct Bands {
  static constexpr int pairs = head_dim / 2;
  static constexpr FrequencyBand fast = fast_band(pairs), slow = slow_band(pairs);
  static constexpr int unit = slow.begin % 8 == 0 ? 8 : 4;
  static constexpr int of_chunk = 8 / unit;
  static_assert(fast.begin == 0 && fast.end % unit == 0 && slow.begin % unit == 0 && slow.end == pairs);
  static constexpr int pair_units = pairs / unit;
  static constexpr int fast_end = fast.end / unit, slow_begin = slow.begin / unit;
  static constexpr double fast_share = static_cast<double>(fast.count()) / pairs;
  static constexpr double slow_share = static_cast<double>(slow.count()) / pairs;
};

// Tells whether a band has the columns of a unit of a mean.
template <int head_dim>
__device__ bool band_has(int band, int unit) {
  const int place = unit % Bands<head_dim>::pair_units;
  return band == 0 ? place < Bands<head_dim>::fast_end : place >= Bands<head_dim>::slow_begin;
}

// Sums of squares of means: of all columns, and of each band's.
struct Squares {
  double all = 0, fast = 0, slow = 0;
};

__device__ double sum_of_threads(double x, double (&of_warp)[calibrate_threads / 32]) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (const double part : of_warp) sum += part;
  return sum;
}

template <int head_dim, class T>
__device__ Squares sum_squares(Means<T> means) {
  constexpr int chunks = head_dim / 8;
  __shared__ double of_warp[calibrate_threads / 32];
  Squares sums;
  for (std::int64_t i = threadIdx.x; i < means.count * chunks; i += calibrate_threads) {
    const uint4 chunk = __ldg(reinterpret_cast<const uint4*>(means.data) + i);
    float of_chunk[8] = {};
    add_to<T>(of_chunk, chunk);
    using Bands = Bands<head_dim>;
#pragma unroll
    for (int part = 0; part < Bands::of_chunk; ++part) {
      double squares = 0;
#pragma unroll
      for (int c = part * Bands::unit; c < (part + 1) * Bands::unit; ++c)
        squares += static_cast<double>(of_chunk[c]) * static_cast<double>(of_chunk[c]);
      const int place = static_cast<int>(i) % chunks * Bands::of_chunk + part;
      sums.all += squares;
      if (band_has<head_dim>(0, place)) sums.fast += squares;
      if (band_has<head_dim>(1, place)) sums.slow += squares;
    }
  }
  return {sum_of_threads(sums.all, of_warp), sum_of_threads(sums.fast, of_warp), sum_of_threads(sums.slow, of_warp)};
}

// Writes a head's factors: the scale over the band's share of the columns and over what pooling left of its root mean
// squares, relative to those of all columns.
template <class T, int head_dim>
__global__ void __launch_bounds__(calibrate_threads) calibrate(const __grid_constant__ Params p) {
  const int head = blockIdx.x;
  const RowGrid& grid = p.grid;
  const Squares queries = sum_squares<head_dim>(means_of<T, head_dim>(p.pooled.q, head, grid.rows, 0, grid.rows));
  const Squares keys = sum_squares<head_dim>(
      means_of<T, head_dim>(p.pooled.own, grid.kv_head(head), p.pooled.own_blocks, 0, grid.blocks));
  if (threadIdx.x != 0) return;
  const auto factor = [&](double of_queries, double of_keys, double share_of_columns) {
    const auto ratio = [&](double part, double all, std::int64_t count) {
      const double whole = sqrt(all / static_cast<double>(count * head_dim));
      const double left = sqrt(part / (static_cast<double>(count * head_dim) * share_of_columns));
      return left / (whole < least_root_mean_square ? least_root_mean_square : whole);  // NaN stays
    };
    const double share =
        share_of_columns * ratio(of_queries, queries.all, grid.rows) * ratio(of_keys, keys.all, grid.blocks);
    return static_cast<float>(static_cast<double>(p.scale_log2) / share);
  };
  p.factors[head * bands] = factor(queries.fast, keys.fast, Bands<head_dim>::fast_share);
  p.factors[head * bands + 1] = factor(queries.slow, keys.slow, Bands<head_dim>::slow_share);
}

// Scores 16 rows of one head, the last ones first, since they have the most blocks; grid.z: the bands.
template <class T, int head_dim, class Cap>
__global__ void __launch_bounds__(product_threads)
    multiply_means(const __grid_constant__ Params p, const __grid_constant__ Cap cap) {
  const RowGrid& grid = p.grid;
  const int head = blockIdx.y;
  const int band = static_cast<int>(blockIdx.z);
  const int first_row = static_cast<int>(gridDim.x - 1 - blockIdx.x) * pooled_rows;
  const int last_row = min(first_row + pooled_rows, p.scored_rows) - 1;
  const float factor = p.factors == nullptr ? p.scale_log2 : p.factors[head * bands + band];
  float* const scores = band == 0 ? p.scores[0] : p.scores[1];
  const auto queries = means_of<T, head_dim>(p.pooled.q, head, grid.rows, first_row, last_row + 1 - first_row);
  const auto multiply = [&](const Means<T>& keys, int begin, int end, bool own) {
    multiply_pooled<head_dim, Bands<head_dim>::of_chunk>(
        queries, keys, begin, end, [&](int unit) { return p.factors == nullptr || band_has<head_dim>(band, unit); },
        [&](int place, int block, float2 products) {
          const int row = first_row + place;
          if (row > last_row) return;
          const int diagonal = grid.diagonal(row);
          const int first_own = grid.own_begin(diagonal);
          float* const to = scores + grid.list_start(head, row) + block;
          const auto wanted = [&](int b) { return own ? b >= first_own && b <= diagonal : b < first_own; };
          if (wanted(block)) to[0] = cap(products.x * factor);
          if (wanted(block + 1)) to[1] = cap(products.y * factor);
        });
  };
  const int own_of_first = grid.own_begin(grid.diagonal(first_row));
  const int own_of_last = grid.own_begin(grid.diagonal(last_row));
  multiply(means_of<T, head_dim>(p.pooled.k, grid.order_head(head), p.pooled.k_blocks, 0, own_of_last), 0, own_of_last,
           false);
  multiply(means_of<T, head_dim>(p.pooled.own, grid.kv_head(head), p.pooled.own_blocks, 0, grid.blocks), own_of_first,
           grid.diagonal(last_row) + 1, true);
}

// Of dual_band.
struct Scratch {
  Scratch(const Geometry& g, void* base) : carver(base) {
    const std::int64_t heads = g.shape.batch * g.shape.q_heads;
    carver.take(second, heads * g.causal_blocks_per_head());
    carver.take(factors, heads * bands);
  }
  Carver carver;
  float *second = nullptr, *factors = nullptr;
};

}  // namespace

std::size_t dual_band_scratch_size(const Geometry& g) {
  return Scratch(g, nullptr).carver.bytes;
}

cudaError_t score_means(const SelectArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const std::int64_t rows = scored_rows(args);
  if (rows == 0) return cudaSuccess;
  const bool dual = args.options.score == BlockScore::dual_band;
  const Scratch scratch(g, dual ? args.scratch : nullptr);
  const Params p{.pooled = args.pooled,
                 .grid = {g, args.permuted.order_heads},
                 .scored_rows = static_cast<int>(rows),
                 .scale_log2 = scale_log2(args.options.scale),
                 .factors = scratch.factors,
                 .scores = {scores_of(args), scratch.second}};
  return dispatch(args.inputs.q.dtype, g.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    if (dual)
      if (const cudaError_t error = launch(calibrate<T, dim>, dim3(p.grid.heads), calibrate_threads, 0, stream,
                                           Start::after_earlier_kernels, p);
          error != cudaSuccess)
        return error;
    const dim3 grid(static_cast<unsigned>(ceil_div(rows, pooled_rows)), p.grid.heads, dual ? bands : 1);
    return with_log2_cap<dim>(args.options.softcap, [&]<class Cap>(const Cap& cap) {
      return launch(multiply_means<T, dim, Cap>, grid, product_threads, 0, stream, Start::after_earlier_kernels, p,
                    cap);
    });
  });
}

}  // namespace pbsattn::cuda
