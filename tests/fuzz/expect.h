// What every target expects: conditions that end it, and counts that it prints when it ends.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace pbsattn::fuzz {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "FUZZ: broken: %s\n", what);
  std::abort();
}

inline void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

// A message as the library promises it: one line that a terminal shows.
inline void require_line(std::string_view message) {
  require(!message.empty(), "an error has a message");
  for (const char c : message)
    if (static_cast<unsigned char>(c) < 0x20) {
      std::fprintf(stderr, "message: %.*s\n", static_cast<int>(message.size()), message.data());
      fail("a message is one line without control characters");
    }
}

// Counts a part of a whole. As the process ends it prints both, and makes it end with 1 where after enough inputs the
// share isn't what it has to be: a target that refuses all that it makes finds nothing.
class Share {
 public:
  Share(const char* name, double least, double most = 1) : name_(name), least_(least), most_(most) {}
  Share(const Share&) = delete;
  Share& operator=(const Share&) = delete;
  ~Share() {
    if (whole_ == 0) return;
    const double share = static_cast<double>(part_) / static_cast<double>(whole_);
    std::fprintf(stderr, "FUZZ: %s: %lld of %lld (%.3g %%)\n", name_, static_cast<long long>(part_),
                 static_cast<long long>(whole_), 100 * share);
    constexpr std::int64_t enough = 2000;
    if (whole_ < enough || (share >= least_ && share <= most_)) return;
    std::fprintf(stderr, "FUZZ: broken: %s: has to lie in %g .. %g %%\n", name_, 100 * least_, 100 * most_);
    std::_Exit(1);
  }

  void count(std::int64_t part, std::int64_t whole = 1) {
    part_ += part;
    whole_ += whole;
  }

 private:
  const char* name_;
  double least_, most_;
  std::int64_t part_ = 0, whole_ = 0;
};

}  // namespace pbsattn::fuzz
