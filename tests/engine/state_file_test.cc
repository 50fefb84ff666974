// Snapshot files: what is read is what was written, whatever is broken is refused, and whoever is
// killed while writing leaves the old file or the new one.

#include "engine/state_file.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/ops.h"
#include "kernels/ref/ref_backend.h"
#include "tests/engine/engine_driver.h"
#include "tests/engine/temp_folder.h"

namespace godwit {
namespace {

using testing::HasSubstr;

constexpr int64_t kVocab = 100;

StateLayout Layout(int steps_in_flight = 1, bool draft = true) {
  StateLayout layout = {.components = {{.name = "layers.0.lightning",
                                        .base_bytes = 256,
                                        .row_bytes = 24,
                                        .block = 16},
                                       {.name = "layers.1.kv",
                                        .row_bytes = 40,
                                        .retain = kRetainAll,
                                        .head_bytes = 10,
                                        .element_bytes = 2},
                                       {.name = "penalties", .base_bytes = kVocab * 4}},
                        .window_rows = WindowRows(steps_in_flight, kMaxDraftTokens),
                        .vocab_size = kVocab,
                        .dtype = "bf16",
                        .model = std::string(64, 'a'),
                        .draft = draft ? std::string(64, 'b') : "",
                        .max_position = 1000};
  if (draft) {
    layout.components.push_back(
        {.name = "draft.layers.0.lightning", .base_bytes = 128, .row_bytes = 12, .block = 16});
  }
  return layout;
}

int64_t StateBytes(const StateLayout& layout, int64_t position) {
  int64_t bytes = 0;
  for (const StateComponent& component : layout.components) {
    bytes += component.base_bytes;
    if (component.windowed()) bytes += std::min(position, layout.window_rows) * component.row_bytes;
    if (component.paged()) bytes += (position + 15) / 16 * 16 * component.row_bytes;
  }
  return bytes;
}

StateImage Image(const StateLayout& layout, int64_t position, uint64_t seed = 1) {
  StateImage image = {.position = position, .base = position / 16 * 16, .last_token = 7};
  image.num_bytes = StateBytes(layout, position);
  const std::shared_ptr<char[]> bytes(new char[static_cast<size_t>(image.num_bytes)]);
  std::mt19937_64 random(seed);
  // Small exponents, so that no value is a NaN.
  for (int64_t at = 0; at < image.num_bytes; ++at) bytes[at] = static_cast<char>(random() % 64);
  image.bytes = bytes;
  if (!layout.draft.empty()) {
    image.draft =
        DraftImage{.position = position - 1, .base = (position - 1) / 16 * 16, .unread = {5, 7}};
  }
  return image;
}

const StateNotes kNotes = {
    .rope_digest = "12ab", .rope = R"({"type":"linear","factor":4})", .rope_length = 40};

std::string Bytes(const StateImage& image) {
  return {image.bytes.get(), static_cast<size_t>(image.num_bytes)};
}

std::string FileBytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

TEST(StateFileTest, ReadsWhatWasWritten) {
  const TempFolder folder;
  for (const int64_t position : {1, 15, 16, 17, 46, 47, 48, 300}) {
    const StateLayout layout = Layout();
    const StateImage image = Image(layout, position);
    const std::string path = folder.File("a");
    ASSERT_TRUE(WriteStateFile(path, layout, image, kNotes).ok());
    const auto read = ReadStateFile(path, layout, {.check_values = true});
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(read->image->position, position);
    EXPECT_EQ(read->image->base, image.base);
    EXPECT_EQ(read->image->last_token, 7);
    EXPECT_EQ(Bytes(*read->image), Bytes(image));
    ASSERT_TRUE(read->image->draft.has_value());
    EXPECT_EQ(read->image->draft->position, position - 1);
    EXPECT_EQ(read->image->draft->unread, (std::vector<int32_t>{5, 7}));
    EXPECT_EQ(read->notes.rope, kNotes.rope);
    EXPECT_EQ(read->notes.rope_digest, "12ab");
    EXPECT_EQ(read->notes.rope_length, 40);
  }
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1)
      << "no temporary file is left";
}

// One step in flight or two: rings of other sizes hold the same rows elsewhere.
TEST(StateFileTest, RowsFindTheirPlaceInARingOfAnotherSize) {
  const TempFolder folder;
  const StateLayout one = Layout(1), two = Layout(2);
  for (const int64_t position : {5, 47, 50, 63, 200}) {
    for (const bool widens : {false, true}) {
      const StateLayout &from = widens ? one : two, &to = widens ? two : one;
      const StateImage image = Image(from, position);
      ASSERT_TRUE(WriteStateFile(folder.File("a"), from, image, kNotes).ok());
      const auto read = ReadStateFile(folder.File("a"), to);
      ASSERT_TRUE(read.ok()) << read.status();
      EXPECT_EQ(read->image->num_bytes, StateBytes(to, position));
      for (int64_t token = std::max<int64_t>(position - one.window_rows, 0); token < position;
           ++token) {
        const char* const a = image.bytes.get() + 256 + token % from.window_rows * 24;
        const char* const b = read->image->bytes.get() + 256 + token % to.window_rows * 24;
        EXPECT_EQ(std::memcmp(a, b, 24), 0) << token;
      }
    }
  }
}

TEST(StateFileTest, AnotherDraftIsLeftOutAndAnotherModelRefused) {
  const TempFolder folder;
  const std::string path = folder.File("a");
  const StateLayout layout = Layout();
  ASSERT_TRUE(WriteStateFile(path, layout, Image(layout, 50), kNotes).ok());
  const auto without = ReadStateFile(path, Layout(1, false));
  ASSERT_TRUE(without.ok()) << without.status();
  EXPECT_FALSE(without->image->draft.has_value());
  EXPECT_EQ(without->image->num_bytes, StateBytes(Layout(1, false), 50));
  StateLayout other = Layout();
  other.draft = std::string(64, 'c');
  const auto other_draft = ReadStateFile(path, other);
  ASSERT_TRUE(other_draft.ok());
  EXPECT_FALSE(other_draft->image->draft.has_value());
  EXPECT_EQ(other_draft->image->num_bytes, StateBytes(other, 50));

  for (const auto& change : std::vector<std::function<void(StateLayout&)>>{
           [](StateLayout& l) { l.model = std::string(64, 'd'); },
           [](StateLayout& l) { l.dtype = "f32"; }, [](StateLayout& l) { l.max_position = 49; }}) {
    StateLayout foreign = Layout();
    change(foreign);
    EXPECT_EQ(ReadStateFile(path, foreign).status().code(), absl::StatusCode::kFailedPrecondition);
  }
  EXPECT_EQ(ReadStateFile(folder.File("b"), layout).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReadStateFile(path, layout, {.max_bytes = 100}).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(StateFileTest, ANanOrInfinityFromElsewhereIsRefused) {
  const TempFolder folder;
  const StateLayout layout = Layout();
  for (const float value : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    StateImage image = Image(layout, 50);
    const std::shared_ptr<char[]> bytes(new char[static_cast<size_t>(image.num_bytes)]);
    std::memcpy(bytes.get(), image.bytes.get(), static_cast<size_t>(image.num_bytes));
    std::memcpy(bytes.get() + 100, &value, sizeof(value));
    image.bytes = bytes;
    ASSERT_TRUE(WriteStateFile(folder.File("a"), layout, image, kNotes).ok());
    EXPECT_TRUE(ReadStateFile(folder.File("a"), layout).ok());
    const auto refused = ReadStateFile(folder.File("a"), layout, {.check_values = true});
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(refused.status().message()),
                HasSubstr("layers.0.lightning.base holds a NaN or infinity"));
  }
}

TEST(StateFileTest, EveryCutAndEveryFlippedByteIsFound) {
  const TempFolder folder;
  const StateLayout layout = Layout();
  const std::string path = folder.File("a");
  ASSERT_TRUE(WriteStateFile(path, layout, Image(layout, 40), kNotes).ok());
  const std::string good = FileBytes(path);
  for (size_t size = 0; size < good.size(); size += size < 2000 ? 1 : 97) {
    folder.Write("b", good.substr(0, size));
    EXPECT_EQ(ReadStateFile(folder.File("b"), layout).status().code(), absl::StatusCode::kDataLoss)
        << size;
  }
  for (size_t at = 0; at < good.size(); at += at < 2000 ? 3 : 61) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 0x10);
    folder.Write("b", bad);
    EXPECT_EQ(ReadStateFile(folder.File("b"), layout).status().code(), absl::StatusCode::kDataLoss)
        << at;
  }
}

