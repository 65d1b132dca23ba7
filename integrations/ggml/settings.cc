#include "settings.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string_view>
#include <type_traits>
#include <utility>

#include "core/capi/c_structs.h"
#include "core/options/c_options.h"
#include "guard.h"
#include "log.h"

PBSATTN_SIZED_STRUCT(ggml_pbsattn_config, reserved, 48);

namespace pbsattn::ggml {
namespace {

thread_local std::string last_error;

// Collects the first thing that is wrong with the environment.
class Reader {
 public:
  Reader(const std::function<const char*(const char*)>& variable, std::string* error)
      : variable_(variable), error_(error) {}

  // The variable's value; an empty one counts as unset.
  std::optional<std::string_view> text(const char* name) const {
    const char* value = variable_(name);
    if (value == nullptr || *value == '\0') return std::nullopt;
    return value;
  }

  template <class Number>
  void number(const char* name, std::string_view rule, Number* out) {
    const auto value = text(name);
    if (!value) return;
    Number parsed{};
    const auto [end, code] = std::from_chars(value->data(), value->data() + value->size(), parsed);
    if (code == std::errc() && end == value->data() + value->size())
      *out = parsed;
    else
      fail(name, *value, rule);
  }

  struct Choice {
    std::string_view name;
    std::int32_t value;
  };
  template <std::size_t n>
  std::optional<std::int32_t> choice(const char* name, const std::array<Choice, n>& choices) {
    const auto value = text(name);
    if (!value) return std::nullopt;
    std::string names;
    for (const Choice& choice : choices) {
      if (*value == choice.name) return choice.value;
      names += (names.empty() ? "" : ", ") + std::string(choice.name);
    }
    fail(name, *value, "one of " + names);
    return std::nullopt;
  }

  // Sets an option where its variable says so.
  template <class Field>
  void option(const OptionInfo& info, const Field&, Options* options, LayerSettings::Changes* given) {
    const std::string name = variable_of(info.name);
    const auto value = text(name.c_str());
    if (!value) return;
    try {
      set_option(*options, info.name, *value);
      given->emplace_back(info.name, *value);
    } catch (const Error&) {
      std::string rule(info.rule);
      if constexpr (std::is_enum_v<Field>)
        if (rule.empty()) rule = fmt::format("one of {}", fmt::join(Names<Field>::values, ", "));
      fail(name.c_str(), *value, rule);
    }
  }

  void flag(const char* name, bool* out) {
    if (const auto value = choice(name, std::array<Choice, 2>{{{"0", 0}, {"1", 1}}})) *out = *value != 0;
  }

  void fail(std::string_view message) {
    if (error_->empty()) *error_ = message;
  }

 private:
  void fail(const char* name, std::string_view value, std::string_view rule) {
    fail(fmt::format("{} \"{}\": not {}; correct it or unset it", name, value, rule));
  }

