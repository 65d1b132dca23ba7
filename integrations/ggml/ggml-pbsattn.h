/* A ggml backend that computes FLASH_ATTN_EXT of long causal prefills with pbsattn.
 *
 * Three ways in:
 *   - GGML_BACKEND_PATH=/path/libggml-pbsattn.so with an unmodified llama.cpp; settings by environment
 *     (docs/llama.cpp.md has the table);
 *   - ggml_backend_load("libggml-pbsattn.so"), then the functions below by
 *     ggml_backend_reg_get_proc_address(reg, "ggml_backend_pbsattn_configure") and so on;
 *   - link ggml-pbsattn-core and call ggml_backend_register(ggml_backend_pbsattn_reg()).
 * Register before the model's context is made: a context looks for accelerators once.
 *
 * What is taken: F32 queries of at least min_tokens tokens, F16, BF16 or F32 keys and values of one
 * type, one stream, head_dim a multiple of 8 up to 256, attention sinks, a logit soft-cap, no ALiBi or top-k,
 * nothing that ggml's FLASH_ATTN_EXT hasn't had when this was written, and a mask that turns out to be plain causal,
 * or a sliding window's, for one sequence. Everything else is computed by ggml's own kernel.
 *
 * Settings and statistics belong to the process; all functions may be called from any thread. Structs begin with
 * struct_size and grow as those of pbsattn.h do. */
#ifndef GGML_PBSATTN_H
#define GGML_PBSATTN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ggml-backend.h"
#include "pbsattn/pbsattn.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Returns the backend's registration; the first call reads the PBSATTN_* environment. */
PBSATTN_API ggml_backend_reg_t ggml_backend_pbsattn_reg(void);

/* ------------------------------------------------------------------------------------------ settings */

enum ggml_pbsattn_mode {
  GGML_PBSATTN_MODE_OFF = 0,     /* take nothing */
  GGML_PBSATTN_MODE_PBSATTN = 1, /* compute with pbsattn */
  GGML_PBSATTN_MODE_GGML = 2     /* take the same ops, compute them with ggml's kernel: times its attention */
};

/* Queries an op needs before it is taken, at least: `-fa auto` probes with one token for each of up to
 * 256 sequences and turns flash attention off if the probe lands on another device than the layer. */
#define GGML_PBSATTN_MIN_TOKENS_FLOOR 257

struct ggml_pbsattn_config {
  size_t struct_size;
  pbsattn_options*
      options; /* default "auto" with bf16 products; `scale` is ignored, and `softcap` and `window` may not be set: the
                  op brings its own. NULL: get_config() doesn't fill them, configure() leaves those in force */
  int64_t min_tokens;   /* queries an op needs to be taken; default 512 */
  size_t workspace_cap; /* bytes a plan may use; SIZE_MAX (default): no cap */
  int32_t mode;         /* ggml_pbsattn_mode; default PBSATTN */
  int32_t device;       /* pbsattn_device_kind; default CPU */
  int32_t check;    /* 1: compute each op with ggml's kernel too, record the difference and pass on ggml's result, so
                       that every layer is compared on the inputs it has without pbsattn; default 0 */
  int32_t reserved; /* 0 */
};

/* Fills *config with the settings in force. Returns false, filling nothing, if a struct_size is wrong. */
PBSATTN_API bool ggml_backend_pbsattn_get_config(struct ggml_pbsattn_config* config);

/* Puts settings in force from the next op on. Returns false, changing nothing, if a value breaks a rule;
 * ggml_backend_pbsattn_last_error() then says which. Which ops are routed here at all is decided when
 * llama.cpp builds a graph: after MODE_OFF, the next context or the next new batch shape picks it up. */
PBSATTN_API bool ggml_backend_pbsattn_configure(const struct ggml_pbsattn_config* config);

/* Puts options by layer and head in force from the next op on, as docs/llama.cpp.md has them in JSON; they change the
 * options that configure() gave. NULL: none. Returns false, changing nothing, where the text is wrong. */
PBSATTN_API bool ggml_backend_pbsattn_set_layers(const char* json);

/* Puts a file of a learned order (docs/learned.md) in force from the next op on: the weights of permutation "learned"
 * in each layer and, with `settings`, its options by layer and head, which change those that configure() gave and are
 * changed by those of set_layers(). NULL: none. Returns false, changing nothing, for what is no such file. Whether it
 * is of this model is seen when an op comes: others are left to ggml, with a warning that names both numbers. Which
 * method takes the weights is configure()'s to say: one with permutation "learned" and order_scope "kv_head". */
PBSATTN_API bool ggml_backend_pbsattn_set_learned(const char* path, bool settings);

/* Returns the calling thread's last error in one line, "" if there was none. */
PBSATTN_API const char* ggml_backend_pbsattn_last_error(void);

/* ---------------------------------------------------------------------------------------- statistics */

