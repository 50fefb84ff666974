// Both families in many shapes against their formulas (naive_models.h), and what a checkpoint may
// not do.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "engine/model_registry.h"
#include "engine/models/lightning_decay.h"
#include "engine/offline.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/ref/ref_backend.h"
#include "tests/engine/naive_models.h"
#include "tests/engine/temp_folder.h"

namespace godwit {
namespace {

using absl::StatusCode;
using BackendPointer = std::unique_ptr<Backend, BackendDeleter>;

BackendPointer MakeBackend(const std::string& name) {
  if (name == "ref") return CreateRefBackend();
  auto cpu = CreateCpuBackend({.num_threads = 2});
  EXPECT_TRUE(cpu.ok()) << cpu.status();
  return cpu.ok() ? *std::move(cpu) : nullptr;
}

std::unique_ptr<Engine> MakeEngine(const std::string& folder, const std::string& backend,
                                   DType dtype) {
  auto engine = Engine::Create({.model_folder = folder,
                                .dtype = dtype,
                                .max_sequences = 2,
                                .max_tokens_per_step = 256,
                                .kv_bytes = 32 << 20},
                               MakeBackend(backend));
  EXPECT_TRUE(engine.ok()) << engine.status();
  return engine.ok() ? *std::move(engine) : nullptr;
}

std::vector<int32_t> RandomTokens(uint64_t seed, int64_t count, int64_t vocab_size) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int32_t> draw(0, static_cast<int32_t>(vocab_size) - 1);
  std::vector<int32_t> tokens;
  for (int64_t index = 0; index < count; ++index) tokens.push_back(draw(random));
  return tokens;
}

std::vector<float> Score(Engine& engine, const std::vector<int32_t>& tokens, int64_t chunk) {
  std::vector<float> logits(tokens.size() * static_cast<size_t>(engine.card().config.vocab_size),
                            NAN);
  const auto result = ScoreOffline(engine, tokens, chunk, logits.data());
  EXPECT_TRUE(result.ok()) << result.status();
  return logits;
}

struct Difference {
  double max = 0;
  double nmse = 0;
};

Difference Compare(const std::vector<float>& logits, const std::vector<double>& expected) {
  Difference difference;
  double error = 0, power = 0;
  EXPECT_EQ(logits.size(), expected.size());
  for (size_t index = 0; index < expected.size(); ++index) {
    const double delta = std::abs(logits[index] - expected[index]);
    if (!(delta <= difference.max)) difference.max = delta;  // a NaN stays
    error += delta * delta;
    power += expected[index] * expected[index];
  }
  difference.nmse = error / power;
  return difference;
}

// --- Shapes. ---

std::vector<RandomModel> Shapes() {
  return {
      {.seed = 1},
      {.seed = 2,
       .vocab_size = 257,
       .d_model = 33,
       .num_heads = 3,
       .head_dim = 11,
       .d_ff = 77,
       .tied = false,
       .scaled_embedding = false},
      {.seed = 3,
       .vocab_size = 64,
       .d_model = 50,
       .num_layers = 2,
       .num_heads = 1,
       .head_dim = 8,
       .d_ff = 31,
       .lrpe_layers = {0, 0}},
      {.seed = 4,
       .vocab_size = 99,
       .d_model = 64,
       .num_layers = 4,
       .num_heads = 7,
       .head_dim = 24,
       .d_ff = 129,
       .lrpe_layers = {1, 1, 0, 1},
       .dtype = "F32"},
      {.seed = 5,
       .vocab_size = 300,
       .d_model = 96,
       .num_layers = 2,
       .num_heads = 2,
       .head_dim = 128,
       .d_ff = 160,
       .tied = false,
       .lrpe_layers = {1, 0},
       .dtype = "F16"},
      {.seed = 6,
       .vocab_size = 77,
       .d_model = 100,
       .num_layers = 5,
       .num_heads = 10,
       .head_dim = 10,
       .d_ff = 1,
       .lrpe_layers = {1, 0, 0, 0, 0}},
      {.seed = 7,
       .vocab_size = 513,
       .d_model = 72,
       .num_heads = 12,
       .head_dim = 6,
       .d_ff = 200,
       .scaled_embedding = false},
      {.family = "llama", .seed = 11},
      {.family = "llama",
       .seed = 12,
       .vocab_size = 257,
       .d_model = 33,
       .num_heads = 6,
       .num_kv_heads = 2,
       .head_dim = 8,
       .d_ff = 77,
       .tied = false},
      {.family = "llama",
       .seed = 13,
       .vocab_size = 91,
       .d_model = 50,
       .num_layers = 1,
       .num_heads = 8,
       .num_kv_heads = 1,
       .head_dim = 10,
       .d_ff = 131,
       .rope_theta = 500000,
       .dtype = "F16"},
      {.family = "llama",
       .seed = 14,
       .vocab_size = 64,
       .d_model = 96,
       .num_layers = 2,
       .num_heads = 3,
       .num_kv_heads = 3,
       .head_dim = 128,
       .d_ff = 96,
       .rope_factor = 8,
       .dtype = "F32"},
      {.family = "llama",
       .seed = 15,
       .vocab_size = 333,
       .d_model = 70,
       .num_layers = 4,
       .num_heads = 15,
       .num_kv_heads = 5,
       .head_dim = 14,
       .d_ff = 1,
       .tied = false,
       .rope_factor = 2.5},
      {.family = "llama",
       .seed = 16,
       .vocab_size = 130,
       .d_model = 160,
       .num_layers = 2,
       .num_heads = 2,
       .num_kv_heads = 1,
       .head_dim = 80,
       .d_ff = 300},
      {.family = "llama",
       .seed = 17,
       .vocab_size = 77,
       .d_model = 64,
       .num_layers = 2,
       .num_heads = 4,
       .num_kv_heads = 2,
       .head_dim = 32,
       .d_ff = 80,
       .rope_factor = 4,
       .rotary_share = 0.25},
      {.family = "llama",
       .seed = 18,
       .vocab_size = 77,
       .d_model = 64,
       .num_layers = 2,
       .num_heads = 4,
       .num_kv_heads = 4,
       .head_dim = 24,
       .d_ff = 80,
       .rotary_share = 0.5,
       .interleaved = true},
  };
}

struct Param {
  size_t shape = 0;
  const char* backend = "";
};

void PrintTo(const Param& param, std::ostream* out) {
  *out << "shape " << param.shape << ", " << param.backend;
}

class ShapeTest : public testing::TestWithParam<Param> {
 protected:
  ShapeTest()
      : model_(Shapes()[GetParam().shape]),
        tokens_(RandomTokens(model_.seed, 100, model_.vocab_size)) {
    WriteRandomModel(model_, folder_.path());
    expected_ = NaiveLogits(model_, folder_.path(), tokens_);
  }
  TempFolder folder_;
  RandomModel model_;
  std::vector<int32_t> tokens_;
  std::vector<double> expected_;
};

TEST_P(ShapeTest, F32FollowsTheFormulasInEveryCut) {
  const auto engine = MakeEngine(folder_.path(), GetParam().backend, DType::kF32);
  ASSERT_NE(engine, nullptr);
  for (const int64_t chunk : {0, 1, 7, 64}) {
    EXPECT_LE(Compare(Score(*engine, tokens_, chunk), expected_).max, 2e-3)
        << "chunk " << chunk << ", seed " << model_.seed;
  }
}

// Not on the reference back end: its decoding runs the same loops, and it computes in f32.
class CpuShapeTest : public ShapeTest {};

TEST_P(CpuShapeTest, DecodingFollowsTheFormulas) {
  constexpr int64_t kNumTokens = 40;  // past two folds of a window
  constexpr double kTie = 4e-3;       // twice what a logit may be off
  const auto engine = MakeEngine(folder_.path(), GetParam().backend, DType::kF32);
  ASSERT_NE(engine, nullptr);
  const std::vector<int32_t> prompt(tokens_.begin(), tokens_.begin() + 70);
  const auto generated = GenerateOffline(*engine, prompt,
                                         {.sampling = {.temperature = 0, .num_logprobs = 0},
                                          .max_tokens = kNumTokens,
                                          .ignore_eos = true});
  ASSERT_TRUE(generated.ok()) << generated.status();
  std::vector<int32_t> all = prompt;
  for (const SampledToken& token : generated->tokens) all.push_back(token.token_id);
  const std::vector<double> expected = NaiveLogits(model_, folder_.path(), all);
  for (size_t index = 0; index < generated->tokens.size(); ++index) {
    const double* row =
        expected.data() + static_cast<int64_t>(prompt.size() + index - 1) * model_.vocab_size;
    const double best = *std::max_element(row, row + model_.vocab_size);
    EXPECT_GE(row[generated->tokens[index].token_id], best - kTie)
        << "token " << index << ", seed " << model_.seed;
    double sum = 0;
    for (int64_t id = 0; id < model_.vocab_size; ++id) sum += std::exp(row[id] - best);
    EXPECT_NEAR(generated->tokens[index].logprob,
                row[generated->tokens[index].token_id] - best - std::log(sum), 4e-3);
  }
}

TEST_P(CpuShapeTest, Bf16StaysClose) {
  const auto engine = MakeEngine(folder_.path(), GetParam().backend, DType::kBF16);
  ASSERT_NE(engine, nullptr);
  EXPECT_LE(Compare(Score(*engine, tokens_, 0), expected_).nmse, 1e-3) << "seed " << model_.seed;
  EXPECT_LE(Compare(Score(*engine, tokens_, 7), expected_).nmse, 1e-3) << "seed " << model_.seed;
}

std::vector<Param> ParamsFor(std::initializer_list<const char*> backends) {
  std::vector<Param> params;
  for (size_t shape = 0; shape < Shapes().size(); ++shape) {
    for (const char* backend : backends) params.push_back({shape, backend});
  }
  return params;
}

std::string ParamName(const testing::TestParamInfo<Param>& info) {
  const RandomModel model = Shapes()[info.param.shape];
  return absl::StrCat(model.family, "_heads", model.num_heads, "x", model.head_dim, "_d",
                      model.d_model, "_", info.param.backend);
}

INSTANTIATE_TEST_SUITE_P(All, ShapeTest, testing::ValuesIn(ParamsFor({"cpu", "ref"})), ParamName);
INSTANTIATE_TEST_SUITE_P(Cpu, CpuShapeTest, testing::ValuesIn(ParamsFor({"cpu"})), ParamName);

// --- What a model says about itself. ---

class LoadTest : public testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<Model>> Load(ModelOptions options = {.dtype = DType::kF32,
                                                                      .max_tokens_per_step = 16}) {
    return LoadModel(folder_.path(), options, "", *backend_);
  }
  // Writes the model again with its tensors changed by `edit`.
  template <typename Edit>
  void Rewrite(Edit edit) {
    const std::string path = folder_.File("model.safetensors");
    const auto reader = SafetensorsReader::OpenFile(path);
    ASSERT_TRUE(reader.ok()) << reader.status();
    std::vector<NamedTensor> tensors;
    for (const auto& [name, tensor] : (*reader)->tensors())
      tensors.push_back({name, tensor.dtype, tensor.shape, tensor.data});
    edit(tensors);
    ASSERT_TRUE(WriteSafetensors(path, tensors).ok());  // the old file lives on in its mapping
  }
  void Remove(const std::string& name) {
    Rewrite([&](std::vector<NamedTensor>& tensors) {
      EXPECT_EQ(
          std::erase_if(tensors, [&](const NamedTensor& tensor) { return tensor.name == name; }),
          1u)
          << name;
    });
  }
  void Add(const std::string& name, std::vector<int64_t> shape) {
    Rewrite([&](std::vector<NamedTensor>& tensors) {
      tensors.push_back({name, "F32", shape, zeros_.data()});
    });
  }
  void ExpectFault(StatusCode code, const std::vector<std::string>& parts) {
    const absl::Status status = Load().status();
    EXPECT_EQ(status.code(), code) << status;
    for (const std::string& part : parts)
      EXPECT_NE(status.message().find(part), std::string::npos) << part << ": " << status;
  }

