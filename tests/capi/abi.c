/* Programs compiled with another version of the header: with version 0.2, whose structs are kept in abi_0_2.h, and with
 * a later one, whose structs are longer than the library's. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "abi_0_2.h"
#include "check.h"

#define SAME_PLACE(type, field)                                                                  \
  _Static_assert(offsetof(pbsattn_##type, field) == offsetof(abi_0_2_##type, field) &&           \
                     sizeof(((pbsattn_##type*)0)->field) == sizeof(((abi_0_2_##type*)0)->field), \
                 #type "." #field " has moved");
ABI_0_2_FIELDS(SAME_PLACE)
#define SAME_VALUE(name, value) _Static_assert((int)(name) == (value), #name " has changed");
ABI_0_2_ENUMERATORS(SAME_VALUE)
#define ONLY_LONGER(type)                                                                                        \
  _Static_assert(sizeof(pbsattn_##type) >= sizeof(abi_0_2_##type) && offsetof(pbsattn_##type, struct_size) == 0, \
                 #type " has shrunk");
ONLY_LONGER(shape)
ONLY_LONGER(options)
ONLY_LONGER(device)
ONLY_LONGER(view)
ONLY_LONGER(stats)
ONLY_LONGER(run)

/* The functions of 0.2. */
static const char* (*const version_0_2)(void) = pbsattn_version;
static const char* (*const last_error_0_2)(void) = pbsattn_last_error;
static const char* (*const method_name_0_2)(size_t) = pbsattn_method_name;
static pbsattn_status (*const method_0_2)(const char*, pbsattn_options*) = pbsattn_method;
static pbsattn_status (*const set_option_0_2)(pbsattn_options*, const char*, const char*) = pbsattn_set_option;
static pbsattn_status (*const plan_create_0_2)(const pbsattn_options*, const pbsattn_shape*, const pbsattn_device*,
                                               size_t, pbsattn_plan**) = pbsattn_plan_create;
static pbsattn_status (*const plan_create_by_head_0_2)(const pbsattn_options*, const pbsattn_shape*,
                                                       const pbsattn_device*, size_t,
                                                       pbsattn_plan**) = pbsattn_plan_create_by_head;
static void (*const plan_destroy_0_2)(pbsattn_plan*) = pbsattn_plan_destroy;
static size_t (*const plan_workspace_size_0_2)(const pbsattn_plan*) = pbsattn_plan_workspace_size;
static const char* (*const plan_path_0_2)(const pbsattn_plan*) = pbsattn_plan_path;
static pbsattn_status (*const plan_options_0_2)(const pbsattn_plan*, pbsattn_options*) = pbsattn_plan_options;
static pbsattn_status (*const plan_run_0_2)(const pbsattn_plan*, const pbsattn_run*) = pbsattn_plan_run;

enum { heads = 2, tokens = 300, head_dim = 8, elements = heads * tokens * head_dim, more = 16 };

/* A program of version 0.2 and all its structs. */
static void a_program_of_0_2_runs(void) {
  abi_0_2_options options[heads] = {{.struct_size = sizeof options[0]}}, taken = {.struct_size = sizeof taken};
  const abi_0_2_shape shape = {sizeof shape, 1, heads, heads, tokens, tokens, head_dim};
  const abi_0_2_device device = {.struct_size = sizeof device, .threads = 1};
  abi_0_2_stats stats = {.struct_size = sizeof stats};
  float *q = calloc(elements, sizeof(float)), *v = calloc(elements, sizeof(float)),
        *out = calloc(elements, sizeof(float));
  const abi_0_2_view q_view = {sizeof q_view, q, 0, tokens * head_dim, head_dim, PBSATTN_F32, 0};
  abi_0_2_view v_view = q_view, out_view = q_view;
  abi_0_2_run run = {
      .struct_size = sizeof run, .q = &q_view, .k = &q_view, .v = &v_view, .out = &out_view, .stats = &stats};
  pbsattn_plan* plan = NULL;
  int i;

  for (i = 0; i < elements; ++i) v[i] = (float)(i / head_dim % tokens - 150); /* which bf16 holds too */
  v_view.data = v;
  out_view.data = out;
  CHECK(strlen(version_0_2()) >= 5 && method_name_0_2(0) != NULL);
  CHECK(method_0_2("pbs", (pbsattn_options*)&options[0]) == PBSATTN_OK);
  CHECK(options[0].struct_size == sizeof options[0] && options[0].block == 128 && options[0].segment == 256);
  CHECK(set_option_0_2((pbsattn_options*)&options[0], "top_p", "1") == PBSATTN_OK && options[0].top_p == 1.0F);
  CHECK(plan_create_0_2((pbsattn_options*)&options[0], (const pbsattn_shape*)&shape, (const pbsattn_device*)&device,
                        SIZE_MAX, &plan) == PBSATTN_OK);
  plan_destroy_0_2(plan);
  options[1] = options[0];
  options[1].sink_blocks = 1;
  CHECK(plan_create_by_head_0_2((const pbsattn_options*)&options[0], (const pbsattn_shape*)&shape,
                                (const pbsattn_device*)&device, SIZE_MAX, &plan) == PBSATTN_OK);
  CHECK(plan_options_0_2(plan, (pbsattn_options*)&taken) == PBSATTN_OK && taken.top_p == 1.0F);
  CHECK(strlen(plan_path_0_2(plan)) > 0);
  run.workspace_size = plan_workspace_size_0_2(plan);
  run.workspace = malloc(run.workspace_size + 1);
  CHECK(plan_run_0_2(plan, (const pbsattn_run*)&run) == PBSATTN_OK);
  CHECK(stats.visited_blocks == 6 * heads && stats.attend_seconds >= 0);
  for (i = 0; i < elements; ++i) CHECK(fabs(out[i] - (i / head_dim % tokens / 2.0 - 150)) < 1e-3);
  CHECK(strcmp(last_error_0_2(), "") == 0);
  plan_destroy_0_2(plan);
  free(run.workspace);
  free(q);
  free(v);
  free(out);
}

