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
#include "cuda/memory/carver.h"
#include "cuda/select/scores/mass_keys.cuh"
#include "cuda/select/scores/mass_patches.cuh"
#include "cuda/sm90/tensor_map.h"

namespace pbsattn::cuda {
namespace {

using namespace mass;

constexpr int share_threads = 256;
constexpr std::int64_t most_sums = std::int64_t{68} << 20;  // in memory at a time: 8 heads of 128K tokens in patches

// Brings the sampled queries of a row together; zeros for those that a short row lacks.
__global__ void __launch_bounds__(256)
    gather_sampled(const __grid_constant__ Params p, const __grid_constant__ ConstView q, uint4* gathered, int chunks) {
  const int row = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const int line = static_cast<int>(threadIdx.x) / chunks;
  const int chunk = static_cast<int>(threadIdx.x) % chunks;
  if (line >= p.query_lines) return;
  const int kind = p.kind_of(row);
  const int query = p.grid.first_query(p.grid.diagonal(row)) + p.sampled_at[kind][line];
  const auto* from = head_of<std::uint16_t>(q, head / p.grid.q_heads, head % p.grid.q_heads) + query * q.token_stride;
  gathered[((head * static_cast<std::int64_t>(p.grid.rows) + row) * p.query_lines + line) * chunks + chunk] =
      line < p.sampled_count[kind] ? __ldg(reinterpret_cast<const uint4*>(from) + chunk) : make_uint4(0, 0, 0, 0);
}

// Writes of a row of one head the mean over its query lines of their shares; of sampled, the mean of that and of what
// is there. Lines without a value make the row's scores NaN.
__global__ void __launch_bounds__(share_threads) share_mass(const __grid_constant__ Params p) {
  constexpr int warps = share_threads / 32;
  __shared__ float totals[block_tokens];
  const int row = p.row_begin + static_cast<int>(blockIdx.x);
  const int block = p.grid.diagonal(row);
  const int count = p.causal ? block + 1 : p.grid.own_begin(block);
  const float* sums = p.log_sums + blockIdx.y * p.head_sums + p.sums_before(row);
  // Of the block's lines, those that hold a query of this call.
  const Span queries = p.grid.queries_of(block);
  const int first = p.sampled ? 0 : queries.begin / p.patch;
  const int last = p.sampled ? p.sampled_count[p.kind_of(row)] : (queries.end + p.patch - 1) / p.patch;

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
  float* to = p.scores + p.grid.list_start(p.first_head + blockIdx.y, row);
  for (int b = threadIdx.x; b < count; b += share_threads) {
    float share = 0;
    for (int line = first; line < last; ++line) share += sm90::exp2_fast(sums[line * (block + 1) + b] - totals[line]);
    share /= static_cast<float>(last - first);
    to[b] = p.sampled ? 0.5F * (to[b] + share) : share;
  }
}

// Rows [begin, end) have something to score. Those of some heads, or some of one head's, are worked on at a time.
struct Work {
  Work(const Geometry& g, std::int64_t lines_of_block, std::int64_t scored_rows)
      : grid(g, g.shape.q_heads),
        lines(lines_of_block),
        begin(grid.first_sparse_row()),
        end(std::max(scored_rows, begin)) {}
  // Returns how many sums a head has in rows [from, to).
  std::int64_t sums(std::int64_t from, std::int64_t to) const {
    return (grid.entries_before(static_cast<int>(to)) - grid.entries_before(static_cast<int>(from))) * lines;
  }
  std::int64_t heads_at_once(std::int64_t room) const {
    return std::max<std::int64_t>(room / std::max<std::int64_t>(sums(begin, end), 1), 1);
  }
  // Returns the end of the rows from `row` on whose sums have room; at least `step` rows.
  std::int64_t end_of_part(std::int64_t row, std::int64_t step, std::int64_t room) const {
    std::int64_t part = std::min(row + step, end);
    while (part < end && sums(row, std::min(part + step, end)) <= room) part = std::min(part + step, end);
    return part;
  }
  RowGrid grid;
  std::int64_t lines, begin, end;
};

bool in_patches(BlockScore score) {
  return score == BlockScore::antidiagonal || score == BlockScore::antidiagonal_causal;
}
int query_lines_of(BlockScore score) {
  if (score == BlockScore::sampled) return most_sampled;
  return in_patches(score) ? lines_of_block : block_tokens;
}
// Returns how many tiles of keys a tile of the last rows meets, or more: those of the permuted keys, and of the
// caller's those of the rows' own segments.
std::int64_t most_tiles(const Params& p) {
  const int rows_of_tile = tile_queries / p.query_lines;
  const std::int64_t last = p.grid.diagonal(p.row_end);
  const int per_segment = p.grid.blocks_per_segment;
  return p.patch == 1 ? last + key_groups * (std::max(rows_of_tile / key_groups, 1) + per_segment)
                      : ceil_div(last, blocks_of_tile) + (rows_of_tile + per_segment) / blocks_of_tile + 2;
}

struct Scratch {
  Scratch(BlockScore score, const Geometry& g, void* base) : carver(base) {
    constexpr std::int64_t element_bytes = 2;
    if (score == BlockScore::sampled)
      carver.take(gathered,
                  g.shape.batch * g.shape.q_heads * g.rows() * most_sampled * g.shape.head_dim * element_bytes);
    carver.take(log_sums, 0);  // what is left is theirs
  }
  Carver carver;
  std::byte* gathered = nullptr;  // of sampled: its queries, [batch][q_heads][rows][most_sampled][head_dim]
  float* log_sums = nullptr;
};

// One of the two first launches.
template <class Cap>
struct FirstLaunch {
  void (*kernel)(Params, Maps, Cap);
  Cap cap;
  int threads, shared_bytes;
  std::int64_t tiles_of_item;
};

template <class Cap>
cudaError_t score_all(Params p, const Work& work, std::size_t scratch_bytes, const Maps& maps,
                      const FirstLaunch<Cap>& first, cudaStream_t stream) {
  const int rows_of_tile = tile_queries / p.query_lines;
  const auto room = static_cast<std::int64_t>(scratch_bytes / sizeof(float));
  const std::int64_t heads_at_once = work.heads_at_once(room);
  for (std::int64_t head = 0; head < p.grid.heads; head += heads_at_once)
    for (std::int64_t row = work.begin; row < work.end; row = p.row_end) {
      const std::int64_t row_end = work.end_of_part(row, rows_of_tile, room);
      p.first_head = static_cast<int>(head);
      p.row_begin = static_cast<int>(row);
      p.row_end = static_cast<int>(row_end);
      p.head_sums = work.sums(row, row_end);
      const auto heads_now = static_cast<unsigned>(std::min(heads_at_once, p.grid.heads - head));
      const dim3 tiles(static_cast<unsigned>(ceil_div(most_tiles(p), first.tiles_of_item)),
                       static_cast<unsigned>(ceil_div(row_end - row, rows_of_tile)), heads_now);
      const dim3 rows(static_cast<unsigned>(row_end - row), heads_now);
      const cudaError_t error = in_order(
          [&] {
            return launch(first.kernel, tiles, first.threads, first.shared_bytes, stream, Start::after_earlier_kernels,
                          p, maps, first.cap);
          },
          [&] { return launch(share_mass, rows, share_threads, 0, stream, Start::after_earlier_kernels, p); });
      if (error != cudaSuccess) return error;
    }
  return cudaSuccess;
}

// Fills in where the sampled queries of each kind of row are, and gathers them.
cudaError_t gather(const SelectArgs& args, Params& p, std::byte* gathered, cudaStream_t stream) {
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
  return launch(gather_sampled, dim3(p.grid.rows, p.grid.heads), most_sampled * chunks, 0, stream,
                Start::after_earlier_kernels, p, args.inputs.q, reinterpret_cast<uint4*>(gathered), chunks);
}

}  // namespace

std::size_t mass_scratch_size(BlockScore score, const Geometry& geometry, std::int64_t dense_last_rows) {
  const Work work(geometry, query_lines_of(score), geometry.rows() - dense_last_rows);
  return Scratch(score, geometry, nullptr).carver.bytes +
         std::min(work.grid.heads * work.sums(work.begin, work.end), most_sums) * sizeof(float);
}

cudaError_t score_mass(const SelectArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const BlockScore score = args.options.score;
  const int tokens_of_line = in_patches(score) ? patch_tokens : 1;
  const Scratch scratch(score, g, args.scratch);
  Params p{.grid = {g, args.permuted.order_heads},
           .pages = {args.inputs.pages, g.shape.kv_len},
           .moved = args.permuted.k != nullptr,
           .log_sums = scratch.log_sums,
           .scores = scores_of(args),
           .causal = counts_kept_first(score),
           .scale_log2 = static_cast<float>(args.options.scale / std::log(2.0) / tokens_of_line),
           .patch = tokens_of_line,
           .query_lines = query_lines_of(score),
           .sampled = score == BlockScore::sampled};
  const ConstView& k = args.inputs.k;
  const std::int64_t permuted_head = args.permuted.slots * g.shape.head_dim;
  const ConstView permuted{args.permuted.k, k.dtype, args.permuted.order_heads * permuted_head, permuted_head,
                           g.shape.head_dim};
  const Box box = tokens_of_line == 1 ? Box{tile_tokens, static_cast<int>(g.shape.head_dim)}
                                      : Box{lines_of_box, panel_of(g.shape.head_dim), patch_tokens};
  ConstView q = args.inputs.q;
  std::int64_t q_tokens = g.shape.q_len;
  if (p.sampled) {
    q_tokens = g.rows() * most_sampled;
    const std::int64_t head = q_tokens * g.shape.head_dim;
    q = {scratch.gathered, q.dtype, g.shape.q_heads * head, head, g.shape.head_dim};
    if (const cudaError_t error = gather(args, p, scratch.gathered, stream); error != cudaSuccess) return error;
  }
  Maps maps;
  if (!make_tensor_map(maps.q, q, g.shape.batch, g.shape.q_heads, q_tokens, g.shape.head_dim, box) ||
      (p.moved && !make_tensor_map(maps.permuted_k, permuted, g.shape.batch, args.permuted.order_heads,
                                   g.permuted_len(), g.shape.head_dim, box)) ||
      !make_kv_map(maps.k, k, p.pages, g.shape, g.shape.head_dim, box))
    return cudaErrorInvalidValue;
  return dispatch(q.dtype, g.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    return with_cap<dim>(args.options.softcap, args.options.scale / tokens_of_line, [&]<class Cap>(const Cap& cap) {
      using First = FirstLaunch<Cap>;
      const First first =
          tokens_of_line == 1
              ? First{score_keys<T, dim, Cap>, cap, key_threads, aligned_bytes<KeyShared<dim>>, steps_of_item}
              : First{score_lines<T, dim, Cap>, cap, threads, aligned_bytes<Shared<dim>>, tiles_of_item};
      return score_all(p, Work(g, p.query_lines, scored_rows(args)), args.scratch_bytes - scratch.carver.bytes, maps,
                       first, stream);
    });
  });
}

}  // namespace pbsattn::cuda