/* Why an op went to ggml's kernel. */
enum ggml_pbsattn_reason {
  GGML_PBSATTN_TAKEN = 0,       /* it didn't: pbsattn computed it */
  GGML_PBSATTN_BY_MODE,         /* mode is OFF or GGML */
  GGML_PBSATTN_FEW_TOKENS,      /* fewer queries than min_tokens (decoding, short prompts) */
  GGML_PBSATTN_TYPES,           /* q not F32, or k and v not both F16, BF16 or F32 (quantised cache) */
  GGML_PBSATTN_HEAD_DIM,        /* k and v differ, no multiple of 8, or above 256 */
  GGML_PBSATTN_LAYOUT,          /* several streams, or a layout that strides can't describe */
  GGML_PBSATTN_SINKS,           /* attention sinks that aren't one F32 number of each query head */
  GGML_PBSATTN_SOFT_CAP,        /* a logit soft-cap that is no finite number from 0 up */
  GGML_PBSATTN_ALIBI,           /* max_bias: position bias in the mask */
  GGML_PBSATTN_TOP_K,           /* the model itself limits the keys of a query */
  GGML_PBSATTN_NO_MASK,         /* no mask: every query sees every key */
  GGML_PBSATTN_MASK_NOT_CAUSAL, /* several sequences, bidirectional, shifted or reused cache, ... */
  GGML_PBSATTN_PLAN_REFUSED,    /* Plan::create refused; logged once for each message */
  GGML_PBSATTN_RUN_FAILED,      /* Plan::run or an allocation failed; logged once for each message */
  GGML_PBSATTN_UNKNOWN_INPUTS,  /* sources or parameters that this plug-in doesn't know: a newer ggml's */
  GGML_PBSATTN_REASON_COUNT
};
#define GGML_PBSATTN_REASONS_MAX 32 /* that there is room for */

/* Returns a few words for a table, such as "mask not causal". */
PBSATTN_API const char* ggml_backend_pbsattn_reason_name(enum ggml_pbsattn_reason reason);

/* The ops of one layer since the last reset. Times are wall-clock seconds, summed over calls. */
struct ggml_pbsattn_layer_stats {
  size_t struct_size;
  int32_t layer;          /* as llama.cpp numbers its caches; -1: the op didn't tell */
  int32_t reserved;       /* 0 */
  int64_t calls;          /* ops computed here, by either kernel */
  int64_t q_len, kv_len;  /* of the last call; kv_len is what the last query sees (padding excluded) if the
                             mask was read, else the tensor's size */
  int64_t queries;        /* summed over calls */
  int64_t visited_blocks; /* (query block, key block) pairs pbsattn computed; density = visited / causal */
  int64_t causal_blocks;  /* pairs that dense causal attention would have computed in the same calls */
  double permute_seconds, select_seconds, attend_seconds;
  double mask_seconds;                       /* reading masks */
  double total_seconds;                      /* everything, ggml's kernel included (but not the check's ggml run) */
  int64_t reasons[GGML_PBSATTN_REASONS_MAX]; /* ops by who computed them and why; they add up to calls */
  int64_t checks;                            /* ops compared with ggml's kernel */
  double check_max_abs;                      /* largest |ours - ggml's| */
  double check_rel_rms;                      /* largest sqrt(sum (ours - ggml's)^2 / sum ggml's^2) of one op */
};

/* Forgets all statistics. */
PBSATTN_API void ggml_backend_pbsattn_stats_reset(void);

/* Fills at most `capacity` entries, ascending by layer, and returns how many layers there are; SIZE_MAX, filling
 * nothing, if the entries' struct_size, of which all have the same, is wrong. */
PBSATTN_API size_t ggml_backend_pbsattn_stats_get(struct ggml_pbsattn_layer_stats* layers, size_t capacity);

/* Returns the reasons for which ops of at least min_tokens queries were left to ggml when a graph was planned, since
 * the last reset: bit r set for enum ggml_pbsattn_reason r. Such ops never arrive here and have no layer. */
PBSATTN_API uint32_t ggml_backend_pbsattn_refusals(void);

/* Tells why this op would be left to ggml at planning time, or GGML_PBSATTN_TAKEN. The mask is read later. */
PBSATTN_API enum ggml_pbsattn_reason ggml_backend_pbsattn_examine(const struct ggml_tensor* op);

/* ------------------------------------------------------------------------------------------ observer */

/* Called before an op is computed, whatever computes it, when it is a causal prefill that pbsattn can
 * take, without sinks, soft-cap and window, of which it isn't told. The views are good until it returns; what has a
 * struct_size has the plug-in's. */
typedef void (*ggml_pbsattn_observer)(void* user, int32_t layer, const pbsattn_shape* shape, const pbsattn_view* q,
                                      const pbsattn_view* k, const pbsattn_view* v);

/* Sets the one observer; NULL removes it. */
PBSATTN_API void ggml_backend_pbsattn_set_observer(ggml_pbsattn_observer observer, void* user);

#ifdef __cplusplus
}
#endif

#endif /* GGML_PBSATTN_H */
