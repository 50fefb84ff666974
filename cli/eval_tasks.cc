#include "cli/eval_tasks.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

using Json = nlohmann::json;
using Random = std::mt19937_64;

constexpr int64_t kMaxNumber = 50'000;

// 32 x 32 names, as LongChat makes theirs: ADJECTIVE-NOUN.
constexpr const char* kAdjectives[] = {
    "able",  "amused", "bright", "brisk",  "calm",   "clever", "dusty", "eager",
    "faint", "fierce", "gentle", "grand",  "hollow", "humble", "idle",  "jolly",
    "keen",  "lively", "lonely", "mellow", "narrow", "noble",  "odd",   "plain",
    "proud", "quiet",  "rapid",  "rough",  "silent", "sturdy", "tidy",  "warm"};
constexpr const char* kNouns[] = {
    "anchor", "apple",   "barrel",  "bridge", "candle", "castle", "desk",    "door",
    "engine", "feather", "forest",  "garden", "hammer", "harbor", "island",  "jacket",
    "kettle", "ladder",  "lantern", "meadow", "mirror", "needle", "orchard", "paper",
    "pebble", "pocket",  "ribbon",  "river",  "saddle", "tower",  "valley",  "window"};

int64_t Draw(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// One case a line of `path`; `read` returns false for an object of another form.
absl::StatusOr<std::vector<EvalCase>> ReadCases(
    const std::string& path, const std::function<bool(const Json&, EvalCase&)>& read) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  std::vector<EvalCase> cases;
  int64_t number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    if (line.empty()) continue;
    const Json json = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    EvalCase found;
    if (!json.is_object() || !read(json, found)) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": line ", number, ": not a case"));
    }
    cases.push_back(std::move(found));
  }
  if (cases.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": no cases"));
  return cases;
}

bool IsString(const Json& json, const char* name) {
  return json.contains(name) && json[name].is_string();
}
bool IsInt(const Json& json, const char* name) {
  return json.contains(name) && json[name].is_number_integer();
}

// `fill` up to num_bytes with `needle` at a share of it.
std::string Hide(const std::string& needle, double depth, const std::string& fill,
                 int64_t num_bytes) {
  std::string text;
  while (std::ssize(text) < num_bytes) text += fill;
  text.resize(static_cast<size_t>(num_bytes));
  size_t at = static_cast<size_t>(depth * static_cast<double>(num_bytes));
  if (at > 0 && at < text.size()) {
    const size_t sentence = text.rfind(". ", at);
    at = sentence == std::string::npos ? 0 : sentence + 2;
  }
  return text.substr(0, at) + needle + text.substr(at);
}

double DepthOf(int64_t sample, int64_t num_samples) {
  return num_samples < 2 ? 0.5 : static_cast<double>(sample) / static_cast<double>(num_samples - 1);
}

}  // namespace

absl::StatusOr<std::vector<EvalCase>> ReadLines(const std::string& path) {
  return ReadCases(path, [](const Json& json, EvalCase& found) {
    if (!IsString(json, "prompt") || !IsInt(json, "expected_number") || !IsInt(json, "num_lines"))
      return false;
    found.prompt = json["prompt"];
    found.expected = absl::StrCat(json["expected_number"].get<int64_t>());
    found.bucket = json["num_lines"];
    return true;
  });
}

std::vector<EvalCase> MakeLines(int64_t num_lines, int64_t num_samples, uint64_t seed) {
  Random random(seed * 1'000'003 + static_cast<uint64_t>(num_lines));
  std::vector<EvalCase> cases;
  for (int64_t sample = 0; sample < num_samples; ++sample) {
    EvalCase made{.bucket = num_lines};
    made.prompt =
        "Below is a record of lines I want you to remember. Each line begins with 'line <line "
        "index>' and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. "
        "For each line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the "
        "record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain line "
        "index. Now the record start:\n\n";
    const int64_t asked = Draw(random, 0, num_lines - 1);
    std::string asked_name;
    std::set<std::string> names;
    while (std::ssize(names) < num_lines) {
      std::string name =
          absl::StrCat(kAdjectives[Draw(random, 0, 31)], "-", kNouns[Draw(random, 0, 31)]);
      if (num_lines > 512) absl::StrAppend(&name, "-", Draw(random, 0, num_lines));
      if (!names.insert(name).second) continue;
      const int64_t number = Draw(random, 1, kMaxNumber);
      absl::StrAppend(&made.prompt, "line ", name, ": REGISTER_CONTENT is <", number, ">\n");
      if (std::ssize(names) - 1 != asked) continue;
      asked_name = name;
      made.expected = absl::StrCat(number);
    }
    made.depth = DepthOf(asked, num_lines);
    absl::StrAppend(&made.prompt,
                    "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line ",
                    asked_name, "? I need the number. ");
    cases.push_back(std::move(made));
  }
  return cases;
}

