#!/usr/bin/env python3
"""Measures a checkpoint on the held-out works, in float32 with the weights rounded to bf16 as shipped.

    evaluate.py RUN/model.pt --data DATA --out FILE.json [--twin TWIN/model.pt] [--draft DRAFT/model.pt]
                [--tokenizer tokenizer.model] [--samples 20]

* nats per byte: the negative log-likelihood of every token of both works, end marks too, over their bytes;
  the state is carried from the first token of a work to its last.
* loss by position: the same tokens, scored with 2k, 4k, ... 64k tokens of context before them, so that only
  the context differs; and the plain curve over positions.
* where TransNormerLLM and the twin differ: tokens split by whether they continue a repetition.
* acceptance of the draft's proposals, and samples with a search for loops.
"""
import argparse
import collections
import json
import pathlib
import time

import torch
import torch.nn.functional as F

from data import Corpus
from export import load_model

SEGMENT = 2048
PROMPTS = ["Once upon a time there was", "The old house stood at the end of", "\"My dear,\" said Mrs. Bennett,",
           "It was a dark and stormy night;", "Captain Brown looked out over the sea"]


@torch.no_grad()
def stream_logits(net, corpus, works, dtype=torch.float32):
    """Yields (position in the work, hidden, targets, weights) of whole works, one lane each."""
    state = net.initial_state(len(works), corpus.device)
    ends = [w["end"] for w in works]
    for offset in range(0, max(w["end"] - w["begin"] for w in works), SEGMENT):
        inputs, targets, weights, _ = corpus.batch([w["begin"] + offset for w in works], ends, SEGMENT)
        hidden, state = net(inputs, state, dtype)
        yield offset, hidden, targets, weights


def token_nll(net, hidden, targets):
    return F.cross_entropy(net.logits(hidden).float().transpose(1, 2), targets, reduction="none")


@torch.no_grad()
def carried_nll(net, corpus, works):
    """[works][tokens] nats, state carried through each work."""
    rows = [[] for _ in works]
    for offset, hidden, targets, weights in stream_logits(net, corpus, works):
        nll = token_nll(net, hidden, targets)
        for lane, work in enumerate(works):
            left = work["end"] - work["begin"] - offset
            if left > 0:
                rows[lane].append(nll[lane, :left].cpu())
    return [torch.cat(r) for r in rows]


