#include "cli/svg_chart.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>

#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"

namespace godwit::cli {
namespace {

constexpr double kWidth = 640, kHeight = 360, kLeft = 60, kRight = 20, kTop = 36, kBottom = 48;
constexpr const char* kColours[] = {"#1b6ca8", "#c8553d", "#588157", "#6d597a"};
constexpr int kNumGridLines = 5;

std::string Escaped(const std::string& text) {
  return absl::StrReplaceAll(text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}});
}

std::string Text(double x, double y, const char* anchor, const std::string& text) {
  return absl::StrFormat("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", x, y, anchor,
                         Escaped(text));
}

// From values to the picture.
struct Scale {
  double x_min = 1, x_max = 2, y_min = 0, y_max = 1;

  double X(double value) const {
    const double share = (std::log(value) - std::log(x_min)) / (std::log(x_max) - std::log(x_min));
    return kLeft + share * (kWidth - kLeft - kRight);
  }
  double Y(double value) const {
    const double share = (value - y_min) / (y_max - y_min);
    return kHeight - kBottom - share * (kHeight - kTop - kBottom);
  }
};

std::string Axes(const Chart& chart, const Scale& scale, const std::set<double>& ticks) {
  std::string svg;
  for (int line = 0; line <= kNumGridLines; ++line) {
    const double value =
        chart.y_min + (chart.y_max - chart.y_min) * line / static_cast<double>(kNumGridLines);
    svg +=
        absl::StrFormat("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"#ddd\"/>\n",
                        kLeft, scale.Y(value), kWidth - kRight, scale.Y(value));
    svg += Text(kLeft - 6, scale.Y(value) + 4, "end", absl::StrFormat("%.3g", value));
  }
  double last = -100;
  for (const double tick : ticks) {
    if (scale.X(tick) - last < 40) continue;  // labels would run into each other
    last = scale.X(tick);
    svg +=
        Text(last, kHeight - kBottom + 16, "middle", absl::StrFormat("%.*f", chart.x_digits, tick));
  }
  svg += Text((kLeft + kWidth - kRight) / 2, kHeight - 10, "middle", chart.x_label);
  svg += Text(kLeft, kTop - 24, "start", chart.title);
  return svg + Text(kLeft, kTop - 8, "start", chart.y_label);
}

std::string Line(const ChartSeries& series, const Scale& scale, size_t index) {
  const char* const colour = kColours[index % std::size(kColours)];
  std::string points, svg;
  for (size_t point = 0; point < series.x.size(); ++point) {
    const double x = scale.X(series.x[point]), y = scale.Y(series.y[point]);
    points += absl::StrFormat("%.1f,%.1f ", x, y);
    svg += absl::StrFormat("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", x, y, colour);
  }
  svg += absl::StrFormat("<polyline points=\"%s\" fill=\"none\" stroke=\"%s\"/>\n", points, colour);
  return svg + absl::StrFormat("<g fill=\"%s\">%s</g>\n", colour,
                               Text(kWidth - kRight, kTop - 8 - 16 * static_cast<double>(index),
                                    "end", series.name));
}

}  // namespace

std::string ToSvg(const Chart& chart) {
  std::set<double> ticks;
  for (const ChartSeries& series : chart.series) ticks.insert(series.x.begin(), series.x.end());
  Scale scale{.y_min = chart.y_min, .y_max = chart.y_max};
  if (!ticks.empty()) {
    scale.x_min = *ticks.begin() / 1.1;
    scale.x_max = *ticks.rbegin() * 1.1;
  }
  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" "
      "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" "
      "fill=\"white\"/>\n",
      kWidth, kHeight);
  svg += Axes(chart, scale, ticks);
  for (size_t index = 0; index < chart.series.size(); ++index)
    svg += Line(chart.series[index], scale, index);
  return svg + "</svg>\n";
}

}  // namespace godwit::cli
