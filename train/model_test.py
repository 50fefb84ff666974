#!/usr/bin/env python3
"""Checks model.py against the recurrence written out token by token in numpy float64."""
import math

import numpy as np
import torch

import model as M


def silu(x):
    return x / (1 + np.exp(-x))


def srms(x):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6)


def recurrent_logits(net, ids):
    """The definition: absolute positions, one token at a time."""
    cfg = net.cfg
    w = {k: v.detach().double().numpy() for k, v in net.state_dict().items()}
    rates = M.decay_rates(cfg).numpy()
    states = [np.zeros(s.shape[1:]) for s in net.initial_state(1, "cpu")]
    rows = []
    for position, token in enumerate(ids):
        x = w["embed"][token] * math.sqrt(cfg.dim)
        for layer in range(cfg.layers):
            q, k, v, u = (w["mix_in"][layer] @ srms(x))
            q, k, v = (t.reshape(cfg.heads, cfg.head_dim) for t in (silu(q), silu(k), v))
            if layer == 0:
                angle = w["theta"][:, 0] * position
                q, k = (np.concatenate([t * np.cos(angle), t * np.sin(angle)], -1) for t in (q, k))
            states[layer] = (np.exp(-rates[layer])[:, None, None] * states[layer]
                             + k[:, :, None] * v[:, None, :])
            o = np.einsum("hd,hde->he", q, states[layer]).reshape(-1)
            x = x + w["mix_out"][layer] @ (u * srms(o))
            a, b = w["glu_in"][layer] @ srms(x)
            x = x + w["glu_out"][layer] @ (a * b)
        rows.append(w["embed"] @ srms(x))
    return np.stack(rows)


def test_segments_equal_the_recurrence():
    torch.manual_seed(1)
    for heads, layers in ((4, 3), (6, 4), (3, 2)):
        net = M.Model(M.Config("transnormer", 61, 16 * heads, layers, heads, 40))
        for matrix in (net.mix_out, net.glu_out):
            torch.nn.init.normal_(matrix, std=0.2)
        ids = np.random.default_rng(heads).integers(0, 61, 3 * 192)
        want = recurrent_logits(net, ids)
        for segment in (1, 64, 192):
            state, got = None, []
            for begin in range(0, len(ids), segment):
                tokens = torch.tensor(ids[None, begin:begin + segment])
                hidden, state = net(tokens, state, torch.float64)
                got.append(net.logits(hidden)[0].detach().numpy())
            error = np.abs(np.concatenate(got) - want).max() / np.abs(want).max()
            print(f"heads {heads} layers {layers} segment {segment}: relative error {error:.1e}")
            assert error < 1e-9


if __name__ == "__main__":
    test_segments_equal_the_recurrence()
