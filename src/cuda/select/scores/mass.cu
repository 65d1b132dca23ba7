// Softmax mass of key blocks on Hopper: BlockScore::antidiagonal, antidiagonal_causal, exact and half of sampled.
//
// All are one product of *lines*. A line is the keys or queries that are summed in one score: a single one (exact;
// sampled, whose queries a launch before gathers), or a patch of 8, where key i meets query 7 - i (antidiagonal). Two
// launches:
//   1. S[query line][key line] = Q K^T in tiles of 256 x 128, through the copy engine and wgmma, and of each tile only
//          log_sums[query line][block] = log2 of the sum of exp2(S * scale * log2(e)) over the block's key lines
//      goes to memory: 4 bytes for 16 or 128 scores, so the product is computed once and N x N scores are never there.
//      mass_keys.cuh has it for single queries and keys, mass_patches.cuh for patches.
//   2. share[row][block] = mean over the row's query lines of exp2(log_sums[line][block] - log2 of the line's whole
//   sum)
// Key lines before a row's own segment come from the permuted keys; those of the own segment, where they count, from
// the caller's, in tiles of their own.
//
// A patch of 8 is no axis of a tensor, because the sequence need not begin or end with a whole one. Instead the copy
// engine takes every 8th token, beginning with the i-th of a patch, for each i in turn: 64 elements of 32 lines at a
// time.
//
// The sums of some heads, or of some rows of one head, are in memory at a time: score_scratch_size().
//
// The least work at 128K tokens, 32 heads of 128, is 8.8 TFLOP for antidiagonals, 11 to 13 ms; of sampled 0.55 TFLOP
// and 2.1 G exponentials for each of a row's queries, 0.7 to 0.8 ms.
#include <algorithm>
#include <cmath>

#include "core/score_traits.h"
#include "cuda/select/scores/mass_keys.cuh"
#include "cuda/select/scores/mass_patches.cuh"
#include "cuda/sm90/tensor_map.h"

