#!/usr/bin/env python3
"""The pictures of the model cards.

    plot.py loss     --out loss.png NAME=LOG.jsonl ...     training and held-out loss over tokens read
    plot.py position --out position.png EVAL.json          held-out loss by context and by position
"""
import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend is chosen first)

COLOURS = ["#1b6ca8", "#c8553d", "#588157", "#6d597a"]
# Bytes a token of the training text under this tokenizer: puts both curves on one axis.
TRAIN_BYTES_PER_TOKEN = 3.5578


def loss(runs, axes):
    for colour, run in zip(COLOURS, runs):
        name, path = run.split("=")
        rows = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
        rows = [r for r in rows if "train_nats_per_token" in r][1:]
        tokens = [r["tokens"] / 1e6 for r in rows]
        axes.plot(tokens, [r["valid_nats_per_byte"] for r in rows], "-o", ms=3, color=colour,
                  label=f"{name}, held out")
        axes.plot(tokens, [r["train_nats_per_token"] / TRAIN_BYTES_PER_TOKEN for r in rows], "--",
                  color=colour, alpha=0.6, label=f"{name}, training (with its dropout)")
    axes.set_xlabel("million tokens read (one epoch: 29.4)")
    axes.set_ylabel("nats per byte")
    axes.set_ylim(top=1.25)
    axes.legend(fontsize=7)


def position(path, figure):
    result = json.loads(pathlib.Path(path).read_text())
    left, right = figure.subplots(1, 2, sharey=True)
    contexts = {int(k): v for k, v in result["by_context"].items()}
    lengths = [c for c in sorted(contexts) if c]
    at_trained = contexts[2048]
    left.semilogx(lengths, [contexts[c] for c in lengths], "-o", base=2, color=COLOURS[0])
    left.axhspan(at_trained * 0.97, at_trained * 1.03, color=COLOURS[0], alpha=0.1, label="within 3 %")
    left.set_xlabel("tokens of context before the window")
    left.set_ylabel("nats per token")
    left.set_title(f"the same {result['windows']} windows of 2,048 tokens", fontsize=9)
    left.legend(fontsize=7)
    for colour, curve, name in zip(COLOURS[1:], result["curve"], result["by_work"]):
        right.plot([4.096 * i + 2.048 for i in range(len(curve))], curve, color=colour, label=name)
    right.axvline(65.536, color="grey", lw=0.5)
    right.set_xlabel("position in the work, thousand tokens (bins of 4,096)")
    right.set_title("the text itself varies more than the model", fontsize=9)
    right.legend(fontsize=7)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=["loss", "position"])
    parser.add_argument("--out", required=True)
    parser.add_argument("inputs", nargs="+")
    args = parser.parse_args()
    figure = plt.figure(figsize=(6.4, 4) if args.kind == "loss" else (9, 3.6))
    if args.kind == "loss":
        loss(args.inputs, figure.subplots())
    else:
        position(args.inputs[0], figure)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)
