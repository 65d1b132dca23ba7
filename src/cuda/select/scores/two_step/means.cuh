// The first step of two_step.cu: for each row the mean over its sampled queries of softmax over causal blocks of query
// . pooled key, as per_query.cu has it for all queries.
//
// An *item* is 256 lines of one head, 16 rows of 16 queries, in two tiles of 128. Four warpgroups, two for each tile,
// go through its pooled keys, 128 at a time, twice:
//     S[line][block] = Q K^T      max and sum of exp2 of each line, in registers
//     S^T[block][line] = K Q^T    weights exp2(S^T - log-sum-exp), summed over each row's lines
// A tile's two warpgroups share its lines in the first sweep and each tile's blocks in the second. The few blocks of a
// row's own segment are multiplied warp by warp (mma), 16 lines of one row. One thread brings keys through the copy
// engine, three warps gather the queries of the next item. A thread block stays resident and takes every n-th item;
// long rows come first, and heads side by side share L2.
#pragma once

#include "cuda/select/scores/per_query_fold.cuh"
#include "cuda/select/scores/two_step/lines.cuh"

namespace pbsattn::cuda::two_step {

constexpr int groups_of_tile = 2;
constexpr int item_tiles = item_lines / tile_tokens;
constexpr int gathering_threads = 96;
constexpr int max_own_blocks = max_segment / block_tokens;
constexpr int warp_lines = 16;
static_assert(tile_tokens / warp_lines == 8, "a row has no fewer lines than a warp, so a tile no more rows");

struct MeansMaps {
  CUtensorMap pooled_k;
};

template <int head_dim>
struct MeansShared {
  static constexpr int slots = head_dim > 128 ? 1 : 2;  // items whose queries are in shared memory
  static constexpr int stages = head_dim > 192 ? 1 : head_dim >= 128 ? 2 : 4;
  alignas(1024) unsigned char q[slots][item_tiles][SwizzledTile<head_dim>::bytes];
  alignas(1024) unsigned char k[stages][SwizzledTile<head_dim>::bytes];
  LogSum log_sums[slots][item_tiles][tile_tokens];
  float shifts[slots][item_tiles][tile_tokens];                            // log_sums in one number
  float own[slots][item_tiles][tile_tokens / warp_lines][max_own_blocks];  // a warp's part of the own segment's scores
  struct Row {
    float* scores;
    int end;      // blocks before its own segment; none where it isn't scored
    float share;  // of each of its queries
  };
  Row rows[slots][item_tiles][tile_tokens / warp_lines];
  Barrier q_full[slots], q_free[slots], k_full[stages], k_free[stages];

  __device__ void init() {
    for (Barrier& barrier : q_full) barrier.init(gathering_threads);
    for (Barrier& barrier : k_full) barrier.init(1);
    for (Barrier& barrier : q_free) barrier.init(groups * 4);
    for (Barrier& barrier : k_free) barrier.init(groups * 4);
    sm90::fence_barrier_init();
  }
};

struct MeansItem {
  __host__ __device__ static int rows_of(const Sample& sample) { return item_lines >> sample.log_lines; }
  __host__ __device__ static int first(const Params& p) { return p.grid.first_sparse_row() / rows_of(p.means); }
  __host__ __device__ static int count(const Params& p) {  // of all heads
    return ((p.scored_rows - 1) / rows_of(p.means) - first(p) + 1) * p.grid.heads;
  }