// Files that state the right digest of wrong contents.
std::string WithDigest(std::string bytes) {
  const size_t at = 8 + std::string(R"({"__metadata__":{"sha256":")").size();
  if (bytes.size() < at + 64) return bytes;
  bytes.replace(at, 64, 64, '0');
  std::string digests;
  for (size_t piece = 0; piece < bytes.size(); piece += 4 << 20) {
    digests += absl::HexStringToBytes(FingerprintText(bytes.substr(piece, 4 << 20)));
  }
  return bytes.replace(at, 64, FingerprintText(digests));
}

// One of an older server is whole, and not for this one.
TEST(StateFileTest, AnotherVersionOfTheFormatIsNamed) {
  const TempFolder folder;
  const StateLayout layout = Layout();
  ASSERT_TRUE(WriteStateFile(folder.File("a"), layout, Image(layout, 40), kNotes).ok());
  std::string bytes = FileBytes(folder.File("a"));
  const size_t at = bytes.find("godwit-state-2");
  ASSERT_NE(at, std::string::npos);
  bytes.replace(at, 14, "godwit-state-1");
  folder.Write("a", WithDigest(bytes));
  const absl::Status status = ReadStateFile(folder.File("a"), layout).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("is of format godwit-state-1, expected godwit-state-2"));
}

