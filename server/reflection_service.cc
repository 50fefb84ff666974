#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor.pb.h>

#include <algorithm>
#include <set>
#include <utility>

#include "absl/status/statusor.h"
#include "grpc/reflection/v1/reflection.grpc.pb.h"
#include "grpc/reflection/v1alpha/reflection.grpc.pb.h"
#include "kernels/base/status.h"
#include "server/rpc_record.h"
#include "server/services.h"
#include "server/status_mapping.h"

namespace godwit {
namespace {

using google::protobuf::DescriptorPool;
using google::protobuf::FileDescriptor;

// `file` and all it imports, imports first.
void Collect(const FileDescriptor& file, std::set<const FileDescriptor*>& seen,
             std::vector<std::string>& files) {
  if (!seen.insert(&file).second) return;
  for (int at = 0; at < file.dependency_count(); ++at) Collect(*file.dependency(at), seen, files);
  google::protobuf::FileDescriptorProto proto;
  file.CopyTo(&proto);
  files.push_back(proto.SerializeAsString());
}

// NOT_FOUND when there is no such file.
absl::StatusOr<std::vector<std::string>> FilesOf(const FileDescriptor* file,
                                                 const std::string& name) {
  if (file == nullptr) return absl::NotFoundError(name);
  std::set<const FileDescriptor*> seen;
  std::vector<std::string> files;
  Collect(*file, seen, files);
  std::reverse(files.begin(),
               files.end());  // clients take the first one as the file they asked for
  return files;
}

template <typename Request, typename Response>
absl::Status Answer(const Request& request, const std::vector<std::string>& service_names,
                    Response* response) {
  const DescriptorPool& pool = *DescriptorPool::generated_pool();
  absl::StatusOr<std::vector<std::string>> files;
  switch (request.message_request_case()) {
    case Request::kListServices:
      for (const std::string& name : service_names) {
        response->mutable_list_services_response()->add_service()->set_name(name);
      }
      return absl::OkStatus();
    case Request::kFileByFilename:
      files = FilesOf(pool.FindFileByName(request.file_by_filename()), request.file_by_filename());
      break;
    case Request::kFileContainingSymbol:
      files = FilesOf(pool.FindFileContainingSymbol(request.file_containing_symbol()),
                      request.file_containing_symbol());
      break;
    case Request::kFileContainingExtension:
    case Request::kAllExtensionNumbersOfType:
      return absl::NotFoundError("there are no extensions");
    default:
      return absl::InvalidArgumentError("message_request is not set");
  }
  RETURN_IF_ERROR(files.status());
  for (std::string& file : *files) {
    response->mutable_file_descriptor_response()->add_file_descriptor_proto(std::move(file));
  }
  return absl::OkStatus();
}

template <typename Request, typename Response>
class ReflectionReactor final : public grpc::ServerBidiReactor<Request, Response> {
 public:
  ReflectionReactor(const ServiceContext& services, RpcName name,
                    const std::vector<std::string>& service_names,
                    grpc::CallbackServerContext* context)
      : service_names_(service_names), record_(services.metrics, name) {
    const absl::Status status = services.authenticator.Check(*context);
    if (status.ok()) {
      this->StartRead(&request_);
    } else {
      services.metrics.OnRejected(status);
      End(status, context);
    }
  }

  void OnReadDone(bool ok) override {
    if (!ok) return End(absl::OkStatus(), nullptr);
    response_.Clear();
    response_.set_valid_host(request_.host());
    *response_.mutable_original_request() = request_;
    if (const absl::Status status = Answer(request_, service_names_, &response_); !status.ok()) {
      response_.mutable_error_response()->set_error_code(static_cast<int>(status.code()));
      response_.mutable_error_response()->set_error_message(std::string(status.message()));
    }
    this->StartWrite(&response_);
  }
  void OnWriteDone(bool ok) override {
    if (!ok) return End(absl::OkStatus(), nullptr);
    this->StartRead(&request_);
  }
  void OnDone() override { delete this; }

 private:
  void End(const absl::Status& status, grpc::CallbackServerContext* context) {
    record_.Handled(status.code());
    this->Finish(ToGrpcStatus(status, context));
  }

  const std::vector<std::string>& service_names_;
  RpcRecord record_;
  Request request_;
  Response response_;
};

// Service: the generated class of v1 or v1alpha.
template <typename Service, typename Request, typename Response>
class ReflectionService final : public Service {
 public:
  ReflectionService(const ServiceContext& context, std::string_view name,
                    std::vector<std::string> service_names)
      : services_(context),
        name_{.service = name, .method = "ServerReflectionInfo", .type = "bidi_stream"},
        service_names_(std::move(service_names)) {}

  grpc::ServerBidiReactor<Request, Response>* ServerReflectionInfo(
      grpc::CallbackServerContext* context) override {
    return new ReflectionReactor<Request, Response>(services_, name_, service_names_, context);
  }

 private:
  const ServiceContext& services_;
  const RpcName name_;
  const std::vector<std::string> service_names_;
};

}  // namespace

std::vector<std::unique_ptr<grpc::Service>> NewReflectionServices(
    const ServiceContext& context, std::vector<std::string> service_names) {
  namespace v1 = grpc::reflection::v1;
  namespace v1alpha = grpc::reflection::v1alpha;
  service_names.push_back(v1::ServerReflection::service_full_name());
  service_names.push_back(v1alpha::ServerReflection::service_full_name());
  std::vector<std::unique_ptr<grpc::Service>> services;
  services.push_back(std::make_unique<
                     ReflectionService<v1::ServerReflection::CallbackService,
                                       v1::ServerReflectionRequest, v1::ServerReflectionResponse>>(
      context, v1::ServerReflection::service_full_name(), service_names));
  services.push_back(
      std::make_unique<
          ReflectionService<v1alpha::ServerReflection::CallbackService,
                            v1alpha::ServerReflectionRequest, v1alpha::ServerReflectionResponse>>(
          context, v1alpha::ServerReflection::service_full_name(), service_names));
  return services;
}

}  // namespace godwit
