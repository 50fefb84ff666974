#include "engine/acceptance_head.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/cache_manager.h"
#include "engine/json_object.h"
#include "engine/models/weight_loader.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

constexpr int64_t kMaxLayers = 16;
constexpr int64_t kMaxWidth = 1 << 16;
constexpr double kMaxRejectWeight = 1e6, kMinTemperature = 1e-3, kMaxTemperature = 1e3;

absl::Status Refuse(const std::string& path, auto&&... words) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", words...));
}

// `names[i]` -> i.
absl::StatusOr<int> OneOf(JsonObject& json, const char* field,
                          std::initializer_list<absl::string_view> names) {
  const std::string value = json.String(field);
  RETURN_IF_ERROR(json.status());
  int index = 0;
  std::string expected;
  for (const absl::string_view name : names) {
    if (value == name) return index;
    absl::StrAppend(&expected, index++ == 0 ? "" : " or ", "\"", name, "\"");
  }
  return Refuse(json.where(), field, " is \"", value.substr(0, 40), "\", expected ", expected);
}

std::vector<double> Temperatures(JsonObject& json, const char* name) {
  if (!json.Has(name)) return {};
  return json.NumberList(name, kMinTemperature, kMaxTemperature, kMaxDraftTokens);
}

}  // namespace

absl::Status AcceptanceHead::ReadConfig(const std::string& path, const std::string& draft_folder) {
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxJsonFileBytes));
  ASSIGN_OR_RETURN(JsonObject json, JsonObject::Parse(text, path));
  ASSIGN_OR_RETURN(const int kind, OneOf(json, "kind", {"specdecpp", "mlp", "linear"}));
  ASSIGN_OR_RETURN(const int label, OneOf(json, "label", {"pre", "post"}));
  kind_ = static_cast<HeadKind>(kind);
  label_ = static_cast<HeadLabel>(label);
  if (kind_ != HeadKind::kSpecDecPP && label_ == HeadLabel::kPost) {
    return Refuse(path, "label is \"post\", expected \"pre\" for this kind");
  }
  const int64_t hidden_size = json.Int("hidden_size", 1, kMaxWidth);
  if (kind_ == HeadKind::kSpecDecPP) num_layers_ = json.Int("num_layers", 1, kMaxLayers);
  if (kind_ == HeadKind::kMlp) width_ = json.Int("width", 1, kMaxWidth);
  reject_weight_ = json.NumberOr("reject_weight", 1 / kMaxRejectWeight, kMaxRejectWeight, 1);
  if (std::optional<JsonObject> temperature = json.Object("temperature")) {
    greedy_temperatures_ = Temperatures(*temperature, "greedy");
    sampled_temperatures_ = Temperatures(*temperature, "sampled");
    RETURN_IF_ERROR(temperature->Finish());
  }
  json.Ignore({"recorded"});
  RETURN_IF_ERROR(json.Finish());
  if (hidden_size != hidden_size_) {
    return Refuse(path, "hidden_size is ", hidden_size, ", expected ", hidden_size_,
                  ", that of the draft model ", draft_folder);
  }
  return absl::OkStatus();
}

// --- Weights

// readout.weight and readout.bias of one logit.
absl::Status AcceptanceHead::LoadReadout(const SafetensorsReader& reader, WeightLoader& loader,
                                         int64_t width) {
  ASSIGN_OR_RETURN(const TensorView weight, loader.Table("readout.weight", {1, width}, 1, width));
  readout_ = MakeView(weight.data, DType::kF32, width);
  ASSIGN_OR_RETURN(const StoredTensor* bias, reader.Expect("readout.bias", {1}));
  loader.MarkUsed("readout.bias");
  ToF32(*bias, 0, 1, &readout_bias_);
  return absl::OkStatus();
}

absl::Status AcceptanceHead::LoadLinear(WeightLoader& loader) {
  ASSIGN_OR_RETURN(const TensorView features,
                   loader.Table("readout.features", {1, kNumHeadFeatures}, 1, kNumHeadFeatures));
  readout_features_ = MakeView(features.data, DType::kF32, kNumHeadFeatures);
  return absl::OkStatus();
}

