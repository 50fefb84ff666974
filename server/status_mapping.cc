#include "server/status_mapping.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <grpcpp/server_context.h>

#include <atomic>
#include <cstdio>
#include <random>

#include "absl/strings/ascii.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "scheduler/engine_loop.h"
#include "server/utf8.h"

namespace godwit {
namespace {

constexpr std::string_view kDomain = "godwit";
// Of what came from the client and goes back in a message or a detail: a transport takes 8 KiB of
// trailers, and turns a status with more into RESOURCE_EXHAUSTED.
constexpr size_t kMaxMessageBytes = 500;  // it travels up to three times, percent-encoded in one
constexpr size_t kMaxNameBytes = 200;
constexpr size_t kMaxViolationBytes = 2000;  // of all; those after are counted in the message
constexpr std::string_view kTypeUrlPrefix = "type.googleapis.com/";

template <typename Message>
std::string TypeUrl() {
  return absl::StrCat(kTypeUrlPrefix.data(), Message::descriptor()->full_name());
}

template <typename Message>
void Attach(absl::Status& status, const Message& detail) {
  std::string bytes;
  google::protobuf::io::StringOutputStream output(&bytes);
  google::protobuf::io::CodedOutputStream coded(&output);
  coded.SetSerializationDeterministic(true);  // maps: equal errors are equal bytes
  detail.SerializeToCodedStream(&coded);
  coded.Trim();
  status.SetPayload(TypeUrl<Message>(), absl::Cord(bytes));
}

// False when the status has no such detail.
template <typename Message>
bool ReadDetail(const absl::Status& status, Message* detail) {
  const auto payload = status.GetPayload(TypeUrl<Message>());
  return payload.has_value() && detail->ParseFromString(std::string(*payload));
}

void AddViolation(google::rpc::BadRequest& bad_request, std::string_view field,
                  std::string_view description) {
  auto* violation = bad_request.add_field_violations();
  violation->set_field(std::string(field));
  violation->set_description(CutUtf8(description, kMaxMessageBytes));
}

// Unique enough to find a line in the log; says nothing about the process.
std::string NewErrorId() {
  static std::atomic<uint64_t> state{std::random_device{}()};
  const uint64_t id = (state.fetch_add(1) + 1) * 0x9E3779B97F4A7C15u;
  return absl::StrCat(absl::Hex(id, absl::kZeroPad16));
}

// The cause goes to the log, the client gets the id only.
absl::Status Opaque(const absl::Status& status) {
  const std::string id = NewErrorId();
  std::fprintf(stderr, "internal error %s: %s\n", id.c_str(),
               std::string(status.message()).c_str());
  return WithErrorInfo(absl::InternalError(absl::StrCat("internal error ", id)), "INTERNAL",
                       {{"error_id", id}});
}

}  // namespace

absl::Status InvalidFields(const FieldViolations& violations) {
  google::rpc::BadRequest bad_request;
  for (const auto& [field, description] : violations) {
    if (bad_request.ByteSizeLong() < kMaxViolationBytes) {
      AddViolation(bad_request, field, description);
    }
  }
  const auto& [field, description] = violations.front();
  std::string message = absl::StrCat(field, ": ", description);
  if (violations.size() > 1) absl::StrAppend(&message, " (and ", violations.size() - 1, " more)");
  absl::Status status = absl::InvalidArgumentError(message);
  Attach(status, bad_request);
  return status;
}

absl::Status UnimplementedField(std::string_view field) {
  google::rpc::BadRequest bad_request;
  AddViolation(bad_request, field, "not implemented by this server");
  absl::Status status = absl::UnimplementedError(
      absl::StrCat(std::string(field), ": not implemented by this server"));
  Attach(status, bad_request);
  return WithErrorInfo(status, "FIELD_NOT_IMPLEMENTED", {{"field", std::string(field)}});
}

absl::Status WithErrorInfo(absl::Status status, std::string_view reason,
                           const ErrorMetadata& metadata) {
  google::rpc::ErrorInfo info;
  info.set_reason(std::string(reason));
  info.set_domain(std::string(kDomain));
  for (const auto& [key, value] : metadata) (*info.mutable_metadata())[key] = value;
  Attach(status, info);
  return status;
}

absl::Status WithRetryDelay(absl::Status status, std::chrono::milliseconds delay) {
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(delay.count() / 1000);
  retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(delay.count() % 1000 * 1'000'000));
  Attach(status, retry);
  return status;
}

