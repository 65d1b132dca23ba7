// Stands in for the CPU backend in the GPU test program, which runs on machines without Highway.
#include "core/executor.h"

namespace pbsattn::cpu {

std::unique_ptr<detail::Executor> make_executor(detail::PlanSpec /*spec*/) {
  throw Error(ErrorCode::unsupported, "device cpu: the GPU test program leaves the CPU backend out");
}

}  // namespace pbsattn::cpu