absl::Status AcceptanceHead::LoadMlp(WeightLoader& loader) {
  ASSIGN_OR_RETURN(weight_,
                   loader.Table("hidden.weight", {width_, hidden_size_}, width_, hidden_size_));
  ASSIGN_OR_RETURN(const TensorView bias, loader.Table("hidden.bias", {width_}, 1, width_));
  bias_ = MakeView(bias.data, DType::kF32, width_);
  ASSIGN_OR_RETURN(feature_weights_, loader.Table("hidden.features", {kNumHeadFeatures, width_},
                                                  kNumHeadFeatures, width_));
  return absl::OkStatus();
}

absl::Status AcceptanceHead::LoadSpecDecPP(const SafetensorsReader& reader, WeightLoader& loader) {
  const int64_t h = hidden_size_;
  for (int64_t index = 0; index < num_layers_; ++index) {
    const auto name = [](int64_t layer, const char* of) {
      return absl::StrCat("model.", layer, ".linear.", of);
    };
    const std::string weight = name(index, "weight"), bias = name(index, "bias");
    const bool stored = loader.Has(weight) || loader.Has(bias);
    if (index > 0 && (!stored || (loader.Same(weight, name(0, "weight")) &&
                                  loader.Same(bias, name(0, "bias"))))) {
      loader.MarkUsed(weight);
      loader.MarkUsed(bias);
      layers_.push_back(layers_[0]);
      continue;
    }
    Layer layer;
    ASSIGN_OR_RETURN(layer.weight, loader.Matrix({{weight, h}}, h));
    ASSIGN_OR_RETURN(const TensorView values, loader.Table(bias, {h}, 1, h));
    layer.bias = MakeView(values.data, DType::kF32, h);
    layers_.push_back(layer);
  }
  const std::string weight = absl::StrCat("model.", num_layers_, ".weight");
  const std::string bias = absl::StrCat("model.", num_layers_, ".bias");
  ASSIGN_OR_RETURN(const StoredTensor* stored_weight, reader.Expect(weight, {2, h}));
  ASSIGN_OR_RETURN(const StoredTensor* stored_bias, reader.Expect(bias, {2}));
  loader.MarkUsed(weight);
  loader.MarkUsed(bias);
  // softmax over two logits is the sigmoid of their difference.
  std::vector<float> reject(static_cast<size_t>(h)), accept(static_cast<size_t>(h));
  ToF32(*stored_weight, 0, h, reject.data());
  ToF32(*stored_weight, h, h, accept.data());
  for (size_t i = 0; i < accept.size(); ++i) accept[i] -= reject[i];
  ASSIGN_OR_RETURN(const TensorView readout, weights_.Upload(accept, 1, h));
  readout_ = MakeView(readout.data, DType::kF32, h);
  float biases[2];
  ToF32(*stored_bias, 0, 2, biases);
  readout_bias_ = biases[1] - biases[0];
  num_parameters_ += 2 * h + 2;
  return absl::OkStatus();
}

absl::Status AcceptanceHead::LoadWeights(const std::string& path, DType dtype) {
  ASSIGN_OR_RETURN(const auto reader, SafetensorsReader::OpenFile(path));
  WeightLoader loader({.stored = reader.get()}, kind_ == HeadKind::kSpecDecPP ? dtype : DType::kF32,
                      weights_);
  switch (kind_) {
    case HeadKind::kSpecDecPP:
      RETURN_IF_ERROR(LoadSpecDecPP(*reader, loader));
      break;
    case HeadKind::kMlp:
      RETURN_IF_ERROR(LoadMlp(loader));
      RETURN_IF_ERROR(LoadReadout(*reader, loader, width_));
      break;
    case HeadKind::kLinear:
      RETURN_IF_ERROR(LoadLinear(loader));
      RETURN_IF_ERROR(LoadReadout(*reader, loader, hidden_size_));
      break;
  }
  num_parameters_ += loader.num_parameters();
  RETURN_IF_ERROR(ToStatus(weights_.backend().Synchronize()));
  return loader.Finish();
}

