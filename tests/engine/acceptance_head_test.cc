// Heads of each kind as files, against the formula in double; and what is refused.

#include "engine/acceptance_head.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/bf16.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/engine/head_files.h"
#include "tests/engine/temp_folder.h"
#include "tests/kernels/device_arena.h"

namespace godwit {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int64_t kHidden = 24, kWidth = 7;
constexpr float kEpsilon = 1e-5f;

HeadFiles Mlp() {
  HeadFiles files;
  files.json =
      R"({"kind": "mlp", "label": "pre", "hidden_size": 24, "width": 7,
          "temperature": {"greedy": [2], "sampled": [0.5, 4]}, "recorded": {"date": "today"}})";
  files.AddRandom("hidden.weight", {kWidth, kHidden}, 1);
  files.AddRandom("hidden.features", {kNumHeadFeatures, kWidth}, 2);
  files.AddRandom("hidden.bias", {kWidth}, 3);
  files.AddRandom("readout.weight", {1, kWidth}, 4);
  files.AddRandom("readout.bias", {1}, 5);
  return files;
}

HeadFiles Linear() {
  HeadFiles files;
  files.json = R"({"kind": "linear", "label": "pre", "hidden_size": 24})";
  files.AddRandom("readout.weight", {1, kHidden}, 1);
  files.AddRandom("readout.features", {1, kNumHeadFeatures}, 2);
  files.AddRandom("readout.bias", {1}, 3);
  return files;
}

// As torch saves the released module: each of the three names holds the one layer.
HeadFiles Released() {
  HeadFiles files;
  files.json = R"({"kind": "specdecpp", "label": "post", "hidden_size": 24, "num_layers": 3,
                   "reject_weight": 6})";
  for (int layer = 0; layer < 3; ++layer) {
    const std::string prefix = "model." + std::to_string(layer) + ".linear.";
    files.AddRandom(prefix + "weight", {kHidden, kHidden}, 1);
    files.AddRandom(prefix + "bias", {kHidden}, 2);
  }
  files.AddRandom("model.3.weight", {2, kHidden}, 3);
  files.AddRandom("model.3.bias", {2}, 4);
  return files;
}

class AcceptanceHeadTest : public testing::Test {
 protected:
  AcceptanceHeadTest() {
    std::string reason;
    backend_ = MakeCpuBackend("portable", 1, &reason);
    config_.d_model = kHidden;
  }

  absl::StatusOr<std::unique_ptr<AcceptanceHead>> Load() {
    return AcceptanceHead::Load(folder_.path(), config_, DType::kF32, *backend_);
  }
  std::unique_ptr<AcceptanceHead> Loaded(const HeadFiles& files) {
    EXPECT_TRUE(files.Write(folder_.path()).ok());
    auto head = Load();
    EXPECT_TRUE(head.ok()) << head.status();
    return head.ok() ? *std::move(head) : nullptr;
  }
  void ExpectRefusal(const HeadFiles& files, const std::string& file, const std::string& reason) {
    ASSERT_TRUE(files.Write(folder_.path()).ok());
    const auto head = Load();
    ASSERT_FALSE(head.ok()) << reason;
    EXPECT_THAT(head.status().message(), AllOf(HasSubstr(file), HasSubstr(reason)));
  }

  // Logits of draws at rows 2, 0 of three hidden rows, with a row of padding between.
  std::vector<float> Run(AcceptanceHead& head, int place) {
    DeviceArena arena(*backend_);
    EXPECT_TRUE(head.MakeWorkspace(3).ok());
    const std::vector<SampleRow> rows = {
        {.logit_row = 2, .temperature = 0}, {.slot = -1}, {.logit_row = 0, .temperature = 0.8f}};
    const TensorView logits = arena.Output(DType::kF32, {3});
    const TensorView margins = arena.Output(DType::kF32, {3});
    const absl::Status status =
        head.Run({.hidden = arena.Floats(DType::kF32, {3, kHidden}, hidden_),
                  .rows = arena.UploadArray(rows),
                  .num_rows = 3,
                  .place = place,
                  .margins = arena.Floats(DType::kF32, {3}, {0.5f, 0, 3}),
                  .certainties = arena.Floats(DType::kF32, {3, 2}, {0.4f, 2.5f, 1, 0, 0.8f, 0.6f}),
                  .logits = logits,
                  .shown_margins = margins},
                 {.kind = NormKind::kRms, .epsilon = kEpsilon});
    EXPECT_TRUE(status.ok()) << status;
    const std::vector<float> values = arena.Download(logits);
    EXPECT_EQ(arena.Download(margins)[0], 0.5f);
    EXPECT_EQ(arena.Download(margins)[2], 3);
    return {values[0], values[2]};
  }

