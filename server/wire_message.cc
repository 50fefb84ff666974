#include "server/wire_message.h"

#include <google/protobuf/message.h>
#include <google/protobuf/stubs/logging.h>
#include <google/protobuf/unknown_field_set.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/status_mapping.h"
#include "server/utf8.h"

namespace godwit {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::UnknownField;
using google::protobuf::UnknownFieldSet;

constexpr int kMaxDepth = 8;  // of nested messages; the deepest request has 3

// Reads `fields` as a message of `type` and names the strings in it that are not UTF-8.
void FindBadStrings(const UnknownFieldSet& fields, const Descriptor& type,
                    const std::string& prefix, int depth, FieldViolations& violations) {
  std::vector<int> num_seen(type.field_count(), 0);  // index within a repeated field
  for (int at = 0; at < fields.field_count(); ++at) {
    const UnknownField& field = fields.field(at);
    const FieldDescriptor* declared = type.FindFieldByNumber(field.number());
    if (declared == nullptr || field.type() != UnknownField::TYPE_LENGTH_DELIMITED) continue;
    std::string path = prefix + declared->name();
    if (declared->is_repeated()) absl::StrAppend(&path, "[", num_seen[declared->index()]++, "]");
    const std::string& bytes = field.length_delimited();
    if (declared->type() == FieldDescriptor::TYPE_STRING && !IsValidUtf8(bytes)) {
      violations.emplace_back(path, "is not valid UTF-8");
    } else if (declared->type() == FieldDescriptor::TYPE_MESSAGE && depth < kMaxDepth) {
      UnknownFieldSet inner;
      if (inner.ParseFromString(bytes)) {
        FindBadStrings(inner, *declared->message_type(), path + ".", depth + 1, violations);
      }
    }
  }
}

absl::Status Malformed(const std::string& bytes, const Descriptor& type) {
  FieldViolations violations;
  UnknownFieldSet fields;
  if (fields.ParseFromString(bytes)) FindBadStrings(fields, type, "", 0, violations);
  if (violations.empty())
    violations.emplace_back("", absl::StrCat("is not a ", type.full_name(), " on the wire"));
  return WithErrorInfo(InvalidFields(violations), "MALFORMED_MESSAGE");
}

}  // namespace

absl::Status ParseRequest(const grpc::ByteBuffer& bytes, google::protobuf::Message* request) {
  std::vector<grpc::Slice> slices;
  std::string wire;
  if (bytes.Valid() && bytes.Dump(&slices).ok()) {
    wire.reserve(bytes.Length());
    for (const grpc::Slice& slice : slices) {
      wire.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
    }
  }
  // protobuf writes a line to stderr for each string that is not UTF-8: a client could fill the
  // log.
  const google::protobuf::LogSilencer silence;
  if (request->ParseFromString(wire)) return absl::OkStatus();
  return Malformed(wire, *request->GetDescriptor());
}

grpc::ByteBuffer SerializeAnswer(const google::protobuf::Message& answer) {
  grpc::Slice slice(answer.ByteSizeLong());
  answer.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace godwit
