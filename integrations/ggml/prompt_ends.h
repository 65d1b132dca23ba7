// Which micro-batches may be a prompt's last.
#pragma once

#include <cstdint>
#include <map>
#include <utility>

namespace pbsattn::ggml {

// llama.cpp cuts a prompt into micro-batches of one length and a rest, and tells no op which of them it is. So one that
// goes on from another of its length isn't taken for the last. That is mistaken where there is no rest.
class PromptEnds {
 public:
  // Returns whether a layer's micro-batch of so many queries, whose last sees so many keys, may end a prompt; of layers
  // below 0, which are not known, any may. A layer is asked once for each of its micro-batches.
  bool may_be_last(std::int32_t layer, std::int64_t queries, std::int64_t keys) {
    if (layer < 0) return true;
    const Seen now{queries, keys};
    const Seen before = std::exchange(seen_[layer], now);
    return before != Seen{queries, keys - queries};
  }

 private:
  struct Seen {
    std::int64_t queries = 0, keys = 0;
    bool operator==(const Seen&) const = default;
  };
  std::map<std::int32_t, Seen> seen_;
};

}  // namespace pbsattn::ggml
