#!/usr/bin/env python3
"""Context extension at small scale: trains a Llama of 6M parameters on 256 tokens, extends it as Giraffe does
(arXiv 2308.10882), and measures retrieval by length for each RoPE method.

    giraffe.py prepare --corpus DIR --tokenizer tokenizer.model --out DATA    needs sentencepiece
    giraffe.py run DATA --out RUN [--seconds 280]                             one GPU
    giraffe.py folder RUN/NAME.pt --tokenizer tokenizer.model --out FOLDER    Hugging Face folder, for godwit eval
    giraffe.py plot RUN/results.json --out lines.png                          needs matplotlib
    giraffe.py table RUN/results.json                                         Markdown

The task: lines ` WORD` NUMBER, then one of the words again: which number stood behind it? Words and digits are pieces
of the tokenizer (digits from 2: "00" and " 1" are pieces too), so a record is made on the GPU by indexing, and
DATA/lines-*.jsonl holds such prompts as text in the fields of the LongChat-Lines files: `godwit eval lines` reads
them. The number follows the word at once: a model this small learns that much sooner than a number behind ": ".

Learning to look up needs a heavy diet: questions stand all over a record, the loss is on their answers, records grow
from 40 tokens to 256 as the accuracy reaches STAGE_ACCURACY, and first part of the batch repeats random tokens, which
forms the same induction heads. Prose joins in the last stage.

Words on the measure: an answer is right when all of its tokens are the most likely ones given those before: what
greedy decoding would answer.
"""
import argparse
import json
import math
import pathlib
import random
import shutil
import struct
import time

import numpy as np

TRAINED, TUNED = 256, 512             # tokens; Giraffe tuned at twice the trained length too
LENGTHS = [128, 256, 512, 1024, 2048, 4096]
NUM_EVAL = 256                        # prompts a length: standard error 0.03 at one half
BOS = 1
DIM, LAYERS, HEADS, HEAD_DIM, FF, VOCAB, THETA = 256, 6, 4, 64, 704, 4096, 10000.0
LINE, HEADER, NUM_WORDS = 5, 3, 1024  # tokens of a line and before the first; words to choose from
STAGES, STAGE_ACCURACY = [40, 72, 136, TRAINED], 0.95


# --- Tables, as engine/rope_table.cc makes them. ---

