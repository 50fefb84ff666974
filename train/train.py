#!/usr/bin/env python3
"""Trains one model on one GPU.

    train.py target --data DATA --out RUN --seconds 600 [--teacher TWIN/model.pt]
    train.py twin   --data DATA --out RUN --seconds 250
    train.py draft  --data DATA --out RUN --seconds 60  [--teacher TARGET/model.pt --distill 0.9]
    train.py pair-target | pair-draft ...                the larger pair (pair.sh)

Writes RUN/model.pt (float32 weights) and RUN/log.jsonl. The schedule follows the clock (--seconds), so
that a run fits a lease whatever the GPU's speed; the log says how many steps and tokens that were.
"""
import argparse
import dataclasses
import json
import pathlib
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import model as M
from data import Corpus, InventedCorpus, Lanes

PRESETS = {
    "target": dict(family="transnormer", dim=384, layers=12, heads=6, glu=1024),
    "twin": dict(family="llama", dim=384, layers=12, heads=6, glu=1152),
    "draft": dict(family="transnormer", dim=192, layers=3, heads=3, glu=384),
    "pair-target": dict(family="transnormer", dim=640, layers=24, heads=10, glu=1600),
    "pair-draft": dict(family="transnormer", dim=512, layers=3, heads=8, glu=1280),
}
# 32 of the 4,096 probabilities hold most of the teacher's mass; the rest is one bucket.
SOFT_LABELS = 32


def head_loss(hidden, embed, targets, weights, ids, probs, distill, distance):
    """Mean cross-entropy and the loss to minimise; hidden [B, T, d], ids and probs [B, T, K] or None.

    distance (a tensor): weight of the total variation to the teacher, 1 - what speculation accepts.
    """
    logits = F.linear(hidden, embed.to(hidden.dtype)).float()
    log_z = torch.logsumexp(logits, -1)
    total = weights.sum()
    cross_entropy = ((log_z - logits.gather(-1, targets[..., None])[..., 0]) * weights).sum() / total
    if ids is None:
        return cross_entropy, cross_entropy
    # KL to the teacher up to a constant, the tail lumped into one event.
    log_q = logits.gather(-1, ids) - log_z[..., None]
    tail_q = (1 - log_q.exp().sum(-1)).clamp(min=1e-4)
    tail_p = (1 - probs.sum(-1)).clamp(min=0)
    soft = -((probs * log_q).sum(-1) + tail_p * tail_q.log())
    soft = soft + distance * 0.5 * ((probs - log_q.exp()).abs().sum(-1) + (tail_p - tail_q).abs())
    soft = (soft * weights).sum() / total
    return cross_entropy, (1 - distill) * cross_entropy + distill * soft


def orthogonalise(g):
    """Newton-Schulz towards U V^T for a batch of matrices [N, r, c] (the Muon optimizer's step)."""
    x = g.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.transpose(-1, -2)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.transpose(-1, -2) if tall else x


