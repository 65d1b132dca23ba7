/* The C interface from C: plans, runs and checks numbers that can be worked out by hand. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

int failures = 0;

enum { tokens = 300, head_dim = 8 };

/* Every key is zero, so every query averages the values it sees: value t, column d, is t + d - 150, which bf16
 * holds too, and the mean of tokens 0 .. t is t / 2 + d - 150. */
static void dense_is_the_running_mean(int device_kind) {
  float* q = calloc(tokens * head_dim, sizeof(float));
  float* k = calloc(tokens * head_dim, sizeof(float));
  float* v = calloc(tokens * head_dim, sizeof(float));
  float* out = calloc(tokens * head_dim, sizeof(float));
  float* lse = calloc(tokens, sizeof(float));
  pbsattn_options options = {.struct_size = sizeof options};
  const pbsattn_shape shape = {sizeof shape, 1, 1, 1, tokens, tokens, head_dim, 0};
  const pbsattn_device device = {.struct_size = sizeof device, .kind = device_kind, .threads = 2};
  pbsattn_plan* plan = NULL;
  pbsattn_stats stats = {.struct_size = sizeof stats};
  int t, d;

  for (t = 0; t < tokens; ++t)
    for (d = 0; d < head_dim; ++d) v[t * head_dim + d] = (float)(t + d - 150);

  CHECK(pbsattn_method("pbs", &options) == PBSATTN_OK);
  CHECK(options.keep == PBSATTN_KEEP_TOP_P && options.permutation == PBSATTN_PERMUTATION_LAST_QUERIES);
  options.top_p = 1.0F;
  CHECK(pbsattn_plan_create(&options, &shape, &device, SIZE_MAX, &plan) == PBSATTN_OK);
  CHECK(strlen(pbsattn_plan_path(plan)) > 0);
  {
    const size_t size = pbsattn_plan_workspace_size(plan);
    void* workspace = malloc(size + 1);
    const float sink = 0;
    const pbsattn_view view = {.struct_size = sizeof view, .dtype = PBSATTN_F32, .token_stride = head_dim};
    pbsattn_view q_view = view, k_view = view, v_view = view, out_view = view;
    pbsattn_run run = {.struct_size = sizeof run,
                       .q = &q_view,
                       .k = &k_view,
                       .v = &v_view,
                       .out = &out_view,
                       .lse = lse,
                       .workspace = workspace,
                       .workspace_size = size,
                       .stats = &stats};
    q_view.data = q;
    k_view.data = k;
    v_view.data = v;
    out_view.data = out;
    CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_OK);
    CHECK(stats.visited_blocks == 6 && stats.causal_blocks == 6);
    for (t = 0; t < tokens; ++t) {
      CHECK(fabs(lse[t] - log(t + 1.0)) < 1e-5);
      for (d = 0; d < head_dim; ++d) CHECK(fabs(out[t * head_dim + d] - (t / 2.0 + d - 150)) < 1e-3);
    }
    /* A sink of 0 weighs as much as a key. */
    run.sinks = &sink;
    CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_OK);
    for (t = 0; t < tokens; ++t) {
      CHECK(fabs(lse[t] - log(t + 2.0)) < 1e-5);
      for (d = 0; d < head_dim; ++d)
        CHECK(fabs(out[t * head_dim + d] - (t / 2.0 + d - 150) * (t + 1.0) / (t + 2.0)) < 1e-3);
    }
    run.sinks = NULL;
    /* Pages of 16 tokens, the last first. */
    {
      enum { page = 16, pages = (tokens + page - 1) / page };
      float* const cache = calloc(pages * page * head_dim, sizeof(float));
      int32_t table[pages];
      pbsattn_pages paged = {.struct_size = sizeof paged, .table = table, .size = page, .count = pages};
      pbsattn_view cache_view = view;
      for (t = 0; t < tokens; ++t)
        memcpy(cache + ((pages - 1 - t / page) * page + t % page) * head_dim, v + t * head_dim,
               head_dim * sizeof(float));
      for (t = 0; t < pages; ++t) table[t] = pages - 1 - t;
      cache_view.data = cache;
      cache_view.batch_stride = page * head_dim;
      k_view.batch_stride = page * head_dim;
      k_view.data = calloc(pages * page * head_dim, sizeof(float));
      run.v = &cache_view;
      run.pages = &paged;
      CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_OK);
      for (t = 0; t < tokens; ++t)
        for (d = 0; d < head_dim; ++d) CHECK(fabs(out[t * head_dim + d] - (t / 2.0 + d - 150)) < 1e-3);
      table[3] = pages;
      CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_INVALID_ARGUMENT);
      CHECK(strstr(pbsattn_last_error(), "page table: page 19 at entry 3 of batch entry 0") != NULL);
      run.v = &v_view;
      run.pages = NULL;
      free(k_view.data);
      k_view.data = k;
      free(cache);
    }
    /* lse, stats and sinks may be NULL; q may not. */
    run.lse = NULL;
    run.stats = NULL;
    CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_OK);
    run.q = NULL;
    CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_INVALID_ARGUMENT);
    CHECK(strstr(pbsattn_last_error(), "q: null pointer") != NULL);
    run.q = &q_view;
    if (size > 0) {
      run.workspace_size = size - 1;
      CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_OUT_OF_MEMORY);
    }
    CHECK(pbsattn_plan_run(plan, NULL) == PBSATTN_INVALID_ARGUMENT);
    CHECK(pbsattn_plan_run(NULL, &run) == PBSATTN_INVALID_ARGUMENT);
    free(workspace);
  }
  pbsattn_plan_destroy(plan);
  free(q);
  free(k);
  free(v);
  free(out);
  free(lse);
}

