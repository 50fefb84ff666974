#pragma once
// A JSON object of a model folder, read field by field. Each reader states type and range; the
// first fault is kept and the readers after it return harmless values, so that a parser reads like
// a list of fields and asks once:
//
//   JsonObject json = ...;
//   config.vocab_size = json.Int("vocab_size", 1, kMaxVocab);
//   json.MustBe("attention_bias", false);
//   json.Ignore({"initializer_range", "use_cache"});
//   RETURN_IF_ERROR(json.Finish());   // the first fault, or the name of a field that nobody read

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace godwit {

inline constexpr int64_t kMaxJsonFileBytes = 16 << 20;  // config.json and its neighbours
inline constexpr int kMaxJsonDepth = 32;

// The text of a regular file. NOT_FOUND when there is none; INVALID_ARGUMENT for a folder or more
// than `max_bytes`.
absl::StatusOr<std::string> ReadTextFile(const std::string& path, int64_t max_bytes);

// Its beginning, where it is long: what a message shows of a text from elsewhere, so that a hostile
// one floods neither a log nor the trailers of an RPC.
std::string Shown(absl::string_view text);

class JsonObject {
 public:
  // `where` names the text in errors ("config.json"). INVALID_ARGUMENT: not JSON, not an object, a
  // key given twice, deeper than kMaxJsonDepth.
  static absl::StatusOr<JsonObject> Parse(absl::string_view text, const std::string& where);

  bool Has(const char* name) const;  // present and not null; marks nothing as read

  // Required, each in [min, max].
  int64_t Int(const char* name, int64_t min, int64_t max);
  double Number(const char* name, double min, double max);
  std::string String(const char* name);
  std::vector<int64_t> IntList(const char* name, int64_t min, int64_t max, int64_t max_entries);
  std::vector<double> NumberList(const char* name, double min, double max, int64_t max_entries);

  // `fallback` when absent or null.
  int64_t IntOr(const char* name, int64_t min, int64_t max, int64_t fallback);
  double NumberOr(const char* name, double min, double max, double fallback);
  std::string StringOr(const char* name, const std::string& fallback);
  bool BoolOr(const char* name, bool fallback);
  std::optional<int64_t> OptionalInt(const char* name, int64_t min, int64_t max);
  std::optional<double> OptionalNumber(const char* name, double min, double max);

  // One number or a list of them; empty when absent or null.
  std::vector<int64_t> IntOrList(const char* name, int64_t min, int64_t max, int64_t max_entries);

  // A nested object, or nothing when absent or null. Its faults are its own: call Finish on it too.
  std::optional<JsonObject> Object(const char* name);

  // A list of strings; empty when absent or null.
  std::vector<std::string> StringListOr(const char* name, int64_t max_entries);

  // The name and text of every field of an object of strings (a weight map); a field of another
  // type is a fault.
  std::vector<std::pair<std::string, std::string>> StringFields();

  // Refused with UNIMPLEMENTED, naming field and value, unless absent, null or this value.
  void MustBe(const char* name, bool value);
  void MustBe(const char* name, double value);

  // UNIMPLEMENTED naming the field unless it is absent, null or false: `feature` says what it would
  // turn on.
  void Refuse(const char* name, absl::string_view feature);

  void Ignore(std::initializer_list<const char*> names);

  // Adds a fault of the caller's making about a field; a long message is cut.
  void Fail(absl::Status status);

  const std::string& where() const;
  const absl::Status& status() const;

  // The first fault. Else UNIMPLEMENTED naming a field that was neither read nor ignored, unless
  // its value is null or false (a feature that is off) or its name starts with '_' (private notes
  // of the writing library).
  absl::Status Finish() const;

  JsonObject(JsonObject&&) noexcept;
  JsonObject& operator=(JsonObject&&) noexcept;
  ~JsonObject();

 private:
  struct Impl;
  explicit JsonObject(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace godwit
