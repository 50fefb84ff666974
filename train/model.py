"""TransNormerLLM and its Llama-style twin for training and evaluation.

Parameters are stacked over layers, [L, ...], so that the optimizer handles a handful of tensors; a
layer is a plain function of its slices, so that torch.compile compiles it once, not L times.

TransNormerLLM (arXiv 2307.14995, 2405.17381), in the arithmetic of its published checkpoints:
  x = E[token] * sqrt(d);  x += GLA(SRMS(x));  x += SGLU(SRMS(x));  logits = E . SRMS(x)
  SRMS(x) = x / sqrt(mean(x^2) + 1e-6), no weight
  GLA: q, k, v, u = split(W x); q, k through SiLU; layer 0 applies LRPE-d;
       S_t = lambda S_{t-1} + k_t v_t^T,  o_t = q_t^T S_t,  y = W_out (u * SRMS(o over all heads))
  SGLU: W_3 (W_1 x * W_2 x), no activation
  lambda = exp(-slope_h * (1 - l / (L - 1) + 1e-5)), the ALiBi slopes.
"""
import dataclasses
import math

import torch
import torch.nn.functional as F

NORM_EPS = 1e-6
# 128 tokens: the square inside a chunk costs as much as the state terms at head_dim 64 and 128.
CHUNK = 128


@dataclasses.dataclass
class Config:
    family: str = "transnormer"  # or "llama"
    vocab_size: int = 4096
    dim: int = 384
    layers: int = 12
    heads: int = 6
    glu: int = 1024
    rope_theta: float = 10000.0  # llama only

    @property
    def head_dim(self):
        return self.dim // self.heads


def alibi_slopes(heads):
    power = 2 ** int(math.floor(math.log2(heads)))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    between = [2.0 ** (-8.0 * (h + 1) / (2 * power)) for h in range(2 * power)][0::2]
    return torch.tensor(slopes + between[: heads - power], dtype=torch.float64)


def decay_rates(cfg):
    """[L, H] in float64."""
    layer = torch.arange(cfg.layers, dtype=torch.float64)[:, None]
    return alibi_slopes(cfg.heads)[None] * (1 - layer / (cfg.layers - 1) + 1e-5)


def decay_tables(rate, length, chunk, dtype):
    """What the chunked form needs for one layer; exponents are never positive, nothing overflows.

    mask [H, C, C], q_decay and k_decay [H, 1, C, 1], scan [H, N+1, N+1]: row n of scan gives the
    state before chunk n out of (initial state, contribution of chunk 0, 1, ...).
    """
    num_chunks = length // chunk
    i = torch.arange(chunk, dtype=torch.float64)
    s = rate[:, None]
    diff = i[:, None] - i[None, :]
    mask = torch.exp(-s[..., None] * diff.clamp(min=0)) * (diff >= 0)
    q_decay = torch.exp(-s * (i + 1))[:, None, :, None]
    k_decay = torch.exp(-s * (chunk - 1 - i))[:, None, :, None]
    n = torch.arange(num_chunks + 1, dtype=torch.float64)
    behind = n[:, None] - n[None, :]
    scan = torch.exp(-s[..., None] * chunk * behind.clamp(min=0)) * (behind >= 0)
    return mask.to(dtype), q_decay.to(dtype), k_decay.to(dtype), scan.to(dtype)


def srms(x):
    """float64 stays float64; everything else is normalised in float32."""
    y = x if x.dtype == torch.float64 else x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + NORM_EPS)).to(x.dtype)


def lightning_attention(q, k, v, state, tables):
    """q, k [B, H, N, C, dk], v [B, H, N, C, dv], state [B, H, dk, dv] -> outputs like v, new state.

    The carried matrix is the true recurrent state S_t; it stays in float32 (or float64).
    """
    mask, q_decay, k_decay, scan = tables
    if k.size(2) * k.size(3) == 1:  # decoding: the recurrence itself
        decay = scan[:, 1, 0, None, None]
        state = decay * state + k[:, :, 0].transpose(-1, -2).to(state.dtype) * v[:, :, 0].to(state.dtype)
        return torch.matmul(q[:, :, 0].to(state.dtype), state)[:, :, None].to(v.dtype), state
    scores = (torch.matmul(q, k.transpose(-1, -2)) * mask[:, None]).to(v.dtype)
    intra = torch.matmul(scores, v)
    added = torch.matmul((k * k_decay).to(v.dtype).transpose(-1, -2), v)  # [B, H, N, dk, dv]
    parts = torch.cat([state[:, :, None], added.to(state.dtype)], 2)
    states = torch.matmul(scan, parts.flatten(3)).view(parts.shape)  # [B, H, N+1, dk, dv]
    inter = torch.matmul((q * q_decay).to(v.dtype), states[:, :, :-1].to(v.dtype))
    return intra + inter, states[:, :, -1]


