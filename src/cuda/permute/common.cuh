// What both kernels of permute work with.
#pragma once

#include <cuda_runtime.h>

#include "cuda/geometry.cuh"
#include "cuda/memory/kv_rows.cuh"
#include "cuda/permute/permute.h"
#include "cuda/permute/pool.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/online_sum.cuh"
#include "cuda/sm90/prologue.cuh"
#include "cuda/sm90/soft_cap.cuh"
#include "cuda/sm90/swizzled_tile.cuh"

namespace pbsattn::cuda {

struct PermuteParams {
  ConstView scoring_queries, k, v;
  PageTable pages;  // of k and v
  RowGrid grid;
  int batch;
  int queries;  // that score, 1 .. 128
  int segment;
  std::int64_t permuted_len;
  std::int64_t known;  // keys whose order is: segments before are not reordered
  std::int64_t unit_keys;
  int units;
  float scale_log2;
  bool shared_order;  // one order for the query heads of a KV head
  PoolArgs pool_q;
  float2* statistics;  // [batch][q_heads][units][128]: Statistics of each scoring query
  LogSum* log_sums;    // [batch][q_heads][128]
  Permuted permuted;
  void* pooled_k;
};

}  // namespace pbsattn::cuda
