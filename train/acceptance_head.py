#!/usr/bin/env python3
"""Trains the acceptance head of a draft model from rounds that `godwit record` wrote.

    acceptance_head.py train RECORD.safetensors... --out FOLDER --report REPORT.json
                       [--kind mlp|linear|specdecpp] [--label pre|post] [--width 64] [--layers 3]
    acceptance_head.py sample RECORD.safetensors --head FOLDER --out SAMPLE.safetensors

Writes acceptance_head.safetensors and acceptance_head.json, as engine/acceptance_head.h reads them. Needs numpy.

* Data. Rounds with all drafts and no stop, of the distributions that are served; give records of several
  temperatures, greedy among them. Prompts are split by number: 14 of 20 train, 3 calibrate, 3 test.
* Labels. pre: 1 - ||p - q||_1 / 2, before the draft is drawn; post: min(1, p / q) of the draft. A draft counts
  with the probability that all before it are accepted, the product of their min(1, p / q): what survival
  products are made of, without the noise of one accept or reject.
* Loss. Binary cross entropy, rejections weighted by --reject-weight (2405.19715; undone when served).
* Calibration. One temperature per place in the round, greedy and sampled apart, each chosen for the likelihood of
  the product up to its place with those before it fixed.
* Report. Per draft and on the product: AUROC, expected calibration error in 20 bins, Brier score; against the
  draft's top-1 probability, margin and entropy, each through a logistic per place fitted to the same data.
"""
import argparse
import datetime
import json
import pathlib
import struct

import numpy as np

NUM_FEATURES = 5  # AcceptanceHeadArgs: ln(1 + margin), top-1 probability, entropy, temperature, place
MARGIN, TOP1, ENTROPY, TEMPERATURE, PLACE = range(NUM_FEATURES)
TYPES = {"F32": np.float32, "I32": np.int32}


# --- Files

def read_safetensors(path):
    data = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, entry in json.loads(data[8:8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        array = np.frombuffer(data[8 + length + begin:8 + length + end], TYPES[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
    return tensors


def write_safetensors(path, tensors):
    header, blobs, offset = {}, [], 0
    names = {np.dtype(dtype): name for name, dtype in TYPES.items()}
    for name, array in tensors.items():
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape),
                        "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


# --- Rounds

class Rounds:
    """Records as [rounds, places]; every array of the same shape."""

    def __init__(self, paths, label):
        parts = [self._read(path, label) for path in paths]
        for name in parts[0]:
            setattr(self, name, np.concatenate([part[name] for part in parts]))

    @staticmethod
    def _read(path, label):
        record = read_safetensors(path)
        places = int(record["place"].max()) + 1
        ends = np.flatnonzero(np.diff(record["round"])) + 1
        lengths = np.diff(np.concatenate([[0], ends, [len(record["round"])]]))
        # Rounds that the end of a text cut short tell less and would need a mask.
        keep = np.repeat(lengths == places, lengths)
        grid = {name: array[keep].reshape((-1, places) + array.shape[1:]) for name, array in record.items()}
        hidden, features = grid["hidden"], grid["features"]
        before, after = grid["before_draw"].astype(np.float64), grid["after_draw"].astype(np.float64)
        if label == "post":  # the pass that reads a draft judges it, so the last one is judged by none
            hidden, features = hidden[:, 1:], features[:, :-1]
            before, after = before[:, :-1], after[:, :-1]
        alive = np.cumprod(np.concatenate([np.ones_like(after[:, :1]), after[:, :-1]], axis=1), axis=1)
        own = after if label == "post" else before
        return {"hidden": hidden, "features": features, "label": own, "alive": alive, "survival": alive * own,
                "prompt": grid["prompt"][:, 0], "greedy": features[:, 0, TEMPERATURE] == 0}

    def select(self, chosen):
        part = object.__new__(Rounds)
        for name, array in vars(self).items():
            setattr(part, name, array[chosen])
        return part

    def split(self):
        turn = self.prompt % 20
        return self.select(turn < 14), self.select((turn >= 14) & (turn < 17)), self.select(turn >= 17)


# --- Heads: logits of [n, H] hidden states and [n, F] features, and the gradient of their parameters

def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -60, 60)))


def silu(x):
    return x * sigmoid(x)


