// BlockScore::two_step on Hopper, in three launches:
//   1. score_sampled: shares[row][block] by some of a row's queries and the means of all causal blocks
//      (means.cuh).
//   2. score_likely: for some more queries and the keys of blocks whose share may make them kept, and of the own
//      segment, log-sum-exps of each query over each such block (keys.cuh).
//   3. add_shares: score[row][block] = half the sum of both shares, or half of the first where a block isn't read.
// The log-sum-exps of some order heads, or of some rows of one, are in memory at a time.
//
// The least work at 128K tokens, 32 heads of 128 and 16 queries a row is in the first step 2 x .07 TFLOP of products
// and 2 x .27 G exponentials, .2 ms; in the second, with 4 queries a row and all blocks read, 2.2 TFLOP and 8.6 G
// exponentials, 2.4 ms each which overlap, times the share of the blocks that is read: of .45 1.1 ms.
#include <algorithm>
#include <bit>

#include "cuda/select/scores/two_step/keys.cuh"
#include "cuda/select/scores/two_step/means.cuh"

namespace pbsattn::cuda {
namespace {

using namespace two_step;

constexpr int adding_warps = 4;
constexpr std::int64_t most_numbers = std::int64_t{68} << 20;  // in memory at a time

// A row's lines are a power of two, so that they fill tiles; some may be of no use.
Sample sample_of(int most, int min_log_lines) {
  most = std::min(most, block_tokens);
  return {.most = most, .log_lines = std::max<int>(std::bit_width(static_cast<unsigned>(most - 1)), min_log_lines)};
}

Sample exact_sample(const Options& options) {
  return sample_of(options.two_step_exact, min_log_lines);
}

// Adds to each score the share of the second step. A warp takes a row.
__global__ void __launch_bounds__(adding_warps * 32) add_shares(const __grid_constant__ Params p) {
  __shared__ LogSum totals_of_warps[adding_warps][block_tokens];  // of each query, as logarithms of base 2
  const int lane = static_cast<int>(threadIdx.x) % 32;
  LogSum* const totals = totals_of_warps[threadIdx.x / 32];
  // The last rows have the most blocks, so they start first.
  const int row = p.row_end - 1 - static_cast<int>(blockIdx.x * adding_warps + threadIdx.x / 32);
  const int head = p.first_order_head * p.grid.order_group + static_cast<int>(blockIdx.y);
  const int visible = row < p.row_begin ? 0 : p.visible(row);
  wait_for_earlier_kernels();
  if (visible == 0) return;
  const int diagonal = p.grid.diagonal(row);
  const int count = p.exact.count(p.grid.queries_of(diagonal));
  const float* of_head = p.sums + blockIdx.y * p.head_sums;
  // Some lanes of the warp share a line's parts.
  const int lanes_of_line = max(32 >> p.exact.log_lines, 1);
  for (int line = lane / lanes_of_line; line < p.exact.lines(); line += 32 / lanes_of_line) {
    const float* parts = of_head + p.totals_before(row) + line * (p.parts + 1) * 2;
    Statistics total;
    for (int part = lane % lanes_of_line; part <= p.parts; part += lanes_of_line)
      if (part == p.parts || part * p.part_blocks < visible) total.merge({parts[part * 2], parts[part * 2 + 1]}, 1);
    for (int offset = 1; offset < lanes_of_line; offset *= 2) total.merge_with_lane(offset, 1);
    if (lane % lanes_of_line == 0)
      totals[line] = line < count ? LogSum{total.max, log2f(total.sum)} : LogSum{0, INFINITY};
  }
  __syncwarp();
  float* scores = p.scores + p.grid.list_start(head, row);
  const float* sums = of_head + p.sums_before(row);
  const float least = p.least_share(head, row);
  constexpr int at_once = 4;  // of a lane, so that their loads are under way together
  for (int begin = lane; begin <= diagonal; begin += 32 * at_once) {
    float first[at_once];
    float second[at_once] = {};
    bool read[at_once];
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const int block = begin + 32 * i;
      first[i] = block <= diagonal ? scores[block] : 0.0F;
      read[i] = block <= diagonal && (block >= visible || first[i] >= least);
    }
    for (int line = 0; line < count; line += 4) {
      float4 four[at_once];
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        four[i] = {};
        if (read[i]) four[i] = *reinterpret_cast<const float4*>(sums + ((begin + 32 * i) << p.exact.log_lines) + line);
      }
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        const float log_sums[4] = {four[i].x, four[i].y, four[i].z, four[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
          second[i] += sm90::exp2_fast(log_sums[j] - totals[line + j].max - totals[line + j].log2_sum);
      }
    }
#pragma unroll
    for (int i = 0; i < at_once; ++i)
      if (begin + 32 * i <= diagonal)
        scores[begin + 32 * i] = 0.5F * (first[i] + (read[i] ? second[i] / static_cast<float>(count) : 0.0F));
  }
}

// Rows [begin, end) have something to score. Those of some order heads, or some of one's, are worked on at a time.
struct Work {
  Work(const Options& options, const Geometry& g, std::int64_t order_heads, std::int64_t scored_rows,
       int blocks_of_part)
      : grid(g, order_heads),
        lines(exact_sample(options).lines()),
        rows_at_once(std::max<std::int64_t>(group_lines / lines, 1)),
        part_blocks(blocks_of_part),
        parts(static_cast<int>(ceil_div(g.blocks(), part_blocks))),
        begin(grid.first_sparse_row() / rows_at_once * rows_at_once),
        end(std::max<std::int64_t>(scored_rows, begin)) {}
  // Returns how many numbers a head has in rows [from, to).
  std::int64_t numbers(std::int64_t from, std::int64_t to) const {
    return (grid.entries_before(static_cast<int>(to)) - grid.entries_before(static_cast<int>(from)) +
            (to - from) * (parts + 1) * 2) *
           lines;
  }
  std::int64_t order_heads() const { return grid.heads / grid.order_group; }
  std::int64_t order_heads_at_once(std::int64_t room) const {
    return std::clamp<std::int64_t>(room / std::max<std::int64_t>(numbers(begin, end) * grid.order_group, 1), 1,
                                    order_heads());
  }
  // Returns the end of the rows from `row` on whose numbers have room, or are the fewest.
  std::int64_t end_of_part(std::int64_t row, std::int64_t room) const {
    std::int64_t part = std::min(row + rows_at_once, end);
    while (part < end && numbers(row, std::min(part + rows_at_once, end)) * grid.order_group <= room)
      part = std::min(part + rows_at_once, end);
    return part;
  }
  // Returns how many numbers are in memory at a time.
  std::int64_t most() const {
    const std::int64_t all = numbers(begin, end) * grid.heads;
    if (all <= most_numbers) return all;
    const std::int64_t fewest = numbers(std::max(end - rows_at_once, begin), end) * grid.order_group;
    return std::max(most_numbers, fewest);
  }

