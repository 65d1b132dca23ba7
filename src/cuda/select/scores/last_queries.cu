// Softmax weights of a head's last queries on Hopper, added up by key (columns) and by distance (diagonals), in three
// launches: maxima and sums of units of keys, their merger, and the weights from the same products again.
//
// A warp multiplies 16 queries by 8 keys at a time (mma, operands straight from L2). In the third launch the weights of
// a tile of 128 keys meet in shared memory, beside those of the tile before:
//     weight[query][key of two tiles]
// where a thread adds up one column, or one diagonal that begins in the tile before. So each sum is taken by one
// thread, query after query: keys whose weights are equal have equal sums, and the same input gives the same bits.
#include <algorithm>

#include "cuda/geometry.cuh"
#include "cuda/memory/kv_rows.cuh"
#include "cuda/select/scores/last_queries.h"
#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/mma.cuh"
#include "cuda/sm90/online_sum.cuh"
#include "cuda/sm90/soft_cap.cuh"

namespace pbsattn::cuda {
namespace {

constexpr int threads = 256;
constexpr int warps = threads / 32;
constexpr int tile_keys = 128;
constexpr std::int64_t least_unit_tiles = 8;
constexpr std::int64_t most_units = 64;

// How keys are cut, by the sequence's length alone: so that a head's bits don't depend on which other heads go with it.
std::int64_t unit_tiles(const Geometry& g) {
  return std::max(ceil_div(ceil_div(g.shape.kv_len, tile_keys), most_units), least_unit_tiles);
}
std::int64_t units_of(const Geometry& g) {
  return ceil_div(g.shape.kv_len, unit_tiles(g) * tile_keys);
}

// A query has a place among `most` (64 or 128), the last of which is the call's last query; places before the first of
// the queries that count are empty. Warps whose queries are the same share a tile's keys.
template <int most>
constexpr int sharers = warps * 16 / most;

struct Params {
  OptionsOfHeads options;
  KeepRule keep;
  RowGrid grid;
  ConstView q, k;
  PageTable pages;  // of k
  int queries;
  int unit_tiles, units;
  float scale_log2;
  Masses masses;

  __device__ bool takes(int head) const { return options.of(head).keep == keep; }
};

// A warp's 16 queries, and its share of the keys that it multiplies them by: of a tile's groups of 8 keys every
// sharers<most>-th from `first_group` on. Lane 4 g + t holds queries `row` = g and g + 8, as in pooled_product.cuh.
template <class T, int head_dim, int most>
struct WarpWork {
  static constexpr int chunks = head_dim / 32;  // of a lane

  __device__ WarpWork(const Params& p, int head)
      : keys(p.k, p.pages, head / p.grid.q_heads, p.grid.kv_head(head % p.grid.q_heads)) {
    const T* const queries = head_of<T>(p.q, head / p.grid.q_heads, head % p.grid.q_heads);
    const auto load = [&](uint4(&to)[chunks], int place) {
      const bool present = place >= most - p.queries;
      load_row(to, queries + (present ? p.grid.q_len - most + place : 0) * p.q.token_stride, present);
    };
    load(low, row);
    load(high, row + 8);
    last_key[0] = p.grid.kv_len - most + row;
    last_key[1] = last_key[0] + 8;
  }

  __device__ static void load_row(uint4 (&to)[chunks], const T* row, bool present) {
    const uint4* from = reinterpret_cast<const uint4*>(row) + threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < chunks; ++i) to[i] = present ? __ldg(from + 4 * i) : make_uint4(0, 0, 0, 0);
  }

  // Multiplies this lane's two rows by keys first(i) + 2 t and first(i) + 2 t + 1, for each i of some. Pages have a
  // loop of their own, so that loads of contiguous keys are under way together.
  template <class Cap, int count, class First>
  __device__ void multiply(const Params& p, const Cap& cap, float (&s)[count][4], First&& first) const {
    const auto multiply_rows = [&](auto&& row_of) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int key = first(i) + static_cast<int>(threadIdx.x) % 32 / 4;
        multiply(cap, row_of(key < p.grid.kv_len ? key : 0), key < p.grid.kv_len, s[i]);
      }
    };
    if (keys.paged())
      multiply_rows([&](int key) {
        if constexpr (head_dim == 96) __syncwarp();  // else registers don't hold what is loaded ahead
        return keys.in_pages(key);
      });
    else
      multiply_rows([&](int key) { return keys.contiguous(key); });
  }
  template <class Cap>
  __device__ void multiply(const Cap& cap, const T* of_key, bool present, float (&s)[4]) const {
    uint4 k[chunks];
    load_row(k, of_key, present);
#pragma unroll
    for (float& x : s) x = 0;
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      mma<T>(s, low[i].x, high[i].x, low[i].y, high[i].y, k[i].x, k[i].y);
      mma<T>(s, low[i].z, high[i].z, low[i].w, high[i].w, k[i].z, k[i].w);
    }
    apply(cap, s);
  }

  int first_group = threadIdx.x / 32 / (most / 16);
  int row = threadIdx.x / 32 % (most / 16) * 16 + threadIdx.x % 32 / 4;
  Rows<T> keys;
  std::int64_t last_key[2];  // visible
  uint4 low[chunks], high[chunks];
};

