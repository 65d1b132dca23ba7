// The roof over a code path: what one core multiplies and adds when no operand comes from memory.
#pragma once

#include <string_view>

namespace bench {

// GFLOP/s of one core at the widest multiply-add that the path uses, the best of many short loops; 0 where
// this is not known. Needs the path's instructions.
double peak_rate(std::string_view path);

// GB/s at which one core reads memory that no cache holds.
double read_bandwidth();

// How fast the core at hand multiplies right now, by two loops of some microseconds.
struct Pace {
  double vectors = 0;  // seconds of a loop of the processor's widest multiply-adds
  double tiles = 0;    // cycles of a tile product whose operands come from the first-level cache; 0 without AMX
};
Pace pace();

}  // namespace bench