  RowGrid grid;
  std::int64_t lines;
  std::int64_t rows_at_once;  // rows are cut in multiples of as many, so that strips are whole
  int part_blocks, parts;
  std::int64_t begin, end;
};

}  // namespace

// About four parts, of what a thread block takes at most; of a chunk's few rows so many that they nearly fill a device
// of 132 multiprocessors.
int part_blocks_of(const Options& options, const Geometry& call, std::int64_t order_heads) {
  constexpr std::int64_t filling = 120;
  constexpr std::int64_t step = 16;
  const std::int64_t strips =
      ceil_div(call.rows() * exact_sample(options).lines(), group_lines) * (call.shape.q_heads / order_heads);
  const std::int64_t of_a_part = ceil_div(strips, groups) * call.shape.batch * order_heads;
  const std::int64_t parts = std::max<std::int64_t>(4, ceil_div(filling, of_a_part));
  return static_cast<int>(
      std::clamp<std::int64_t>(ceil_div(call.blocks() / parts, step) * step, step, most_part_blocks));
}

std::size_t two_step_scratch_size(const Options& options, const Geometry& geometry, std::int64_t order_heads,
                                  std::int64_t dense_last_rows, int part_blocks) {
  const Work work(options, geometry, order_heads, geometry.rows() - dense_last_rows, part_blocks);
  return work.begin >= work.end ? 0 : static_cast<std::size_t>(work.most()) * sizeof(float);
}

