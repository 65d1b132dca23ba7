// Rows of attention on AMX: packs their queries, streams their units through the pipeline, and writes what
// comes out.
#include <array>
#include <cmath>

#include "cpu/amx/amx.h"
#include "cpu/amx/pack.h"
#include "cpu/amx/units.h"

#if PBSATTN_HAS_AMX
namespace pbsattn::cpu::amx {
namespace {

constexpr int max_strips = max_block / strip;
constexpr int chunk_bytes = 512 << 10;  // of keys and values, a quarter of the second-level cache
constexpr int most_chunk_blocks = 32;

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
bool write_rows(const Strip& s, int head_dim_v, bool checked) {
  const AttendRow& row = *s.row;
  // No sum is that large unless a score was much above those that it was measured from.
  constexpr float most = 0x1p64F;
  constexpr int size = Out == DType::f32 ? 4 : 2;
  constexpr float ln2 = 0.693147180559945F;
  F32 wrong{};
  for (int half = 0; half < 2; ++half) {
    const int count = s.count - half * lanes < lanes ? s.count - half * lanes : lanes;
    if (count <= 0) break;
    F32 sum = f32_at(s.sum + half * lanes);
    if (checked)
      for (int i = 0; i < count; ++i)
        if (!(sum[i] > 0.0F && sum[i] < most)) return false;
    F32 origin = f32_at(s.origin + half * lanes);
    F32 factor = splat(1);
    if (row.sink != -INFINITY)  // what is higher is what weights are measured from
      for (int i = 0; i < lanes; ++i) {
        const float top = row.sink / ln2 > origin[i] ? row.sink / ln2 : origin[i];
        factor[i] = exp2f(origin[i] - top);
        sum[i] = sum[i] * factor[i] + exp2f(row.sink / ln2 - top);
        origin[i] = top;
      }
    const F32 inverse = sum == F32{} ? F32{} : factor / sum;
    for (int i = 0; i < count && row.lse != nullptr; ++i)
      row.lse[s.first + half * lanes + i] = sum[i] == 0.0F ? -INFINITY : ln2 * (origin[i] + log2f(sum[i]));
    OutputTile<Out> tile;
    for (int d = 0; d < head_dim_v; d += OutputTile<Out>::width) {
      wrong += tile.read(s.out + (d / tile_rows * 2 + half) * tile_bytes, inverse);
      for (int i = 0; i < count; ++i) {
        const std::int64_t query = s.first + half * lanes + i;
        tile.write(static_cast<std::byte*>(row.out) + query * row.out_stride * size, d, head_dim_v - d, i);
      }
    }
  }
  if (!checked) return true;
  for (int i = 0; i < lanes; ++i)
    if (wrong[i] != 0.0F) return false;
  return true;
}

bool write_rows(const Strip& s, int head_dim_v, bool checked) {
  switch (s.row->out_dtype) {
    case DType::f32: return write_rows<DType::f32>(s, head_dim_v, checked);
    case DType::f16: return write_rows<DType::f16>(s, head_dim_v, checked);
    case DType::bf16: return write_rows<DType::bf16>(s, head_dim_v, checked);
  }
  return true;
}

// Some of a gang's blocks: a strip's queries and sums stay in the first-level cache for so many, which stay in the
// second.
struct Chunk {
  int count = 0;
  std::array<const std::byte*, most_chunk_blocks> keys{};
  std::array<const std::byte*, most_chunk_blocks> values{};
  std::array<int, most_rows> begin{};  // of each row's list
  std::array<int, most_rows> end{};
};

// Rows that are done at once, because they read the same keys and values: what comes from the third-level cache, which
// is slower than the products, comes once for all of them.
struct Gang {
  const AttendRow* rows = nullptr;
  int count = 0;
};

// Tells whether a row is done with care: among few weights the rounding of each shows.
bool needs_care(const AttendRow& row) {
  constexpr int few_blocks = 2;
  return !row.last_finite || row.block_count <= few_blocks;
}

int blocks_in_common(const AttendRow& a, const AttendRow& b) {
  int common = 0;
  for (int i = 0, j = 0; i < a.block_count && j < b.block_count;) {
    const std::int32_t in_a = a.blocks[i];
    const std::int32_t in_b = b.blocks[j];
    common += in_a == in_b ? 1 : 0;
    i += in_a <= in_b ? 1 : 0;
    j += in_b <= in_a ? 1 : 0;
  }
  return common;
}

// Takes the next gang of rows. Those whose lists differ much would only take turns.
Gang gang_at(const AttendRow* rows, int count) {
  Gang gang{rows, 1};
  const auto alike = [&](const AttendRow& row) {
    if (row.k != rows->k || row.permuted_k != rows->permuted_k || needs_care(row) || needs_care(*rows)) return false;
    const int most = row.block_count > rows->block_count ? row.block_count : rows->block_count;
    return 4 * blocks_in_common(*rows, row) >= 3 * most;
  };
  while (gang.count < most_rows && gang.count < count && alike(rows[gang.count])) ++gang.count;
  return gang;
}

// Takes the next blocks, up to `most`, that any row of the gang has listed after those before `begin`.
Chunk next_chunk(const Gang& gang, const std::array<int, most_rows>& begin, int most, std::int64_t block_bytes) {
  Chunk chunk;
  chunk.begin = chunk.end = begin;
  for (; chunk.count < most; ++chunk.count) {
    const AttendRow* owner = nullptr;
    std::int32_t block = 0;
    for (int r = 0; r < gang.count; ++r) {
      const AttendRow& row = gang.rows[r];
      const int at = chunk.end[static_cast<std::size_t>(r)];
      if (at == row.block_count || (owner != nullptr && row.blocks[at] >= block)) continue;
      owner = &row;
      block = row.blocks[at];
    }
    if (owner == nullptr) break;
    chunk.keys[static_cast<std::size_t>(chunk.count)] = k_of(*owner, block, block_bytes);
    chunk.values[static_cast<std::size_t>(chunk.count)] = v_of(*owner, block, block_bytes);
    for (int r = 0; r < gang.count; ++r) {
      const AttendRow& row = gang.rows[r];
      int& at = chunk.end[static_cast<std::size_t>(r)];
      if (at < row.block_count && row.blocks[at] == block) ++at;
    }
  }
  return chunk;
}

// Spreads the fetching of a chunk evenly over the units before it, in ranges of Bytes.
template <int Bytes>
class Fetching {
 public:
  Fetching(const Chunk& chunk, std::int64_t block_bytes, int places)
      : chunk_(chunk), ranges_of_block_(ceil_div(static_cast<int>(block_bytes), Bytes)), places_(places) {}

