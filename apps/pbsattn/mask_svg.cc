#include "mask_svg.h"

#include <fmt/format.h>

#include <cstdint>
#include <iterator>
#include <string_view>

namespace app {
namespace {

constexpr double side = 380;    // of a panel's square
constexpr double margin = 28;   // around and between panels
constexpr double heading = 64;  // above the squares
constexpr double footing = 36;  // below them

constexpr std::string_view style = R"(<style>
  .page { fill: #ffffff } .square { fill: #eef1f5 } .kept { fill: #1f6feb }
  text { font: 13px sans-serif; fill: #24292f } .title { font-size: 15px; font-weight: 600 } .axis { fill: #6e7781 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } .square { fill: #1c2430 } .kept { fill: #58a6ff }
    text { fill: #e6edf3 } .axis { fill: #8b949e }
  }
</style>
)";

std::string escaped(std::string_view text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '&': result += "&amp;"; break;
      case '<': result += "&lt;"; break;
      case '>': result += "&gt;"; break;
      default: result += c;
    }
  }
  return result;
}

// One path of all kept blocks: runs of neighbours in a row become one rectangle.
std::string kept_path(const pbsattn::Trace& trace, double x, double y) {
  const double cell = side / static_cast<double>(trace.blocks);
  std::string path;
  for (std::int64_t row = 0; row < trace.rows; ++row) {
    const auto begin = static_cast<std::size_t>(trace.row_start[static_cast<std::size_t>(row)]);
    const auto end = static_cast<std::size_t>(trace.row_start[static_cast<std::size_t>(row) + 1]);
    for (std::size_t i = begin; i < end;) {
      std::size_t run = i + 1;
      while (run < end && trace.block[run] == trace.block[run - 1] + 1) ++run;
      const double width = cell * static_cast<double>(run - i);
      fmt::format_to(std::back_inserter(path), "M{:.2f} {:.2f}h{:.2f}v{:.2f}h{:.2f}z", x + cell * trace.block[i],
                     y + cell * static_cast<double>(trace.first_row + row), width, cell, -width);
      i = run;
    }
  }
  return path;
}

}  // namespace

std::string mask_svg(const std::string& title, const std::vector<MaskPanel>& panels) {
  const double width = margin + static_cast<double>(panels.size()) * (side + margin);
  const double height = heading + side + footing;
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0:.0f} {1:.0f}\" width=\"{0:.0f}\" height=\"{1:.0f}\" "
      "role=\"img\">\n<title>{2}</title>\n{3}<rect class=\"page\" width=\"100%\" height=\"100%\"/>\n"
      "<text class=\"title\" x=\"{4}\" y=\"24\">{2}</text>\n",
      width, height, escaped(title), style, margin);
  double x = margin;
  for (const MaskPanel& panel : panels) {
    const double bottom = heading + side;
    svg += fmt::format("<text x=\"{:.0f}\" y=\"{:.0f}\">{}: {:.1f} % of the causal blocks</text>\n", x, heading - 10,
                       escaped(panel.title), 100 * panel.density);
    // The causal triangle, one step for each block.
    const double cell = side / static_cast<double>(panel.trace.blocks);
    std::string triangle = fmt::format("M{:.2f} {:.2f}", x, heading);
    for (std::int64_t i = 0; i < panel.trace.blocks; ++i) triangle += fmt::format("h{0:.3f}v{0:.3f}", cell);
    svg += fmt::format("<path class=\"square\" d=\"{}H{:.2f}z\"/>\n", triangle, x);
    svg += fmt::format("<path class=\"kept\" d=\"{}\"/>\n", kept_path(panel.trace, x, heading));
    svg += fmt::format(
        "<text class=\"axis\" x=\"{:.0f}\" y=\"{:.0f}\">{} key blocks, left to right; query blocks, top to "
        "bottom</text>\n",
        x, bottom + 20, panel.trace.blocks);
    x += side + margin;
  }
  return svg + "</svg>\n";
}

}  // namespace app