/* A struct as a later header has it: `more` bytes longer. */
#define LATER(type)          \
  struct {                   \
    pbsattn_##type known;    \
    unsigned char new[more]; \
  }

/* What a call takes, all of a later version. */
static struct Call {
  LATER(options) options[heads];
  LATER(shape) shape;
  LATER(device) device;
  LATER(view) view, out;
  LATER(stats) stats;
  LATER(run) run;
  LATER(order_weights) order_weights;
  LATER(key_order) order;
  LATER(pages) pages;
  float q[elements], result[elements];
} call;

static void fill_call(void) {
  int h;
  memset(&call, 0, sizeof call);
  for (h = 0; h < heads; ++h) {
    call.options[h].known.struct_size = sizeof call.options[h];
    memset(call.options[h].new, 1, more); /* the library's to clear */
    CHECK(pbsattn_method("pbs", &call.options[h].known) == PBSATTN_OK);
    CHECK(call.options[h].known.struct_size == sizeof call.options[h]);
    CHECK(call.options[h].new[0] == 0 && call.options[h].new[more - 1] == 0);
  }
  call.shape.known = (pbsattn_shape){sizeof call.shape, 1, heads, heads, tokens, tokens, head_dim, 0};
  call.device.known = (pbsattn_device){.struct_size = sizeof call.device, .threads = 1};
  call.view.known = (pbsattn_view){sizeof call.view, call.q, 0, tokens * head_dim, head_dim, PBSATTN_F32, 0};
  call.out = call.view;
  call.out.known.data = call.result;
  call.stats.known.struct_size = sizeof call.stats;
  memset(call.stats.new, 1, more);
  call.run.known = (pbsattn_run){.struct_size = sizeof call.run,
                                 .q = &call.view.known,
                                 .k = &call.view.known,
                                 .v = &call.view.known,
                                 .out = &call.out.known,
                                 .stats = &call.stats.known,
                                 .order_weights = &call.order_weights.known,
                                 .order = &call.order.known,
                                 .pages = &call.pages.known};
  call.order_weights.known.struct_size = sizeof call.order_weights;
  call.order.known.struct_size = sizeof call.order;
  call.pages.known.struct_size = sizeof call.pages; /* none */
}

/* Plans by one options struct and by one of each head, and runs. */
static pbsattn_status make_call(void) {
  pbsattn_plan *plan = NULL, *by_head = NULL;
  pbsattn_status status =
      pbsattn_plan_create(&call.options[0].known, &call.shape.known, &call.device.known, SIZE_MAX, &plan);
  if (status == PBSATTN_OK)
    status =
        pbsattn_plan_create_by_head(&call.options[0].known, &call.shape.known, &call.device.known, SIZE_MAX, &by_head);
  if (status == PBSATTN_OK) {
    call.run.known.workspace_size = pbsattn_plan_workspace_size(by_head);
    call.run.known.workspace = malloc(call.run.known.workspace_size + 1);
    status = pbsattn_plan_run(by_head, &call.run.known);
    free(call.run.known.workspace);
  }
  pbsattn_plan_destroy(plan);
  pbsattn_plan_destroy(by_head);
  return status;
}

static int says(const char* text) {
  return strstr(pbsattn_last_error(), text) != NULL;
}

static void a_later_program_runs_while_it_sets_nothing_new(void) {
  pbsattn_plan* plan = NULL;
  int i;
  fill_call();
  call.options[1].known.sink_blocks = 1; /* found where the caller's size says */
  CHECK(make_call() == PBSATTN_OK);
  CHECK(call.stats.known.struct_size == sizeof call.stats && call.stats.known.visited_blocks == 6 * heads);
  for (i = 0; i < more; ++i) CHECK(call.stats.new[i] == 0);
  call.options[1].known.sink_blocks = -7;
  CHECK(make_call() == PBSATTN_INVALID_ARGUMENT && says("sink_blocks -7"));

  memset(call.options[0].new, 1, more);
  CHECK(pbsattn_set_option(&call.options[0].known, "top_p", ".5") == PBSATTN_INVALID_ARGUMENT);
  fill_call();
  CHECK(pbsattn_plan_create(&call.options[0].known, &call.shape.known, &call.device.known, SIZE_MAX, &plan) ==
        PBSATTN_OK);
  memset(call.options[0].new, 1, more);
  CHECK(pbsattn_plan_options(plan, &call.options[0].known) == PBSATTN_OK && call.options[0].new[0] == 0);
  pbsattn_plan_destroy(plan);
}

