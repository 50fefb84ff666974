#include "godwit/v1/inference.grpc.pb.h"
#include "server/generate_call.h"
#include "server/score_call.h"
#include "server/services.h"

namespace godwit {
namespace {

using Base = v1::Inference::WithRawCallbackMethod_Generate<
    v1::Inference::WithRawCallbackMethod_GenerateStream<
        v1::Inference::WithRawCallbackMethod_Score<v1::Inference::Service>>>;

class InferenceService final : public Base {
 public:
  explicit InferenceService(const ServiceContext& context) : services_(context) {}

  grpc::ServerUnaryReactor* Generate(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override {
    return StartGenerate(services_, context, request, response);
  }
  grpc::ServerWriteReactor<grpc::ByteBuffer>* GenerateStream(
      grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) override {
    return StartGenerateStream(services_, context, request);
  }
  grpc::ServerUnaryReactor* Score(grpc::CallbackServerContext* context,
                                  const grpc::ByteBuffer* request,
                                  grpc::ByteBuffer* response) override {
    return StartScore(services_, context, request, response);
  }

 private:
  const ServiceContext& services_;
};

}  // namespace

std::unique_ptr<grpc::Service> NewInferenceService(const ServiceContext& context) {
  return std::make_unique<InferenceService>(context);
}

}  // namespace godwit