absl::StatusOr<std::unique_ptr<AcceptanceHead>> AcceptanceHead::Load(const std::string& folder,
                                                                     const ModelConfig& draft,
                                                                     DType dtype,
                                                                     Backend& backend) {
  const std::string config = absl::StrCat(folder, "/acceptance_head.json");
  const std::string weights = absl::StrCat(folder, "/acceptance_head.safetensors");
  std::error_code ignored;
  const bool has_config = std::filesystem::exists(config, ignored);
  const bool has_weights = std::filesystem::exists(weights, ignored);
  if (!has_config && !has_weights) return nullptr;
  if (!has_config || !has_weights) {
    return absl::NotFoundError(absl::StrCat(has_config ? weights : config, ": is missing beside ",
                                            has_config ? config : weights));
  }
  std::unique_ptr<AcceptanceHead> head(new AcceptanceHead(draft.d_model, backend));
  RETURN_IF_ERROR(head->ReadConfig(config, folder));
  RETURN_IF_ERROR(head->LoadWeights(weights, dtype));
  return head;
}

// --- Running

int64_t AcceptanceHead::WorkspaceBytes(int64_t max_rows) const {
  return kind_ == HeadKind::kSpecDecPP ? 2 * max_rows * DTypeBytes(DType::kF32) * hidden_size_ : 0;
}

absl::Status AcceptanceHead::MakeWorkspace(int64_t max_rows) {
  if (kind_ != HeadKind::kSpecDecPP) return absl::OkStatus();
  ASSIGN_OR_RETURN(z_, workspace_.Tensor(DType::kF32, max_rows, hidden_size_));
  ASSIGN_OR_RETURN(y_, workspace_.Tensor(DType::kF32, max_rows, hidden_size_));
  return absl::OkStatus();
}

// x <- x + silu(W x + b), the first x from the hidden state; the last layer is read.
absl::Status AcceptanceHead::RunSpecDecPP(const Draws& draws, AcceptanceHeadArgs args) const {
  Backend& backend = weights_.backend();
  const int64_t num_rows = draws.hidden.rows();
  const TensorView readout = std::exchange(args.readout, {});
  const TensorView shown_margins = std::exchange(args.shown_margins, {});
  args.z = RowRange(z_, 0, num_rows);
  args.y = RowRange(y_, 0, num_rows);
  for (const Layer& layer : layers_) {
    RETURN_IF_ERROR(backend.Linear({.input = {.x = args.x, .norm = args.norm},
                                    .w = layer.weight,
                                    .y = args.z,
                                    .num_decode_tokens = num_rows}));
    args.bias = layer.bias;
    if (&layer == &layers_.back()) {
      args.readout = readout;
      args.shown_margins = shown_margins;
    }
    RETURN_IF_ERROR(backend.AcceptanceHead(args));
    args.x = args.y;
    args.norm = {};
  }
  return absl::OkStatus();
}

absl::Status AcceptanceHead::Run(const Draws& draws, const NormSpec& final_norm) const {
  AcceptanceHeadArgs args = {.x = draws.hidden,
                             .norm = final_norm,
                             .readout = readout_,
                             .readout_bias = readout_bias_,
                             .place = static_cast<float>(draws.place),
                             .rows = draws.rows,
                             .num_rows = draws.num_rows,
                             .margins = draws.margins,
                             .certainties = draws.certainties,
                             .logits = draws.logits,
                             .shown_margins = draws.shown_margins};
  switch (kind_) {
    case HeadKind::kSpecDecPP:
      return RunSpecDecPP(draws, args);
    case HeadKind::kLinear:
      args.readout_features = readout_features_;
      break;
    case HeadKind::kMlp:
      args.weight = weight_;
      args.bias = bias_;
      args.feature_weights = feature_weights_;
      break;
  }
  return ToStatus(weights_.backend().AcceptanceHead(args));
}

double AcceptanceHead::Calibrated(float logit, bool greedy, int place) const {
  const std::vector<double>& temperatures = greedy ? greedy_temperatures_ : sampled_temperatures_;
  const double unbiased = static_cast<double>(logit) + std::log(reject_weight_);
  if (temperatures.empty()) return unbiased;
  return unbiased / temperatures[std::min(static_cast<size_t>(place), temperatures.size() - 1)];
}

}  // namespace godwit
