#pragma once
// Whether counts follow a distribution.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace godwit {

// Probability that a sample of the distribution deviates more than `counts` do: Pearson's test,
// cells that expect less than 5 pooled, by the approximation of Wilson and Hilferty.
inline double ChiSquarePValue(const std::vector<int64_t>& counts,
                              const std::vector<double>& probabilities) {
  double total = 0;
  for (const int64_t count : counts) total += static_cast<double>(count);
  double chi_square = 0, rest_expected = 0, rest_found = 0;
  int num_cells = 0;
  const auto add = [&](double found, double expected) {
    chi_square += (found - expected) * (found - expected) / expected;
    ++num_cells;
  };
  for (size_t cell = 0; cell < counts.size(); ++cell) {
    const double expected = total * probabilities[cell];
    const auto found = static_cast<double>(counts[cell]);
    if (expected >= 5) {
      add(found, expected);
    } else {
      rest_expected += expected;
      rest_found += found;
    }
  }
  if (rest_expected >= 5) {
    add(rest_found, rest_expected);
  } else if (rest_found > 0 && rest_expected < 1e-9 * total) {
    return 0;  // what cannot be was seen
  }
  const double dof = std::max(num_cells - 1, 1);
  const double z = (std::cbrt(chi_square / dof) - (1 - 2 / (9 * dof))) / std::sqrt(2 / (9 * dof));
  return 0.5 * std::erfc(z / std::sqrt(2.0));
}

// The same for p-values against the uniform distribution: Kolmogorov and Smirnov.
inline double UniformPValue(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto n = static_cast<double>(values.size());
  double distance = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    distance = std::max({distance, (static_cast<double>(i) + 1) / n - values[i],
                         values[i] - static_cast<double>(i) / n});
  }
  const double lambda = (std::sqrt(n) + 0.12 + 0.11 / std::sqrt(n)) * distance;
  double p = 0;
  for (int k = 1; k < 100; ++k) {
    p += (k % 2 == 1 ? 2 : -2) * std::exp(-2.0 * k * k * lambda * lambda);
  }
  return std::clamp(p, 0.0, 1.0);
}

}  // namespace godwit
