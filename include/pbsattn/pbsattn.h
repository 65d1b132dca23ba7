/* C interface of pbsattn: the same plan, run and tables as pbsattn.hpp, for bindings.
 *
 * Every function that can fail returns a pbsattn_status. On anything but PBSATTN_OK,
 * pbsattn_last_error() gives the calling thread's one-line message, valid until that thread's next
 * call. No C++ exception crosses this interface. Enumerators have the values of their C++ namesakes.
 *
 * Every struct begins with struct_size, which the caller sets to the struct's sizeof, also where the library fills it:
 *
 *     pbsattn_options options = {.struct_size = sizeof options};
 *
 * From 0.2.0 on structs and enumerators only grow at their end, so a program keeps working with a newer library, which
 * takes the defaults for the fields that the program doesn't know. A newer program works with an older library as long
 * as it leaves the fields zero that the library doesn't know; others are refused. While the version is 0.x, the soname
 * of the shared library follows the minor version: libpbsattn.so.0.2. */
#ifndef PBSATTN_PBSATTN_H
#define PBSATTN_PBSATTN_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define PBSATTN_API
#else
#define PBSATTN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum pbsattn_status {
  PBSATTN_OK = 0,
  PBSATTN_INVALID_ARGUMENT = 1,
  PBSATTN_UNSUPPORTED = 2,
  PBSATTN_OUT_OF_MEMORY = 3,
  PBSATTN_INTERNAL = 4
} pbsattn_status;

typedef enum pbsattn_dtype { PBSATTN_F32 = 0, PBSATTN_F16 = 1, PBSATTN_BF16 = 2 } pbsattn_dtype;

typedef enum pbsattn_permutation {
  PBSATTN_PERMUTATION_NONE = 0,
  PBSATTN_PERMUTATION_LAST_QUERIES = 1,
  PBSATTN_PERMUTATION_LEARNED = 2,
  PBSATTN_PERMUTATION_ARRIVAL = 3
} pbsattn_permutation;
typedef enum pbsattn_order_scope { PBSATTN_ORDER_QUERY_HEAD = 0, PBSATTN_ORDER_KV_HEAD = 1 } pbsattn_order_scope;
typedef enum pbsattn_block_score {
  PBSATTN_SCORE_NONE = 0,
  PBSATTN_SCORE_MEAN_POOL = 1,
  PBSATTN_SCORE_PER_QUERY = 2,
  PBSATTN_SCORE_ANTIDIAGONAL = 3,
  PBSATTN_SCORE_ANTIDIAGONAL_CAUSAL = 4,
  PBSATTN_SCORE_EXACT = 5,
  PBSATTN_SCORE_MEAN_POOL_CAUSAL = 6,
  PBSATTN_SCORE_SAMPLED = 7,
  PBSATTN_SCORE_ENERGY = 8,
  PBSATTN_SCORE_DUAL_BAND = 9,
  PBSATTN_SCORE_VERTICAL_SLASH = 10,
  PBSATTN_SCORE_FLEXIBLE = 11,
  PBSATTN_SCORE_TWO_STEP = 12
} pbsattn_block_score;
typedef enum pbsattn_keep_rule {
  PBSATTN_KEEP_ALL = 0,
  PBSATTN_KEEP_TOP_P = 1,
  PBSATTN_KEEP_THRESHOLD = 2,
  PBSATTN_KEEP_RELATIVE = 3,
  PBSATTN_KEEP_TOP_K = 4,
  PBSATTN_KEEP_DENSITY = 5,
  PBSATTN_KEEP_NONE = 6,
  PBSATTN_KEEP_VERTICAL_SLASH = 7,
  PBSATTN_KEEP_COVERAGE = 8
} pbsattn_keep_rule;
typedef enum pbsattn_correction { PBSATTN_CORRECTION_NONE = 0, PBSATTN_CORRECTION_MEAN = 1 } pbsattn_correction;
typedef enum pbsattn_rules { PBSATTN_RULES_REFERENCE_CODE = 0, PBSATTN_RULES_PAPER = 1 } pbsattn_rules;
typedef enum pbsattn_precision {
  PBSATTN_PRECISION_AUTOMATIC = 0,
  PBSATTN_PRECISION_F32 = 1,
  PBSATTN_PRECISION_BF16 = 2
} pbsattn_precision;
typedef enum pbsattn_fallback { PBSATTN_FALLBACK_NEVER = 0, PBSATTN_FALLBACK_WHEN_FASTER = 1 } pbsattn_fallback;
typedef enum pbsattn_rope_pairs { PBSATTN_PAIRS_HALVES = 0, PBSATTN_PAIRS_NEIGHBOURS = 1 } pbsattn_rope_pairs;
typedef enum pbsattn_device_kind {
  PBSATTN_DEVICE_CPU = 0,
  PBSATTN_DEVICE_REFERENCE = 1,
  PBSATTN_DEVICE_CUDA = 2
} pbsattn_device_kind;

