#include "cuda/device_run.h"

namespace pbsattn::test {
namespace {

// All that a block may have, which attend takes at keys of 128 and 192 numbers.
constexpr int bytes = 227 * 1024;

__global__ void fill_shared_memory() {
  extern __shared__ volatile unsigned memory[];
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 4; i += static_cast<int>(blockDim.x)) memory[i] = ~0U;
  // Long enough that no multiprocessor is given two blocks and another none.
  for (const long long begin = clock64(); clock64() - begin < 50'000;) continue;
}

}  // namespace

void poison_shared_memory() {
  int device = 0;
  int multiprocessors = 0;
  expect_success(cudaGetDevice(&device));
  expect_success(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  expect_success(cudaFuncSetAttribute(fill_shared_memory, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  fill_shared_memory<<<multiprocessors, 256, bytes>>>();
  expect_success(cudaGetLastError());
}

}  // namespace pbsattn::test
