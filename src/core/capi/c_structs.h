// The structs of pbsattn.h, for whoever reads or fills a caller's.
#pragma once

#include <cstdint>

#include "core/capi/sized_struct.h"
#include "pbsattn/pbsattn.h"
#include "pbsattn/pbsattn.hpp"

PBSATTN_SIZED_STRUCT(pbsattn_shape, head_dim, 56);
PBSATTN_SIZED_STRUCT(pbsattn_options, expected_density, 104);
PBSATTN_SIZED_STRUCT(pbsattn_device, reserved, 24);
PBSATTN_SIZED_STRUCT(pbsattn_view, reserved, 48);
PBSATTN_SIZED_STRUCT(pbsattn_stats, attend_seconds, 48);
PBSATTN_SIZED_STRUCT(pbsattn_run, stats, 80);  // NOLINT(bugprone-sizeof-expression): of the pointer is meant

namespace pbsattn {

constexpr pbsattn_options to_c(const Options& o) {
  return {sizeof(pbsattn_options),
          static_cast<std::int32_t>(o.permutation),
          static_cast<std::int32_t>(o.order_scope),
          static_cast<std::int32_t>(o.score),
          static_cast<std::int32_t>(o.keep),
          static_cast<std::int32_t>(o.correction),
          static_cast<std::int32_t>(o.rules),
          static_cast<std::int32_t>(o.precision),
          static_cast<std::int32_t>(o.fallback),
          o.top_p,
          o.threshold,
          o.floor_top_p,
          o.top_k,
          o.density,
          o.vertical,
          o.slash,
          o.tau,
          o.min_budget,
          o.block,
          o.segment,
          o.dense_last_rows,
          o.sink_blocks,
          o.local_blocks,
          o.scale,
          o.expected_density};
}

inline constexpr pbsattn_options default_options = to_c(Options{});

}  // namespace pbsattn