def inv_freq(rope, length):
    i, pairs = np.arange(HEAD_DIM // 2, dtype=np.float64), HEAD_DIM // 2
    kind, s = rope.get("type", "default"), rope.get("factor", 1.0)
    scaled = lambda theta: theta ** (-2 * i / HEAD_DIM)
    ntk = lambda a: scaled(THETA * a ** (HEAD_DIM / (HEAD_DIM - 2)))
    f = scaled(THETA)
    if kind == "linear":
        return f / s, 1.0
    if kind == "dynamic":
        n = max(length, TRAINED)
        return ntk(s * n / TRAINED - (s - 1)), 1.0
    if kind == "ntk-aware":
        return ntk(s), 1.0
    if kind == "yarn":
        at = lambda turns: HEAD_DIM * math.log(TRAINED / (turns * 2 * math.pi)) / (2 * math.log(THETA))
        low, high = max(math.floor(at(32)), 0), min(math.ceil(at(1)), HEAD_DIM - 1)
        keep = 1 - np.clip((i - low) / (high - low), 0, 1)
        return f / s * (1 - keep) + f * keep, 0.1 * math.log(s) + 1
    if kind == "giraffe":
        f = f / s * (1 - i / pairs) ** rope.get("power", 0.0)
        if "truncate_length" in rope:
            b = 2 * math.pi / rope["truncate_length"]
            f = np.where(f >= b, f, np.where(f >= b / 8, b / 16, 0.0))
    return f, 1.0


# --- Data. ---

def prepare(args):
    import sentencepiece as spm

    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer)
    text = lambda i: sp.id_to_piece(i)[1:]
    header, digits = sp.encode("\n"), sp.encode("\n0123456789")[2:]
    newline = sp.piece_to_id("\n")
    whole = lambda i: sp.encode(f"\n {text(i)}234\n {text(i)}") == [*header, i, *digits[2:5], newline, i]
    words = [i for i in range(sp.vocab_size()) if len(text(i)) >= 3 and text(i).isascii() and text(i).isalpha()
             and text(i).islower() and sp.id_to_piece(i)[0] == "\u2581" and whole(i)]
    rng = random.Random(1)
    words = sorted(rng.sample(words, NUM_WORDS))
    assert len(header) == HEADER - 1 and len(digits) == 10
    (out / "pieces.json").write_text(json.dumps(
        {"words": words, "header": header, "digits": digits[2:], "newline": newline}))
    for length in LENGTHS:
        with open(out / f"lines-{length}.jsonl", "w") as file:
            for _ in range(NUM_EVAL):
                keys = rng.sample(words, (length - HEADER) // LINE - 1)
                numbers = [int("".join(rng.choices("23456789", k=3))) for _ in keys]
                asked = rng.randrange(len(keys))
                prompt = "\n" + "".join(f" {text(k)}{n}\n" for k, n in zip(keys, numbers)) + f" {text(keys[asked])}"
                ids = list(header)
                for key, number in zip(keys, numbers):
                    ids += [key, *(digits[int(d)] for d in str(number)), newline]
                ids.append(keys[asked])
                assert sp.encode(prompt) == ids, "records on the GPU are what the tokenizer makes of the text"
                file.write(json.dumps({"prompt": prompt, "expected_number": numbers[asked], "num_lines": len(keys),
                                       "token_size": len(ids) + 1}) + "\n")
    prose = []
    for path in sorted(pathlib.Path(args.corpus).glob("train-*.txt"))[:4]:
        prose.append(np.array(sp.encode(path.read_text(encoding="utf-8")[:2_500_000]), dtype=np.uint16))
    np.save(out / "prose.npy", np.concatenate(prose)[:2_500_000])
    valid = pathlib.Path(args.corpus) / "valid.txt"
    np.save(out / "valid.npy", np.array(sp.encode(valid.read_text(encoding="utf-8")[:600_000]), dtype=np.uint16))


class Data:
    """Batches on the device: ids [batch, length] and the weight of each token's loss, same shape."""

    def __init__(self, torch, folder, device, seed):
        self.torch, self.device = torch, device
        pieces = json.loads((folder / "pieces.json").read_text())
        tensor = lambda values: torch.tensor(values, dtype=torch.long, device=device)
        self.words, self.digits = tensor(pieces["words"]), tensor(pieces["digits"])
        self.newline, self.header = pieces["newline"], tensor([BOS, *pieces["header"]])
        self.prose, self.valid = (tensor(np.load(folder / name).astype(np.int64)) for name in ("prose.npy", "valid.npy"))
        self.generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, *shape):
        return self.torch.rand(*shape, generator=self.generator, device=self.device)

    def below(self, high, *shape):
        return self.torch.randint(high, shape, generator=self.generator, device=self.device)

    def lookups(self, batch, length, questions=None):
        """A line, or a question with its answer, at each place: at random, or `questions` at the end."""
        torch, count = self.torch, (length - HEADER) // LINE
        if questions is None:
            share = 0.15 + 0.7 * self.uniform(batch, 1)
            spread = self.uniform(batch, count) < share
            place = torch.arange(count, device=self.device)
            asks = torch.where(self.uniform(batch, 1) < 0.5, spread, place >= count * (1 - share))
        else:
            asks = (torch.arange(count, device=self.device) >= count - questions).expand(batch, count).clone()
        asks[:, 0] = False
        lines = (~asks).long().cumsum(1)  # so far; a question is about any of them
        line = torch.where(asks, (self.uniform(batch, count) * lines).long().clamp(max=count - 1), lines - 1)
        words = self.words[self.uniform(batch, NUM_WORDS).argsort(1)[:, :count]].gather(1, line)
        numbers = self.digits[self.below(len(self.digits), batch, count, 3)]
        numbers = numbers.gather(1, line[..., None].expand(-1, -1, 3))
        ends = torch.full((batch, count, 1), self.newline, device=self.device)
        ids = torch.cat([self.header.expand(batch, -1), torch.cat([words[..., None], numbers, ends], -1).flatten(1)], 1)
        weight = torch.zeros(batch, count, LINE, device=self.device)
        weight[..., 1:4] = asks[..., None].float()
        weight[..., 4] = 0.05
        return ids, torch.nn.functional.pad(weight.flatten(1), (HEADER, 0))

    def repeats(self, batch, length):
        """Random words and digits with a period: all of it after the first time can be known."""
        torch, count = self.torch, length - 1
        period = 6 + self.below(max(count // 2 - 6, 1), batch, 1)
        words, digits = self.words[self.below(NUM_WORDS, batch, count)], self.digits[self.below(8, batch, count)]
        ids = torch.where(self.uniform(batch, count) < 0.5, words, digits)
        place = torch.arange(count, device=self.device).expand(batch, -1)
        ids = ids.gather(1, place % period)
        return torch.nn.functional.pad(ids, (1, 0), value=BOS), torch.nn.functional.pad((place > period).float(), (1, 0))

    def prose_batch(self, source, batch, length):
        start = self.below(len(source) - length, batch, 1)
        ids = source[start + self.torch.arange(length, device=self.device)]
        ids[:, 0] = BOS
        return ids, self.torch.ones(batch, length, device=self.device)


# --- Model: a Llama whose rotation is an argument. ---

def make_model(torch, seed=1):
    F = torch.nn.functional

    class Llama(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(seed)
            make = lambda *shape, std: torch.nn.Parameter(torch.randn(*shape) * std)
            ones = lambda: torch.nn.Parameter(torch.ones(LAYERS, DIM))
            width = HEADS * HEAD_DIM
            self.embed = make(VOCAB, DIM, std=0.02)
            self.qkv = make(LAYERS, 3 * width, DIM, std=DIM ** -0.5)
            self.out = make(LAYERS, DIM, width, std=(2 * LAYERS * width) ** -0.5)
            self.up = make(LAYERS, 2 * FF, DIM, std=DIM ** -0.5)
            self.down = make(LAYERS, DIM, FF, std=(2 * LAYERS * FF) ** -0.5)
            self.norm1, self.norm2 = ones(), ones()
            self.norm = torch.nn.Parameter(torch.ones(DIM))

        def forward(self, ids, rotation):
            norm = lambda x, w: F.rms_norm(x, (DIM,), w.to(x.dtype), 1e-5)
            cos, sin = rotation
            x = F.embedding(ids, self.embed)
            for layer in range(LAYERS):
                h = F.linear(norm(x, self.norm1[layer]), self.qkv[layer])
                q, k, v = h.unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
                half = lambda t: torch.cat([-t[..., HEAD_DIM // 2:], t[..., :HEAD_DIM // 2]], -1)
                turn = lambda t: (t.float() * cos + half(t).float() * sin).to(t.dtype)
                o = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
                x = x + F.linear(o.transpose(1, 2).flatten(2), self.out[layer])
                gate, up = F.linear(norm(x, self.norm2[layer]), self.up[layer]).chunk(2, -1)
                x = x + F.linear(F.silu(gate) * up, self.down[layer])
            return norm(x, self.norm)

    return Llama()


def rotation_of(torch, rope, length, device):
    frequency, factor = inv_freq(rope, length)
    angle = np.arange(length)[:, None] * frequency[None, :]
    both = lambda t: torch.tensor(np.concatenate([t, t], 1) * factor, dtype=torch.float32, device=device)
    return both(np.cos(angle)), both(np.sin(angle))


class Trainer:
    def __init__(self, torch, data, device, batch_tokens):
        self.torch, self.device, self.batch_tokens = torch, device, batch_tokens
        self.data = Data(torch, data, device, 7)
        self.rotations = {}

    def rotation(self, rope, length):
        # By the request's length, which is that of a record: what dynamic scales with.
        key = json.dumps(rope), length
        if key not in self.rotations:
            self.rotations[key] = rotation_of(self.torch, rope, length, self.device)
        return self.rotations[key]

    def autocast(self):
        return self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.device == "cuda")

    def loss(self, net, ids, weight, rotation):
        """Mean over the weighted tokens; logits are formed for these alone."""
        torch = self.torch
        chosen = (weight[:, 1:] > 0).flatten().nonzero()[:, 0]
        with self.autocast():
            hidden = net(ids[:, :-1], [t[: ids.shape[1] - 1] for t in rotation])
            logits = hidden.flatten(0, 1)[chosen] @ net.embed.T.to(hidden.dtype)
            each = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten()[chosen], reduction="none")
        weight = weight[:, 1:].flatten()[chosen]
        return (each * weight).sum() / weight.sum()

    def step(self, net, optimizer, rope, length, parts, batch_tokens):
        """parts: name -> share of the batch's tokens."""
        total = 0
        for name, share in parts.items():
            batch = max(int(batch_tokens * share) // length, 1)
            make = {"lookups": self.data.lookups, "repeats": self.data.repeats,
                    "prose": lambda b, n: self.data.prose_batch(self.data.prose, b, n)}[name]
            total = total + self.loss(net, *make(batch, length), self.rotation(rope, length))
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return total

    def optimizer(self, net):
        return self.torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)

    def synchronize(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def train(self, net, seconds, peak=2e-3):
        """The stages, then what is left of the time in the last one, its learning rate falling. Looking up appears
        after a number of steps rather than of tokens: short records come in small batches."""
        optimizer, stage, step, start, curve = self.optimizer(net), 0, 0, time.time(), []
        share = 0.0
        while share < 1:
            last = stage == len(STAGES) - 1
            parts = {"lookups": 0.5, "prose": 0.5} if last else {"lookups": 0.6, "repeats": 0.4}
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1, (step + 1) / 200) * min(1, (1 - share) / 0.4)
            loss = self.step(net, optimizer, {}, STAGES[stage], parts, self.batch_tokens * STAGES[stage] // TRAINED)
            step += 1
            if step % 50 == 0:
                self.synchronize()
                share = (time.time() - start) / seconds
            if step % 250 == 0:
                accuracy = self.accuracy(net, {}, STAGES[stage])
                curve.append([step, round(time.time() - start, 1), STAGES[stage], round(loss.item(), 3), accuracy])
                print(f"    step {step} {curve[-1][1]} s, {STAGES[stage]} tokens: loss {curve[-1][3]} "
                      f"accuracy {accuracy:.3f}", flush=True)
                if accuracy >= STAGE_ACCURACY and not last:
                    stage += 1
        return curve

    def tune(self, net, rope, seconds, peak=5e-4):
        optimizer, start, step, share = self.optimizer(net), time.time(), 0, 0.0
        while share < 1:
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * share))
            self.step(net, optimizer, rope, TUNED, {"lookups": 0.5, "prose": 0.5}, self.batch_tokens)
            step += 1
            if step % 10 == 0:
                self.synchronize()
                share = (time.time() - start) / seconds
        return step

    def accuracy(self, net, rope, length):
        torch, right, done = self.torch, 0, 0
        data_generator, self.data.generator = self.data.generator, \
            torch.Generator(self.device).manual_seed(100 + length)
        batch = min(NUM_EVAL, max(2 ** 18 // length, 1))
        while done < NUM_EVAL:
            ids, _ = self.data.lookups(batch, length, questions=1)
            rotation = [t[: ids.shape[1] - 1] for t in self.rotation(rope, length)]
            with torch.no_grad(), self.autocast():
                hidden = net(ids[:, :-1], rotation)[:, -LINE + 1:-1]
                best = (hidden @ net.embed.T.to(hidden.dtype)).argmax(-1)
            right += (best == ids[:, -LINE + 1:-1]).all(1).sum().item()
            done += batch
        self.data.generator = data_generator
        return right / done

    def prose_loss(self, net, rope, length):
        """Nats a token of held-out prose where the whole length is behind: at the last 64 tokens."""
        data_generator, self.data.generator = self.data.generator, self.torch.Generator(self.device).manual_seed(11)
        ids, weight = self.data.prose_batch(self.data.valid, 64, length)
        self.data.generator = data_generator
        weight[:, :-64] = 0
        with self.torch.no_grad():
            return self.loss(net, ids, weight, self.rotation(rope, length)).item()


# What is fine-tuned, and with which tables it is then measured. Giraffe's evaluation scales are on both sides of the
# trained one.
NTK, YARN = {"type": "ntk-aware", "factor": 4.0}, {"type": "yarn", "factor": 4.0}
POWER = {"type": "giraffe", "power": 0.5}
TRUNCATED = {"type": "giraffe", "truncate_length": TRAINED}
DYNAMIC = {"type": "dynamic", "factor": 2.0}
linear = lambda s: {"type": "linear", "factor": float(s)}
ntk, yarn = (lambda kind: lambda s: {"type": kind, "factor": float(s)})("ntk-aware"), \
    (lambda kind: lambda s: {"type": kind, "factor": float(s)})("yarn")
UNTUNED = [{}, linear(2), linear(4), ntk(2), ntk(4), ntk(8), yarn(2), yarn(4), yarn(8), {**DYNAMIC, "factor": 1.0}, DYNAMIC]
PLAN = [("linear4", linear(4), [linear(2), linear(4), linear(6), linear(8), linear(16)]),
        ("linear16", linear(16), [linear(8), linear(12), linear(16), linear(32)]),
        ("plain", {}, [{}, linear(2)]),
        ("truncated", TRUNCATED, [TRUNCATED, {**TRUNCATED, "factor": 2.0}]),
        ("power", POWER, [POWER, {**POWER, "factor": 2.0}]),
        ("ntk4", NTK, [NTK, ntk(8), ntk(16)]),
        ("yarn4", YARN, [YARN, yarn(8), yarn(16)]),
        ("dynamic", DYNAMIC, [DYNAMIC])]


def run(args):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    began = time.time()
    left = lambda: args.seconds - (time.time() - began)
    data, out = pathlib.Path(args.data), pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(torch, data, device, args.batch_tokens)
    base = make_model(torch).to(device)
    size = sum(p.numel() for p in base.parameters()) / 1e6
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, {size:.2f} M parameters", flush=True)
    results = {"trained": TRAINED, "tuned": TUNED, "lengths": LENGTHS, "prompts": NUM_EVAL, "device": name,
               "parameters_m": round(size, 2), "rows": []}
    results["curve"] = trainer.train(base, 0.45 * args.seconds)
    save = lambda: (out / "results.json").write_text(json.dumps(results, indent=1))
    save()

    def measure(net, name, ropes):
        for rope in ropes:
            if left() < 3:
                print(f"{name}: out of time before {json.dumps(rope)}", flush=True)
                return
            row = {"weights": name, "rope": rope, "accuracy": [trainer.accuracy(net, rope, n) for n in LENGTHS],
                   "prose_loss": [trainer.prose_loss(net, rope, n) for n in LENGTHS]}
            results["rows"].append(row)
            print(f"{name:10s} {json.dumps(rope):48s}", " ".join(f"{a:5.2f}" for a in row["accuracy"]), " | ",
                  " ".join(f"{a:5.2f}" for a in row["prose_loss"]), flush=True)
            save()

    torch.save({"state": half(torch, base), "rope": {}}, out / "base.pt")
    measure(base, "base", UNTUNED)
    seconds = left() * 0.6 / len(PLAN)
    for name, rope, ropes in PLAN:
        if left() < seconds + 3:
            print(f"{name}: out of time", flush=True)
            break
        net = make_model(torch).to(device)
        net.load_state_dict(base.state_dict())
        print(f"  {name}: {trainer.tune(net, rope, seconds)} steps in {seconds:.1f} s", flush=True)
        if name == "linear4":
            torch.save({"state": half(torch, net), "rope": rope}, out / f"{name}.pt")
        measure(net, name, ropes)
    results["seconds"] = round(time.time() - began, 1)
    save()


def half(torch, net):
    return {name: value.to(torch.bfloat16) for name, value in net.state_dict().items()}


# --- For Godwit. ---

def tensors_of(state):
    width = HEADS * HEAD_DIM
    tensors = {"model.embed_tokens.weight": state["embed"], "model.norm.weight": state["norm"]}
    for layer in range(LAYERS):
        at, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for part, name in enumerate("qkv"):
            tensors[f"{at}.{name}_proj.weight"] = state["qkv"][layer][part * width:(part + 1) * width]
        tensors[f"{at}.o_proj.weight"] = state["out"][layer]
        tensors[f"{mlp}.gate_proj.weight"] = state["up"][layer][:FF]
        tensors[f"{mlp}.up_proj.weight"] = state["up"][layer][FF:]
        tensors[f"{mlp}.down_proj.weight"] = state["down"][layer]
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = state["norm1"][layer]
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"] = state["norm2"][layer]
    return tensors


def folder(args):
    import torch

    saved = torch.load(args.checkpoint, map_location="cpu")
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in tensors_of(saved["state"]).items():
        blob = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        header[name] = dict(dtype="BF16", shape=list(tensor.shape), data_offsets=[offset, offset + len(blob)])
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (out / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    rope = {"rope_theta": THETA, "rope_type": saved["rope"].get("type", "default"),
            **{k: v for k, v in saved["rope"].items() if k != "type"}}
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = TRAINED
    (out / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": DIM,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM,
        "intermediate_size": FF, "max_position_embeddings": TRAINED, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_parameters": rope, "tie_word_embeddings": True, "bos_token_id": BOS, "eos_token_id": 2,
        "add_bos_token": True, "torch_dtype": "bfloat16"}, indent=1))
    if args.tokenizer:
        shutil.copy(args.tokenizer, out / "tokenizer.model")


def label(row):
    rope = row["rope"]
    name = rope.get("type", "untouched")
    if name == "giraffe":
        name = "truncated" if "truncate_length" in rope else "power 0.5"
    return name + (f" {rope['factor']:g}" if rope.get("factor", 1) > 1 else "")


def table(args):
    results = json.loads(pathlib.Path(args.results).read_text())
    print("| weights | table | " + " | ".join(f"{n:,}" for n in results["lengths"]) + " | prose, nats a token |")
    print("| --- | --- |" + " --- |" * (len(results["lengths"]) + 1))
    for row in results["rows"]:
        prose = [row["prose_loss"][results["lengths"].index(n)] for n in (TRAINED, TUNED, 2 * TUNED)]
        print(f"| {row['weights']} | {label(row)} | " + " | ".join(f"{a:.2f}" for a in row["accuracy"]) + " | " +
              " / ".join(f"{loss:.2f}" for loss in prose) + " |")


def plot(args):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(pathlib.Path(args.results).read_text())
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    groups = [("without tuning", lambda r: r["weights"] == "base"),
              (f"tuned at {TUNED} with the same table",
               lambda r: any(r["weights"] == n and r["rope"] == t for n, t, _ in PLAN)),
              ("tuned at scale 4, read at other scales", lambda r: r["weights"] in ("linear4", "ntk4", "yarn4"))]
    for panel, (title, chosen) in zip(axes, groups):
        panel.set_prop_cycle(color=plt.cm.tab20.colors)
        for row in filter(chosen, results["rows"]):
            panel.plot(results["lengths"], row["accuracy"], "-o", ms=3, label=label(row))
        panel.set(xscale="log", xticks=results["lengths"], xticklabels=results["lengths"], title=title,
                  xlabel="tokens")
        panel.minorticks_off()
        panel.axvline(results["trained"], color="grey", lw=0.5)
        panel.axvline(results["tuned"], color="grey", lw=0.5, ls="--")
        panel.legend(fontsize=7, loc="lower left")
    axes[0].set_ylabel("lines retrieved")
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("prepare")
    p.add_argument("--corpus", required=True)
    p.add_argument("--tokenizer", required=True)
    p.add_argument("--out", required=True)
    p = commands.add_parser("run")
    p.add_argument("data")
    p.add_argument("--out", required=True)
    p.add_argument("--seconds", type=float, default=280, help="of everything")
    p.add_argument("--batch-tokens", type=int, default=49152)
    p = commands.add_parser("folder")
    p.add_argument("checkpoint")
    p.add_argument("--tokenizer")
    p.add_argument("--out", required=True)
    p = commands.add_parser("table")
    p.add_argument("results")
    p = commands.add_parser("plot")
    p.add_argument("results")
    p.add_argument("--out", required=True)
    args = parser.parse_args()
    {"prepare": prepare, "run": run, "folder": folder, "plot": plot, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
