#include "cli/eval_target.h"

#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/offline.h"
#include "godwit/v1/inference.grpc.pb.h"
#include "godwit/v1/tokenizer.grpc.pb.h"
#include "kernels/base/status.h"
#include "tokenizer/tokenizer.h"

namespace godwit::cli {
namespace {

absl::StatusOr<EvalTarget> OpenModel(const ModelFlags& flags) {
  std::string why;
  std::shared_ptr<const Tokenizer> tokenizer = LoadTokenizer(flags.model, &why);
  if (tokenizer == nullptr) return absl::NotFoundError(why);
  ASSIGN_OR_RETURN(std::shared_ptr<Engine> engine, LoadOfflineEngine(flags, 0));
  EvalTarget target{.name = flags.model};
  target.tokenize = [=](const std::string& text) -> absl::StatusOr<std::vector<int32_t>> {
    std::vector<int32_t> ids = tokenizer->Encode(text);
    const ModelConfig& config = engine->card().config;
    if (config.add_bos) ids.insert(ids.begin(), *config.bos_token_id);
    return ids;
  };
  target.generate = [=](const std::vector<int32_t>& prompt,
                        int64_t max_tokens) -> absl::StatusOr<std::vector<int32_t>> {
    OfflineGenerateOptions options{.sampling = {.temperature = 0}, .max_tokens = max_tokens};
    ASSIGN_OR_RETURN(const auto result, GenerateOffline(*engine, prompt, options));
    std::vector<int32_t> ids;
    for (const SampledToken& token : result.tokens) ids.push_back(token.token_id);
    return ids;
  };
  target.text = [=](const std::vector<int32_t>& ids) -> absl::StatusOr<std::string> {
    return tokenizer->Decode(ids);
  };
  target.score = [=](const std::vector<int32_t>& ids) -> absl::StatusOr<std::vector<float>> {
    ASSIGN_OR_RETURN(OfflineScoreResult result, ScoreOffline(*engine, ids, 0, nullptr));
    return std::move(result.logprobs);
  };
  return target;
}

absl::Status FromGrpc(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), Describe(status));
}

// What calls share: the stubs are thread-safe.
struct Remote {
  Client client;
  std::string rope;
  std::unique_ptr<v1::Inference::Stub> inference;
  std::unique_ptr<v1::Tokenizer::Stub> tokenizer;

  // One unary call.
  template <typename Stub, typename Request, typename Response>
  absl::Status Call(Stub& stub,
                    grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                    const Request& request, Response* response) const {
    grpc::ClientContext context;
    client.Prepare(context);
    const grpc::Status status = (stub.*method)(&context, request, response);
    return status.ok() ? absl::OkStatus() : FromGrpc(status);
  }
};

absl::StatusOr<EvalTarget> OpenServer(const EvalTargetFlags& flags) {
  auto remote = std::make_shared<Remote>();
  ASSIGN_OR_RETURN(remote->client, Connect(flags.client));
  remote->rope = flags.model.rope;
  remote->inference = v1::Inference::NewStub(remote->client.channel);
  remote->tokenizer = v1::Tokenizer::NewStub(remote->client.channel);
  EvalTarget target{.name = flags.client.server, .concurrent = true};
  target.tokenize = [=](const std::string& text) -> absl::StatusOr<std::vector<int32_t>> {
    v1::TokenizeRequest request;
    request.set_text(text);
    v1::TokenizeResponse response;
    RETURN_IF_ERROR(
        remote->Call(*remote->tokenizer, &v1::Tokenizer::Stub::Tokenize, request, &response));
    return std::vector<int32_t>(response.token_ids().begin(), response.token_ids().end());
  };
  target.generate = [=](const std::vector<int32_t>& prompt,
                        int64_t max_tokens) -> absl::StatusOr<std::vector<int32_t>> {
    v1::GenerateRequest request;
    request.mutable_token_ids()->mutable_ids()->Assign(prompt.begin(), prompt.end());
    request.mutable_sampling()->set_temperature(0);
    request.mutable_stopping()->set_max_tokens(max_tokens);
    if (!remote->rope.empty()) request.set_rope(remote->rope);
    v1::GenerateResponse response;
    RETURN_IF_ERROR(
        remote->Call(*remote->inference, &v1::Inference::Stub::Generate, request, &response));
    const auto& ids = response.outputs(0).token_ids();
    return std::vector<int32_t>(ids.begin(), ids.end());
  };
  target.text = [=](const std::vector<int32_t>& ids) -> absl::StatusOr<std::string> {
    v1::DetokenizeRequest request;
    request.mutable_token_ids()->Assign(ids.begin(), ids.end());
    v1::DetokenizeResponse response;
    RETURN_IF_ERROR(
        remote->Call(*remote->tokenizer, &v1::Tokenizer::Stub::Detokenize, request, &response));
    return response.text();
  };
  target.score = [=](const std::vector<int32_t>& ids) -> absl::StatusOr<std::vector<float>> {
    v1::ScoreRequest request;
    request.mutable_token_ids()->mutable_ids()->Assign(ids.begin(), ids.end());
    if (!remote->rope.empty()) request.set_rope(remote->rope);
    v1::ScoreResponse response;
    RETURN_IF_ERROR(
        remote->Call(*remote->inference, &v1::Inference::Stub::Score, request, &response));
    std::vector<float> logprobs;
    for (const v1::TokenLogprob& token : response.logprobs()) logprobs.push_back(token.logprob());
    return logprobs;
  };
  return target;
}

}  // namespace

void AddEvalTargetFlags(CLI::App& command, EvalTargetFlags& flags) {
  AddClientFlags(command, flags.client);
  AddModelFlags(command, flags.model);
  command.get_option("--model")->required(false)->description(
      "folder of a model to evaluate in this process; absent: ask the server");
}

absl::StatusOr<EvalTarget> OpenEvalTarget(const EvalTargetFlags& flags) {
  return flags.model.model.empty() ? OpenServer(flags) : OpenModel(flags.model);
}

}  // namespace godwit::cli
