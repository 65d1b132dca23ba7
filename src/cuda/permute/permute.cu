// Stage one on Hopper: keys in the order of the attention that the last queries pay them, in three launches: parts of
// the scoring queries' log-sum-exp (and pooled Q), their merger, and the order itself. See key_statistics.cuh,
// reorder_resident.cuh, reorder.cuh. A launch may start while the one before it ends.
//
// The least traffic is Q, K and V once, and permuted K and V once for each order: 3.8 GB at 128K tokens, 32/8 heads,
// head_dim 128 and an order for each query head.
#include <algorithm>
#include <cmath>

#include "cuda/permute/key_statistics.cuh"
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
constexpr int pool_items_of_warp = 4;  // so that copies of one run under sums of another

template <class T, int head_dim>
__global__ void __launch_bounds__(pool_warps * 32)
    pool_rows(const __grid_constant__ PoolArgs args, std::int64_t batch, std::int32_t* sink_block, std::int64_t sinks) {
  extern __shared__ unsigned char stages[];
  const int warp = threadIdx.x / 32;
  pool_rows_staged<T, head_dim>(args, batch, blockIdx.x * pool_warps + warp, gridDim.x * pool_warps,
                                stages + warp * pool_stage_bytes);
  for (std::int64_t sink = blockIdx.x * blockDim.x + threadIdx.x; sink < sinks; sink += gridDim.x * blockDim.x)
    sink_block[sink] = 0;  // token 0 stays where it is
}

cudaError_t launch_pool(const PoolArgs& args, DType dtype, std::int64_t head_dim, std::int64_t batch,
                        std::int32_t* sink_block, std::int64_t sinks, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(batch * args.heads * args.rows, pool_warps * pool_items_of_warp)));
  return dispatch(dtype, head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(pool_warps * 32);
    config.dynamicSmemBytes = pool_warps * pool_stage_bytes;
    config.stream = stream;
    const cudaError_t error = cudaFuncSetAttribute(pool_rows<T, dim>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(config.dynamicSmemBytes));
    if (error != cudaSuccess) return error;
    return cudaLaunchKernelEx(&config, pool_rows<T, dim>, args, batch, sink_block, sinks);
  });
}

Tensor tensor(const ConstView& view) {
  return {view.data, view.batch_stride, view.head_stride, view.token_stride};
}

}  // namespace

std::size_t permute_scratch_size(const Geometry& geometry) {
  return geometry.shape.batch * geometry.shape.q_heads * 128 *
         (units_of(geometry).count * sizeof(float2) + sizeof(LogSum));
}

namespace {

// Means of blocks of keys where they are, the last one maybe a part of a block.
cudaError_t pool_own(const PermuteArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const ConstView& k = args.inputs.k;
  const PoolArgs keys{k.data, k.batch_stride, k.head_stride,        k.token_stride, g.shape.kv_heads, g.blocks(),
                      0,      g.shape.kv_len, args.divide_by_count, args.pooled_own};
  return launch_pool(keys, k.dtype, g.shape.head_dim, g.shape.batch, nullptr, 0, stream);
}

// Means of blocks of values, in the keys' order.
cudaError_t pool_values(const PermuteArgs& args, const ConstView& v, std::int64_t heads, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const PoolArgs values{v.data, v.batch_stride,   v.head_stride, v.token_stride, heads, permuted_blocks(g),
                        0,      g.permuted_len(), false,         args.pooled_v};
  return launch_pool(values, v.dtype, g.shape.head_dim, g.shape.batch, nullptr, 0, stream);
}

}  // namespace

