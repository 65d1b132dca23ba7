// The inner loops of the CPU backend, one table of functions for each code path.
//
// Layout. A *strip* is 32 queries in the lanes of vectors, so that softmax needs no shuffles:
//
//     S^T[key][query] = K[key][:] . Q^T[:][query]        O^T[d][query] += V^T[d][key] P^T[key][query]
//
// Both products read one operand as broadcast scalars straight from packed K or V, and the other as
// vectors from packed Q or P. Paths differ in the packed element only: f32, or pairs of bf16 (two
// neighbours along the axis of summation share 32 bits, as dot-product instructions want them).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn::cpu {

inline constexpr int strip = 32;  // queries of a strip
inline constexpr int half_strip = strip / 2;
inline constexpr int row_tile = 8;        // rows of K or columns of V in one register tile
inline constexpr int max_head_dim = 256;  // bounds the kernels' stack buffers
inline constexpr int max_block = 256;
inline constexpr int cache_line = 64;

// Rows of head_dim elements: row i is at data + (index ? index[i] : i) * stride elements. Of a cache in pages that is
// token first + (index ? index[i] : i), at place token % page_size of page pages[token / page_size].
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t stride = 0;
  const std::int32_t* index = nullptr;
  const std::int32_t* pages = nullptr;
  std::int64_t page_stride = 0;
  std::int32_t page_size = 0;
  std::int32_t first = 0;

  // Inline everywhere: files are compiled for other instructions, and a call might reach another file's copy.
  [[gnu::always_inline]] const void* at(int i) const {
    const std::int32_t row = index != nullptr ? index[i] : i;
    std::int64_t offset = row * stride;
    if (pages != nullptr) [[unlikely]] {
      const auto token = static_cast<std::uint32_t>(first + row);  // whose division is the shorter one
      const auto size = static_cast<std::uint32_t>(page_size);
      offset = pages[token / size] * page_stride + token % size * stride;
    }
    return static_cast<const std::byte*>(data) + offset * (dtype == DType::f32 ? 4 : 2);
  }
};

// How products of queries and keys become logits: times scale, and where softcap isn't 0 capped by `cap`.
struct Logits {
  float scale;
  float softcap;
  void (*cap)(float* products, std::int64_t count, const Logits& logits);
  float scale_log2;  // what products, as `cap` leaves them, are multiplied by: the softmax works in base 2
};

// The online softmax of one strip. `out` is O^T, [head_dim_v][strip], unnormalised; max is of unscaled
// scores, -inf before the first block.
struct StripState {
  float* max;  // [strip]
  float* sum;  // [strip]
  float* out;
};

// Where a block's packed keys and values lie. A path that gathers finds key i in row index[i]; to the others
// the block is contiguous and index means nothing.
struct PackedBlock {
  const std::byte* keys;
  const std::byte* values;
  const std::int32_t* index;
};

// One key block against one strip.
struct BlockArgs {
  PackedBlock block;
  const void* queries;  // packed strip
  int count;            // keys; a multiple of row_tile, padded with zero rows
  int head_dim;
  int head_dim_v;
  Logits logits;
  bool masked;            // key i is hidden from query j where i > j + diagonal, and where i <= j + edge
  std::int64_t diagonal;  // token of the strip's first query minus token of the block's first key
  std::int64_t edge;      // diagonal minus the tokens of the window
  bool values_finite;     // if not, masked values are kept out of the sum (0 * inf is NaN)
  float* scratch;         // [count][strip] floats, twice
  // What the caller reads after this: keys [next_begin, next_end) of that block are fetched into the
  // second-level cache meanwhile.
  PackedBlock next;
  int next_begin, next_end;
};

// One key block whose exponentials are summed for some queries of a strip.
struct SumArgs {
  PackedBlock block;    // of keys alone
  const void* queries;  // packed strip
  int count;            // keys; zero rows follow up to a multiple of row_tile
  int head_dim;
  Logits logits;
  int first, last;           // lanes of the queries: multiples of half_strip
  const std::int32_t* seen;  // [strip]: a query sees that many keys; null: all

  // Capping takes whole strips, so there is no half to save there.
  bool by_half() const { return last - first < strip && logits.softcap == 0; }
};

constexpr int most_rows = 4;  // that follow one another and are done together by a path that takes whole rows

// One row of one query head, for such a path.
struct AttendRow {
  Rows queries;
  int count;                   // of queries, up to a block
  const std::int32_t* blocks;  // ascending; the last is the row's diagonal, the only one masked causally
  int block_count;
  const std::byte* permuted_k;  // packed blocks; block b lies in permuted_* where b < permuted_end
  const std::byte* permuted_v;
  const std::byte* k;
  const std::byte* v;
  std::int64_t permuted_end;
  std::int64_t diagonal;  // token of the row's first query minus token of the last block's first key
  bool last_finite;       // the last block's values; if not, masked values are kept out of the sum
  void* out;
  DType out_dtype;
  std::int64_t out_stride;
  float* lse;  // [count] or null
  float sink;  // logit of one more key, which has no value; -inf for none
};

struct AttendArgs {
  int head_dim;
  int head_dim_v;  // whose packed rows are as long as the keys'
  int block;
  std::int64_t block_bytes;  // of a packed block of keys or of values
  float scale_log2;
  std::byte* scratch;  // attend_scratch_bytes(head_dim, block), on a cache line's border
};