@torch.no_grad()
def windowed_nll(net, corpus, works, length=SEGMENT, stride=SEGMENT // 4):
    """The twin's figure: windows of the trained length, each scored on its last quarter."""
    out = []
    for work in works:
        total = work["end"] - work["begin"]
        nll = torch.zeros(total)
        starts = sorted({max(0, e - length) for e in range(length, total + stride, stride)})
        done = 0
        for i in range(0, len(starts), 16):
            part = starts[i:i + 16]
            inputs, targets, _, _ = corpus.batch([work["begin"] + s for s in part], [work["end"]] * len(part), length)
            scored = token_nll(net, net(inputs)[0], targets).cpu()
            for row, s in zip(scored, part):
                end = min(s + length, total)
                nll[done:end] = row[done - s:end - s]
                done = max(done, end)
        out.append(nll)
    return out


@torch.no_grad()
def loss_by_context(net, corpus, works, contexts):
    """Mean nats a token of the same windows of 2,048 tokens, for each length of context before them."""
    longest = max(contexts)
    windows = [(p, w["end"]) for w in works for p in range(w["begin"] + longest, w["end"] - SEGMENT, SEGMENT)]
    result = {}
    for context in contexts:
        total = 0.0
        for i in range(0, len(windows), 64):
            part = windows[i:i + 64]
            state = net.initial_state(len(part), corpus.device)
            for offset in range(-context, 1, SEGMENT):
                inputs, targets, _, _ = corpus.batch([p + offset for p, _ in part], [e for _, e in part], SEGMENT)
                hidden, state = net(inputs, state)
            total += float(token_nll(net, hidden, targets).sum())
        result[context] = total / (len(windows) * SEGMENT)
    return len(windows), result


@torch.no_grad()
def generate(net, prompts, count, temperature, seed, device, ban=()):
    """Continues every prompt (lists of ids); temperature 0 is greedy. Returns ids and top-2 margins."""
    generator = torch.Generator(device).manual_seed(seed)
    states, last = [], []
    for ids in prompts:
        hidden, state = net(torch.tensor([ids], device=device))
        last.append(hidden[:, -1])
        states.append(state)
    state, hidden = [torch.cat(layer) for layer in zip(*states)], torch.cat(last)
    out, margins = [], []
    for _ in range(count):
        logits = net.logits(hidden).float()
        for token in ban:
            logits[:, token] = -float("inf")
        top = logits.topk(2, -1).values
        margins.append((top[:, 0] - top[:, 1]).tolist())
        if temperature > 0:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            token = logits.argmax(-1, keepdim=True)
        out.append(token)
        hidden, state = net(token, state)
        hidden = hidden[:, -1]
    return torch.cat(out, 1).tolist(), list(zip(*margins))


def loop_figures(ids, n=8):
    """(times the commonest n-gram occurs, longest run of one n-gram repeated back to back at any period)."""
    grams = collections.Counter(tuple(ids[i:i + n]) for i in range(len(ids) - n + 1))
    longest = 1
    for period in range(1, 257):
        run = 0
        for i in range(period, len(ids)):
            run = run + 1 if ids[i] == ids[i - period] else 0
            if run >= n:
                longest = max(longest, 1 + run // max(period, n))
    return max(grams.values()), longest


def repetition_classes(ids, window=SEGMENT):
    """Per token: 2 if it continues a trigram seen within the window, 1 if it occurred there alone, else 0."""
    last_token, last_trigram, classes = {}, {}, []
    for i, token in enumerate(ids):
        trigram = tuple(ids[max(0, i - 2):i + 1])
        if i - last_trigram.get(trigram, -10 ** 9) <= window:
            classes.append(2)
        elif i - last_token.get(token, -10 ** 9) <= window:
            classes.append(1)
        else:
            classes.append(0)
        last_token[token], last_trigram[trigram] = i, i
    return torch.tensor(classes)


@torch.no_grad()
def acceptance(target, draft, corpus, works, temperatures=(1.0, 0.8)):
    """Expected acceptance of a draft token at positions of held-out text, and greedy agreement."""
    sums, count, agree = collections.defaultdict(float), 0.0, 0.0
    for (_, a, _, weights), (_, b, _, _) in zip(stream_logits(target, corpus, works),
                                                stream_logits(draft, corpus, works)):
        p, q = target.logits(a).float(), draft.logits(b).float()
        agree += float(((p.argmax(-1) == q.argmax(-1)) * weights).sum())
        for t in temperatures:
            overlap = torch.minimum((p / t).softmax(-1), (q / t).softmax(-1)).sum(-1)
            sums[t] += float((overlap * weights).sum())
        count += float(weights.sum())
    return {f"temperature {t}": sums[t] / count for t in temperatures} | {"greedy": agree / count}


def held_out_figures(args, net, corpus, works, device, result, save):
    num_bytes = result["valid_bytes"]
    nll = carried_nll(net, corpus, works)
    save(nats_per_byte=float(sum(r.double().sum() for r in nll)) / num_bytes,
         nats_per_token=float(torch.cat(nll).double().mean()),
         by_work={w["title"]: float(r.double().sum()) / w["num_bytes"] for w, r in zip(works, nll)})
    # A work's loss by position, in bins of 4,096 tokens.
    save(curve=[[float(part.mean()) for part in r.split(4096)] for r in nll])
    if args.twin:
        twin = load_model(args.twin, device)
        other = windowed_nll(twin, corpus, works)
        classes = torch.cat([repetition_classes(corpus.tokens[w["begin"]:w["end"]].tolist()) for w in works])
        ours, theirs = torch.cat(nll), torch.cat(other)
        names = ["new within 2,048 tokens", "token seen", "trigram seen"]
        save(twin=dict(parameters=twin.num_parameters(), nats_per_byte=float(theirs.double().sum()) / num_bytes,
                       nats_per_token=float(theirs.mean()),
                       classes={name: dict(share=float((classes == c).float().mean()),
                                           ours=float(ours[classes == c].mean()),
                                           twin=float(theirs[classes == c].mean()))
                                for c, name in enumerate(names)}))
        # The same two models on text they were trained on: 16 stretches of training works.
        spans = [dict(begin=w["begin"], end=min(w["end"], w["begin"] + 16384))
                 for w in corpus.works["train"][::10]]
        seen_ours, seen_twin = carried_nll(net, corpus, spans), windowed_nll(twin, corpus, spans)
        save(on_training_text=dict(ours=float(torch.cat(seen_ours).mean()), twin=float(torch.cat(seen_twin).mean())))
    for path in args.draft:
        draft = load_model(path, device)
        drafts = result.get("drafts", {})
        rows = carried_nll(draft, corpus, works)
        drafts[path] = dict(parameters=draft.num_parameters(), acceptance=acceptance(net, draft, corpus, works),
                            nats_per_byte=float(sum(r.double().sum() for r in rows)) / num_bytes)
        save(drafts=drafts)
    if net.cfg.family == "transnormer":
        began = time.time()
        torch.set_float32_matmul_precision("high")
        contexts = [0] + [1024 * 2 ** i for i in range(1, 7)]
        windows, table = loss_by_context(net, corpus, works, contexts)
        save(windows=windows, by_context={str(k): v for k, v in table.items()}, seconds=time.time() - began)
        torch.set_float32_matmul_precision("highest")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("checkpoint")
    p.add_argument("--data", required=True)
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--twin")
    p.add_argument("--draft", nargs="*", default=[])
    p.add_argument("--tokenizer")
    p.add_argument("--samples", type=int, default=0)
    p.add_argument("--only-samples", action="store_true", help="skip the held-out figures")
    p.add_argument("--sample-tokens", type=int, default=2000)
    args = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    corpus = Corpus(args.data, device)
    works = corpus.works["valid"]
    num_bytes = sum(w["num_bytes"] for w in works)
    net = load_model(args.checkpoint, device)
    result = dict(parameters=net.num_parameters(), valid_bytes=num_bytes,
                  valid_tokens=sum(w["end"] - w["begin"] for w in works))

    def save(**more):
        result.update(more)
        args.out.write_text(json.dumps(result))
        print(" ".join(f"{k}: {str(v)[:300]}" for k, v in more.items()), flush=True)

    if not args.only_samples:
        held_out_figures(args, net, corpus, works, device, result, save)
    if args.samples:
        import sentencepiece as spm
        processor = spm.SentencePieceProcessor(model_file=args.tokenizer)
        prompt_ids = [processor.encode(PROMPTS[i % len(PROMPTS)]) for i in range(args.samples)]
        # The end mark is banned: a sample must go on for its 2,000 tokens.
        ids, _ = generate(net, prompt_ids, args.sample_tokens, 0.8, 7, device, ban=(0, 2))
        figures = [loop_figures(row) for row in ids]
        save(loops=dict(commonest_8_gram=[f[0] for f in figures], back_to_back=[f[1] for f in figures]))
        save(samples=[processor.decode(prompt + row) for prompt, row in zip(prompt_ids, ids)])


if __name__ == "__main__":
    main()
