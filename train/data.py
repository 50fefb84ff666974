"""The encoded corpus and the order in which training reads it."""
import json
import pathlib

import numpy as np
import torch


class Corpus:
    def __init__(self, folder, device):
        folder = pathlib.Path(folder)
        self.tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int16)).to(device)
        works = json.loads((folder / "works.json").read_text())
        self.works = {split: [w for w in works if w["split"] == split] for split in ("train", "valid")}
        self.num_train_tokens = sum(w["end"] - w["begin"] for w in self.works["train"])
        self.device = device

    def batch(self, first_target, ends, length):
        """Inputs and targets of segments: target positions first_target + [0, length), cut at ends.

        Returns inputs [B, T], targets [B, T], weights [B, T] (0 beyond the work) and the positions of
        the targets in the stream [B, T].
        """
        # Only B numbers travel to the GPU: a larger copy from pageable memory would wait for its queue.
        first = torch.tensor(first_target).to(self.device)[:, None]
        position = first + torch.arange(length, device=self.device)
        weight = (position < torch.tensor(ends).to(self.device)[:, None]).float()
        position = position.clamp(max=len(self.tokens) - 1)
        inputs = self.tokens[position - 1].long()
        return inputs, self.tokens[position].long(), weight, position


class InventedCorpus(Corpus):
    """Two works of random tokens, with the shapes of a real one."""

    def __init__(self, vocab_size, device):
        num_tokens = 1 << 18
        self.tokens = torch.randint(3, vocab_size, (2 * num_tokens + 1,), device=device).to(torch.int16)
        self.works = {split: [dict(split=split, begin=1 + i * num_tokens, end=1 + (i + 1) * num_tokens,
                                   num_bytes=3 * num_tokens)] for i, split in enumerate(("train", "valid"))}
        self.num_train_tokens, self.device = num_tokens, device


class Lanes:
    """B lanes, each reading whole works segment by segment; a free lane takes the next work.

    The recurrent state of a lane goes from segment to segment and is zeroed where a work begins.
    With probability reset_rate a segment starts from an empty state all the same: a prompt at
    inference starts anywhere, and 156 beginnings would not teach that.
    """

    def __init__(self, works, num_lanes, length, seed, reset_rate=0.0, forever=True):
        self.works, self.length, self.reset_rate, self.forever = works, length, reset_rate, forever
        self.rng = np.random.default_rng(seed)
        self.queue = []
        # The longest first when every work is read once: the lanes then end at about the same time.
        if not forever:
            self.queue = sorted(works, key=lambda w: w["begin"] - w["end"])
        self.lanes = [(0, 0)] * num_lanes  # (next target, end of the work)

    def next(self):
        """first_target [B], ends [B], keep [B] (0 = start from an empty state); None when all is read."""
        firsts, ends, keep = [], [], []
        for lane, (position, end) in enumerate(self.lanes):
            kept = 1.0
            if position >= end:
                kept = 0.0
                if not self.queue and self.forever:
                    self.queue = [self.works[i] for i in self.rng.permutation(len(self.works))]
                if self.queue:
                    work = self.queue.pop(0)
                    position, end = work["begin"], work["end"]
                    # Shift the segment grid in every second reading, so that epochs differ.
                    if self.forever and self.rng.random() < 0.5:
                        position += int(self.rng.integers(min(self.length, end - position)))
            elif self.rng.random() < self.reset_rate:
                kept = 0.0
            firsts.append(max(position, 1)), ends.append(end), keep.append(kept)
            self.lanes[lane] = (position + self.length, end)
        if all(first >= end for first, end in zip(firsts, ends)):
            return None
        return firsts, ends, keep