  TempFolder folder_;
  BackendPointer backend_ = CreateRefBackend();
  std::vector<float> zeros_ = std::vector<float>(1 << 16);
};

TEST_F(LoadTest, TransnormerDeclaresBasesAndWindows) {
  WriteRandomModel({.lrpe_layers = {1, 0, 0}}, folder_.path());
  const auto model = Load({.dtype = DType::kBF16, .max_tokens_per_step = 16});
  ASSERT_TRUE(model.ok()) << model.status();
  const auto& components = (*model)->state_components();
  ASSERT_EQ(components.size(), 3u);
  EXPECT_EQ(components[0].name, "layers.0.lightning");
  EXPECT_EQ(components[0].base_bytes, 4 * 32 * 16 * 4);  // LRPE doubles d_k
  EXPECT_EQ(components[0].row_bytes, 4 * (32 + 16) * 2);
  EXPECT_EQ(components[1].base_bytes, 4 * 16 * 16 * 4);
  EXPECT_EQ(components[1].row_bytes, 4 * (16 + 16) * 2);
  EXPECT_EQ(components[1].block, kWindow);
  EXPECT_EQ(components[1].lag, 0);
  EXPECT_EQ(components[1].retain, 0);
  EXPECT_TRUE(components[1].windowed());
  // L (5 d hidden + 3 d glu) + V d, hidden 64, + theta
  EXPECT_EQ((*model)->num_parameters(), 3 * (5 * 40 * 64 + 3 * 40 * 72) + 101 * 40 + 64);
  EXPECT_GE((*model)->weight_bytes(), 2 * ((*model)->num_parameters() - 64));
  EXPECT_EQ((*model)->workspace_bytes(), 16 * (40 * 4 + 4 * 64 * 2 + 64 * 4 + 72 * 2));
}

