// Files in and out, with errors that say what to do.
#pragma once

#include <string>

namespace app {

// A prompt: text in UTF-8, not empty.
std::string read_prompt(const std::string& path);

// Settings by layer and head: whatever text there is, for the plug-in to judge.
std::string read_settings(const std::string& path);

// A place to write to at the end of a long run. The constructor fails at once if the place can't be
// written; the file appears whole, under its name, or not at all.
class OutputFile {
 public:
  explicit OutputFile(std::string path);
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile();

  void commit(const std::string& text);

 private:
  std::string path_;
  std::string partial_;  // where the text stands until it is whole; path_ itself for a device or a pipe
};

}  // namespace app
