// Block scores of BlockScore::per_query on Hopper: for each row the mean over its queries of softmax over causal blocks
// of query . pooled key.
//
// An *item* is two rows of one head, so that the pooled keys brought in serve 256 queries. Four *consumer* warpgroups,
// two for each row, go through its pooled keys, 128 at a time, twice:
//     S[query][block] = Q K^T      max and sum of exp2 of each query, in registers
//     S^T[block][query] = K Q^T    weights exp2(S^T - log-sum-exp), summed over queries: no exchange between warps
// A row's two warpgroups share its queries in the first sweep and each tile's blocks in the second. They start their
// products in turn (sm90/turns.cuh), so that the exponentials of some run while the tensor cores work for another. The
// second product costs less than keeping the first would: 128 queries' scores of 1024 blocks are 512 KiB. The few
// blocks of the row's own segment, whose keys are in their original order, are multiplied warp by warp (mma) before and
// after the first sweep. Beside them a *producer* thread brings queries and keys through the copy engine, ahead over
// items and sweeps. A thread block stays resident and takes every n-th item; long rows come first, and heads side by
// side share L2.
//
// The least work at 128K tokens, 32 heads, head_dim 128: 2 x 0.55 TFLOP of products and 2 x 2.1 G exponentials, which
// take as long as each other and overlap: 1.4 to 1.6 ms.
#include <algorithm>

#include "cuda/geometry.cuh"
#include "cuda/select/scores/per_query_fold.cuh"
#include "cuda/select/scores/scores.h"
#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/prologue.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/sm90/turns.cuh"

namespace pbsattn::cuda {
namespace {

using sm90::Barrier;

constexpr int rows_of_item = 2;
constexpr int groups_of_row = 2;
constexpr int consumers = rows_of_item * groups_of_row;
constexpr int half = tile_tokens / groups_of_row;  // a warpgroup's queries, or blocks of a tile
constexpr int threads = (consumers + 1) * 128;
constexpr int producer_registers = 32;
constexpr int consumer_registers = 112;

struct Params {
  RowGrid grid;
  float* scores;              // of tile [batch][q_head][row] where its list will be
  int scored_rows;            // those from there on are dense
  int first_pair, last_pair;  // of token blocks 2 i and 2 i + 1
  const void* pooled_own;
  std::int64_t own_blocks;  // of a head
  float scale_log2;

  __host__ __device__ int items() const { return (last_pair - first_pair + 1) * grid.heads; }
};

struct Maps {
  CUtensorMap q, pooled_k;
};

constexpr int max_own_blocks = max_segment / block_tokens;

template <int head_dim>
struct Shared {
  static constexpr int slots = head_dim > 128 ? 1 : 2;  // items whose queries are in shared memory
  static constexpr int stages = head_dim > 192 ? 1 : head_dim >= 128 ? 2 : 4;
  alignas(1024) unsigned char q[slots][rows_of_item][SwizzledTile<head_dim>::bytes];
  alignas(1024) unsigned char k[stages][SwizzledTile<head_dim>::bytes];
  LogSum log_sums[slots][rows_of_item][tile_tokens];
  float shifts[slots][rows_of_item][tile_tokens];                     // log_sums in one number
  float own[slots][rows_of_item][groups_of_row * 4][max_own_blocks];  // a warp's part of the own segment's scores
  Barrier q_full[slots], q_free[slots], k_full[stages], k_free[stages];

