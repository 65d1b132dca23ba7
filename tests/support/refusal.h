// What the library says where it refuses.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn::test {

// Runs `body` and returns the message of the Error of this code that it must throw.
template <class Body>
std::string refusal_of(Body&& body, ErrorCode code = ErrorCode::invalid_argument) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was refused";
  return {};
}

}  // namespace pbsattn::test
