#!/usr/bin/env python3
"""Attention of prompts and of single tokens on one GPU against the published kernels: same tensors, same process.

    pip install torch flash-linear-attention lightning-attn
    cmake --preset cuda && cmake --build --preset cuda --target godwit_cuda godwit_cuda_shim
    bench/compare_peers.py [--prefill 4x2048,1x131072] [--decode 1,256] [--softmax 1x8192] [--paged 16x32768]

--prefill, --decode: lightning attention of whole prompts (batch x tokens) and of one token (batch). Peers: flash-linear-attention,
OpenNLPLab's Triton kernel, and PyTorch's scaled_dot_product_attention, which is another function of the same tensors.
--softmax, --paged: softmax attention of whole prompts and of one token from the paged cache (batch x context). Peer: PyTorch's
scaled_dot_product_attention on contiguous tensors. An empty list leaves a part out.

Each peer is given its own layout; the conversion is not timed. Every timed call is preceded by a write of 256 MB, so that
nothing is in the L2 cache and the launches are queued. Medians, and their ratio to ours. max |d| is the largest difference to the
same function in float64 of the same bf16 inputs, over some heads of the first sequence; beside it is the output's root mean square.
"""
import argparse
import ctypes
import math
import pathlib
import statistics

import numpy as np
import torch

P, W, KV_BLOCK = 64, 16, 16
STEP_ROW = np.dtype([("first_token", "i4"), ("num_tokens", "i4"), ("slot", "i4"), ("is_prefill", "i4"), ("position", "i8"),
                     ("base", "i8"), ("base_after", "i8"), ("p_begin", "i8"), ("p_end", "i8"), ("block_table", "i8")])


class LightningStruct(ctypes.Structure):  # GodwitLightning of cuda_shim.cc
    _fields_ = ([(name, ctypes.c_void_p) for name in "q k v o theta decay fold_epsilon state window rows".split()] +
                [(name, ctypes.c_int64) for name in "num_tokens row_stride num_slots window_rows num_decode_tokens".split()] +
                [(name, ctypes.c_int32) for name in "heads head_dim num_rows num_decode_rows silu is_f32 o_is_f32".split()] +
                [("q_scale", ctypes.c_float)])


class PagedStruct(ctypes.Structure):  # GodwitPaged of cuda_shim.cc
    _fields_ = ([(name, ctypes.c_void_p) for name in "q k v o cos sin blocks block_tables rows".split()] +
                [(name, ctypes.c_int64) for name in "num_tokens row_stride num_blocks num_decode_tokens".split()] +
                [(name, ctypes.c_int32) for name in "heads kv_heads head_dim rotary_pairs num_rows num_decode_rows".split()] +
                [("scale", ctypes.c_float)])


