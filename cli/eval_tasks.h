#pragma once
// Retrieval tasks: prompts with an answer hidden in them, read from files or made by a seed, and
// how an answer is scored.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace godwit::cli {

struct EvalCase {
  std::string prompt, expected;
  int64_t bucket = 0;  // what cases are grouped by: lines of a record, or tokens
  double depth = 0;    // of the answer in the prompt, [0, 1]
};

// LongChat-Lines: {"prompt", "expected_number", "num_lines"} a line. INVALID_ARGUMENT names file
// and line.
absl::StatusOr<std::vector<EvalCase>> ReadLines(const std::string& path);
// The same record made here: `num_samples` prompts of `num_lines` lines.
std::vector<EvalCase> MakeLines(int64_t num_lines, int64_t num_samples, uint64_t seed);

// MR-NIAH: {"messages": [{"role", "content"}], "label", "length_class"} a line; the messages become
// "User: ...", "Assistant: ..." paragraphs.
absl::StatusOr<std::vector<EvalCase>> ReadMultiRound(const std::string& path);

// A pass key, or a needle in `haystack`, at depths 0, 1/(n-1), .. 1 of about `num_bytes` of text.
std::vector<EvalCase> MakePasskey(int64_t num_bytes, int64_t num_samples, uint64_t seed);
std::vector<EvalCase> MakeNeedle(const std::string& haystack, int64_t num_bytes,
                                 int64_t num_samples, uint64_t seed);

// The Vicuna v1.1 conversation around a prompt: what LongChat and Giraffe measured with.
std::string VicunaPrompt(const std::string& prompt);

// LongChat takes the last integer of an answer of at most 100 tokens, Giraffe the first of at most
// 35. "": no integer.
inline constexpr int64_t kLongChatTokens = 100, kGiraffeTokens = 35;
std::string FirstInteger(const std::string& answer);
std::string LastInteger(const std::string& answer);

// Share of the lines of `label` that the answer repeats.
double LineRecall(const std::string& answer, const std::string& label);

}  // namespace godwit::cli
