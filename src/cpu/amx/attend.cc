// Rows of attention on AMX: packs their queries, streams their units through the pipeline, and writes what
// comes out.
#include <cmath>

#include "cpu/amx/amx.h"
#include "cpu/amx/pack.h"
#include "cpu/amx/units.h"

#if PBSATTN_HAS_AMX
namespace pbsattn::cpu::amx {
namespace {

constexpr int max_strips = max_block / strip;
constexpr int chunk_blocks = 4;  // a strip's queries and sums stay in L1 for so many blocks, which stay in L2

constexpr std::int64_t strip_bytes(int pairs) {
  return pairs * 6 * tile_bytes + 4 * strip * static_cast<int>(sizeof(float));
}

// A strip's outputs, a tile at a time: rows[i] gets 16 of head_dim, or 32 in 16 bits, of query i of a half.
template <DType Out>
struct OutputTile {
  static constexpr int tiles = Out == DType::f32 ? 1 : 2;
  static constexpr int width = tiles * tile_rows;

  // Returns NaN in the lane of a query that has an output which is not finite.
  PBSATTN_INLINE F32 read(const std::byte* out, F32 inverse) {
    F32 wrong{};
    U32 columns[lanes];
    const auto take = [&](int d) __attribute__((always_inline)) {
      const F32 o = f32_at(out + d / tile_rows * 2 * tile_bytes + d % tile_rows * tile_row_bytes) * inverse;
      wrong += o * 0.0F;
      return o;
    };
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if constexpr (Out == DType::f32)
        columns[i] = as_u32(take(i));
      else
        columns[i] = widen(to_half<Out>(take(2 * i))) | widen(to_half<Out>(take(2 * i + 1))) << 16;
    }
    transpose(columns, rows);
    return wrong;
  }
  PBSATTN_INLINE void write(void* row, int first, int count, int i) const {
    if constexpr (Out == DType::f32)
      store_f32(static_cast<float*>(row) + first, count, as_f32(rows[i]));
    else
      store_pairs(static_cast<std::uint16_t*>(row) + first, count, rows[i]);
  }

  U32 rows[lanes];
};

// Writes a strip's rows. Returns false, with part of them written, where the sums left float32's range.
template <DType Out>
bool write_rows(const Strip& s, int head_dim, bool checked) {
  const AttendRow& row = *s.row;
  // No sum is that large unless a score was much above those that it was measured from.
  constexpr float most = 0x1p64F;
  constexpr int size = Out == DType::f32 ? 4 : 2;
  F32 wrong{};
  for (int half = 0; half < 2; ++half) {
    const int count = s.count - half * lanes < lanes ? s.count - half * lanes : lanes;
    if (count <= 0) break;
    const F32 sum = f32_at(s.sum + half * lanes);
    if (checked)
      for (int i = 0; i < count; ++i)
        if (!(sum[i] > 0.0F && sum[i] < most)) return false;
    const F32 inverse = sum == F32{} ? F32{} : 1.0F / sum;
    OutputTile<Out> tile;
    for (int d = 0; d < head_dim; d += OutputTile<Out>::width) {
      wrong += tile.read(s.out + (d / tile_rows * 2 + half) * tile_bytes, inverse);
      for (int i = 0; i < count; ++i) {
        const std::int64_t query = s.first + half * lanes + i;
        tile.write(static_cast<std::byte*>(row.out) + query * row.out_stride * size, d, head_dim - d, i);
      }
    }
  }
  if (row.lse != nullptr) {
    constexpr float ln2 = 0.693147180559945F;
    for (int i = 0; i < s.count; ++i)
      row.lse[s.first + i] = s.sum[i] == 0.0F ? -INFINITY : ln2 * (s.origin[i] + log2f(s.sum[i]));
  }
  if (!checked) return true;
  for (int i = 0; i < lanes; ++i)
    if (wrong[i] != 0.0F) return false;
  return true;
}

bool write_rows(const Strip& s, int head_dim, bool checked) {
  switch (s.row->out_dtype) {
    case DType::f32: return write_rows<DType::f32>(s, head_dim, checked);
    case DType::f16: return write_rows<DType::f16>(s, head_dim, checked);
    case DType::bf16: return write_rows<DType::bf16>(s, head_dim, checked);
  }
  return true;
}

template <int Pairs>
class Rows {
 public:
  explicit Rows(const AttendArgs& args)
      : args_(args),
        pipeline_(args.scratch, args.scale_log2),
        careful_(args.scratch + Pipeline<Pairs>::scratch_bytes),
        strips_memory_(careful_ + careful_bytes) {}

  void run(const AttendRow* rows, int count) {
    for (int r = 0; r < count; ++r) run_row(rows[r], r + 1 < count ? &rows[r + 1] : nullptr, strips_[r % 2], r % 2);
    drain();
  }