static void errors_have_codes_and_messages(void) {
  pbsattn_options options = {.struct_size = sizeof options};
  pbsattn_shape shape = {sizeof shape, 1, 1, 1, 8, 8, 100, 0};
  const pbsattn_device cpu = {.struct_size = sizeof cpu}; /* with all its threads */
  pbsattn_plan* plan = (pbsattn_plan*)&options;

  CHECK(pbsattn_method("pbz", &options) == PBSATTN_INVALID_ARGUMENT);
  CHECK(strstr(pbsattn_last_error(), "\"pbs\"?") != NULL);
  CHECK(pbsattn_method("full", &options) == PBSATTN_OK);
  CHECK(strcmp(pbsattn_last_error(), "") == 0);
  CHECK(pbsattn_plan_create(&options, &shape, &cpu, SIZE_MAX, &plan) == PBSATTN_UNSUPPORTED);
  CHECK(plan == NULL);
  CHECK(strstr(pbsattn_last_error(), "head_dim 100") != NULL);
  CHECK(pbsattn_plan_create(NULL, &shape, &cpu, SIZE_MAX, &plan) == PBSATTN_INVALID_ARGUMENT);
  CHECK(pbsattn_plan_create(&options, &shape, &cpu, SIZE_MAX, NULL) == PBSATTN_INVALID_ARGUMENT);
  shape.head_dim = 64;
  options.softcap = NAN;
  CHECK(pbsattn_plan_create(&options, &shape, &cpu, SIZE_MAX, &plan) == PBSATTN_INVALID_ARGUMENT);
  CHECK(strstr(pbsattn_last_error(), "softcap nan: not a finite, positive number; 0 stands for none") != NULL);
  options.softcap = INFINITY;
  CHECK(pbsattn_plan_create(&options, &shape, &cpu, SIZE_MAX, &plan) == PBSATTN_INVALID_ARGUMENT);
  options.softcap = -1;
  CHECK(pbsattn_plan_create(&options, &shape, &cpu, SIZE_MAX, &plan) == PBSATTN_INVALID_ARGUMENT);
  options.softcap = 0;
  CHECK(pbsattn_plan_create(&options, &shape, &cpu, SIZE_MAX, &plan) == PBSATTN_OK);
  pbsattn_plan_destroy(plan);
  options.keep = 1000;
  CHECK(pbsattn_plan_create(&options, &shape, &cpu, SIZE_MAX, &plan) == PBSATTN_INVALID_ARGUMENT);
  pbsattn_plan_destroy(NULL);
  CHECK(pbsattn_plan_workspace_size(NULL) == 0);
  CHECK(strcmp(pbsattn_plan_path(NULL), "") == 0);
}

/* `auto` takes full attention for a sequence this short, and the plan says so. */
static void a_plan_tells_its_options(void) {
  pbsattn_options options = {.struct_size = sizeof options};
  const pbsattn_shape shape = {sizeof shape, 1, 1, 1, tokens, tokens, head_dim, 0};
  const pbsattn_device cpu = {.struct_size = sizeof cpu};
  pbsattn_plan* plan = NULL;

  CHECK(pbsattn_method("auto", &options) == PBSATTN_OK);
  CHECK(options.keep == PBSATTN_KEEP_THRESHOLD && options.fallback == PBSATTN_FALLBACK_WHEN_FASTER);
  CHECK(pbsattn_plan_create(&options, &shape, &cpu, SIZE_MAX, &plan) == PBSATTN_OK);
  CHECK(pbsattn_plan_options(plan, &options) == PBSATTN_OK);
  CHECK(options.keep == PBSATTN_KEEP_ALL && options.fallback == PBSATTN_FALLBACK_NEVER);
  CHECK(fabs(options.scale - 1 / sqrt((double)head_dim)) < 1e-6);
  CHECK(pbsattn_plan_options(NULL, &options) == PBSATTN_INVALID_ARGUMENT);
  CHECK(pbsattn_plan_options(plan, NULL) == PBSATTN_INVALID_ARGUMENT);
  pbsattn_plan_destroy(plan);
}