// Of a path that the system must allow, process-wide and for good: so it is asked when the path is chosen, not before.
struct Permission {
  bool (*ask)();
  bool (*refused)();  // when last asked
};

// How a path packs rows of any dtype.
struct Packing {
  // Packs `count` rows as keys (or values), with zero rows up to `padded`.
  void (*keys)(const Rows& rows, int count, int padded, int head_dim, void* packed);
  // Returns whether every value was finite.
  bool (*values)(const Rows& rows, int count, int padded, int head_dim, void* packed);
  // Packs `count` <= strip rows as a strip; the queries after them are zero.
  void (*queries)(const Rows& rows, int count, int head_dim, void* packed);
};

// Every path has the first group of functions; the f32 paths serve the second for all of them. A path attends
// either a block at a time (attend_block, then the second group's finish) or by rows (attend_rows).
struct Kernels {
  std::string_view name;  // "avx512_bf16"
  Precision products;     // f32 or bf16
  int element_size;       // bytes of a packed element
  bool gathers;           // reads permuted blocks through an index, so that no permuted copy is needed
  Packing pack;

  // Takes one step of the online softmax.
  void (*attend_block)(const BlockArgs& args, const StripState& state);

  // Scores a block of keys by a strip of queries, with logits capped on paths that attend block by block:
  // exps[key][query], measured from the query's own maximum over this block and kept in element_size bytes; that
  // maximum; and the sum of the query's exps.
  void (*score_keys)(const void* keys, const void* queries, int count, int head_dim, const Logits& logits, float* max,
                     float* sum, void* exps);
  // Writes the maximum and the sum alone, of the queries in some lanes and of the keys that they see.
  void (*sum_exps)(const SumArgs& args, float* max, float* sum);
  // weights[key] += sum over queries of exps[key][query] * factors[query], over `strips` strips whose exps and
  // factors follow each other. A factor of 0 leaves its query out.
  void (*weigh_keys)(const void* exps, int strips, int count, const float* factors, float* weights);

  // Writes `count` rows of head_dim_v elements, normalised by their sums and a sink's weight (-inf: none), and their
  // natural log-sum-exp where lse is not null.
  void (*finish)(const StripState& state, int count, int head_dim_v, float scale_log2, float sink, void* out,
                 DType dtype, std::int64_t stride, float* lse) = nullptr;
  // From the maxima and sums that score_keys left for each block (block b's at b * stride), the factor that
  // turns each block's exps into softmax weights over all blocks, written over the maxima. Queries from
  // `queries` on get 0; a query that has a NaN score, or only -inf, gets NaN.
  void (*score_factors)(float* max, const float* sum, std::int64_t blocks, std::int64_t stride, float scale_log2,
                        int queries) = nullptr;
  // Turns `count` products, a multiple of a strip, into capped logits in place: softcap * tanh(product * scale /
  // softcap).
  void (*cap)(float* products, std::int64_t count, const Logits& logits) = nullptr;
  // scores[key][query] = keys . queries, unscaled.
  void (*scores)(const void* keys, const void* queries, int count, int head_dim, float* scores) = nullptr;
  // sum[:] = the sum of `count` rows, a block at most; and the rounding of float32 values to a dtype, in place.
  void (*sum_rows)(const Rows& rows, int count, int head_dim, float* sum) = nullptr;
  void (*round_row)(DType dtype, int count, float* row) = nullptr;
  // scores[row] = the sum of weight * feature of Permutation::learned, for `count` rows.
  void (*learned_scores)(const Rows& rows, int count, int head_dim, const float* weights, RopePairs pairs,
                         float* scores) = nullptr;

  // Packed blocks hold head_dim and keys padded with zeros to multiples of these (or to the whole block).
  int head_dim_step = 1;
  int key_step = row_tile;
  // Attention of rows, with bytes of scratch. It is fastest with most_rows rows of one head after each other.
  void (*attend_rows)(const AttendRow* rows, int count, const AttendArgs& args) = nullptr;
  std::int64_t (*attend_scratch_bytes)(int head_dim, int block) = nullptr;
  const Permission* permission = nullptr;  // none is needed

  int rows_together() const { return attend_rows != nullptr ? most_rows : 1; }
  std::int64_t packed_head_dim(std::int64_t head_dim) const {
    return (head_dim + head_dim_step - 1) / head_dim_step * head_dim_step;
  }
  // Returns the bytes of a packed block of keys or values.
  std::int64_t block_bytes(std::int64_t block, std::int64_t head_dim) const {
    return block * packed_head_dim(head_dim) * element_size;
  }
};

using KernelList = std::vector<const Kernels*>;

// Returns the tables this processor can run, fastest first; never empty. f32 and bf16 paths are both listed, and not
// those that the system has refused.
KernelList runnable_kernels();

// Returns those that products may take: of runnable_kernels() those whose products match, down to the first that needs
// no permission, or the f32 one where bf16 has no fast path. PBSATTN_CPU_PATH=name in the environment, read when a plan
// is made, forces one.
KernelList candidates(Precision products);

// Returns the first that is permitted, for which its permission is asked. Throws unsupported if none is.
const Kernels& choose(std::span<const Kernels* const> candidates);

KernelList f32_kernels();  // Highway's targets, best first
// Return null where not compiled in or not supported. Nothing is asked of the system.
const Kernels* amx_bf16_kernels();
const Kernels* avx512_bf16_kernels();

}  // namespace pbsattn::cpu