def silu_slope(x):
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


class Linear:
    def __init__(self, hidden_size, args, random):
        self.p = {"w": np.zeros(hidden_size), "f": np.zeros(NUM_FEATURES), "b": np.zeros(1)}

    def logits(self, x, f):
        return x @ self.p["w"] + f @ self.p["f"] + self.p["b"]

    def gradient(self, x, f, slope):
        return {"w": slope @ x, "f": slope @ f, "b": slope.sum(keepdims=True)}

    def tensors(self, mean, scale):
        features = self.p["f"] / scale
        return {"readout.weight": self.p["w"][None], "readout.features": features[None],
                "readout.bias": self.p["b"] - features @ mean}

    def config(self):
        return {"kind": "linear"}


class Mlp:
    def __init__(self, hidden_size, args, random):
        width = args.width
        self.p = {"w": random.normal(0, hidden_size**-0.5, (width, hidden_size)),
                  "f": random.normal(0, NUM_FEATURES**-0.5, (NUM_FEATURES, width)), "b": np.zeros(width),
                  "o": np.zeros(width), "c": np.zeros(1)}

    def inner(self, x, f):
        return x @ self.p["w"].T + f @ self.p["f"] + self.p["b"]

    def logits(self, x, f):
        return silu(self.inner(x, f)) @ self.p["o"] + self.p["c"]

    def gradient(self, x, f, slope):
        inner = self.inner(x, f)
        back = slope[:, None] * self.p["o"] * silu_slope(inner)
        return {"w": back.T @ x, "f": f.T @ back, "b": back.sum(0), "o": slope @ silu(inner),
                "c": slope.sum(keepdims=True)}

    def tensors(self, mean, scale):
        features = self.p["f"] / scale[:, None]
        return {"hidden.weight": self.p["w"], "hidden.features": features, "hidden.bias": self.p["b"] - mean @ features,
                "readout.weight": self.p["o"][None], "readout.bias": self.p["c"]}

    def config(self):
        return {"kind": "mlp", "width": len(self.p["o"])}


class SpecDecPP:
    """D residual SiLU layers that share their weights, then two logits; no features."""

    def __init__(self, hidden_size, args, random):
        bound = hidden_size**-0.5
        self.layers = args.layers
        self.p = {"w": random.uniform(-bound, bound, (hidden_size, hidden_size)) * 0.1, "b": np.zeros(hidden_size),
                  "o": np.zeros((2, hidden_size)), "c": np.zeros(2)}

    def states(self, x):
        states = [(x, None)]
        for _ in range(self.layers):
            inner = x @ self.p["w"].T + self.p["b"]
            x = x + silu(inner)
            states.append((x, inner))
        return states

    def logits(self, x, f):
        y = self.states(x)[-1][0] @ self.p["o"].T + self.p["c"]
        return y[:, 1] - y[:, 0]

    def gradient(self, x, f, slope):
        states = self.states(x)
        two = np.stack([-slope, slope])
        back = slope[:, None] * (self.p["o"][1] - self.p["o"][0])
        result = {"o": two @ states[-1][0], "c": two.sum(1), "w": 0, "b": 0}
        for (before, _), (_, inner) in zip(states[-2::-1], states[:0:-1]):
            inner_back = back * silu_slope(inner)
            result["w"] = result["w"] + inner_back.T @ before
            result["b"] = result["b"] + inner_back.sum(0)
            back = back + inner_back @ self.p["w"]
        return result

    def tensors(self, mean, scale):
        tensors = {f"model.{self.layers}.weight": self.p["o"], f"model.{self.layers}.bias": self.p["c"]}
        return tensors | {"model.0.linear.weight": self.p["w"], "model.0.linear.bias": self.p["b"]}

    def config(self):
        return {"kind": "specdecpp", "num_layers": self.layers}


KINDS = {"linear": Linear, "mlp": Mlp, "specdecpp": SpecDecPP}


# --- Training

def flat(rounds):
    return (rounds.hidden.reshape(-1, rounds.hidden.shape[-1]), rounds.features.reshape(-1, NUM_FEATURES),
            rounds.label.ravel(), rounds.alive.ravel())


