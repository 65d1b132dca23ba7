// A consumer warpgroup: 64 queries of a tile; attend_sm90.cu has the whole picture.
#pragma once

#include "cuda/attend_tile.cuh"

namespace pbsattn::cuda::sm90 {

// The running softmax of the two query rows that a thread holds parts of: row r = 0, 1 is query 8 r + lane / 4 of its
// warp's 16. Maxima and sums run in several chains, since each step of one waits for the step before.
struct Softmax {
  // Of a score and the maximum, scaled one by one, the difference is off by up to 2^-24 of this, which is little;
  // beyond it their difference is scaled instead.
  static constexpr float largest_offset = 1024;
  static constexpr int chains = 4;

  float maximum[2] = {-infinity, -infinity};  // unscaled
  float sum[2] = {0, 0};                      // this thread's part
  float offset[2];                            // a weight is 2 to the scaled score less this

  // Raises the maxima to those of scores s. What was summed before must then be multiplied by factor[r]; returns
  // whether any factor of the warp is not 1. Where maxima are too large, scores become differences to them.
  __device__ bool raise(float (&s)[64], float scale_log2, float (&factor)[2]) {
    float top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float part[chains] = {maximum[r], -infinity, -infinity, -infinity};
#pragma unroll
      for (int i = 0; i < 32; ++i) part[i / 2 % chains] = fmaxf(part[i / 2 % chains], s[i / 2 * 4 + 2 * r + i % 2]);
      top[r] = fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
    }
    // Both votes are taken here, beside the exchange of maxima, and not where they are needed: there each would wait.
    // A thread's part of a row may be far below the row's maximum and seem huge though the row is not, which does no
    // harm.
    const float largest = largest_offset / scale_log2;
    const bool huge = __any_sync(0xFFFFFFFF, fabsf(top[0]) > largest || fabsf(top[1]) > largest);
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
#pragma unroll
      for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], __shfl_xor_sync(0xFFFFFFFF, top[r], step));
    }
    const bool moved = __any_sync(0xFFFFFFFF, top[0] != maximum[0] || top[1] != maximum[1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Of two -inf nothing was summed, and their difference is no number.
      factor[r] = top[r] == -infinity ? 1.0F : exp2_fast((maximum[r] - top[r]) * scale_log2);
      maximum[r] = top[r];
      offset[r] = top[r] == -infinity ? 0.0F : top[r] * scale_log2;
    }
    if (huge) {
#pragma unroll
      for (int i = 0; i < 64; ++i) s[i] -= maximum[i % 4 / 2] == -infinity ? 0.0F : maximum[i % 4 / 2];
      offset[0] = offset[1] = 0;
    }
    return moved;
  }

  // Turns scores s, that the maxima were raised to, into weights in place, and sums them.
  __device__ void weigh(float (&s)[64], float scale_log2, const float (&factor)[2]) {
    float part[2][chains] = {};
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      s[i] = exp2_fast(fmaf(s[i], scale_log2, -offset[i % 4 / 2]));
      part[i % 4 / 2][(i / 4 * 2 + i % 2) % chains] += s[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = fmaf(sum[r], factor[r], (part[r][0] + part[r][1]) + (part[r][2] + part[r][3]));
    }
  }
};