  // Returns what is to be fetched in the next place, or `nothing`, which is in cache already.
  const std::byte* next(const std::byte* nothing) {
    const std::int64_t ranges = 2 * chunk_.count * std::int64_t{ranges_of_block_};
    const auto due = static_cast<int>(ranges * ++place_ / places_);
    if (done_ == due) return nothing;
    const int range = done_ % ranges_of_block_;
    const int part = done_ / ranges_of_block_;
    const auto& blocks = part % 2 == 0 ? chunk_.keys : chunk_.values;
    ++done_;
    return blocks[static_cast<std::size_t>(part / 2)] + range * std::int64_t{Bytes};
  }

 private:
  const Chunk& chunk_;
  int ranges_of_block_;
  int places_;
  int place_ = 0;
  int done_ = 0;
};

// Runs rows' units through one pipeline, in which those of a row follow those of the row before.
template <int Pairs>
class RowStream {
 public:
  explicit RowStream(const AttendArgs& args)
      : args_(args),
        pipeline_(args.scratch, args.scale_log2),
        careful_(args.scratch + Pipeline<Pairs>::scratch_bytes),
        strips_memory_(careful_ + careful_bytes) {
    const std::int64_t fitting = chunk_bytes / (2 * args.block_bytes);
    chunk_blocks_ = static_cast<int>(fitting < 1 ? 1 : fitting < most_chunk_blocks ? fitting : most_chunk_blocks);
  }

  void run(const AttendRow* rows, int count) {
    for (int r = 0; r < count;) {
      const Gang gang = gang_at(rows + r, count - r);
      r += gang.count;
      if (needs_care(*gang.rows))
        attend_with_care(*gang.rows);
      else
        run_gang(gang, r < count ? gang_at(rows + r, count - r) : Gang{});
    }
    drain();
  }

  static std::int64_t scratch_bytes(int block) {
    return Pipeline<Pairs>::scratch_bytes + careful_bytes + most_rows * (block / strip) * strip_bytes(Pairs);
  }

