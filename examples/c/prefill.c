/* Sparse attention from C: plan, run, read the statistics. */
#include <pbsattn/pbsattn.h>
#include <stdio.h>
#include <stdlib.h>

enum { heads = 4, tokens = 2048, head_dim = 64, elements = heads * tokens * head_dim };

static int fail(void) {
  fprintf(stderr, "%s\n", pbsattn_last_error());
  return EXIT_FAILURE;
}

int main(void) {
  pbsattn_options options = {.struct_size = sizeof options};
  const pbsattn_shape shape = {.struct_size = sizeof shape,
                               .batch = 1,
                               .q_heads = heads,
                               .kv_heads = heads,
                               .q_len = tokens,
                               .kv_len = tokens,
                               .head_dim = head_dim};
  const pbsattn_device device = {.struct_size = sizeof device, .kind = PBSATTN_DEVICE_CPU};
  pbsattn_plan* plan = NULL;
  if (pbsattn_method("pbs", &options) != PBSATTN_OK) return fail();
  options.dense_last_rows = 1; /* the prompt's end, which holds the question, sees everything */
  if (pbsattn_plan_create(&options, &shape, &device, SIZE_MAX, &plan) != PBSATTN_OK) return fail();

  /* One tensor serves as queries, keys and values: [head][token][head_dim]. */
  float* x = malloc(elements * sizeof(float));
  float* y = malloc(elements * sizeof(float));
  void* workspace = malloc(pbsattn_plan_workspace_size(plan));
  if (x == NULL || y == NULL || workspace == NULL) return EXIT_FAILURE;
  for (int i = 0; i < elements; ++i) x[i] = (float)rand() / (float)RAND_MAX - 0.4F;
  const pbsattn_view in = {.struct_size = sizeof in,
                           .data = x,
                           .head_stride = tokens * head_dim,
                           .token_stride = head_dim,
                           .dtype = PBSATTN_F32};
  pbsattn_view out = in;
  out.data = y;

  pbsattn_stats stats = {.struct_size = sizeof stats};
  const pbsattn_run run = {.struct_size = sizeof run,
                           .q = &in,
                           .k = &in,
                           .v = &in,
                           .out = &out,
                           .workspace = workspace,
                           .workspace_size = pbsattn_plan_workspace_size(plan),
                           .stats = &stats};
  if (pbsattn_plan_run(plan, &run) != PBSATTN_OK) return fail();
  printf("pbs on %s: density %.3f, %.2f ms, first output %.4f\n", pbsattn_plan_path(plan),
         (double)stats.visited_blocks / (double)stats.causal_blocks,
         1e3 * (stats.permute_seconds + stats.select_seconds + stats.attend_seconds), (double)y[0]);
  free(workspace);
  free(y);
  free(x);
  pbsattn_plan_destroy(plan);
  return EXIT_SUCCESS;
}
