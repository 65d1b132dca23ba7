#include "cpu/kernels/kernels.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>
#include <string>

namespace pbsattn::cpu {

KernelList runnable_kernels() {
  static const KernelList supported = [] {
    KernelList list;
    for (const Kernels* bf16 : {amx_bf16_kernels(), avx512_bf16_kernels()})
      if (bf16 != nullptr) list.push_back(bf16);
    for (const Kernels* f32 : f32_kernels()) list.push_back(f32);
    return list;
  }();
  KernelList list = supported;
  std::erase_if(
      list, [](const Kernels* kernels) { return kernels->permission != nullptr && kernels->permission->refused(); });
  return list;
}

KernelList candidates(Precision products) {
  const KernelList list = runnable_kernels();
  if (const char* forced = std::getenv("PBSATTN_CPU_PATH"); forced != nullptr && *forced != '\0') {
    const auto named = std::ranges::find(list, std::string_view(forced), &Kernels::name);
    if (named != list.end()) return {*named};
    std::vector<std::string_view> names;
    names.reserve(list.size());
    for (const Kernels* kernels : list) names.push_back(kernels->name);
    throw Error(ErrorCode::unsupported, fmt::format("PBSATTN_CPU_PATH \"{}\": no such path here; this machine runs {}",
                                                    forced, fmt::join(names, ", ")));
  }
  KernelList found;
  for (const Precision wanted : {products, Precision::f32})
    for (const Kernels* kernels : list) {
      if (kernels->products != wanted) continue;
      found.push_back(kernels);
      if (kernels->permission == nullptr) return found;
    }
  return found;
}

const Kernels& choose(std::span<const Kernels* const> candidates) {
  for (const Kernels* kernels : candidates)
    if (kernels->permission == nullptr || kernels->permission->ask()) return *kernels;
  throw Error(ErrorCode::unsupported,
              fmt::format("path {}: the system doesn't let this process take it; unset PBSATTN_CPU_PATH",
                          candidates.front()->name));
}

}  // namespace pbsattn::cpu
