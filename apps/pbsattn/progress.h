// A progress bar with ETA on stderr, drawn by a thread of its own; silent where stderr is no terminal.
#pragma once

#include <functional>
#include <string>
#include <thread>

namespace app {

class Progress {
 public:
  // `fraction` gives how much is done, in [0, 1], and is called from another thread.
  Progress(std::string label, std::function<double()> fraction);
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress();  // stops and wipes the bar

 private:
  std::jthread thread_;
};

}  // namespace app