namespace pbsattn::cuda {
namespace {

using namespace mass;

constexpr int share_threads = 256;
constexpr std::int64_t most_sums = std::int64_t{68} << 20;  // in memory at a time: 8 heads of 128K tokens in patches

// Brings the sampled queries of a row together; zeros for those that a short row lacks.
__global__ void __launch_bounds__(128)
    gather_sampled(const __grid_constant__ Params p, const __grid_constant__ ConstView q, uint4* gathered, int chunks) {
  const int row = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const int line = static_cast<int>(threadIdx.x) / chunks;
  const int chunk = static_cast<int>(threadIdx.x) % chunks;
  if (line >= p.query_lines) return;
  const int kind = p.kind_of(row);
  const std::int64_t token = (p.first_row + row) * std::int64_t{block_tokens} + p.sampled_at[kind][line] - p.q_offset;
  const auto* from = static_cast<const std::uint16_t*>(q.data) + head / p.q_heads * q.batch_stride +
                     head % p.q_heads * q.head_stride + token * q.token_stride;
  gathered[((head * static_cast<std::int64_t>(p.rows) + row) * p.query_lines + line) * chunks + chunk] =
      line < p.sampled_count[kind] ? __ldg(reinterpret_cast<const uint4*>(from) + chunk) : make_uint4(0, 0, 0, 0);
}

// A row of one head: the mean over its query lines of their shares; of sampled, the mean of that and of what is there.
// Lines without a value make the row's scores NaN.
__global__ void __launch_bounds__(share_threads) share_mass(const __grid_constant__ Params p) {
  constexpr int warps = share_threads / 32;
  __shared__ float totals[block_tokens];
  const int row = p.row_begin + static_cast<int>(blockIdx.x);
  const int block = p.first_row + row;
  const int count = p.causal ? block + 1 : p.own_begin(block);
  const float* sums =
      p.log_sums + blockIdx.y * p.head_sums + (p.entries_before(row) - p.entries_before(p.row_begin)) * p.query_lines;
  // Of the block's lines, those that hold a query of this call.
  const std::int64_t first_token = block * std::int64_t{block_tokens} - p.q_offset;
  const int first = p.sampled ? 0 : static_cast<int>(max(-first_token, std::int64_t{0})) / p.patch;
  const int last =
      p.sampled ? p.sampled_count[p.kind_of(row)]
                : static_cast<int>(min(p.q_len - first_token, std::int64_t{block_tokens}) + p.patch - 1) / p.patch;

  for (int line = first + static_cast<int>(threadIdx.x) / 32; line < last; line += warps) {
    const float* of_line = sums + line * (block + 1);
    float max = -INFINITY;
    for (int b = threadIdx.x % 32; b < count; b += 32) max = fmaxf(max, of_line[b]);
    const float shift = Statistics::finite_or_zero(warp_max(max));
    float sum = 0;
    for (int b = threadIdx.x % 32; b < count; b += 32) sum += sm90::exp2_fast(of_line[b] - shift);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) totals[line] = shift + log2f(sum);
  }
  __syncthreads();
  float* to = p.scores + (p.first_head + blockIdx.y) * p.causal_blocks + p.entries_before(row);
  for (int b = threadIdx.x; b < count; b += share_threads) {
    float share = 0;
    for (int line = first; line < last; ++line) share += sm90::exp2_fast(sums[line * (block + 1) + b] - totals[line]);
    share /= static_cast<float>(last - first);
    to[b] = p.sampled ? 0.5F * (to[b] + share) : share;
  }
}

struct Work {
  Work(const Geometry& geometry, std::int64_t lines_of_block, std::int64_t dense_last_rows)
      : g(geometry),
        lines(lines_of_block),
        begin(std::max<std::int64_t>(g.segment / g.block - g.first_row(), 0)),
        end(std::max(g.rows() - dense_last_rows, begin)) {}
  // Sums of one head's rows [from, to).
  std::int64_t sums(std::int64_t from, std::int64_t to) const {
    const auto before = [&](std::int64_t row) { return row * g.first_row() + row * (row + 1) / 2; };
    return (before(to) - before(from)) * lines;
  }
  std::int64_t heads_at_once(std::int64_t room) const {
    return std::max<std::int64_t>(room / std::max<std::int64_t>(sums(begin, end), 1), 1);
  }
  // The end of the rows from `row` on whose sums have room; at least `step` rows.
  std::int64_t end_of_part(std::int64_t row, std::int64_t step, std::int64_t room) const {
    std::int64_t part = std::min(row + step, end);
    while (part < end && sums(row, std::min(part + step, end)) <= room) part = std::min(part + step, end);
    return part;
  }
  const Geometry& g;
  std::int64_t lines, begin, end;  // rows [begin, end) have something to score
};

bool in_patches(BlockScore score) {
  return score == BlockScore::antidiagonal || score == BlockScore::antidiagonal_causal;
}
int query_lines_of(BlockScore score) {
  if (score == BlockScore::sampled) return max_sampled;
  return in_patches(score) ? lines_of_block : block_tokens;
}
// Tiles of keys that a tile of the last rows meets, or more: those of the permuted keys, and of the caller's those of
// the rows' own segments.
std::int64_t most_tiles(const Params& p) {
  const int rows_of_tile = tile_queries / p.query_lines;
  const std::int64_t last = p.first_row + p.row_end;
  return p.patch == 1 ? last + key_groups * (std::max(rows_of_tile / key_groups, 1) + p.blocks_per_segment)
                      : ceil_div(last, blocks_of_tile) + (rows_of_tile + p.blocks_per_segment) / blocks_of_tile + 2;
}
std::size_t gathered_bytes(BlockScore score, const Geometry& g) {
  constexpr std::int64_t element_bytes = 2;
  return score == BlockScore::sampled
             ? g.shape.batch * g.shape.q_heads * g.rows() * max_sampled * g.shape.head_dim * element_bytes
             : 0;
}

// One of the two first launches.
struct FirstLaunch {
  void (*kernel)(Params, Maps);
  int threads, shared_bytes;
  std::int64_t tiles_of_item;
};

cudaError_t score_all(const ScoreArgs& args, Params p, const Maps& maps, const FirstLaunch& first,
                      cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(first.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, first.shared_bytes);
  if (error != cudaSuccess) return error;

  const Geometry& g = args.geometry;
  const Work work(g, p.query_lines, args.dense_last_rows);
  const int rows_of_tile = tile_queries / p.query_lines;
  const std::int64_t heads = g.shape.batch * g.shape.q_heads;
  const auto room = static_cast<std::int64_t>((args.scratch_bytes - gathered_bytes(args.score, g)) / sizeof(float));
  const std::int64_t heads_at_once = work.heads_at_once(room);
  for (std::int64_t head = 0; head < heads; head += heads_at_once)
    for (std::int64_t row = work.begin; row < work.end; row = p.row_end) {
      const std::int64_t row_end = work.end_of_part(row, rows_of_tile, room);
      p.first_head = static_cast<int>(head);
      p.row_begin = static_cast<int>(row);
      p.row_end = static_cast<int>(row_end);
      p.head_sums = work.sums(row, row_end);
      const auto heads_now = static_cast<unsigned>(std::min(heads_at_once, heads - head));
      first.kernel<<<dim3(static_cast<unsigned>(ceil_div(most_tiles(p), first.tiles_of_item)),
                          static_cast<unsigned>(ceil_div(row_end - row, rows_of_tile)), heads_now),
                     first.threads, first.shared_bytes, stream>>>(p, maps);
      share_mass<<<dim3(static_cast<unsigned>(row_end - row), heads_now), share_threads, 0, stream>>>(p);
    }
  return cudaGetLastError();
}

// Fills in where the sampled queries of each kind of row are, and gathers them.
cudaError_t gather(const ScoreArgs& args, Params& p, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  for (const std::int64_t row : {std::int64_t{0}, std::min<std::int64_t>(1, g.rows() - 1), g.rows() - 1}) {
    // The first kind's row comes first, and the last kind's last, so a row that is both is of the first kind.
    const int kind = row == 0 ? 0 : row < g.rows() - 1 ? 1 : 2;
    const std::int64_t queries = g.row_end(row) - g.row_begin(row);
    p.sampled_count[kind] = static_cast<int>(sampled_queries(queries));
    for (int i = 0; i < p.sampled_count[kind]; ++i)
      p.sampled_at[kind][i] =
          static_cast<int>(g.row_begin(row) - g.diagonal(row) * g.block + sampled_query(queries, i));
  }
  const int chunks = static_cast<int>(g.shape.head_dim / 8);
  gather_sampled<<<dim3(static_cast<unsigned>(g.rows()), static_cast<unsigned>(g.shape.batch * g.shape.q_heads)), 128,
                   0, stream>>>(p, args.q, static_cast<uint4*>(args.scratch), chunks);
  return cudaGetLastError();
}

}  // namespace

