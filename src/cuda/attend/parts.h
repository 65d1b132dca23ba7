// Long rows in parts.
//
// In a chunk that is short beside the keys before it, the last rows, which list every block, would each keep one thread
// block busy long after all others are done. So their lists are cut, each part is a tile of its own with outputs and
// log-sum-exps of its own, and a kernel after attend merges them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/geometry.h"

namespace pbsattn::cuda {

struct AttendArgs;

// The last `rows` rows of each head are worked in `each` parts.
struct RowParts {
  int rows = 0;
  int each = 1;

  // Returns how many parts `heads` heads have.
  std::int64_t count(std::int64_t heads) const { return heads * rows * each; }
};

// Tells whether kernels of keys so wide take rows in parts: those whose outputs the copy engine stores.
constexpr bool takes_parts(std::int64_t head_dim) {
  return head_dim <= 128;
}

// Returns how a call's rows are cut, of which the last `dense_rows` are dense. That hangs on the whole call's shape
// alone, so that neither the heads of a pass nor the device change a bit. A part is no longer than what each of 132
// multiprocessors has to do where an eighth of the blocks is visited, unless it had fewer than 32 blocks then. In calls
// of more than 8 x 132 tiles no row is longer than that, and none is cut.
RowParts row_parts(const Geometry& call, std::int64_t dense_rows);

// Where parts are left: [head][row][part] of the pass, normalised as if they were all of a row's attention.
struct PartOutputs {
  void* out = nullptr;   // [part][128][head_dim_v], of the outputs' type
  float* lse = nullptr;  // [part][128]
};

// Returns the bytes of the parts of a pass, and where they are in memory of that size, 256-byte aligned.
std::size_t part_bytes(const RowParts& parts, const Geometry& pass);
PartOutputs part_outputs(const RowParts& parts, const Geometry& pass, void* memory);

// Enqueues the merging of parts to outputs and log-sum-exps.
cudaError_t merge_row_parts(const AttendArgs& args, const PartOutputs& from, cudaStream_t stream);

}  // namespace pbsattn::cuda
