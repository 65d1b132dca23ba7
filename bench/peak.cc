#include "peak.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "pbsattn/pbsattn.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bench {
namespace {

// Seconds of the fastest of many calls: short, so that some of them run undisturbed.
template <class Body>
double fastest(int calls, Body&& body) {
  double best = 1e9;
  for (int i = 0; i < calls; ++i) {
    const auto start = std::chrono::steady_clock::now();
    body();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

// A result that is stored here is computed.
volatile float result;

constexpr int rounds = 4000;
constexpr int loaded_rounds = 250;
constexpr int chain_length = 4000;
constexpr int chains = 12;  // independent sums: a multiply-add takes 4 to 5 cycles, and two begin in each

#if defined(__x86_64__)

// GCC takes vectors apart across functions of different targets, so each loop is written out.
#define PBSATTN_MULTIPLY_ADD_LOOP(name, isa, vector, set1, multiply_add, first)                                \
  __attribute__((target(isa), noinline)) void name() {                                                         \
    vector sum[chains];                                                                                        \
    for (int i = 0; i < chains; ++i) sum[i] = set1(1.0F + static_cast<float>(i));                              \
    const vector factor = set1(0.999F);                                                                        \
    for (int round = 0; round < rounds; ++round) {                                                             \
      _Pragma("GCC unroll 12") for (int i = 0; i < chains; ++i) sum[i] = multiply_add(sum[i], factor, factor); \
    }                                                                                                          \
    float total = 0;                                                                                           \
    for (int i = 0; i < chains; ++i) total += first(sum[i]);                                                   \
    result = total;                                                                                            \
  }
#define PBSATTN_MULTIPLY_THEN_ADD(a, b, c) _mm_add_ps(_mm_mul_ps(a, b), c)
PBSATTN_MULTIPLY_ADD_LOOP(loop512, "avx512f", __m512, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_cvtss_f32)
PBSATTN_MULTIPLY_ADD_LOOP(loop256, "avx2,fma", __m256, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_cvtss_f32)
PBSATTN_MULTIPLY_ADD_LOOP(loop128, "sse4.1", __m128, _mm_set1_ps, PBSATTN_MULTIPLY_THEN_ADD, _mm_cvtss_f32)
#undef PBSATTN_MULTIPLY_ADD_LOOP
#undef PBSATTN_MULTIPLY_THEN_ADD

__attribute__((target("avx512f,avx512bf16"), noinline)) void loop_bf16() {
  __m512 sum[chains];
  for (int i = 0; i < chains; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
  const auto factor = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3F80));
  for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], factor, factor);
  }
  float total = 0;
  for (int i = 0; i < chains; ++i) total += _mm512_cvtss_f32(sum[i]);
  result = total;
}

struct TileConfig {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Four sums of tiles from two by two operands. The process has the kernel's permission once it has made a plan.
void loop_tiles() {
  alignas(64) static constexpr TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config));
  for (int round = 0; round < rounds; ++round)
    asm volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\n\ttdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\n\ttdpbf16ps %tmm7, %tmm5, %tmm3");
  asm volatile("tilerelease");
}

// As many tile loads as products: a core that has to share its tiles or its first-level cache shows it here first.
void loop_loaded_tiles() {
  alignas(64) static constexpr TileConfig config;
  alignas(64) static constexpr std::byte operands[4 * 1024]{};
  constexpr std::int64_t row_bytes = 64;
  asm volatile("ldtilecfg %0" ::"m"(config));
  for (int round = 0; round < loaded_rounds; ++round)
    asm volatile(
        "tileloadd (%0,%1,1), %%tmm4\n\ttileloadd 1024(%0,%1,1), %%tmm5\n\t"
        "tileloadd 2048(%0,%1,1), %%tmm6\n\ttileloadd 3072(%0,%1,1), %%tmm7\n\t"
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
        "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::"r"(operands),
        "r"(row_bytes)
        : "memory");
  asm volatile("tilerelease");
}

// A chain of multiplications, each of which waits 3 cycles for the one before on every processor with AMX.
void loop_chain() {
  std::uint64_t x = 1;
  for (int i = 0; i < chain_length / 4; ++i)
    asm volatile("imul $3, %0, %0\n\timul $3, %0, %0\n\timul $3, %0, %0\n\timul $3, %0, %0" : "+r"(x));
}

// Asked of the system, as a plan does: it refuses where the processor has no tiles.
bool may_use_tiles() {
  static const bool may = [] {
    const auto paths = pbsattn::describe_cpu().paths;
    return __builtin_cpu_supports("amx-bf16") != 0 && std::ranges::find(paths, "amx_bf16") != paths.end();
  }();
  return may;
}

#endif

}  // namespace

double peak_rate(std::string_view path) {
#if defined(__x86_64__)
  constexpr int calls = 300;
  const auto rate = [](int flop, void (*loop)()) { return 1e-9 * rounds * chains * flop / fastest(calls, loop); };
  if (path == "amx_bf16") return 1e-9 * rounds * 4 * 2 * 16 * 16 * 32 / fastest(calls, loop_tiles);
  if (path == "avx512_f32") return rate(32, loop512);
  if (path == "avx512_bf16") return rate(64, loop_bf16);
  if (path == "avx2_f32") return rate(16, loop256);
  if (path == "sse4_f32") return rate(8, loop128);
#endif
  return 0;
}

Pace pace() {
  Pace now;
#if defined(__x86_64__)
  constexpr int calls = 3;  // an interrupt in one of them is nothing
  now.vectors = fastest(calls, __builtin_cpu_supports("avx512f") != 0                                      ? loop512
                               : __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 ? loop256
                                                                                                           : loop128);
  if (may_use_tiles()) {
    const double cycle = fastest(calls, loop_chain) / (3.0 * chain_length);
    now.tiles = fastest(calls, loop_loaded_tiles) / (4 * loaded_rounds) / cycle;
  }
#endif
  return now;
}

double read_bandwidth() {
  std::vector<std::uint64_t> memory(std::size_t{64} << 20, 1);
  const double seconds =
      fastest(3, [&] { result = static_cast<float>(std::accumulate(memory.begin(), memory.end(), std::uint64_t{0})); });
  return 1e-9 * static_cast<double>(memory.size() * sizeof(memory[0])) / seconds;
}

}  // namespace bench
