// The entry point that ggml looks for in a loaded library.
#include "ggml-pbsattn.h"

extern "C" PBSATTN_API ggml_backend_reg_t ggml_backend_init(void) {
  return ggml_backend_pbsattn_reg();
}
