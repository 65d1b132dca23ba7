// What the tests with a real model read: the model's path and a real text, or why there is none.
#pragma once

#include <string>

namespace pbsattn::ggml::test {

// PBSATTN_TEST_MODEL from the environment, else from the build's configuration; "" if neither names one.
std::string model_path();
inline constexpr const char* no_model =
    "PBSATTN_TEST_MODEL names no model: ./dev test fetches SmolLM2 and sets it; or set it to a GGUF file";

// The file that PBSATTN_TEST_TEXT names, else the distribution's licence texts in one; "" if there is neither.
std::string real_text();
inline constexpr const char* no_text =
    "no real text: set PBSATTN_TEST_TEXT to a text of 20 KB or more (there is no /usr/share/common-licenses here)";

}  // namespace pbsattn::ggml::test
