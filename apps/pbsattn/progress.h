// How far a long step is, on stderr, told by a thread of its own: a bar with ETA, or a line a minute where stderr is no
// terminal.
#pragma once

#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <utility>

namespace app {

class Progress {
 public:
  // Where it is told, and how often in lines.
  struct Output {
    std::FILE* file = stderr;
    std::chrono::milliseconds line_every = std::chrono::minutes(1);
  };

  // `fraction` gives how much is done, in [0, 1], and is called from another thread.
  Progress(std::string label, std::function<double()> fraction) : Progress(std::move(label), std::move(fraction), {}) {}
  Progress(std::string label, std::function<double()> fraction, Output output);
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress();  // stops, and wipes the bar

 private:
  std::jthread thread_;
};

}  // namespace app