absl::StatusOr<std::vector<EvalCase>> ReadMultiRound(const std::string& path) {
  return ReadCases(path, [](const Json& json, EvalCase& found) {
    if (!IsString(json, "label") || !IsInt(json, "length_class") || !json.contains("messages") ||
        !json["messages"].is_array())
      return false;
    for (const Json& message : json["messages"]) {
      if (!message.is_object() || !IsString(message, "role") || !IsString(message, "content"))
        return false;
      const bool is_user = message["role"] == "user";
      absl::StrAppend(&found.prompt,
                      is_user ? "User: " : "Assistant: ", message["content"].get<std::string>(),
                      "\n\n");
    }
    found.prompt += "Assistant:";
    found.expected = json["label"];
    found.bucket = json["length_class"];
    return true;
  });
}

std::vector<EvalCase> MakePasskey(int64_t num_bytes, int64_t num_samples, uint64_t seed) {
  Random random(seed * 1'000'003 + static_cast<uint64_t>(num_bytes));
  std::vector<EvalCase> cases;
  for (int64_t sample = 0; sample < num_samples; ++sample) {
    const int64_t key = Draw(random, 1, kMaxNumber);
    EvalCase made{.expected = absl::StrCat(key), .depth = DepthOf(sample, num_samples)};
    made.prompt = absl::StrCat(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "it. I will quiz you about the important information there.\n",
        Hide(absl::StrCat("The pass key is ", key, ". Remember it. ", key, " is the pass key. "),
             made.depth,
             "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back "
             "again. ",
             num_bytes),
        "\nWhat is the pass key? The pass key is");
    cases.push_back(std::move(made));
  }
  return cases;
}

std::vector<EvalCase> MakeNeedle(const std::string& haystack, int64_t num_bytes,
                                 int64_t num_samples, uint64_t seed) {
  Random random(seed * 1'000'003 + static_cast<uint64_t>(num_bytes));
  std::vector<EvalCase> cases;
  for (int64_t sample = 0; sample < num_samples; ++sample) {
    const int64_t number = Draw(random, 1, kMaxNumber);
    const std::string name = kNouns[Draw(random, 0, 31)];
    EvalCase made{.expected = absl::StrCat(number), .depth = DepthOf(sample, num_samples)};
    made.prompt = absl::StrCat(
        Hide(absl::StrCat("The magic number of the ", name, " is ", number, ". "), made.depth,
             haystack, num_bytes),
        "\n\nWhat is the magic number of the ", name, "? The magic number of the ", name, " is");
    cases.push_back(std::move(made));
  }
  return cases;
}

std::string VicunaPrompt(const std::string& prompt) {
  return absl::StrCat(
      "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
      "helpful, detailed, and polite answers to the user's questions. USER: ",
      prompt, " ASSISTANT:");
}

std::string FirstInteger(const std::string& answer) {
  const auto is_digit = [](unsigned char c) { return std::isdigit(c) != 0; };
  const auto begin = std::find_if(answer.begin(), answer.end(), is_digit);
  return {begin, std::find_if_not(begin, answer.end(), is_digit)};
}

std::string LastInteger(const std::string& answer) {
  const auto is_digit = [](unsigned char c) { return std::isdigit(c) != 0; };
  const auto end = std::find_if(answer.rbegin(), answer.rend(), is_digit).base();
  const auto begin = std::find_if_not(std::make_reverse_iterator(end), answer.rend(), is_digit);
  return {begin.base(), end};
}

double LineRecall(const std::string& answer, const std::string& label) {
  int64_t num_lines = 0, num_found = 0;
  for (absl::string_view line : absl::StrSplit(label, '\n')) {
    line = absl::StripAsciiWhitespace(line);
    if (line.empty()) continue;
    ++num_lines;
    num_found += answer.find(std::string(line)) != std::string::npos;
  }
  return num_lines == 0 ? 0 : static_cast<double>(num_found) / static_cast<double>(num_lines);
}

}  // namespace godwit::cli
