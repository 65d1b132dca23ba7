// What an options' keep rule comes to, for every backend.
#pragma once

#include "pbsattn/pbsattn.hpp"

namespace pbsattn {

// Whether the rule keeps every block whatever its score, so that nothing needs to be scored.
inline bool keeps_every_block(const Options& options) {
  switch (options.keep) {
    case KeepRule::all: return true;
    case KeepRule::top_p: return options.top_p == 1.0F;
    case KeepRule::threshold: return options.threshold == 0.0F || options.floor_top_p == 1.0F;
  }
  return false;
}

}  // namespace pbsattn