  const std::function<const char*(const char*)>& variable_;
  std::string* error_;
};

struct State {
  std::mutex mutex;
  Settings settings;
  Observer observer;
};

State& state() noexcept {
  static State* const shared = [] {
    State& made = immortal<State>();
    made.settings.config.mode = GGML_PBSATTN_MODE_OFF;  // unless the environment can be read
    guarded(0, [&made] {
      std::string error;
      made.settings = read_environment([](const char* name) { return std::getenv(name); }, &error);
      if (!error.empty()) log(GGML_LOG_LEVEL_ERROR, error + "; attention stays with ggml's own kernel");
      return 0;
    });
    return &made;
  }();
  return *shared;
}

// What a caller's config asks for; `options` are those in force.
Config read_config(const ggml_pbsattn_config* caller, const pbsattn_options& options) {
  const ggml_pbsattn_config config = read_struct(caller, "config");
  require_zero(config.reserved, "config");
  if (config.check != 0 && config.check != 1) refuse(fmt::format("config.check {}: neither 0 nor 1", config.check));
  return {
      .mode = config.mode,
      .options = config.options == nullptr ? options : read_struct(config.options, "config.options", default_options),
      .device = config.device,
      .min_tokens = config.min_tokens,
      .workspace_cap = config.workspace_cap,
      .check = config.check != 0};
}

void write_config(ggml_pbsattn_config* caller, const Config& config) {
  pbsattn_options* options = read_struct(caller, "config").options;
  if (options != nullptr) write_settings(options, "config.options", config.options, default_options);
  write_struct(caller, "config",
               {.struct_size = sizeof(ggml_pbsattn_config),
                .options = options,
                .min_tokens = config.min_tokens,
                .workspace_cap = config.workspace_cap,
                .mode = config.mode,
                .device = config.device,
                .check = config.check ? 1 : 0,
                .reserved = 0});
}

std::shared_ptr<const learned::File> read_learned(const std::string& path) {
  return std::make_shared<const learned::File>(learned::read(path));
}

}  // namespace

Config default_config() {
  Config config;
  pbsattn_method("auto", &config.options);
  config.options.precision = PBSATTN_PRECISION_BF16;
  return config;
}

std::optional<std::string> broken_rule(const Config& config) {
  if (config.mode < GGML_PBSATTN_MODE_OFF || config.mode > GGML_PBSATTN_MODE_GGML)
    return fmt::format("mode {}: no such mode; 0 is off, 1 pbsattn, 2 ggml", config.mode);
  if (config.min_tokens < GGML_PBSATTN_MIN_TOKENS_FLOOR)
    return fmt::format(
        "min_tokens {}: under {}, where llama.cpp's -fa auto would find flash attention on a foreign device and "
        "turn it off; the default is 512",
        config.min_tokens, GGML_PBSATTN_MIN_TOKENS_FLOOR);
  if (auto wrong = sets_models_own(config.options)) return wrong;
  // Options are judged where they always are: by planning a small call with them.
  const pbsattn_shape shape{.struct_size = sizeof shape,
                            .batch = 1,
                            .q_heads = 1,
                            .kv_heads = 1,
                            .q_len = 512,
                            .kv_len = 512,
                            .head_dim = 64};
  const pbsattn_device device{
      .struct_size = sizeof device, .kind = config.device, .threads = 1, .index = 0, .reserved = 0};
  pbsattn_plan* plan = nullptr;
  const pbsattn_status status = pbsattn_plan_create(&config.options, &shape, &device, SIZE_MAX, &plan);
  pbsattn_plan_destroy(plan);
  if (status != PBSATTN_OK) return pbsattn_last_error();
  return std::nullopt;
}

std::string variable_of(std::string_view option) {
  std::string name = "PBSATTN_";
  for (const char c : option) name += static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c);
  return name;
}