def prefill_row(first_token, num_tokens, slot, position=0):
    """A StepRow of prompt tokens [position, position + num_tokens), with every whole block in P-form."""
    end = position + num_tokens
    p_begin, p_end = -(-position // P) * P, end // P * P
    if p_begin >= p_end:
        p_begin = p_end = 0
    return (first_token, num_tokens, slot, 1, position, position // W * W, end // W * W, p_begin, p_end, 0)


def decode_row(row, context, blocks_per_row=0):
    """A StepRow of one token after context - 1 earlier ones; slot and block table are those of the row."""
    position = context - 1
    base = position // W * W
    return (row, 1, row, 0, position, base, base, 0, 0, row * blocks_per_row)


class Decay:
    """Tables of LightningDecay on the device, from the rates in double."""

    def __init__(self, rates):
        self.rates = np.asarray(rates, np.float64)
        self.decay = torch.from_numpy(np.exp(-self.rates[:, None] * np.arange(P + 1)).astype(np.float32)).cuda()
        epsilon = -np.expm1(-self.rates[:, None] * np.array([W, P]))
        self.fold_epsilon = torch.from_numpy(epsilon.astype(np.float32)).cuda()


class Godwit:
    """The CUDA plugin's ops on torch tensors."""

    def __init__(self, folder):
        self._shim = ctypes.CDLL(str(pathlib.Path(folder, "libgodwit_cuda_shim.so").resolve()))
        self._check("GodwitOpen", str(pathlib.Path(folder, "libgodwit_cuda.so").resolve()).encode())

    def _check(self, name, *args):
        function = getattr(self._shim, name)
        function.restype = ctypes.c_char_p
        text = function(*args)
        if text is not None:
            raise RuntimeError(f"{name}: {text.decode()}")

    def lightning(self, qkv, o, state, window, decay, rows, silu=False, theta=None, q_scale=1.0, num_decode=(0, 0)):
        """A call without arguments that queues the op. qkv [T, >= 3 H d] holds q, k, v side by side; rows: device bytes."""
        heads, head_dim = decay.decay.shape[0], o.shape[1] // decay.decay.shape[0]
        q, k, v = (qkv[:, i * heads * head_dim:] for i in range(3))
        x = LightningStruct(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), None if theta is None else theta.data_ptr(),
            decay.decay.data_ptr(), decay.fold_epsilon.data_ptr(), state.data_ptr(), window.data_ptr(), rows.data_ptr(),
            qkv.shape[0], qkv.stride(0), state.shape[0], window.shape[1], num_decode[1], heads, head_dim,
            rows.numel() // STEP_ROW.itemsize, num_decode[0], int(silu), int(qkv.dtype == torch.float32),
            int(o.dtype == torch.float32), q_scale)
        keep = (qkv, o, state, window, decay, rows, theta)
        return lambda: (self._check("GodwitLightningAttention", ctypes.byref(x)), keep)[0]

    def paged(self, qkv, o, cache, tables, rows, heads, kv_heads, head_dim, rope=(None, None), num_decode=(0, 0)):
        """A call without arguments that queues the op. qkv [T, (H + 2 Hkv) d]; cache [blocks, 2, Hkv, 16 d]; rows: device bytes."""
        q, k, v = qkv, qkv[:, heads * head_dim:], qkv[:, (heads + kv_heads) * head_dim:]
        cos, sin = rope
        x = PagedStruct(q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), None if cos is None else cos.data_ptr(),
                        None if sin is None else sin.data_ptr(), cache.data_ptr(), tables.data_ptr(), rows.data_ptr(),
                        qkv.shape[0], qkv.stride(0), cache.shape[0], num_decode[1], heads, kv_heads, head_dim,
                        0 if cos is None else cos.shape[1], rows.numel() // STEP_ROW.itemsize, num_decode[0],
                        head_dim ** -0.5)
        keep = (qkv, o, cache, tables, rows, cos, sin)
        return lambda: (self._check("GodwitPagedAttention", ctypes.byref(x)), keep)[0]

    def synchronize(self):
        self._check("GodwitSynchronize")

    def milliseconds(self, calls, flush, count):
        """Medians over `count` rounds of the calls in turn."""
        times = []
        for i in range(count + 3):
            self._check("GodwitFillZero", ctypes.c_void_p(flush.data_ptr()), ctypes.c_int64(flush.numel() * flush.element_size()))
            self._check("GodwitSetMark", 0)
            calls[i % len(calls)]()
            self._check("GodwitSetMark", 1)
            seconds = ctypes.c_double()
            self._check("GodwitSecondsBetween", 0, 1, ctypes.byref(seconds))
            times.append(seconds.value * 1e3)
        return statistics.median(times[3:])


def step_rows(rows):
    return torch.from_numpy(np.array(rows, STEP_ROW).view(np.uint8)).cuda()


