// A consumer warpgroup: 64 queries of a tile; attend.cu has the whole picture.
#pragma once

#include "cuda/attend/layer.cuh"
#include "cuda/attend/merger.cuh"
#include "cuda/attend/poll.cuh"
#include "cuda/attend/tile.cuh"
#include "cuda/attend/weights.cuh"

namespace pbsattn::cuda::attention {

// Starts o = p [v 1] (+ o if add) of 16 keys.
template <class Element, int panel, int registers>
__device__ void multiply_values(float (&o)[registers], const std::uint32_t* p, std::uint64_t v, int panel_bytes,
                                int add) {
  if constexpr (registers > 128) {  // more columns than one product has
    sm90::wgmma<Element>(sm90::part<0, 64>(o), p, v, add);
    sm90::wgmma<Element>(sm90::part<64, registers - 64>(o), p, sm90::advance(v, 128 / panel * panel_bytes), add);
  } else {
    sm90::wgmma<Element>(o, p, v, add);
  }
}

// Writes a thread's parts of two rows of outputs, of queries `query` and 8 more, to device memory, as far as the call
// has those. Lanes of a row exchange theirs, so that each has 16 bytes of every 64.
template <class Element, int outputs, int registers>
__device__ void write_rows(const float (&o)[registers], const View& out, const Tile& tile, int query, int q_len) {
  const int lane = static_cast<int>(threadIdx.x) % 4;
  auto* const head = static_cast<Element*>(out.data) + tile.batch * out.batch_stride + tile.head * out.head_stride;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int of_row = query + 8 * r;
    Element* const to = head + of_row * out.token_stride + lane * 8;
#pragma unroll
    for (int i = 2 * r; i < outputs; i += 16) {
      std::uint32_t part[4];  // of four chunks this lane's, then of this lane's chunk all four
#pragma unroll
      for (int c = 0; c < 4; ++c) part[c] = pack<Element>(o[i + 4 * c], o[i + 4 * c + 1]);
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if ((c & bit) != 0) continue;
          const bool upper = (lane & bit) != 0;
          const std::uint32_t other = __shfl_xor_sync(0xFFFFFFFF, upper ? part[c] : part[c | bit], bit);
          (upper ? part[c] : part[c | bit]) = other;
        }
      if (of_row >= 0 && of_row < q_len)
        *reinterpret_cast<uint4*>(to + i / 16 * 32) = make_uint4(part[0], part[1], part[2], part[3]);
    }
  }
}

