// The structs of pbsattn.h, for whoever reads or fills a caller's.
#pragma once

#include "core/capi/sized_struct.h"
#include "pbsattn/pbsattn.h"

PBSATTN_SIZED_STRUCT(pbsattn_shape, head_dim_v, 56);
PBSATTN_SIZED_STRUCT(pbsattn_options, two_step_reach, 104);
PBSATTN_SIZED_STRUCT(pbsattn_device, reserved, 24);
PBSATTN_SIZED_STRUCT(pbsattn_view, reserved, 48);
PBSATTN_SIZED_STRUCT(pbsattn_stats, attend_seconds, 48);
PBSATTN_SIZED_STRUCT(pbsattn_order_weights, reserved, 32);
PBSATTN_SIZED_STRUCT(pbsattn_key_order, known, 40);
PBSATTN_SIZED_STRUCT(pbsattn_pages, count, 40);
PBSATTN_SIZED_STRUCT(pbsattn_run, cache_valid, 80);
