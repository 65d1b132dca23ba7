// Tensors that tests own, in the layouts that callers bring.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn::test {

enum class TensorLayout {
  bhsd,    // [batch][head][token][head_dim]
  bshd,    // [batch][token][head][head_dim], as projections leave it
  padded,  // bhsd with gaps after each row, head and batch, starting at an odd element
  cache,   // [token][batch][head][head_dim] in a longer cache, as an engine keeps it
};

// [batch][heads][tokens][head_dim]. Elements outside the view hold a poison that padding_intact() looks for.
class Tensor {
 public:
  Tensor(DType dtype, TensorLayout layout, std::int64_t batch, std::int64_t heads, std::int64_t tokens,
         std::int64_t head_dim);

  double get(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t d) const;
  void set(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t d, double value);
  void fill(double value);

  View view() { return view_of<View>(storage_.data()); }
  ConstView view() const { return view_of<ConstView>(storage_.data()); }
  const std::vector<std::byte>& bytes() const { return storage_; }
  bool padding_intact() const;

  DType dtype;
  std::int64_t batch, heads, tokens, head_dim;

 private:
  template <class V, class Byte>
  V view_of(Byte* storage) const {
    return {.data = storage + origin_ * element_size_,
            .dtype = dtype,
            .batch_stride = batch_stride_,
            .head_stride = head_stride_,
            .token_stride = token_stride_};
  }
  std::int64_t index(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) const {
    return origin_ + b * batch_stride_ + h * head_stride_ + t * token_stride_ + d;
  }

  std::int64_t element_size_;
  std::int64_t origin_ = 0, batch_stride_ = 0, head_stride_ = 0, token_stride_ = 0;
  std::vector<std::byte> storage_;
};

// Doubles of a normal distribution, the same on every platform's standard library.
class Normal {
 public:
  explicit Normal(std::uint64_t seed) : engine_(seed) {}
  double operator()();

 private:
  double uniform() { return (static_cast<double>(engine_() >> 11) + 0.5) * 0x1p-53; }  // in (0, 1)
  std::mt19937_64 engine_;
};

}  // namespace pbsattn::test
