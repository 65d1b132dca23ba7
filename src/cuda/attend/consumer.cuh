// A consumer warpgroup: 64 queries of a tile; attend.cu has the whole picture.
#pragma once

#include "cuda/attend/tile.cuh"

namespace pbsattn::cuda::attention {

template <class Shared>
__device__ void consume(const AttendParams& p, Shared& shared, int wg) {
  using Element = typename Shared::Element;
  constexpr int head_dim = Shared::head_dim;
  constexpr int outputs = head_dim / 2;  // registers of O
  constexpr int kv_panel_bytes = block * panel * sizeof(Element);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x % warpgroup / 32;
  const auto release = [&](sm90::Barrier& barrier) {
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
      sm90::load_matrices(q + 4 * i, tile[chunk / 8][row] + (chunk % 8 ^ row % 8) * 8);
    }
  };
  // S = Q K^T
  const auto multiply_qk = [&] {
    shared.k_full[k.at].wait(k.parity);
    const std::uint64_t k_operand = sm90::operand(shared.k[k.at]);
    sm90::pin(s);
    sm90::wgmma_fence();
#pragma unroll
    for (int d = 0; d < head_dim; d += 16) {
      const int place = d / panel * kv_panel_bytes + d % panel * static_cast<int>(sizeof(Element));
      sm90::wgmma<Element, 0>(s, q + d / 4, sm90::advance(k_operand, place), d > 0);
    }
    sm90::wgmma_commit();
  };
  // O += P V, once V is there
  const auto multiply_pv = [&] {
    const std::uint64_t v_operand = sm90::operand(shared.v[v.at], kv_panel_bytes);
    sm90::pin(o);
    sm90::wgmma_fence();
#pragma unroll
    for (int key = 0; key < block; key += 16) {
      sm90::wgmma<Element, 1>(o, weights + key / 4,
                              sm90::advance(v_operand, key * panel * static_cast<int>(sizeof(Element))), 1);
    }
    sm90::wgmma_commit();
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
    sm90::wgmma_wait<0>();
    sm90::pin(s);
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
      sm90::wgmma_wait<1>();
      sm90::pin(s);
      free_k();
      const bool moved = softmax.raise(s, p.scale_log2, factor);
      Ring<Shared::v_stages> next_v = v;
      next_v.next();
      shared.v_full[next_v.at].wait(next_v.parity);
      sm90::wgmma_wait<0>();
      sm90::pin(o);
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
      const int query = tile.token + row + 8 * r - p.grid.q_offset;
      if (p.lse != nullptr && lane % 4 == 0 && query >= 0 && query < p.grid.q_len) {
        const float lse = sum == 0 ? -infinity : fmaf(softmax.maximum[r], p.scale, logf(sum));
        p.lse[tile.batch * p.lse_batch_stride + std::int64_t{tile.head} * p.grid.q_len + query] = lse;
      }
    }
    sm90::wgmma_wait<0>();
    sm90::pin(o);
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
      sm90::store_matrices(to, pack<Element>(part[0], part[1]), pack<Element>(part[2], part[3]),
                           pack<Element>(part[4], part[5]), pack<Element>(part[6], part[7]));
    }
    sm90::fence_async_shared();
    shared.out_full[slot.at][wg].arrive();
  });
}

}  // namespace pbsattn::cuda::attention
