// The second step of two_step.cu: products of sampled queries and the keys of blocks that may be kept, and of each such
// block a log-sum-exp for each query; of each query also those of all that its softmax is over.
//
// A thread block takes four *strips*, a warpgroup each: 64 lines of one head, 16 rows of 4 queries. Strips of the heads
// that share keys stand side by side, then those of the next rows, so that a tile of keys serves 256 lines. Of the key
// blocks before the rows' own segments it takes a part, or as one part more the own segments:
//     masks: which of the part's blocks each row reads, from the first step's shares
//     S[line][block] = Q M^T, M the part's means: the blocks that the line's row doesn't read, as heavy as their keys
//     S[line][key] = Q K^T for each block that some row reads
// A warpgroup multiplies where one of its rows reads the block, a warp sums exponentials where one of its own does. A
// producer warp brings means and keys through the copy engine into a ring. Long rows come first.
#pragma once

#include "cuda/select/scores/mass_keys.cuh"
#include "cuda/select/scores/two_step/lines.cuh"

namespace pbsattn::cuda::two_step {

constexpr int most_rows_of_strip = 16;
constexpr int most_part_blocks = 256;
constexpr int most_words = most_part_blocks / 32;
constexpr int min_log_lines = 2;
static_assert(group_lines >> min_log_lines == most_rows_of_strip);

struct KeyMaps {
  CUtensorMap pooled_k, permuted_k;
  KvMap k;
};

template <int head_dim>
struct KeyShared {
  static constexpr int key_stages = head_dim > 192 ? 1 : head_dim > 128 ? 2 : 4;
  alignas(1024) unsigned char q[item_lines / tile_tokens][SwizzledTile<head_dim>::bytes];
  alignas(1024) unsigned char k[key_stages][SwizzledTile<head_dim>::bytes];
  std::uint32_t reads[groups][most_rows_of_strip][most_words];  // blocks of the part that a row reads
  std::uint32_t any[groups][most_words];                        // that some row of the strip does
  Barrier full[key_stages], free[key_stages];

  __device__ void init() {
    for (Barrier& barrier : full) barrier.init(1);
    for (Barrier& barrier : free) barrier.init(groups * 4);
    sm90::fence_barrier_init();
  }
  // Returns which of 32 blocks some strip reads.
  __device__ std::uint32_t that_any_reads(int word) const {
    std::uint32_t blocks = 0;
    for (const auto& of_strip : any) blocks |= of_strip[word];
    return blocks;
  }
};

// 64 lines of a head, or none where `head` is -1.
struct Strip {
  // The `i`-th of the thread block's order head.
  __device__ Strip(const Params& p, int i)
      : line(p.row_begin * p.exact.lines() + i / p.grid.order_group * group_lines),
        row(p.exact.row_of(line)),
        last_row(min(p.exact.row_of(line + group_lines - 1), p.row_end - 1)),
        head(row >= p.row_end
                 ? -1
                 : (p.first_order_head + static_cast<int>(blockIdx.z)) * p.grid.order_group + i % p.grid.order_group) {}
  // Return the own blocks of its rows.
  __device__ int own_begin(const Params& p) const { return p.grid.own_begin(p.grid.diagonal(row)); }
  __device__ int own_end(const Params& p) const { return head < 0 ? 0 : p.grid.diagonal(last_row) + 1; }
  // Returns the r-th of this thread's two lines.
  __device__ int line_of(int r) const {
    const int thread = static_cast<int>(threadIdx.x);
    return line + thread % 128 / 32 * 16 + thread % 32 / 4 + 8 * r;
  }
  int line;  // the first
  int row, last_row;
  int head;  // of all batch entries
};

// A thread block's share of the work: blocks [begin, end) of its strips' keys.
struct KeyItem {
  __device__ explicit KeyItem(const Params& p)
      // The last rows have the most keys, so they start first.
      : first_strip(static_cast<int>(gridDim.x - 1 - blockIdx.x) * groups),
        part(static_cast<int>(blockIdx.y)),
        own(part == p.parts) {
    begin = own ? INT_MAX : part * p.part_blocks;
    end = 0;
    for (int group = 0; group < groups; ++group) {
      const Strip strip(p, first_strip + group);
      if (strip.head < 0) continue;
      if (own) begin = min(begin, strip.own_begin(p));
      end = max(end, own ? strip.own_end(p) : min(begin + p.part_blocks, p.visible(strip.last_row)));
    }
  }
  // Return how many words its masks have, and how many tiles its means are.
  __device__ int words() const { return (end - begin + 31) / 32; }
  __device__ int mean_tiles() const { return own ? 0 : (end - begin + tile_tokens - 1) / tile_tokens; }