absl::Status WithResource(absl::Status status, std::string_view type, std::string_view name) {
  google::rpc::ResourceInfo resource;
  resource.set_resource_type(std::string(type));
  resource.set_resource_name(CutUtf8(name, kMaxNameBytes));
  resource.set_description(CutUtf8(std::string(status.message()), kMaxMessageBytes));
  Attach(status, resource);
  return status;
}

namespace {

// Another server may have a device.
absl::Status DeviceLostError(const absl::Status& status, const ErrorMetadata& metadata) {
  return WithRetryDelay(WithErrorInfo(WithoutDeviceLostMark(status), "DEVICE_LOST", metadata),
                        kDrainingRetryDelay);
}

}  // namespace

absl::Status SubmitError(const absl::Status& status) {
  if (IsDeviceLost(status)) return DeviceLostError(status, {});
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
      return WithRetryDelay(WithErrorInfo(status, "QUEUE_FULL"), kQueueFullRetryDelay);
    case absl::StatusCode::kUnavailable:
      return WithRetryDelay(WithErrorInfo(status, "DRAINING"), kDrainingRetryDelay);
    case absl::StatusCode::kInvalidArgument:
      return WithErrorInfo(status, "REQUEST_TOO_LARGE");
    default:
      return status;
  }
}

absl::Status RunError(const absl::Status& status, Phase phase) {
  const ErrorMetadata metadata = {{"phase", std::string(PhaseName(phase))}};
  if (IsDeviceLost(status)) return DeviceLostError(status, metadata);
  switch (status.code()) {
    case absl::StatusCode::kDeadlineExceeded:
      return WithErrorInfo(status, "DEADLINE_EXCEEDED", metadata);
    case absl::StatusCode::kCancelled:
      return WithErrorInfo(status, "CANCELLED", metadata);
    case absl::StatusCode::kUnavailable:
      return WithRetryDelay(WithErrorInfo(status, "UNAVAILABLE", metadata), kDrainingRetryDelay);
    case absl::StatusCode::kResourceExhausted:
      return WithRetryDelay(WithErrorInfo(status, "CAPACITY", metadata), kQueueFullRetryDelay);
    default:
      return status;
  }
}

std::string_view PhaseName(Phase phase) {
  switch (phase) {
    case Phase::kWaiting:
      return "waiting";
    case Phase::kPrefilling:
      return "prefilling";
    case Phase::kDecoding:
      return "decoding";
    case Phase::kSwapped:
      return "swapped";
    case Phase::kFinished:
      return "finished";
  }
  return "unknown";
}

std::string_view CodeName(absl::StatusCode code) {
  // absl's names are those of google.rpc.Code; the strings live as long as the program.
  static const std::vector<std::string>& names = *[] {
    auto* all = new std::vector<std::string>;
    for (int value = 0; value <= 16; ++value) {
      all->push_back(absl::StatusCodeToString(static_cast<absl::StatusCode>(value)));
    }
    return all;
  }();
  const size_t value = static_cast<size_t>(code);
  if (value >= names.size()) return "UNKNOWN";
  return names[value];
}

std::string ReasonOf(const absl::Status& status) {
  google::rpc::ErrorInfo info;
  if (ReadDetail(status, &info)) return absl::AsciiStrToLower(info.reason());
  return absl::AsciiStrToLower(std::string(CodeName(status.code())));
}

grpc::Status ToGrpcStatus(const absl::Status& status, grpc::CallbackServerContext* context) {
  if (status.ok()) return grpc::Status::OK;
  const bool opaque =
      status.code() == absl::StatusCode::kInternal || status.code() == absl::StatusCode::kUnknown;
  const absl::Status shown = opaque ? Opaque(status) : status;

  google::rpc::Status rich;
  rich.set_code(static_cast<int32_t>(shown.code()));
  rich.set_message(CutUtf8(std::string(shown.message()), kMaxMessageBytes));
  std::map<std::string, std::string> payloads;  // absl visits them in a random order
  shown.ForEachPayload([&payloads](absl::string_view type_url, const absl::Cord& payload) {
    payloads[std::string(type_url)] = std::string(payload);
  });
  for (const auto& [type_url, payload] : payloads) {
    auto* detail = rich.add_details();
    detail->set_type_url(type_url);
    detail->set_value(payload);
  }
  google::rpc::RetryInfo retry;
  if (context != nullptr && ReadDetail(shown, &retry)) {
    const int64_t ms =
        retry.retry_delay().seconds() * 1000 + retry.retry_delay().nanos() / 1'000'000;
    context->AddTrailingMetadata("grpc-retry-pushback-ms", absl::StrCat(ms));
  }
  return grpc::Status(static_cast<grpc::StatusCode>(shown.code()), rich.message(),
                      rich.SerializeAsString());
}

}  // namespace godwit
