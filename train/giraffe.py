#!/usr/bin/env python3
"""Context extension at small scale: trains a Llama of 2.5M parameters on 256 tokens, extends it as Giraffe does
(arXiv 2308.10882), and measures retrieval by length for each RoPE method.

    giraffe.py prepare --corpus DIR --tokenizer tokenizer.model --out DATA    needs sentencepiece
    giraffe.py run DATA --out RUN [--seconds 60] [--tune-seconds 8]           one GPU, about 2.5 minutes
    giraffe.py folder RUN/NAME.pt --tokenizer tokenizer.model --out FOLDER    Hugging Face folder, for godwit eval
    giraffe.py plot RUN/results.json --out lines.png                          needs matplotlib

The task: a record of lines `line WORD WORD: NUMBER`, then `What is line WORD WORD? NUMBER`. Words and digits are
pieces of the tokenizer (digits from 2: " 1" and "00" are pieces too), so a record is made on the GPU by indexing, and
DATA/lines-*.jsonl holds such prompts as text in the fields of the LongChat-Lines files: `godwit eval lines` reads
them. Half of each batch is prose.

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

TRAINED, TUNED = 256, 1024            # tokens
LENGTHS = [256, 512, 1024, 2048, 4096]
NUM_EVAL = 256                        # prompts a length: standard error 0.03 at one half
BOS = 1
DIM, LAYERS, HEADS, HEAD_DIM, FF, VOCAB, THETA = 192, 4, 3, 64, 512, 4096, 10000.0
LINE, QUESTION, ANSWER = 10, 11, 4    # tokens of a line, of a question with its answer, of the answer with its end


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
    whole = lambda i: sp.id_to_piece(i)[0] == "▁" and sp.encode(f"line {text(i)}:{text(i)}")[1:2] == [i] and \
        sp.encode(f"line {text(i)}?")[1:2] == [i] and sp.encode(f"line {text(i)} {text(i)}: 1")[1:3] == [i, i]
    words = [i for i in range(sp.vocab_size()) if len(text(i)) >= 3 and text(i).isascii() and text(i).isalpha()
             and text(i).islower() and whole(i)]
    rng = random.Random(1)
    words = sorted(rng.sample(words, 512))
    pieces = {"words": words, "header": sp.encode("\n"), "digits": sp.encode("\n0123456789")[2:],
              "line": sp.encode("\nline")[2:], "what": sp.encode("\nWhat is line")[2:],
              "colon": sp.piece_to_id(":"), "question": sp.piece_to_id("?"), "space": sp.piece_to_id("▁"),
              "newline": sp.piece_to_id("\n")}
    assert len(pieces["line"]) == 2 and len(pieces["what"]) == 3 and len(pieces["digits"]) == 10
    (out / "pieces.json").write_text(json.dumps(pieces))
    for length in LENGTHS:
        with open(out / f"lines-{length}.jsonl", "w") as file:
            for _ in range(NUM_EVAL):
                keys = set()
                while len(keys) < (length - len(pieces["header"]) - 1 - QUESTION) // LINE:
                    keys.add((rng.choice(words), rng.choice(words)))
                keys = sorted(keys)
                rng.shuffle(keys)
                numbers = [int("".join(rng.choices("23456789", k=3))) for _ in keys]
                asked = rng.randrange(len(keys))
                prompt = "\n" + "".join(f"line {text(a)} {text(b)}: {n}\n" for (a, b), n in zip(keys, numbers))
                prompt += f"What is line {text(keys[asked][0])} {text(keys[asked][1])}?"
                ids = list(pieces["header"])
                for (a, b), n in zip(keys, numbers):
                    ids += [*pieces["line"], a, b, pieces["colon"], pieces["space"],
                            *(pieces["digits"][int(d)] for d in str(n)), pieces["newline"]]
                ids += [*pieces["what"], *keys[asked], pieces["question"]]
                assert sp.encode(prompt) == ids, "records on the GPU are what the tokenizer makes of the text"
                file.write(json.dumps({"prompt": prompt, "expected_number": numbers[asked], "num_lines": len(keys),
                                       "token_size": len(ids) + 1}) + "\n")
    prose = []
    for path in sorted(pathlib.Path(args.corpus).glob("train-*.txt"))[:4]:
        prose.append(np.array(sp.encode(path.read_text(encoding="utf-8")[:3_000_000]), dtype=np.uint16))
    np.save(out / "prose.npy", np.concatenate(prose)[:4_000_000])
    valid = pathlib.Path(args.corpus) / "valid.txt"
    np.save(out / "valid.npy", np.array(sp.encode(valid.read_text(encoding="utf-8")[:600_000]), dtype=np.uint16))


def records(torch, pieces, batch, length, questions, generator, device):
    """ids [batch, <= length] and, per answer token, its weight: records with `questions` questions at the end."""
    count = (length - len(pieces["header"]) - 1 - questions * QUESTION) // LINE
    words = torch.tensor(pieces["words"], device=device)
    digits = torch.tensor(pieces["digits"], device=device)
    pick = lambda high, *shape: torch.randint(high, shape, generator=generator, device=device)
    fixed = lambda ids, *lead: torch.tensor(ids, device=device).expand(*lead, len(ids))
    keys = words[pick(len(pieces["words"]), batch, count, 2)]
    numbers = digits[2 + pick(8, batch, count, 3)]
    lines = torch.cat([fixed(pieces["line"], batch, count), keys,
                       fixed([pieces["colon"], pieces["space"]], batch, count), numbers,
                       fixed([pieces["newline"]], batch, count)], -1).flatten(1)
    asked = torch.rand(batch, count, generator=generator, device=device).argsort(1)[:, :questions, None]
    ask = lambda values: values.gather(1, asked.expand(-1, -1, values.shape[-1]))
    answers = torch.cat([fixed(pieces["what"], batch, questions), ask(keys),
                         fixed([pieces["question"], pieces["space"]], batch, questions), ask(numbers),
                         fixed([pieces["newline"]], batch, questions)], -1)
    ids = torch.cat([fixed([BOS, *pieces["header"]], batch), lines, answers.flatten(1)], 1)
    weight = torch.ones(ids.shape[1], device=device)
    end = ids.shape[1]
    weight[1:end - questions * QUESTION] = 0.1  # nothing tells which word or digit a line holds
    return ids, weight


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
    def __init__(self, torch, data, device):
        self.torch, self.device = torch, device
        self.pieces = json.loads((data / "pieces.json").read_text())
        load = lambda name: torch.tensor(np.load(data / name).astype(np.int64), device=device)
        self.prose, self.valid = load("prose.npy"), load("valid.npy")
        self.generator = torch.Generator(device).manual_seed(7)

    def prose_batch(self, source, batch, length):
        start = self.torch.randint(len(source) - length, (batch, 1), generator=self.generator, device=self.device)
        ids = source[start + self.torch.arange(length, device=self.device)]
        ids[:, 0] = BOS
        return ids

    def loss(self, net, ids, weight, rotation):
        torch = self.torch
        with torch.autocast("cuda", torch.bfloat16):
            hidden = net(ids[:, :-1], [t[: ids.shape[1] - 1] for t in rotation])
            logits = hidden @ net.embed.T.to(hidden.dtype)
            each = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(),
                                                     reduction="none").view(len(ids), -1)
        return (each * weight[1:]).sum() / (weight[1:].sum() * len(ids)), each

    def train(self, net, rope, length, batch, seconds, peak):
        torch = self.torch
        rotation = rotation_of(torch, rope, length, self.device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        start, step, share = time.time(), 0, 0.0
        while share < 1:
            for group in optimizer.param_groups:  # the learning rate follows the clock
                group["lr"] = peak * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * share))
            ids, weight = records(torch, self.pieces, batch // 2, length, 4 * length // TRAINED, self.generator,
                                  self.device)
            prose = self.prose_batch(self.prose, batch // 2, length)
            total = self.loss(net, ids, weight, rotation)[0] + \
                self.loss(net, prose, torch.ones(length, device=self.device), rotation)[0]
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 20 == 0:
                torch.cuda.synchronize()
                share = (time.time() - start) / seconds
                if step % 500 == 0 or step == 20:
                    print(f"    step {step} {time.time() - start:.0f} s loss {total.item():.3f}", flush=True)
        return step

    def accuracy(self, net, rope, length):
        torch = self.torch
        right, generator = 0, torch.Generator(self.device).manual_seed(100 + length)
        batch = min(NUM_EVAL, 2 ** 18 // length)
        rotation = rotation_of(torch, rope, length, self.device)
        for _ in range(NUM_EVAL // batch):
            ids, _ = records(torch, self.pieces, batch, length, 1, generator, self.device)
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                hidden = net(ids[:, :-1], [t[: ids.shape[1] - 1] for t in rotation])[:, -ANSWER:-1]
                best = (hidden @ net.embed.T.to(hidden.dtype)).argmax(-1)
            right += (best == ids[:, -ANSWER:-1]).all(1).sum().item()
        return right / (batch * (NUM_EVAL // batch))

    def prose_loss(self, net, rope, length):
        torch = self.torch
        self.generator.manual_seed(11)
        with torch.no_grad():
            ids = self.prose_batch(self.valid, 64, length)
            rotation = rotation_of(torch, rope, length, self.device)
            each = self.loss(net, ids, torch.ones(length, device=self.device), rotation)[1]
        return each[:, -128:].mean().item()  # where the whole context is behind it


# What is fine-tuned, and with which tables it is then measured. Giraffe's evaluation scales are on both sides of the
# trained one.
NTK, YARN = {"type": "ntk-aware", "factor": 4.0}, {"type": "yarn", "factor": 4.0}
POWER = {"type": "giraffe", "power": 0.5}
TRUNCATED = {"type": "giraffe", "truncate_length": TRAINED}
DYNAMIC = {"type": "dynamic", "factor": 1.0}
linear = lambda s: {"type": "linear", "factor": float(s)}
UNTUNED = [{}, linear(2), linear(4), {"type": "ntk-aware", "factor": 2.0}, NTK, {"type": "yarn", "factor": 2.0}, YARN,
           DYNAMIC, {"type": "dynamic", "factor": 2.0}]
PLAN = [("plain", {}, [{}, linear(2)]),
        ("linear4", linear(4), [linear(2), linear(4), linear(6), linear(8), linear(16)]),
        ("linear16", linear(16), [linear(8), linear(12), linear(16), linear(32)]),
        ("power", POWER, [POWER]),
        ("truncated", TRUNCATED, [TRUNCATED, {**TRUNCATED, "factor": 2.0}]),
        ("ntk4", NTK, [NTK, {"type": "ntk-aware", "factor": 8.0}]),
        ("yarn4", YARN, [YARN, {"type": "yarn", "factor": 8.0}])]


def run(args):
    import torch

    torch.backends.cuda.matmul.allow_tf32 = True
    data, out = pathlib.Path(args.data), pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(torch, data, "cuda")
    base = make_model(torch).cuda()
    size = sum(p.numel() for p in base.parameters()) / 1e6
    print(torch.cuda.get_device_name(), f"{size:.2f} M parameters", flush=True)
    steps = trainer.train(base, {}, TRAINED, 256, args.seconds, 2e-3)
    results = {"trained": TRAINED, "tuned": TUNED, "lengths": LENGTHS, "prompts": NUM_EVAL, "base_steps": steps,
               "rows": []}

    def measure(net, name, ropes):
        for rope in ropes:
            row = {"weights": name, "rope": rope, "accuracy": [trainer.accuracy(net, rope, n) for n in LENGTHS],
                   "prose_loss": [trainer.prose_loss(net, rope, n) for n in LENGTHS]}
            results["rows"].append(row)
            print(f"{name:10s} {json.dumps(rope):48s}", " ".join(f"{a:5.2f}" for a in row["accuracy"]), " | ",
                  " ".join(f"{a:5.2f}" for a in row["prose_loss"]), flush=True)

    torch.save({"state": base.state_dict(), "rope": {}}, out / "base.pt")
    measure(base, "base", UNTUNED)
    for name, rope, ropes in PLAN:
        net = make_model(torch).cuda()
        net.load_state_dict(base.state_dict())
        print(f"  {name}: {trainer.train(net, rope, TUNED, 64, args.tune_seconds, 5e-4)} steps", flush=True)
        torch.save({"state": net.state_dict(), "rope": rope}, out / f"{name}.pt")
        measure(net, name, ropes)
    (out / "results.json").write_text(json.dumps(results, indent=1))


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


def plot(args):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(pathlib.Path(args.results).read_text())
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    groups = [("without tuning", lambda r: r["weights"] == "base"),
              ("tuned at 1,024 with the same table",
               lambda r: any(r["weights"] == n and r["rope"] == t for n, t, _ in PLAN)),
              ("tuned with linear 4 and 16: other scales", lambda r: r["weights"] in ("linear4", "linear16"))]
    for panel, (title, chosen) in zip(axes, groups):
        for row in filter(chosen, results["rows"]):
            prefix = f"{row['weights']}, eval " if panel is axes[2] else ""
            panel.plot(results["lengths"], row["accuracy"], "-o", ms=3, label=prefix + label(row))
        panel.set(xscale="log", xticks=results["lengths"], xticklabels=results["lengths"], title=title,
                  xlabel="tokens")
        panel.axvline(results["trained"], color="grey", lw=0.5)
        panel.axvline(results["tuned"], color="grey", lw=0.5, ls="--")
        panel.legend(fontsize=7)
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
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--tune-seconds", type=float, default=8)
    p = commands.add_parser("folder")
    p.add_argument("checkpoint")
    p.add_argument("--tokenizer")
    p.add_argument("--out", required=True)
    p = commands.add_parser("plot")
    p.add_argument("results")
    p.add_argument("--out", required=True)
    args = parser.parse_args()
    {"prepare": prepare, "run": run, "folder": folder, "plot": plot}[args.command](args)


if __name__ == "__main__":
    main()
