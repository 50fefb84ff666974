#!/usr/bin/env python3
"""Tokens/s and memory against the context: a lightning model beside a softmax model of the same size.

    bench/h100_report.sh OUT tnl_7b_decode llama_2_7b_contexts
    bench/plot_contexts.py OUT docs/contexts.svg

Reads OUT/*.json of `godwit bench engine`. The softmax model's bench holds each context twice, as it was read and as it decodes; one of them is
taken off its memory in use.
"""
import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend is chosen first)

MIB_PER_TOKEN = 0.5  # of the cache of Llama-2-7B: 32 layers x (k, v) x 4096 x bf16


def lines(out, pattern):
    found = [(line["context"], line["tokens_per_s"], line["used_mib"])
             for path in sorted(out.glob(pattern))
             for line in json.loads(path.read_text())["results"]["lines"] if "tokens_per_s" in line]
    return sorted(found)


def main():
    out = pathlib.Path(sys.argv[1])
    plt.rcParams.update({"svg.hashsalt": "godwit", "svg.fonttype": "none", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, colour, rows in (
            ("TNL-7B shape, lightning attention", "#1b6ca8", lines(out, "tnl_7b_decode.json")),
            ("Llama-2-7B shape, softmax attention", "#c8553d",
             [(c, rate, mib - c * MIB_PER_TOKEN) for c, rate, mib in lines(out, "llama_2_7b_*.json")])):
        contexts = [row[0] for row in rows]
        left.plot(contexts, [row[1] for row in rows], "-o", ms=4, color=colour, label=name)
        right.plot(contexts, [row[2] / 1024 for row in rows], "-o", ms=4, color=colour, label=name)
    for axes, label in ((left, "tokens/s of one sequence"), (right, "GiB in use")):
        axes.set_xscale("log", base=2)
        ticks = [1 << n for n in range(10, 21, 2)]
        axes.set_xticks(ticks, [f"{t >> 10}k" if t < 1 << 20 else "1M" for t in ticks])
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