TEST_F(LoadTest, LlamaDeclaresPagedKeysAndValues) {
  WriteRandomModel({.family = "llama", .num_kv_heads = 2}, folder_.path());
  const auto model = Load();
  ASSERT_TRUE(model.ok()) << model.status();
  const auto& components = (*model)->state_components();
  ASSERT_EQ(components.size(), 3u);
  EXPECT_EQ(components[2].name, "layers.2.kv");
  EXPECT_EQ(components[2].base_bytes, 0);
  EXPECT_EQ(components[2].row_bytes, 2 * 2 * 16 * 4);
  EXPECT_TRUE(components[2].paged());
  EXPECT_EQ((*model)->num_parameters(),
            3 * (2 * 40 * 64 + 2 * 40 * 32 + 3 * 40 * 72 + 2 * 40) + 101 * 40 + 40);
}

// --- Checkpoints that do not fit. ---

TEST_F(LoadTest, MissingTensorsAreNamed) {
  for (const char* name :
       {"model.embed_tokens.weight", "model.layers.1.token_mixer.qkvu_proj.weight",
        "model.layers.0.token_mixer.lrpe.theta", "model.layers.2.channel_mixer.l3.weight"}) {
    WriteRandomModel({}, folder_.path());
    Remove(name);
    ExpectFault(StatusCode::kNotFound, {"model.safetensors", name, "missing, expected shape ["});
  }
  for (const char* name :
       {"model.norm.weight", "model.layers.0.self_attn.k_proj.weight", "lm_head.weight"}) {
    WriteRandomModel({.family = "llama", .tied = false}, folder_.path());
    Remove(name);
    ExpectFault(StatusCode::kNotFound, {"model.safetensors", name, "missing, expected shape ["});
  }
}