/* Token t's key is t % 256 in its first column alone: the later a token in its segment, the higher its learned score.
 */
static void orders_are_learned_and_kept(int device_kind) {
  enum { kept = 256 };
  float* q = calloc(tokens * head_dim, sizeof(float));
  float* k = calloc(tokens * head_dim, sizeof(float));
  float* out = calloc(tokens * head_dim, sizeof(float));
  float weights[head_dim / 2 + head_dim] = {0};
  int32_t order[kept];
  pbsattn_options options = {.struct_size = sizeof options};
  const pbsattn_shape shape = {.struct_size = sizeof shape,
                               .batch = 1,
                               .q_heads = 1,
                               .kv_heads = 1,
                               .q_len = tokens,
                               .kv_len = tokens,
                               .head_dim = head_dim};
  const pbsattn_device device = {.struct_size = sizeof device, .kind = device_kind, .threads = 2};
  const pbsattn_view q_view = {.struct_size = sizeof q_view, .data = q, .token_stride = head_dim};
  pbsattn_view k_view = q_view, out_view = q_view;
  pbsattn_order_weights order_weights = {.struct_size = sizeof order_weights, .values = weights, .count = 12};
  pbsattn_key_order key_order = {.struct_size = sizeof key_order, .data = order};
  pbsattn_run run = {.struct_size = sizeof run, .q = &q_view, .k = &k_view, .v = &k_view, .out = &out_view};
  pbsattn_plan* plan = NULL;
  int t;
  k_view.data = k;
  out_view.data = out;
  for (t = 0; t < tokens; ++t) k[t * head_dim] = (float)(t % kept);
  weights[head_dim / 2] = 1;

  CHECK(pbsattn_method("pbs:order_scope=kv_head:permutation=learned", &options) == PBSATTN_OK);
  CHECK(options.permutation == PBSATTN_PERMUTATION_LEARNED);
  CHECK(pbsattn_plan_create(&options, &shape, &device, SIZE_MAX, &plan) == PBSATTN_OK);
  run.workspace_size = pbsattn_plan_workspace_size(plan);
  run.workspace = malloc(run.workspace_size + 1);
  CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_INVALID_ARGUMENT);
  CHECK(strstr(pbsattn_last_error(), "order_weights of 0 numbers") != NULL);
  run.order_weights = &order_weights;
  CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_OK);
  order_weights.pairs = 2;
  CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_INVALID_ARGUMENT);
  order_weights.pairs = PBSATTN_PAIRS_NEIGHBOURS;
  CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_OK);
  order_weights.values = NULL;
  CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_INVALID_ARGUMENT);
  CHECK(strstr(pbsattn_last_error(), "order_weights.values: null pointer") != NULL);
  pbsattn_plan_destroy(plan);
  free(run.workspace);

  /* The last queries like later tokens better. */
  run.order_weights = NULL;
  for (t = 0; t < tokens; ++t) q[t * head_dim] = 0.25F;
  CHECK(pbsattn_set_option(&options, "permutation", "arrival") == PBSATTN_OK);
  CHECK(pbsattn_plan_create(&options, &shape, &device, SIZE_MAX, &plan) == PBSATTN_OK);
  run.workspace_size = pbsattn_plan_workspace_size(plan);
  run.workspace = malloc(run.workspace_size + 1);
  CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_OK);
  run.order = &key_order;
  CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_OK);
  for (t = 0; t < kept; ++t) CHECK(order[t] == kept - 1 - t);
  order[0] = kept;
  key_order.known = kept;
  CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_INVALID_ARGUMENT);
  CHECK(strstr(pbsattn_last_error(), "token 256 at slot 0") != NULL);
  pbsattn_plan_destroy(plan);
  free(run.workspace);
  free(q);
  free(k);
  free(out);
}

