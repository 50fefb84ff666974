#include "engine/json_object.h"

#include <sys/stat.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <limits>
#include <set>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "nlohmann/json.hpp"

namespace godwit {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxShownBytes = 80;  // of a value, in an error

constexpr size_t kMaxMessageBytes = 1000;

std::string Cut(absl::string_view text, size_t num_bytes) {
  if (text.size() <= num_bytes) return std::string(text);
  // Not within a character.
  while (num_bytes > 0 && (static_cast<unsigned char>(text[num_bytes]) & 0xc0) == 0x80) --num_bytes;
  return absl::StrCat(text.substr(0, num_bytes), "...");
}

// What a message shows of a value that was not expected.
std::string ShownValue(const Json& value) {
  return Cut(value.dump(-1, ' ', true, Json::error_handler_t::replace), kMaxShownBytes);
}

// Watches a parse: keys given twice (the library would keep the last one silently) and depth.
class ParseGuard {
 public:
  bool operator()(int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kMaxJsonDepth) fault_ = absl::StrCat("nested deeper than ", kMaxJsonDepth);
    if (!fault_.empty()) return false;
    if (event == Json::parse_event_t::object_start) {
      keys_.emplace_back();
    } else if (event == Json::parse_event_t::object_end) {
      keys_.pop_back();
    } else if (event == Json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys_.back().insert(key).second)
        fault_ = absl::StrCat("key '", Cut(key, kMaxShownBytes), "' is given twice");
    }
    return fault_.empty();
  }
  const std::string& fault() const { return fault_; }

 private:
  std::vector<std::set<std::string>> keys_;  // of each open object
  std::string fault_;
};

}  // namespace

std::string Shown(absl::string_view text) { return Cut(text, kMaxShownBytes); }

absl::StatusOr<std::string> ReadTextFile(const std::string& path, int64_t max_bytes) {
  struct stat info = {};
  if (stat(path.c_str(), &info) != 0)
    return absl::NotFoundError(absl::StrCat(path, ": no such file"));
  if (!S_ISREG(info.st_mode))
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  if (info.st_size > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", info.st_size, " bytes, the limit is ", max_bytes));
  }
  std::ifstream file(path, std::ios::binary);
  std::string text(static_cast<size_t>(info.st_size), '\0');
  if (!file || !file.read(text.data(), info.st_size)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be read"));
  }
  return text;
}

struct JsonObject::Impl {
  std::shared_ptr<const Json> root;  // keeps `object` alive
  const Json* object = nullptr;
  std::string where;
  std::set<std::string> read;
  absl::Status status;

  void Fail(absl::Status fault) {
    if (!status.ok()) return;
    status = absl::Status(fault.code(), Cut(fault.message(), kMaxMessageBytes));
  }
  void Expected(const std::string& name, absl::string_view expected, const Json& found) {
    Fail(absl::InvalidArgumentError(
        absl::StrCat(where, ": ", name, ": expected ", expected, ", found ", ShownValue(found))));
  }

  // Marks the field as read; null when it is absent or JSON null.
  const Json* Find(const char* name) {
    read.insert(name);
    const auto it = object->find(name);
    return it == object->end() || it->is_null() ? nullptr : &*it;
  }
  const Json* Require(const char* name) {
    const Json* value = Find(name);
    if (value == nullptr) {
      Fail(absl::InvalidArgumentError(
          absl::StrCat(where, ": ", name, ": required field is missing")));
    }
    return value;
  }

