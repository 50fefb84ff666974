#pragma once
// Whole models from their formulas, in double, with the quadratic forms of attention: independent
// of kernels, state, steps and of the engine's own model code. And folders of random weights in any
// shape.

#include <cstdint>
#include <string>
#include <vector>

namespace godwit {

struct RandomModel {
  std::string family = "transnormer";  // or "llama"
  uint64_t seed = 1;
  int64_t vocab_size = 101;
  int64_t d_model = 40;
  int64_t num_layers = 3;
  int64_t num_heads = 4;
  int64_t num_kv_heads = 4;  // llama
  int64_t head_dim = 16;     // num_heads * head_dim need not be d_model
  int64_t d_ff = 72;
  bool tied = true;
  std::vector<int> lrpe_layers = {1, 0, 0};  // transnormer
  bool scaled_embedding = true;              // transnormer
  double rope_theta = 10000;                 // llama
  double rope_factor = 1;                    // llama; > 1: linear
  double rotary_share = 1;                   // llama; of each head, from its first dimension
  bool interleaved = false;                  // llama; pairs (2i, 2i + 1)
  std::string dtype = "BF16";                // as stored: F32, F16, BF16
};

// config.json and model.safetensors. Weights are rounded to bf16 first, so that every dtype stores
// the same values.
void WriteRandomModel(const RandomModel& model, const std::string& folder);

// Tokens that a sequence keeps: before token t >= most, whole blocks of `block` tokens behind the
// first one are dropped until fewer than `most` are kept. Positions count what is kept. llama only.
struct NaiveBound {
  size_t most = 0;  // 0: everything
  size_t block = 16;
};

// [T, vocab] logits of the model in `folder`, read from its files.
std::vector<double> NaiveLogits(const RandomModel& model, const std::string& folder,
                                const std::vector<int32_t>& tokens, const NaiveBound& bound = {});

}  // namespace godwit