// Larger than what one digest is of.
TEST(StateFileTest, EveryPieceOfALargeFileCounts) {
  const TempFolder folder;
  StateLayout layout = Layout();
  layout.max_position = 300'000;
  const StateImage image = Image(layout, 300'000);
  ASSERT_TRUE(WriteStateFile(folder.File("a"), layout, image, kNotes).ok());
  const std::string good = FileBytes(folder.File("a"));
  ASSERT_GT(good.size(), size_t{9} << 20);
  EXPECT_EQ(WithDigest(good), good);
  const auto read = ReadStateFile(folder.File("a"), layout);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(Bytes(*read->image), Bytes(image));
  for (size_t at = 1 << 20; at < good.size(); at += 2 << 20) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 1);
    folder.Write("b", bad);
    EXPECT_EQ(ReadStateFile(folder.File("b"), layout).status().code(), absl::StatusCode::kDataLoss)
        << at;
  }
}

TEST(StateFileTest, TenThousandMutationsAreRefusedOrAreAState) {
  const TempFolder folder;
  const StateLayout layout = Layout();
  ASSERT_TRUE(WriteStateFile(folder.File("a"), layout, Image(layout, 40), kNotes).ok());
  const std::string good = FileBytes(folder.File("a"));
  ASSERT_EQ(WithDigest(good), good);
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, good.data(), 8);
  std::mt19937_64 random(42);
  int64_t num_read = 0, num_lost = 0;
  const std::vector<std::string> words = {
      "-1",   "0",    "1e9",  "9223372036854775807",  "\"",      "{",   "}",   "[",
      "]",    ",",    "null", "99999999999999999999", "\\u0000", "F32", "U32", "penalties",
      "1000", "true", "-"};
  for (int round = 0; round < 10'000; ++round) {
    std::string bytes = good;
    const int num_changes = 1 + static_cast<int>(random() % 3);
    for (int change = 0; change < num_changes; ++change) {
      const size_t in_header = 8 + random() % header_bytes;
      switch (random() % 6) {
        case 0:
          bytes[random() % bytes.size()] = static_cast<char>(random());
          break;
        case 1:
          bytes[std::min(in_header, bytes.size() - 1)] = static_cast<char>(' ' + random() % 95);
          break;
        case 2: {  // a word in place of as many bytes
          const std::string& word = words[random() % words.size()];
          if (in_header + word.size() < bytes.size()) bytes.replace(in_header, word.size(), word);
          break;
        }
        case 3: {  // a digit
          const size_t digit = bytes.find_first_of("0123456789", in_header);
          if (digit != std::string::npos) bytes[digit] = static_cast<char>('0' + random() % 10);
          break;
        }
        case 4:
          bytes.resize(bytes.size() - random() % 40);
          break;
        default: {  // the header's length
          uint64_t length = random() % 3 == 0 ? random() : header_bytes + random() % 64 - 32;
          std::memcpy(bytes.data(), &length, 8);
          break;
        }
      }
    }
    if (round % 8 != 0) bytes = WithDigest(bytes);
    folder.Write("b", bytes);
    const auto read = ReadStateFile(folder.File("b"), layout, {.check_values = true});
    if (read.ok()) {
      ++num_read;
      const StateImage& image = *read->image;
      EXPECT_EQ(image.num_bytes, StateBytes(layout, image.position));
      EXPECT_EQ(image.base % kWindow, 0);
      EXPECT_LE(image.position - image.base, 31);
      EXPECT_LT(image.last_token, kVocab);
      if (image.draft) {
        EXPECT_EQ(image.draft->position + std::ssize(image.draft->unread),
                  image.position + (image.last_token >= 0));
      }
      continue;
    }
    ++num_lost;
    EXPECT_THAT(read.status().code(),
                testing::AnyOf(absl::StatusCode::kDataLoss, absl::StatusCode::kFailedPrecondition))
        << read.status();
  }
  EXPECT_GT(num_read, 100) << "a byte of the data may be another";
  EXPECT_GT(num_lost, 5000);
}

