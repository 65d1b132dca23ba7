#include "tensor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "reference/numbers.h"

namespace pbsattn::fuzz {
namespace {

constexpr std::int64_t largest = std::int64_t{1} << 20;  // elements

}  // namespace

Contents Contents::take(Bytes& bytes) {
  const int kind = bytes.take<std::uint8_t>() % 8;
  return {kind == 6 ? special : kind == 7 ? bits : normal, bytes.hash()};
}

Tensor::Tensor(Bytes& bytes, DType dtype, std::int64_t batch_size, std::int64_t head_count, std::int64_t token_count,
               std::int64_t dim)
    : batch(batch_size), heads(head_count), tokens(token_count), head_dim(dim) {
  view.dtype = dtype;
  // Token by token in each head, or head by head of each token, with gaps; of hostile bytes nearly so.
  const std::int64_t gap = bytes.take_near(bytes.hostile() ? -1 : 0, 3);
  if (bytes.take_rarely(2)) {
    view.head_stride = dim + gap;
    view.token_stride = heads * view.head_stride + bytes.take_near(0, 3);
    view.batch_stride = tokens * view.token_stride + bytes.take_near(0, 3);
  } else {
    view.token_stride = dim + gap;
    view.head_stride = tokens * view.token_stride + bytes.take_near(0, 3);
    view.batch_stride = heads * view.head_stride + bytes.take_near(0, 3);
  }
  if (bytes.hostile() && bytes.take_rarely(4)) {
    std::int64_t* const strides[] = {&view.batch_stride, &view.head_stride, &view.token_stride};
    *strides[bytes.take<std::uint8_t>() % 3] = bytes.take_near(-1, 2 * dim);
  }
  std::int64_t elements = dim;
  for (const auto& [extent, stride] :
       {std::pair{batch, view.batch_stride}, {heads, view.head_stride}, {tokens, view.token_stride}}) {
    if (std::abs(stride) > largest) return;
    if (extent > 1) elements += (extent - 1) * std::max<std::int64_t>(stride, 0);
  }
  if (elements > largest) return;
  fits = true;
  memory = std::make_shared<std::vector<std::uint8_t>>(static_cast<std::size_t>(elements) * element());
  view.data = memory->data();
}

double Tensor::get(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) const {
  return reference::load(view.dtype, memory->data(), index(b, h, t, d));
}

void Tensor::fill(const Contents& contents, Bytes& bytes) {
  if (contents.kind == Contents::bits) {
    for (std::size_t i = 0; i < memory->size() && bytes.size() > 0; ++i) (*memory)[i] = bytes.data()[i % bytes.size()];
    return;
  }
  std::mt19937_64 random(contents.seed);
  std::normal_distribution<float> normal(0, 1.5F);
  const auto elements = static_cast<std::int64_t>(memory->size() / element());
  for (std::int64_t i = 0; i < elements; ++i) reference::store(view.dtype, memory->data(), i, normal(random));
  if (contents.kind != Contents::special) return;
  constexpr double values[] = {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                               -std::numeric_limits<double>::infinity(), 0};
  for (int left = bytes.take<std::uint8_t>() % 4; left > 0; --left)
    reference::store(view.dtype, memory->data(), bytes.take<std::uint32_t>() % elements,
                     values[bytes.take<std::uint8_t>() % std::size(values)]);
}

void Tensor::lay_over(const Tensor& other) {
  memory->resize(std::max(memory->size(), other.memory->size()));
  std::ranges::copy(*other.memory, memory->begin());
  memory->shrink_to_fit();
  view.data = memory->data();
}

Tensor Tensor::copy() const {
  Tensor result = *this;
  result.memory = std::make_shared<std::vector<std::uint8_t>>(*memory);
  result.view.data = result.memory->data();
  return result;
}

bool Tensor::only_view_changed(const std::vector<std::uint8_t>& before) const {
  std::vector<std::uint8_t> expected = before;
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t t = 0; t < tokens; ++t) {
        const std::int64_t from = offset(b, h, t);
        std::copy_n(memory->begin() + from, row_bytes(), expected.begin() + from);
      }
  return expected == *memory;
}

}  // namespace pbsattn::fuzz