class Muon:
    """Momentum, orthogonalised; for the matrices inside the layers. Stacks are batches of matrices."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        self.params, self.lr, self.weight_decay, self.momentum = params, lr, weight_decay, momentum
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, scale):
        lr = self.lr * scale
        for p, buffer in zip(self.params, self.buffers):
            buffer.lerp_(p.grad, 1 - self.momentum)
            update = p.grad.lerp(buffer, self.momentum).flatten(0, -3)
            shape_gain = max(1.0, p.size(-2) / p.size(-1)) ** 0.5
            p.mul_(1 - lr * self.weight_decay)
            p.add_(orthogonalise(update).view_as(p), alpha=-lr * shape_gain)


@torch.no_grad()
def quick_valid(net, corpus, length):
    """Held-out nats per byte, estimated on the second halves of windows: fast, always the same tokens.

    TransNormerLLM sees `length` tokens before those it is scored on; the twin half as many.
    """
    works = corpus.works["valid"]
    carries = net.cfg.family == "transnormer"
    stride = length if carries else length // 2
    starts = [(p, w["end"]) for w in works for p in range(w["begin"], w["end"] - 2 * length, stride)]
    loss, count = 0.0, 0.0
    for i in range(0, len(starts), 32):
        firsts, ends = zip(*starts[i:i + 32])
        state = None
        if carries:
            inputs, *_ = corpus.batch(firsts, ends, length)
            _, state = net(inputs, None, torch.bfloat16)
            firsts = [f + length for f in firsts]
        inputs, targets, weights, _ = corpus.batch(firsts, ends, length)
        if not carries:
            weights[:, :length // 2] = 0
        hidden, _ = net(inputs, state, torch.bfloat16)
        nll = F.cross_entropy(net.logits(hidden).float().flatten(0, 1), targets.flatten(), reduction="none")
        loss += float((nll * weights.flatten()).sum())
        count += float(weights.sum())
    tokens_per_byte = sum(w["end"] - w["begin"] for w in works) / sum(w["num_bytes"] for w in works)
    return loss / count * tokens_per_byte


def share_of(works, num_tokens, seed):
    """Works of about num_tokens together, drawn at random; all of them for 0."""
    if num_tokens == 0:
        return works
    share, total = [], 0
    for index in np.random.default_rng(seed).permutation(len(works)):
        share.append(works[index])
        total += works[index]["end"] - works[index]["begin"]
        if total >= num_tokens:
            break
    return share


@torch.no_grad()
def soft_labels(teacher, corpus, works, length, lanes):
    """The teacher's largest SOFT_LABELS probabilities for every token of the works: ids int16, probs half."""
    num = len(corpus.tokens)
    ids = torch.zeros(num, SOFT_LABELS, dtype=torch.int16, device=corpus.device)
    probs = torch.zeros(num, SOFT_LABELS, dtype=torch.float16, device=corpus.device)

    def write(hidden, position, weights):
        log_p = F.log_softmax(teacher.logits(hidden).float(), -1)
        top, index = log_p.topk(SOFT_LABELS, -1)
        chosen = weights > 0
        ids[position[chosen]] = index[chosen].to(torch.int16)
        probs[position[chosen]] = top[chosen].exp().half()

    if teacher.cfg.family == "transnormer":
        reader, state = Lanes(works, lanes, length, 0, forever=False), None
        state = teacher.initial_state(lanes, corpus.device)
        while (item := reader.next()) is not None:
            firsts, ends, keep = item
            inputs, _, weights, position = corpus.batch(firsts, ends, length)
            keep = torch.tensor(keep, device=corpus.device).view(-1, 1, 1, 1)
            hidden, state = teacher(inputs, [s * keep for s in state], torch.bfloat16)
            write(hidden, position, weights)
        return ids, probs
    # The twin has no state: windows that overlap by a quarter, scored behind the overlap.
    overlap = length // 4
    windows = []  # (first target, end of the work, targets to skip)
    for work in works:
        for first in range(work["begin"], work["end"], length - overlap):
            windows.append((first, work["end"], overlap if first > work["begin"] else 0))
    for i in range(0, len(windows), lanes):
        firsts, ends, skips = zip(*windows[i:i + lanes])
        inputs, _, weights, position = corpus.batch(firsts, ends, length)
        behind = torch.arange(length)[None] >= torch.tensor(skips)[:, None]
        hidden, _ = teacher(inputs, None, torch.bfloat16)
        write(hidden, position, weights * behind.to(weights))
    return ids, probs


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("preset", choices=PRESETS)
    p.add_argument("--data", required=True)
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--seconds", type=float, required=True, help="training time, compilation not counted")
    p.add_argument("--lanes", type=int, default=32)
    p.add_argument("--length", type=int, default=2048, help="tokens a segment")
    p.add_argument("--lr", type=float, default=0.01, help="Muon, for matrices")
    p.add_argument("--embed-lr", type=float, default=0.003, help="AdamW, for the embedding")
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--reset-rate", type=float, default=0.04)
    p.add_argument("--stable", type=float, default=0.35, help="share of the run at the full rate")
    p.add_argument("--teacher", help="checkpoint whose probabilities are mixed into the targets;\n"
                   "its preset with --compile-only")
    p.add_argument("--distill", type=float, default=0.5)
    p.add_argument("--distance", type=float, default=0.0,
                   help="weight of the total variation to the teacher at the end of training; it grows from 0")
    p.add_argument("--label-tokens", type=int, default=0,
                   help="the teacher labels works of so many tokens and training reads only these; 0: all")
    p.add_argument("--evals", type=int, default=14)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="override the preset")
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--compile-only", action="store_true",
                   help="fills the compiler's cache and ends: for another process meanwhile, with invented data")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    overrides = {k: int(v) for k, v in (item.split("=") for item in args.set)}
    cfg = M.Config(**{**PRESETS[args.preset], **overrides})
    corpus = InventedCorpus(cfg.vocab_size, device) if args.compile_only else Corpus(args.data, device)
    net = M.Model(cfg).to(device)
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "log.jsonl").open("w")

    def report(**row):
        log.write(json.dumps(row) + "\n")
        log.flush()
        print(args.out.name, " ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
                                      for k, v in row.items()), flush=True)

    report(config=dataclasses.asdict(cfg), parameters=net.num_parameters(),
           arguments={k: str(v) for k, v in vars(args).items()}, train_tokens=corpus.num_train_tokens,
           device=torch.cuda.get_device_name() if device == "cuda" else "cpu", torch=torch.__version__)
    labels, train_works = None, corpus.works["train"]
    if args.teacher:
        began = time.time()
        if args.compile_only:
            teacher = M.Model(M.Config(**{**PRESETS[args.teacher], **overrides})).to(device).eval()
        else:
            teacher = M.load_checkpoint(args.teacher, device)
        if not args.no_compile:
            teacher.layer = torch.compile(teacher.layer, dynamic=False)
        train_works = share_of(train_works, args.label_tokens, args.seed)
        labels = soft_labels(teacher, corpus, train_works, args.length, args.lanes)
        labelled = labels[1][train_works[0]["begin"]:train_works[0]["end"]]
        report(soft_labels=SOFT_LABELS, mass=float(labelled.float().sum(-1).mean()),
               tokens=sum(w["end"] - w["begin"] for w in train_works), seconds=time.time() - began)
        del teacher

    loss_function, eager_layer = head_loss, net.layer
    if not args.no_compile:
        compiled_layer = torch.compile(net.layer, dynamic=False)
        loss_function = torch.compile(head_loss, dynamic=False)
    muon = Muon(net.matrices(), args.lr, args.weight_decay)
    small = [p for name, p in net.named_parameters() if name not in ("mix_in", "mix_out", "glu_in", "glu_out")]
    # Only the embedding decays; theta and norm gains move slowly and freely.
    adam = torch.optim.AdamW(
        [dict(params=[net.embed], lr=args.embed_lr, weight_decay=0.05)]
        + [dict(params=[p], lr=args.embed_lr / 10, weight_decay=0.0) for p in small if p is not net.embed],
        betas=(0.9, 0.95))
    base_lr = [group["lr"] for group in adam.param_groups]
    lanes = Lanes(train_works, args.lanes, args.length, args.seed, args.reset_rate)
    state = net.initial_state(args.lanes, device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    began, compile_began, step, tokens, evals_done = None, time.time(), 0, 0, 0
    recent, recent_count = torch.zeros((), device=device), 0
    distance = torch.zeros((), device=device)
    while True:
        if step == 2 and args.compile_only:
            report(compile_seconds=time.time() - compile_began)
            return
        if step == 5:  # the first steps compile
            if device == "cuda":
                torch.cuda.synchronize()
            report(compile_seconds=time.time() - compile_began)
            began = time.time()
        progress = min(1.0, (time.time() - began) / args.seconds) if began else 0.0
        warm = min(1.0, (step + 1) / 100)
        scale = warm * min(1.0, (1 - progress) / (1 - args.stable))
        firsts, ends, keep = lanes.next()
        inputs, targets, weights, position = corpus.batch(firsts, ends, args.length)
        if state is not None:
            keep = torch.tensor(keep).to(device, non_blocking=True).view(-1, 1, 1, 1)
            state = [s * keep for s in state]
        soft = (None, None)
        if labels is not None:
            soft = labels[0][position].long(), labels[1][position].float()
        net.layer = eager_layer if args.no_compile else compiled_layer
        hidden, state = net(inputs, state, dtype, args.dropout)
        cross_entropy, loss = loss_function(hidden, net.embed, targets, weights, *soft, args.distill,
                                            distance.fill_(args.distance * progress))
        loss.backward()
        muon.step(scale)
        for group, lr in zip(adam.param_groups, base_lr):
            group["lr"] = lr * scale
        adam.step()
        net.zero_grad(set_to_none=True)
        recent += cross_entropy.detach()
        recent_count += 1
        step += 1
        tokens += sum(max(0, min(args.length, end - first)) for first, end in zip(firsts, ends))
        if step % 10 == 0 and began and device == "cuda":
            torch.cuda.synchronize()  # keeps the clock of the schedule honest
        if progress * args.evals >= evals_done or progress >= 1:
            net.layer = eager_layer
            mean = float(recent) / recent_count
            elapsed = time.time() - began if began else 0.0
            report(step=step, tokens=tokens, epochs=tokens / corpus.num_train_tokens, seconds=elapsed,
                   train_nats_per_token=mean, valid_nats_per_byte=quick_valid(net, corpus, args.length),
                   lr_scale=scale, tokens_per_s=tokens / elapsed if elapsed else 0.0)
            recent.zero_()
            recent_count = 0
            evals_done += 1
            if mean != mean:
                sys.exit("the loss is not a number")
            if evals_done % 4 == 0 or progress >= 1:
                M.save_checkpoint(net, args.out / "model.pt", step=step, tokens=tokens)
        if progress >= 1:
            break
    report(done=True, parameters=net.num_parameters(), steps=step, tokens=tokens, wall_seconds=time.time() - began)


if __name__ == "__main__":
    main()