  __device__ MeansItem(const Params& p, int index)
      : head(index % p.grid.heads),
        row(((p.scored_rows - 1) / rows_of(p.means) - index / p.grid.heads) * rows_of(p.means)),
        tiles((p.visible(min(row + rows_of(p.means), p.scored_rows) - 1) + tile_tokens - 1) / tile_tokens) {}
  int head;   // of all batch entries
  int row;    // the first
  int tiles;  // of keys that some row sees
};

template <int head_dim>
__device__ void produce_means(const Params& p, const MeansMaps& maps, MeansShared<head_dim>& shared) {
  CountedRing<MeansShared<head_dim>::stages> stage;
  for (int index = blockIdx.x; index < MeansItem::count(p); index += gridDim.x) {
    const MeansItem item(p, index);
    for (int step = 0; step < 2 * item.tiles; ++step, stage.next()) {
      const int tile = step < item.tiles ? step : step - item.tiles;
      shared.k_free[stage.at()].wait(stage.parity() ^ 1);
      shared.k_full[stage.at()].arrive_expecting(sizeof(shared.k[0]));
      sm90::tma_load(shared.k[stage.at()], maps.pooled_k, shared.k_full[stage.at()], 0, tile * tile_tokens, 0,
                     p.grid.order_head(item.head % p.grid.q_heads), item.head / p.grid.q_heads);
    }
  }
}

template <class T, int head_dim>
__device__ void gather_means(const Params& p, MeansShared<head_dim>& shared, int thread) {
  CountedRing<MeansShared<head_dim>::slots> slot;
  for (int index = blockIdx.x; index < MeansItem::count(p); index += gridDim.x, slot.next()) {
    const MeansItem item(p, index);
    shared.q_free[slot.at()].wait(slot.parity() ^ 1);
    gather_lines<T, head_dim>(p, p.means, item.head, item.row << p.means.log_lines, item_lines, shared.q[slot.at()][0],
                              thread, gathering_threads);
    commit_copies();
    wait_copies<0>();
    sm90::fence_async_shared();
    shared.q_full[slot.at()].arrive();
  }
}

// Returns the sum over four lanes of the lane's own of four numbers.
__device__ inline float sum_transposed(const float (&x)[4]) {
  const bool odd = threadIdx.x % 2 != 0;
  const bool high = threadIdx.x % 4 >= 2;
  const float low = (odd ? x[1] : x[0]) + __shfl_xor_sync(~0U, odd ? x[0] : x[1], 1);
  const float up = (odd ? x[3] : x[2]) + __shfl_xor_sync(~0U, odd ? x[2] : x[3], 1);
  return (high ? up : low) + __shfl_xor_sync(~0U, high ? low : up, 2);
}

// Sums a product's weights over the lines of each row: of two lines side by side, load(first) brings what
// weight(product, that, which of the two) takes. Calls store(row of the tile, sums of this thread's two blocks), of
// each row in one of four lanes at least.
template <class Load, class Weight, class Store>
__device__ void sum_lines(const float (&s)[64], int log_lines, Load&& load, Weight&& weight, Store&& store) {
  constexpr int log_warp_lines = 4;
  const int lane = static_cast<int>(threadIdx.x) % 4;
  float mine[2] = {};  // of 16 lines at first: those that this lane takes of 64
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum[2][4] = {};
#pragma unroll
    for (int n8 = 0; n8 < 8; ++n8) {
      const auto of_lines = load((half * 8 + n8) * 8 + lane * 2);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = 4 * (half * 8 + n8) + 2 * r;
        sum[r][n8 / 2] += weight(s[i], of_lines, 0) + weight(s[i + 1], of_lines, 1);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float of_row = sum_transposed(sum[r]);
      if (log_lines > 4) of_row += __shfl_xor_sync(~0U, of_row, 1);
      if (log_lines > 5) of_row += __shfl_xor_sync(~0U, of_row, 2);
      mine[r] = log_lines > 6 ? mine[r] + of_row : of_row;
    }
    if (half == 1 || log_lines <= 6) store((half * 4 + lane) >> (log_lines - log_warp_lines), mine);
  }
}