TEST_F(LoadTest, MisshapenTensorsAreNamed) {
  WriteRandomModel({.family = "llama", .num_kv_heads = 2}, folder_.path());
  Rewrite([](std::vector<NamedTensor>& tensors) {
    for (NamedTensor& tensor : tensors) {
      if (tensor.name == "model.layers.1.self_attn.v_proj.weight") tensor.shape = {40, 32};
    }
  });
  ExpectFault(StatusCode::kInvalidArgument,
              {"model.safetensors", "model.layers.1.self_attn.v_proj.weight",
               "expected shape [32, 40], found [40, 32]"});
}

TEST_F(LoadTest, OtherTypesAreNamed) {
  WriteRandomModel({}, folder_.path());
  Rewrite([](std::vector<NamedTensor>& tensors) {
    for (NamedTensor& tensor : tensors) {
      if (tensor.name == "model.layers.1.channel_mixer.l1.weight") tensor.dtype = "I16";
    }
  });
  ExpectFault(StatusCode::kInvalidArgument, {"model.layers.1.channel_mixer.l1.weight",
                                             "expected dtype F32, F16 or BF16, found I16"});
}

TEST_F(LoadTest, TensorsOfOtherModelsAreRefusedByName) {
  for (const char* name :
       {"model.layers.0.self_attn.q_proj.bias", "model.layers.3.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_proj.qweight"}) {
    WriteRandomModel({.family = "llama"}, folder_.path());
    Add(name, {4});
    ExpectFault(StatusCode::kUnimplemented,
                {"model.safetensors", name, "belongs to no part of this model"});
  }
  WriteRandomModel({.lrpe_layers = {1, 0, 0}}, folder_.path());
  Add("model.layers.1.token_mixer.lrpe.theta",
      {4, 1, 16});  // the config says that this layer has none
  ExpectFault(StatusCode::kUnimplemented, {"model.layers.1.token_mixer.lrpe.theta"});
}

