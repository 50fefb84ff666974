#pragma once
// A line chart as an SVG file: values over lengths, lengths on a logarithmic axis.

#include <string>
#include <vector>

namespace godwit::cli {

struct ChartSeries {
  std::string name;
  std::vector<double> x, y;  // as many; x > 0
};

struct Chart {
  std::string title, x_label, y_label;
  double y_min = 0, y_max = 1;
  int x_digits = 0;  // of the labels, after the point
  std::vector<ChartSeries> series;
};

std::string ToSvg(const Chart& chart);

}  // namespace godwit::cli