/* One that sets something new is refused, whatever the struct and the byte, by their names. */
static void what_is_new_and_set_is_refused_by_name(void) {
  static const int bytes[] = {0, more - 1};
  size_t i;
  for (i = 0; i < sizeof bytes / sizeof bytes[0]; ++i) {
    char place[64];
    const int byte = bytes[i];
#define REFUSED(where, type, message, after)                                                                 \
  fill_call();                                                                                               \
  (where).new[byte] = 1;                                                                                     \
  CHECK(make_call() == PBSATTN_INVALID_ARGUMENT);                                                            \
  CHECK(says(message ": a field after " after " is set that pbsattn ") && says("leave it zero"));            \
  sprintf(place, "(byte %d of %d)", (int)sizeof(pbsattn_##type) + byte, (int)sizeof(pbsattn_##type) + more); \
  CHECK(says(place));
    REFUSED(call.options[0], options, "options", "two_step_reach")
    REFUSED(call.options[1], options, "heads[1]", "two_step_reach")
    REFUSED(call.shape, shape, "shape", "head_dim_v")
    REFUSED(call.device, device, "device", "reserved")
    REFUSED(call.view, view, "q", "reserved")
    REFUSED(call.out, view, "out", "reserved")
    REFUSED(call.run, run, "run", "cache_valid")
    REFUSED(call.order_weights, order_weights, "order_weights", "reserved")
    REFUSED(call.order, key_order, "order", "known")
    REFUSED(call.pages, pages, "pages", "count")
  }
}

static void a_size_that_nobody_set_is_refused(void) {
  /* Nothing, the struct of 0.1, an odd one, one that was never set. */
  const size_t wrong[] = {0, 8, 101, (size_t)-1, (size_t)1 << 40};
  size_t i;
  for (i = 0; i < sizeof wrong / sizeof wrong[0]; ++i) {
    char value[64];
    sprintf(value, ".struct_size %zu: ", wrong[i]);
#define REFUSED_SIZE(where, type)                 \
  fill_call();                                    \
  (where).known.struct_size = wrong[i];           \
  CHECK(make_call() == PBSATTN_INVALID_ARGUMENT); \
  CHECK(says(value) && says("set it to sizeof(pbsattn_" #type ")"));
    REFUSED_SIZE(call.options[0], options)
    REFUSED_SIZE(call.options[1], options)
    REFUSED_SIZE(call.shape, shape)
    REFUSED_SIZE(call.device, device)
    REFUSED_SIZE(call.view, view)
    REFUSED_SIZE(call.out, view)
    REFUSED_SIZE(call.stats, stats)
    REFUSED_SIZE(call.run, run)
    REFUSED_SIZE(call.order_weights, order_weights)
    REFUSED_SIZE(call.order, key_order)
    REFUSED_SIZE(call.pages, pages)
    fill_call();
    call.options[0].known.struct_size = wrong[i];
    CHECK(pbsattn_method("pbs", &call.options[0].known) == PBSATTN_INVALID_ARGUMENT && says(value));
    CHECK(pbsattn_set_option(&call.options[0].known, "top_p", ".5") == PBSATTN_INVALID_ARGUMENT && says(value));
  }
  /* Refused before the work. */
  fill_call();
  call.result[0] = 7;
  call.stats.known.struct_size = 0;
  CHECK(make_call() == PBSATTN_INVALID_ARGUMENT && call.result[0] == 7);
  /* Heads of different sizes don't lie where a size says. */
  fill_call();
  call.options[1].known.struct_size = sizeof(pbsattn_options);
  CHECK(make_call() == PBSATTN_INVALID_ARGUMENT && says("heads[1].struct_size") && says("not that of heads[0]"));
}

static void reserved_fields_are_zero(void) {
  fill_call();
  call.device.known.reserved = 3;
  CHECK(make_call() == PBSATTN_INVALID_ARGUMENT && says("device.reserved 3"));
  fill_call();
  call.view.known.reserved = -1;
  CHECK(make_call() == PBSATTN_INVALID_ARGUMENT && says("q.reserved -1"));
  fill_call();
  call.order_weights.known.reserved = 2;
  CHECK(make_call() == PBSATTN_INVALID_ARGUMENT && says("order_weights.reserved 2"));
}

void structs_grow(void) {
  a_program_of_0_2_runs();
  a_later_program_runs_while_it_sets_nothing_new();
  what_is_new_and_set_is_refused_by_name();
  a_size_that_nobody_set_is_refused();
  reserved_fields_are_zero();
}