  static std::int64_t scratch_bytes(int block) {
    return Pipeline<Pairs>::scratch_bytes + careful_bytes + 2 * (block / strip) * strip_bytes(Pairs);
  }

 private:
  void run_row(const AttendRow& row, const AttendRow* next, Strip (&strips)[max_strips], int parity) {
    if (pushed_ < 2) drain();  // the strips' last row is still in the pipeline
    pushed_ = 0;
    const int strip_count = ceil_div(row.count, strip);
    for (int i = 0; i < strip_count; ++i) set_up(strips[i], row, parity, i);
    // Among few weights the rounding of each shows.
    constexpr int few_blocks = 2;
    if (!row.last_finite || row.block_count <= few_blocks) {
      for (int i = 0; i < strip_count; ++i) do_with_care(strips[i], row.last_finite);
      return;
    }
    const int parts = ceil_div(args_.block, unit_keys);
    const int chunks = ceil_div(row.block_count, chunk_blocks);
    const auto chunk_begin = [](const AttendRow& r, int c) {
      return static_cast<int>(std::int64_t{r.block_count} * c / ceil_div(r.block_count, chunk_blocks));
    };
    for (int c = 0; c < chunks; ++c) {
      const int begin = chunk_begin(row, c);
      const int end = chunk_begin(row, c + 1);
      const AttendRow& after = c + 1 < chunks || next == nullptr ? row : *next;
      const int after_begin = c + 1 < chunks ? end : next != nullptr ? 0 : begin;
      for (int i = 0; i < strip_count; ++i) {
        for (int b = begin; b < end; ++b) {
          for (int part = 0; part < parts; ++part) {
            Unit unit = make_unit(strips[i], args_, b, part);
            if (unit.groups == 0) continue;
            unit.first = b == 0 && part == 0;
            unit.last = b == row.block_count - 1 && (part == parts - 1 || unit.diagonal + strips[i].count <= unit_keys);
            const int fetched = after_begin + (b - begin) < after.block_count ? after_begin + (b - begin) : 0;
            const std::int64_t share = args_.block_bytes / (strip_count * parts) * (i * parts + part);
            unit.next_keys = keys_of(after, after.blocks[fetched], args_.block_bytes) + share;
            unit.next_values = values_of(after, after.blocks[fetched], args_.block_bytes) + share;
            push(unit);
          }
        }
      }
    }
  }

  void set_up(Strip& s, const AttendRow& row, int parity, int i) {
    std::byte* const memory = strips_memory_ + (parity * (args_.block / strip) + i) * strip_bytes(Pairs);
    s.queries = memory;
    s.out = memory + Pairs * 2 * tile_bytes;
    s.origin = reinterpret_cast<float*>(memory + Pairs * 6 * tile_bytes);
    s.sum = s.origin + strip;
    s.row = &row;
    s.first = i * strip;
    s.count = row.count - s.first < strip ? row.count - s.first : strip;
    const int size = row.queries.dtype == DType::f32 ? 4 : 2;
    pack_queries({static_cast<const std::byte*>(row.queries.data) + s.first * row.queries.stride * size,
                  row.queries.dtype, row.queries.stride, nullptr},
                 s.count, args_.head_dim, s.queries);
  }

  void do_with_care(Strip& s, bool fine) {
    if (fine) {
      attend_with_care(s, args_, true, careful_);
      if (write_rows(s, args_.head_dim, true)) return;
    }
    attend_with_care(s, args_, false, careful_);
    write_rows(s, args_.head_dim, false);
  }

  void push(const Unit& unit) {
    ++pushed_;
    pipeline_.push(unit, [this](Strip& s) {
      if (!write_rows(s, args_.head_dim, true)) do_with_care(s, false);
    });
  }
  void drain() {
    push({});
    push({});
  }

  const AttendArgs& args_;
  Pipeline<Pairs> pipeline_;
  std::byte* careful_;
  std::byte* strips_memory_;
  Strip strips_[2][max_strips];
  int pushed_ = 2;  // units since the last row began
};

template <class Body>
auto with_pairs(int head_dim, Body&& body) {
  switch (tile_pairs(head_dim)) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
    case 7: return body(std::integral_constant<int, 7>{});
    default: return body(std::integral_constant<int, 8>{});
  }
}

}  // namespace

void attend_rows(const AttendRow* rows, int count, const AttendArgs& args) {
  [[maybe_unused]] const TileScope scope;
  with_pairs(args.head_dim, [&](auto pairs) { Rows<pairs.value>(args).run(rows, count); });
}

std::int64_t attend_scratch_bytes(int head_dim, int block) {
  return with_pairs(head_dim, [&](auto pairs) { return Rows<pairs.value>::scratch_bytes(block); });
}

}  // namespace pbsattn::cpu::amx
#endif
