// Where rows, blocks and segments lie. Every backend and every test derives them here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// Returns the elements of a value, and of an output.
inline std::int64_t value_dim(const Shape& shape) {
  return shape.head_dim_v == 0 ? shape.head_dim : shape.head_dim_v;
}

// Token blocks are aligned to token 0. A *row* is the queries of one token block, so a chunk that starts
// inside a block has a short first row, and every row lies in exactly one segment.
struct Geometry {
  Shape shape;
  int block = 128;
  int segment = 256;
  std::int64_t window = Options{}.window;  // tokens that a query sees, itself the last

  std::int64_t group() const { return shape.q_heads / shape.kv_heads; }
  std::int64_t kv_head(std::int64_t q_head) const { return q_head / group(); }

  std::int64_t q_offset() const { return shape.kv_len - shape.q_len; }  // token of query 0
  std::int64_t first_row() const { return q_offset() / block; }         // token block of row 0
  std::int64_t blocks() const { return ceil_div(shape.kv_len, block); }
  std::int64_t rows() const { return blocks() - first_row(); }

  // Tokens [row_begin, row_end) are the queries of row r; subtract q_offset() for query indices.
  std::int64_t row_begin(std::int64_t r) const { return std::max(q_offset(), (first_row() + r) * block); }
  std::int64_t row_end(std::int64_t r) const { return std::min(shape.kv_len, (first_row() + r + 1) * block); }

  // The key block on row r's diagonal, and the first block of the row's own segment. Blocks before
  // own_begin(r) are whole, wholly visible and permuted; blocks own_begin(r) .. diagonal(r) are read in
  // their original order under the causal mask; blocks after the diagonal are never seen.
  std::int64_t diagonal(std::int64_t r) const { return first_row() + r; }
  std::int64_t own_begin(std::int64_t r) const {
    const std::int64_t per_segment = segment / block;
    return diagonal(r) / per_segment * per_segment;
  }

  // Where a sliding window hides keys, none is permuted: a row sees the blocks window_begin(r) .. diagonal(r), and of
  // these each query the tokens from first_seen() up to its own.
  bool windowed() const { return window < shape.kv_len; }
  std::int64_t first_seen(std::int64_t token) const { return std::max<std::int64_t>(token - window + 1, 0); }
  std::int64_t window_begin(std::int64_t r) const { return first_seen(row_begin(r)) / block; }

  std::int64_t complete_segments() const { return shape.kv_len / segment; }
  std::int64_t permuted_len() const { return complete_segments() * segment; }  // keys that may move

  // The last min(block, q_len) queries score the keys.
  std::int64_t scoring_queries() const { return std::min<std::int64_t>(block, shape.q_len); }

  // Pairs (row, key block) of one head under dense causal attention.
  std::int64_t causal_blocks_per_head() const {
    const std::int64_t first = first_row() + 1;
    const std::int64_t last = blocks();
    return rows() * (first + last) / 2;
  }
};

}  // namespace pbsattn
