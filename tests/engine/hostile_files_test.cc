// Files of a model folder that are damaged at random, the same way every time: each is refused with
// a status or is read, no field makes a reader ask for memory that the file does not justify, and
// none keeps it for long. Run with the address sanitizer too.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/acceptance_head.h"
#include "engine/model_config.h"
#include "engine/rope_table.h"
#include "engine/safetensors.h"
#include "gtest/gtest.h"
#include "tests/engine/engine_driver.h"
#include "tests/engine/head_files.h"
#include "tests/engine/mutations.h"
#include "tests/engine/temp_folder.h"

namespace {

// The largest piece of memory that anyone asked for.
std::atomic<size_t> largest_allocation{0};

void* Allocate(size_t num_bytes, size_t alignment) {
  for (size_t before = largest_allocation; before < num_bytes;) {
    if (largest_allocation.compare_exchange_weak(before, num_bytes)) break;
  }
  const size_t rounded = (std::max<size_t>(num_bytes, 1) + alignment - 1) / alignment * alignment;
  return std::aligned_alloc(alignment, rounded);
}
void* Must(void* data) {
  if (data == nullptr) throw std::bad_alloc();
  return data;
}
constexpr size_t kAlignment = __STDCPP_DEFAULT_NEW_ALIGNMENT__;

}  // namespace

void* operator new(size_t num_bytes) { return Must(Allocate(num_bytes, kAlignment)); }
void* operator new(size_t num_bytes, const std::nothrow_t&) noexcept {
  return Allocate(num_bytes, kAlignment);
}
void* operator new(size_t num_bytes, std::align_val_t alignment) {
  return Must(Allocate(num_bytes, static_cast<size_t>(alignment)));
}
// Not inlined: the compiler would take the free for one of another new.
[[gnu::noinline]] void operator delete(void* data) noexcept { std::free(data); }
[[gnu::noinline]] void operator delete(void* data, size_t) noexcept { std::free(data); }
[[gnu::noinline]] void operator delete(void* data, const std::nothrow_t&) noexcept {
  std::free(data);
}
[[gnu::noinline]] void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }
[[gnu::noinline]] void operator delete(void* data, size_t, std::align_val_t) noexcept {
  std::free(data);
}

namespace godwit {
namespace {

// An instrumented reader of a text of 1 MiB takes a tenth of that.
constexpr std::chrono::seconds kMaxTime{10};

// `read` of `num_variants` texts made of `original`; true: it was accepted. Some are, most are not.
struct Outcome {
  int num_accepted = 0, num_refused = 0;
};
Outcome Damage(const std::string& original, uint32_t seed, int num_variants, size_t max_bytes,
               const std::function<absl::Status(const std::string&)>& read) {
  EXPECT_TRUE(read(original).ok()) << read(original);
  JsonMutator mutator(seed);
  Outcome outcome;
  for (int variant = 0; variant < num_variants; ++variant) {
    const std::string text = mutator.Mutated(original);
    largest_allocation = 0;
    const auto begin = std::chrono::steady_clock::now();
    const absl::Status status = read(text);
    const auto took = std::chrono::steady_clock::now() - begin;
    // Up to 64 bytes a byte of text: the nodes of a list of numbers, while its memory doubles.
    const size_t limit = max_bytes + 64 * text.size();
    const std::string shown = text.substr(0, 2000);
    EXPECT_LE(largest_allocation, limit)
        << "seed " << seed << ", variant " << variant << ": " << shown;
    EXPECT_LT(took, kMaxTime) << "seed " << seed << ", variant " << variant << ": " << shown;
    EXPECT_EQ(status.ok(), status.message().empty()) << shown;
    // What is said of a hostile text floods neither a log nor an RPC's trailers.
    EXPECT_LT(status.message().size(), 1500u) << shown;
    ++(status.ok() ? outcome.num_accepted : outcome.num_refused);
  }
  EXPECT_GT(outcome.num_refused, num_variants / 4);
  return outcome;
}

constexpr char kLlama[] = R"({"architectures": ["LlamaForCausalLM"], "attention_bias": false,
    "bos_token_id": 1, "eos_token_id": [2, 3], "head_dim": 16, "hidden_act": "silu",
    "hidden_size": 96, "intermediate_size": 256, "max_position_embeddings": 4096,
    "mlp_bias": false, "model_type": "llama", "num_attention_heads": 6, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "pad_token_id": null, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": true, "use_cache": true, "vocab_size": 512, "layer_types":
    ["full_attention", "full_attention", "full_attention"], )";
constexpr const char* kRopes[] = {
    R"("rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 8.0})",
    R"("rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"})",
    R"("rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "partial_rotary_factor": 0.5)",
    R"("rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4,
       "original_max_position_embeddings": 1024, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7,
       "mscale_all_dim": 1, "truncate": false}})",
    R"("rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
       "high_freq_factor": 4, "original_max_position_embeddings": 512})",
    R"("original_max_position_embeddings": 64, "rope_scaling": {"type": "longrope",
       "short_factor": [1, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6], "long_factor": [1, 2, 3, 4, 5, 6, 7, 8],
       "short_mscale": 1, "long_mscale": 1.2})"};