  __device__ void init() {
    for (Barrier& barrier : q_full) barrier.init(1);
    for (Barrier& barrier : k_full) barrier.init(1);
    for (Barrier& barrier : q_free) barrier.init(consumers * 4);
    for (Barrier& barrier : k_free) barrier.init(consumers * 4);
    sm90::fence_barrier_init();
  }
};

struct Item {
  __device__ Item(const Params& p, int index)
      : head(index % p.grid.heads), block((p.last_pair - index / p.grid.heads) * rows_of_item) {
    static_assert(rows_of_item == 2);
    tiles = (max(visible_of(p, block), visible_of(p, block + 1)) + tile_tokens - 1) / tile_tokens;
  }
  // Returns how many blocks the row of token block `of` may leave out; none where it isn't scored.
  __device__ static int visible_of(const Params& p, int of) {
    const bool scored = of >= p.grid.first_row && of < p.grid.diagonal(p.scored_rows);
    return scored ? p.grid.own_begin(of) : 0;
  }
  int head;   // of all batch entries
  int block;  // token block of the first row
  int tiles;  // of keys that some row sees
};

template <int head_dim>
__device__ void produce(const Params& p, const Maps& maps, Shared<head_dim>& shared) {
  CountedRing<Shared<head_dim>::slots> slot;
  CountedRing<Shared<head_dim>::stages> stage;
  for (int index = blockIdx.x; index < p.items(); index += gridDim.x, slot.next()) {
    const Item item(p, index);
    const int batch = item.head / p.grid.q_heads;
    const int head = item.head % p.grid.q_heads;
    shared.q_free[slot.at()].wait(slot.parity() ^ 1);
    shared.q_full[slot.at()].arrive_expecting(sizeof(shared.q[0]));
    for (int i = 0; i < rows_of_item; ++i)
      sm90::tma_load(shared.q[slot.at()][i], maps.q, shared.q_full[slot.at()], 0, p.grid.first_query(item.block + i), 0,
                     head, batch);
    for (int step = 0; step < 2 * item.tiles; ++step, stage.next()) {
      const int tile = step < item.tiles ? step : step - item.tiles;
      shared.k_free[stage.at()].wait(stage.parity() ^ 1);
      shared.k_full[stage.at()].arrive_expecting(sizeof(shared.k[0]));
      sm90::tma_load(shared.k[stage.at()], maps.pooled_k, shared.k_full[stage.at()], 0, tile * tile_tokens, 0,
                     p.grid.order_head(head), batch);
    }
  }
}

template <class T, int head_dim, class Cap>
__device__ void consume(const Params& p, const Cap& cap, Shared<head_dim>& shared) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x % 128 / 32;
  const int group = warpgroup_index();
  const int row_of_item = group / groups_of_row;
  const int first_of_half = group % groups_of_row * half;
  const int first_of_warp = first_of_half + warp * 16;
  CountedRing<Shared<head_dim>::slots> slot;
  CountedRing<Shared<head_dim>::stages> stage;
  float s[64];
  const Turns<consumers> turns(group);
  // Goes through the `tiles` tiles of keys that the row sees, and passes over the item's others. start(keys) starts a
  // tile's product in s, use(tile) takes it.
  const auto for_each_tile = [&](const Item& item, int tiles, auto&& start, auto&& use) {
    for (int tile = 0; tile < item.tiles; ++tile, stage.next()) {
      shared.k_full[stage.at()].wait(stage.parity());
      turns.wait();
      if (tile < tiles) {
        start(shared.k[stage.at()]);
        turns.pass();
        sm90::wgmma_wait<0>();
        sm90::pin(s);
        if (lane == 0) shared.k_free[stage.at()].arrive();
        apply(cap, s);
        use(tile);
      } else {
        turns.pass();
        if (lane == 0) shared.k_free[stage.at()].arrive();
      }
    }
  };

  for (int index = blockIdx.x; index < p.items(); index += gridDim.x, slot.next()) {
    const Item item(p, index);
    const int block = item.block + row_of_item;
    const int visible = Item::visible_of(p, block);
    const int tiles = (visible + tile_tokens - 1) / tile_tokens;
    const unsigned char* queries = shared.q[slot.at()][row_of_item];
    // Calls use(products, first of eight own blocks) for the warp's queries.
    const auto for_each_own = [&](auto&& use) {
      const std::int64_t first_own = p.grid.kv_head(item.head) * p.own_blocks + visible;
      const T* own_keys = static_cast<const T*>(p.pooled_own) + first_own * head_dim;
      for (int own = 0; tiles > 0 && visible + own <= block; own += 8) {
        float d[4];
        multiply_own<T, head_dim>(d, queries, first_of_warp, own_keys + own * head_dim, block + 1 - visible - own, cap);
        use(d, own);
      }
    };
    shared.q_full[slot.at()].wait(slot.parity());

    Statistics statistics[2];
    for_each_own([&](const float(&d)[4], int) {
#pragma unroll
      for (int x = 0; x < 4; ++x) statistics[x / 2].merge({d[x], 1}, p.scale_log2);
    });
    for_each_tile(
        item, tiles, [&](const unsigned char* keys) { start_product<T, head_dim>(s, queries, first_of_half, keys); },
        [&](int tile) { fold(s, visible - tile * tile_tokens, p.scale_log2, statistics); });

    LogSum* log_sums = shared.log_sums[slot.at()][row_of_item];
    float* shifts = shared.shifts[slot.at()][row_of_item];
    LogSum mine[2];
    const Span present = p.grid.queries_of(block);
    bool tame = present.begin == 0 && present.end == tile_tokens;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      statistics[r].merge_across_lanes(p.scale_log2);
      const int query = first_of_warp + lane / 4 + 8 * r;
      mine[r] = {statistics[r].max, log2f(statistics[r].sum)};
      const float shift = fmaf(mine[r].max, p.scale_log2, mine[r].log2_sum);
      tame = tame && fabsf(shift) < max_shift;
      if (lane % 4 == 0) {
        log_sums[query] = mine[r];
        shifts[query] = shift;
      }
    }
    for_each_own([&](const float(&d)[4], int own) {
      float sum[2] = {};
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const LogSum of_query = mine[x / 2];
        const int query = first_of_warp + lane / 4 + x / 2 * 8;
        const float weight = sm90::exp2_fast(fmaf(d[x] - of_query.max, p.scale_log2, -of_query.log2_sum));
        if (query >= present.begin && query < present.end) sum[x % 2] += weight;
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) sum[c] += __shfl_xor_sync(~0U, sum[c], offset);
        if (lane < 4) shared.own[slot.at()][row_of_item][first_of_warp / 16][own + lane * 2 + c] = sum[c];
      }
    });
    tame = wait_all(1 + row_of_item, groups_of_row * 128, tame);

    float* scores = p.scores + p.grid.list_start(item.head, block - p.grid.first_row);
    const float share = 1.0F / static_cast<float>(present.count());  // of a query
    if (const int own = threadIdx.x % (groups_of_row * 128); tiles > 0 && visible + own <= block) {
      float sum = 0;
      for (const auto& part : shared.own[slot.at()][row_of_item]) sum += part[own];
      scores[visible + own] = sum * share;
    }
    for_each_tile(
        item, tiles, [&](const unsigned char* keys) { start_product<T, head_dim>(s, keys, first_of_half, queries); },
        [&](int tile) {
          float sum[2];
          if (tame)
            sum_weights(s, p.scale_log2, shifts, sum);
          else
            sum_weights(s, p.scale_log2, log_sums, p.grid.queries_of(block), sum);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int key_block = tile * tile_tokens + first_of_warp + lane / 4 + r * 8;
            const float of_queries = quad_sum(sum[r]);
            if (lane % 4 == 0 && key_block < visible) scores[key_block] = of_queries * share;
          }
        });
    if (lane == 0) shared.q_free[slot.at()].arrive();
  }
  turns.finish();
}

