// Means of blocks of tokens, a warp for each block: every lane adds 8 columns of every other (or fourth) row.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/stages.h"

namespace pbsattn::cuda {

// One tensor's rows to be pooled: block `row` of a head holds tokens [first + row * 128, + 128) cut to [0, tokens).
struct PoolArgs {
  const void* data;
  std::int64_t batch_stride, head_stride, token_stride;
  std::int64_t heads, rows;
  std::int64_t first, tokens;  // first <= 0: where a head's first block begins, relative to its first token
  bool divide_by_count;        // by the tokens present, else by 128
  void* out;                   // [batch][heads][rows][head_dim]
};

inline PoolArgs pool_queries(const PermuteArgs& args) {
  const Geometry& g = args.geometry;
  const ConstView& q = args.inputs.q;
  return {q.data,
          q.batch_stride,
          q.head_stride,
          q.token_stride,
          g.shape.q_heads,
          g.rows(),
          g.first_row() * block_tokens - g.q_offset(),
          g.shape.q_len,
          args.rules == Rules::paper,
          args.pooled_q};
}

template <class T, int head_dim>
__device__ void pool_row(const PoolArgs& args, std::int64_t item, int lane) {
  constexpr int chunks = head_dim / 8;         // lanes of one token
  constexpr int tokens_at_once = 32 / chunks;  // of one load of the warp
  constexpr int in_flight = 16;                // loads of a lane
  const std::int64_t row = item % args.rows;
  const std::int64_t head = item / args.rows % args.heads;
  const std::int64_t batch = item / args.rows / args.heads;
  const std::int64_t begin = max(args.first + row * block_tokens, std::int64_t{0});
  const int count = static_cast<int>(min(args.first + (row + 1) * block_tokens, args.tokens) - begin);
  const T* source = static_cast<const T*>(args.data) + batch * args.batch_stride + head * args.head_stride +
                    (begin + lane / chunks) * args.token_stride + lane % chunks * 8;

  float sum[8] = {};
#pragma unroll 1
  for (int token = 0; token < count; token += in_flight * tokens_at_once) {
    uint4 chunk[in_flight];
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      const int t = token + i * tokens_at_once;
      chunk[i] = t + lane / chunks < count ? __ldg(reinterpret_cast<const uint4*>(source + t * args.token_stride))
                                           : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < in_flight; ++i) add_to<T>(sum, chunk[i]);
  }
  add_across_lanes<chunks>(sum);
  if (lane < chunks) {
    const float divisor = static_cast<float>(args.divide_by_count ? count : block_tokens);
    uint4 mean;
    mean.x = pack<T>(sum[0] / divisor, sum[1] / divisor);
    mean.y = pack<T>(sum[2] / divisor, sum[3] / divisor);
    mean.z = pack<T>(sum[4] / divisor, sum[5] / divisor);
    mean.w = pack<T>(sum[6] / divisor, sum[7] / divisor);
    reinterpret_cast<uint4*>(static_cast<T*>(args.out) + item * head_dim)[lane] = mean;
  }
}

}  // namespace pbsattn::cuda
