// A picture of block masks, side by side, in SVG that reads in light and dark.
#pragma once

#include <string>
#include <vector>

#include "pbsattn/pbsattn.hpp"

namespace app {

struct MaskPanel {
  std::string title;
  pbsattn::Trace trace = {};  // of one head
  double density = 1;
};

std::string mask_svg(const std::string& title, const std::vector<MaskPanel>& panels);

}  // namespace app
