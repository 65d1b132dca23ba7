// The first launch of mass.cu where a line is a patch of 8 queries or keys (antidiagonals): products of lines,
// tile by tile, and of each tile the log-sum-exps over blocks.
#pragma once

#include "cuda/select/scores/mass.cuh"

namespace pbsattn::cuda::mass {

constexpr int lines_of_block = block_tokens / patch_tokens;
constexpr int blocks_of_tile = tile_keys / lines_of_block;
constexpr int lines_of_box = 32;  // of one copy, whose tokens span 256 at most
constexpr int tiles_of_item = 8;  // so that an item lasts some 50 us
constexpr int consumers = 2;      // warpgroups, 128 query lines each
constexpr int threads = (consumers + 1) * 128;
constexpr int stages = 4;

template <int head_dim>
struct Shared {
  static constexpr int panel = panel_of(head_dim);  // elements of a line that a stage holds
  static constexpr int panel_bytes = panel * 2;     // of a line
  alignas(1024) unsigned char q[stages][tile_queries * panel_bytes];
  alignas(1024) unsigned char k[stages][tile_keys * panel_bytes];
  Barrier full[stages], free[stages];

  __device__ void init() {
    for (Barrier& barrier : full) barrier.init(1);
    for (Barrier& barrier : free) barrier.init(consumers * 4);
    sm90::fence_barrier_init();
  }
};

// A thread block's share of the work: some tiles of 256 query lines of one head against key lines.
struct Item {
  __device__ explicit Item(const Params& p) : head(p.first_head + static_cast<int>(blockIdx.z)) {
    constexpr int rows_of_tile = tile_queries / lines_of_block;
    // The last rows have the most keys, so they start first.
    const int row = p.row_begin + static_cast<int>(gridDim.y - 1 - blockIdx.y) * rows_of_tile;
    block = p.grid.diagonal(row);
    const int last_block = p.grid.diagonal(min(row + rows_of_tile, p.row_end) - 1);
    permuted_tiles = (p.grid.own_begin(last_block) + blocks_of_tile - 1) / blocks_of_tile;
    first_own_tile = p.grid.own_begin(block) / blocks_of_tile;
    const int own_tiles = p.causal ? last_block / blocks_of_tile + 1 - first_own_tile : 0;
    begin = static_cast<int>(blockIdx.x) * tiles_of_item;
    end = min(begin + tiles_of_item, permuted_tiles + own_tiles);
  }
  __device__ bool is_own(int tile) const { return tile >= permuted_tiles; }
  // Returns the first key block of a tile.
  __device__ int block_of(int tile) const {
    return (is_own(tile) ? first_own_tile + tile - permuted_tiles : tile) * blocks_of_tile;
  }
  int head;        // of all batch entries
  int block;       // token block of the first query line
  int begin, end;  // tiles
  int permuted_tiles, first_own_tile;
};

template <int head_dim>
__device__ void produce(const Params& p, const Maps& maps, const Item& item, Shared<head_dim>& shared) {
  constexpr int panel_bytes = Shared<head_dim>::panel_bytes;
  constexpr int panels = head_dim / Shared<head_dim>::panel;  // of one token
  const int batch = item.head / p.grid.q_heads;
  const int head = item.head % p.grid.q_heads;
  const int first_query = p.grid.first_query(item.block);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int lines_of_run = p.pages.run(lines_of_box * patch_tokens) / patch_tokens;  // of a copy from pages
  Ring<stages> stage;
  for (int tile = item.begin; tile < item.end; ++tile) {
    const bool own = item.is_own(tile) || !p.moved;
    const CUtensorMap& keys = own ? maps.k.map : maps.permuted_k;
    const int k_head = own ? p.grid.kv_head(head) : p.grid.order_head(head);
    const int first_key = item.block_of(tile) * block_tokens;
    for (int step = 0; step < patch_tokens * panels; ++step, stage.next()) {
      const int i = step / panels;
      shared.free[stage.at].wait(stage.parity ^ 1);
      if (lane == 0) shared.full[stage.at].arrive_expecting(sizeof(shared.q[0]) + sizeof(shared.k[0]));
      for (int line = 0; line < tile_queries && lane == 0; line += lines_of_box)
        sm90::tma_load(shared.q[stage.at] + line * panel_bytes, maps.q, shared.full[stage.at], 0,
                       first_query + line * patch_tokens + patch_tokens - 1 - i, step % panels, head, batch);
      if (own && p.pages.entries != nullptr) {
        for (int line = lane * lines_of_run; line < tile_keys; line += 32 * lines_of_run) {
          const int token = first_key + line * patch_tokens;
          const int slot = p.pages.slot(token);
          sm90::tma_load(shared.k[stage.at] + line * panel_bytes, slot == p.pages.last_slot ? maps.k.last : maps.k.map,
                         shared.full[stage.at], 0, p.pages.place(token, slot) + i, step % panels, k_head,
                         slot > p.pages.last_slot ? p.pages.count : p.pages.page(batch, slot));
        }
        continue;
      }
      for (int line = 0; line < tile_keys && lane == 0; line += lines_of_box)
        sm90::tma_load(shared.k[stage.at] + line * panel_bytes, keys, shared.full[stage.at], 0,
                       first_key + line * patch_tokens + i, step % panels, k_head, batch);
    }
  }
}

// Writes the log-sum-exps of this thread's two query lines (`line`, `line` + 8) over each block of a tile.
__device__ inline void store_log_sums(const Params& p, const Item& item, float (&s)[64], int line, int tile) {
  constexpr int n8_of_block = 16 / blocks_of_tile;
  const int lane = threadIdx.x % 4;
  const int first_block = item.block_of(tile);
  const bool own = item.is_own(tile);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int block = item.block + (line + 8 * r) / lines_of_block;
    const int line_of_block = (line + 8 * r) % lines_of_block;
    const int row = block - p.grid.first_row;
    const int own_begin = p.grid.own_begin(block);
    const int last_key = own ? (block - first_block) * lines_of_block + line_of_block : tile_keys - 1;
    float* to = p.log_sums + blockIdx.z * p.head_sums + p.sums_before(row) + line_of_block * (block + 1);
#pragma unroll
    for (int b = 0; b < blocks_of_tile; ++b) {
      float max = -INFINITY;
#pragma unroll
      for (int n8 = b * n8_of_block; n8 < (b + 1) * n8_of_block; ++n8)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[4 * n8 + 2 * r + c];
          if (n8 * 8 + lane * 2 + c > last_key) x = -INFINITY;
          max = fmaxf(max, x);
        }
      max = quad_max(max);
      const float shift = Statistics::finite_or_zero(max);
      float sum = 0;
#pragma unroll
      for (int n8 = b * n8_of_block; n8 < (b + 1) * n8_of_block; ++n8)
#pragma unroll
        for (int c = 0; c < 2; ++c) sum += sm90::exp2_fast((s[4 * n8 + 2 * r + c] - shift) * p.scale_log2);
      sum = quad_sum(sum);
      const int key_block = first_block + b;
      const bool counts = own ? key_block >= own_begin && key_block <= block : key_block < own_begin;
      if (lane == b % 4 && counts && row < p.row_end) to[key_block] = fmaf(shift, p.scale_log2, log2f(sum));
    }
  }
}

