// Files in and out, with errors that say what to do.
#pragma once

#include <fstream>
#include <memory>
#include <string>
#include <string_view>

#include "learned_file.h"

namespace app {

// A prompt: text in UTF-8, not empty.
std::string read_prompt(const std::string& path);

// The file of a learned order.
std::shared_ptr<const pbsattn::learned::File> read_learned(const std::string& path);

// Settings by layer and head: whatever text there is, for the plug-in to judge.
std::string read_settings(const std::string& path);

// Writes to the standard output, at once. Throws where that can't be: a full disk ends the program with an error, a
// pipe that nobody reads quietly.
void print(std::string_view text);

// A place to write to at the end of a long run. The constructor fails at once if the place can't be
// written; the file appears whole, under its name, or not at all. A symbolic link stays one: what it names is written.
class OutputFile {
 public:
  explicit OutputFile(std::string path);
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile();

  void commit(const std::string& text);

 private:
  [[noreturn]] void fail(const char* way_out) const;

  std::string path_;     // as it was given
  std::string target_;   // what path_ leads to
  std::string partial_;  // where the text stands until it is whole; target_ itself for a device or a pipe
  std::ofstream file_;   // stays open: the reader of a pipe would take closing it for the end
};

}  // namespace app