def rotate_state(state, phase):
    """Moves the origin of LRPE positions forward by the segment: rows [cos part; sin part], phase [H, hd].

    Scores depend on differences of positions only, so each segment may count from 0. That keeps the
    angles small whatever the position in a book, and with them the gradient of theta.
    """
    cos_rows, sin_rows = state.chunk(2, dim=2)
    cos, sin = torch.cos(phase)[None, :, :, None], torch.sin(phase)[None, :, :, None]
    return torch.cat([cos_rows * cos + sin_rows * sin, sin_rows * cos - cos_rows * sin], 2)


def transnormer_layer(x, weights, state, tables, theta, heads, chunk, dropout):
    """x [B, T, d]; theta [H, 1, hd] on layer 0, else None. The state is handed on without gradient."""
    qkvu, out, glu_in, glu_out = weights
    batch, length, dim = x.shape
    z = F.linear(srms(x), qkvu.flatten(0, 1))
    q, k, v, u = z.split(dim, -1)
    fold = lambda t: t.reshape(batch, length // chunk, chunk, heads, -1).permute(0, 3, 1, 2, 4)
    q, k, v = fold(F.silu(q)), fold(F.silu(k)), fold(v)
    if theta is not None:
        position = torch.arange(length, device=x.device, dtype=theta.dtype).view(1, -1, chunk, 1)
        angle = theta[:, :, None] * position  # [H, N, C, hd]
        cos, sin = torch.cos(angle), torch.sin(angle)
        q = torch.cat([q * cos, q * sin], -1).to(v.dtype)
        k = torch.cat([k * cos, k * sin], -1).to(v.dtype)
    o, new_state = lightning_attention(q, k, v, state, tables)
    new_state = new_state.detach()
    if theta is not None:
        new_state = rotate_state(new_state, (theta[:, 0] * length).detach())
    o = srms(o.permute(0, 2, 3, 1, 4).reshape(batch, length, dim))
    x = x + F.dropout(F.linear(u * o, out), dropout)
    a, b = F.linear(srms(x), glu_in.flatten(0, 1)).chunk(2, -1)
    return x + F.dropout(F.linear(a * b, glu_out), dropout), new_state


def llama_layer(x, weights, norms, rotary, heads, dropout):
    """Pre-norm softmax attention with rotate-half RoPE, then SwiGLU; the context is this segment."""
    qkv, out, glu_in, glu_out = weights
    batch, length, dim = x.shape
    cos, sin = rotary
    q, k, v = F.linear(srms(x) * norms[0], qkv.flatten(0, 1)).view(
        batch, length, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)

    def rope(t):
        a, b = t.chunk(2, -1)
        return (t * cos + torch.cat([-b, a], -1) * sin).to(v.dtype)

    o = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)
    o = o.transpose(1, 2).reshape(batch, length, dim)
    x = x + F.dropout(F.linear(o, out), dropout)
    gate, up = F.linear(srms(x) * norms[1], glu_in.flatten(0, 1)).chunk(2, -1)
    return x + F.dropout(F.linear(F.silu(gate) * up, glu_out), dropout)