  // 8192.0 counts as the integer 8192: some writers print every number as a float.
  int64_t Int(const Json& value, const std::string& name, int64_t min, int64_t max) {
    constexpr double kExact = 9007199254740992.0;  // 2^53
    std::optional<int64_t> number;
    if (value.is_number_unsigned()) {
      const auto whole = value.get<uint64_t>();
      if (whole <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
        number = static_cast<int64_t>(whole);
    } else if (value.is_number_integer()) {
      number = value.get<int64_t>();
    } else if (value.is_number_float()) {
      const auto real = value.get<double>();
      if (std::abs(real) <= kExact && real == std::floor(real)) number = static_cast<int64_t>(real);
    }
    if (!number || *number < min || *number > max) {
      Expected(name, absl::StrCat("a whole number in [", min, ", ", max, "]"), value);
      return min;
    }
    return *number;
  }
  double Number(const Json& value, const std::string& name, double min, double max) {
    const double number =
        value.is_number() ? value.get<double>() : std::numeric_limits<double>::quiet_NaN();
    if (!(number >= min && number <= max)) {
      Expected(name, absl::StrCat("a number in [", min, ", ", max, "]"), value);
      return min;
    }
    return number;
  }
  std::vector<int64_t> Ints(const Json& value, const std::string& name, int64_t min, int64_t max,
                            int64_t max_entries) {
    std::vector<int64_t> numbers;
    if (!value.is_array() || static_cast<int64_t>(value.size()) > max_entries) {
      Expected(name, absl::StrCat("a list of at most ", max_entries, " numbers"), value);
      return numbers;
    }
    for (size_t entry = 0; entry < value.size(); ++entry) {
      numbers.push_back(Int(value[entry], absl::StrCat(name, "[", entry, "]"), min, max));
    }
    return numbers;
  }
};

JsonObject::JsonObject(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
JsonObject::JsonObject(JsonObject&&) noexcept = default;
JsonObject& JsonObject::operator=(JsonObject&&) noexcept = default;
JsonObject::~JsonObject() = default;

absl::StatusOr<JsonObject> JsonObject::Parse(absl::string_view text, const std::string& where) {
  ParseGuard guard;
  Json json = Json::parse(
      text.begin(), text.end(),
      [&guard](int depth, Json::parse_event_t event, Json& parsed) {
        return guard(depth, event, parsed);
      },
      /*allow_exceptions=*/false);
  if (!guard.fault().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": ", guard.fault()));
  }
  if (json.is_discarded()) return absl::InvalidArgumentError(absl::StrCat(where, ": not JSON"));
  if (!json.is_object())
    return absl::InvalidArgumentError(absl::StrCat(where, ": not a JSON object"));
  auto impl = std::make_unique<Impl>();
  impl->root = std::make_shared<const Json>(std::move(json));
  impl->object = impl->root.get();
  impl->where = where;
  return JsonObject(std::move(impl));
}

const std::string& JsonObject::where() const { return impl_->where; }
const absl::Status& JsonObject::status() const { return impl_->status; }
void JsonObject::Fail(absl::Status status) { impl_->Fail(std::move(status)); }

bool JsonObject::Has(const char* name) const {
  const auto it = impl_->object->find(name);
  return it != impl_->object->end() && !it->is_null();
}

int64_t JsonObject::Int(const char* name, int64_t min, int64_t max) {
  const Json* value = impl_->Require(name);
  return value == nullptr ? min : impl_->Int(*value, name, min, max);
}

double JsonObject::Number(const char* name, double min, double max) {
  const Json* value = impl_->Require(name);
  return value == nullptr ? min : impl_->Number(*value, name, min, max);
}

std::string JsonObject::String(const char* name) {
  return impl_->Require(name) == nullptr ? "" : StringOr(name, "");
}

std::vector<int64_t> JsonObject::IntList(const char* name, int64_t min, int64_t max,
                                         int64_t max_entries) {
  const Json* value = impl_->Require(name);
  return value == nullptr ? std::vector<int64_t>()
                          : impl_->Ints(*value, name, min, max, max_entries);
}

std::vector<double> JsonObject::NumberList(const char* name, double min, double max,
                                           int64_t max_entries) {
  std::vector<double> numbers;
  const Json* value = impl_->Require(name);
  if (value == nullptr) return numbers;
  if (!value->is_array() || static_cast<int64_t>(value->size()) > max_entries) {
    impl_->Expected(name, absl::StrCat("a list of at most ", max_entries, " numbers"), *value);
    return numbers;
  }
  for (size_t entry = 0; entry < value->size(); ++entry) {
    numbers.push_back(
        impl_->Number((*value)[entry], absl::StrCat(name, "[", entry, "]"), min, max));
  }
  return numbers;
}

int64_t JsonObject::IntOr(const char* name, int64_t min, int64_t max, int64_t fallback) {
  return OptionalInt(name, min, max).value_or(fallback);
}

double JsonObject::NumberOr(const char* name, double min, double max, double fallback) {
  return OptionalNumber(name, min, max).value_or(fallback);
}

std::string JsonObject::StringOr(const char* name, const std::string& fallback) {
  const Json* value = impl_->Find(name);
  if (value == nullptr) return fallback;
  if (value->is_string()) return value->get<std::string>();
  impl_->Expected(name, "a string", *value);
  return fallback;
}