  std::vector<double> Normed(int64_t row) const {
    const float* const x = hidden_.data() + row * kHidden;
    double squares = 0;
    for (int64_t i = 0; i < kHidden; ++i) squares += static_cast<double>(x[i] * x[i]);
    const double scale = 1 / std::sqrt(squares / kHidden + static_cast<double>(kEpsilon));
    std::vector<double> normed;
    for (int64_t i = 0; i < kHidden; ++i) normed.push_back(static_cast<double>(x[i]) * scale);
    return normed;
  }
  static std::vector<double> Features(int draw, int place) {
    return draw == 0 ? std::vector<double>{std::log1p(0.5), 0.4, 2.5, 0, double(place)}
                     : std::vector<double>{std::log1p(3.0), 0.8, 0.6, 0.8, double(place)};
  }

  TempFolder folder_;
  BackendPtr backend_;
  ModelConfig config_;
  std::vector<float> hidden_ = RandomValues(7, 3 * kHidden);
};

double Silu(double x) { return x / (1 + std::exp(-x)); }

// w[row] . x, w of rows as long as x.
double Dot(const std::vector<float>& w, size_t row, const std::vector<double>& x) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += static_cast<double>(w[row * x.size() + i]) * x[i];
  return sum;
}

TEST_F(AcceptanceHeadTest, AFolderWithoutFilesHasNone) {
  const auto head = Load();
  ASSERT_TRUE(head.ok());
  EXPECT_EQ(*head, nullptr);
}

TEST_F(AcceptanceHeadTest, LinearIsTheFormula) {
  const HeadFiles files = Linear();
  const auto head = Loaded(files);
  ASSERT_NE(head, nullptr);
  EXPECT_EQ(head->num_parameters(), kHidden + kNumHeadFeatures);
  const std::vector<float> logits = Run(*head, 4);
  for (const int draw : {0, 1}) {
    const double expected = Dot(files.Of("readout.weight"), 0, Normed(draw == 0 ? 2 : 0)) +
                            Dot(files.Of("readout.features"), 0, Features(draw, 4)) +
                            static_cast<double>(files.Of("readout.bias")[0]);
    EXPECT_NEAR(static_cast<double>(logits[static_cast<size_t>(draw)]), expected, 1e-5) << draw;
  }
}

TEST_F(AcceptanceHeadTest, MlpIsTheFormula) {
  const HeadFiles files = Mlp();
  const auto head = Loaded(files);
  ASSERT_NE(head, nullptr);
  EXPECT_EQ(head->label(), HeadLabel::kPre);
  const std::vector<float> logits = Run(*head, 2);
  for (const int draw : {0, 1}) {
    const std::vector<double> x = Normed(draw == 0 ? 2 : 0), features = Features(draw, 2);
    double expected = static_cast<double>(files.Of("readout.bias")[0]);
    for (size_t unit = 0; unit < kWidth; ++unit) {
      double inner = Dot(files.Of("hidden.weight"), unit, x) +
                     static_cast<double>(files.Of("hidden.bias")[unit]);
      for (size_t f = 0; f < kNumHeadFeatures; ++f) {
        inner += features[f] * static_cast<double>(files.Of("hidden.features")[f * kWidth + unit]);
      }
      expected += Silu(inner) * static_cast<double>(files.Of("readout.weight")[unit]);
    }
    EXPECT_NEAR(static_cast<double>(logits[static_cast<size_t>(draw)]), expected, 1e-5) << draw;
  }
}

TEST_F(AcceptanceHeadTest, ReleasedCheckpointIsOneLayerThreeTimes) {
  HeadFiles files = Released();
  const auto all_names = Loaded(files);
  ASSERT_NE(all_names, nullptr);
  EXPECT_EQ(all_names->label(), HeadLabel::kPost);
  EXPECT_EQ(all_names->num_parameters(), kHidden * kHidden + kHidden + 2 * kHidden + 2);
  const std::vector<float> logits = Run(*all_names, 0);
  for (const int draw : {0, 1}) {
    std::vector<double> x = Normed(draw == 0 ? 2 : 0);
    for (int layer = 0; layer < 3; ++layer) {
      std::vector<double> y = x;
      for (size_t i = 0; i < x.size(); ++i) {
        y[i] += Silu(Dot(files.Of("model.0.linear.weight"), i, x) +
                     static_cast<double>(files.Of("model.0.linear.bias")[i]));
      }
      x = y;
    }
    const std::vector<float>&w = files.Of("model.3.weight"), &b = files.Of("model.3.bias");
    const double expected = Dot(w, 1, x) - Dot(w, 0, x) + static_cast<double>(b[1] - b[0]);
    EXPECT_NEAR(static_cast<double>(logits[static_cast<size_t>(draw)]), expected, 1e-4) << draw;
  }
  // As safetensors stores a module whose layers share their memory: one name each.
  for (const char* name : {"model.1.linear.weight", "model.1.linear.bias", "model.2.linear.weight",
                           "model.2.linear.bias"}) {
    files.Erase(name);
  }
  const auto one_name = Loaded(files);
  ASSERT_NE(one_name, nullptr);
  EXPECT_EQ(Run(*one_name, 0), logits);
}

