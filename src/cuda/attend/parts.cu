#include "cuda/attend/parts.h"

#include <algorithm>

#include "cuda/attend/attend.h"
#include "cuda/attend/merger.cuh"
#include "cuda/geometry.cuh"
#include "cuda/limits.h"
#include "cuda/sm90/elements.cuh"
#include "cuda/sm90/launch.h"

namespace pbsattn::cuda {
namespace {

constexpr int threads = 256;
constexpr int queries_at_once = 32;  // of a thread block
constexpr std::int64_t part_alignment = 256;

struct MergeParams {
  RowGrid grid;
  RowParts parts;
  PartOutputs from;
  View out;
  float* lse;  // null: not wanted
  std::int64_t lse_batch_stride;
};

// A thread block merges 32 queries of a row, each thread 8 columns at a time.
template <class T, int head_dim_v>
__global__ void __launch_bounds__(threads) merge_parts(const __grid_constant__ MergeParams p) {
  constexpr int chunks = head_dim_v / 8;
  const int cut = static_cast<int>(blockIdx.x);  // [head][row]
  const int head = cut / p.parts.rows;
  const int row = p.grid.rows - p.parts.rows + cut % p.parts.rows;
  const int diagonal = p.grid.diagonal(row);
  const Span present = p.grid.queries_of(diagonal);
  const int batch = head / p.grid.q_heads;
  const int head_of_batch = head % p.grid.q_heads;
  const std::int64_t first = std::int64_t{cut} * p.parts.each * block_tokens;  // of the parts' queries
  wait_for_earlier_kernels();
  for (int i = static_cast<int>(threadIdx.x); i < queries_at_once * chunks; i += threads) {
    const int token = static_cast<int>(blockIdx.y) * queries_at_once + i / chunks;
    const int chunk = i % chunks;
    if (token < present.begin || token >= present.end) continue;
    float sums[8] = {};
    float lse = -INFINITY;
    for (int part = 0; part < p.parts.each; ++part) {
      const std::int64_t at = first + part * block_tokens + token;
      const Merger merger(lse, p.from.lse[at]);
      const uint4 packed = static_cast<const uint4*>(p.from.out)[at * chunks + chunk];
      float of_part[8] = {};
      add_to<T>(of_part, packed);
#pragma unroll
      for (int c = 0; c < 8; ++c) sums[c] = merger.a * sums[c] + merger.b * of_part[c];
      lse = merger.lse;
    }
    const int query = p.grid.first_query(diagonal) + token;
    auto* const to = static_cast<T*>(p.out.data) + batch * p.out.batch_stride + head_of_batch * p.out.head_stride +
                     query * p.out.token_stride + chunk * 8;
    *reinterpret_cast<uint4*>(to) = make_uint4(pack<T>(sums[0], sums[1]), pack<T>(sums[2], sums[3]),
                                               pack<T>(sums[4], sums[5]), pack<T>(sums[6], sums[7]));
    if (p.lse != nullptr && chunk == 0)
      p.lse[batch * p.lse_batch_stride + std::int64_t{head_of_batch} * p.grid.q_len + query] = lse;
  }
}

}  // namespace

RowParts row_parts(const Geometry& call, std::int64_t dense_rows) {
  constexpr std::int64_t most_tiles = 8 * 132;
  constexpr std::int64_t least_blocks = 32;  // of a part
  const std::int64_t rows = std::min(dense_rows, call.rows());
  const std::int64_t tiles = call.shape.batch * call.shape.q_heads * call.rows();
  if (rows <= 0 || call.windowed() || !takes_parts(call.shape.head_dim)) return {};
  const std::int64_t shortest = call.diagonal(call.rows() - rows) + 1;
  const std::int64_t each = std::min(ceil_div(most_tiles, tiles), shortest / least_blocks);
  if (each < 2) return {};
  return {.rows = static_cast<int>(rows), .each = static_cast<int>(each)};
}

std::size_t part_bytes(const RowParts& parts, const Geometry& pass) {
  const std::int64_t queries = parts.count(pass.shape.batch * pass.shape.q_heads) * block_tokens;
  return static_cast<std::size_t>(queries * (value_dim(pass.shape) * 2 + static_cast<std::int64_t>(sizeof(float))) +
                                  part_alignment);
}

PartOutputs part_outputs(const RowParts& parts, const Geometry& pass, void* memory) {
  const std::int64_t queries = parts.count(pass.shape.batch * pass.shape.q_heads) * block_tokens;
  auto* const out = static_cast<std::byte*>(memory);
  return {.out = out, .lse = reinterpret_cast<float*>(out + queries * value_dim(pass.shape) * 2)};
}

cudaError_t merge_row_parts(const AttendArgs& args, const PartOutputs& from, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const MergeParams params{.grid = RowGrid(g, g.shape.kv_heads),
                           .parts = args.parts,
                           .from = from,
                           .out = args.outputs.out,
                           .lse = args.outputs.lse,
                           .lse_batch_stride = args.lse_batch_stride};
  return dispatch(args.inputs.q.dtype, g.shape, [&](auto element, auto keys, auto values) {
    if constexpr (takes_parts(keys())) {
      const dim3 grid(static_cast<unsigned>(params.grid.heads * args.parts.rows), block_tokens / queries_at_once);
      return launch(merge_parts<decltype(element), values()>, grid, threads, 0, stream, Start::early, params);
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

}  // namespace pbsattn::cuda