// Writes maxima and sums of a unit of keys: a thread block's own for each query and each of the warps that share it.
template <class T, int head_dim, int most, class Cap>
__global__ void __launch_bounds__(threads, head_dim > 128 ? 1 : 2)
    find_parts(const __grid_constant__ Params p, const __grid_constant__ Cap cap) {
  const int head = blockIdx.y;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head)) return;
  const WarpWork<T, head_dim, most> work(p, head);

  constexpr int at_once = 4;  // groups of 8 keys
  constexpr int groups = tile_keys / 8;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * p.unit_tiles * tile_keys;
  const std::int64_t end =
      min(begin + static_cast<std::int64_t>(p.unit_tiles) * tile_keys, std::int64_t{p.grid.kv_len});
  Statistics state[2];
  for (std::int64_t tile = begin; tile < end; tile += tile_keys)
    for (int group = work.first_group; group < groups; group += at_once * sharers<most>) {
      float s[at_once][4];
      work.multiply(p, cap, s, [&](int i) { return static_cast<int>(tile) + (group + i * sharers<most>)*8; });
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        Statistics part;
        part.max = state[r].max;
#pragma unroll
        for (int i = 0; i < at_once; ++i)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = s[i][2 * r + c];
            if (tile + (group + i * sharers<most>)*8 + threadIdx.x % 4 * 2 + c > work.last_key[r]) x = -INFINITY;
            part.max = fmaxf(part.max, x);
          }
        const float shift = Statistics::finite_or_zero(part.max);
        part.sum = state[r].sum * sm90::exp2_fast((state[r].max - shift) * p.scale_log2);
#pragma unroll
        for (int i = 0; i < at_once; ++i)
          part.sum += sm90::exp2_fast((s[i][2 * r] - shift) * p.scale_log2) +
                      sm90::exp2_fast((s[i][2 * r + 1] - shift) * p.scale_log2);
        state[r] = part;
      }
    }
  float2* to = p.masses.parts + ((head * p.units + blockIdx.x) * sharers<most> + work.first_group) * most;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    state[r].merge_across_lanes(p.scale_log2);
    if (threadIdx.x % 4 == 0) to[work.row + 8 * r] = make_float2(state[r].max, state[r].sum);
  }
}

// Writes the largest product of each query, and log2 of the sum: +inf for places and softmaxes without a value.
template <int most>
__global__ void __launch_bounds__(most) merge_parts(const __grid_constant__ Params p) {
  const int head = blockIdx.x;
  const int place = static_cast<int>(threadIdx.x);
  const int count = p.units * sharers<most>;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head)) return;
  const float2* parts = p.masses.parts + head * count * most + place;
  Statistics total;
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float2 part = parts[i * most];
    total.merge({part.x, part.y}, p.scale_log2);
  }
  const bool counts = place >= most - p.queries && total.sum > 0 && total.sum < INFINITY;
  p.masses.log_sums[head * most + place] = counts ? make_float2(total.max, log2f(total.sum)) : make_float2(0, INFINITY);
}

constexpr int weight_stride = 2 * tile_keys + 8;  // puts the rows of a warp's float2 writes in different banks
template <int most>
constexpr int weight_threads = 4 * most;
template <int most>
constexpr int weight_bytes = (most * weight_stride + 2 * tile_keys) * static_cast<int>(sizeof(float));