cudaError_t score_two_step(const SelectArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const Options& options = args.options;
  const std::int64_t order_heads = args.permuted.order_heads;
  const Work work(options, g, order_heads, scored_rows(args), args.part_blocks);
  if (work.end <= work.grid.first_sparse_row()) return cudaSuccess;
  Params p{.grid = work.grid,
           .q = args.inputs.q,
           .pages = {args.inputs.pages, g.shape.kv_len},
           .moved = args.permuted.k != nullptr,
           .scores = scores_of(args),
           .scored_rows = static_cast<int>(scored_rows(args)),
           .scale_log2 = scale_log2(options.scale),
           .options = args.options_of_heads(),
           .reach = static_cast<float>(options.two_step_reach),
           .pooled_own = args.pooled.own,
           .own_blocks = args.pooled.own_blocks,
           .means = sample_of(options.two_step_queries, std::countr_zero(unsigned{warp_lines})),
           .exact = exact_sample(options),
           .part_blocks = work.part_blocks,
           .parts = work.parts,
           .sums = static_cast<float*>(args.scratch)};
  const ConstView& k = args.inputs.k;
  const auto in_order_heads = [&](const void* data, std::int64_t of_head) {
    const std::int64_t head = of_head * g.shape.head_dim;
    return ConstView{data, k.dtype, order_heads * head, head, g.shape.head_dim};
  };
  const auto make_map = [&](CUtensorMap& map, const ConstView& view, std::int64_t tokens) {
    return make_tensor_map(map, view, g.shape.batch, order_heads, tokens, g.shape.head_dim, tile_tokens);
  };
  KeyMaps maps;
  if (!make_map(maps.pooled_k, in_order_heads(args.pooled.k, args.pooled.k_blocks), permuted_blocks(g)) ||
      (p.moved && !make_map(maps.permuted_k, in_order_heads(args.permuted.k, args.permuted.slots), g.permuted_len())) ||
      !make_kv_map(maps.k, k, p.pages, g.shape, g.shape.head_dim,
                   {.tokens = tile_tokens, .columns = static_cast<int>(g.shape.head_dim)}))
    return cudaErrorInvalidValue;
  int multiprocessors = 0;
  if (const cudaError_t error = count_multiprocessors(multiprocessors); error != cudaSuccess) return error;
  return dispatch(k.dtype, g.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    constexpr int means_bytes = aligned_bytes<MeansShared<dim>>;
    constexpr int keys_bytes = aligned_bytes<KeyShared<dim>>;
    static_assert(means_bytes <= 227 * 1024 && keys_bytes <= 227 * 1024);
    return with_cap<dim>(options.softcap, options.scale, [&]<class Cap>(const Cap& cap) {
      const dim3 resident(static_cast<unsigned>(std::min(MeansItem::count(p), multiprocessors)));
      cudaError_t error = launch(score_sampled<T, dim, Cap>, resident, threads, means_bytes, stream,
                                 Start::after_earlier_kernels, p, MeansMaps{maps.pooled_k}, cap);
      const auto room = static_cast<std::int64_t>(args.scratch_bytes / sizeof(float));
      const std::int64_t at_once = work.order_heads_at_once(room);
      for (std::int64_t head = 0; head < work.order_heads(); head += at_once)
        for (std::int64_t row = work.begin; row < work.end && error == cudaSuccess; row = p.row_end) {
          const std::int64_t heads_now = std::min(at_once, work.order_heads() - head);
          const std::int64_t row_end = work.end_of_part(row, room);
          p.first_order_head = static_cast<int>(head);
          p.row_begin = static_cast<int>(row);
          p.row_end = static_cast<int>(row_end);
          p.head_sums = work.numbers(row, row_end);
          const std::int64_t strips = ceil_div((row_end - row) * work.lines, group_lines) * p.grid.order_group;
          // Thread blocks that read the same keys start together.
          const dim3 items(static_cast<unsigned>(ceil_div(strips, groups)), static_cast<unsigned>(p.parts + 1),
                           static_cast<unsigned>(heads_now));
          const dim3 rows(static_cast<unsigned>(ceil_div(row_end - row, adding_warps)),
                          static_cast<unsigned>(heads_now * p.grid.order_group));
          error = in_order(
              [&] {
                return launch(score_likely<T, dim, Cap>, items, threads, keys_bytes, stream, Start::early, p, maps,
                              cap);
              },
              [&] { return launch(add_shares, rows, adding_warps * 32, 0, stream, Start::early, p); });
        }
      return error;
    });
  });
}

}  // namespace pbsattn::cuda
