// Stands in for the CPU backend in programs that run on machines without Highway.
#include "core/executor.h"

namespace pbsattn::cpu {

std::unique_ptr<detail::Executor> make_executor(const detail::PlanSpec& /*spec*/) {
  throw Error(ErrorCode::unsupported, "device cpu: this program leaves the CPU backend out");
}

}  // namespace pbsattn::cpu