template <class Layer, class Shared>
__device__ void consume(const AttendParams& p, const Layer& layer, Shared& shared, int warpgroup_index) {
  using Element = typename Shared::Element;
  constexpr int head_dim = Shared::head_dim;
  constexpr int outputs = Shared::head_dim_v / 2;  // registers of O, and 4 of sums
  constexpr int step = Shared::step;               // keys at a time
  constexpr int steps = Shared::steps;             // of a block
  constexpr int scores = step / 2;                 // registers of S
  constexpr int panel = Shared::panel;
  constexpr int panel_v = Shared::panel_v;
  constexpr int row_bytes_v = panel_v * sizeof(Element);
  constexpr int q_panel_bytes = 64 * panel * sizeof(Element);
  constexpr int k_panel_bytes = step * panel * sizeof(Element);
  constexpr int v_panel_bytes = step * row_bytes_v;
  const int wg = __shfl_sync(0xFFFFFFFF, warpgroup_index, 0);  // so that the compiler knows it to be a warp's own
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x % warpgroup / 32;
  const auto release = [&](sm90::Barrier& barrier) {
    if (lane == 0) barrier.arrive();
  };

  Ring<Shared::k_stages> k;
  Ring<Shared::v_stages> v;
  float s[scores], o[outputs + 4];
  std::uint32_t weights[scores / 2];
  std::uint64_t q_operand = 0;
#pragma unroll
  for (int i = 0; i < scores; ++i) s[i] = 0;

  // S = Q K^T, once both are there
  const auto multiply_qk = [&] {
    const std::uint64_t k_operand = sm90::operand<panel>(shared.k[k.at]);
    sm90::pin(s);
    sm90::wgmma_fence();
#pragma unroll
    for (int d = 0; d < head_dim; d += 16) {
      const int bytes = d % panel * static_cast<int>(sizeof(Element));
      sm90::wgmma<Element>(s, sm90::advance(q_operand, d / panel * q_panel_bytes + bytes),
                           sm90::advance(k_operand, d / panel * k_panel_bytes + bytes), d > 0);
    }
    sm90::wgmma_commit();
  };
  // Whether O is set to zero for a tile's first step, which otherwise writes it: takes fewer registers.
  constexpr bool zeroes = !Layer::plain && Shared::head_dim_v > 128;
  // O += P [V 1], once V is there; of a tile's first step O = P [V 1]
  const auto multiply_pv = [&](bool first) {
    const std::uint64_t v_operand = sm90::operand<panel_v>(&shared.v[v.at], v_panel_bytes);
    sm90::pin(o);
    sm90::wgmma_fence();
#pragma unroll
    for (int key = 0; key < step; key += 16)
      multiply_values<Element, panel_v>(o, weights + key / 4, sm90::advance(v_operand, key * row_bytes_v),
                                        v_panel_bytes, zeroes || key > 0 || !first);
    sm90::wgmma_commit();
  };
  const auto free_k = [&] {
    release(shared.k_free[k.at]);
    k.next();
  };
  const auto free_v = [&] {
    release(shared.v_free[v.at]);
    v.next();
  };

  Softmax softmax;
  // Wide heads leave no register for what is needed once a tile: it is made again from the thread's number.
  const auto number = [&] { return Shared::wide ? sm90::thread_number() % warpgroup : warp * 32 + lane; };
  const auto row_of = [&](int thread) {
    return wg * 64 + thread / 32 * 16 + thread % 32 / 4;
  };  // of the tile, and 8 more
  const auto column_of = [&](int thread) { return thread % 4 * 2; };
  // Weighs scores for some of the packed weights: all of them, or from one to before another.
  const auto weigh = [&](std::uint32_t(&into)[scores / 2], int begin = 0, int end = block) {
#pragma unroll
    for (int i = 0; i < scores / 2; ++i) {
      const auto weight = [&](int j) { return sm90::exp2_fast(fmaf(s[j], p.scale_log2, -softmax.offset[j % 4 / 2])); };
      if (i >= begin && i < end) into[i] = pack<Element>(weight(2 * i), weight(2 * i + 1));
    }
  };
  // Looks for the maxima with this block's scores, but those that hide() hides, rescales what was weighed before, if it
  // isn't the tile's first step, and weighs this block by them.
  bool settled = false;
  const auto raise = [&](auto first, auto&& hide) {
    if constexpr (Layer::caps) {
#pragma unroll
      for (float& x : s) x = layer.cap(x);
    }
    hide();
    float factor[2];
    softmax.raise(s, p.scale_log2, factor);
    if constexpr (!decltype(first)::value) {
#pragma unroll
      for (int i = 0; i < outputs + 4; ++i) o[i] *= factor[i % 4 / 2];
    }
    weigh(weights);
    settled = softmax.settle(p.scale_log2);
  };

  // Scales and hands over the outputs of a tile, and frees its slot.
  const auto finish = [&](const Tile& of_slot, const Ring<tile_slots>& slot) {
    const Tile& tile = Shared::wide ? shared.tile[slot.at] : of_slot;  // read again where registers are few
    const int row = row_of(number());
    const int column = column_of(number());
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = o[outputs + 2 * r];
      inverse[r] = sum == 0 ? 0 : 1 / sum;
      const auto log_sum = [&] { return sum == 0 ? -infinity : fmaf(softmax.maximum[r], p.scale, logf(sum)); };
      Merger merger;
      if constexpr (!Layer::plain) {
        if (!Shared::wide && tile.sink == -infinity) {
          merger.lse = log_sum();
        } else {
          merger = {log_sum(), tile.sink};
          inverse[r] *= merger.a;
        }
      }
      if (Shared::parts && tile.slot >= 0) {
        if (lane % 4 == 0) p.part_lse[tile.slot * block + row + 8 * r] = Layer::plain ? log_sum() : merger.lse;
        continue;
      }
      const int query = tile.token + row + 8 * r - p.grid.q_offset;
      if (p.lse != nullptr && lane % 4 == 0 && query >= 0 && query < p.grid.q_len) {
        const float lse = Layer::plain ? log_sum() : merger.lse;
        p.lse[tile.batch * p.lse_batch_stride + std::int64_t{tile.head} * p.grid.q_len + query] = lse;
      }
    }
#pragma unroll
    for (int i = 0; i < outputs; ++i) o[i] *= inverse[i % 4 / 2];
    if (shared.any_bad[slot.at] != 0) {
      if constexpr (Layer::plain) {
#pragma unroll
        for (int i = 0; i < outputs; ++i) {
          if (row + i % 4 / 2 * 8 >= shared.first_bad[slot.at][i / 4 * 8 + column + i % 2]) o[i] = not_a_number;
        }
      } else {
#pragma unroll
        for (int first = 0; first < outputs; first += 32) {
          std::uint32_t spoilt = 0;
#pragma unroll 1
          for (int i = 0; i < min(32, outputs - first); ++i) {
            const int at_row = row + i % 4 / 2 * 8;
            const int at_column = (first + i) / 4 * 8 + column + i % 2;
            if (layer.template sees_bad<Element, Shared::pages>(p.grid, tile, at_row, at_column)) spoilt |= 1U << i;
          }
#pragma unroll
          for (int i = 0; i < min(32, outputs - first); ++i) {
            if ((spoilt >> i & 1) != 0) o[first + i] = not_a_number;
          }
        }
        __syncwarp();
      }
    }

    if constexpr (Shared::wide) {
      const int query = tile.token + row - p.grid.q_offset;
      write_rows<Element, outputs>(o, p.out, tile, query, p.grid.q_len);
    } else {
      // Q's memory takes the outputs, swizzled as the copy engine expects: lane l writes row l % 16 of the 16-byte
      // chunk l / 16 of every two.
      const int out_row = warp * 16 + lane % 16;
#pragma unroll
      for (int i = 0; i < outputs / 8; ++i) {
        const int chunk = 2 * i + lane / 16;
        constexpr int of_panel = panel / 8;
        Element* to = shared.q[slot.at][wg][chunk / of_panel][out_row] + swizzled<panel>(chunk % of_panel, out_row) * 8;
        const float* part = o + 8 * i;
        sm90::store_matrices(to, pack<Element>(part[0], part[1]), pack<Element>(part[2], part[3]),
                             pack<Element>(part[4], part[5]), pack<Element>(part[6], part[7]));
      }
      sm90::fence_async_shared();
      shared.out_full[slot.at][wg].arrive();
    }
    shared.tile_free[slot.at].arrive();
  };

  // Hides keys of the n-th step, in the block at a place of the list, that the window has left behind.
  const auto hide_left = [&](int n) {
    if constexpr (!Layer::plain) {
      const int column = column_of(number());
      const int first = row_of(number()) + n / steps * block - n % steps * step - layer.window + 1;
#pragma unroll
      for (int i = 0; i < scores; ++i) {
        if (i / 4 * 8 + column + i % 2 < first + i % 4 / 2 * 8) s[i] = -infinity;
      }
    }
  };
  // Waits until V at a place, but the first, is safe to multiply.
  const auto await_guard = [&](int place, const Ring<tile_slots>& slot) {
    if constexpr (!Layer::plain) {
      const int guard = layer.guard_of(place);
      if (place > 0 && guard > 0) shared.guarded[slot.at][guard].wait(slot.parity);
    }
  };

  // Waits for a tile's queries and the keys of its first block, the diagonal one but in further parts.
  const auto await = [&](const Ring<tile_slots>& slot) {
    const Ring<Shared::q_slots> q = Shared::queries_of(slot);
    shared.q_full[q.at][wg].wait(q.parity);
    shared.k_full[k.at].wait(k.parity);
    q_operand = sm90::operand<panel>(shared.q[q.at][wg]);
  };
  // Frees what a product of a tile's n-th step has read, its queries after the last.
  const auto free_q_and_k = [&](const Tile& tile, int n) {
    free_k();
    if (Shared::wide && n + 1 == tile.count * steps) release(shared.q_free[0][wg]);
  };
  // Hides the keys behind each query of the n-th of the diagonal block's steps, in all registers of S or some.
  const auto mask = [&](int n, int begin = 0, int end = block) {
    const int row = row_of(number());
    const int column = column_of(number());
#pragma unroll
    for (int i = 0; i < scores; ++i) {
      if (i >= begin && i < end && n * step + i / 4 * 8 + column + i % 2 > row + i % 4 / 2 * 8) s[i] = -infinity;
    }
  };
  // Weighs a tile's first step by the maxima of a few columns, which will do unless others are far above them.
  const auto weigh_first = [&](const Tile& tile) {
    // Of parts without the diagonal block every query sees all, so they take the way without guesses.
    const bool sees_all = Shared::parts && tile.part > 0;
    const auto hide = [&] {
      if (!sees_all) mask(0);
      if (layer.has_edge(0)) hide_left(0);
    };
    if constexpr (Layer::caps) {
      raise(std::true_type{}, hide);
      return;
    }
    // Of the diagonal block the first consumer's queries see nothing of the second half, the other's all of the first.
    constexpr bool halves = steps == 1;
    if (!sees_all) {
      if (!halves)
        mask(0);
      else if (wg == 0)
        mask(0, 0, scores / 2);
      else
        mask(0, scores / 2);
      if (layer.has_edge(0)) hide_left(0);
      softmax.start(s);
      settled = softmax.settle(p.scale_log2);
      weigh(weights, 0, halves ? scores / 4 : scores / 2);
      if (halves) {
        if (wg == 0) {
#pragma unroll
          for (int i = scores / 4; i < scores / 2; ++i) weights[i] = 0;
        } else {
          weigh(weights, scores / 4);
        }
      }
    }
    if (sees_all || any_exceeds<Element>(weights) || !settled) {
      raise(std::true_type{}, [&] {
        if (halves && wg == 0 && !sees_all) mask(0, scores / 2);
      });
    }
  };

  Ring<tile_slots> slot;
  Tile tile = next_tile(shared, slot);
  if (tile.count == 0) return;
  await(slot);
  multiply_qk();
  for (;;) {
    softmax = {};
    if constexpr (zeroes) {
#pragma unroll
      for (float& x : o) x = 0;
    }
    sm90::wgmma_wait<0>();
    sm90::pin(s);
    free_q_and_k(tile, 0);
    weigh_first(tile);
    shared.guarded[slot.at][0].wait(slot.parity);
    shared.v_full[v.at].wait(v.parity);

    // The steps after it: this one's S and softmax beside the P V of the one before.
    bool k_full = false;
    for (int n = 1; n < tile.count * steps; ++n) {
      const int place = n / steps;
      await_guard((n - 1) / steps, slot);
      if (!k_full) shared.k_full[k.at].wait(k.parity);
      multiply_qk();
      multiply_pv(n == 1);
      sm90::wgmma_wait<1>();
      sm90::pin(s);
      free_q_and_k(tile, n);
      // Asked now, so that the answers are there when they are needed: each takes as long as ten exponentials.
      Ring<Shared::v_stages> next_v = v;
      next_v.next();
      const bool v_full = shared.v_full[next_v.at].test(next_v.parity);
      k_full = poll(shared.k_full[k.at], k.parity);
      const bool on_diagonal = steps > 1 && n < steps;
      const auto hide = [&] {
        if (on_diagonal) mask(n);
        if (layer.has_edge(place)) hide_left(n);
      };
      // Hidden keys need no new maxima; hiding them here takes registers that the widest heads don't have.
      constexpr bool hides = !Layer::plain && !Layer::caps && Shared::head_dim_v <= 128;
      if constexpr (hides)
        if (layer.has_edge(place)) hide_left(n);
      std::uint32_t next_weights[scores / 2];
      bool holds = true;
      if constexpr (Layer::caps)
        holds = weigh_products<Element>(layer, s, softmax.offset, next_weights);
      else
        weigh(next_weights);
      const bool exceeds = any_exceeds<Element>(next_weights);
      if (!v_full) shared.v_full[next_v.at].wait(next_v.parity);
      sm90::wgmma_wait<0>();
      sm90::pin(o);
      free_v();
      // Seeing through this, the compiler would write `weights` above, where P V still reads them, and so wait for each
      // product (C7513).
#pragma unroll
      for (int j = 0; j < scores / 2; ++j) asm volatile("mov.b32 %0, %1;" : "=r"(weights[j]) : "r"(next_weights[j]));
      if (exceeds || !settled || !holds || on_diagonal || (!hides && layer.has_edge(place)))
        raise(std::false_type{}, hide);
    }
    await_guard(tile.count - 1, slot);

    // The next tile's first product runs beside this tile's end. Beside this tile's last product it would only make
    // that end later.
    Ring<tile_slots> next_slot = slot;
    next_slot.next();
    const Tile next = next_tile(shared, next_slot);
    if (next.count == 0) break;
    await(next_slot);
    multiply_pv(tile.count * steps == 1);
    sm90::wgmma_wait<0>();
    sm90::pin(o);
    free_v();
    multiply_qk();
    finish(tile, slot);
    tile = next;
    slot = next_slot;
  }
  multiply_pv(tile.count * steps == 1);
  sm90::wgmma_wait<0>();
  sm90::pin(o);
  free_v();
  finish(tile, slot);
}

}  // namespace pbsattn::cuda::attention