constexpr char kTransnormer[] = R"({"architectures": ["TransnormerForCausalLM"],
    "model_type": "transnormer", "vocab_size": 257, "decoder_embed_dim": 96, "decoder_layers": 4,
    "decoder_attention_heads": 6, "hidden_dim": 96, "glu_dim": 160,
    "linear_use_lrpe_list": [1, 0, 0, 0], "linear_act_fun": "swish", "norm_type": "simplermsnorm",
    "no_scale_embedding": false, "add_bos_token": false, "bias": false, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"})";

// A config that was accepted holds numbers that the rest of the engine can compute with.
absl::Status ReadConfig(const absl::StatusOr<ModelConfig>& config) {
  if (!config.ok()) return config.status();
  EXPECT_GE(config->vocab_size, 1);
  EXPECT_GE(config->d_model, 1);
  EXPECT_GE(config->head_dim, 1);
  EXPECT_EQ(std::ssize(config->lrpe_layers), config->num_layers);
  EXPECT_TRUE(std::isfinite(config->norm_epsilon) && std::isfinite(config->q_scale));
  for (const int32_t id : config->eos_token_ids) EXPECT_LT(id, config->vocab_size);
  if (!config->rope) return absl::OkStatus();
  for (const int64_t length : {int64_t{0}, int64_t{1}, int64_t{5000}, int64_t{1} << 40}) {
    const auto table = MakeRopeTable(*config->rope, length);
    EXPECT_TRUE(table.ok()) << table.status();
    for (const double frequency : table->inv_freq) EXPECT_TRUE(std::isfinite(frequency));
    EXPECT_TRUE(std::isfinite(table->attention_factor) && table->attention_factor > 0);
  }
  return absl::OkStatus();
}

TEST(HostileFilesTest, ConfigJson) {
  int num_accepted = 0;
  std::vector<std::string> configs = {kTransnormer};
  for (const char* rope : kRopes) configs.push_back(absl::StrCat(kLlama, rope, "}"));
  for (uint32_t index = 0; index < configs.size(); ++index) {
    num_accepted += Damage(configs[index], 100 + index, 4000, 1 << 20, [](const std::string& text) {
                      return ReadConfig(ParseModelConfig(text, ""));
                    }).num_accepted;
  }
  EXPECT_GT(num_accepted, 500);
}

// --rope and a request's own, over a model that is well.
TEST(HostileFilesTest, RopeOverride) {
  const auto model = ParseModelConfig(absl::StrCat(kLlama, kRopes[1], "}"), "");
  ASSERT_TRUE(model.ok()) << model.status();
  const std::string ropes[] = {
      R"({"type": "giraffe", "factor": 4, "power": 0.5, "truncate_low": 0.01, "truncate_high": 0.1,
          "truncate_value": 0.02})",
      R"({"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024})",
      R"({"type": "ntk-by-parts", "factor": 4, "alpha": 1, "beta": 32,
          "original_max_position_embeddings": 1024})"};
  for (uint32_t index = 0; index < std::size(ropes); ++index) {
    Damage(ropes[index], 200 + index, 3000, 1 << 20, [&](const std::string& text) {
      ModelConfig config = *model;
      absl::StatusOr<RopeConfig> rope = OverrideRope(*model, text, "rope");
      if (!rope.ok()) return rope.status();
      config.rope = *std::move(rope);
      return ReadConfig(config);
    });
  }
}

TEST(HostileFilesTest, NeighboursOfConfigJson) {
  const TempFolder folder;
  folder.Write("config.json", absl::StrCat(kLlama, kRopes[0], "}"));
  const std::pair<const char*, const char*> files[] = {
      {"generation_config.json", R"({"eos_token_id": [2, 5], "temperature": 0.6, "top_p": 0.9})"},
      {"tokenizer_config.json", R"({"add_bos_token": true, "model_max_length": 1e30})"}};
  for (const auto& [name, text] : files) {
    const std::string original = text;
    JsonMutator mutator(300);
    for (int variant = 0; variant < 1500; ++variant) {
      const std::string damaged = mutator.Mutated(original);
      folder.Write(name, damaged);
      largest_allocation = 0;
      (void)ReadConfig(ReadModelConfig(folder.path(), ""));
      EXPECT_LE(largest_allocation, (1 << 20) + 64 * damaged.size()) << damaged.substr(0, 2000);
    }
    folder.Write(name, original);
  }
}

std::string FileBytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Every byte that a reader says is there, so that a sanitizer sees what is not.
int64_t Touch(const SafetensorsReader& reader) {
  int64_t sum = 0;
  for (const auto& [name, tensor] : reader.tensors()) {
    const auto* const bytes = static_cast<const unsigned char*>(tensor.data);
    for (int64_t at = 0; at < tensor.num_bytes; ++at) sum += bytes[at];
    std::vector<float> storage;
    (void)reader.Matrix(name, tensor.shape, storage);
    (void)reader.Matrix(name, {1 << 30, 1 << 30}, storage);
  }
  return sum;
}

