// A server's cache (support/cache.h) in device memory.
#pragma once

#include "cuda/device_run.h"
#include "support/cache.h"

namespace pbsattn::test {

class DeviceCache {
 public:
  explicit DeviceCache(const PagedCache& cache)
      : cache_(cache), memory_(cache.memory().size()), table_(cache.table.size() * sizeof(std::int32_t)) {
    memory_.upload(cache.memory().data());
    table_.upload(cache.table.data());
  }

  // Returns a device's inputs, with keys and values from the cache.
  Inputs inputs(Inputs device) const {
    const auto moved = [&](ConstView view) {
      view.data = memory_.data() + (static_cast<const std::byte*>(view.data) - cache_.memory().data());
      return view;
    };
    device.k = moved(cache_.k);
    device.v = moved(cache_.v);
    device.pages = cache_.pages;
    device.pages.table = table();
    return device;
  }
  const std::int32_t* table() const { return reinterpret_cast<const std::int32_t*>(table_.data()); }
  void upload_table(const std::vector<std::int32_t>& table) { table_.upload(table.data()); }

 private:
  const PagedCache& cache_;
  DeviceMemory memory_, table_;
};

}  // namespace pbsattn::test
