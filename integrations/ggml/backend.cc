// ggml's backend interface: registration, one device of type ACCEL, one backend for each context. The table
// of functions is ggml's; what they do is in compute.cc. No exception crosses into ggml.
#include <string_view>

#include "attention_op.h"
#include "compute.h"
#include "ggml-backend-impl.h"
#include "ggml-pbsattn.h"
#include "guard.h"
#include "settings.h"
#include "stats.h"

namespace pbsattn::ggml {
namespace {

constexpr const char* name = "PBSAttn";

// ------------------------------------------------------------------------------------------- backend

Computer& computer_of(ggml_backend_t backend) {
  return *static_cast<Computer*>(backend->context);
}

const char* backend_name(ggml_backend_t) {
  return name;
}

void backend_free(ggml_backend_t backend) {
  guarded(0, [] {
    report(current_settings(), false);
    return 0;
  });
  delete &computer_of(backend);
  delete backend;
}

ggml_status backend_graph_compute(ggml_backend_t backend, ggml_cgraph* graph) {
  return guarded(GGML_STATUS_FAILED, [&] { return computer_of(backend).compute(graph); });
}

void backend_set_n_threads(ggml_backend_t backend, int threads) {
  computer_of(backend).set_n_threads(threads);
}

void backend_set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void* data) {
  computer_of(backend).set_abort_callback(callback, data);
}

// -------------------------------------------------------------------------------------------- device

const char* device_name(ggml_backend_dev_t) {
  return name;
}

const char* device_description(ggml_backend_dev_t) {
  return "Permuted Block-Sparse Attention";
}

void device_memory(ggml_backend_dev_t, std::size_t* free, std::size_t* total) {
  *free = *total = 0;  // host memory, which the CPU device reports
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
  return GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props* props) {
  *props = {};
  props->name = device_name(device);
  props->description = device_description(device);
  props->type = device_type(device);
}

ggml_backend_t device_init(ggml_backend_dev_t device, const char*) {
  static ggml_guid guid = {0x70, 0x62, 0x73, 0x61, 0x74, 0x74, 0x6e, 0x21,
                           0x0e, 0x5d, 0x4c, 0x93, 0xa2, 0x77, 0x18, 0xc6};
  return guarded<ggml_backend_t>(nullptr, [&] {
    auto made = std::make_unique<ggml_backend>();
    made->guid = &guid;
    made->iface.get_name = backend_name;
    made->iface.free = backend_free;
    made->iface.graph_compute = backend_graph_compute;
    made->device = device;
    made->context = new Computer;
    return made.release();
  });
}

// The CPU's own type, not a look-alike: the scheduler compares pointers, and equal ones spare the copies.
ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) {
  return ggml_backend_cpu_buffer_type();
}

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor* op) {
  return guarded(false, [&] {
    if (!is_attention(op)) return computes_nothing(op);
    const Config config = current_config();
    if (config.mode == GGML_PBSATTN_MODE_OFF) return false;
    const ggml_pbsattn_reason reason = examine(op, config.min_tokens);
    if (reason != GGML_PBSATTN_TAKEN && reason != GGML_PBSATTN_FEW_TOKENS) record_refusal(reason);
    return reason == GGML_PBSATTN_TAKEN;
  });
}

bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
  return ggml_backend_buft_is_host(type);
}

// -------------------------------------------------------------------------------------- registration

const char* reg_name(ggml_backend_reg_t) {
  return name;
}

std::size_t reg_device_count(ggml_backend_reg_t) {
  return 1;
}

ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, std::size_t) {
  static ggml_backend_device device = [reg] {
    ggml_backend_device made{};
    made.iface.get_name = device_name;
    made.iface.get_description = device_description;
    made.iface.get_memory = device_memory;
    made.iface.get_type = device_type;
    made.iface.get_props = device_props;
    made.iface.init_backend = device_init;
    made.iface.get_buffer_type = device_buffer_type;
    made.iface.supports_op = device_supports_op;
    made.iface.supports_buft = device_supports_buft;
    made.reg = reg;
    return made;
  }();
  return &device;
}

struct Procedure {
  std::string_view name;
  void* address;
};

template <class Function>
void* address(Function* function) {
  return reinterpret_cast<void*>(function);
}

void* reg_proc_address(ggml_backend_reg_t, const char* wanted) {
  static const Procedure procedures[] = {
      {"ggml_backend_set_n_threads", address(backend_set_n_threads)},
      {"ggml_backend_set_abort_callback", address(backend_set_abort_callback)},
      {"ggml_backend_pbsattn_get_config", address(ggml_backend_pbsattn_get_config)},
      {"ggml_backend_pbsattn_configure", address(ggml_backend_pbsattn_configure)},
      {"ggml_backend_pbsattn_set_layers", address(ggml_backend_pbsattn_set_layers)},
      {"ggml_backend_pbsattn_set_learned", address(ggml_backend_pbsattn_set_learned)},
      {"ggml_backend_pbsattn_last_error", address(ggml_backend_pbsattn_last_error)},
      {"ggml_backend_pbsattn_reason_name", address(ggml_backend_pbsattn_reason_name)},
      {"ggml_backend_pbsattn_stats_reset", address(ggml_backend_pbsattn_stats_reset)},
      {"ggml_backend_pbsattn_stats_get", address(ggml_backend_pbsattn_stats_get)},
      {"ggml_backend_pbsattn_refusals", address(ggml_backend_pbsattn_refusals)},
      {"ggml_backend_pbsattn_examine", address(ggml_backend_pbsattn_examine)},
      {"ggml_backend_pbsattn_set_observer", address(ggml_backend_pbsattn_set_observer)},
  };
  for (const Procedure& procedure : procedures)
    if (procedure.name == wanted) return procedure.address;
  return nullptr;
}

// Programs that leave without freeing their contexts still get their statistics file.
struct ReportAtExit {
  ~ReportAtExit() {
    guarded(0, [] {
      report(current_settings(), true);
      return 0;
    });
  }
};

}  // namespace
}  // namespace pbsattn::ggml

extern "C" ggml_backend_reg_t ggml_backend_pbsattn_reg(void) {
  using namespace pbsattn::ggml;
  static ggml_backend_reg reg = [] {
    static_cast<void>(current_config());  // so that a bad variable is named when the plug-in loads
    return ggml_backend_reg{.api_version = GGML_BACKEND_API_VERSION,
                            .iface = {.get_name = reg_name,
                                      .get_device_count = reg_device_count,
                                      .get_device = reg_device,
                                      .get_proc_address = reg_proc_address},
                            .context = nullptr};
  }();
  static const ReportAtExit report_at_exit;
  return &reg;
}
