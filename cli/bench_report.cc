#include "cli/bench_report.h"

#include <algorithm>
#include <fstream>
#include <iostream>
#include <numeric>

#include "server/version.h"

namespace godwit::cli {

nlohmann::ordered_json Percentiles(std::vector<double>& samples) {
  std::sort(samples.begin(), samples.end());
  // Nearest rank: the smallest sample that at least that share of all do not exceed.
  const auto rank = [&](double share) {
    if (samples.empty()) return 0.0;
    const auto index = static_cast<size_t>(std::max(0.0, share * static_cast<double>(samples.size()) - 1e-9));
    return samples[std::min(index, samples.size() - 1)];
  };
  const double sum = std::accumulate(samples.begin(), samples.end(), 0.0);
  return {{"mean", samples.empty() ? 0 : sum / static_cast<double>(samples.size())},
          {"p50", rank(0.50)},
          {"p90", rank(0.90)},
          {"p99", rank(0.99)},
          {"max", samples.empty() ? 0 : samples.back()}};
}

bool WriteReport(const std::string& bench, const nlohmann::ordered_json& config,
                 const nlohmann::ordered_json& results, bool to_stdout, const std::string& path) {
  const nlohmann::ordered_json report = {
      {"bench", bench}, {"version", kVersion}, {"config", config}, {"results", results}};
  if (to_stdout) std::cout << report.dump(2) << std::endl;
  if (path.empty()) return true;
  std::ofstream file(path);
  file << report.dump(2) << "\n";
  return static_cast<bool>(file.flush());
}

}  // namespace godwit::cli
