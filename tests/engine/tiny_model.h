#pragma once
// Small random models as Hugging Face folders, for tests of everything above the kernels.

#include <cstdint>
#include <string>

namespace godwit {

enum class TinyFamily { kTransnormer, kLlama };

struct TinyModelOptions {
  TinyFamily family = TinyFamily::kTransnormer;
  uint64_t seed = 1;
  int vocab_size = 320;
  int d_model = 64;
  int num_layers = 3;  // transnormer: LRPE in layer 0
  int num_heads = 4;
  int num_kv_heads = 2;  // llama
  int d_ff = 96;
  int context_length = 2048;  // llama
  // Standard deviation of the weights times sqrt(columns). Large enough that logits differ by whole
  // units and greedy choices are not ties.
  double scale = 1.5;
};

// A folder with config.json and model.safetensors (bf16), removed with the object. Fails the test
// when it cannot be written.
class TinyModel {
 public:
  explicit TinyModel(const TinyModelOptions& options = {});
  ~TinyModel();
  TinyModel(const TinyModel&) = delete;
  TinyModel& operator=(const TinyModel&) = delete;

  const std::string& folder() const { return folder_; }
  const TinyModelOptions& options() const { return options_; }

 private:
  TinyModelOptions options_;
  std::string folder_;
};

}  // namespace godwit
