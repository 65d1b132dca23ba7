// The rules every backend shares. A limit lives here once.
#pragma once

#include "core/geometry.h"
#include "pbsattn/pbsattn.hpp"

namespace pbsattn {

inline constexpr std::int64_t max_kv_len = std::int64_t{1} << 30;  // slots of a permutation are int32
inline constexpr std::int64_t max_heads = 1 << 16;
inline constexpr std::int64_t page_step = 16;  // of which pages' sizes are multiples
inline constexpr int max_threads = 1 << 13;    // as many processors as Linux can be built for

// Throw Error(invalid_argument) naming value, rule and way out.
void validate(const Options& options);
void validate(const Shape& shape);
void validate(std::span<const Options> heads, const Shape& shape);  // one of each query head
void validate(const Inputs& inputs, const Outputs& outputs, const Shape& shape);
// What a plan's permutation takes besides keys, by its options: pointers, sizes and strides.
void validate_cache_tokens(std::int64_t tokens);
void validate_order(const Inputs& inputs, const Outputs& outputs, Permutation permutation, const Geometry& geometry);
// And contents, where the host can read them: weights are finite, known orders move keys inside their segments, tables
// name pages that there are.
void validate_contents(const Inputs& inputs, const Outputs& outputs, const Geometry& geometry);
// What a run writes - out, lse, order, the cache and the part of the workspace that the plan uses - must lie apart from
// the rest, rows of out and of order from each other, and pages too. Of checked views.
void refuse_overlaps(const Inputs& inputs, const Outputs& outputs, std::span<const std::byte> workspace,
                     const Geometry& geometry);

std::size_t size_of(DType dtype);

}  // namespace pbsattn