template <class T, int head_dim, class Cap>
__device__ void consume_means(const Params& p, const Cap& cap, MeansShared<head_dim>& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
  const int group = warpgroup_index();
  const int tile_of_item = group / groups_of_tile;
  const int first_of_half = group % groups_of_tile * group_lines;
  const int first_of_warp = first_of_half + warp * warp_lines;
  const int rows_of_tile = tile_tokens >> p.means.log_lines;
  CountedRing<MeansShared<head_dim>::slots> slot;
  CountedRing<MeansShared<head_dim>::stages> stage;
  float s[64];
  const Turns<groups> turns(group);
  // Goes through the `tiles` tiles of keys that the lines see, and passes over the item's others. start(keys) starts a
  // tile's product in s, use(tile) takes it.
  const auto for_each_tile = [&](const MeansItem& item, int tiles, auto&& start, auto&& use) {
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

  for (int index = blockIdx.x; index < MeansItem::count(p); index += gridDim.x, slot.next()) {
    const MeansItem item(p, index);
    const int first_row = item.row + tile_of_item * rows_of_tile;
    const int last_row = min(first_row + rows_of_tile, p.scored_rows) - 1;
    const int tiles = last_row < first_row ? 0 : (p.visible(last_row) + tile_tokens - 1) / tile_tokens;
    // All of a warp's lines are of one row.
    const int row = first_row + p.means.row_of(first_of_warp);
    const int visible = p.visible(row);
    const int diagonal = p.grid.diagonal(row);
    const unsigned char* queries = shared.q[slot.at()][tile_of_item];
    // Calls use(products, first of eight own blocks) for the warp's lines; the first eight are multiplied once.
    float of_first[4];
    const auto for_each_own = [&](bool again, auto&& use) {
      const std::int64_t first_own = p.grid.kv_head(item.head) * p.own_blocks + visible;
      const T* own_keys = static_cast<const T*>(p.pooled_own) + first_own * head_dim;
      for (int own = 0; visible > 0 && visible + own <= diagonal; own += 8) {
        float d[4];
        if (!again || own > 0)
          multiply_own<T, head_dim>(d, queries, first_of_warp, own_keys + own * head_dim, diagonal + 1 - visible - own,
                                    cap);
#pragma unroll
        for (int x = 0; x < 4; ++x)
          if (own == 0 && again)
            d[x] = of_first[x];
          else if (own == 0)
            of_first[x] = d[x];
        use(d, own);
      }
    };
    shared.q_full[slot.at()].wait(slot.parity());

    Statistics statistics[2];
    for_each_own(false, [&](const float(&d)[4], int) {
#pragma unroll
      for (int x = 0; x < 4; ++x) statistics[x / 2].merge({d[x], 1}, p.scale_log2);
    });
    for_each_tile(
        item, tiles, [&](const unsigned char* keys) { start_product<T, head_dim>(s, queries, first_of_half, keys); },
        [&](int tile) { fold(s, visible - tile * tile_tokens, p.scale_log2, statistics); });

    LogSum* log_sums = shared.log_sums[slot.at()][tile_of_item];
    float* shifts = shared.shifts[slot.at()][tile_of_item];
    LogSum mine[2];
    const int count = visible > 0 ? p.means.count(p.grid.queries_of(diagonal)) : 0;
    bool tame = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      statistics[r].merge_across_lanes(p.scale_log2);
      const int line = first_of_warp + lane / 4 + 8 * r;
      const bool present = p.means.of_row(line) < count;
      mine[r] = present ? LogSum{statistics[r].max, log2f(statistics[r].sum)} : LogSum{0, INFINITY};
      const float shift = fmaf(mine[r].max, p.scale_log2, mine[r].log2_sum);
      tame = tame && (!present || fabsf(shift) < max_shift);
      if (lane % 4 == 0) {
        log_sums[line] = mine[r];
        shifts[line] = shift;
      }
    }
    for_each_own(true, [&](const float(&d)[4], int own) {
      float sum[2] = {};
#pragma unroll
      for (int x = 0; x < 4; ++x)
        sum[x % 2] += sm90::exp2_fast(fmaf(d[x] - mine[x / 2].max, p.scale_log2, -mine[x / 2].log2_sum));
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) sum[c] += __shfl_xor_sync(~0U, sum[c], offset);
        if (lane < 4) shared.own[slot.at()][tile_of_item][first_of_warp / warp_lines][own + lane * 2 + c] = sum[c];
      }
    });
    const int thread = static_cast<int>(threadIdx.x) % (groups_of_tile * 128);
    if (const int of = first_row + thread; thread < rows_of_tile && p.visible(of) > 0)
      shared.rows[slot.at()][tile_of_item][thread] = {
          p.scores + p.grid.list_start(item.head, of), p.visible(of),
          1.0F / static_cast<float>(p.means.count(p.grid.queries_of(p.grid.diagonal(of))))};
    else if (thread < rows_of_tile)
      shared.rows[slot.at()][tile_of_item][thread] = {};
    tame = wait_all(1 + tile_of_item, groups_of_tile * 128, tame);

    for (int i = thread; i < rows_of_tile * max_own_blocks; i += groups_of_tile * 128) {
      const int of_tile = i / max_own_blocks;
      const int own = i % max_own_blocks;
      const int of = first_row + of_tile;
      if (p.visible(of) == 0 || p.visible(of) + own > p.grid.diagonal(of)) continue;
      const int warps_of_row = p.means.lines() / warp_lines;
      float sum = 0;
      for (int i_warp = 0; i_warp < warps_of_row; ++i_warp)
        sum += shared.own[slot.at()][tile_of_item][of_tile * warps_of_row + i_warp][own];
      const auto to = shared.rows[slot.at()][tile_of_item][of_tile];
      to.scores[to.end + own] = sum * to.share;
    }
    for_each_tile(
        item, tiles, [&](const unsigned char* keys) { start_product<T, head_dim>(s, keys, first_of_half, queries); },
        [&](int tile) {
          const auto store = [&](int of_tile, const float(&sums)[2]) {
            const auto of = shared.rows[slot.at()][tile_of_item][of_tile];
#pragma unroll
            for (int r = 0; r < 2; ++r)
              if (const int block = tile * tile_tokens + first_of_warp + lane / 4 + 8 * r; block < of.end)
                of.scores[block] = sums[r] * of.share;
          };
          if (tame)
            sum_lines(
                s, p.means.log_lines, [&](int line) { return *reinterpret_cast<const float2*>(shifts + line); },
                [&](float x, float2 shift, int i) {
                  return sm90::exp2_fast(fmaf(x, p.scale_log2, i == 0 ? -shift.x : -shift.y));
                },
                store);
          else
            sum_lines(
                s, p.means.log_lines, [&](int line) { return *reinterpret_cast<const float4*>(log_sums + line); },
                [&](float x, float4 of, int i) {
                  return sm90::exp2_fast(fmaf(x - (i == 0 ? of.x : of.z), p.scale_log2, i == 0 ? -of.y : -of.w));
                },
                store);
        });
    if (lane == 0) shared.q_free[slot.at()].arrive();
  }
  turns.finish();
}

template <class T, int head_dim, class Cap>
__global__ void __launch_bounds__(threads, 1)
    score_sampled(const __grid_constant__ Params p, const __grid_constant__ MeansMaps maps,
                  const __grid_constant__ Cap cap) {
  auto& shared = aligned_shared<MeansShared<head_dim>>();
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  if (threadIdx.x < groups * 128) {
    sm90::take_registers<multiplying_registers>();
    consume_means<T, head_dim>(p, cap, shared);
  } else {
    sm90::give_registers<other_registers>();
    const int thread = static_cast<int>(threadIdx.x) - groups * 128;
    if (thread >= 128 - gathering_threads)
      gather_means<T, head_dim>(p, shared, thread - (128 - gathering_threads));
    else if (thread == 0)
      produce_means<head_dim>(p, maps, shared);
  }
}

}  // namespace pbsattn::cuda::two_step
