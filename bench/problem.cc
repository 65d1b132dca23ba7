#include "problem.h"

#include <bit>
#include <cmath>
#include <random>

namespace bench {
namespace {

// Float16 bits of a float32 within float16's normal range, rounded to nearest even.
std::uint16_t to_f16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000;
  const std::uint32_t magnitude = bits & 0x7FFFFFFF;
  constexpr std::uint32_t smallest_normal = 113U << 23;
  if (magnitude < smallest_normal) return static_cast<std::uint16_t>(sign);
  return static_cast<std::uint16_t>(sign | (magnitude - (112U << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace

Problem::Problem(pbsattn::Shape problem_shape, unsigned seed) : shape(problem_shape) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  q.resize(static_cast<std::size_t>(shape.q_len * shape.q_heads * shape.head_dim));
  k.resize(static_cast<std::size_t>(shape.kv_len * shape.kv_heads * shape.head_dim));
  v.resize(k.size());
  for (float& x : q) x = normal(generator);
  for (auto& x : k) x = to_f16(normal(generator));
  for (auto& x : v) x = to_f16(normal(generator));
}

void Problem::concentrate(float strength, unsigned seed) {
  constexpr float lean = 4;
  constexpr std::int64_t segment = 256;
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  const auto dim = static_cast<std::size_t>(shape.head_dim);
  for (std::size_t i = 0; i < q.size(); i += dim) q[i] += lean;
  std::vector<float> of_segment(static_cast<std::size_t>(shape.kv_heads));
  std::size_t i = 0;
  for (std::int64_t token = 0; token < shape.kv_len; ++token)
    for (float& along : of_segment) {
      if (token % segment == 0) along = normal(generator);
      k[i] = to_f16(strength * (along + normal(generator)));
      i += dim;
    }
  order_weights.assign(static_cast<std::size_t>(shape.kv_heads) * 3 * dim / 2, 0.0F);
  for (std::size_t j = dim / 2; j < order_weights.size(); j += 3 * dim / 2) order_weights[j] = 1;  // the keys' column
}

pbsattn::Inputs Problem::inputs() const {
  using pbsattn::DType;
  const std::int64_t d = shape.head_dim;
  const auto view = [&](const void* data, DType dtype, std::int64_t heads, std::int64_t tokens) {
    return pbsattn::ConstView{data, dtype, tokens * heads * d, d, heads * d};
  };
  return {.q = view(q.data(), DType::f32, shape.q_heads, shape.q_len),
          .k = view(k.data(), DType::f16, shape.kv_heads, shape.kv_len),
          .v = view(v.data(), DType::f16, shape.kv_heads, shape.kv_len),
          .order_weights = {.values = order_weights}};
}

Runner::Runner(const Problem& problem, const pbsattn::Options& options, const pbsattn::Device& device)
    : problem_(problem),
      plan_(pbsattn::Plan::create(options, problem.shape, device)),
      workspace_(plan_.workspace_size()),
      out_(problem.q.size()) {}

void Runner::operator()() {
  const auto& s = problem_.shape;
  const std::int64_t d = s.head_dim;
  plan_.run(problem_.inputs(), {.out = {out_.data(), pbsattn::DType::f32, s.q_len * s.q_heads * d, d, s.q_heads * d}},
            workspace_, &stats_);
}

double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0;
  double norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    error += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    norm += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(error / norm);
}

}  // namespace bench