def cross_entropy(logits, label, weight, reject_weight):
    accept, reject = weight * label, reject_weight * weight * (1 - label)
    return (accept * np.logaddexp(0, -logits) + reject * np.logaddexp(0, logits)).sum() / (accept + reject).sum()


def train(head, train_part, held_out, args, random):
    """Adam on minibatches, cosine rate; keeps the weights of the epoch that is best on held_out."""
    x, f, label, weight = flat(train_part)
    mean, scale = f.mean(0), f.std(0) + 1e-6
    f = (f - mean) / scale
    chosen = np.flatnonzero(weight > 1e-3)  # the others add nothing
    x, f, label, weight = x[chosen], f[chosen], label[chosen], weight[chosen]
    hx, hf, hl, hw = flat(held_out)
    hf = (hf - mean) / scale
    m = {name: np.zeros_like(value) for name, value in head.p.items()}
    v = {name: np.zeros_like(value) for name, value in head.p.items()}
    steps = args.epochs * (len(x) // args.batch + 1)
    step, best = 0, (np.inf, None)
    for epoch in range(args.epochs):
        order = random.permutation(len(x))
        for begin in range(0, len(order), args.batch):
            rows = order[begin:begin + args.batch]
            p = sigmoid(head.logits(x[rows], f[rows]))
            accept, reject = weight[rows] * label[rows], args.reject_weight * weight[rows] * (1 - label[rows])
            slope = (p * (accept + reject) - accept) / (accept + reject).sum()
            step += 1
            rate = args.rate * min(1, step / (0.03 * steps)) * 0.5 * (1 + np.cos(np.pi * step / (steps + 1)))
            for name, g in head.gradient(x[rows], f[rows], slope).items():
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.99 * v[name] + 0.01 * g * g
                update = m[name] / (1 - 0.9**step) / (np.sqrt(v[name] / (1 - 0.99**step)) + 1e-8)
                decay = args.decay if head.p[name].ndim > 1 else 0
                head.p[name] = head.p[name] * (1 - rate * decay) - rate * update
        loss = cross_entropy(head.logits(hx, hf), hl, hw, args.reject_weight)
        if loss < best[0]:
            best = (loss, {name: value.copy() for name, value in head.p.items()})
        print(f"epoch {epoch + 1}: held-out loss {loss:.5f}", flush=True)
    head.p = best[1]
    return mean, scale


def calibrate(logits, rounds):
    """A temperature per place: the product's likelihood, those before it fixed."""
    grid = np.exp(np.linspace(np.log(0.25), np.log(4), 121))
    product, temperatures = np.ones(len(logits)), []
    for place in range(logits.shape[1]):
        target = rounds.survival[:, place]

        def loss(temperature):
            c = np.clip(product * sigmoid(logits[:, place] / temperature), 1e-9, 1 - 1e-9)
            prior = 2 * np.log(temperature)**2 / len(c)  # where few rounds survive so far, stay near 1
            return prior - (target * np.log(c) + (1 - target) * np.log1p(-c)).mean()

        temperatures.append(float(min(grid, key=loss)))
        product = product * sigmoid(logits[:, place] / temperatures[-1])
    return temperatures


# --- Measures

def auroc(score, label, weight):
    """Of soft labels: a draft is accepted with weight w l and rejected with w (1 - l)."""
    order = np.argsort(score, kind="stable")
    score, accept, reject = score[order], (weight * label)[order], (weight * (1 - label))[order]
    group = np.concatenate([[0], np.cumsum(np.diff(score) > 0)])  # ties count half
    accept, reject = np.bincount(group, accept), np.bincount(group, reject)
    below = np.cumsum(reject) - reject
    return float((accept * (below + reject / 2)).sum() / (accept.sum() * reject.sum()))


def calibration_error(p, target, weight, bins=20):
    index = np.minimum((p * bins).astype(int), bins - 1)
    gap = np.bincount(index, weight * (p - target), bins)
    return float(np.abs(gap).sum() / weight.sum())


def measure(p, rounds):
    """p: [rounds, places] of acceptance if all before are accepted."""
    product = np.cumprod(p, axis=1)
    places = range(p.shape[1])
    ones = np.ones(len(p))
    return {
        "auroc": auroc(p.ravel(), rounds.label.ravel(), rounds.alive.ravel()),
        "ece": calibration_error(p.ravel(), rounds.label.ravel(), rounds.alive.ravel()),
        "brier": float((rounds.alive * ((p - rounds.label)**2 + rounds.label * (1 - rounds.label))).sum() /
                       rounds.alive.sum()),
        "cumulative_auroc": auroc(product.ravel(), rounds.survival.ravel(), np.ones(p.size)),
        "cumulative_ece": calibration_error(product.ravel(), rounds.survival.ravel(), np.ones(p.size)),
        "cumulative_ece_worst_place": max(calibration_error(product[:, i], rounds.survival[:, i], ones) for i in places),
        "mean_prediction": float((rounds.alive * p).sum() / rounds.alive.sum()),
        "mean_label": float((rounds.alive * rounds.label).sum() / rounds.alive.sum()),
    }


def logistic_per_place(x, rounds, train_x, train_rounds):
    """What a policy without a head does: two numbers a place, fitted by Newton steps."""
    result = np.empty(x.shape)
    for place in range(x.shape[1]):
        tx, label, weight = train_x[:, place], train_rounds.label[:, place], train_rounds.alive[:, place]
        w = np.zeros(2)
        design = np.stack([np.ones_like(tx), tx])
        for _ in range(30):
            p = sigmoid(w @ design)
            gradient = design @ (weight * (label - p))
            hessian = (design * (weight * p * (1 - p))) @ design.T + 1e-6 * np.eye(2)
            w = w + np.linalg.solve(hessian, gradient)
        result[:, place] = sigmoid(w[0] + w[1] * x[:, place])
    return result


def report_class(p, rounds, train_rounds):
    scores = {"top1": lambda f: f[..., TOP1], "margin": lambda f: f[..., MARGIN], "entropy": lambda f: -f[..., ENTROPY]}
    result = {"rounds": len(p), "head": measure(p, rounds),
              "truth": {"auroc": auroc(rounds.label.ravel(), rounds.label.ravel(), rounds.alive.ravel())}}
    for name, score in scores.items():
        x, train_x = score(rounds.features).astype(np.float64), score(train_rounds.features).astype(np.float64)
        result[name] = measure(logistic_per_place(x, rounds, train_x, train_rounds), rounds)
        result[name]["raw_auroc"] = auroc(x.ravel(), rounds.label.ravel(), rounds.alive.ravel())
    return result


# --- Commands

def logits_of(head, rounds, mean, scale):
    x, f, _, _ = flat(rounds)
    return head.logits(x, (f - mean) / scale).reshape(rounds.label.shape)


def predict(logits, rounds, temperatures):
    p = np.empty(logits.shape)
    for name, chosen in (("greedy", rounds.greedy), ("sampled", ~rounds.greedy)):
        p[chosen] = sigmoid(logits[chosen] / np.array(temperatures.get(name, [1.0] * logits.shape[1])))
    return p


def run_train(args):
    random = np.random.default_rng(args.seed)
    rounds = Rounds(args.records, args.label)
    parts = rounds.split()
    print(f"{len(rounds.prompt)} rounds: {[len(part.prompt) for part in parts]} to train, calibrate, test", flush=True)
    head = KINDS[args.kind](rounds.hidden.shape[-1], args, random)
    mean, scale = train(head, parts[0], parts[1], args, random)
    undone = np.log(args.reject_weight)
    temperatures = {}
    for name, greedy in (("greedy", True), ("sampled", False)):
        chosen = parts[1].greedy == greedy
        if chosen.any():
            part = parts[1].select(chosen)
            temperatures[name] = calibrate(logits_of(head, part, mean, scale) + undone, part)
    logits = logits_of(head, parts[2], mean, scale) + undone
    p = predict(logits, parts[2], temperatures)
    report = {"kind": head.config(), "label": args.label, "records": [pathlib.Path(r).name for r in args.records],
              "rounds": [len(part.prompt) for part in parts], "temperature": temperatures,
              "uncalibrated": measure(sigmoid(logits), parts[2]), "all": report_class(p, parts[2], parts[0])}
    classes = [("greedy", parts[2].greedy)] + [
        (f"temperature {t:g}", parts[2].features[:, 0, TEMPERATURE] == t)
        for t in np.unique(parts[2].features[:, 0, TEMPERATURE]) if t > 0]
    for name, chosen in classes:
        temperature = parts[2].features[chosen][0, 0, TEMPERATURE]
        same = parts[0].features[:, 0, TEMPERATURE] == temperature
        report[name] = report_class(p[chosen], parts[2].select(chosen), parts[0].select(same))
    out = pathlib.Path(args.out)
    tensors = {name: np.asarray(value, np.float32) for name, value in head.tensors(mean, scale).items()}
    write_safetensors(out / "acceptance_head.safetensors", tensors)
    config = head.config() | {
        "label": args.label, "hidden_size": rounds.hidden.shape[-1], "reject_weight": args.reject_weight,
        "temperature": {name: [round(t, 4) for t in values] for name, values in temperatures.items()},
        "recorded": {"temperatures": sorted({round(float(t), 4) for t in rounds.features[:, 0, TEMPERATURE]}),
                     "rounds": len(rounds.prompt), "drafts_a_round": rounds.label.shape[1],
                     "mean_acceptance": round(report["all"]["head"]["mean_label"], 4),
                     "date": datetime.date.today().isoformat()}}
    (out / "acceptance_head.json").write_text(json.dumps(config, indent=1) + "\n")
    pathlib.Path(args.report).write_text(json.dumps(report, indent=1) + "\n")
    for name, part in report.items():
        if not isinstance(part, dict) or "head" not in part:
            continue
        print(f"{name}: AUROC of the label itself {part['truth']['auroc']:.4f}")
        for score in ("head", "top1", "margin", "entropy"):
            s = part[score]
            print(f"  {score:8s} AUROC {s['auroc']:.4f}  ECE {s['ece']:.4f}  Brier {s['brier']:.4f}  product: AUROC "
                  f"{s['cumulative_auroc']:.4f}  ECE {s['cumulative_ece']:.4f}, worst place "
                  f"{s['cumulative_ece_worst_place']:.4f}")


def run_sample(args):
    """Some recorded drafts and what this script says of them, for the test of the engine's side."""
    tensors = read_safetensors(pathlib.Path(args.head) / "acceptance_head.safetensors")
    rounds = Rounds(args.records, "pre")
    _, _, rounds = rounds.split()
    x, f, label, alive = flat(rounds)
    rows = np.flatnonzero(alive > 0.3)
    rows = np.sort(np.random.default_rng(args.seed).choice(rows, args.count, replace=False))
    x = (np.ascontiguousarray(x[rows], np.float32).view(np.uint32) & 0xffff0000).view(np.float32)  # as bf16
    inner = x.astype(np.float64) @ tensors["hidden.weight"].T + f[rows] @ tensors["hidden.features"] + tensors["hidden.bias"]
    logits = silu(inner) @ tensors["readout.weight"][0] + tensors["readout.bias"]
    write_safetensors(args.out, {"hidden": x, "features": f[rows].astype(np.float32),
                                 "label": label[rows].astype(np.float32), "logits": logits.astype(np.float32)})
    print(f"AUROC {auroc(logits, label[rows], np.ones(len(rows))):.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train")
    command.add_argument("records", nargs="+")
    command.add_argument("--out", required=True)
    command.add_argument("--report", required=True)
    command.add_argument("--kind", choices=KINDS, default="mlp")
    command.add_argument("--label", choices=["pre", "post"], default="pre")
    command.add_argument("--width", type=int, default=64)
    command.add_argument("--layers", type=int, default=3)
    command.add_argument("--reject-weight", type=float, default=1)
    command.add_argument("--epochs", type=int, default=12)
    command.add_argument("--batch", type=int, default=2048)
    command.add_argument("--rate", type=float, default=2e-3)
    command.add_argument("--decay", type=float, default=0.05)
    command.add_argument("--seed", type=int, default=1)
    command = commands.add_parser("sample")
    command.add_argument("records", nargs="+")
    command.add_argument("--head", required=True)
    command.add_argument("--out", required=True)
    command.add_argument("--count", type=int, default=160)
    command.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.command == "train" and args.kind != "specdecpp" and args.label == "post":
        parser.error("only specdecpp heads take --label post")
    run_train(args) if args.command == "train" else run_sample(args)


if __name__ == "__main__":
    main()
