#include "reference/head.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "reference/numbers.h"

namespace pbsattn::reference {
namespace {

Matrix load_matrix(const ConstView& view, std::int64_t batch, std::int64_t head, std::int64_t tokens,
                   std::int64_t head_dim, const Pages& pages = {}) {
  const bool paged = pages.table != nullptr;
  Matrix matrix(tokens, head_dim);
  for (std::int64_t n = 0; n < tokens; ++n) {
    const std::int64_t part = paged ? pages.table[batch * pages.batch_stride + n / pages.size] : batch;
    const std::int64_t place = paged ? n % pages.size : n;
    const std::int64_t row = part * view.batch_stride + head * view.head_stride + place * view.token_stride;
    for (std::int64_t d = 0; d < head_dim; ++d) matrix[n][d] = load(view.dtype, view.data, row + d);
  }
  return matrix;
}

}  // namespace

Head load_head(const Inputs& inputs, const Geometry& geometry, std::int64_t batch, std::int64_t q_head) {
  const Shape& shape = geometry.shape;
  const std::int64_t kv_head = geometry.kv_head(q_head);
  Head head{.q = load_matrix(inputs.q, batch, q_head, shape.q_len, shape.head_dim),
            .k = load_matrix(inputs.k, batch, kv_head, shape.kv_len, shape.head_dim, inputs.pages),
            .v = load_matrix(inputs.v, batch, kv_head, shape.kv_len, value_dim(shape), inputs.pages),
            .q_dtype = inputs.q.dtype,
            .k_dtype = inputs.k.dtype,
            .v_dtype = inputs.v.dtype};
  if (inputs.sinks.empty()) return head;
  constexpr float largest = 2.3e38F;  // as which larger ones count
  const float sink = inputs.sinks[q_head];
  head.sink = std::isfinite(sink) ? std::clamp(sink, -largest, largest) : sink;
  return head;
}

double Logits::operator()(double product) const {
  const double logit = product * scale;
  return softcap == 0 ? logit : softcap * std::tanh(logit / softcap);
}

double dot(std::span<const double> a, std::span<const double> b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

void softmax(std::span<double> logits) {
  double max = -std::numeric_limits<double>::infinity();
  for (const double x : logits) max = std::max(max, x);
  double sum = 0;
  for (double& x : logits) sum += x = std::exp(x - max);
  for (double& x : logits) x /= sum;
}

}  // namespace pbsattn::reference