// The old file intact, or the new one whole, whenever the writer is killed.
TEST(StateFileTest, KilledInAnyPhaseLeavesTheOldFileOrTheNewOne) {
  const StateLayout layout = Layout();
  const StateImage old_image = Image(layout, 60, 1), new_image = Image(layout, 90, 2);
  for (const char* phase : {"create", "header", "data", "rest", "sync", "rename", "folder"}) {
    for (const bool had_one : {false, true}) {
      SCOPED_TRACE(phase);
      const TempFolder folder;
      const std::string path = folder.File("a");
      if (had_one) {
        ASSERT_TRUE(WriteStateFile(path, layout, old_image, kNotes).ok());
      }
      const pid_t child = fork();
      ASSERT_GE(child, 0);
      if (child == 0) {
        (void)WriteStateFile(path, layout, new_image, kNotes, [&](const char* at) {
          if (std::string(at) == phase) kill(getpid(), SIGKILL);
        });
        _exit(0);
      }
      int status = 0;
      ASSERT_EQ(waitpid(child, &status, 0), child);
      ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
      const auto read = ReadStateFile(path, layout);
      const bool renamed = std::string(phase) == "folder";
      if (renamed || had_one) {
        ASSERT_TRUE(read.ok()) << read.status();
        EXPECT_EQ(Bytes(*read->image), Bytes(renamed ? new_image : old_image));
      } else {
        EXPECT_EQ(read.status().code(), absl::StatusCode::kNotFound);
      }
    }
  }
}

TEST(StateFileTest, AFailedWriteChangesNothing) {
  const StateLayout layout = Layout();
  const absl::Status status =
      WriteStateFile("/nonexistent-folder/a", layout, Image(layout, 9), kNotes);
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
}

