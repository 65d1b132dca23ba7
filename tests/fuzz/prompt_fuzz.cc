// Throws bytes at the program's reader of prompts. (Of a GGUF the program itself reads the first four bytes, which it
// compares with "GGUF"; all else of it is llama.cpp's to read.)
#include <sys/mman.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <string>

#include "bytes.h"
#include "errors.h"
#include "expect.h"
#include "files.h"

using namespace pbsattn::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  const int file = memfd_create("prompt", 0);
  require(file >= 0 && write(file, data, size) == static_cast<ssize_t>(size), "a file in memory");
  bool taken = false;
  try {
    require(app::read_prompt("/proc/self/fd/" + std::to_string(file)) == text, "a prompt is the file's text");
    taken = true;
  } catch (const app::Failure& error) {
    require_line(error.what());
  }
  close(file);
  // Who writes JSON needs UTF-8 too, and says so of the same texts.
  bool utf8 = true;
  try {
    (void)nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    utf8 = false;
  }
  require(taken == (utf8 && !text.empty()), "a prompt is UTF-8 and not empty");
  return 0;
}