/* Sizes of one call; see pbsattn::Shape. */
typedef struct pbsattn_shape {
  size_t struct_size;
  int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim;
  int64_t head_dim_v; /* of values and outputs; 0: head_dim */
} pbsattn_shape;

/* A method; see pbsattn::Options. Fill it with pbsattn_method() and change what you need. */
typedef struct pbsattn_options {
  size_t struct_size;
  int32_t permutation; /* pbsattn_permutation */
  int32_t order_scope; /* pbsattn_order_scope */
  int32_t score;       /* pbsattn_block_score */
  int32_t keep;        /* pbsattn_keep_rule */
  int32_t correction;  /* pbsattn_correction */
  int32_t rules;       /* pbsattn_rules */
  int32_t precision;   /* pbsattn_precision */
  int32_t fallback;    /* pbsattn_fallback */
  float top_p;
  float threshold;
  float floor_top_p;
  int32_t top_k;
  float density;
  int32_t vertical;
  int32_t slash;
  float tau;
  int32_t min_budget;
  int32_t block;
  int32_t segment;
  int32_t dense_last_rows;
  int32_t sink_blocks;
  int32_t local_blocks;
  float scale;
  float expected_density;
  float softcap;
  int32_t window;
  float threshold_tokens;
  int32_t two_step_queries;
  int32_t two_step_exact;
  int32_t two_step_reach;
} pbsattn_options;

typedef struct pbsattn_device {
  size_t struct_size;
  int32_t kind;     /* pbsattn_device_kind */
  int32_t threads;  /* 0: one for each processor this process may use */
  int32_t index;    /* of a CUDA device */
  int32_t reserved; /* 0 */
} pbsattn_device;

/* A [batch][head][token][head_dim] tensor, [head_dim_v] of values and outputs; strides count elements, the last axis
 * is contiguous. `data` of an input is only read. */
typedef struct pbsattn_view {
  size_t struct_size;
  void* data;
  int64_t batch_stride, head_stride, token_stride;
  int32_t dtype;    /* pbsattn_dtype */
  int32_t reserved; /* 0 */
} pbsattn_view;

typedef struct pbsattn_stats {
  size_t struct_size;
  int64_t visited_blocks, causal_blocks;
  double permute_seconds, select_seconds, attend_seconds;
} pbsattn_stats;

/* What PBSATTN_PERMUTATION_LEARNED goes by; see pbsattn::OrderWeights. */
typedef struct pbsattn_order_weights {
  size_t struct_size;
  const float* values; /* [kv_heads][head_dim / 2 + head_dim] */
  size_t count;        /* of values */
  int32_t pairs;       /* pbsattn_rope_pairs */
  int32_t reserved;    /* 0 */
} pbsattn_order_weights;

/* The orders of PBSATTN_PERMUTATION_ARRIVAL, kept from call to call; see pbsattn::KeyOrder. */
typedef struct pbsattn_key_order {
  size_t struct_size;
  int32_t* data; /* [batch][kv_heads][tokens of complete segments] */
  int64_t batch_stride, head_stride;
  int64_t known; /* tokens whose order is read; the others' is written */
} pbsattn_key_order;

/* Where keys and values lie that are in pages; see pbsattn::Pages. The views of k and v are then
 * [page][kv_head][place][head_dim or head_dim_v], with batch_stride from page to page. */
typedef struct pbsattn_pages {
  size_t struct_size;
  const int32_t* table; /* [batch][ceil(kv_len / size)]: pages 0 .. count - 1 */
  int64_t batch_stride; /* of the table, in entries */
  int64_t size;         /* tokens of a page, a multiple of 16 */
  int64_t count;        /* pages of the cache */
} pbsattn_pages;

/* Keeps what plans make of a sequence's complete segments; see pbsattn::SegmentCache. */
typedef struct pbsattn_segment_cache pbsattn_segment_cache;