template <class T, int head_dim, int most, class Cap>
__global__ void __launch_bounds__(weight_threads<most>, head_dim > 128 ? 1 : 128 / most)
    add_weights(const __grid_constant__ Params p, const __grid_constant__ Cap cap) {
  extern __shared__ float weights[];  // [most][weight_stride], and sums of the second half of 128 queries
  const int head = blockIdx.y;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!p.takes(head)) return;
  const WarpWork<T, head_dim, most> work(p, head);
  const float2 log_sum[2] = {p.masses.log_sums[head * most + work.row], p.masses.log_sums[head * most + work.row + 8]};

  const int begin = static_cast<int>(blockIdx.x) * p.unit_tiles;
  const int end = min(begin + p.unit_tiles, (p.grid.kv_len + tile_keys - 1) / tile_keys);
  // Which sum a thread takes: a column's or a diagonal's, over 64 queries.
  constexpr int halves = most / 64;
  const int i = static_cast<int>(threadIdx.x) % tile_keys;
  const bool adds_columns = threadIdx.x / tile_keys < halves;
  const int first_place = static_cast<int>(threadIdx.x) / tile_keys % halves * 64;
  float* second_half = weights + most * weight_stride + (adds_columns ? 0 : tile_keys) + i;
  if (begin == 0)  // diagonals that begin before key 0 find nothing there
    for (int j = static_cast<int>(threadIdx.x); j < most * tile_keys; j += weight_threads<most>)
      weights[j / tile_keys * weight_stride + tile_keys + j % tile_keys] = 0;

  // The tile after the unit's last one has the ends of diagonals that begin in that.
  for (int tile = begin; tile <= end; ++tile) {
    float* half = weights + tile % 2 * tile_keys;
    constexpr int at_once = head_dim > 192 ? 1 : head_dim > 128 ? 2 : 4;  // groups of 8 keys
    constexpr int step = weight_threads<most> / 32 * 16 / most;
    for (int group = work.first_group; group < tile_keys / 8; group += at_once * step) {
      float s[at_once][4];
      work.multiply(p, cap, s, [&](int j) { return tile * tile_keys + (group + j * step) * 8; });
#pragma unroll
      for (int j = 0; j < at_once; ++j) {
        const int column = (group + j * step) * 8 + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float2 weight;
          const auto of = [&](float x, std::int64_t key) {
            const bool counts = key <= work.last_key[r] && log_sum[r].y < INFINITY;
            return counts ? sm90::exp2_fast(fmaf(x - log_sum[r].x, p.scale_log2, -log_sum[r].y)) : 0.0F;
          };
          weight.x = of(s[j][2 * r], tile * tile_keys + column);
          weight.y = of(s[j][2 * r + 1], tile * tile_keys + column + 1);
          *reinterpret_cast<float2*>(half + (work.row + 8 * r) * weight_stride + column) = weight;
        }
      }
    }
    __syncthreads();
    float sum = 0;
    const std::int64_t key = tile * tile_keys + i;
    // Of the diagonal on which the first place meets the same key of the tile before.
    const std::int64_t distance = p.grid.kv_len - most - (key - tile_keys);
    const bool wanted = adds_columns ? tile < end && key < p.grid.kv_len
                                     : (tile > begin || begin == 0) && distance >= 0 && distance < p.grid.kv_len;
    if (wanted && adds_columns) {
#pragma unroll 16
      for (int place = first_place; place < first_place + 64; ++place) sum += half[place * weight_stride + i];
    } else if (wanted) {
      const float* before = weights + (tile + 1) % 2 * tile_keys;
#pragma unroll 16
      for (int place = first_place; place < first_place + 64; ++place)
        sum += (i + place < tile_keys ? before + i + place : half + i + place - tile_keys)[place * weight_stride];
    }
    if (first_place > 0) *second_half = sum;
    __syncthreads();
    if (!wanted || first_place > 0) continue;
    if constexpr (halves == 2) sum += *second_half;
    if (adds_columns)
      p.masses.columns[std::int64_t{head} * p.grid.kv_len + key] = sum;
    else
      p.masses.distances[std::int64_t{head} * p.grid.kv_len + distance] = sum;
  }
}

template <class T, int head_dim, int most, class Cap>
cudaError_t launch_all(const Params& p, const Cap& cap, cudaStream_t stream) {
  const dim3 grid(p.units, p.grid.heads);
  return in_order(
      [&] {
        return launch(find_parts<T, head_dim, most, Cap>, grid, threads, 0, stream, Start::after_earlier_kernels, p,
                      cap);
      },
      [&] { return launch(merge_parts<most>, dim3(p.grid.heads), most, 0, stream, Start::early, p); },
      [&] {
        return launch(add_weights<T, head_dim, most, Cap>, grid, weight_threads<most>, weight_bytes<most>, stream,
                      Start::early, p, cap);
      });
}

}  // namespace

Masses::Masses(const Geometry& g, int most_queries, Carver& carver) {
  constexpr std::size_t alignment = 256;
  const std::int64_t heads = g.shape.batch * g.shape.q_heads;
  carver.take(columns, heads * g.shape.kv_len, alignment);
  carver.take(distances, heads * g.shape.kv_len, alignment);
  carver.take(parts, heads * units_of(g) * warps * 16, alignment);
  carver.take(log_sums, heads * most_queries, alignment);
}

cudaError_t find_masses(const SelectArgs& args, KeepRule keep, std::int64_t queries, int most_queries,
                        const Masses& masses, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const Params p{.options = args.options_of_heads(),
                 .keep = keep,
                 .grid = {g, args.permuted.order_heads},
                 .q = args.inputs.q,
                 .k = args.inputs.k,
                 .pages = {args.inputs.pages, g.shape.kv_len},
                 .queries = static_cast<int>(queries),
                 .unit_tiles = static_cast<int>(unit_tiles(g)),
                 .units = static_cast<int>(units_of(g)),
                 .scale_log2 = scale_log2(args.options.scale),
                 .masses = masses};
  return dispatch(p.q.dtype, g.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    return with_cap<dim>(args.options.softcap, args.options.scale, [&](const auto& cap) {
      return most_queries == 64 ? launch_all<T, dim, 64>(p, cap, stream) : launch_all<T, dim, 128>(p, cap, stream);
    });
  });
}

}  // namespace pbsattn::cuda