cudaError_t permute(const PermuteArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  if (args.pooled_own != nullptr)
    if (const cudaError_t error = pool_own(args, stream); error != cudaSuccess) return error;
  const Units units = units_of(g);
  PermuteParams p{.scoring_queries = tensor(args.inputs.q),
                  .k = tensor(args.inputs.k),
                  .v = tensor(args.inputs.v),
                  .q_heads = static_cast<int>(g.shape.q_heads),
                  .kv_heads = static_cast<int>(g.shape.kv_heads),
                  .group = static_cast<int>(g.group()),
                  .batch = static_cast<int>(g.shape.batch),
                  .queries = static_cast<int>(g.scoring_queries()),
                  .segment = g.segment,
                  .permuted_len = g.permuted_len(),
                  .unit_keys = units.keys,
                  .units = units.count,
                  .scale_log2 = static_cast<float>(args.scale / std::log(2.0)),
                  .shared_order = args.scope == OrderScope::kv_head,
                  .pool_q = pool_queries(args),
                  .statistics = static_cast<float2*>(args.scratch),
                  .permuted_k = args.k,
                  .permuted_v = args.v,
                  .pooled_k = args.pooled_k,
                  .order = args.order,
                  .sink_block = args.sink_block};
  p.log_sums = reinterpret_cast<LogSum*>(p.statistics + g.shape.batch * g.shape.q_heads * units.count * 128);
  constexpr std::int64_t element_bytes = 2;
  p.scoring_queries.data = static_cast<const unsigned char*>(args.inputs.q.data) +
                           (g.shape.q_len - g.scoring_queries()) * args.inputs.q.token_stride * element_bytes;

  return dispatch(args.inputs.k.dtype, g.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    const dim3 statistics_grid(p.units, static_cast<unsigned>(ceil_div(p.group, heads_at_once)), p.batch * p.kv_heads);
    cudaError_t error = launch(score_statistics<T, dim>, statistics_grid, statistics_threads,
                               statistics_shared_bytes<dim>, stream, Start::after_earlier_kernels, p);
    if (error != cudaSuccess) return error;
    error = launch(merge_statistics, dim3(p.batch * p.q_heads), 128, 0, stream, Start::early, p);
    if (error != cudaSuccess) return error;
    const dim3 reorder_grid(static_cast<unsigned>(g.complete_segments()), p.kv_heads, p.batch);
    error = g.segment <= resident_tiles * tile_tokens
                ? launch(reorder_resident<T, dim>, reorder_grid, resident::everyone, ResidentShared<dim>::bytes, stream,
                         Start::early, p)
                : launch(reorder<T, dim>, reorder_grid, reorder_threads, ReorderShared<dim>::bytes(g.segment), stream,
                         Start::early, p);
    if (error != cudaSuccess || args.pooled_v == nullptr) return error;
    const std::int64_t heads = p.shared_order ? p.kv_heads : p.q_heads;
    const std::int64_t head = g.permuted_len() * dim;
    return pool_values(args, {args.v, args.inputs.v.dtype, heads * head, head, dim}, heads, stream);
  });
}

cudaError_t pool(const PermuteArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  if (args.pooled_q == nullptr)  // token 0 stays where it is
    return cudaMemsetAsync(args.sink_block, 0, g.shape.batch * g.shape.kv_heads * sizeof(std::int32_t), stream);
  const ConstView& k = args.inputs.k;
  const cudaError_t error = launch_pool(pool_queries(args), args.inputs.q.dtype, g.shape.head_dim, g.shape.batch,
                                        args.sink_block, g.shape.batch * g.shape.kv_heads, stream);
  if (error != cudaSuccess) return error;
  if (args.pooled_v != nullptr)
    if (const cudaError_t failed = pool_values(args, args.inputs.v, g.shape.kv_heads, stream); failed != cudaSuccess)
      return failed;
  if (args.pooled_own != nullptr) return pool_own(args, stream);
  const PoolArgs keys{k.data, k.batch_stride,   k.head_stride, k.token_stride, g.shape.kv_heads, permuted_blocks(g),
                      0,      g.permuted_len(), false,         args.pooled_k};
  return launch_pool(keys, k.dtype, g.shape.head_dim, g.shape.batch, nullptr, 0, stream);
}

}  // namespace pbsattn::cuda
