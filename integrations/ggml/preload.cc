// LD_PRELOAD=libggml-pbsattn-preload.so: registers the plug-in before main() in programs that ignore
// GGML_BACKEND_PATH. Such programs have their backends compiled in and never look for others.
//
// The plug-in is the file that GGML_BACKEND_PATH names, else libggml-pbsattn.so beside this library. A process without
// ggml is left alone, so the variable may be set for a whole shell.
#include <dlfcn.h>

#include <cstdlib>
#include <exception>
#include <string>

#include "ggml-backend.h"

namespace {

// Names are looked up in the program itself: linking ggml here would drag it into every process.
template <class Function>
Function* program_function(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

std::string plugin_beside_this_library() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&plugin_beside_this_library), &info) == 0) return {};
  const std::string self = info.dli_fname;
  const auto slash = self.rfind('/');
  return (slash == std::string::npos ? "" : self.substr(0, slash + 1)) + "libggml-pbsattn.so";
}

__attribute__((constructor)) void register_plugin() {
  const auto load = program_function<decltype(ggml_backend_load)>("ggml_backend_load");
  const auto load_all = program_function<decltype(ggml_backend_load_all)>("ggml_backend_load_all");
  const auto registered = program_function<decltype(ggml_backend_reg_by_name)>("ggml_backend_reg_by_name");
  const auto count = program_function<decltype(ggml_backend_reg_count)>("ggml_backend_reg_count");
  if (load == nullptr || load_all == nullptr || registered == nullptr || count == nullptr) return;

  // Programs whose backends are plug-ins load them only while none is registered, so they must come first.
  if (count() == 0) load_all();
  const char* named = std::getenv("GGML_BACKEND_PATH");
  if (registered("PBSAttn") == nullptr && named != nullptr && *named != '\0') load(named);
  if (registered("PBSAttn") != nullptr) return;
  try {
    load(plugin_beside_this_library().c_str());
  } catch (const std::exception&) {
    // No memory for the path: the process does without us.
  }
}

}  // namespace
