// The first launch of mass.cu where a line is one query or one key (exact, sampled): products of 256 queries and
// a stream of keys, and of each block of keys the log-sum-exps.
//
// The queries stay in shared memory; a producer warp brings tiles of 128 keys, which are blocks, through the copy
// engine into a ring. Each of four consumer warpgroups takes 64 of the queries. They start their products in turn
// (sm90/turns.cuh), so that the exponentials of some run while the tensor cores work for another.
#pragma once

#include "cuda/select/scores/exp.cuh"
#include "cuda/select/scores/mass.cuh"
#include "cuda/sm90/turns.cuh"

namespace pbsattn::cuda::mass {

constexpr int key_groups = 4;  // consumer warpgroups
constexpr int group_queries = 64;
constexpr int key_threads = (key_groups + 1) * 128;
constexpr int steps_of_item = 64;  // tiles of a thread block
static_assert(key_groups * group_queries == tile_queries);

template <int head_dim>
struct KeyShared {
  static constexpr int key_stages = head_dim > 192 ? 1 : head_dim > 128 ? 2 : 5;
  alignas(1024) unsigned char q[tile_queries / tile_tokens][SwizzledTile<head_dim>::bytes];
  alignas(1024) unsigned char k[key_stages][SwizzledTile<head_dim>::bytes];
  Barrier q_full, full[key_stages], free[key_stages];

  __device__ void init() {
    q_full.init(1);
    for (Barrier& barrier : full) barrier.init(1);
    for (Barrier& barrier : free) barrier.init(key_groups * 4);
    sm90::fence_barrier_init();
  }
};

// A thread block's share of the work: steps [begin, end) of a tile of queries of one head. First come the permuted
// blocks before the last row's own segment, then those of the rows' own segments, as they were: step by step one of
// each warpgroup's.
struct KeyItem {
  __device__ explicit KeyItem(const Params& p)
      : head(p.first_head + static_cast<int>(blockIdx.z)),
        // The last rows have the most keys, so they start first.
        row(p.row_begin + static_cast<int>(gridDim.y - 1 - blockIdx.y) * max(tile_queries / p.query_lines, 1)) {
    int own = 0;
    for (int group = 0; group < key_groups; ++group) {
      permuted = max(permuted, permuted_of(p, group));
      own = max(own, own_of(p, group));
    }
    begin = static_cast<int>(blockIdx.x) * steps_of_item;
    end = min(begin + steps_of_item, permuted + own * key_groups);
  }
  // Return the token blocks of a warpgroup's first and last row; the first is beyond the last where it has none.
  __device__ int first_block(const Params& p, int group) const {
    return p.grid.diagonal(row + group * group_queries / p.query_lines);
  }
  __device__ int last_block(const Params& p, int group) const {
    return p.grid.diagonal(min(row + ((group + 1) * group_queries - 1) / p.query_lines, p.row_end - 1));
  }
  // Return how many permuted blocks a warpgroup's rows see, and original ones.
  __device__ int permuted_of(const Params& p, int group) const {
    return first_block(p, group) > last_block(p, group) ? 0 : p.grid.own_begin(last_block(p, group));
  }
  __device__ int own_of(const Params& p, int group) const {
    return max(last_block(p, group) + 1 - p.grid.own_begin(first_block(p, group)), 0);
  }
  __device__ bool is_own(int step) const { return step >= permuted; }
  __device__ int group_of_own(int step) const { return (step - permuted) % key_groups; }
  // Returns the key block of a step of an own segment; -1: none.
  __device__ int own_block(const Params& p, int step) const {
    const int group = group_of_own(step);
    const int i = (step - permuted) / key_groups;
    return i < own_of(p, group) ? p.grid.own_begin(first_block(p, group)) + i : -1;
  }

  int head;  // of all batch entries
  int row;   // the first
  int permuted = 0;
  int begin, end;
};

template <int head_dim>
__device__ void produce_keys(const Params& p, const Maps& maps, const KeyItem& item, KeyShared<head_dim>& shared) {
  const int batch = item.head / p.grid.q_heads;
  const int head = item.head % p.grid.q_heads;
  const int first_query = p.sampled ? item.row * p.query_lines : p.grid.first_query(p.grid.diagonal(item.row));
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) shared.q_full.arrive_expecting(sizeof(shared.q));
  for (int i = 0; i < tile_queries / tile_tokens && lane == 0; ++i)
    sm90::tma_load(shared.q[i], maps.q, shared.q_full, 0, first_query + i * tile_tokens, 0, head, batch);
  Ring<KeyShared<head_dim>::key_stages> stage;
  for (int step = item.begin; step < item.end; ++step) {
    const bool own = item.is_own(step);
    const int block = own ? item.own_block(p, step) : step;
    if (block < 0) continue;
    shared.free[stage.at].wait(stage.parity ^ 1);
    if (lane == 0) shared.full[stage.at].arrive_expecting(sizeof(shared.k[0]));
    if (own || !p.moved)
      copy_block<head_dim>(shared.k[stage.at], maps.k, p.pages, shared.full[stage.at], block, p.grid.kv_head(head),
                           batch, lane);
    else if (lane == 0)
      sm90::tma_load(shared.k[stage.at], maps.permuted_k, shared.full[stage.at], 0, block * block_tokens, 0,
                     p.grid.order_head(head), batch);
    stage.next();
  }
}

