/* What the files of capi_test share. */
#ifndef PBSATTN_TESTS_CAPI_CHECK_H
#define PBSATTN_TESTS_CAPI_CHECK_H

#include <stdio.h>

#include "pbsattn/pbsattn.h"

extern int failures;

static inline void check(int holds, const char* what, const char* file, int line) {
  if (holds) return;
  fprintf(stderr, "%s:%d: %s (%s)\n", file, line, what, pbsattn_last_error());
  ++failures;
}
#define CHECK(condition) check((condition) != 0, #condition, __FILE__, __LINE__)

void structs_grow(void); /* abi.c */

#endif
