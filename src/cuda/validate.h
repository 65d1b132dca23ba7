// What the CUDA backend refuses beyond what every backend does.
#pragma once

#include "core/executor.h"

namespace pbsattn::cuda {

// Check a device, and a plan against what the backend takes, when the plan is made. Throw unsupported.
void check_device(int index);
void check_limits(const detail::PlanSpec& spec);

// Checks when it runs: dtypes, alignment, and whose memory it is. Throws unsupported or invalid_argument.
void check_buffers(const detail::PlanSpec& spec, const Inputs& inputs, const Outputs& outputs,
                   const std::byte* workspace);

}  // namespace pbsattn::cuda
