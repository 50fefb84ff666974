#pragma once
// A trained head beside a draft model: how likely a draft is to be accepted, from the draft model's
// last hidden state. Two files of the draft's folder:
//
//   acceptance_head.json         {"kind", "label", "hidden_size", "num_layers" | "width",
//                                 "reject_weight", "temperature": {"greedy": [...], "sampled":
//                                 [...]}, "recorded": {...}}
//   acceptance_head.safetensors  by kind, H = hidden_size, D = num_layers, W = width, F = 5
//     specdecpp  model.{0..D-1}.linear.{weight [H, H], bias [H]}, model.D.{weight [2, H], bias [2]}
//                x <- x + silu(W x + b), D times, then two logits: reject, accept (2405.19715). The
//                layout of the released checkpoints, whose D layers are one; what is left out is
//                layer 0 again
//     mlp        hidden.{weight [W, H], features [F, W], bias [W]}, readout.{weight [1, W], bias
//     [1]} linear     readout.{weight [1, H], features [1, F], bias [1]}
//
// x is the hidden state after the draft model's final norm; the features are AcceptanceHeadArgs'.
// label says what the head is about. "post": the token that has just been read, so that the pass
// that reads a draft judges it, one pass after it was drawn. "pre": the distribution that the next
// token is drawn from, whatever that token is; linear and mlp heads are always that.
//
// The probability: the head's logit, plus ln reject_weight, which undoes the weight of rejections
// in the loss it was trained with, over the temperature of the place in the round, greedy or
// sampled. The last temperature serves the places after it; absent: 1. "recorded" is for the
// reader.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "engine/models/device_memory.h"
#include "engine/safetensors.h"
#include "kernels/backend.h"

namespace godwit {

class WeightLoader;

enum class HeadKind { kSpecDecPP, kMlp, kLinear };
enum class HeadLabel { kPre, kPost };

class AcceptanceHead {
 public:
  // Null where the folder has neither file. NOT_FOUND: one of them only. INVALID_ARGUMENT /
  // UNIMPLEMENTED name file, field or tensor, expected and found. dtype: of the layers of a
  // specdecpp head, the others are f32. The back end outlives it.
  static absl::StatusOr<std::unique_ptr<AcceptanceHead>> Load(const std::string& folder,
                                                              const ModelConfig& draft, DType dtype,
                                                              Backend& backend);

  HeadKind kind() const { return kind_; }
  HeadLabel label() const { return label_; }
  int64_t num_parameters() const { return num_parameters_; }
  int64_t weight_bytes() const { return weights_.num_bytes(); }

  // What Run works in; once, before it.
  int64_t WorkspaceBytes(int64_t max_rows) const;
  absl::Status MakeWorkspace(int64_t max_rows);

  // Draws of a pass of the draft model; on the device where nothing else is said.
  struct Draws {
    TensorView hidden;                // [R, H] f32, before the final norm
    const SampleRow* rows = nullptr;  // [num_rows]
    int32_t num_rows = 0;
    int place = 0;           // of the draws in their rounds
    TensorView margins;      // [num_rows]
    TensorView certainties;  // [num_rows, 2]
    // [num_rows] f32, may be host memory: receive the head's, and the margins; the latter may be
    // absent.
    TensorView logits, shown_margins;
  };
  absl::Status Run(const Draws& draws, const NormSpec& final_norm) const;

  // The logit of a probability from what Run left: of a draft at `place` of a round.
  double Calibrated(float logit, bool greedy, int place) const;

 private:
  struct Layer {
    MatrixView weight;  // [H, H]
    TensorView bias;    // [H]
  };

  AcceptanceHead(int64_t hidden_size, Backend& backend)
      : hidden_size_(hidden_size), weights_(backend), workspace_(backend) {}
  absl::Status ReadConfig(const std::string& path, const std::string& draft_folder);
  absl::Status LoadWeights(const std::string& path, DType dtype);
  absl::Status LoadSpecDecPP(const SafetensorsReader& reader, WeightLoader& loader);
  absl::Status LoadMlp(WeightLoader& loader);
  absl::Status LoadLinear(WeightLoader& loader);
  absl::Status LoadReadout(const SafetensorsReader& reader, WeightLoader& loader, int64_t width);
  absl::Status RunSpecDecPP(const Draws& draws, AcceptanceHeadArgs args) const;

  HeadKind kind_ = HeadKind::kLinear;
  HeadLabel label_ = HeadLabel::kPre;
  int64_t hidden_size_ = 0;
  int64_t num_layers_ = 0, width_ = 0;
  double reject_weight_ = 1;
  std::vector<double> greedy_temperatures_, sampled_temperatures_;

  DeviceMemory weights_, workspace_;
  int64_t num_parameters_ = 0;
  std::vector<Layer> layers_;            // specdecpp
  TensorView weight_, feature_weights_;  // mlp: [W, H], [F, W]
  TensorView bias_;                      // mlp: [W]
  TensorView readout_;                   // of the accept logit over the reject logit, [H] or [W]
  TensorView readout_features_;
  float readout_bias_ = 0;
  TensorView z_, y_;  // specdecpp: [max_rows, H]
};

}  // namespace godwit
