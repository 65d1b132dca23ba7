#include "support/tensor.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/validation/validate.h"
#include "reference/numbers.h"

namespace pbsattn::test {
namespace {

constexpr std::byte poison{0xA5};

}  // namespace

Tensor::Tensor(DType dtype_, TensorLayout layout, std::int64_t batch_, std::int64_t heads_, std::int64_t tokens_,
               std::int64_t head_dim_)
    : dtype(dtype_),
      batch(batch_),
      heads(heads_),
      tokens(tokens_),
      head_dim(head_dim_),
      element_size_(static_cast<std::int64_t>(size_of(dtype_))) {
  std::int64_t elements = batch * heads * tokens * head_dim;
  switch (layout) {
    case TensorLayout::bhsd:
      token_stride_ = head_dim;
      head_stride_ = tokens * token_stride_;
      batch_stride_ = heads * head_stride_;
      break;
    case TensorLayout::bshd:
      head_stride_ = head_dim;
      token_stride_ = heads * head_stride_;
      batch_stride_ = tokens * token_stride_;
      break;
    case TensorLayout::padded:
      origin_ = 3;
      token_stride_ = head_dim + 5;
      head_stride_ = tokens * token_stride_ + 7;
      batch_stride_ = heads * head_stride_ + 11;
      elements = origin_ + batch * batch_stride_;
      break;
    case TensorLayout::cache:
      head_stride_ = head_dim;
      batch_stride_ = heads * head_stride_;
      token_stride_ = batch * batch_stride_;
      elements = (tokens + 37) * token_stride_;
      break;
  }
  storage_.assign(static_cast<std::size_t>(elements * element_size_), poison);
}

double Tensor::get(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) const {
  return reference::load(dtype, storage_.data(), index(b, h, t, d));
}
void Tensor::set(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d, double value) {
  reference::store(dtype, storage_.data(), index(b, h, t, d), value);
}

void Tensor::fill(double value) {
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t d = 0; d < head_dim; ++d) set(b, h, t, d, value);
}

bool Tensor::padding_intact() const {
  std::vector<std::byte> padding = storage_;
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t t = 0; t < tokens; ++t)
        std::fill_n(padding.begin() + index(b, h, t, 0) * element_size_, head_dim * element_size_, poison);
  return std::ranges::all_of(padding, [](std::byte byte) { return byte == poison; });
}

// Box-Muller; std::normal_distribution differs between standard libraries.
double Normal::operator()() {
  const double radius = std::sqrt(-2.0 * std::log(uniform()));
  return radius * std::cos(2.0 * std::numbers::pi * uniform());
}

}  // namespace pbsattn::test
