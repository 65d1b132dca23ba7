// Attention over the chosen blocks: by rows, so that a block of keys and values is read once for all their strips; the
// longest rows first, so that threads finish together.
#include "cpu/attend/attend.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "cpu/attend/correction.h"
#include "cpu/parallel.h"

namespace pbsattn::cpu {
namespace {

constexpr std::int64_t most_heads = 16;  // of a group that are done together

struct RowState {
  StripState state;
  std::byte* queries;
};

// Cuts a thread's scratch into the strips' states and one block's scores.
class RowScratch {
 public:
  RowScratch(std::byte* memory, const Geometry& g, int element_size) {
    const auto dim = static_cast<int>(g.shape.head_dim);
    const auto dim_v = static_cast<int>(value_dim(g.shape));
    for (int i = 0; i < g.block / strip; ++i) {
      RowState& s = strips_[static_cast<std::size_t>(i)];
      s.state = {take(memory, strip), take(memory, strip), take(memory, dim_v * strip)};
      s.queries = memory;
      memory += dim * strip * element_size;
    }
    scores_ = reinterpret_cast<float*>(memory);
    scores_floats_ = 2 * g.block * strip;
  }
  RowState& strip_state(int i) { return strips_[static_cast<std::size_t>(i)]; }
  float* scores() { return scores_; }
  std::byte* rest() { return reinterpret_cast<std::byte*>(scores_ + scores_floats_); }

 private:
  static float* take(std::byte*& memory, int floats) {
    auto* const taken = reinterpret_cast<float*>(memory);
    memory += floats * static_cast<int>(sizeof(float));
    return taken;
  }
  std::array<RowState, max_block / strip> strips_{};
  float* scores_ = nullptr;
  std::int64_t scores_floats_ = 0;
};

// Writes the list of the blocks that a row sees.
std::span<const std::int32_t> list_row(const StageContext& c, std::int64_t head, std::int64_t row, std::int32_t* list) {
  std::size_t count = 0;
  c.for_each_block(head, row, [&](std::int32_t block) { list[count++] = block; });
  return {list, count};
}

// Where a row's outputs go.
struct RowOutput {
  std::byte* out;
  float* lse;  // or null
  std::int64_t row_bytes;

