#include "absl/strings/str_cat.h"
#include "godwit/v1/tokenizer.grpc.pb.h"
#include "kernels/base/status.h"
#include "server/request_validation.h"
#include "server/services.h"
#include "server/unary_call.h"
#include "server/utf8.h"

namespace godwit {
namespace {

absl::Status Tokenize(const ServedModel& model, const v1::TokenizeRequest& request,
                      v1::TokenizeResponse* response) {
  RETURN_IF_ERROR(model.CheckName(request.model()));
  ASSIGN_OR_RETURN(const Tokenizer* tokenizer, model.RequireTokenizer());
  RETURN_IF_ERROR(CheckTextSize("text", request.text(), model));
  if (request.add_bos() && !model.bos_token_id().has_value()) {
    return InvalidFields({{"add_bos", "the model has no BOS"}});
  }
  const bool with_bos = request.has_add_bos() ? request.add_bos() : model.add_bos();
  const std::vector<int32_t> ids = model.EncodePrompt(request.text(), with_bos);
  response->mutable_token_ids()->Assign(ids.begin(), ids.end());
  if (request.return_pieces()) {
    for (const int32_t id : ids) response->add_pieces(std::string(tokenizer->Piece(id)));
  }
  response->set_model(model.name());
  return absl::OkStatus();
}

absl::Status Detokenize(const ServedModel& model, const v1::DetokenizeRequest& request,
                        v1::DetokenizeResponse* response) {
  RETURN_IF_ERROR(model.CheckName(request.model()));
  ASSIGN_OR_RETURN(const Tokenizer* tokenizer, model.RequireTokenizer());
  RETURN_IF_ERROR(CheckTokenIds("token_ids", request.token_ids(), model));
  const std::vector<int32_t> ids(request.token_ids().begin(), request.token_ids().end());
  for (size_t at = 0; at < ids.size(); ++at) {
    if (ids[at] < tokenizer->vocab_size()) continue;  // a model's vocabulary may be padded
    return InvalidFields({{absl::StrCat("token_ids[", at, "]"),
                           absl::StrCat("token id ", ids[at], " has no text; the tokenizer has ",
                                        tokenizer->vocab_size())}});
  }
  response->set_text(ToValidUtf8(tokenizer->Decode(ids)));
  response->set_model(model.name());
  return absl::OkStatus();
}

using Base = v1::Tokenizer::WithRawCallbackMethod_Tokenize<
    v1::Tokenizer::WithRawCallbackMethod_Detokenize<v1::Tokenizer::Service>>;

class TokenizerService final : public Base {
 public:
  explicit TokenizerService(const ServiceContext& context) : services_(context) {}

  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override {
    constexpr RpcName kName = {"godwit.v1.Tokenizer", "Tokenize"};
    return AnswerAtOnce<v1::TokenizeRequest, v1::TokenizeResponse>(
        services_, kName, context, request, response,
        [this](const auto& from, auto* to) { return godwit::Tokenize(services_.model, from, to); });
  }
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override {
    constexpr RpcName kName = {"godwit.v1.Tokenizer", "Detokenize"};
    return AnswerAtOnce<v1::DetokenizeRequest, v1::DetokenizeResponse>(
        services_, kName, context, request, response, [this](const auto& from, auto* to) {
          return godwit::Detokenize(services_.model, from, to);
        });
  }

 private:
  const ServiceContext& services_;
};

}  // namespace

std::unique_ptr<grpc::Service> NewTokenizerService(const ServiceContext& context) {
  return std::make_unique<TokenizerService>(context);
}

}  // namespace godwit
