// How times are taken: functions in turn, on cores that nobody else slows down, for as long as that takes and is
// allowed.
//
// A machine shared with others has cores that run at a half or a quarter of their speed for seconds at a time, and says
// so nowhere. So a short loop is timed before and after every sample (peak.h). A sample counts as undisturbed if both
// times the core ran near the best pace seen; with AMX, besides, if a tile product took near the 16 cycles that it
// takes. All functions, peers too, are judged alike.
#pragma once

#include <functional>
#include <span>
#include <vector>

namespace bench {

// What seconds are counted in: those that pass, or those that this process's threads ran. On a machine shared with
// others, one thread's processor time says more than the time that passed.
enum class Clock { wall, processor };

struct Sampling {
  int runs = 5;       // undisturbed samples wanted of each function
  double limit = 60;  // seconds after which it ends with those it has, once each function ran that often at all
  int threads = 1;    // that the functions use: as many cores are looked for
  Clock clock = Clock::wall;
};

struct Samples {
  std::vector<double> seconds;
  std::vector<bool> quiet;  // whether the sample was undisturbed

  int undisturbed() const;
  // Of something measured with each sample, what counts: that of undisturbed ones, or all if fewer than 3 are.
  std::vector<double> counted(std::span<const double> values) const;
  std::vector<double> counted() const { return counted(seconds); }
};

// Runs `functions` in turn: A B A B ..., so that a machine whose speed drifts drifts for all; once unmeasured, then
// until each has its undisturbed samples. The calling thread, and threads that are started meanwhile, run on the cores
// found, and again on all of them afterwards.
std::vector<Samples> sample(const Sampling& sampling, const std::vector<std::function<void()>>& functions);

double median(std::vector<double> values);
// (max - min) / median; 0 of nothing
double spread(const std::vector<double>& values);

}  // namespace bench
