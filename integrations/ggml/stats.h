// Per-layer statistics of the process.
#pragma once

#include <cstdint>

#include "ggml-pbsattn.h"
#include "settings.h"

namespace pbsattn::ggml {

// Adds one op: `op` holds that op's own numbers (calls = 1, its one reason counted).
void record(const ggml_pbsattn_layer_stats& op);

// Remembers that planning left an op of prefill size to ggml.
void record_refusal(ggml_pbsattn_reason reason);

// Logs or writes a line for each layer if there is anything new since the last time. At exit only files
// are written: the program's logger may be gone by then.
void report(const Settings& settings, bool at_exit);

}  // namespace pbsattn::ggml
