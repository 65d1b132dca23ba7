#include "cpu/kernels.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>
#include <string>

namespace pbsattn::cpu {

const std::vector<const Kernels*>& runnable_kernels() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> list;
    for (const Kernels* bf16 : {amx_bf16_kernels(), avx512_bf16_kernels()})
      if (bf16 != nullptr) list.push_back(bf16);
    for (const Kernels* f32 : f32_kernels()) list.push_back(f32);
    return list;
  }();
  return found;
}

const Kernels& choose_kernels(Precision products) {
  const auto& list = runnable_kernels();
  if (const char* forced = std::getenv("PBSATTN_CPU_PATH"); forced != nullptr && *forced != '\0') {
    const auto named = std::ranges::find(list, std::string_view(forced), &Kernels::name);
    if (named != list.end()) return **named;
    std::vector<std::string_view> names;
    names.reserve(list.size());
    for (const Kernels* kernels : list) names.push_back(kernels->name);
    throw Error(ErrorCode::unsupported, fmt::format("PBSATTN_CPU_PATH \"{}\": no such path here; this machine runs {}",
                                                    forced, fmt::join(names, ", ")));
  }
  const auto matching = std::ranges::find(list, products, &Kernels::products);
  if (matching != list.end()) return **matching;
  return **std::ranges::find(list, Precision::f32, &Kernels::products);
}

}  // namespace pbsattn::cpu
