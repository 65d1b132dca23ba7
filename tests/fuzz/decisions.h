// Whether a head's order of keys and lists of blocks are the reference's, but for what rounding explains.
#pragma once

#include <cstdint>

#include "expect.h"
#include "pbsattn/pbsattn.hpp"
#include "support/ties.h"

namespace pbsattn::fuzz {

// Counts decisions that are near ties. As the process ends it prints how many, and how far the farthest was from a tie.
class Ties {
 public:
  explicit Ties(const char* name) : name_(name) {}
  Ties(const Ties&) = delete;
  Ties& operator=(const Ties&) = delete;
  ~Ties() {
    std::fprintf(stderr, "FUZZ: %s: %lld of %lld, by ties within %.3g, of what is allowed at most %.3g\n", name_,
                 static_cast<long long>(others_), static_cast<long long>(whole_), farthest_, share_);
  }

  void same() { ++whole_; }
  void other(double distance, double allowed) {
    ++whole_;
    ++others_;
    farthest_ = distance > farthest_ ? distance : farthest_;
    const double share = allowed > 0 ? distance / allowed : 0;
    share_ = share > share_ ? share : share_;
  }

 private:
  const char* name_;
  std::int64_t others_ = 0, whole_ = 0;
  double farthest_ = 0, share_ = 0;
};

struct HeadCall {
  Inputs inputs;
  Options options;  // with scale resolved
  Geometry geometry;
  std::int64_t flat;  // head of all batch entries
  bool bf16_products;
  KeyOrder kept;  // of Permutation::arrival
};

void expect_decisions(const HeadCall& call, const Trace& trace, Ties& orders, Ties& lists);

}  // namespace pbsattn::fuzz
