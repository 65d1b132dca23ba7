/* The structs and enumerators of pbsattn.h as programs have them that were compiled with version 0.2. Never edited: a
 * later version with more in it gets a file of its own beside this one. */
#ifndef PBSATTN_TESTS_CAPI_ABI_0_2_H
#define PBSATTN_TESTS_CAPI_ABI_0_2_H

#include <stddef.h>
#include <stdint.h>

typedef struct abi_0_2_shape {
  size_t struct_size;
  int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim;
} abi_0_2_shape;

typedef struct abi_0_2_options {
  size_t struct_size;
  int32_t permutation, order_scope, score, keep, correction, rules, precision, fallback;
  float top_p, threshold, floor_top_p;
  int32_t top_k;
  float density;
  int32_t vertical, slash;
  float tau;
  int32_t min_budget, block, segment, dense_last_rows, sink_blocks, local_blocks;
  float scale, expected_density;
} abi_0_2_options;

typedef struct abi_0_2_device {
  size_t struct_size;
  int32_t kind, threads, index, reserved;
} abi_0_2_device;

typedef struct abi_0_2_view {
  size_t struct_size;
  void* data;
  int64_t batch_stride, head_stride, token_stride;
  int32_t dtype, reserved;
} abi_0_2_view;

typedef struct abi_0_2_stats {
  size_t struct_size;
  int64_t visited_blocks, causal_blocks;
  double permute_seconds, select_seconds, attend_seconds;
} abi_0_2_stats;

typedef struct abi_0_2_run {
  size_t struct_size;
  const void *q, *k, *v, *out; /* abi_0_2_view */
  float* lse;
  void* workspace;
  size_t workspace_size;
  void* stream;
  abi_0_2_stats* stats;
} abi_0_2_run;

/* clang-format off */
/* X(struct, field) of all but struct_size, which is the first of each. */
#define ABI_0_2_FIELDS(X)                                                                                              \
  X(shape, batch) X(shape, q_heads) X(shape, kv_heads) X(shape, q_len) X(shape, kv_len) X(shape, head_dim)             \
  X(options, permutation) X(options, order_scope) X(options, score) X(options, keep) X(options, correction)            \
  X(options, rules) X(options, precision) X(options, fallback) X(options, top_p) X(options, threshold)                 \
  X(options, floor_top_p) X(options, top_k) X(options, density) X(options, vertical) X(options, slash)                 \
  X(options, tau) X(options, min_budget) X(options, block) X(options, segment) X(options, dense_last_rows)             \
  X(options, sink_blocks) X(options, local_blocks) X(options, scale) X(options, expected_density)                      \
  X(device, kind) X(device, threads) X(device, index) X(device, reserved)                                              \
  X(view, data) X(view, batch_stride) X(view, head_stride) X(view, token_stride) X(view, dtype) X(view, reserved)      \
  X(stats, visited_blocks) X(stats, causal_blocks) X(stats, permute_seconds) X(stats, select_seconds)                  \
  X(stats, attend_seconds)                                                                                             \
  X(run, q) X(run, k) X(run, v) X(run, out) X(run, lse) X(run, workspace) X(run, workspace_size) X(run, stream)        \
  X(run, stats)

/* X(enumerator, value) */
#define ABI_0_2_ENUMERATORS(X)                                                                                         \
  X(PBSATTN_OK, 0) X(PBSATTN_INVALID_ARGUMENT, 1) X(PBSATTN_UNSUPPORTED, 2) X(PBSATTN_OUT_OF_MEMORY, 3)                \
  X(PBSATTN_INTERNAL, 4)                                                                                               \
  X(PBSATTN_F32, 0) X(PBSATTN_F16, 1) X(PBSATTN_BF16, 2)                                                               \
  X(PBSATTN_PERMUTATION_NONE, 0) X(PBSATTN_PERMUTATION_LAST_QUERIES, 1)                                                \
  X(PBSATTN_ORDER_QUERY_HEAD, 0) X(PBSATTN_ORDER_KV_HEAD, 1)                                                           \
  X(PBSATTN_SCORE_NONE, 0) X(PBSATTN_SCORE_MEAN_POOL, 1) X(PBSATTN_SCORE_PER_QUERY, 2)                                 \
  X(PBSATTN_SCORE_ANTIDIAGONAL, 3) X(PBSATTN_SCORE_ANTIDIAGONAL_CAUSAL, 4) X(PBSATTN_SCORE_EXACT, 5)                   \
  X(PBSATTN_SCORE_MEAN_POOL_CAUSAL, 6) X(PBSATTN_SCORE_SAMPLED, 7) X(PBSATTN_SCORE_ENERGY, 8)                          \
  X(PBSATTN_SCORE_DUAL_BAND, 9) X(PBSATTN_SCORE_VERTICAL_SLASH, 10) X(PBSATTN_SCORE_FLEXIBLE, 11)                      \
  X(PBSATTN_KEEP_ALL, 0) X(PBSATTN_KEEP_TOP_P, 1) X(PBSATTN_KEEP_THRESHOLD, 2) X(PBSATTN_KEEP_RELATIVE, 3)             \
  X(PBSATTN_KEEP_TOP_K, 4) X(PBSATTN_KEEP_DENSITY, 5) X(PBSATTN_KEEP_NONE, 6) X(PBSATTN_KEEP_VERTICAL_SLASH, 7)        \
  X(PBSATTN_KEEP_COVERAGE, 8)                                                                                          \
  X(PBSATTN_CORRECTION_NONE, 0) X(PBSATTN_CORRECTION_MEAN, 1)                                                          \
  X(PBSATTN_RULES_REFERENCE_CODE, 0) X(PBSATTN_RULES_PAPER, 1)                                                         \
  X(PBSATTN_PRECISION_AUTOMATIC, 0) X(PBSATTN_PRECISION_F32, 1) X(PBSATTN_PRECISION_BF16, 2)                           \
  X(PBSATTN_FALLBACK_NEVER, 0) X(PBSATTN_FALLBACK_WHEN_FASTER, 1)                                                      \
  X(PBSATTN_DEVICE_CPU, 0) X(PBSATTN_DEVICE_REFERENCE, 1) X(PBSATTN_DEVICE_CUDA, 2)
/* clang-format on */

#endif
