// How the program fails: one line on stderr that names the value, the rule and the way out.
#pragma once

#include <stdexcept>
#include <string>

namespace app {

// Beyond these, 128 and a signal's number: that of what ended the program early.
enum ExitStatus { success = 0, failed = 1, usage = 2 };

class Failure : public std::runtime_error {
 public:
  explicit Failure(const std::string& message, int status = failed) : std::runtime_error(message), status_(status) {}
  int status() const noexcept { return status_; }

 private:
  int status_;
};

// A command line that can't be right, whatever the files hold.
class UsageError : public Failure {
 public:
  explicit UsageError(const std::string& message) : Failure(message, usage) {}
};

// Nobody reads what the program prints any more, as under `| head`: it ends, and there is nobody to tell.
class NobodyReads : public Failure {
 public:
  NobodyReads();
};

// From here on Ctrl-C or SIGTERM makes interrupted() true, and the same signal again ends the process at once; a pipe
// that nobody reads is an error of writing.
void catch_signals();
bool interrupted() noexcept;
void throw_if_interrupted();

}  // namespace app