template <class T, int head_dim, class Cap>
__device__ void consume(const Params& p, const Cap& cap, const Item& item, Shared<head_dim>& shared) {
  constexpr int panel = Shared<head_dim>::panel;
  constexpr int panel_bytes = Shared<head_dim>::panel_bytes;
  constexpr int steps = patch_tokens * head_dim / panel;
  const int lane = threadIdx.x % 32;
  const int first_line = threadIdx.x / 128 * 128;
  Ring<stages> stage;
  for (int tile = item.begin; tile < item.end; ++tile) {
    float low[64], high[64];  // query lines 0 .. 63 and 64 .. 127 of the warpgroup's
    unsigned previous = 0;
    for (int step = 0; step < steps; ++step, stage.next()) {
      shared.full[stage.at].wait(stage.parity);
      sm90::wgmma_fence();
      const std::uint64_t a = sm90::operand<panel>(shared.q[stage.at] + first_line * panel_bytes);
      const std::uint64_t b = sm90::operand<panel>(shared.k[stage.at]);
#pragma unroll
      for (int k16 = 0; k16 < panel / 16; ++k16) {
        sm90::wgmma<T>(low, sm90::advance(a, k16 * 32), sm90::advance(b, k16 * 32), step + k16 > 0);
        sm90::wgmma<T>(high, sm90::advance(a, 64 * panel_bytes + k16 * 32), sm90::advance(b, k16 * 32), step + k16 > 0);
      }
      sm90::wgmma_commit();
      if (step > 0) {
        sm90::wgmma_wait<1>();
        if (lane == 0) shared.free[previous].arrive();
      }
      previous = stage.at;
    }
    sm90::wgmma_wait<0>();
    sm90::pin(low);
    sm90::pin(high);
    apply(cap, low);
    apply(cap, high);
    if (lane == 0) shared.free[previous].arrive();
    const int line = first_line + threadIdx.x % 128 / 32 * 16 + lane / 4;
    store_log_sums(p, item, low, line, tile);
    store_log_sums(p, item, high, line + 64, tile);
  }
}

template <class T, int head_dim, class Cap>
__global__ void __launch_bounds__(threads, 1)
    score_lines(const __grid_constant__ Params p, const __grid_constant__ Maps maps, const __grid_constant__ Cap cap) {
  auto& shared = aligned_shared<Shared<head_dim>>();
  const Item item(p);
  if (item.begin >= item.end) return;
  run_roles<consumers, 232, 40, 32>(
      shared, [&] { consume<T, head_dim>(p, cap, item, shared); }, [&] { produce<head_dim>(p, maps, item, shared); });
}

}  // namespace pbsattn::cuda::mass
