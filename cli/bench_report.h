#pragma once
// What every `godwit bench` prints: one JSON shape, and percentiles of samples.
//
// {"bench": "serve", "version": "...", "config": {...}, "results": {"ttft_ms": {"mean": .., "p50": .., "p90": .., "p99": ..}}}

#include <nlohmann/json.hpp>

#include <string>
#include <vector>

namespace godwit::cli {

// Sorts `samples`. All zero when there are none.
nlohmann::ordered_json Percentiles(std::vector<double>& samples);

// Writes the report to stdout as one JSON object, and to `path` unless it is empty. False: the file cannot be written.
bool WriteReport(const std::string& bench, const nlohmann::ordered_json& config,
                 const nlohmann::ordered_json& results, bool to_stdout, const std::string& path);

}  // namespace godwit::cli