  int first_strip;
  int part;
  bool own;
  int begin, end;
};

// Calls use(place in the part) for each block that some strip reads; of own segments for all.
template <int head_dim, class Use>
__device__ void for_each_block(const KeyItem& item, const KeyShared<head_dim>& shared, Use&& use) {
  if (item.own) {
    for (int i = 0; i < item.end - item.begin; ++i) use(i);
    return;
  }
  for (int word = 0; word < item.words(); ++word) {
    for (std::uint32_t left = shared.that_any_reads(word); left != 0; left &= left - 1)
      use(word * 32 + __ffs(static_cast<int>(left)) - 1);
  }
}

// Writes which blocks each row reads.
template <int head_dim>
__device__ void find_reads(const Params& p, const KeyItem& item, KeyShared<head_dim>& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = static_cast<int>(threadIdx.x); i < groups * most_words; i += threads)
    shared.any[i / most_words][i % most_words] = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x) / 32; i < groups * most_rows_of_strip; i += threads / 32) {
    const int group = i / most_rows_of_strip;
    const int of_strip = i % most_rows_of_strip;
    const Strip strip(p, item.first_strip + group);
    const int row = strip.row + of_strip;
    const bool there = strip.head >= 0 && row <= strip.last_row;
    const int visible = there ? min(p.visible(row), item.end) : 0;
    const float least = there ? p.least_share(strip.head, row) : INFINITY;
    const float* shares = p.scores + (there ? p.grid.list_start(strip.head, row) : 0);
    float share[most_words];
#pragma unroll
    for (int word = 0; word < most_words; ++word) {
      const int block = item.begin + word * 32 + lane;
      share[word] = block < visible ? shares[block] : -INFINITY;
    }
#pragma unroll
    for (int word = 0; word < most_words; ++word) {
      const std::uint32_t reads = __ballot_sync(~0U, share[word] >= least);
      if (lane == 0) {
        shared.reads[group][of_strip][word] = reads;
        atomicOr(&shared.any[group][word], reads);
      }
    }
  }
}

template <int head_dim>
__device__ void produce_keys(const Params& p, const KeyMaps& maps, const KeyItem& item, KeyShared<head_dim>& shared) {
  const int order_head = p.first_order_head + static_cast<int>(blockIdx.z);
  const int orders = p.grid.q_heads / p.grid.order_group;
  const int batch = order_head / orders;
  const int head = order_head % orders;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int kv_head = p.grid.kv_head(head * p.grid.order_group);
  Ring<KeyShared<head_dim>::key_stages> stage;
  const auto load = [&](const CUtensorMap* map, int token) {  // null: the caller's keys
    shared.free[stage.at].wait(stage.parity ^ 1);
    if (lane == 0) shared.full[stage.at].arrive_expecting(sizeof(shared.k[0]));
    if (map == nullptr)
      copy_block<head_dim>(shared.k[stage.at], maps.k, p.pages, shared.full[stage.at], token / block_tokens, kv_head,
                           batch, lane);
    else if (lane == 0)
      sm90::tma_load(shared.k[stage.at], *map, shared.full[stage.at], 0, token, 0, head, batch);
    stage.next();
  };
  for (int tile = 0; tile < item.mean_tiles(); ++tile) load(&maps.pooled_k, item.begin + tile * tile_tokens);
  for_each_block(item, shared, [&](int i) {
    load(item.own || !p.moved ? nullptr : &maps.permuted_k, (item.begin + i) * block_tokens);
  });
}