class Model(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        d, glu, layers = cfg.dim, cfg.glu, cfg.layers
        normal = lambda *shape: torch.nn.Parameter(torch.randn(*shape) * (0.5 / math.sqrt(shape[-1])))
        # Zero output matrices: every layer begins as the identity.
        zero = lambda *shape: torch.nn.Parameter(torch.zeros(*shape))
        self.embed = torch.nn.Parameter(torch.randn(cfg.vocab_size, d) * 0.02)
        self.mix_in = normal(layers, 4 if cfg.family == "transnormer" else 3, d, d)
        self.mix_out = zero(layers, d, d)
        self.glu_in = normal(layers, 2, glu, d)
        self.glu_out = zero(layers, d, glu)
        if cfg.family == "transnormer":
            j = torch.arange(d, dtype=torch.float64)
            self.theta = torch.nn.Parameter(
                (10000.0 ** (-2.0 * j / d)).float().view(cfg.heads, 1, cfg.head_dim))
        else:
            self.norms = torch.nn.Parameter(torch.ones(layers, 2, d))
            self.final_norm = torch.nn.Parameter(torch.ones(d))
        self._tables = {}
        self.layer = transnormer_layer if cfg.family == "transnormer" else llama_layer

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def matrices(self):
        return [self.mix_in, self.mix_out, self.glu_in, self.glu_out]

    def initial_state(self, batch, device, dtype=torch.float32):
        """One [B, H, dk, dv] a layer; dk doubles in layer 0 (LRPE-d). None for the Llama twin."""
        if self.cfg.family != "transnormer":
            return None
        hd = self.cfg.head_dim
        return [torch.zeros(batch, self.cfg.heads, hd * (2 if layer == 0 else 1), hd,
                            device=device, dtype=dtype) for layer in range(self.cfg.layers)]

    def tables(self, length, device, dtype):
        key = (length, str(device), dtype)
        if key not in self._tables:
            if self.cfg.family == "transnormer":
                chunk = math.gcd(length, CHUNK)
                rates = decay_rates(self.cfg)
                self._tables[key] = [tuple(t.to(device) for t in decay_tables(rate, length, chunk, dtype))
                                     for rate in rates]
            else:
                half = self.cfg.head_dim // 2
                freq = self.cfg.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
                angle = torch.arange(length, dtype=torch.float64)[:, None] * freq.repeat(2)
                self._tables[key] = (torch.cos(angle).to(device, dtype), torch.sin(angle).to(device, dtype))
        return self._tables[key]

    def forward(self, tokens, state=None, dtype=torch.float32, dropout=0.0):
        """tokens [B, T] -> final hidden rows [B, T, d] (normed, ready for the head), new state.

        dtype is that of activations and matrix products; states and norms are at least float32.
        """
        cfg = self.cfg
        batch, length = tokens.shape
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        stacks = [w.to(dtype).unbind(0) for w in self.matrices()]
        tables = self.tables(length, tokens.device, wide)
        x = F.embedding(tokens, self.embed).to(wide)
        if cfg.family == "transnormer":
            x = F.dropout((x * math.sqrt(cfg.dim)).to(dtype), dropout)
            state = state if state is not None else self.initial_state(batch, tokens.device, wide)
            chunk, new_state = math.gcd(length, CHUNK), []
            for layer, weights in enumerate(zip(*stacks)):
                theta = self.theta.to(wide) if layer == 0 else None
                x, s = self.layer(x, weights, state[layer], tables[layer], theta, cfg.heads, chunk, dropout)
                new_state.append(s)
            return srms(x), new_state
        x = F.dropout(x.to(dtype), dropout)
        norms = self.norms.to(dtype).unbind(0)
        for layer, weights in enumerate(zip(*stacks)):
            x = self.layer(x, weights, norms[layer], tables, cfg.heads, dropout)
        return srms(x) * self.final_norm.to(dtype), None

    def logits(self, hidden):
        return F.linear(hidden, self.embed.to(hidden.dtype))


def save_checkpoint(model, path, **extra):
    torch.save(dict(config=dataclasses.asdict(model.cfg),
                    weights={k: v.detach().cpu() for k, v in model.state_dict().items()}, **extra), path)


def load_checkpoint(path, device="cpu", round_to_bf16=True):
    """round_to_bf16: the model as it ships, whose weights are stored in bf16."""
    stored = torch.load(path, map_location="cpu")
    model = Model(Config(**stored["config"]))
    weights = stored["weights"]
    if round_to_bf16:
        weights = {k: v.bfloat16().float() for k, v in weights.items()}
    model.load_state_dict(weights)
    return model.to(device).eval()
