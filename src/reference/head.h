// What every stage of the definition is written in.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "core/geometry.h"
#include "pbsattn/pbsattn.hpp"

namespace pbsattn::reference {

struct Matrix {
  Matrix(std::int64_t row_count, std::int64_t column_count)
      : rows(row_count), columns(column_count), values(static_cast<std::size_t>(row_count * column_count)) {}

  std::span<double> operator[](std::int64_t row) {
    return std::span(values).subspan(static_cast<std::size_t>(row * columns), static_cast<std::size_t>(columns));
  }
  std::span<const double> operator[](std::int64_t row) const {
    return std::span(values).subspan(static_cast<std::size_t>(row * columns), static_cast<std::size_t>(columns));
  }

  std::int64_t rows;
  std::int64_t columns;
  std::vector<double> values;
};

// What one query head of one batch entry sees: q [q_len][head_dim], k [kv_len][head_dim], v [kv_len][head_dim_v].
struct Head {
  Matrix q, k, v;
  DType q_dtype = DType::f32;  // pooled queries and keys are rounded to the dtype they came in
  DType k_dtype = DType::f32;
  DType v_dtype = DType::f32;
  double sink = -std::numeric_limits<double>::infinity();  // logit of one more key, which has no value; -inf: none
};
Head load_head(const Inputs& inputs, const Geometry& geometry, std::int64_t batch, std::int64_t q_head);

// Turns a product of a query and a key, or of their means, into a logit.
struct Logits {
  explicit Logits(double factor, double cap = 0) : scale(factor), softcap(cap) {}
  explicit Logits(const Options& options) : Logits(options.scale, options.softcap) {}
  double operator()(double product) const;

  double scale;
  double softcap;  // 0: none
};

double dot(std::span<const double> a, std::span<const double> b);

// Turns logits into their softmax, in place; NaN throughout if one is NaN or +inf, or all are -inf.
void softmax(std::span<double> logits);

}  // namespace pbsattn::reference
