#include "layer_caches.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <new>
#include <utility>

#include "parts.h"

namespace pbsattn::ggml {
namespace {

// Adds the rows of a segment's tokens, in pieces as long as their strides allow.
void add(XXH3_state_t* state, const pbsattn_view& view, const pbsattn_shape& shape, std::int64_t begin,
         std::int64_t tokens) {
  const std::int64_t element = view.dtype == PBSATTN_F32 ? 4 : 2;
  const bool one_row = view.head_stride == shape.head_dim;  // of all heads of a token
  const std::int64_t heads = one_row ? 1 : shape.kv_heads;
  std::int64_t row = one_row ? shape.kv_heads * shape.head_dim : shape.head_dim;
  std::int64_t rows = tokens;
  if (view.token_stride == row) row *= std::exchange(rows, 1);
  for (std::int64_t head = 0; head < heads; ++head)
    for (std::int64_t i = 0; i < rows; ++i)
      XXH3_64bits_update(state,
                         static_cast<const std::byte*>(view.data) +
                             (head * view.head_stride + (begin + i) * view.token_stride) * element,
                         static_cast<std::size_t>(row * element));
}

std::uint64_t sum_of(const LayerCaches::Call& call, std::int64_t segment, std::int64_t index) {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  add(&state, *call.k, call.shape, index * segment, segment);
  add(&state, *call.v, call.shape, index * segment, segment);
  return XXH3_64bits_digest(&state);
}

// Returns the checksums of segments from `first` on, computed on several threads where they are worth starting.
std::vector<std::uint64_t> sums_of(const LayerCaches::Call& call, std::int64_t segment, std::int64_t first,
                                   std::int64_t end) {
  constexpr std::int64_t bytes_per_thread = std::int64_t{1} << 21;
  const std::int64_t count = std::max<std::int64_t>(end - first, 0);
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(count));
  const std::int64_t bytes = 2 * count * segment * call.shape.kv_heads * call.shape.head_dim * 2;
  const std::int64_t parts = std::clamp<std::int64_t>(bytes / bytes_per_thread, 1, std::max(call.threads, 1));
  const auto take = [&](std::int64_t part) {
    for (std::int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i)
      sums[static_cast<std::size_t>(i)] = sum_of(call, segment, first + i);
  };
  in_parts(parts, take);
  return sums;
}

// Returns the tokens of a plan's segments, 0 where none can be kept: orders of arrival are not handed on here.
std::int64_t segment_of(const pbsattn_plan* plan) {
  pbsattn_options options{.struct_size = sizeof options};
  if (pbsattn_plan_options(plan, &options) != PBSATTN_OK) return 0;
  return options.permutation == PBSATTN_PERMUTATION_ARRIVAL ? 0 : options.segment;
}

}  // namespace

LayerCaches::Use LayerCaches::before(const Call& call, std::size_t cap) {
  const std::int64_t segment = segment_of(call.plan);
  if (call.layer < 0 || segment == 0 || call.shape.kv_len - call.shape.q_len < segment) return {};
  // Rooms grow by doubling, so that a short sequence in a large context takes little; what is kept is made again then.
  constexpr std::uint64_t least_tokens = 4096;
  const auto tokens = std::max<std::int64_t>(
      call.shape.kv_len,
      std::min(call.most_tokens, static_cast<std::int64_t>(std::bit_ceil(
                                     std::max(static_cast<std::uint64_t>(call.shape.kv_len), least_tokens)))));
  std::size_t size = 0;
  if (pbsattn_plan_cache_size(call.plan, tokens, &size) != PBSATTN_OK || size == 0) return {};
  Entry& entry = layers_[call.layer];
  if (entry.size < size) make_room(entry, size, cap);
  if (entry.cache == nullptr) return {};

  const std::uint64_t weights =
      XXH3_64bits_withSeed(call.order_weights.data(), call.order_weights.size_bytes(), call.pairs);
  const std::int64_t held = std::min(pbsattn_segment_cache_tokens(entry.cache.get()), call.shape.kv_len) / segment;
  if (entry.segment != segment || entry.weights != weights) entry.sums.clear();
  entry.segment = segment;
  entry.weights = weights;
  const auto now = sums_of(call, segment, 0, std::min(held, std::ssize(entry.sums)));
  entry.sums.resize(now.size());
  const auto same = std::ranges::mismatch(entry.sums, now).in1 - entry.sums.begin();
  entry.sums.resize(static_cast<std::size_t>(same));
  return {entry.cache.get(), same * segment};
}

void LayerCaches::after(const Call& call, const Use& use) {
  if (use.cache == nullptr) return;
  Entry& entry = layers_.at(call.layer);
  const auto known = std::ssize(entry.sums);
  const auto more = sums_of(call, entry.segment, known, pbsattn_segment_cache_tokens(use.cache) / entry.segment);
  entry.sums.insert(entry.sums.end(), more.begin(), more.end());
}

void LayerCaches::drop(std::int32_t layer) {
  if (const auto found = layers_.find(layer); found != layers_.end()) {
    used_ -= found->second.size;
    layers_.erase(found);
  }
}

void LayerCaches::make_room(Entry& entry, std::size_t size, std::size_t cap) {
  used_ -= entry.size;
  entry = {};
  if (size > cap - std::min(cap, used_)) return;
  entry.memory.reset(new (std::nothrow) std::byte[size]);  // which the system gives page by page, as it is written
  pbsattn_segment_cache* made = nullptr;
  if (entry.memory == nullptr || pbsattn_segment_cache_create(entry.memory.get(), size, &made) != PBSATTN_OK) {
    entry = {};
    return;
  }
  entry.cache.reset(made);
  used_ += entry.size = size;
}

}  // namespace pbsattn::ggml
