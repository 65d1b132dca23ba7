#include "cuda/device_run.h"

namespace pbsattn::test {
namespace {

__global__ void fill_shared_memory(int words) {
  extern __shared__ volatile unsigned memory[];
  for (int i = static_cast<int>(threadIdx.x); i < words; i += static_cast<int>(blockDim.x)) memory[i] = ~0U;
  // Long enough that no multiprocessor is given two blocks and another none.
  for (const long long begin = clock64(); clock64() - begin < 50'000;) continue;
}

}  // namespace

void poison_shared_memory() {
  int device = 0;
  int multiprocessors = 0;
  int bytes = 0;
  expect_success(cudaGetDevice(&device));
  expect_success(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  expect_success(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  expect_success(cudaFuncSetAttribute(fill_shared_memory, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  fill_shared_memory<<<multiprocessors, 256, bytes>>>(bytes / 4);
  expect_success(cudaGetLastError());
}

}  // namespace pbsattn::test