bool JsonObject::BoolOr(const char* name, bool fallback) {
  const Json* value = impl_->Find(name);
  if (value == nullptr) return fallback;
  if (value->is_boolean()) return value->get<bool>();
  impl_->Expected(name, "true or false", *value);
  return fallback;
}

std::optional<int64_t> JsonObject::OptionalInt(const char* name, int64_t min, int64_t max) {
  const Json* value = impl_->Find(name);
  if (value == nullptr) return std::nullopt;
  return impl_->Int(*value, name, min, max);
}

std::optional<double> JsonObject::OptionalNumber(const char* name, double min, double max) {
  const Json* value = impl_->Find(name);
  if (value == nullptr) return std::nullopt;
  return impl_->Number(*value, name, min, max);
}

std::vector<int64_t> JsonObject::IntOrList(const char* name, int64_t min, int64_t max,
                                           int64_t max_entries) {
  const Json* value = impl_->Find(name);
  if (value == nullptr) return {};
  if (value->is_array()) return impl_->Ints(*value, name, min, max, max_entries);
  return {impl_->Int(*value, name, min, max)};
}

std::vector<std::string> JsonObject::StringListOr(const char* name, int64_t max_entries) {
  std::vector<std::string> strings;
  const Json* value = impl_->Find(name);
  if (value == nullptr) return strings;
  const bool is_list = value->is_array() && static_cast<int64_t>(value->size()) <= max_entries;
  for (size_t entry = 0; is_list && entry < value->size(); ++entry) {
    if ((*value)[entry].is_string()) strings.push_back((*value)[entry].get<std::string>());
  }
  if (!is_list || strings.size() != value->size()) {
    impl_->Expected(name, absl::StrCat("a list of at most ", max_entries, " strings"), *value);
  }
  return strings;
}

std::optional<JsonObject> JsonObject::Object(const char* name) {
  const Json* value = impl_->Find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_object()) {
    impl_->Expected(name, "an object", *value);
    return std::nullopt;
  }
  auto impl = std::make_unique<Impl>();
  impl->root = impl_->root;
  impl->object = value;
  impl->where = absl::StrCat(impl_->where, ": ", name);
  return JsonObject(std::move(impl));
}

std::vector<std::pair<std::string, std::string>> JsonObject::StringFields() {
  std::vector<std::pair<std::string, std::string>> fields;
  for (const auto& [name, value] : impl_->object->items()) {
    impl_->read.insert(name);
    if (value.is_string()) {
      fields.emplace_back(name, value.get<std::string>());
    } else {
      impl_->Expected(name, "a string", value);
    }
  }
  return fields;
}

void JsonObject::MustBe(const char* name, bool value) {
  const Json* found = impl_->Find(name);
  if (found == nullptr || (found->is_boolean() && found->get<bool>() == value)) return;
  impl_->Fail(
      absl::UnimplementedError(absl::StrCat(where(), ": ", name, " = ", ShownValue(*found),
                                            " is not built in, only ", value ? "true" : "false")));
}

void JsonObject::MustBe(const char* name, double value) {
  const Json* found = impl_->Find(name);
  if (found == nullptr || (found->is_number() && found->get<double>() == value)) return;
  impl_->Fail(absl::UnimplementedError(absl::StrCat(where(), ": ", name, " = ", ShownValue(*found),
                                                    " is not built in, only ", value)));
}

void JsonObject::Refuse(const char* name, absl::string_view feature) {
  const Json* found = impl_->Find(name);
  if (found == nullptr || (found->is_boolean() && !found->get<bool>())) return;
  impl_->Fail(absl::UnimplementedError(absl::StrCat(where(), ": ", name, " = ", ShownValue(*found),
                                                    ": ", feature, " is not built in")));
}

void JsonObject::Ignore(std::initializer_list<const char*> names) {
  impl_->read.insert(names.begin(), names.end());
}

absl::Status JsonObject::Finish() const {
  RETURN_IF_ERROR(impl_->status);
  for (const auto& [name, value] : impl_->object->items()) {
    const bool is_off = value.is_null() || (value.is_boolean() && !value.get<bool>());
    if (is_off || name.starts_with('_') || impl_->read.count(name) > 0) continue;
    return absl::UnimplementedError(
        absl::StrCat(where(), ": field '", Shown(name), "' = ", ShownValue(value),
                     " is not known here; it may change what the model computes"));
  }
  return absl::OkStatus();
}

}  // namespace godwit