TEST_F(AcceptanceHeadTest, LayersThatAreNotTiedAreReadEach) {
  HeadFiles files = Released();
  files.values[2][5] += 1;  // model.1.linear.weight
  const auto head = Loaded(files);
  ASSERT_NE(head, nullptr);
  EXPECT_EQ(head->num_parameters(), 2 * (kHidden * kHidden + kHidden) + 2 * kHidden + 2);
}

TEST_F(AcceptanceHeadTest, RejectWeightAndTemperaturesAreUndone) {
  const auto released = Loaded(Released());
  ASSERT_NE(released, nullptr);
  // A head that was fitted perfectly to p = 0.82 says p / (p + 6 (1 - p)).
  const double p = 0.82, said = p / (p + 6 * (1 - p));
  const auto logit = static_cast<float>(std::log(said / (1 - said)));
  EXPECT_NEAR(1 / (1 + std::exp(-released->Calibrated(logit, false, 3))), p, 1e-6);
  const auto mlp = Loaded(Mlp());
  ASSERT_NE(mlp, nullptr);
  EXPECT_DOUBLE_EQ(mlp->Calibrated(2, true, 0), 1);
  EXPECT_DOUBLE_EQ(mlp->Calibrated(2, true, 14), 1);
  EXPECT_DOUBLE_EQ(mlp->Calibrated(2, false, 0), 4);
  EXPECT_DOUBLE_EQ(mlp->Calibrated(2, false, 1), 0.5);
  EXPECT_DOUBLE_EQ(mlp->Calibrated(2, false, 9), 0.5);
}

TEST_F(AcceptanceHeadTest, OneFileWithoutTheOtherIsRefused) {
  folder_.Write("acceptance_head.json", Mlp().json);
  EXPECT_THAT(Load().status().message(), HasSubstr("acceptance_head.safetensors: is missing"));
  std::filesystem::remove(folder_.File("acceptance_head.json"));
  ASSERT_TRUE(WriteSafetensors(folder_.File("acceptance_head.safetensors"), Mlp().tensors).ok());
  EXPECT_THAT(Load().status().message(), HasSubstr("acceptance_head.json: is missing"));
}

TEST_F(AcceptanceHeadTest, ConfigsThatDoNotFitAreRefused) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"kind": "mlp", "label": "pre", "hidden_size": 4096, "width": 7})",
       "hidden_size is 4096, expected 24, that of the draft model"},
      {R"({"kind": "tree", "label": "pre", "hidden_size": 24})",
       R"(kind is "tree", expected "specdecpp" or "mlp" or "linear")"},
      {R"({"kind": "mlp", "label": "after", "hidden_size": 24, "width": 7})",
       R"(label is "after", expected "pre" or "post")"},
      {R"({"kind": "mlp", "label": "post", "hidden_size": 24, "width": 7})",
       R"(label is "post", expected "pre")"},
      {R"({"kind": "mlp", "label": "pre", "hidden_size": 24})", "width"},
      {R"({"kind": "specdecpp", "label": "post", "hidden_size": 24})", "num_layers"},
      {R"({"kind": "mlp", "label": "pre", "hidden_size": 24, "width": 7, "reject_weight": 0})",
       "reject_weight"},
      {R"({"kind": "mlp", "label": "pre", "hidden_size": 24, "width": 7, "temperature":
           {"greedy": [1, 0]}})",
       "greedy"},
      {R"({"kind": "mlp", "label": "pre", "hidden_size": 24, "width": 7, "dropout": 0.1})",
       "dropout"},
      {"[]", "object"},
  };
  for (const auto& [json, reason] : cases) {
    HeadFiles files = Mlp();
    files.json = json;
    ExpectRefusal(files, "acceptance_head.json", reason);
  }
}

