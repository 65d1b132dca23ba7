// Launches of kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <type_traits>

namespace pbsattn::cuda {

// Whether a kernel may start before the stream's earlier kernels end. It then calls wait_for_earlier_kernels() before
// it reads what they wrote, and before it writes what they read.
enum class Start { after_earlier_kernels, early };

// Launches a kernel with `shared_bytes` of dynamic shared memory.
template <class... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, std::size_t shared_bytes, cudaStream_t stream,
                   Start start, const std::type_identity_t<Params>&... params) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = start == Start::early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

// Makes calls one after the other until one fails, and returns its error.
template <class... Calls>
cudaError_t in_order(Calls&&... calls) {
  cudaError_t error = cudaSuccess;
  static_cast<void>((((error = calls()) == cudaSuccess) && ...));
  return error;
}

// Counts the current device's multiprocessors.
inline cudaError_t count_multiprocessors(int& count) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

#ifdef __CUDACC__
// Lets the stream's next kernel start as soon as there is room for it.
__device__ inline void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// Returns when the stream's earlier kernels are done and their writes can be read.
__device__ inline void wait_for_earlier_kernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
#endif

}  // namespace pbsattn::cuda