  RowOutput(const StageContext& c, std::int64_t head, std::int64_t query) {
    const View& view = c.outputs.out;
    const std::int64_t size = view.dtype == DType::f32 ? 4 : 2;
    const std::int64_t q_head = c.heads.q_begin + head;
    out = static_cast<std::byte*>(view.data) +
          (c.heads.batch * view.batch_stride + q_head * view.head_stride + query * view.token_stride) * size;
    const Shape& shape = c.geometry().shape;
    lse = c.outputs.lse == nullptr ? nullptr
                                   : c.outputs.lse + (c.heads.batch * shape.q_heads + q_head) * shape.q_len + query;
    row_bytes = view.token_stride * size;
  }
};

// Attends one row on a path that takes a block at a time.
void attend_row(const StageContext& c, std::int64_t head, std::int64_t row, std::span<const std::int32_t> blocks,
                std::byte* memory) {
  const Geometry& g = c.geometry();
  const int dim = c.head_dim();
  const std::int64_t kv_head = c.kv_head(head);
  const std::int64_t begin = g.row_begin(row);
  const int queries = static_cast<int>(g.row_end(row) - begin);
  const int strips = static_cast<int>(ceil_div(queries, strip));
  RowScratch scratch(memory, g, c.kernels.element_size);

  for (int i = 0; i < strips; ++i) {
    auto& [state, packed] = scratch.strip_state(i);
    const int count = std::min(strip, queries - i * strip);
    c.kernels.pack.queries(c.q_rows(head, begin - g.q_offset() + i * strip), count, dim, packed);
    std::fill_n(state.max, strip, -std::numeric_limits<float>::infinity());
    std::fill_n(state.sum, strip, 0.0F);
    std::fill_n(state.out, c.head_dim_v() * strip, 0.0F);
    if (c.layout.corrected)
      correct_strip(c, head, row, begin - g.q_offset() + i * strip, count, blocks, state, scratch.rest());
  }

  const std::int64_t own_begin = g.own_begin(row);
  const auto packed_at = [&](std::int64_t block) {
    return c.packed_block(head, block, block < own_begin && c.layout.permuted);
  };
  const auto visit = [&](std::int64_t block, std::int64_t next) {
    const int keys = c.block_keys(block);
    const PackedBlock here = packed_at(block);
    const PackedBlock then = packed_at(next);
    const int fetched = c.block_keys(next);
    const bool causal = block == g.diagonal(row);
    for (int i = 0; i < strips; ++i) {
      const auto& [state, packed] = scratch.strip_state(i);
      const std::int64_t diagonal = begin + i * strip - block * g.block;
      const std::int64_t edge = diagonal - g.window;
      if (edge >= keys - 1) continue;  // the window has left the block behind
      // Keys after the strip's last query are hidden from all of it.
      const int seen = causal ? static_cast<int>(std::min<std::int64_t>(keys, diagonal + strip)) : keys;
      const BlockArgs args{.block = here,
                           .queries = packed,
                           .count = (seen + row_tile - 1) / row_tile * row_tile,
                           .head_dim = dim,
                           .head_dim_v = c.head_dim_v(),
                           .logits = c.logits(),
                           .masked = causal || (g.windowed() && edge > -strip),
                           .diagonal = diagonal,
                           .edge = edge,
                           .values_finite = c.layout.values_finite[kv_head * c.layout.block_stride + block] != 0,
                           .scratch = scratch.scores(),
                           .next = then,
                           .next_begin = fetched * i / strips,
                           .next_end = fetched * (i + 1) / strips};
      c.kernels.attend_block(args, state);
    }
  };
  for (std::size_t i = 0; i < blocks.size(); ++i) visit(blocks[i], blocks[std::min(i + 1, blocks.size() - 1)]);

  const RowOutput output(c, head, begin - g.q_offset());
  for (int i = 0; i < strips; ++i)
    c.f32_kernels.finish(scratch.strip_state(i).state, std::min(strip, queries - i * strip), c.head_dim_v(),
                         c.scale_log2(), c.sink(head), output.out + i * strip * output.row_bytes, c.outputs.out.dtype,
                         c.outputs.out.token_stride, output.lse == nullptr ? nullptr : output.lse + i * strip);
}

// Describes a row to a path that takes whole rows.
AttendRow describe_row(const StageContext& c, std::int64_t head, std::int64_t row,
                       std::span<const std::int32_t> blocks) {
  const Geometry& g = c.geometry();
  const std::int64_t kv_head = c.kv_head(head);
  const std::int64_t permuted_block = c.order_head(head) * c.layout.copy_stride;
  const std::int64_t block = kv_head * c.layout.block_stride;
  const std::int64_t begin = g.row_begin(row);
  const RowOutput output(c, head, begin - g.q_offset());
  return {.queries = c.q_rows(head, begin - g.q_offset()),
          .count = static_cast<int>(g.row_end(row) - begin),
          .blocks = blocks.data(),
          .block_count = static_cast<int>(blocks.size()),
          .permuted_k = c.layout.permuted ? c.layout.permuted_k + permuted_block * c.layout.k_block_bytes : nullptr,
          .permuted_v = c.layout.permuted ? c.layout.permuted_v + permuted_block * c.layout.v_block_bytes : nullptr,
          .k = c.layout.k + block * c.layout.k_block_bytes,
          .v = c.layout.v + block * c.layout.v_block_bytes,
          .permuted_end = c.layout.permuted ? g.own_begin(row) : 0,
          .diagonal = begin - g.diagonal(row) * g.block,
          .last_finite = c.layout.values_finite[kv_head * c.layout.block_stride + g.diagonal(row)] != 0,
          .out = output.out,
          .out_dtype = c.outputs.out.dtype,
          .out_stride = c.outputs.out.token_stride,
          .lse = output.lse,
          .sink = c.sink(head)};
}

// Rows of heads that share their keys and values.
struct Item {
  std::int64_t head_begin, head_end;
  std::int64_t row_begin, row_end;
};

// Attends the rows of an item. Returns the number of blocks visited.
std::int64_t attend_item(const StageContext& c, const Item& item, std::byte* scratch) {
  const Geometry& g = c.geometry();
  auto* list = reinterpret_cast<std::int32_t*>(scratch);
  std::byte* const memory = scratch + c.layout.lists_bytes;
  std::int64_t visited = 0;
  std::array<AttendRow, most_heads * most_rows> rows;
  int count = 0;
  for (std::int64_t head = item.head_begin; head < item.head_end; ++head)
    for (std::int64_t row = item.row_begin; row < item.row_end; ++row) {
      const auto blocks = list_row(c, head, row, list);
      list += blocks.size();
      visited += static_cast<std::int64_t>(blocks.size());
      if (c.kernels.attend_rows == nullptr)
        attend_row(c, head, row, blocks, memory);
      else
        rows[static_cast<std::size_t>(count++)] = describe_row(c, head, row, blocks);
    }
  if (count > 0)
    c.kernels.attend_rows(rows.data(), count,
                          {.head_dim = c.head_dim(),
                           .head_dim_v = c.head_dim_v(),
                           .block = g.block,
                           .block_bytes = c.layout.k_block_bytes,
                           .scale_log2 = c.scale_log2(),
                           .scratch = memory});
  return visited;
}

}  // namespace

std::int64_t row_scratch_bytes(const Geometry& g, const Kernels& kernels, std::int64_t corrected_blocks) {
  const std::int64_t dim = g.shape.head_dim;
  if (kernels.attend_rows != nullptr) return kernels.attend_scratch_bytes(static_cast<int>(dim), g.block);
  const std::int64_t queries = kernels.packed_head_dim(dim) * kernels.element_size;
  const std::int64_t state = (value_dim(g.shape) + 2) * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t scores = 2 * g.block * static_cast<std::int64_t>(sizeof(float));
  return g.block * (queries + state) + scores * strip +
         (corrected_blocks > 0 ? correction_bytes(g, corrected_blocks) : 0);
}

std::int64_t attend(const StageContext& c) {
  const Geometry& g = c.geometry();
  // Rows that follow one another, and heads of a group, are done together while their keys and values are in cache, but
  // not so many at once that threads would idle.
  constexpr std::int64_t items_per_thread = 8;
  const std::int64_t share = c.heads.q_count * g.rows() / (items_per_thread * c.spec.threads);
  const std::int64_t rows = std::clamp<std::int64_t>(share, 1, c.kernels.rows_together());
  const std::int64_t together =
      std::clamp<std::int64_t>(share / rows, 1, std::min({g.group(), c.heads.q_count, most_heads}));
  std::vector<std::pair<std::int64_t, std::int64_t>> parts;  // of the pass's heads, none of them across groups
  for (std::int64_t begin = 0; begin < c.heads.q_count;) {
    const std::int64_t group_end = (c.heads.kv_begin + c.kv_head(begin) + 1) * g.group() - c.heads.q_begin;
    const std::int64_t end = std::min({begin + together, group_end, c.heads.q_count});
    parts.emplace_back(begin, end);
    begin = end;
  }
  std::atomic<std::int64_t> visited = 0;
  const auto count = static_cast<std::int64_t>(parts.size());
  parallel_for(c.spec.threads, count * ceil_div(g.rows(), rows), [&](std::int64_t item, int thread) {
    const auto [begin, end] = parts[static_cast<std::size_t>(item % count)];
    const std::int64_t row_end = g.rows() - item / count * rows;
    visited += attend_item(c, {begin, end, std::max<std::int64_t>(row_end - rows, 0), row_end}, c.scratch(thread));
  });
  return visited;
}

}  // namespace pbsattn::cpu