TEST_F(AcceptanceHeadTest, TensorsThatDoNotFitAreRefused) {
  HeadFiles narrow = Mlp();
  narrow.Erase("hidden.weight");
  narrow.AddRandom("hidden.weight", {kWidth, 16}, 1);
  ExpectRefusal(narrow, "acceptance_head.safetensors",
                "tensor 'hidden.weight': expected shape [7, 24], found [7, 16]");
  HeadFiles missing = Mlp();
  missing.Erase("readout.bias");
  ExpectRefusal(missing, "acceptance_head.safetensors", "readout.bias");
  HeadFiles more = Linear();
  more.AddRandom("readout.scale", {1}, 9);
  ExpectRefusal(more, "acceptance_head.safetensors", "readout.scale");
  HeadFiles other_kind = Released();
  other_kind.json = Linear().json;
  ExpectRefusal(other_kind, "acceptance_head.safetensors", "readout.features");
  HeadFiles fewer_layers = Released();
  fewer_layers.json =
      R"({"kind": "specdecpp", "label": "post", "hidden_size": 24, "num_layers": 2})";
  ExpectRefusal(fewer_layers, "acceptance_head.safetensors", "model.2.weight");
}

// Drafts of held-out rounds (train/acceptance_head.py sample): the shipped head says of them what
// the script that trained it does, and tells those that are accepted from the others.
TEST(ShippedHeadTest, SaysWhatTheTrainingScriptDoes) {
  const char* source = std::getenv("GODWIT_SOURCE_DIR");
  const std::string root = source == nullptr ? "." : source;
  const auto sample =
      SafetensorsReader::OpenFile(root + "/tests/engine/shipped_head_sample.safetensors");
  ASSERT_TRUE(sample.ok()) << sample.status();
  std::vector<float> of[4];
  const char* const names[] = {"hidden", "features", "label", "logits"};
  for (size_t i = 0; i < 4; ++i) {
    const StoredTensor& tensor = *(*sample)->Find(names[i]);
    of[i].resize(static_cast<size_t>(tensor.num_bytes) / sizeof(float));
    ToF32(tensor, 0, std::ssize(of[i]), of[i].data());
  }
  const auto &hidden = of[0], &features = of[1], &label = of[2], &expected = of[3];
  const auto count = static_cast<int64_t>(label.size());
  ModelConfig config;
  config.d_model = std::ssize(hidden) / count;
  std::string reason;
  const BackendPtr backend = MakeCpuBackend("portable", 1, &reason);
  const auto head =
      AcceptanceHead::Load(root + "/models/godwit-tale-draft", config, DType::kBF16, *backend);
  ASSERT_TRUE(head.ok()) << head.status();
  ASSERT_NE(*head, nullptr);
  ASSERT_TRUE((*head)->MakeWorkspace(1).ok());
  std::vector<float> logits;
  for (int64_t draft = 0; draft < count; ++draft) {
    DeviceArena arena(*backend);
    const float* const f = features.data() + draft * kNumHeadFeatures;
    const std::vector<SampleRow> rows = {{.temperature = f[3]}};
    const TensorView logit = arena.Output(DType::kF32, {1});
    const auto first = hidden.begin() + draft * config.d_model;
    ASSERT_TRUE((*head)
                    ->Run({.hidden = arena.Floats(DType::kF32, {1, config.d_model},
                                                  {first, first + config.d_model}),
                           .rows = arena.UploadArray(rows),
                           .num_rows = 1,
                           .place = static_cast<int>(f[4]),
                           .margins = arena.Floats(DType::kF32, {1}, {std::expm1(f[0])}),
                           .certainties = arena.Floats(DType::kF32, {1, 2}, {f[1], f[2]}),
                           .logits = logit},
                          {})
                    .ok());
    logits.push_back(arena.Download(logit)[0]);
    EXPECT_NEAR(logits.back(), expected[static_cast<size_t>(draft)], 1e-4f) << draft;
  }
  // Of soft labels: how often an accepted draft has the larger logit, of two.
  double above = 0, all = 0;
  for (size_t a = 0; a < logits.size(); ++a) {
    for (size_t b = 0; b < logits.size(); ++b) {
      const double weight = static_cast<double>(label[a] * (1 - label[b]));
      all += weight;
      above += weight * (logits[a] > logits[b] ? 1 : logits[a] == logits[b] ? 0.5 : 0);
    }
  }
  EXPECT_GT(above / all, 0.6);
}

}  // namespace
}  // namespace godwit
