// Stage one on Hopper: keys in the order of the attention that the last queries pay them, in three launches: parts of
// the scoring queries' log-sum-exp (and pooled Q), their merger, and the order itself. See key_statistics.cuh,
// reorder_resident.cuh, reorder.cuh. A launch may start while the one before it ends. Orders that are learned or known
// take one launch, move.cuh's.
//
// The least traffic is Q, K and V once, and permuted K and V once for each order: 3.8 GB at 128K tokens, 32/8 heads,
// head_dim 128 and an order for each query head.
#include <algorithm>

#include "cuda/memory/carver.h"
#include "cuda/permute/key_statistics.cuh"
#include "cuda/permute/move.cuh"
#include "cuda/permute/reorder.cuh"
#include "cuda/permute/reorder_resident.cuh"

namespace pbsattn::cuda {
namespace {

// How keys are cut for score_statistics: by the sequence's length alone, so that the same input gives the same bits
// however heads are grouped. Few units of all heads fill the device, and a unit's start costs something; but a pass may
// have only one KV head, and should fill it too.
constexpr int few_units = 16;
constexpr int max_units = 64;
constexpr int min_unit_keys = 1024;
constexpr int max_unit_keys = 2048;  // unless max_units were exceeded

struct Units {
  std::int64_t keys;  // of one unit: whole tiles
  int count;
};
Units units_of(const Geometry& g) {
  const auto part = [&](std::int64_t count) {
    return ceil_div(ceil_div(g.permuted_len(), count), tile_tokens) * tile_tokens;
  };
  const std::int64_t keys =
      std::max(std::clamp<std::int64_t>(part(few_units), min_unit_keys, max_unit_keys), part(max_units));
  return {keys, static_cast<int>(ceil_div(g.permuted_len(), keys))};
}

// ----------------------------------------------------------------------------------------------------------- pool

constexpr int pool_warps = 4;
constexpr int most_pool_items_of_warp = 4;  // so that copies of one run under sums of another,
constexpr int fewest_pool_warps = 2048;     // where there are enough to fill the device

template <class T, int width>
__global__ void __launch_bounds__(pool_warps * 32)
    pool_rows(const __grid_constant__ PoolArgs args, std::int64_t batch, std::int32_t* sink_block, std::int64_t sinks) {
  extern __shared__ unsigned char stages[];
  const int warp = threadIdx.x / 32;
  pool_rows_staged<T, width, true>(args, batch, blockIdx.x * pool_warps + warp, gridDim.x * pool_warps,
                                   stages + warp * pool_stage_bytes<width>);
  for (std::int64_t sink = blockIdx.x * blockDim.x + threadIdx.x; sink < sinks; sink += gridDim.x * blockDim.x)
    sink_block[sink] = 0;  // token 0 stays where it is
}

// What the device has to do besides: sink blocks of 0.
struct Sinks {
  std::int32_t* block = nullptr;
  std::int64_t count = 0;
};

cudaError_t launch_pool(const PoolArgs& args, const Geometry& g, std::int64_t width, cudaStream_t stream,
                        Sinks sinks = {}) {
  const std::int64_t items = g.shape.batch * args.heads * (args.rows - args.skipped);
  if (items == 0) return cudaSuccess;
  const std::int64_t of_warp = std::clamp<std::int64_t>(items / fewest_pool_warps, 1, most_pool_items_of_warp);
  const dim3 grid(static_cast<unsigned>(ceil_div(items, pool_warps * of_warp)));
  return dispatch(args.view.dtype, width, [&]<class T, int w>(T, std::integral_constant<int, w>) {
    return launch(pool_rows<T, w>, grid, pool_warps * 32, pool_warps * pool_stage_bytes<w>, stream,
                  Start::after_earlier_kernels, args, g.shape.batch, sinks.block, sinks.count);
  });
}

PageTable pages_of(const PermuteArgs& args) {
  return {args.inputs.pages, args.geometry.shape.kv_len};
}

PoolArgs queries(const PermuteArgs& args) {
  const Geometry& g = args.geometry;
  return {.view = args.inputs.q,
          .heads = g.shape.q_heads,
          .rows = args.pooled.q == nullptr ? 0 : g.rows(),
          .first = g.first_row() * block_tokens - g.q_offset(),
          .tokens = g.shape.q_len,
          .divide_by_count = args.divide_by_count,
          .out = args.pooled.q,
          .out_rows = g.rows()};
}

// Whole blocks of keys or values that may move, in some order, but those that are kept.
PoolArgs whole_blocks(const PermuteArgs& args, const ConstView& view, const PageTable& pages, std::int64_t heads,
                      void* means, std::int64_t blocks_of_head) {
  const Geometry& g = args.geometry;
  return {.view = view,
          .pages = pages,
          .heads = heads,
          .rows = permuted_blocks(g),
          .first = 0,
          .tokens = g.permuted_len(),
          .divide_by_count = false,
          .skipped = args.kept_blocks,
          .out = means,
          .out_rows = blocks_of_head};
}

// All blocks of keys where they are but the first `skipped`, the last one maybe a part of a block.
PoolArgs own_keys(const PermuteArgs& args, std::int64_t skipped) {
  const Geometry& g = args.geometry;
  return {.view = args.inputs.k,
          .pages = pages_of(args),
          .heads = g.shape.kv_heads,
          .rows = g.blocks(),
          .first = 0,
          .tokens = g.shape.kv_len,
          .divide_by_count = args.divide_by_count,
          .skipped = skipped,
          .out = args.pooled.own,
          .out_rows = args.pooled.own_blocks};
}

struct Scratch {
  Scratch(const Geometry& g, void* base) : carver(base) {
    const std::int64_t queries = g.shape.batch * g.shape.q_heads * 128;
    carver.take(statistics, queries * units_of(g).count);
    carver.take(log_sums, queries);
  }
  Carver carver;
  float2* statistics = nullptr;
  LogSum* log_sums = nullptr;
};

// ---------------------------------------------------------------------------------------------------- orders

// Orders keys from the first `known` on by the last queries.
cudaError_t order_by_queries(const PermuteArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const Permuted& to = args.permuted;
  const Units units = units_of(g);
  const Scratch scratch(g, args.scratch);
  PermuteParams p{.scoring_queries = args.inputs.q,
                  .k = args.inputs.k,
                  .v = args.inputs.v,
                  .pages = pages_of(args),
                  .grid = {g, to.order_heads},
                  .batch = static_cast<int>(g.shape.batch),
                  .queries = static_cast<int>(g.scoring_queries()),
                  .segment = g.segment,
                  .permuted_len = g.permuted_len(),
                  .known = args.kept.known,
                  .unit_keys = units.keys,
                  .units = units.count,
                  .scale_log2 = scale_log2(args.scale),
                  .shared_order = to.order_heads < g.shape.q_heads,
                  .pool_q = queries(args),
                  .statistics = scratch.statistics,
                  .log_sums = scratch.log_sums,
                  .permuted = to,
                  .pooled_k = args.pooled.k};
  constexpr std::int64_t element_bytes = 2;
  p.scoring_queries.data = static_cast<const unsigned char*>(args.inputs.q.data) +
                           (g.shape.q_len - g.scoring_queries()) * args.inputs.q.token_stride * element_bytes;

  return dispatch(args.inputs.k.dtype, g.shape, [&](auto element, auto keys, auto values) {
    using T = decltype(element);
    constexpr int dim = keys();
    constexpr int dim_v = values();
    constexpr int max_shared_bytes = 227 * 1024;
    static_assert(statistics_shared_bytes<dim> <= max_shared_bytes);
    static_assert(ReorderShared<dim>::bytes(max_segment) <= max_shared_bytes);
    const dim3 units_grid(p.units, static_cast<unsigned>(ceil_div(p.grid.group, heads_at_once<dim>)),
                          p.batch * p.grid.kv_heads);
    const dim3 segments_grid(static_cast<unsigned>(g.complete_segments() - p.known / g.segment), p.grid.kv_heads,
                             p.batch);
    return with_cap<dim>(args.softcap, args.scale, [&]<class Cap>(const Cap& cap) {
      return in_order(
          [&] {
            return launch(score_statistics<T, dim, Cap>, units_grid, statistics_threads, statistics_shared_bytes<dim>,
                          stream, Start::after_earlier_kernels, p, cap);
          },
          [&] { return launch(merge_statistics, dim3(p.grid.heads), 128, 0, stream, Start::early, p); },
          [&] {
            if constexpr (ResidentShared<dim, dim_v>::bytes <= max_shared_bytes)
              if (g.segment <= resident_tiles * tile_tokens)
                return launch(reorder_resident<T, dim, dim_v, Cap>, segments_grid, resident::everyone,
                              ResidentShared<dim, dim_v>::bytes, stream, Start::early, p, cap);
            return launch(reorder<T, dim, dim_v, Cap>, segments_grid, reorder_threads,
                          ReorderShared<dim>::bytes(g.segment), stream, Start::early, p, cap);
          });
    });
  });
}

// Orders the keys of the first `segments` segments, but those that are kept, by weights, or as they are known to stand.
cudaError_t move(const PermuteArgs& args, std::int64_t segments, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const OrderWeights& learned = args.inputs.order_weights;
  const MoveParams p{.k = args.inputs.k,
                     .v = args.inputs.v,
                     .pages = pages_of(args),
                     .grid = {g, args.permuted.order_heads},
                     .segment = g.segment,
                     .first_segment = static_cast<int>(args.kept_blocks * block_tokens / g.segment),
                     .weights = args.permutation == Permutation::learned ? learned.values.data() : nullptr,
                     .neighbours = learned.pairs == RopePairs::neighbours,
                     .known = args.kept,
                     .permuted = args.permuted,
                     .pooled_k = args.pooled.k,
                     .pooled_own = args.pooled.own,
                     .own_blocks = args.pooled.own_blocks};
  const dim3 grid(static_cast<unsigned>(segments - p.first_segment), p.grid.kv_heads,
                  static_cast<unsigned>(g.shape.batch));
  return dispatch(args.inputs.k.dtype, g.shape, [&](auto element, auto keys, auto values) {
    using Shared = MoveShared<keys()>;
    static_assert(Shared::bytes(max_segment) <= 227 * 1024);
    return launch(move_keys<decltype(element), keys(), values()>, grid, move_threads, Shared::bytes(g.segment), stream,
                  Start::after_earlier_kernels, p);
  });
}

constexpr int keep_threads = 256;

// Writes the order of keys from the first `known` on where the caller keeps it.
__global__ void __launch_bounds__(keep_threads)
    keep_orders(const std::int32_t* order, std::int64_t slots, std::int64_t permuted_len,
                const __grid_constant__ KeyOrder to) {
  const std::int64_t slot = to.known + blockIdx.x * std::int64_t{keep_threads} + threadIdx.x;
  if (slot >= permuted_len) return;
  to.data[blockIdx.z * to.batch_stride + blockIdx.y * to.head_stride + slot] =
      order[(static_cast<std::int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * slots + slot];
}

cudaError_t keep(const PermuteArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const dim3 grid(static_cast<unsigned>(ceil_div(g.permuted_len() - args.kept.known, keep_threads)),
                  static_cast<unsigned>(g.shape.kv_heads), static_cast<unsigned>(g.shape.batch));
  return launch(keep_orders, grid, keep_threads, 0, stream, Start::after_earlier_kernels, args.permuted.order,
                args.permuted.slots, g.permuted_len(), args.kept);
}

}  // namespace

std::size_t permute_scratch_size(const Geometry& geometry) {
  return Scratch(geometry, nullptr).carver.bytes;
}

cudaError_t permute(const PermuteArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const bool learned = args.permutation == Permutation::learned;
  const std::int64_t moved = learned ? g.complete_segments() : args.kept.known / g.segment;
  const std::int64_t kept = args.kept_blocks * block_tokens / g.segment;
  const bool by_queries = moved < g.complete_segments();
  const auto where = [](bool wanted, auto&& call) { return wanted ? call() : cudaSuccess; };
  return in_order(
      [&] {
        // Of learned orders move_keys pools those that it has at hand.
        const std::int64_t pooled = learned ? permuted_blocks(g) : args.kept_blocks;
        return where(args.pooled.own != nullptr,
                     [&] { return launch_pool(own_keys(args, pooled), g, g.shape.head_dim, stream); });
      },
      [&] { return where(moved > kept, [&] { return move(args, moved, stream); }); },
      [&] {
        return by_queries ? order_by_queries(args, stream)  // it pools queries too
                          : where(args.pooled.q != nullptr,
                                  [&] { return launch_pool(queries(args), g, g.shape.head_dim, stream); });
      },
      [&] { return where(args.kept.data != nullptr && by_queries, [&] { return keep(args, stream); }); },
      [&] {
        return where(args.pooled.v != nullptr, [&] {
          const std::int64_t heads = args.permuted.order_heads;
          const std::int64_t width = value_dim(g.shape);
          const std::int64_t head = args.permuted.slots * width;
          const ConstView values{args.permuted.v, args.inputs.v.dtype, heads * head, head, width};
          return launch_pool(whole_blocks(args, values, {}, heads, args.pooled.v, args.pooled.v_blocks), g, width,
                             stream);
        });
      });
}

cudaError_t pool(const PermuteArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const Sinks sinks{args.permuted.sink_block, g.shape.batch * g.shape.kv_heads};  // token 0 stays where it is
  const auto stay = [&] { return cudaMemsetAsync(sinks.block, 0, sinks.count * sizeof(std::int32_t), stream); };
  if (args.pooled.k == nullptr) return stay();
  return in_order(
      [&] {
        return args.pooled.q == nullptr ? stay() : launch_pool(queries(args), g, g.shape.head_dim, stream, sinks);
      },
      [&] {
        return args.pooled.v == nullptr
                   ? cudaSuccess
                   : launch_pool(whole_blocks(args, args.inputs.v, pages_of(args), g.shape.kv_heads, args.pooled.v,
                                              args.pooled.v_blocks),
                                 g, value_dim(g.shape), stream);
      },
      [&] {
        return launch_pool(args.pooled.own != nullptr
                               ? own_keys(args, args.kept_blocks)
                               : whole_blocks(args, args.inputs.k, pages_of(args), g.shape.kv_heads, args.pooled.k,
                                              args.pooled.k_blocks),
                           g, g.shape.head_dim, stream);
      });
}

}  // namespace pbsattn::cuda
