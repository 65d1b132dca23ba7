// The rules every backend shares. A limit lives here once.
#pragma once

#include "pbsattn/pbsattn.hpp"

namespace pbsattn {

inline constexpr std::int64_t max_kv_len = std::int64_t{1} << 30;  // slots of a permutation are int32
inline constexpr std::int64_t max_heads = 1 << 16;

// Throw Error(invalid_argument) naming value, rule and way out.
void validate(const Options& options);
void validate(const Shape& shape);
void validate(std::span<const Options> heads, const Shape& shape);  // one of each query head
void validate(const Inputs& inputs, const Outputs& outputs, const Shape& shape);

std::size_t size_of(DType dtype);

}  // namespace pbsattn