// The header as JSON; its length true, or not.
TEST(HostileFilesTest, SafetensorsHeader) {
  const TempFolder folder;
  const std::vector<float> values(64, 1.0f);
  const std::string path = folder.File("m.safetensors");
  ASSERT_TRUE(WriteSafetensors(path, {{"model.layers.0.weight", "F32", {4, 8}, values.data()},
                                      {"b", "BF16", {2, 3, 4}, values.data()},
                                      {"none", "F32", {0, 7}, nullptr},
                                      {"tokens", "I32", {5}, values.data()}})
                  .ok());
  const std::string original = FileBytes(path);
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, original.data(), 8);
  const std::string data = original.substr(8 + header_bytes);
  JsonMutator lengths(400);
  const auto read = [&](const std::string& header) {
    uint64_t length = header.size();
    if (lengths.Below(16) == 0) length += lengths.Below(3) - 1;
    if (lengths.Below(64) == 0) length = uint64_t{1} << lengths.Below(64);
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    bytes += header + data;
    if (lengths.Below(16) == 0) bytes.resize(lengths.Below(bytes.size()));
    folder.Write("m.safetensors", bytes);
    const auto reader = SafetensorsReader::OpenFile(path);
    if (!reader.ok()) return reader.status();
    EXPECT_GE(Touch(**reader), 0);
    return absl::OkStatus();
  };
  Outcome outcome;
  JsonMutator mutator(401);
  for (int variant = 0; variant < 8000; ++variant) {
    const std::string header = mutator.Mutated(original.substr(8, header_bytes));
    largest_allocation = 0;
    const auto begin = std::chrono::steady_clock::now();
    const absl::Status status = read(header);
    EXPECT_LT(std::chrono::steady_clock::now() - begin, kMaxTime) << "variant " << variant;
    EXPECT_LE(largest_allocation, (1 << 20) + 64 * header.size()) << header.substr(0, 2000);
    EXPECT_LT(status.message().size(), 1500u);
    ++(status.ok() ? outcome.num_accepted : outcome.num_refused);
  }
  EXPECT_GT(outcome.num_accepted, 20);
  EXPECT_GT(outcome.num_refused, 4000);
}

TEST(HostileFilesTest, SafetensorsIndex) {
  const TempFolder folder;
  const float value = 1;
  for (const char* name : {"a", "b"}) {
    ASSERT_TRUE(WriteSafetensors(folder.File(absl::StrCat(name, ".safetensors")),
                                 {{name, "F32", {1}, &value}})
                    .ok());
  }
  Damage(R"({"metadata": {"total_size": 8}, "weight_map": {"a": "a.safetensors",
             "b": "b.safetensors"}})",
         500, 3000, 1 << 20, [&](const std::string& text) -> absl::Status {
           folder.Write("model.safetensors.index.json", text);
           const auto reader = SafetensorsReader::OpenFolder(folder.path());
           if (!reader.ok()) return reader.status();
           EXPECT_EQ(Touch(**reader) % (0x80 + 0x3f), 0) << "of one shard or both";
           return absl::OkStatus();
         });
}

TEST(HostileFilesTest, AcceptanceHead) {
  const auto backend = *OpenDevice("cpu");
  ModelConfig draft;
  draft.d_model = 16;
  for (const HeadKind kind : {HeadKind::kSpecDecPP, HeadKind::kMlp}) {
    const TempFolder folder;
    const HeadLabel label = kind == HeadKind::kMlp ? HeadLabel::kPre : HeadLabel::kPost;
    HeadFiles files = RandomHead(kind, label, 16);
    files.json.pop_back();
    files.json += R"(, "temperature": {"greedy": [1.0, 0.9], "sampled": [1.1]},
                      "recorded": {"loss": [1, 2, 3], "by": "hand"}})";
    ASSERT_TRUE(files.Write(folder.path()).ok());
    Damage(files.json, 600, 2000, 4 << 20, [&](const std::string& text) {
      folder.Write("acceptance_head.json", text);
      return AcceptanceHead::Load(folder.path(), draft, DType::kF32, *backend).status();
    });
  }
}

// A whole model whose config.json no longer fits its weights, or asks for more than there is.
TEST(HostileFilesTest, EngineOfADamagedConfig) {
  for (const TinyFamily family : {TinyFamily::kTransnormer, TinyFamily::kLlama}) {
    const TinyModel model({.family = family, .num_layers = 2});
    const std::string path = model.folder() + "/config.json";
    const std::string original = FileBytes(path);
    Damage(original, 700, 300, 64 << 20, [&](const std::string& text) {
      std::ofstream(path, std::ios::binary) << text;
      return Engine::Create({.model_folder = model.folder(),
                             .dtype = DType::kF32,
                             .max_sequences = 2,
                             .max_tokens_per_step = 128,
                             .kv_bytes = 1 << 20},
                            *OpenDevice("cpu"))
          .status();
    });
  }
}

}  // namespace
}  // namespace godwit