 private:
  void run_gang(const Gang& gang, const Gang& next) {
    int blocks = 0;  // that any row has listed
    std::array<int, most_rows> begin{};
    for (Chunk all = chunk_of(gang, begin); all.count > 0; all = chunk_of(gang, all.end)) blocks += all.count;
    const int chunks = ceil_div(blocks, chunk_blocks_);
    claim_places(gang.count);
    for (int r = 0; r < gang.count; ++r)
      for (int i = 0; i < strip_count(gang.rows[r]); ++i) set_up(gang.rows[r], first_place_ + r, i);
    const auto size = [&](int c) {
      return static_cast<int>(std::int64_t{blocks} * (c + 1) / chunks - std::int64_t{blocks} * c / chunks);
    };
    Chunk chunk = next_chunk(gang, begin, size(0), args_.block_bytes);
    for (int c = 0; c < chunks; ++c) {
      Chunk after;
      if (c + 1 < chunks)
        after = next_chunk(gang, chunk.end, size(c + 1), args_.block_bytes);
      else if (next.count > 0)
        after = chunk_of(next, begin);
      run_chunk(gang, chunk, after);
      chunk = after;
    }
  }

  // Places for the strips of so many rows. The last units of the gang before are still in the pipeline, so its places
  // are left alone, or the pipeline is drained.
  void claim_places(int count) {
    const int busy_end = end_place_;
    const int busy = first_place_;
    first_place_ = busy_end + count <= most_rows ? busy_end : 0;
    end_place_ = first_place_ + count;
    if (busy < end_place_ && first_place_ < busy_end) drain();
  }
  Chunk chunk_of(const Gang& gang, const std::array<int, most_rows>& begin) const {
    return next_chunk(gang, begin, chunk_blocks_, args_.block_bytes);
  }
  static int strip_count(const AttendRow& row) { return ceil_div(row.count, strip); }

  void run_chunk(const Gang& gang, const Chunk& chunk, const Chunk& after) {
    const int parts = ceil_div(args_.block, unit_keys);
    int units = 0;
    for (std::size_t r = 0; r < static_cast<std::size_t>(gang.count); ++r)
      units += strip_count(gang.rows[r]) * (chunk.end[r] - chunk.begin[r]) * parts;
    Fetching<Pipeline<Pairs>::fetched_bytes> fetching(after, args_.block_bytes, units * Pipeline<Pairs>::fetches);
    for (std::size_t r = 0; r < static_cast<std::size_t>(gang.count); ++r) {
      const AttendRow& row = gang.rows[r];
      for (int i = 0; i < strip_count(row); ++i) {
        Strip& s = strips_[static_cast<std::size_t>(first_place_) + r][i];
        for (int b = chunk.begin[r]; b < chunk.end[r]; ++b)
          for (int part = 0; part < parts; ++part) {
            Unit unit = make_unit(s, args_, b, part);
            if (unit.groups == 0) continue;
            unit.first = b == 0 && part == 0;
            unit.last = b == row.block_count - 1 && (part == parts - 1 || unit.diagonal + s.count <= unit_keys);
            for (std::size_t place = 0; place < Pipeline<Pairs>::fetches; ++place)
              unit.fetched[place] = fetching.next(s.queries);
            push(unit);
          }
      }
    }
  }

  Strip& set_up(const AttendRow& row, int place, int i) {
    Strip& s = strips_[place][i];
    std::byte* const memory = strips_memory_ + (place * (args_.block / strip) + i) * strip_bytes(Pairs);
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
    return s;
  }

  void attend_with_care(const AttendRow& row) {
    drain();
    for (int i = 0; i < strip_count(row); ++i) do_with_care(set_up(row, 0, i), row.last_finite);
  }
  void do_with_care(Strip& s, bool fine) {
    if (fine) {
      amx::attend_with_care(s, args_, true, careful_);
      if (write_rows(s, args_.head_dim_v, true)) return;
    }
    amx::attend_with_care(s, args_, false, careful_);
    write_rows(s, args_.head_dim_v, false);
  }

  void push(const Unit& unit) {
    pipeline_.push(unit, [this](Strip& s) {
      if (!write_rows(s, args_.head_dim_v, true)) do_with_care(s, false);
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
  int chunk_blocks_ = 1;
  Strip strips_[most_rows][max_strips];
  int first_place_ = 0;  // of the last gang's rows in strips_
  int end_place_ = 0;
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
  with_pairs(args.head_dim, [&](auto pairs) { RowStream<pairs.value>(args).run(rows, count); });
}

std::int64_t attend_scratch_bytes(int head_dim, int block) {
  return with_pairs(head_dim, [&](auto pairs) { return RowStream<pairs.value>::scratch_bytes(block); });
}

}  // namespace pbsattn::cpu::amx
#endif
