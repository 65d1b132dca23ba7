#include "cuda/device_run.h"
#include "cuda/sm90/launch.h"

namespace pbsattn::test {
namespace {

__global__ void copy_after_a_while(unsigned* to, const unsigned* from, std::size_t count) {
  cuda::let_next_kernel_start();
  for (const long long begin = clock64(); clock64() - begin < 100'000;) continue;
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) to[i] = from[i];
}

}  // namespace

// In few thread blocks, so that most multiprocessors have room for the next kernel.
void copy_slowly(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  copy_after_a_while<<<8, 256, 0, stream>>>(static_cast<unsigned*>(to), static_cast<const unsigned*>(from), bytes / 4);
  expect_success(cudaGetLastError());
}

}  // namespace pbsattn::test
