// Runs problems on a GPU: copies in and out, poisoned memory, guards around what the library may write.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <span>
#include <string>

#include "cuda/limits.h"
#include "support/case.h"
#include "support/problem.h"

namespace pbsattn::test {

// Device memory between two guards, filled with NaN of every dtype.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  std::byte* data() const { return memory_ + guard; }
  std::size_t size() const { return bytes_; }
  void upload(const void* from);
  void download(void* to) const;
  void poison();
  bool guards_intact() const;

 private:
  static constexpr std::size_t guard = 4096;
  std::size_t bytes_;
  std::byte* memory_ = nullptr;
};

// A problem's tensors in device memory.
class DeviceProblem {
 public:
  explicit DeviceProblem(const Problem& problem);

  Inputs inputs() const { return inputs_; }
  Outputs outputs() const { return outputs_; }
  void upload_inputs(const Problem& problem);
  void poison_inputs();
  void poison_outputs();
  // Enqueues copies of another problem's inputs, of the same shape, by slow kernels (copy_slowly).
  void copy_inputs_slowly(const DeviceProblem& from, cudaStream_t stream);
  // Enqueues such a copy of the outputs into memory of output_bytes().
  void copy_output_slowly(const DeviceMemory& to, cudaStream_t stream) const;
  std::size_t output_bytes() const { return out_.size(); }
  // Copies out, lse and kept orders back, and checks that nothing around them was written.
  void download_outputs(Problem& problem) const;

 private:
  DeviceMemory q_, k_, v_, out_, lse_, order_weights_, order_, sinks_;
  Inputs inputs_;
  Outputs outputs_;
};

struct DeviceRunOptions {
  std::size_t cap = Plan::no_cap;
  std::size_t misalign = 1;  // bytes the workspace starts after an aligned address
};

// support/problem.h's run(), on CUDA device 0.
RunResult run_on_device(const Options& options, Problem& problem, const DeviceRunOptions& how = {});
RunResult run_on_device(std::span<const Options> heads, Problem& problem, const DeviceRunOptions& how = {});

// Forgets the orders that a run wrote.
void forget_written(Problem& problem);

// Enqueues a kernel that lets the stream's next one start at once, and only copies bytes, a multiple of 4, long after.
void copy_slowly(void* to, const void* from, std::size_t bytes, cudaStream_t stream);

// Leaves NaN of every dtype in the shared memory of all multiprocessors, where a kernel that reads too early finds it.
void poison_shared_memory();

// Returns a shape with other widths, and what names them in a test's name: "96", "192v128".
inline Shape with_widths(Shape shape, cuda::Widths widths) {
  shape.head_dim = widths.keys;
  shape.head_dim_v = widths.values;
  return shape;
}
inline std::string name_of(cuda::Widths widths) {
  const std::string keys = std::to_string(widths.keys);
  return widths.values == widths.keys ? keys : keys + "v" + std::to_string(widths.values);
}

// Fails the test if a CUDA call failed.
void expect_success(cudaError_t error);

}  // namespace pbsattn::test
