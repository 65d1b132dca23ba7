// Packs queries for the tiles; the layouts are in pipeline.h.
#pragma once

#include "cpu/amx/units.h"

namespace pbsattn::cpu::amx {
namespace {

template <DType T>
void pack_queries(const Rows& rows, int count, int head_dim, void* packed) {
  auto* out = static_cast<std::byte*>(packed);
  for (int d = 0; d < head_dim; d += 32) {
    for (int half = 0; half < 2; ++half, out += tile_bytes) {
      const auto part = [&](int query, int first) __attribute__((always_inline)) {
        const int left = query < count ? head_dim - first : 0;
        return left > 0 ? load_as_bf16<T>(rows.at(query), first, left) : U16{};
      };
      U32 in[lanes];
      U32 pairs[lanes];
      for (int i = 0; i < lanes; ++i) in[i] = in_sequence(part(half * lanes + i, d), part(half * lanes + i, d + lanes));
      transpose(in, pairs);
      for (int i = 0; i < lanes; ++i) u32_at(out + i * tile_row_bytes) = pairs[i];
    }
  }
}

inline void pack_queries(const Rows& rows, int count, int head_dim, void* packed) {
  switch (rows.dtype) {
    case DType::f32: return pack_queries<DType::f32>(rows, count, head_dim, packed);
    case DType::f16: return pack_queries<DType::f16>(rows, count, head_dim, packed);
    case DType::bf16: return pack_queries<DType::bf16>(rows, count, head_dim, packed);
  }
}

}  // namespace
}  // namespace pbsattn::cpu::amx
