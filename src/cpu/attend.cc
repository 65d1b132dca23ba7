// Attention over the chosen blocks: a row at a time, so that a block of keys and values is read once for
// all the row's strips; the longest rows first, so that threads finish together.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <limits>

#include "cpu/pool.h"
#include "cpu/stages.h"

namespace pbsattn::cpu {
namespace {

struct RowState {
  StripState state;
  std::byte* queries;
};

// Cuts a thread's scratch into the strips' states and one block's scores.
class RowScratch {
 public:
  RowScratch(std::byte* memory, const Geometry& g, int element_size) {
    const auto dim = static_cast<int>(g.shape.head_dim);
    for (int i = 0; i < g.block / strip; ++i) {
      RowState& s = strips_[static_cast<std::size_t>(i)];
      s.state = {take(memory, strip), take(memory, strip), take(memory, dim * strip)};
      s.queries = memory;
      memory += dim * strip * element_size;
    }
    scores_ = reinterpret_cast<float*>(memory);
  }
  RowState& strip_state(int i) { return strips_[static_cast<std::size_t>(i)]; }
  float* scores() { return scores_; }

 private:
  static float* take(std::byte*& memory, int floats) {
    auto* const taken = reinterpret_cast<float*>(memory);
    memory += floats * static_cast<int>(sizeof(float));
    return taken;
  }
  std::array<RowState, max_block / strip> strips_{};
  float* scores_ = nullptr;
};

std::int64_t attend_row(const StageContext& c, std::int64_t head, std::int64_t row, int thread) {
  const Geometry& g = c.geometry();
  const auto dim = static_cast<int>(g.shape.head_dim);
  const std::int64_t kv_head = c.kv_head(head);
  const std::int64_t far_head = c.pass.far_head(head, kv_head);
  const std::int64_t begin = g.row_begin(row);
  const int queries = static_cast<int>(g.row_end(row) - begin);
  const int strips = static_cast<int>(ceil_div(queries, strip));
  RowScratch scratch(c.scratch(thread), g, c.kernels.element_size);

  for (int i = 0; i < strips; ++i) {
    auto& [state, packed] = scratch.strip_state(i);
    const int count = std::min(strip, queries - i * strip);
    c.kernels.pack_queries(c.q_rows(head, begin - g.q_offset() + i * strip), count, dim, packed);
    std::fill_n(state.max, strip, -std::numeric_limits<float>::infinity());
    std::fill_n(state.sum, strip, 0.0F);
    std::fill_n(state.out, dim * strip, 0.0F);
  }

  const std::uint64_t* const mask = c.pass.mask + (head * g.rows() + row) * c.pass.mask_words;
  const std::int64_t own_begin = g.own_begin(row);
  const auto packed_at = [&](std::int64_t block) -> PackedBlock {
    const bool moved = block < own_begin && c.pass.permuted;
    const std::int64_t original = kv_head * g.blocks() * c.pass.block_bytes;
    if (moved && c.kernels.gathers)
      return {c.pass.keys + original, c.pass.values + original,
              c.pass.order + far_head * g.permuted_len() + block * g.block};
    const std::int64_t far = (far_head * c.pass.far_blocks + block) * c.pass.block_bytes;
    if (moved) return {c.pass.far_keys + far, c.pass.far_values + far, nullptr};
    const std::int64_t place = original + block * c.pass.block_bytes;
    return {c.pass.keys + place, c.pass.values + place, nullptr};
  };
  const auto visit = [&](std::int64_t block, std::int64_t next) {
    const int keys = static_cast<int>(std::min<std::int64_t>(g.block, g.shape.kv_len - block * g.block));
    const PackedBlock here = packed_at(block);
    const PackedBlock then = packed_at(next);
    const int fetched = static_cast<int>(std::min<std::int64_t>(g.block, g.shape.kv_len - next * g.block));
    const bool causal = block == g.diagonal(row);
    for (int i = 0; i < strips; ++i) {
      const auto& [state, packed] = scratch.strip_state(i);
      const std::int64_t diagonal = begin + i * strip - block * g.block;
      // Keys after the strip's last query are hidden from all of it.
      const int seen = causal ? static_cast<int>(std::min<std::int64_t>(keys, diagonal + strip)) : keys;
      const BlockArgs args{.block = here,
                           .queries = packed,
                           .count = (seen + row_tile - 1) / row_tile * row_tile,
                           .head_dim = dim,
                           .scale_log2 = c.scale_log2(),
                           .causal = causal,
                           .diagonal = diagonal,
                           .values_finite = c.pass.values_finite[kv_head * g.blocks() + block] != 0,
                           .scratch = scratch.scores(),
                           .next = then,
                           .next_begin = fetched * i / strips,
                           .next_end = fetched * (i + 1) / strips};
      c.kernels.attend_block(args, state);
    }
  };
  // A block is visited once the one after it is known.
  std::int64_t visited = 0;
  std::int64_t previous = -1;
  for (std::int64_t word = 0; word < c.pass.mask_words; ++word) {
    for (std::uint64_t bits = mask[word]; bits != 0; bits &= bits - 1) {
      const std::int64_t block = word * 64 + std::countr_zero(bits);
      if (previous >= 0) visit(previous, block);
      previous = block;
      ++visited;
    }
  }
  visit(previous, previous);  // the diagonal, which every row has

  const View& out = c.outputs.out;
  const std::int64_t first = begin - g.q_offset();
  const std::int64_t q_head = c.heads.q_begin + head;
  auto* const base = static_cast<std::byte*>(out.data);
  const std::int64_t size = out.dtype == DType::f32 ? 4 : 2;
  for (int i = 0; i < strips; ++i) {
    const std::int64_t query = first + i * strip;
    const std::int64_t offset = c.heads.batch * out.batch_stride + q_head * out.head_stride + query * out.token_stride;
    float* const lse = c.outputs.lse == nullptr
                           ? nullptr
                           : c.outputs.lse + (c.heads.batch * g.shape.q_heads + q_head) * g.shape.q_len + query;
    c.kernels.finish(scratch.strip_state(i).state, std::min(strip, queries - i * strip), dim, c.scale_log2(),
                     base + offset * size, out.dtype, out.token_stride, lse);
  }
  return visited;
}

}  // namespace

std::int64_t attend(const StageContext& c) {
  std::atomic<std::int64_t> visited = 0;
  const std::int64_t heads = c.heads.q_count;
  const std::int64_t rows = c.geometry().rows();
  parallel_for(c.spec.threads, heads * rows, [&](std::int64_t item, int thread) {
    visited += attend_row(c, item % heads, rows - 1 - item / heads, thread);
  });
  return visited;
}

}  // namespace pbsattn::cpu