// Sums a product over its block's keys, for the r-th of this thread's two queries, in all four lanes that share it.
// `max` becomes the largest product, if it was smaller.
__device__ inline float log_sum_exactly(const float (&s)[64], int r, float scale_log2, float& max) {
  const float largest = quad_max(largest_of(s, r));
  const float shift = Statistics::finite_or_zero(largest);
  max = fmaxf(max, largest);
  return fmaf(shift, scale_log2, __log2f(quad_sum(sum_exactly(s, r, scale_log2, shift))));
}

// Does the same of both queries, where it can be relative to `max`, the largest product that sums were relative to so
// far, -inf at first. A query's sums don't depend on those beside it.
__device__ inline void log_sum_block(const float (&s)[64], float scale_log2, float (&max)[2], float (&log_sum)[2]) {
  bool trusted[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float shift = max[r] * scale_log2;
    const float sum = quad_sum(sum_relative(s, r, scale_log2, shift));
    trusted[r] = is_trusted(sum, shift);
    log_sum[r] = shift + __log2f(sum);
  }
  if (__all_sync(~0U, trusted[0] && trusted[1])) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float grown = max[r];
    const float exact = log_sum_exactly(s, r, scale_log2, grown);
    if (trusted[r]) continue;
    log_sum[r] = exact;
    max[r] = grown;
  }
}

template <class T, int head_dim, class Cap>
__device__ void consume_keys(const Params& p, const Cap& cap, const KeyItem& item, KeyShared<head_dim>& shared) {
  const int group = warpgroup_index();
  const int lane = threadIdx.x % 4;
  const unsigned char* queries = shared.q[group / 2];
  const int first_query = group % 2 * group_queries;
  // Of this thread's two queries.
  const auto query_of = [&](int r) {
    return group * group_queries + static_cast<int>(threadIdx.x) % 128 / 32 * 16 +
           static_cast<int>(threadIdx.x) % 32 / 4 + 8 * r;
  };
  const auto block_of = [&](int r) {  // -1: none
    const int row = item.row + query_of(r) / p.query_lines;
    return row < p.row_end ? p.grid.diagonal(row) : -1;
  };
  float* sums = p.log_sums + blockIdx.z * p.head_sums;
  int to[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = item.row + query_of(r) / p.query_lines;
    to[r] = static_cast<int>(p.sums_before(row)) + query_of(r) % p.query_lines * (p.grid.diagonal(row) + 1);
  }
  float s[64];
  const auto release = [&](unsigned stage) {
    if (threadIdx.x % 32 == 0) shared.free[stage].arrive();
  };

  float max[2] = {-INFINITY, -INFINITY};
  Ring<KeyShared<head_dim>::key_stages> stage;
  shared.q_full.wait(0);
  const int permuted = item.permuted_of(p, group);
  const int permuted_end = min(item.end, item.permuted);
  float held[2];  // log2 of the sum of one of four blocks: that of this lane
  int step = item.begin;
  const Turns<key_groups> turns(group);
  for (; step < permuted_end; ++step, stage.next()) {
    shared.full[stage.at].wait(stage.parity);
    turns.wait();
    if (step < permuted) {
      start_product<T, head_dim>(s, queries, first_query, shared.k[stage.at]);
      turns.pass();
      sm90::wgmma_wait<0>();
      sm90::pin(s);
      release(stage.at);
      apply(cap, s);
      float log_sum[2];
      log_sum_block(s, p.scale_log2, max, log_sum);
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (step % 4 == lane) held[r] = log_sum[r];
    } else {
      turns.pass();
      release(stage.at);
    }
    if (step % 4 == 3 || step + 1 == permuted_end) {
      const int block = step / 4 * 4 + lane;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (block <= step && block < p.grid.own_begin(block_of(r))) sums[to[r] + block] = held[r];
    }
  }
  turns.finish();
  for (; step < item.end; ++step) {
    const int key_block = item.own_block(p, step);
    if (key_block < 0) continue;
    shared.full[stage.at].wait(stage.parity);
    if (item.group_of_own(step) == group) {
      start_product<T, head_dim>(s, queries, first_query, shared.k[stage.at]);
      sm90::wgmma_wait<0>();
      sm90::pin(s);
      release(stage.at);
      apply(cap, s);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int block = block_of(r);
        const int last_key =
            (block - key_block) * block_tokens + p.place_of(block - p.grid.first_row, query_of(r) % p.query_lines);
#pragma unroll
        for (int i = 0; i < 64; i += 4)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if (i * 2 + lane * 2 + c > last_key) s[i + 2 * r + c] = -INFINITY;
        const float log_sum = log_sum_exactly(s, r, p.scale_log2, max[r]);
        if (lane == r && key_block >= p.grid.own_begin(block) && key_block <= block) sums[to[r] + key_block] = log_sum;
      }
    } else {
      release(stage.at);
    }
    stage.next();
  }
}

template <class T, int head_dim, class Cap>
__global__ void __launch_bounds__(key_threads, 1)
    score_keys(const __grid_constant__ Params p, const __grid_constant__ Maps maps, const __grid_constant__ Cap cap) {
  auto& shared = aligned_shared<KeyShared<head_dim>>();
  const KeyItem item(p);
  if (item.begin >= item.end) return;
  run_roles<key_groups, 112, 32, 32>(
      shared, [&] { consume_keys<T, head_dim>(p, cap, item, shared); },
      [&] { produce_keys<head_dim>(p, maps, item, shared); });
}

}  // namespace pbsattn::cuda::mass