std::size_t score_scratch_size(BlockScore score, const Geometry& geometry, std::int64_t dense_last_rows) {
  if (score == BlockScore::dual_band) return dual_band_scratch_size(geometry);
  if (score == BlockScore::vertical_slash) return vertical_slash_scratch_size(geometry);
  if (score == BlockScore::flexible) return flexible_scratch_size(geometry);
  if (score != BlockScore::exact && score != BlockScore::sampled && !in_patches(score)) return 0;
  const Work work(geometry, query_lines_of(score), dense_last_rows);
  const std::int64_t heads = geometry.shape.batch * geometry.shape.q_heads;
  return gathered_bytes(score, geometry) + std::min(heads * work.sums(work.begin, work.end), most_sums) * sizeof(float);
}

cudaError_t score_mass(const ScoreArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const int tokens_of_line = in_patches(args.score) ? patch : 1;
  Params p{.log_sums = reinterpret_cast<float*>(static_cast<std::byte*>(args.scratch) + gathered_bytes(args.score, g)),
           .scores = args.scores,
           .causal_blocks = g.causal_blocks_per_head(),
           .q_offset = g.q_offset(),
           .q_len = g.shape.q_len,
           .q_heads = static_cast<int>(g.shape.q_heads),
           .group = static_cast<int>(g.group()),
           .heads_of_order = static_cast<int>(g.shape.q_heads / args.order_heads),
           .first_row = static_cast<int>(g.first_row()),
           .blocks_per_segment = g.segment / g.block,
           .causal = counts_kept_first(args.score),
           .scale_log2 = static_cast<float>(args.scale / std::log(2.0) / tokens_of_line),
           .patch = tokens_of_line,
           .query_lines = query_lines_of(args.score),
           .sampled = args.score == BlockScore::sampled,
           .rows = static_cast<int>(g.rows())};
  const std::int64_t permuted_head = g.permuted_len() * g.shape.head_dim;
  const ConstView permuted =
      args.permuted_k == nullptr
          ? args.k
          : ConstView{args.permuted_k, args.k.dtype, args.order_heads * permuted_head, permuted_head, g.shape.head_dim};
  const Box box =
      tokens_of_line == 1 ? Box{tile_tokens, static_cast<int>(g.shape.head_dim)} : Box{lines_of_box, panel, patch};
  ConstView q = args.q;
  std::int64_t q_tokens = g.shape.q_len;
  if (p.sampled) {
    q_tokens = g.rows() * max_sampled;
    q = {args.scratch, q.dtype, g.shape.q_heads * q_tokens * g.shape.head_dim, q_tokens * g.shape.head_dim,
         g.shape.head_dim};
    if (const cudaError_t error = gather(args, p, stream); error != cudaSuccess) return error;
  }
  Maps maps;
  if (!make_tensor_map(maps.q, q, g.shape.batch, g.shape.q_heads, q_tokens, g.shape.head_dim, box) ||
      !make_tensor_map(maps.permuted_k, permuted, g.shape.batch, args.order_heads, g.permuted_len(), g.shape.head_dim,
                       box) ||
      !make_tensor_map(maps.k, args.k, g.shape.batch, g.shape.kv_heads, g.shape.kv_len, g.shape.head_dim, box))
    return cudaErrorInvalidValue;
  return dispatch(args.q.dtype, g.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    constexpr int alignment = 1024;
    return tokens_of_line == 1
               ? score_all(args, p, maps,
                           {score_keys<T, dim>, key_threads, static_cast<int>(sizeof(KeyShared<dim>)) + alignment,
                            steps_of_item},
                           stream)
               : score_all(args, p, maps,
                           {score_lines<T, dim>, threads, static_cast<int>(sizeof(Shared)) + alignment, tiles_of_item},
                           stream);
  });
}

}  // namespace pbsattn::cuda
