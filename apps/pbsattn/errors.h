// How the program fails: one line on stderr that names the value, the rule and the way out.
#pragma once

#include <stdexcept>
#include <string>

namespace app {

enum ExitStatus { success = 0, failed = 1, usage = 2, interrupted_by_user = 130 };

class Failure : public std::runtime_error {
 public:
  explicit Failure(const std::string& message, ExitStatus status = failed)
      : std::runtime_error(message), status_(status) {}
  ExitStatus status() const noexcept { return status_; }

 private:
  ExitStatus status_;
};

// A command line that can't be right, whatever the files hold.
class UsageError : public Failure {
 public:
  explicit UsageError(const std::string& message) : Failure(message, usage) {}
};

// From here on Ctrl-C makes interrupted() true; a second Ctrl-C ends the process at once.
void catch_interrupt();
bool interrupted() noexcept;
void throw_if_interrupted();

}  // namespace app