TEST_F(LoadTest, TablesThatFollowFromTheConfigAreIgnored) {
  WriteRandomModel({.family = "llama"}, folder_.path());
  Add("model.layers.0.self_attn.rotary_emb.inv_freq", {8});
  EXPECT_TRUE(Load().ok()) << Load().status();
}

TEST_F(LoadTest, ATiedLlamaMayStoreTheHeadAgainButNotAnother) {
  WriteRandomModel({.family = "llama"}, folder_.path());
  Rewrite([](std::vector<NamedTensor>& tensors) {
    for (const NamedTensor& tensor : std::vector<NamedTensor>(tensors)) {
      if (tensor.name == "model.embed_tokens.weight")
        tensors.push_back({"lm_head.weight", tensor.dtype, tensor.shape, tensor.data});
    }
  });
  EXPECT_TRUE(Load().ok()) << Load().status();
  Remove("lm_head.weight");
  Add("lm_head.weight", {101, 40});
  ExpectFault(StatusCode::kInvalidArgument, {"lm_head.weight", "tie_word_embeddings", "differs"});
}

TEST_F(LoadTest, ATransnormerUsesTheHeadThatIsStored) {
  WriteRandomModel({.tied = true}, folder_.path());
  const auto tied = Load();
  ASSERT_TRUE(tied.ok()) << tied.status();
  Add("lm_head.weight", {101, 40});
  const auto stored = Load();
  ASSERT_TRUE(stored.ok()) << stored.status();
  EXPECT_EQ((*stored)->num_parameters() - (*tied)->num_parameters(), 101 * 40);

  WriteRandomModel({.tied = false}, folder_.path());
  Remove("lm_head.weight");
  ExpectFault(StatusCode::kNotFound, {"lm_head.weight"});
}

TEST_F(LoadTest, FoldersWithoutAModelAreRefused) {
  ExpectFault(StatusCode::kNotFound, {"config.json"});
  WriteRandomModel({}, folder_.path());
  std::filesystem::remove(folder_.File("model.safetensors"));
  ExpectFault(StatusCode::kNotFound, {"model.safetensors", "neither"});
}

TEST_F(LoadTest, SeveralDevicesAreNotBuiltIn) {
  WriteRandomModel({}, folder_.path());
  EXPECT_EQ(Load({.world = 2}).status().code(), StatusCode::kUnimplemented);
}

