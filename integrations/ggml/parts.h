// Work in parts, on as many threads.
#pragma once

#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace pbsattn::ggml {

// Calls part(0) to part(parts - 1), which throw nothing, each on a thread of its own, the first on the caller's;
// returns when all are done. Where there are no more threads to be had the caller takes the parts that are left.
template <class Part>
void in_parts(std::int64_t parts, const Part& part) {
  std::vector<std::jthread> helpers;  // which their end waits for
  std::int64_t started = 1;
  try {
    for (; started < parts; ++started) helpers.emplace_back(part, started);
  } catch (const std::exception&) {
  }
  part(0);
  for (; started < parts; ++started) part(started);
}

}  // namespace pbsattn::ggml