TEST(FingerprintTest, DependsOnConfigAndWeights) {
  const TempFolder folder;
  folder.Write("config.json", "{}");
  std::string weights(300'000, 'x');
  folder.Write("model.safetensors", weights);
  const std::string first = *FingerprintModel(folder.path());
  EXPECT_EQ(*FingerprintModel(folder.path()), first);
  weights.back() = 'y';
  folder.Write("model.safetensors", weights);
  const std::string second = *FingerprintModel(folder.path());
  EXPECT_NE(second, first);
  folder.Write("config.json", "{ }");
  EXPECT_NE(*FingerprintModel(folder.path()), second);
  folder.Write("README.md", "no part of it");
  EXPECT_FALSE(FingerprintModel(folder.path() + "/none").ok());
}

// Tokens drawn from a sequence, alone in its steps; a prompt is of 75.
std::vector<int32_t> Decode(Engine& engine, CacheLease& lease, const SamplingParams& sampling,
                            std::span<const int32_t> prompt, int num_tokens) {
  std::vector<int32_t> tokens;
  const RowOutput output = {.lease = &lease, .sampling = &sampling, .seed = 5};
  while (std::ssize(tokens) < num_tokens) {
    const bool reads = tokens.empty() && !prompt.empty();
    const BatchRow row = {.token_ids = reads ? prompt : std::span<const int32_t>(),
                          .confirmed_position = lease.position(),
                          .prompt_length = 75,
                          .lease = &lease,
                          .outputs = std::span(&output, 1),
                          .max_draft_tokens = reads ? 1 : 3};
    const auto result = engine.Collect(*engine.Submit(std::span(&row, 1)));
    EXPECT_TRUE(result.ok());
    for (const SampledToken& token : result->rows[0].outputs[0]) tokens.push_back(token.token_id);
  }
  return tokens;
}

// From an engine with two steps in flight through a file into another with one: the same bits.
class StateFileEngineTest : public testing::TestWithParam<TinyFamily> {};

TEST_P(StateFileEngineTest, ContinuesWithTheSameBits) {
  const TempFolder folder;
  const TinyModel model({.family = GetParam()}), draft({.family = GetParam(), .seed = 3});
  const auto make = [&](int steps_in_flight) {
    return MakeEngine(model, {.draft_folder = draft.folder(),
                              .max_sequences = 4,
                              .max_tokens_per_step = 1024,
                              .kv_bytes = 8 << 20,
                              .store_bytes = 16 << 20,
                              .max_steps_in_flight = steps_in_flight});
  };
  const SamplingParams sampling = {.temperature = 0.9f, .frequency_penalty = 0.7f};
  const auto source = make(2), target = make(1);
  const StateLayout source_layout = MakeStateLayout(source->card(), "m", "d");
  const StateLayout target_layout = MakeStateLayout(target->card(), "m", "d");
  EXPECT_NE(source_layout.window_rows, target_layout.window_rows);
  CacheLease lease = *source->caches().Reserve(400);
  Decode(*source, lease, sampling, RandomTokens(4, 75, model.options().vocab_size), 20);
  auto saved = source->caches().Save(lease, lease.position());
  ASSERT_TRUE(saved.ok() && source->Copy(std::span(&saved->copy, 1)).ok());
  const auto image = source->ExportState(saved->state.host_id());
  ASSERT_TRUE(image->draft.has_value());
  ASSERT_TRUE(WriteStateFile(folder.File("a"), source_layout, *image, kNotes).ok());
  const std::vector<int32_t> expected = Decode(*source, lease, sampling, {}, 60);

  const auto read = ReadStateFile(folder.File("a"), target_layout, {.check_values = true});
  ASSERT_TRUE(read.ok()) << read.status();
  StoredState stored = *target->caches().Store(read->image->position);
  ASSERT_TRUE(target->ImportState(stored.host_id(), read->image).ok());
  CacheLease loaded = *target->caches().Reserve(400);
  const CacheCopy load = target->caches().Load(stored, loaded);
  ASSERT_TRUE(target->Copy(std::span(&load, 1)).ok());
  EXPECT_EQ(Decode(*target, loaded, sampling, {}, 60), expected);
}

// A snapshot goes from one kind of device to another, which lays out KV blocks in its own way. The
// state is then as good as the new device's own: its logits are off by no more than the two
// devices' are anyway.
TEST_P(StateFileEngineTest, AnotherKindOfDeviceContinuesIt) {
  const TempFolder folder;
  const TinyModel model({.family = GetParam()});
  const auto vocab = static_cast<size_t>(model.options().vocab_size);
  const std::vector<int32_t> prompt = RandomTokens(4, 75, model.options().vocab_size);
  const std::vector<int32_t> question = {4, 5, 6};
  const auto read = [&](Engine& engine, CacheLease& lease, std::span<const int32_t> token_ids,
                        float* logits) {
    const BatchRow row = {.token_ids = token_ids,
                          .first_position = lease.position(),
                          .confirmed_position = lease.position(),
                          .prompt_length = 78,
                          .lease = &lease,
                          .logits = logits};
    ASSERT_TRUE(engine.Collect(*engine.Submit(std::span(&row, 1))).ok());
  };
  const auto far_apart = [](const std::vector<float>& a, const std::vector<float>& b) {
    float most = 0;
    for (size_t at = 0; at < a.size(); ++at) most = std::max(most, std::abs(a[at] - b[at]));
    return most;
  };
  const bool has_gpu = OpenDevice("cuda").ok();
  for (const auto& [other, dtype] : std::vector<std::pair<std::string, DType>>{
           {"ref", DType::kF32}, {"ref", DType::kBF16}, {"cuda", DType::kBF16}}) {
    if (other == "cuda" && !has_gpu) continue;
    const auto make = [&](const std::string& device) {
      return MakeEngine(
          model, {.dtype = dtype, .max_sequences = 4, .kv_bytes = 8 << 20, .store_bytes = 16 << 20},
          device == "ref" ? CreateRefBackend() : *OpenDevice(device));
    };
    const std::unique_ptr<Engine> engines[] = {make("cpu"), make(other)};
    std::vector<float> own[2];
    for (const int device : {0, 1}) {
      CacheLease lease = *engines[device]->caches().Reserve(100);
      read(*engines[device], lease, prompt, nullptr);
      auto saved = engines[device]->caches().Save(lease, 75);
      ASSERT_TRUE(saved.ok() && engines[device]->Copy(std::span(&saved->copy, 1)).ok());
      ASSERT_TRUE(WriteStateFile(folder.File(std::to_string(device)),
                                 MakeStateLayout(engines[device]->card(), "m", ""),
                                 *engines[device]->ExportState(saved->state.host_id()), kNotes)
                      .ok());
      own[device].resize(3 * vocab);
      read(*engines[device], lease, question, own[device].data());
    }
    const float apart = far_apart(own[0], own[1]);
    for (const int device : {0, 1}) {
      Engine& target = *engines[device];
      const auto file = ReadStateFile(folder.File(std::to_string(1 - device)),
                                      MakeStateLayout(target.card(), "m", ""));
      ASSERT_TRUE(file.ok()) << file.status();
      StoredState stored = *target.caches().Store(75);
      ASSERT_TRUE(target.ImportState(stored.host_id(), file->image).ok());
      CacheLease lease = *target.caches().Reserve(100);
      const CacheCopy load = target.caches().Load(stored, lease);
      ASSERT_TRUE(target.Copy(std::span(&load, 1)).ok());
      std::vector<float> logits(3 * vocab);
      read(target, lease, question, logits.data());
      EXPECT_LE(far_apart(logits, own[device]), 2 * apart + 1e-5f)
          << (dtype == DType::kF32 ? "f32" : "bf16") << " to device " << device << ", apart "
          << apart;
    }
  }
}

// What lies in a slot and in blocks beside a sequence's own rows is another's and does not leave
// the engine: an image is a function of its sequence alone.
TEST_P(StateFileEngineTest, AnImageHoldsNothingOfTheSlotsFormerUser) {
  const TinyModel model({.family = GetParam()}), draft({.family = GetParam(), .seed = 3});
  const SamplingParams sampling = {.temperature = 0.9f, .frequency_penalty = 0.7f};
  const auto export_after = [&](uint64_t former_user, int num_tokens) {
    const auto engine = MakeDeterministicEngine(model,
                                                {.draft_folder = draft.folder(),
                                                 .max_sequences = 1,
                                                 .max_tokens_per_step = 1024,
                                                 .kv_bytes = 8 << 20,
                                                 .store_bytes = 16 << 20},
                                                "cpu");
    const int32_t vocab_size = model.options().vocab_size;
    {
      CacheLease lease = *engine->caches().Reserve(400);
      Decode(*engine, lease, sampling, RandomTokens(former_user, 75, vocab_size), 200);
    }
    CacheLease lease = *engine->caches().Reserve(400);
    Decode(*engine, lease, sampling, RandomTokens(4, 75, vocab_size), num_tokens);
    auto saved = engine->caches().Save(lease, lease.position());
    EXPECT_TRUE(saved.ok() && engine->Copy(std::span(&saved->copy, 1)).ok());
    return std::pair(engine->ExportState(saved->state.host_id()),
                     MakeStateLayout(engine->card(), "m", "d"));
  };
  for (const int num_tokens : {1, 2, 20, 50}) {
    SCOPED_TRACE(num_tokens);
    const auto [image, layout] = export_after(100, num_tokens);
    EXPECT_EQ(Bytes(*image), Bytes(*export_after(101, num_tokens).first));
    ASSERT_TRUE(image->draft.has_value());
    const std::string bytes = Bytes(*image);
    size_t at = 0;
    int num_zeroed = 0;
    for (const StateComponent& component : layout.components) {
      const bool is_draft = component.name.starts_with("draft.");
      const int64_t begin = is_draft ? image->draft->base : image->base;
      const int64_t end = is_draft ? image->draft->position : image->position;
      at += static_cast<size_t>(component.base_bytes);
      const auto row_bytes = static_cast<size_t>(component.row_bytes);
      if (component.windowed()) {
        const int64_t num_rows = std::min(image->position, layout.window_rows);
        std::vector<bool> held(static_cast<size_t>(num_rows));
        for (int64_t token = begin; token < end; ++token) {
          held[static_cast<size_t>(token % layout.window_rows)] = true;
        }
        for (const bool is_held : held) {
          const std::string row = bytes.substr(at, row_bytes);
          EXPECT_EQ(row == std::string(row_bytes, '\0'), !is_held) << component.name;
          num_zeroed += !is_held;
          at += row_bytes;
        }
      }
      if (component.paged()) {
        // Rows are not apart in a block, but as many bytes of it as they have are zeros.
        const int64_t num_blocks = (image->position + kPagedBlock - 1) / kPagedBlock;
        const size_t size = static_cast<size_t>(num_blocks * kPagedBlock) * row_bytes;
        const auto num_zeros = std::ranges::count(bytes.substr(at, size), '\0');
        EXPECT_GE(num_zeros, (num_blocks * kPagedBlock - end) * component.row_bytes);
        num_zeroed += num_blocks * kPagedBlock > end;
        at += size;
      }
    }
    EXPECT_EQ(at, bytes.size());
    EXPECT_GT(num_zeroed, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Families, StateFileEngineTest,
                         testing::Values(TinyFamily::kTransnormer, TinyFamily::kLlama));

}  // namespace
}  // namespace godwit
