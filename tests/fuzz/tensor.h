// The tensors of one call: views drawn from a fuzzer's bytes, and memory that ends where they end.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "bytes.h"
#include "pbsattn/pbsattn.hpp"

namespace pbsattn::fuzz {

// What stands in inputs.
struct Contents {
  enum Kind : std::uint8_t {
    normal,   // numbers like a model's
    special,  // such, and among them some NaN, infinities and zeros
    bits,     // any bits
  };
  Kind kind = normal;
  std::uint64_t seed = 0;

  // The seed is made of the whole input, so that inputs that differ hold other numbers: a near tie that float32 decides
  // otherwise than double stays one among many, however often its input is changed.
  static Contents take(Bytes& bytes);
};

struct Tensor {
  // A view of that many heads, tokens and elements. `fits` is false where its strides span more memory than is worth
  // having.
  Tensor(Bytes& bytes, DType dtype, std::int64_t batch_size, std::int64_t head_count, std::int64_t token_count,
         std::int64_t dim);

  // Draws a dtype; of hostile bytes now and then none that there is.
  static DType take_dtype(Bytes& bytes) { return static_cast<DType>(bytes.take_near(0, 2) & 0xFF); }

  void fill(const Contents& contents, Bytes& bytes);
  // Lays this tensor over the beginning of another one's memory, which grows where it is shorter. Its own is let go.
  void lay_over(const Tensor& other);
  // The same view of a copy of the memory.
  Tensor copy() const;

  double get(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) const;
  // Whether every row lies in the memory.
  bool runs_forward() const {
    return (batch <= 1 || view.batch_stride >= 0) && (heads <= 1 || view.head_stride >= 0) &&
           (tokens <= 1 || view.token_stride >= 0);
  }
  // Returns a row's bytes.
  std::uint8_t* row(std::int64_t b, std::int64_t h, std::int64_t t) { return memory->data() + offset(b, h, t); }
  std::size_t row_bytes() const { return static_cast<std::size_t>(head_dim) * element(); }
  // Whether nothing but the view's elements differs from `before`.
  bool only_view_changed(const std::vector<std::uint8_t>& before) const;

  std::int64_t batch, heads, tokens, head_dim;
  View view;
  std::shared_ptr<std::vector<std::uint8_t>> memory;
  bool fits = false;

 private:
  std::int64_t offset(std::int64_t b, std::int64_t h, std::int64_t t) const {
    return index(b, h, t, 0) * static_cast<std::int64_t>(element());
  }
  std::size_t element() const { return view.dtype == DType::f16 || view.dtype == DType::bf16 ? 2 : 4; }
  std::int64_t index(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) const {
    return b * view.batch_stride + h * view.head_stride + t * view.token_stride + d;
  }
};

}  // namespace pbsattn::fuzz