template <class T, int head_dim, class Cap>
__device__ void consume_keys(const Params& p, const Cap& cap, const KeyItem& item, KeyShared<head_dim>& shared) {
  const int group = warpgroup_index();
  const int lane = static_cast<int>(threadIdx.x) % 4;
  const unsigned char* queries = shared.q[group / 2];
  const int first_line = group % 2 * group_lines;
  const Strip strip(p, item.first_strip + group);
  // Return of the r-th of this thread's two lines the row, counted from the strip's first, its blocks before the own
  // segment, and the last key that the query sees. They are found anew where they are used, for want of registers.
  const auto of_strip = [&](int r) { return p.exact.row_of(strip.line_of(r)) - strip.row; };
  const auto visible_of = [&](int r) {
    const int row = p.exact.row_of(strip.line_of(r));
    return strip.head >= 0 && row <= strip.last_row ? p.visible(row) : 0;
  };
  const auto last_key_of = [&](int r) {
    const int line = strip.line_of(r);
    const int diagonal = p.grid.diagonal(p.exact.row_of(line));
    return diagonal * block_tokens + p.exact.place(p.grid.queries_of(diagonal), p.exact.of_row(line));
  };
  int sums[2];  // where they are
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int line = strip.line_of(r);
    sums[r] = p.of_head(strip.head) + p.sums_before(p.exact.row_of(line)) + p.exact.of_row(line);
  }
  float s[64];
  float max[2] = {-INFINITY, -INFINITY};
  Statistics total[2];  // of what a query's softmax is over, in this part, as logarithms of base 2
  Ring<KeyShared<head_dim>::key_stages> stage;
  const auto release = [&] {
    if (threadIdx.x % 32 == 0) shared.free[stage.at].arrive();
    stage.next();
  };
  // Multiplies by the stage's keys, and releases them.
  const auto multiply = [&](auto&& between) {
    start_product<T, head_dim>(s, queries, first_line, shared.k[stage.at]);
    between();
    sm90::wgmma_wait<0>();
    sm90::pin(s);
    release();
    apply(cap, s);
  };
  // Adds a block's log-sum-exp for line r to this lane's share of the total, and keeps it.
  const auto keep = [&](int r, int block, float log_sum) {
    total[r].merge({log_sum, 1}, 1);
    p.sums[sums[r] + (block << p.exact.log_lines)] = log_sum;
  };

  for (int tile = 0; tile < item.mean_tiles(); ++tile) {
    shared.full[stage.at].wait(stage.parity);
    multiply([] {});
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int valid = min(visible_of(r), item.end) - item.begin - tile * tile_tokens;
#pragma unroll
      for (int i = 0; i < 64; i += 4) {
        // Those of word i / 16 that are counted, from this thread's first column on.
        const std::uint32_t read = shared.reads[group][of_strip(r)][tile * 4 + i / 16] >> (lane * 2);
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if ((read >> (i % 16 * 2 + c) & 1) != 0 || i * 2 + lane * 2 + c >= valid) s[i + 2 * r + c] = -INFINITY;
      }
      const float largest = quad_max(largest_of(s, r));
      const float sum = quad_sum(sum_exactly(s, r, p.scale_log2, Statistics::finite_or_zero(largest)));
      if (lane == 0) total[r].merge({largest * p.scale_log2, sum * block_tokens}, 1);
    }
  }
  if (item.own) {
    const int visible[2] = {visible_of(0), visible_of(1)};
    const int last_key[2] = {visible[0] == 0 ? -1 : last_key_of(0), visible[1] == 0 ? -1 : last_key_of(1)};
    for_each_block(item, shared, [&](int i) {
      const int block = item.begin + i;
      shared.full[stage.at].wait(stage.parity);
      if (strip.head >= 0 && block >= strip.own_begin(p) && block < strip.own_end(p)) {
        multiply([] {});
        const bool mine[2] = {block >= visible[0] && last_key[0] >= block * block_tokens,
                              block >= visible[1] && last_key[1] >= block * block_tokens};
        if (!__any_sync(~0U, mine[0] || mine[1])) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int last = last_key[r] - block * block_tokens;
#pragma unroll
          for (int j = 0; j < 64; j += 4)
#pragma unroll
            for (int c = 0; c < 2; ++c)
              if (j * 2 + lane * 2 + c > last) s[j + 2 * r + c] = -INFINITY;
          const float log_sum = mass::log_sum_exactly(s, r, p.scale_log2, max[r]);
          if (lane == r && mine[r]) keep(r, block, log_sum);
        }
      } else {
        release();
      }
    });
  } else {
    const Turns<groups> turns(group);
    // Each of the four lanes that share lines takes every fourth block's sums.
    float held[2];
    for (int word = 0; word < item.words(); ++word) {
      std::uint32_t left = shared.that_any_reads(word);
      const std::uint32_t of_strip_any = shared.any[group][word];
      const std::uint32_t mine[2] = {shared.reads[group][of_strip(0)][word], shared.reads[group][of_strip(1)][word]};
      const std::uint32_t of_warp = __reduce_or_sync(~0U, mine[0] | mine[1]);
      std::uint32_t held_bit = 0;
      for (; left != 0; left &= left - 1) {
        const std::uint32_t bit = left & -left;
        shared.full[stage.at].wait(stage.parity);
        turns.wait();
        if ((of_strip_any & bit) == 0) {
          turns.pass();
          release();
          continue;
        }
        multiply([&] { turns.pass(); });
        if ((of_warp & bit) == 0) continue;
        float log_sum[2];
        mass::log_sum_block(s, p.scale_log2, max, log_sum);
        const int held_by = __popc(of_warp & (bit - 1)) % 4;
        if (lane == held_by) {
          held[0] = log_sum[0];
          held[1] = log_sum[1];
          held_bit = bit;
        }
        if (held_by < 3 && (of_warp & (left - bit)) != 0) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if ((mine[r] & held_bit) != 0)
            keep(r, item.begin + word * 32 + __ffs(static_cast<int>(held_bit)) - 1, held[r]);
        held_bit = 0;
      }
    }
    turns.finish();
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r].merge_across_lanes(1);
    if (lane != r || visible_of(r) <= (item.own ? 0 : item.begin)) continue;
    const int line = strip.line_of(r);
    float* const to = p.sums + p.of_head(strip.head) + p.totals_before(p.exact.row_of(line)) +
                      (p.exact.of_row(line) * (p.parts + 1) + item.part) * 2;
    to[0] = total[r].max;
    to[1] = total[r].sum;
  }
}

template <class T, int head_dim, class Cap>
__global__ void __launch_bounds__(threads, 1)
    score_likely(const __grid_constant__ Params p, const __grid_constant__ KeyMaps maps,
                 const __grid_constant__ Cap cap) {
  auto& shared = aligned_shared<KeyShared<head_dim>>();
  const KeyItem item(p);
  if (item.begin >= item.end) return;
  for (int group = 0; group < groups; ++group) {
    const Strip strip(p, item.first_strip + group);
    if (strip.head >= 0)
      gather_lines<T, head_dim>(p, p.exact, strip.head, strip.line, group_lines,
                                shared.q[group / 2] + group % 2 * group_lines * SwizzledTile<head_dim>::row_bytes,
                                static_cast<int>(threadIdx.x), threads);
  }
  commit_copies();
  wait_for_earlier_kernels();
  if (!item.own) find_reads(p, item, shared);
  wait_copies<0>();
  sm90::fence_async_shared();
  run_roles<groups, multiplying_registers, other_registers, 32>(
      shared, [&] { consume_keys<T, head_dim>(p, cap, item, shared); },
      [&] { produce_keys<head_dim>(p, maps, item, shared); });
}

}  // namespace pbsattn::cuda::two_step