// A sharded folder gives the same logits as one file.
TEST_F(LoadTest, ShardsAndOneFileAreTheSameModel) {
  const RandomModel model = {.seed = 21};
  WriteRandomModel(model, folder_.path());
  const std::vector<int32_t> tokens = RandomTokens(21, 40, model.vocab_size);
  const auto whole = MakeEngine(folder_.path(), "cpu", DType::kBF16);
  ASSERT_NE(whole, nullptr);
  const std::vector<float> expected = Score(*whole, tokens, 0);

  const auto reader = SafetensorsReader::OpenFolder(folder_.path());
  ASSERT_TRUE(reader.ok());
  std::vector<NamedTensor> shards[2];
  std::string map;
  for (const auto& [name, tensor] : (*reader)->tensors()) {
    const size_t shard = map.size() % 2;
    shards[shard].push_back({name, tensor.dtype, tensor.shape, tensor.data});
    absl::StrAppend(&map, map.empty() ? "" : ",", "\"", name, "\":\"model-", shard,
                    ".safetensors\"");
  }
  for (int shard : {0, 1}) {
    ASSERT_TRUE(
        WriteSafetensors(folder_.File(absl::StrCat("model-", shard, ".safetensors")), shards[shard])
            .ok());
  }
  folder_.Write("model.safetensors.index.json", absl::StrCat("{\"weight_map\":{", map, "}}"));
  std::filesystem::remove(folder_.File("model.safetensors"));
  const auto sharded = MakeEngine(folder_.path(), "cpu", DType::kBF16);
  ASSERT_NE(sharded, nullptr);
  EXPECT_EQ(Score(*sharded, tokens, 0), expected);
}

// --- Decay. ---

TEST(LightningDecayTest, SlopesOfHeadCountsThatAreNoPowerOfTwo) {
  EXPECT_EQ(AlibiSlopes(8), (std::vector<double>{1 / 2., 1 / 4., 1 / 8., 1 / 16., 1 / 32., 1 / 64.,
                                                 1 / 128., 1 / 256.}));
  const std::vector<double> six = AlibiSlopes(6);
  const std::vector<double> expected = {1 / 4., 1 / 16., 1 / 64., 1 / 256., 1 / 2., 1 / 8.};
  for (size_t head = 0; head < 6; ++head) EXPECT_DOUBLE_EQ(six[head], expected[head]);
  const std::vector<double> forty = AlibiSlopes(40);  // TransNormerLLM 15B
  const std::vector<double> tail = {.9170, .7711, .6484, .5453, .4585, .3856, .3242, .2726};
  for (size_t head = 0; head < 8; ++head) EXPECT_NEAR(forty[32 + head], tail[head], 5e-5);
  EXPECT_EQ(AlibiSlopes(1), (std::vector<double>{1 / 256.}));
}

TEST(LightningDecayTest, TheLastLayerHardlyForgets) {
  const std::vector<double> first = DecayRates(DecayRule::kAlibiLayer, 4, 0, 30);
  const std::vector<double> last = DecayRates(DecayRule::kAlibiLayer, 4, 29, 30);
  EXPECT_DOUBLE_EQ(first[0], 0.25 * (1 + 1e-5));
  EXPECT_NEAR(last[0], 0.25 * 1e-5, 1e-18);
  const DecayTables tables = MakeDecayTables(last);
  ASSERT_EQ(tables.decay.size(), 4u * (kPrefillBlock + 1));
  ASSERT_EQ(tables.fold_epsilon.size(), 4u * 2);
  EXPECT_EQ(tables.decay[0], 1);
  // 1 - exp(-s 16) keeps all its digits, which 1 - float(exp(-s 16)) would not.
  for (int fold : {0, 1}) {
    const double x = 0.25e-5 * (fold == 0 ? kWindow : kPrefillBlock);
    EXPECT_FLOAT_EQ(tables.fold_epsilon[static_cast<size_t>(fold)],
                    static_cast<float>(x - x * x / 2 + x * x * x / 6));
  }
}

TEST(ModelRegistryTest, ListsEachFamilyOnce) {
  EXPECT_EQ(ModelFamilyNames(), "'llama', 'transnormer'");
  for (const ModelFamily& family : ModelFamilies())
    EXPECT_EQ(FindModelFamily(family.name), &family);
  EXPECT_EQ(FindModelFamily("mistral"), nullptr);
}

}  // namespace
}  // namespace godwit