Settings read_environment(const std::function<const char*(const char*)>& variable, std::string* error) {
  error->clear();
  Settings settings;
  settings.config = default_config();
  Config& config = settings.config;
  Reader reader(variable, error);

  using Choice = Reader::Choice;
  if (const auto mode = reader.choice("PBSATTN_MODE", std::array<Choice, 3>{{{"pbsattn", GGML_PBSATTN_MODE_PBSATTN},
                                                                             {"ggml", GGML_PBSATTN_MODE_GGML},
                                                                             {"off", GGML_PBSATTN_MODE_OFF}}}))
    config.mode = *mode;
  const std::string method(reader.text("PBSATTN_METHOD").value_or("auto"));
  const auto learned = reader.text("PBSATTN_LEARNED");
  bool by_file = false;
  LayerSettings::Changes given;
  try {
    set_method(method, &config.options);
    const MethodText parts = split_method(method);
    by_file = learned && parts.name == "auto";
    if (by_file) {
      set_method(learned::method, &config.options);
      for (const auto& [name, value] : parts.options) given.emplace_back(name, value);
      LayerSettings::apply(given, &config.options);
    }
  } catch (const Error& wrong) {
    reader.fail(fmt::format("PBSATTN_METHOD: {}", wrong.what()));
  }
  Options options = to_cpp(config.options);
  visit_option_rows([&](const OptionInfo& info, const auto& field) { reader.option(info, field, &options, &given); },
                    options);
  config.options = to_c(options);
  reader.number("PBSATTN_MIN_TOKENS", "a whole number of tokens", &config.min_tokens);
  if (reader.text("PBSATTN_WORKSPACE_CAP_MIB")) {
    std::uint32_t mib = 0;
    reader.number("PBSATTN_WORKSPACE_CAP_MIB", "a whole number of MiB", &mib);
    config.workspace_cap = std::size_t{mib} << 20;
  }
  if (reader.text("PBSATTN_CACHE_MIB")) {
    std::uint32_t mib = 0;
    reader.number("PBSATTN_CACHE_MIB", "a whole number of MiB", &mib);
    settings.cache_cap = std::size_t{mib} << 20;
  }
  reader.flag("PBSATTN_CHECK", &config.check);
  reader.flag("PBSATTN_VERBOSE", &settings.verbose);
  if (const auto target = reader.text("PBSATTN_STATS"); target && *target != "0") settings.stats_target = *target;

  if (learned) {
    try {
      // What variables set, PBSATTN_METHOD's options among them, goes over the file's settings.
      settings.learned = std::make_shared<LearnedLayers>(read_learned(std::string(*learned)), by_file, config.options,
                                                         std::move(given));
    } catch (const std::exception& wrong) {
      reader.fail(fmt::format("PBSATTN_LEARNED {}", wrong.what()));
    }
  }
  if (const auto path = reader.text("PBSATTN_SETTINGS")) {
    try {
      settings.layers = std::make_shared<LayerSettings>(LayerSettings::read(std::string(*path), config.options));
    } catch (const std::exception& wrong) {
      reader.fail(fmt::format("PBSATTN_SETTINGS {}", wrong.what()));
    }
  }

  if (error->empty()) {
    if (const auto rule = broken_rule(config)) *error = "PBSATTN_* environment: " + *rule;
  }
  if (!error->empty()) config.mode = GGML_PBSATTN_MODE_OFF;
  return settings;
}

Settings current_settings() {
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  return shared.settings;
}

Config current_config() noexcept {
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  return shared.settings.config;
}

void set_learned(std::shared_ptr<const LearnedLayers> learned) {
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  shared.settings.learned = std::move(learned);
}

Observer current_observer() {
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  return shared.observer;
}

void set_last_error(const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
}

}  // namespace pbsattn::ggml

using namespace pbsattn::ggml;

extern "C" {

bool ggml_backend_pbsattn_get_config(ggml_pbsattn_config* config) {
  return explained([&] { write_config(config, current_config()); });
}

bool ggml_backend_pbsattn_configure(const ggml_pbsattn_config* config) {
  return explained([&] {
    const Config asked = read_config(config, current_config().options);
    if (const auto rule = broken_rule(asked)) pbsattn::refuse(*rule);
    State& shared = state();
    const std::lock_guard lock(shared.mutex);
    shared.settings.config = asked;
  });
}

bool ggml_backend_pbsattn_set_layers(const char* json) {
  return explained([&] {
    State& shared = state();
    const std::lock_guard lock(shared.mutex);
    shared.settings.layers =
        json == nullptr ? nullptr
                        : std::make_shared<LayerSettings>(LayerSettings::parse(json, shared.settings.config.options));
  });
}

bool ggml_backend_pbsattn_set_learned(const char* path, bool settings) {
  return explained([&] {
    State& shared = state();
    const std::lock_guard lock(shared.mutex);
    shared.settings.learned =
        path == nullptr ? nullptr
                        : std::make_shared<LearnedLayers>(read_learned(path), settings, shared.settings.config.options);
  });
}

const char* ggml_backend_pbsattn_last_error(void) {
  return last_error.c_str();
}

void ggml_backend_pbsattn_set_observer(ggml_pbsattn_observer observer, void* user) {
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  shared.observer = {observer, user};
}
}
