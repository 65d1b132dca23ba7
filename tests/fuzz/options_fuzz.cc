// Throws names at the methods table, and options of any bits at validation.
#include <cstdlib>
#include <string>
#include <string_view>

#include "bytes.h"
#include "pbsattn/pbsattn.h"

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

bool one_short_line(std::string_view message) {
  return !message.empty() && message.size() < 400;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  pbsattn_options options{.struct_size = sizeof options};
  const std::string name(reinterpret_cast<const char*>(data), size);
  if (pbsattn_method(name.c_str(), &options) != PBSATTN_OK) require(one_short_line(pbsattn_last_error()));

  pbsattn::fuzz::Bytes bytes(data, size);
  options = bytes.take<pbsattn_options>();
  auto shape = bytes.take<pbsattn_shape>();
  auto device = bytes.take<pbsattn_device>();
  options.struct_size = sizeof options;
  shape.struct_size = sizeof shape;
  device.struct_size = sizeof device;
  device.reserved = 0;
  pbsattn_plan* plan = nullptr;
  // A plan of a gigabyte and more is as good as any here: nothing is allocated until it runs.
  const pbsattn_status status = pbsattn_plan_create(&options, &shape, &device, SIZE_MAX, &plan);
  require(status != PBSATTN_INTERNAL);
  if (status == PBSATTN_OK)
    require(options.top_p > 0 && options.top_p <= 1 && options.block > 0 && options.segment % options.block == 0 &&
            shape.q_len > 0 && shape.q_len <= shape.kv_len && shape.q_heads % shape.kv_heads == 0);
  else
    require(plan == nullptr && one_short_line(pbsattn_last_error()));
  pbsattn_plan_destroy(plan);
  return 0;
}
