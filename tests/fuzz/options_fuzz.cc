// Throws options, shapes and devices at planning: a named method at a likely shape, of which a few words hold anything.
#include <cstring>
#include <string_view>

#include "bytes.h"
#include "expect.h"
#include "sized.h"

namespace {

using namespace pbsattn::fuzz;

Share accepted("options that are planned", 0.05);

// Writes any bits to up to three words of a struct, but for its size.
template <class Word, class Struct>
void spoil(Struct& value, Bytes& bytes) {
  constexpr std::size_t first = sizeof(std::size_t) / sizeof(Word);
  constexpr std::size_t words = sizeof(Struct) / sizeof(Word);
  for (int left = bytes.take<std::uint8_t>() % 8 - 4; left > 0; --left) {
    const std::size_t at = first + bytes.take<std::uint8_t>() % (words - first);
    const auto word = bytes.take<Word>();
    std::memcpy(reinterpret_cast<std::byte*>(&value) + at * sizeof(Word), &word, sizeof word);
  }
}

std::size_t count_methods() {
  std::size_t count = 0;
  while (pbsattn_method_name(count) != nullptr) ++count;
  return count;
}

void require_rules(const pbsattn_options& options, const pbsattn_shape& shape) {
  require(options.top_p > 0 && options.top_p <= 1 && options.block > 0 && options.segment % options.block == 0 &&
              options.softcap >= 0 && options.window >= 1,
          "options that are planned keep the rules");
  require(
      shape.head_dim_v >= 0 && shape.q_len > 0 && shape.q_len <= shape.kv_len && shape.q_heads % shape.kv_heads == 0,
      "a shape that is planned keeps the rules");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::size_t methods = count_methods();
  Bytes bytes(data, size);
  auto options = sized<pbsattn_options>();
  require(pbsattn_method(pbsattn_method_name(bytes.take<std::uint8_t>() % methods), &options) == PBSATTN_OK,
          "methods that are listed are there");
  auto shape = sized<pbsattn_shape>();
  shape.batch = bytes.take_near(1, 3);
  shape.kv_heads = bytes.take_near(1, 8);
  shape.q_heads = shape.kv_heads * bytes.take_near(1, 8);
  shape.kv_len = 1 + bytes.take<std::uint32_t>() % (1U << 24);
  shape.q_len = 1 + bytes.take<std::uint32_t>() % shape.kv_len;
  shape.head_dim = 8 * bytes.take_near(1, 32);
  auto device = sized<pbsattn_device>();
  device.kind = static_cast<std::int32_t>(bytes.take_near(0, 1));
  spoil<std::int32_t>(options, bytes);
  spoil<std::int64_t>(shape, bytes);
  spoil<std::int32_t>(device, bytes);
  const std::size_t cap = bytes.take_rarely(4) ? bytes.take<std::size_t>() : SIZE_MAX;

  pbsattn_plan* plan = nullptr;
  // A plan of a gigabyte and more is as good as any here: nothing is allocated until it runs.
  const OtherVersion other_options(options, bytes);
  const OtherVersion other_shape(shape, bytes);
  const OtherVersion other_device(device, bytes);
  const pbsattn_status status =
      pbsattn_plan_create(other_options.get(), other_shape.get(), other_device.get(), cap, &plan);
  accepted.count(status == PBSATTN_OK ? 1 : 0);
  require(status != PBSATTN_INTERNAL, "options are planned or refused");
  if (status == PBSATTN_OK) {
    require(other_options.known() && other_shape.known() && other_device.known(),
            "what is planned has no fields that are set and unknown");
    if (other_options.whole() && other_shape.whole()) require_rules(options, shape);
    require(pbsattn_plan_workspace_size(plan) <= cap, "a plan's workspace stays under its cap");
    require(!std::string_view(pbsattn_plan_path(plan)).empty(), "a plan has a path");
    auto resolved = sized<pbsattn_options>();
    require(pbsattn_plan_options(plan, &resolved) == PBSATTN_OK && resolved.scale > 0, "a plan has options");
  } else {
    require(plan == nullptr, "where there is an error, there is no plan");
    require_line(pbsattn_last_error());
  }
  pbsattn_plan_destroy(plan);
  return 0;
}