/* Tokens in two calls over one cache: the second reads what the first made of the segment that it completes. */
static void segments_are_cached(int32_t device_kind) {
  enum { all = 700, first = 600 };
  float* q = calloc(all * head_dim, sizeof(float));
  float* v = calloc(all * head_dim, sizeof(float));
  float* out = calloc(all * head_dim, sizeof(float));
  pbsattn_options options = {.struct_size = sizeof options};
  pbsattn_shape shape = {.struct_size = sizeof shape,
                         .batch = 1,
                         .q_heads = 1,
                         .kv_heads = 1,
                         .q_len = first,
                         .kv_len = first,
                         .head_dim = head_dim};
  const pbsattn_device device = {.struct_size = sizeof device, .kind = device_kind, .threads = 2};
  const pbsattn_view q_view = {.struct_size = sizeof q_view, .data = q, .token_stride = head_dim};
  pbsattn_view v_view = q_view, out_view = q_view;
  pbsattn_run run = {.struct_size = sizeof run, .q = &q_view, .k = &q_view, .v = &v_view, .out = &out_view};
  pbsattn_plan* plan = NULL;
  pbsattn_segment_cache* cache = NULL;
  size_t size = 0;
  void* memory = NULL;
  const int cached = device_kind == PBSATTN_DEVICE_CPU;
  int t;
  v_view.data = v;
  out_view.data = out;
  for (t = 0; t < all * head_dim; ++t) v[t] = (float)(t / head_dim); /* its mean up to t is t / 2 */

  CHECK(pbsattn_method("two-step:threshold=0", &options) == PBSATTN_OK);
  CHECK(pbsattn_plan_create(&options, &shape, &device, SIZE_MAX, &plan) == PBSATTN_OK);
  CHECK(pbsattn_plan_cache_size(plan, all, &size) == PBSATTN_OK && (size > 0) == cached);
  CHECK(pbsattn_plan_cache_size(plan, -1, &size) == PBSATTN_INVALID_ARGUMENT);
  CHECK(strstr(pbsattn_last_error(), "cache of -1 tokens") != NULL);
  CHECK(pbsattn_plan_cache_size(plan, all, NULL) == PBSATTN_INVALID_ARGUMENT);
  CHECK(pbsattn_plan_cache_size(NULL, all, &size) == PBSATTN_INVALID_ARGUMENT);
  CHECK(pbsattn_segment_cache_create(NULL, 1, &cache) == PBSATTN_INVALID_ARGUMENT && cache == NULL);
  CHECK(pbsattn_segment_cache_create(NULL, 0, NULL) == PBSATTN_INVALID_ARGUMENT);
  memory = malloc(size + 1);
  CHECK(pbsattn_segment_cache_create(memory, size, &cache) == PBSATTN_OK);
  CHECK(pbsattn_segment_cache_tokens(cache) == 0 && pbsattn_segment_cache_tokens(NULL) == 0);
  run.workspace_size = pbsattn_plan_workspace_size(plan);
  run.workspace = malloc(run.workspace_size + 1);
  run.cache_valid = 1;
  CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_INVALID_ARGUMENT);
  CHECK(strstr(pbsattn_last_error(), "cache: 1 valid tokens: outside 0 .. 0") != NULL);
  run.cache_valid = 0;
  run.cache = cache;
  CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_OK);
  CHECK(pbsattn_segment_cache_tokens(cache) == (cached ? 512 : 0));
  pbsattn_plan_destroy(plan);
  free(run.workspace);

  shape.kv_len = all;
  shape.q_len = all - first;
  CHECK(pbsattn_plan_create(&options, &shape, &device, SIZE_MAX, &plan) == PBSATTN_OK);
  run.workspace_size = pbsattn_plan_workspace_size(plan);
  run.workspace = malloc(run.workspace_size + 1);
  run.cache_valid = first;
  for (t = 0; t < 256 * head_dim && cached; ++t) v[t] = NAN; /* which a cached copy makes up for */
  CHECK(pbsattn_plan_run(plan, &run) == PBSATTN_OK);
  for (t = first; t < all; ++t) CHECK(fabs(out[(t - first) * head_dim] - t / 2.0) < 1e-3);
  CHECK(pbsattn_segment_cache_tokens(cache) == (cached ? 512 : 0));
  pbsattn_plan_destroy(plan);
  pbsattn_segment_cache_destroy(cache);
  pbsattn_segment_cache_destroy(NULL);
  free(run.workspace);
  free(memory);
  free(q);
  free(v);
  free(out);
}

static void methods_are_listed(void) {
  size_t count = 0;
  pbsattn_options options = {.struct_size = sizeof options};
  while (pbsattn_method_name(count) != NULL) {
    CHECK(pbsattn_method(pbsattn_method_name(count), &options) == PBSATTN_OK);
    ++count;
  }
  CHECK(count >= 2);
  CHECK(strlen(pbsattn_version()) >= 5);
}

int main(void) {
  dense_is_the_running_mean(PBSATTN_DEVICE_CPU);
  dense_is_the_running_mean(PBSATTN_DEVICE_REFERENCE);
  errors_have_codes_and_messages();
  a_plan_tells_its_options();
  orders_are_learned_and_kept(PBSATTN_DEVICE_CPU);
  orders_are_learned_and_kept(PBSATTN_DEVICE_REFERENCE);
  segments_are_cached(PBSATTN_DEVICE_CPU);
  segments_are_cached(PBSATTN_DEVICE_REFERENCE);
  methods_are_listed();
  structs_grow();
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
