// The AMX path's table: packing, key scores, and whether the processor and the kernel allow it.
#include "cpu/amx/amx.h"
#include "cpu/amx/pack.h"

#if PBSATTN_HAS_AMX
#ifndef PBSATTN_EMULATE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#endif

namespace pbsattn::cpu::amx {
namespace {

template <DType T>
void pack_keys(const Rows& rows, int count, int padded, int head_dim, void* packed) {
  const int pairs = tile_pairs(head_dim);
  const int all = ceil_div(padded, group_keys) * group_keys;
  for (int key = 0; key < all; ++key) {
    std::byte* out =
        static_cast<std::byte*>(packed) + key / group_keys * pairs * 2 * tile_bytes + key % group_keys * tile_row_bytes;
    const void* const row = rows.at(key < count ? key : 0);
    for (int d = 0; d < 2 * pairs * lanes; d += lanes, out += d % 32 == 0 ? 2 * tile_bytes - 32 : 32) {
      const int left = key < count && d < head_dim ? head_dim - d : 0;
      const U16 x = left > 0 ? load_as_bf16<T>(row, d, left) : U16{};
      std::memcpy(out, &x, sizeof x);
    }
  }
}

template <DType T>
bool pack_values(const Rows& rows, int count, int padded, int head_dim, void* packed) {
  const int tiles = 2 * tile_pairs(head_dim);
  auto* out = static_cast<std::byte*>(packed);
  U16 special{};
  for (int first = 0; first < padded; first += group_keys) {
    const void* row[group_keys];
    for (int i = 0; i < group_keys; ++i) row[i] = first + i < count ? rows.at(first + i) : nullptr;
    for (int tile = 0; tile < tiles; ++tile, out += tile_bytes) {
      const int left = head_dim - tile * tile_rows;
      U32 pairs[lanes];
      U32 columns[lanes];
      for (int i = 0; i < lanes; ++i) {
        const auto value = [&](int key) {
          if (row[key] == nullptr || left <= 0) return U16{};
          return load_as_bf16<T>(row[key], tile * tile_rows, left);
        };
        const U16 low = value(i);
        const U16 high = value(i + tile_rows);
        special |= reinterpret_cast<U16>((low & 0x7F80) == 0x7F80) | reinterpret_cast<U16>((high & 0x7F80) == 0x7F80);
        pairs[i] = widen(low) | widen(high) << 16;
      }
      transpose(pairs, columns);
      for (int i = 0; i < lanes; ++i) u32_at(out + i * tile_row_bytes) = columns[i];
    }
  }
  for (int i = 0; i < lanes; ++i)
    if (special[i] != 0) return false;
  return true;
}

void pack_keys_of(const Rows& rows, int count, int padded, int head_dim, void* packed) {
  switch (rows.dtype) {
    case DType::f32: return pack_keys<DType::f32>(rows, count, padded, head_dim, packed);
    case DType::f16: return pack_keys<DType::f16>(rows, count, padded, head_dim, packed);
    case DType::bf16: return pack_keys<DType::bf16>(rows, count, padded, head_dim, packed);
  }
}

bool pack_values_of(const Rows& rows, int count, int padded, int head_dim, void* packed) {
  switch (rows.dtype) {
    case DType::f32: return pack_values<DType::f32>(rows, count, padded, head_dim, packed);
    case DType::f16: return pack_values<DType::f16>(rows, count, padded, head_dim, packed);
    case DType::bf16: return pack_values<DType::bf16>(rows, count, padded, head_dim, packed);
  }
  return true;
}

// Computes S of whole groups of keys, [key][strip].
void multiply_keys(const void* keys, const void* queries, int count, int head_dim, float* scores) {
  [[maybe_unused]] const TileScope scope;
  const int pairs = tile_pairs(head_dim);
  constexpr int row = strip * static_cast<int>(sizeof(float));
  for (int key = 0; key < count; key += group_keys)
    multiply_group(static_cast<const std::byte*>(keys) + key * pairs * tile_row_bytes,
                   static_cast<const std::byte*>(queries), pairs, reinterpret_cast<std::byte*>(scores + key * strip),
                   tile_rows * row, tile_row_bytes, row);
}

// Returns the highest of `count` scores, a multiple of 4, -inf where all are NaN.
F32 highest(const float* column, int count) {
  F32 max[4] = {f32_at(column), f32_at(column + strip), f32_at(column + 2 * strip),
                f32_at(column + 3 * strip)};  // four chains: a maximum takes several cycles
  for (int key = 4; key < count; key += 4)
    for (int i = 0; i < 4; ++i) max[i] = larger(f32_at(column + (key + i) * strip), max[i]);
  max[0] = larger(larger(max[0], max[1]), larger(max[2], max[3]));
  return larger(max[0], splat(-__builtin_inff()));
}

void score_keys(const void* keys, const void* queries, int count, int head_dim, const Logits& logits, float* max_out,
                float* sum_out, void* exps) {
  alignas(64) float scores[max_block * strip];
  multiply_keys(keys, queries, count, head_dim, scores);
  auto* const rounded = static_cast<std::uint16_t*>(exps);
  for (int lane = 0; lane < strip; lane += lanes) {
    const F32 max = highest(scores + lane, count);
    const F32 origin = zero_if_minus_infinity(max);
    F32 sum[2] = {};
    for (int key = 0; key < count; key += 2) {
      for (int i = 0; i < 2; ++i) {
        const F32 e = exp2_cubic((f32_at(scores + (key + i) * strip + lane) - origin) * logits.scale_log2, 0);
        sum[i] += e;
        store_u16(rounded + (key + i) * strip + lane, lanes, to_bf16(e));
      }
    }
    f32_at(max_out + lane) = max;
    f32_at(sum_out + lane) = sum[0] + sum[1];
  }
}

// Computes S for half a strip.
void multiply_half(const std::byte* keys, const std::byte* queries, int count, int head_dim, float* scores) {
  [[maybe_unused]] const TileScope scope;
  const int pairs = tile_pairs(head_dim);
  constexpr int row = strip * static_cast<int>(sizeof(float));
  for (int key = 0; key < count; key += group_keys, scores += group_keys * strip) {
    tile_zero<0>();
    tile_zero<1>();
    for (int pair = 0; pair < pairs; ++pair, keys += 2 * tile_bytes) {
      tile_load<4>(keys);
      tile_load<5>(keys + tile_bytes);
      tile_load<6>(queries + pair * 2 * tile_bytes);
      tile_product<0, 4, 6>();
      tile_product<1, 5, 6>();
    }
    tile_store<0>(scores, row);
    tile_store<1>(scores + tile_rows * strip, row);
  }
}

void sum_exps(const SumArgs& args, float* max_out, float* sum_out) {
  alignas(64) float scores[max_block * strip];
  if (args.by_half())
    multiply_half(args.block.keys, static_cast<const std::byte*>(args.queries) + args.first / lanes * tile_bytes,
                  args.count, args.head_dim, scores + args.first);
  else
    multiply_keys(args.block.keys, args.queries, args.count, args.head_dim, scores);
  const int rows = ceil_div(args.count, row_tile) * row_tile;
  for (int lane = args.first; lane < args.last; lane += lanes) {
    I32 keys = I32{} + args.count;
    if (args.seen != nullptr) std::memcpy(&keys, args.seen + lane, sizeof keys);
    for (int key = args.seen == nullptr ? args.count : 0; key < rows; ++key) {
      F32& score = f32_at(scores + key * strip + lane);
      score = key < keys ? score : splat(-__builtin_inff());
    }
    const F32 max = highest(scores + lane, rows);
    const F32 origin = zero_if_minus_infinity(max);
    F32 sum[2] = {};
    for (int key = 0; key < rows; key += 2)
      for (int i = 0; i < 2; ++i)
        sum[i] += exp2_cubic((f32_at(scores + (key + i) * strip + lane) - origin) * args.logits.scale_log2, 0);
    f32_at(max_out + lane) = max;
    f32_at(sum_out + lane) = sum[0] + sum[1];
  }
}

void weigh_keys(const void* exps, int strips, int count, const float* factors, float* weights) {
  for (int key = 0; key < count; ++key) {
    F32 total{};
    for (int s = 0; s < strips; ++s) {
      const auto* row = static_cast<const std::uint16_t*>(exps) + (static_cast<std::int64_t>(s) * count + key) * strip;
      for (int lane = 0; lane < strip; lane += lanes) {
        const F32 factor = f32_at(factors + s * strip + lane);
        const F32 share = load_as_f32<DType::bf16>(row, lane, lanes) * factor;
        total += factor == F32{} ? F32{} : share;
      }
    }
    weights[key] += sum_lanes(total);
  }
}

#ifdef PBSATTN_EMULATE_AMX

bool supported() {
  return true;
}
constexpr const Permission* permission = nullptr;

#else

constexpr int tile_data = 18;  // the kernel's number of this feature

// Tells whether the processor has the instructions and the kernel saves the registers.
bool supported() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  constexpr unsigned amx_bf16 = 1U << 22;
  constexpr unsigned amx_tile = 1U << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
  if (__builtin_cpu_supports("avx512bf16") == 0 || __builtin_cpu_supports("avx512bw") == 0 ||
      __builtin_cpu_supports("avx512vl") == 0 || __builtin_cpu_supports("avx512dq") == 0)
    return false;
  constexpr int get_supported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  std::uint64_t features = 0;
  return syscall(SYS_arch_prctl, get_supported, &features) == 0 && (features >> tile_data & 1) != 0;
}

// The kernel lets this process use them: it refuses where a thread's alternate signal stack is too small for the tiles,
// and once it has agreed, it refuses such stacks.
enum class Answer : std::uint8_t { none, refused, allowed };
std::atomic<Answer> answer = Answer::none;

bool ask() {
  if (answer == Answer::allowed) return true;
  constexpr int request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  const bool allowed = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  answer = allowed ? Answer::allowed : Answer::refused;
  return allowed;
}
constexpr Permission asked{.ask = ask, .refused = [] { return answer == Answer::refused; }};
constexpr const Permission* permission = &asked;

#endif

}  // namespace
}  // namespace pbsattn::cpu::amx

const pbsattn::cpu::Kernels* pbsattn::cpu::amx_bf16_kernels() {
  static constexpr Kernels kernels{.name = "amx_bf16",
                                   .products = Precision::bf16,
                                   .element_size = 2,
                                   .gathers = false,
                                   .pack = {amx::pack_keys_of, amx::pack_values_of, amx::pack_queries},
                                   .attend_block = nullptr,
                                   .score_keys = amx::score_keys,
                                   .sum_exps = amx::sum_exps,
                                   .weigh_keys = amx::weigh_keys,
                                   .head_dim_step = 32,
                                   .key_step = amx::unit_keys,
                                   .attend_rows = amx::attend_rows,
                                   .attend_scratch_bytes = amx::attend_scratch_bytes,
                                   .permission = amx::permission};
  return amx::supported() ? &kernels : nullptr;
}

#else

const pbsattn::cpu::Kernels* pbsattn::cpu::amx_bf16_kernels() {
  return nullptr;
}

#endif
