// The CUDA run-time library's calls as the host side uses them: errors as exceptions, the current device, times of
// events.
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <vector>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn::cuda {

[[noreturn]] inline void fail(cudaError_t error, const char* what) {
  throw Error(error == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::internal,
              fmt::format("{}: CUDA error {} ({}); the stream's work up to here is not to be trusted", what,
                          static_cast<int>(error), cudaGetErrorString(error)));
}

// Tells whether a call succeeded. The run-time library also keeps a thread's last error for whoever asks next. Those of
// our calls are thrown, or don't matter, so we take them back: a caller who asks after a call of its own isn't to find
// ours.
inline bool succeeded(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error == cudaSuccess;
}
inline void check(cudaError_t error, const char* what) {
  if (!succeeded(error)) fail(error, what);
}

// Makes a device current for as long as this lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    check(cudaGetDevice(&previous_), "current device");
    if (previous_ == index) return;
    check(cudaSetDevice(index), "choosing the plan's device");
    changed_ = true;
  }
  ~CurrentDevice() {
    if (changed_) succeeded(cudaSetDevice(previous_));
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Events on a stream, for the seconds between them.
class Timeline {
 public:
  explicit Timeline(cudaStream_t stream) : stream_(stream) {}
  ~Timeline() {
    for (const cudaEvent_t event : events_) succeeded(cudaEventDestroy(event));
  }
  Timeline(const Timeline&) = delete;
  Timeline& operator=(const Timeline&) = delete;

  void mark() {
    cudaEvent_t event = nullptr;
    check(cudaEventCreate(&event), "timing event");
    events_.push_back(event);
    check(cudaEventRecord(event, stream_), "timing event");
  }
  // Returns the time from mark `i` to the next; the stream's work must be done.
  double seconds(std::size_t i) const {
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, events_[i], events_[i + 1]), "timing event");
    return milliseconds * 1e-3;
  }
  std::size_t size() const { return events_.size(); }

 private:
  cudaStream_t stream_;
  std::vector<cudaEvent_t> events_;
};

}  // namespace pbsattn::cuda
