// Throws text at the plug-in's settings by layer and head.
#include <stdexcept>

#include "bytes.h"
#include "expect.h"
#include "layer_settings.h"
#include "sized.h"

using namespace pbsattn::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  auto base = sized<pbsattn_options>();
  require(pbsattn_method("pbs", &base) == PBSATTN_OK, "pbs is a method");
  try {
    const auto settings = pbsattn::ggml::LayerSettings::parse({reinterpret_cast<const char*>(data), size}, base);
    constexpr std::int64_t q_heads = 4;
    for (const std::int32_t layer : {-1, 0, 1, 2}) try {
        const auto heads = settings.heads(layer, q_heads, {base});
        require(heads.size() == 1 || heads.size() == q_heads, "options of one head or of each");
      } catch (const std::runtime_error& error) {
        require_line(error.what());
      }
  } catch (const std::runtime_error& error) {
    require_line(error.what());
  }
  return 0;
}