template <class T, int head_dim, class Cap>
__global__ void __launch_bounds__(threads, 1)
    score_queries(const __grid_constant__ Params p, const __grid_constant__ Maps maps,
                  const __grid_constant__ Cap cap) {
  auto& shared = aligned_shared<Shared<head_dim>>();
  run_roles<consumers, consumer_registers, producer_registers>(
      shared, [&] { consume<T, head_dim>(p, cap, shared); }, [&] { produce<head_dim>(p, maps, shared); });
}

}  // namespace

cudaError_t score_per_query(const SelectArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const RowGrid grid(g, args.permuted.order_heads);
  const int rows = static_cast<int>(scored_rows(args));
  if (rows <= grid.first_sparse_row()) return cudaSuccess;
  const Params p{.grid = grid,
                 .scores = scores_of(args),
                 .scored_rows = rows,
                 .first_pair = grid.diagonal(grid.first_sparse_row()) / rows_of_item,
                 .last_pair = grid.diagonal(rows - 1) / rows_of_item,
                 .pooled_own = args.pooled.own,
                 .own_blocks = args.pooled.own_blocks,
                 .scale_log2 = scale_log2(args.options.scale)};
  const ConstView& q = args.inputs.q;
  const std::int64_t pooled_head = args.pooled.k_blocks * g.shape.head_dim;
  const ConstView pooled{args.pooled.k, q.dtype, args.permuted.order_heads * pooled_head, pooled_head,
                         g.shape.head_dim};
  Maps maps;
  if (!make_tensor_map(maps.q, q, g.shape.batch, g.shape.q_heads, g.shape.q_len, g.shape.head_dim, tile_tokens) ||
      !make_tensor_map(maps.pooled_k, pooled, g.shape.batch, args.permuted.order_heads, permuted_blocks(g),
                       g.shape.head_dim, tile_tokens))
    return cudaErrorInvalidValue;
  int multiprocessors = 0;
  if (const cudaError_t error = count_multiprocessors(multiprocessors); error != cudaSuccess) return error;
  return dispatch(q.dtype, g.shape.head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    constexpr int shared_bytes = aligned_bytes<Shared<dim>>;
    static_assert(shared_bytes <= 227 * 1024);
    const dim3 thread_blocks(std::min(p.items(), multiprocessors));
    return with_cap<dim>(args.options.softcap, args.options.scale, [&]<class Cap>(const Cap& cap) {
      return launch(score_queries<T, dim, Cap>, thread_blocks, threads, shared_bytes, stream,
                    Start::after_earlier_kernels, p, maps, cap);
    });
  });
}

}  // namespace pbsattn::cuda