template <class Element>
__device__ std::uint32_t pack(float low, float high) {
  std::uint32_t bits;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

template <class Shared>
__device__ void consume(const AttendParams& p, Shared& shared, int wg) {
  using Element = typename Shared::Element;
  constexpr int head_dim = Shared::head_dim;
  constexpr int outputs = head_dim / 2;  // registers of O
  constexpr int kv_panel_bytes = block * panel * sizeof(Element);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x % warpgroup / 32;
  const auto release = [&](Barrier& barrier) {
    if (lane == 0) barrier.arrive();
  };

  Ring<Shared::k_stages> k;
  Ring<Shared::v_stages> v;
  float s[64], o[outputs];
  std::uint32_t q[head_dim / 4];
  std::uint32_t weights[32];
#pragma unroll
  for (int i = 0; i < 64; ++i) s[i] = 0;

  // Q, 16 columns at a time: lane l addresses row l % 16 of the 16-byte chunk l / 16 of every two.
  const auto read_q = [&](const typename Shared::QTile& tile) {
    const int row = warp * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < head_dim / 16; ++i) {
      const int chunk = 2 * i + lane / 16;
      load_matrices(q + 4 * i, tile[chunk / 8][row] + (chunk % 8 ^ row % 8) * 8);
    }
  };
  // S = Q K^T
  const auto multiply_qk = [&] {
    shared.k_full[k.at].wait(k.parity);
    const std::uint64_t k_operand = operand(shared.k[k.at]);
    pin(s);
    start();
#pragma unroll
    for (int d = 0; d < head_dim; d += 16) {
      const int place = d / panel * kv_panel_bytes + d % panel * static_cast<int>(sizeof(Element));
      multiply<Element, 0>(s, q + d / 4, advance(k_operand, place), d > 0);
    }
    commit();
  };
  // O += P V, once V is there
  const auto multiply_pv = [&] {
    const std::uint64_t v_operand = operand(shared.v[v.at], kv_panel_bytes);
    pin(o);
    start();
#pragma unroll
    for (int key = 0; key < block; key += 16) {
      multiply<Element, 1>(o, weights + key / 4, advance(v_operand, key * panel * static_cast<int>(sizeof(Element))),
                           1);
    }
    commit();
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < 32; ++i) weights[i] = pack<Element>(s[2 * i], s[2 * i + 1]);
  };
  const auto free_k = [&] {
    release(shared.k_free[k.at]);
    k.next();
  };
  const auto free_v = [&] {
    release(shared.v_free[v.at]);
    v.next();
  };

  for_each_tile(shared, [&](const Tile& tile, Ring<tile_slots> slot) {
    Softmax softmax;
    float factor[2] = {1, 1};
    const int row = wg * 64 + warp * 16 + lane / 4;  // of the tile, and 8 more
    const int column = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < outputs; ++i) o[i] = 0;

    // The diagonal block.
    shared.q_full[slot.at][wg].wait(slot.parity);
    read_q(shared.q[slot.at][wg]);
    multiply_qk();
    wait<0>();
    pin(s);
    free_k();
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if (i / 4 * 8 + column + i % 2 > row + i % 4 / 2 * 8) s[i] = -infinity;
    }
    softmax.raise(s, p.scale_log2, factor);
    softmax.weigh(s, p.scale_log2, factor);
    pack_weights();
    shared.guarded[slot.at].wait(slot.parity);
    shared.v_full[v.at].wait(v.parity);

    // The blocks before it: this block's S and softmax beside the P V of the block after it.
    for (int i = 1; i < tile.count; ++i) {
      multiply_qk();
      multiply_pv();
      wait<1>();
      pin(s);
      free_k();
      const bool moved = softmax.raise(s, p.scale_log2, factor);
      Ring<Shared::v_stages> next_v = v;
      next_v.next();
      shared.v_full[next_v.at].wait(next_v.parity);
      wait<0>();
      pin(o);
      free_v();
      // At head_dim 64 the exponential unit is the bottleneck, and O is rescaled and P packed in its shadow.
      if (head_dim == 64 || moved) {
#pragma unroll
        for (int j = 0; j < outputs; ++j) o[j] *= factor[j % 4 / 2];
      }
      softmax.weigh(s, p.scale_log2, factor);
      pack_weights();
    }
    multiply_pv();

    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = softmax.sum[r];
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
      inverse[r] = sum == 0 ? 0 : 1 / sum;
      const int query = tile.token + row + 8 * r - p.q_offset;
      if (p.lse != nullptr && lane % 4 == 0 && query >= 0 && query < p.q_len) {
        const float lse = sum == 0 ? -infinity : fmaf(softmax.maximum[r], p.scale, logf(sum));
        p.lse[tile.batch * p.lse_batch_stride + std::int64_t{tile.head} * p.q_len + query] = lse;
      }
    }
    wait<0>();
    pin(o);
    free_v();
#pragma unroll
    for (int i = 0; i < outputs; ++i) o[i] *= inverse[i % 4 / 2];
    if (shared.any_bad[slot.at] != 0) {
#pragma unroll
      for (int i = 0; i < outputs; ++i) {
        if (row + i % 4 / 2 * 8 >= shared.first_bad[slot.at][i / 4 * 8 + column + i % 2]) o[i] = not_a_number;
      }
    }

    // Q's memory takes the outputs, swizzled as the copy engine expects and addressed as in read_q.
    const int out_row = warp * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < outputs / 8; ++i) {
      const int chunk = 2 * i + lane / 16;
      Element* to = shared.q[slot.at][wg][chunk / 8][out_row] + (chunk % 8 ^ out_row % 8) * 8;
      const float* part = o + 8 * i;
      store_matrices(to, pack<Element>(part[0], part[1]), pack<Element>(part[2], part[3]),
                     pack<Element>(part[4], part[5]), pack<Element>(part[6], part[7]));
    }
    fence_async_shared();
    shared.out_full[slot.at][wg].arrive();
  });
}

}  // namespace pbsattn::cuda::sm90