def time_torch(call, flush, count):
    """Median milliseconds of `call` on torch's stream, as Godwit.milliseconds does it."""
    times = []
    for _ in range(count + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def peers(batch, length, heads, head_dim, rates, layer, num_layers, qkv):
    """(name, call) of each peer, made one after the other: a call returns o as [batch, length, heads, head_dim]."""
    def split(order):
        for i in range(3):
            x = qkv[:, i * heads * head_dim:(i + 1) * heads * head_dim].reshape(batch, length, heads, head_dim)
            yield (x if order == "bthd" else x.transpose(1, 2)).contiguous()

    from fla.ops.lightning_attn import chunk_lightning_attn
    q, k, v = split("bthd")
    yield "fla", lambda: chunk_lightning_attn(q, k, v, layer, num_layers, scale=1.0, output_final_state=True)[0]
    q, k, v = split("bhtd")
    try:
        from lightning_attn.ops import lightning_attn_func
        slopes = torch.tensor(rates, dtype=torch.float32, device="cuda").reshape(heads, 1, 1)
        yield "LA2", lambda: lightning_attn_func(q, k, v, slopes).transpose(1, 2)
    except ImportError as error:
        print("no lightning-attn:", error)
    if length <= 32768:
        yield "softmax", lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def lightning_reference(q, k, v, rates, chunk=256):
    """o [T, heads, d] in float64: o_t = q_t (sum over j <= t of e^(-rate (t - j)) k_j v_j^T)."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    rates = torch.as_tensor(rates, dtype=torch.float64, device=q.device)[:, None]
    o, state = torch.empty_like(q), torch.zeros(q.shape[0], q.shape[2], v.shape[2], dtype=torch.float64, device=q.device)
    for begin in range(0, q.shape[1], chunk):
        qc, kc, vc = (x[:, begin:begin + chunk] for x in (q, k, v))
        at = torch.arange(qc.shape[1], device=q.device, dtype=torch.float64)
        age = at[:, None] - at[None, :]
        mask = torch.where(age >= 0, torch.exp(-rates[:, :, None] * age.clamp(min=0)), 0)
        o[:, begin:begin + chunk] = ((qc @ kc.transpose(1, 2)) * mask) @ vc + torch.exp(-rates * (at + 1))[:, :, None] * (qc @ state)
        state = (torch.exp(-rates * len(at))[:, :, None] * state +
                 (kc * torch.exp(-rates * (len(at) - 1 - at))[:, :, None]).transpose(1, 2) @ vc)
    return o.transpose(0, 1)


def attention_reference(q, k, v, scale, first=0):
    """o [heads, T, d] in float64 of queries at first.. over keys of the same heads, causal."""
    scores = (q.double() @ k.double().transpose(1, 2)) * scale
    at = torch.arange(q.shape[1], device=q.device) + first
    scores.masked_fill_(torch.arange(k.shape[1], device=q.device)[None, None, :] > at[None, :, None], -math.inf)
    return scores.softmax(-1) @ v.double()


def max_error(name, x, reference):
    return f"{name} {(x.double() - reference).abs().max().item():.1e}"


def compare_prefill(godwit, batch, length, heads, head_dim, flush, seconds):
    layer, num_layers = 3, 32
    # chunk_lightning_attn makes its own rates: linear in the head.
    rates = 8 / heads * (1 - layer / num_layers) * np.arange(heads)
    num_tokens, width = batch * length, heads * head_dim
    qkvu = torch.empty(num_tokens, 4 * width, dtype=torch.bfloat16, device="cuda").normal_()
    o = torch.full((num_tokens, width), math.nan, dtype=torch.bfloat16, device="cuda")
    state = torch.zeros(batch, heads, head_dim, head_dim, device="cuda")
    window = torch.zeros(batch, 2 * W, 2 * width, dtype=torch.bfloat16, device="cuda")
    rows = step_rows([prefill_row(i * length, length, i) for i in range(batch)])
    torch.cuda.synchronize()
    call = godwit.lightning(qkvu, o, state, window, Decay(rates), rows)
    call()
    godwit.synchronize()
    floor = 4 * num_tokens * width * 2 / 3.02e12 * 1e3  # q, k, v, o once at the speed of a copy
    rounds = max(5, min(50, int(seconds * 1e3 / (3 * floor))))
    ours = godwit.milliseconds([call], flush, rounds)
    state.zero_()
    torch.cuda.synchronize()
    call()
    godwit.synchronize()
    some_heads = [1, heads // 2, heads - 1]
    q, k, v = (qkvu[:length, i * width:(i + 1) * width].view(length, heads, head_dim)[:, some_heads] for i in range(3))
    reference = lightning_reference(q, k, v, rates[some_heads])
    errors = [max_error("ours", o[:length].view(length, heads, head_dim)[:, some_heads], reference)]
    text = f"B{batch} x {length}: ours {ours:.3f} ms, {100 * floor / ours:.0f}% of a copy"
    for name, peer in peers(batch, length, heads, head_dim, rates, layer, num_layers, qkvu):
        theirs = peer().reshape(num_tokens, width)
        some = slice(num_tokens - min(num_tokens, 4096), num_tokens)
        error = ((o[some].double() - theirs[some].double()).norm() / theirs[some].double().norm()).item()
        if name != "softmax":
            errors.append(max_error(name, theirs[:length].view(length, heads, head_dim)[:, some_heads], reference))
        del theirs
        ms = time_torch(peer, flush, max(5, rounds // 3))
        text += f"; {name} {ms:.3f} ms, {ms / ours:.2f}x" + (f" (differ by {error:.1e})" if name != "softmax" else "")
    print(f"{text}; max |d| {', '.join(errors)} of rms {reference.pow(2).mean().sqrt().item():.1f}", flush=True)


def compare_softmax(godwit, batch, length, heads, kv_heads, head_dim, flush, rounds=9):
    """Whole prompts: ours rotates q and k, writes the cache and attends; SDPA only attends, to tensors that lie ready."""
    num_tokens, per = batch * length, -(-length // KV_BLOCK)
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim, dtype=torch.bfloat16, device="cuda")
    cache = torch.full((batch * per, 2, kv_heads, KV_BLOCK * head_dim), math.nan, dtype=torch.bfloat16, device="cuda")
    tables = torch.randperm(batch * per, device="cuda").int()  # blocks of a sequence lie anywhere
    rows = step_rows([(i * length, length, i, 1, 0, 0, 0, 0, 0, i * per) for i in range(batch)])
    o = torch.full((num_tokens, heads * head_dim), math.nan, dtype=torch.bfloat16, device="cuda")
    angles = (torch.arange(length, device="cuda", dtype=torch.float64)[:, None] *
              10000.0 ** (-torch.arange(head_dim // 2, device="cuda", dtype=torch.float64) / (head_dim // 2))).repeat(batch, 1)
    rope = angles.cos().float().contiguous(), angles.sin().float().contiguous()
    x = qkv.view(batch, length, heads + 2 * kv_heads, head_dim).transpose(1, 2)
    q, k, v = (part.contiguous() for part in (x[:, :heads], x[:, heads:heads + kv_heads], x[:, heads + kv_heads:]))
    torch.cuda.synchronize()
    plain = godwit.paged(qkv, o, cache, tables, rows, heads, kv_heads, head_dim)
    plain()
    godwit.synchronize()
    flops = 4 * batch * heads * head_dim * length * (length + 1) / 2
    call = godwit.paged(qkv, o, cache, tables, rows, heads, kv_heads, head_dim, rope)
    ours, no_rope = godwit.milliseconds([call], flush, rounds), godwit.milliseconds([plain], flush, rounds)
    last = min(length, 256)  # rows of one head: all of its keys
    reference = attention_reference(q[0, :1, length - last:], k[0, :1], v[0, :1], head_dim ** -0.5, length - last)[0]
    errors = [max_error("ours", o[length - last:length, :head_dim], reference)]
    text = (f"softmax B{batch} x {length} H {heads}/{kv_heads} d {head_dim}: ours {ours:.3f} ms ({flops / ours / 1e9:.0f} TFLOP/s), "
            f"without rotation {no_rope:.3f}")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        def peer():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        try:
            theirs = peer().transpose(1, 2).reshape(num_tokens, -1)
        except RuntimeError as error:
            text += f"; no {name} ({str(error)[:40]})"
            continue
        error = ((o.float() - theirs.float()).norm() / theirs.float().norm()).item()
        errors.append(max_error(name, theirs[length - last:length, :head_dim], reference))
        del theirs
        ms = time_torch(peer, flush, rounds)
        text += f"; {name} {ms:.3f} ms, {ms / ours:.2f}x (differ by {error:.1e})"
    print(f"{text}; max |d| {', '.join(errors)} of rms {reference.pow(2).mean().sqrt().item():.3f}", flush=True)


def compare_lightning_decode(godwit, batch, heads, head_dim, flush, count):
    """One token of each sequence; half of a window is open."""
    width = heads * head_dim
    rates = np.full(heads, 0.01)
    qkv = torch.randn(batch, 3 * width, device="cuda").bfloat16()
    o = torch.empty(batch, width, dtype=torch.bfloat16, device="cuda")
    state = torch.randn(batch, heads, head_dim, head_dim, device="cuda")
    window = torch.randn(batch, 2 * W, 2 * width, device="cuda").bfloat16()
    rows = step_rows([decode_row(row, 105) for row in range(batch)])
    torch.cuda.synchronize()
    call = godwit.lightning(qkv, o, state, window, Decay(rates), rows, num_decode=(batch, batch))
    call()
    godwit.synchronize()
    q0, k0, v0 = (qkv[0, i * width:(i + 1) * width].view(heads, head_dim).double() for i in range(3))
    open_rows = window[0, torch.arange(96, 104, device="cuda") % (2 * W)].double()  # positions 96..103 of 105
    ks = torch.cat([open_rows[:, :width].view(-1, heads, head_dim), k0[None]])
    vs = torch.cat([open_rows[:, width:].view(-1, heads, head_dim), v0[None]])
    decay = torch.from_numpy(np.exp(-rates[0] * np.arange(len(ks) - 1, -1, -1))).cuda()[:, None]
    reference = torch.einsum("hd,hde->he", q0, state[0].double()) * math.exp(-rates[0] * len(ks))
    reference += torch.einsum("jh,jhe->he", torch.einsum("hd,jhd->jh", q0, ks) * decay, vs)
    error = max_error("ours", o[0].view(heads, head_dim), reference)
    ours = godwit.milliseconds([call], flush, count)
    from fla.ops.lightning_attn import fused_recurrent_lightning_attn
    q, k, v = (qkv[:, i * width:(i + 1) * width].reshape(batch, 1, heads, head_dim).contiguous() for i in range(3))

    def peer():
        return fused_recurrent_lightning_attn(q, k, v, 3, 32, initial_state=state, output_final_state=True)

    theirs = time_torch(peer, flush, count)
    print(f"lightning decode B{batch}: ours {ours * 1e3:.1f} us; fla {theirs * 1e3:.1f} us, {theirs / ours:.2f}x; "
          f"max |d| {error} of rms {reference.pow(2).mean().sqrt().item():.1f}", flush=True)


def compare_paged_decode(godwit, batch, context, heads, kv_heads, head_dim, flush, count):
    """Microseconds of ours and of PyTorch's, and the bytes of the cache a second. Ours also rotates q and k and writes the step's k, v."""
    blocks_per_row = -(-context // KV_BLOCK)
    num_blocks = batch * blocks_per_row
    cache = torch.empty(num_blocks, 2, kv_heads, KV_BLOCK * head_dim, device="cuda", dtype=torch.bfloat16).normal_()
    tables = torch.randperm(num_blocks, device="cuda", dtype=torch.int32)
    qkv = torch.randn(batch, (heads + 2 * kv_heads) * head_dim, device="cuda", dtype=torch.bfloat16)
    o = torch.empty(batch, heads * head_dim, device="cuda", dtype=torch.bfloat16)
    rope = (torch.ones(batch, head_dim // 2, device="cuda"), torch.zeros(batch, head_dim // 2, device="cuda"))  # no rotation
    rows = step_rows([decode_row(r, context, blocks_per_row) for r in range(batch)])
    ours = godwit.milliseconds([godwit.paged(qkv, o, cache, tables, rows, heads, kv_heads, head_dim, rope, (batch, batch))], flush, count)
    # The same keys and values, contiguous, as [batch, kv_heads, context, head_dim].
    q = qkv[:, :heads * head_dim].reshape(batch, heads, 1, head_dim)
    half = cache.view(num_blocks, 2, kv_heads, KV_BLOCK, head_dim)
    k, v = (torch.empty(batch, kv_heads, blocks_per_row * KV_BLOCK, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for r in range(batch):
        index = tables[r * blocks_per_row:(r + 1) * blocks_per_row].long()
        for to, part in ((k, 0), (v, 1)):
            to[r] = half[index, part].transpose(0, 1).reshape(kv_heads, -1, head_dim)
    k, v = k[:, :, :context], v[:, :, :context]
    del cache, half

    def call():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads)

    theirs = time_torch(call, flush, count)
    expected = call().reshape(batch, -1).float()
    error = float((o.float() - expected).norm() / expected.norm())
    reference = attention_reference(q[0, :heads:heads // kv_heads], k[0], v[0], head_dim ** -0.5, context - 1)[:, 0]
    errors = [max_error(name, x[0].view(heads, head_dim)[::heads // kv_heads], reference) for name, x in (("ours", o), ("SDPA", expected))]
    num_bytes = 2 * batch * context * kv_heads * head_dim * 2
    print(f"paged decode {batch} x {context}, heads {heads}/{kv_heads}: {ours * 1e3:.1f} us, {num_bytes / ours / 1e9:.2f} TB/s; "
          f"SDPA {theirs * 1e3:.1f} us, {num_bytes / theirs / 1e9:.2f} TB/s; theirs / ours {theirs / ours:.3f}; difference {error:.1e}; "
          f"max |d| {', '.join(errors)} of rms {reference.pow(2).mean().sqrt().item():.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="build/cuda/bin", help="folder of the plugin and the shim")
    parser.add_argument("--prefill", default="4x2048,4x8192,4x32768,1x8192,1x32768,1x131072,1x524288")
    parser.add_argument("--decode", default="1,32,128,256")
    parser.add_argument("--softmax", default="1x8192,4x8192,1x32768,4x32768")
    parser.add_argument("--paged", default="1x4096,1x32768,1x131072,16x32768,64x4096")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=0.3, help="about how long each of ours runs")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    godwit = Godwit(options.bin)
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    heads, head_dim = options.heads, options.head_dim

    def shapes(text):
        for shape in filter(None, text.split(",")):
            torch.cuda.empty_cache()
            yield tuple(int(x) for x in shape.split("x"))

    for batch, length in shapes(options.prefill):
        compare_prefill(godwit, batch, length, heads, head_dim, flush, options.seconds)
    for (batch,) in shapes(options.decode):
        compare_lightning_decode(godwit, batch, heads, head_dim, flush, 50)
    for batch, length in shapes(options.softmax):
        for kv_heads in (heads, heads // 4):
            compare_softmax(godwit, batch, length, heads, kv_heads, head_dim, flush)
    for batch, context in shapes(options.paged):
        for kv_heads in (heads, heads // 4):
            compare_paged_decode(godwit, batch, context, heads, kv_heads, head_dim, flush, 20)


if __name__ == "__main__":
    main()
