// Tensor maps for the copy engine.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn::cuda {

// What one copy moves: `columns` elements (whole panels, sm90/panel.h) of each of `tokens` tokens, `token_step` apart.
struct Box {
  int tokens, columns;
  int token_step = 1;  // up to 8, and tokens * token_step up to 256
  int panel = 0;       // columns of a panel: 64, 32, or 0, that of the tensor's width
};

// Describes a view of 16-bit elements as rank 5, (element of a panel, token, panel, head, batch), read or
// written in boxes that lie in shared memory as [panel][token][element], swizzled.
// Returns false if the driver refuses: data not 16-byte aligned, strides no multiples of 8 elements, or no driver.
bool make_tensor_map(CUtensorMap& map, const void* data, DType dtype, std::int64_t batch_stride,
                     std::int64_t head_stride, std::int64_t token_stride, std::int64_t batch, std::int64_t heads,
                     std::int64_t tokens, std::int64_t head_dim, Box box);

template <class View>
bool make_tensor_map(CUtensorMap& map, const View& view, std::int64_t batch, std::int64_t heads, std::int64_t tokens,
                     std::int64_t head_dim, Box box) {
  return make_tensor_map(map, view.data, view.dtype, view.batch_stride, view.head_stride, view.token_stride, batch,
                         heads, tokens, head_dim, box);
}
// Does the same in boxes of whole tokens.
template <class View>
bool make_tensor_map(CUtensorMap& map, const View& view, std::int64_t batch, std::int64_t heads, std::int64_t tokens,
                     std::int64_t head_dim, int box_tokens) {
  return make_tensor_map(map, view, batch, heads, tokens, head_dim, {box_tokens, static_cast<int>(head_dim)});
}

}  // namespace pbsattn::cuda