/* What one run reads and writes; see pbsattn::Plan::run. */
typedef struct pbsattn_run {
  size_t struct_size;
  const pbsattn_view *q, *k, *v, *out;
  float* lse;      /* [batch][q_heads][q_len]; may be NULL */
  void* workspace; /* of workspace_size bytes, at least pbsattn_plan_workspace_size() */
  size_t workspace_size;
  void* stream;                               /* of the plan's device: a cudaStream_t, NULL for the default stream */
  pbsattn_stats* stats;                       /* filled if not NULL */
  const float* sinks;                         /* [q_heads], see pbsattn::Inputs; may be NULL */
  const pbsattn_order_weights* order_weights; /* of learned orders, else NULL is fine */
  const pbsattn_key_order* order;             /* of orders of arrival; may be NULL where none is known */
  const pbsattn_pages* pages;                 /* of k and v; NULL where they lie contiguous */
  pbsattn_segment_cache* cache;               /* may be NULL */
  int64_t cache_valid;                        /* tokens, the first, that are as in the cache's last run */
} pbsattn_run;

typedef struct pbsattn_plan pbsattn_plan;

/* Returns the library's version, "major.minor.patch". */
PBSATTN_API const char* pbsattn_version(void);

/* Returns the calling thread's last error message in one line; "" if there was none. */
PBSATTN_API const char* pbsattn_last_error(void);

/* Returns a name of the methods table: index 0, 1, ... until NULL. */
PBSATTN_API const char* pbsattn_method_name(size_t index);

/* Fills *options with those of a method, which may bring some of its own: "pbs", or "pbs:top_p=0.95:segment=512".
 * Refused, as in the functions below that fill options, where the method sets what an older program's options have no
 * field for. */
PBSATTN_API pbsattn_status pbsattn_method(const char* name, pbsattn_options* options);

/* Sets one option by its name in pbsattn::Options, from text: "top_p" and "0.8", "keep" and "top_k". Refuses a name or
 * a value that there isn't; whether a number is in its range pbsattn_plan_create() checks. */
PBSATTN_API pbsattn_status pbsattn_set_option(pbsattn_options* options, const char* name, const char* value);

/* Checks and plans; workspace_cap is in bytes, SIZE_MAX for no cap. *plan is NULL on failure. */
PBSATTN_API pbsattn_status pbsattn_plan_create(const pbsattn_options* options, const pbsattn_shape* shape,
                                               const pbsattn_device* device, size_t workspace_cap, pbsattn_plan** plan);
/* Plans with options of each of the shape's q_heads query heads, which may differ as pbsattn::Plan::create says. All
 * have the struct_size of the first. */
PBSATTN_API pbsattn_status pbsattn_plan_create_by_head(const pbsattn_options* heads, const pbsattn_shape* shape,
                                                       const pbsattn_device* device, size_t workspace_cap,
                                                       pbsattn_plan** plan);

/* Frees a plan; NULL is fine. */
PBSATTN_API void pbsattn_plan_destroy(pbsattn_plan* plan);

/* Returns the bytes of workspace that a run needs; 0 for NULL. */
PBSATTN_API size_t pbsattn_plan_workspace_size(const pbsattn_plan* plan);

/* Returns the code path of inputs that are not all bf16, which lives as long as the plan; "" for NULL. */
PBSATTN_API const char* pbsattn_plan_path(const pbsattn_plan* plan);

/* Fills *options with the plan's, scale and fallback resolved. */
PBSATTN_API pbsattn_status pbsattn_plan_options(const pbsattn_plan* plan, pbsattn_options* options);

/* Sets *size to the bytes of a cache for this plan and those of other lengths up to `tokens`, 0 for one that uses none.
 */
PBSATTN_API pbsattn_status pbsattn_plan_cache_size(const pbsattn_plan* plan, int64_t tokens, size_t* size);

/* Makes a cache in memory of the caller's, at any alignment, which must outlive it. *cache is NULL on failure. */
PBSATTN_API pbsattn_status pbsattn_segment_cache_create(void* memory, size_t size, pbsattn_segment_cache** cache);

/* Frees a cache, but not its memory; NULL is fine. */
PBSATTN_API void pbsattn_segment_cache_destroy(pbsattn_segment_cache* cache);

/* Returns how many of the sequence's first tokens it keeps; 0 for NULL. */
PBSATTN_API int64_t pbsattn_segment_cache_tokens(const pbsattn_segment_cache* cache);

/* Computes out, and lse and stats where they aren't NULL. On the CPU it returns when done; on a CUDA device it enqueues
 * and returns, or with stats waits for its work. */
PBSATTN_API pbsattn_status pbsattn_plan_run(const pbsattn_plan* plan, const pbsattn_run* run);

#ifdef __cplusplus
}
#endif

#endif /* PBSATTN_PBSATTN_H */
