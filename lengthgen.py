"""Understanding and improving length generalization in recurrent models, in one file (arXiv 2507.02782).

Recurrent language models break past the length that they were trained on: training from a zero state shows
them only a part of the states that a long sequence reaches. The cure changes the state from which training
sequences start. Read sections 1 to 4 for the paper; the recurrence itself is in kernels.py.

    1 configuration and state              5 tasks: what the models are trained and tested on
    2 the layers: Mamba-2, GLA, Mamba-1    6 measures: what the figures show
    3 blocks and the language model        Appendix A: text and tokenizers
    4 the interventions                    Appendix B: checkpoints of other libraries

    B batch    T length (of training, when nothing else is said)    L layers    D model width    C vocabulary
    H heads    G groups (H/G heads share q and k)    K key size of a head (d_state)    V value size (headdim)
"""

import contextlib
import functools
import glob
import itertools
import json
import math
import os
import pickle
import re
import sysconfig
import unicodedata
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from kernels import BACKENDS, scan

# ---- 1. Configuration and state ----


@dataclass
class ModelConfig:
    """The sizes of a model, named as in the official checkpoints. None means the layer's default, below."""

    layer: str = "mamba2"  # "mamba2", "gla" or "mamba1"
    vocab_size: int = 50277
    d_model: int = 768  # D
    n_layer: int = 24  # L
    pad_vocab_size_multiple: int | None = None  # the rows of the embedding are a multiple of this
    tie_embeddings: bool | None = None  # the output layer shares the weights of the embedding
    norm_eps: float | None = None
    # Mamba-2 and Mamba-1
    d_state: int | None = None  # K
    d_conv: int = 4  # inputs that the convolution sees, the present one included
    expand: int = 2  # H * V = expand * D
    headdim: int = 64  # V, Mamba-2 only
    ngroups: int = 1  # G, Mamba-2 only
    dt_rank: int | None = None  # Mamba-1 only; None: D / 16, rounded up
    # GLA
    num_heads: int = 4  # H
    expand_k: float = 0.5  # H * K = expand_k * D
    expand_v: float = 1.0  # H * V = expand_v * D
    hidden_ratio: float = 4  # the MLP is about 2/3 * hidden_ratio * D wide
    gate_low_rank_dim: int = 16
    # how to compute, which changes no result
    backend: str | None = None  # a scan of kernels.py; None lets scan() choose
    recompute: bool = False  # compute each layer again in the backward pass: less memory, a third more work

    def __post_init__(self):
        assert self.layer in OFFICIAL_DEFAULTS, f"unknown layer {self.layer!r}: mamba2, gla or mamba1"
        assert self.backend in (None, *BACKENDS), f"unknown backend {self.backend!r}: {list(BACKENDS)}"
        for f in fields(self):
            value = getattr(self, f.name)
            assert isinstance(value, (f.type, int)), f"{f.name} must be {f.type}, got {value!r}"
        for name, value in OFFICIAL_DEFAULTS[self.layer].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.dt_rank is None:
            self.dt_rank = math.ceil(self.d_model / 16)


OFFICIAL_DEFAULTS = {
    "mamba2": dict(pad_vocab_size_multiple=16, tie_embeddings=True, norm_eps=1e-5, d_state=128),
    "mamba1": dict(pad_vocab_size_multiple=8, tie_embeddings=True, norm_eps=1e-5, d_state=16),
    "gla": dict(pad_vocab_size_multiple=1, tie_embeddings=False, norm_eps=1e-6),
}


class LayerState(NamedTuple):
    """What one layer remembers: all that its future outputs can know of the past.

    conv: (B, d_conv-1, channels), the last *inputs* of the causal convolution; None where there is none
    scan: (B, H, K, V), the S of the recurrence; float32, in a float64 model float64
    """

    conv: torch.Tensor | None
    scan: torch.Tensor


torch.serialization.add_safe_globals([LayerState])  # checkpoints of train.py may hold states


def map_state(function, *states):
    """Apply a function to every tensor of a state, or to the matching tensors of several states.

    states: lists of LayerState, one LayerState per layer. Returns such a list.
    """
    new_state = []
    for layers in zip(*states, strict=True):
        convs, scans = zip(*layers, strict=True)
        conv = None if convs[0] is None else function(*convs)
        new_state.append(LayerState(conv, function(*scans)))
    return new_state


# ---- 2. The layers ----
# x (B, T, D), LayerState -> y (B, T, D), the LayerState after the last step. Each computes q, k, v and log_a
# from its input, and leaves the recurrence to kernels.scan:
#
#     S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        a_t = exp(log_a_t) in (0, 1]


class Mamba2(nn.Module):
    """The Mamba-2 layer (Dao & Gu 2024): v = dt * x, log_a = -dt * exp(A_log), and q, k are its C, B.

    Every head has one decay, and the heads of a group share q and k.
    """

    def __init__(self, config):
        super().__init__()
        self.K = config.d_state
        self.V = config.headdim
        self.G = config.ngroups
        self.d_inner = config.expand * config.d_model
        self.H = self.d_inner // self.V
        self.channels = self.d_inner + 2 * self.G * self.K  # of the convolution: x, B and C
        self.conv_shape = (config.d_conv - 1, self.channels)
        self.backend = config.backend
        assert self.H * self.V == self.d_inner, f"{self.d_inner} channels are no whole heads of {self.V}"
        assert self.H % self.G == 0, f"{self.H} heads do not share {self.G} groups evenly"

        self.in_proj = nn.Linear(config.d_model, self.d_inner + self.channels + self.H, bias=False)
        self.conv1d = nn.Conv1d(self.channels, self.channels, config.d_conv, groups=self.channels)
        self.dt_bias = nn.Parameter(initial_dt_bias(self.H))
        self.A_log = nn.Parameter(torch.empty(self.H).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.H))
        self.norm = nn.RMSNorm(self.d_inner, config.norm_eps)
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=False)
        with torch.no_grad():  # so that the residual stream starts with the same variance at any depth
            self.out_proj.weight /= math.sqrt(config.n_layer)

    def forward(self, x, state):
        B, T, _ = x.shape
        H, G, K, V = self.H, self.G, self.K, self.V

        # one projection gives the gate z, the inputs x, B, C of the convolution, and the step size dt
        zxBCdt = self.in_proj(x)  # (B, T, 2 H V + 2 G K + H)
        z, xBC, dt = zxBCdt.split([self.d_inner, self.channels, H], dim=-1)

        # each channel of x, B and C is mixed with its last inputs
        xBC, conv_state = causal_conv(xBC, state.conv, self.conv1d)  # (B, T, H V + 2 G K)
        x, k, q = xBC.split([self.d_inner, G * K, G * K], dim=-1)
        x = x.view(B, T, H, V)
        k, q = k.view(B, T, G, K), q.view(B, T, G, K)

        # the recurrence: a large step dt writes much and forgets much
        dt = F.softplus(dt + self.dt_bias)  # (B, T, H); float32 even where autocast computes in bfloat16
        v = (dt[..., None] * x).to(x.dtype)  # (B, T, H, V)
        log_a = -dt * self.A_log.exp()  # (B, T, H)
        o, scan_state = scan(q, k, v, log_a, state.scan, self.backend)  # (B, T, H, V), (B, H, K, V)

        # the skip connection and the gate, then a norm over the channels of each group
        y = torch.addcmul(o, self.D[:, None], x).flatten(-2) * F.silu(z)  # (B, T, H V)
        y = y.view(B, T, G, self.d_inner // G)
        y = F.rms_norm(y, y.shape[-1:], eps=self.norm.eps).flatten(-2) * self.norm.weight
        return self.out_proj(y), LayerState(conv_state, scan_state)


def causal_conv(x, state, conv1d):
    """Depthwise causal convolution and SiLU of x (B, T, channels), which continues the inputs in state.

    state: (B, d_conv-1, channels), the inputs before x. Returns the outputs (B, T, channels) and the next
    state. Computed as a 2-d convolution of height 1, which is several times faster on a CPU than conv1d.
    """
    T = x.shape[1]
    x = torch.cat([state.to(x.dtype), x], dim=1)  # (B, d_conv-1 + T, channels)
    y = F.conv2d(x.transpose(1, 2)[:, :, None], conv1d.weight[:, :, None], conv1d.bias, groups=x.shape[2])
    y = y.squeeze(2).transpose(1, 2)  # (B, T, channels)
    # the state is a copy, because a view would keep all of x in memory
    return F.silu(y), x[:, T:].clone()


def initial_dt_bias(n):
    """(n,) numbers whose softplus, the step size dt, is spread log-uniformly over [1e-3, 1e-1]."""
    dt = torch.exp(torch.empty(n).uniform_(math.log(1e-3), math.log(1e-1)))
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


class GLA(nn.Module):
    """Gated linear attention (Yang et al. 2024): a decay per key channel, log_a = logsigmoid(gate) / 16."""

    def __init__(self, config):
        super().__init__()
        self.H = config.num_heads
        self.backend = config.backend
        key_dim = int(config.d_model * config.expand_k)
        value_dim = int(config.d_model * config.expand_v)
        self.K = key_dim // self.H
        self.V = value_dim // self.H
        self.conv_shape = None  # there is no convolution
        assert self.H * self.K == key_dim and self.H * self.V == value_dim, (
            f"{key_dim} key and {value_dim} value channels do not divide into {self.H} heads"
        )

        self.q_proj = nn.Linear(config.d_model, key_dim, bias=False)
        self.k_proj = nn.Linear(config.d_model, key_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, value_dim, bias=False)
        self.g_proj = nn.Linear(config.d_model, value_dim, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(config.d_model, config.gate_low_rank_dim, bias=False),
            nn.Linear(config.gate_low_rank_dim, key_dim),
        )
        self.g_norm_swish_gate = nn.RMSNorm(self.V, config.norm_eps)  # one weight, shared by the heads
        self.o_proj = nn.Linear(value_dim, config.d_model, bias=False)

    def forward(self, x, state):
        # queries, keys and values
        q = self.q_proj(x).unflatten(-1, (self.H, self.K)) * self.K**-0.5  # (B, T, H, K)
        k = self.k_proj(x).unflatten(-1, (self.H, self.K))  # (B, T, H, K)
        v = self.v_proj(x).unflatten(-1, (self.H, self.V))  # (B, T, H, V)

        # the decay of each key channel, in float32 even where autocast computes in bfloat16
        gate = self.gk_proj(x).unflatten(-1, (self.H, self.K))
        gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
        log_a = F.logsigmoid(gate) / 16  # (B, T, H, K)
        o, scan_state = scan(q, k, v, log_a, state.scan, self.backend)  # (B, T, H, V), (B, H, K, V)

        # a norm over the channels of each head, then the gate
        y = self.g_norm_swish_gate(o).flatten(-2) * F.silu(self.g_proj(x))  # (B, T, H V)
        return self.o_proj(y), LayerState(None, scan_state)


class Mamba1(nn.Module):
    """The Mamba layer (Gu & Dao 2023): v = dt * x, log_a = -dt * exp(A_log), and q, k are its C, B.

    Every channel is a head with V = 1, and has a decay for each of its K key channels.
    """

    def __init__(self, config):
        super().__init__()
        self.H = config.expand * config.d_model
        self.K = config.d_state
        self.V = 1
        self.conv_shape = (config.d_conv - 1, self.H)
        self.dt_rank = config.dt_rank
        self.backend = config.backend

        self.in_proj = nn.Linear(config.d_model, 2 * self.H, bias=False)
        self.conv1d = nn.Conv1d(self.H, self.H, config.d_conv, groups=self.H)
        self.x_proj = nn.Linear(self.H, self.dt_rank + 2 * self.K, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.H)
        self.A_log = nn.Parameter(torch.arange(1.0, self.K + 1).log().repeat(self.H, 1))
        self.D = nn.Parameter(torch.ones(self.H))
        self.out_proj = nn.Linear(self.H, config.d_model, bias=False)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
            self.dt_proj.bias.copy_(initial_dt_bias(self.H))
            self.out_proj.weight /= math.sqrt(config.n_layer)

    def forward(self, x, state):
        # the input of the convolution and the gate z
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, H) each
        x, conv_state = causal_conv(x, state.conv, self.conv1d)  # (B, T, H)

        # step size, key and query all depend on the output of the convolution
        dt, k, q = self.x_proj(x).split([self.dt_rank, self.K, self.K], dim=-1)
        # bias and softplus in float32 even where autocast multiplies in bfloat16, hence not dt_proj(dt)
        dt = F.softplus(F.linear(dt, self.dt_proj.weight) + self.dt_proj.bias)  # (B, T, H)
        v = (dt * x).to(x.dtype)  # (B, T, H)
        log_a = -dt[..., None] * self.A_log.exp()  # (B, T, H, K)

        # the recurrence, with q and k as one group and V = 1
        q, k, v = q[:, :, None], k[:, :, None], v[..., None]  # (B, T, 1, K) twice, (B, T, H, 1)
        o, scan_state = scan(q, k, v, log_a, state.scan, self.backend)  # (B, T, H, 1), (B, H, K, 1)

        # the skip connection and the gate
        y = (o[..., 0] + self.D * x) * F.silu(z)  # (B, T, H)
        return self.out_proj(y), LayerState(conv_state, scan_state)


# ---- 3. Blocks and the language model ----


class MambaBlock(nn.Module):
    """Norm, Mamba-2 or Mamba-1, and a residual connection."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba2(config) if config.layer == "mamba2" else Mamba1(config)

    def forward(self, x, state):
        y, state = self.mixer(self.norm(x), state)
        return x + y, state


class GLABlock(nn.Module):
    """Norm, GLA and a residual connection; norm, MLP and a residual connection."""

    def __init__(self, config):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attn = GLA(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, state):
        y, state = self.attn(self.attn_norm(x), state)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


class SwiGLU(nn.Module):
    """The MLP of GLA. Its width is 2/3 * hidden_ratio * D, rounded up to a multiple of 256."""

    def __init__(self, config):
        super().__init__()
        D = config.d_model
        width = 256 * math.ceil(int(D * config.hidden_ratio * 2 / 3) / 256)
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# layer: (its block, and the official names of the trunk, of the embedding and of the last norm)
LAYERS = {
    "mamba2": (MambaBlock, "backbone", "embedding", "norm_f"),
    "mamba1": (MambaBlock, "backbone", "embedding", "norm_f"),
    "gla": (GLABlock, "model", "embeddings", "norm"),
}


class LanguageModel(nn.Module):
    """logits, state = model(tokens, state=None)

    tokens: (B, T) int64 below vocab_size, T >= 1; logits: (B, T, vocab_size)
    state: a list of one LayerState per layer, None for zeros. The returned state is new, and gradients flow
        through it. So cutting a sequence anywhere and handing the state over changes no result. The caller
        may detach the state: the whole difference between BPTT and TBTT or state passing.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        block, trunk, embedding, norm = LAYERS[config.layer]
        # the vocabulary is padded to a round number, which is faster on a GPU
        multiple = config.pad_vocab_size_multiple
        C = multiple * math.ceil(config.vocab_size / multiple)
        modules = {
            embedding: nn.Embedding(C, config.d_model),
            "layers": nn.ModuleList(block(config) for _ in range(config.n_layer)),
            norm: nn.RMSNorm(config.d_model, config.norm_eps),
        }
        self.add_module(trunk, nn.ModuleDict(modules))
        self.lm_head = nn.Linear(config.d_model, C, bias=False)
        self.apply(self.initialize)
        self.tie_weights()

    def initialize(self, module):
        """Embeddings are N(0, .02); linear maps are N(0, .02) in GLA, and as PyTorch made them in Mamba."""
        is_gla = self.config.layer == "gla"
        if isinstance(module, nn.Embedding) or (is_gla and isinstance(module, nn.Linear)):
            nn.init.normal_(module.weight, std=0.02)
        if is_gla and isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def stages(self):
        """The embedding, the list of blocks and the last norm."""
        _, trunk, embedding, norm = LAYERS[self.config.layer]
        modules = self.get_submodule(trunk)
        return modules[embedding], modules["layers"], modules[norm]

    def tie_weights(self):
        """Let the output layer share the weights of the embedding where the configuration says so."""
        if self.config.tie_embeddings:
            embedding, _, _ = self.stages()
            self.lm_head.weight = embedding.weight

    def recurrent_layers(self):
        """The Mamba2, GLA or Mamba1 modules, first layer first."""
        return [module for module in self.modules() if isinstance(module, (Mamba2, GLA, Mamba1))]

    def zero_state(self, B):
        """The state of B rows before their first token: a list of LayerState."""
        weight = self.lm_head.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        state = []
        for layer in self.recurrent_layers():
            conv = None if layer.conv_shape is None else weight.new_zeros(B, *layer.conv_shape)
            S = weight.new_zeros(B, layer.H, layer.K, layer.V, dtype=dtype)
            state.append(LayerState(conv, S))
        return state

    def forward(self, tokens, state=None):
        assert tokens.dim() == 2 and tokens.numel(), f"tokens must be (B, T), got {tuple(tokens.shape)}"
        if state is None:
            state = self.zero_state(len(tokens))
        embedding, blocks, norm = self.stages()

        # every block reads the output of the block before it, and a state of its own
        x = embedding(tokens)  # (B, T, D)
        new_state = []
        for block, layer_state in zip(blocks, state, strict=True):
            if self.config.recompute and torch.is_grad_enabled():
                x, layer_state = torch.utils.checkpoint.checkpoint(block, x, layer_state, use_reentrant=False)
            else:
                x, layer_state = block(x, layer_state)
            new_state.append(layer_state)

        # the padding of the vocabulary is cut off
        logits = self.lm_head(norm(x))[..., : self.config.vocab_size]  # (B, T, vocab_size)
        return logits, new_state

    @staticmethod
    def from_pretrained(name_or_folder):
        """The model of a run of train.py, or of a checkpoint on disk or on the hub (Appendix B)."""
        return model_from_checkpoint(load_checkpoint(name_or_folder))

    def save_pretrained(self, folder, format=None, dtype=torch.float32):
        """Write the model for mamba_ssm, transformers or fla, as export_model of Appendix B says."""
        export_model(self, folder, format, dtype)


# ---- 4. The interventions: from which state does the next training sequence start? ----
# Each is a function (state, stats, rng) -> state. It takes the final state of the previous batch, running
# statistics of final states, and a torch.Generator on the device of the state, and returns the initial state
# of the next batch. For a new idea write one function and add one entry to INTERVENTIONS.


def zero(state, stats, rng):
    """Ordinary training. With extra steps this is also the control of every experiment."""
    return map_state(torch.zeros_like, state)


def random_noise(state, stats, rng, std=1.0):
    """Independent N(0, std^2), with the same std in every layer and head (paper, section 3.2)."""
    return map_state(lambda x: std * normal_like(x, rng), state)


def fitted_noise(state, stats, rng):
    """Independent normal numbers with the mean and std of final states, per layer and head (section 3.2)."""

    def fitted(x, mean, std):
        return (mean + std * normal_like(x, rng)).to(x.dtype)

    return map_state(fitted, state, stats.mean, stats.std)


def state_passing(state, stats, rng):
    """The final state of the previous batch, which holds other sequences (section 3.2)."""
    return state


INTERVENTIONS = {  # name: (function, does row b of the next batch continue row b of this one?)
    "zero": (zero, False),
    "random_noise": (random_noise, False),
    "fitted_noise": (fitted_noise, False),
    "state_passing": (state_passing, False),
    "tbtt": (state_passing, True),  # truncated backpropagation through time: rows that continue
}


def next_initial_state(function, state, stats, rng, zero_prob=0.0, carry="full"):
    """The initial state of the next batch: an intervention applied to the final state of this batch.

    function, state, stats, rng: the intervention and its arguments, as above; updates `stats`
    zero_prob: each row starts from zeros instead with this probability, so that the model can still do that
    carry: "full" hands over convolution and scan, "scan" the scan alone, all that the paper's kernel can take
    """
    assert carry in ("full", "scan") and 0 <= zero_prob <= 1, f"carry {carry!r}, zero_prob {zero_prob}"
    # no gradient crosses from one batch to the next
    state = map_state(torch.Tensor.detach, state)
    stats.update(state)
    state = function(state, stats, rng)

    # the paper hands over the scan's state alone: the convolution starts from zeros
    if carry == "scan":
        zeros = map_state(torch.zeros_like, state)
        state = [LayerState(empty.conv, layer.scan) for layer, empty in zip(state, zeros, strict=True)]

    # some rows start from zeros all the same, in all layers
    if zero_prob > 0:
        draws = torch.rand(len(state[0].scan), generator=rng, device=state[0].scan.device)
        from_zeros = (draws < zero_prob).nonzero().flatten()
        state = map_state(lambda x: x.index_fill(0, from_zeros, 0), state)
    return state


def normal_like(x, rng):
    return torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)


class StateStatistics:
    """Running mean and std of the final states seen in training, for fitted noise (paper, section 3.2).

    They are taken per layer: of the scan per head, of the convolution's inputs per channel. `mean` and `std`
    are states whose shapes broadcast: scan (1, H, 1, 1), conv (1, 1, channels). The paper does not say how it
    estimates them; ours is an exponential average over about 1/rate batches.
    """

    def __init__(self, rate=0.05):
        self.rate = rate
        self.count = 0  # batches so far
        self.mean = None
        self.mean_square = None

    def update(self, state):
        """Take in the final state of one more batch; in a distributed run, of all ranks."""
        mean = map_state(mean_per_head, state)
        mean_square = map_state(lambda x: mean_per_head(x.float() ** 2), state)
        self.count += 1
        if self.count == 1:
            self.mean = mean
            self.mean_square = mean_square
            return
        # the first batches count alike, later ones by `rate`
        weight = max(self.rate, 1 / self.count)
        self.mean = map_state(lambda old, new: old + weight * (new - old), self.mean, mean)
        self.mean_square = map_state(
            lambda old, new: old + weight * (new - old), self.mean_square, mean_square
        )

    @property
    def std(self):
        def std_of(mean, mean_square):
            return (mean_square - mean * mean).clamp(min=0).sqrt()

        return map_state(std_of, self.mean, self.mean_square)


def mean_per_head(x):
    """The mean of scan (B, H, K, V) per head, or of conv (B, d_conv-1, channels) per channel."""
    dims = (0, 2, 3) if x.dim() == 4 else (0, 1)
    return mean_over_ranks(x.float().mean(dims, keepdim=True))


def mean_over_ranks(x):
    """The mean of a tensor over the ranks of a distributed run, computed in place."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
        x /= torch.distributed.get_world_size()
    return x


# ---- 5. The tasks ----
# Each is a function (rows, T) -> tokens (B, T+1) int64, part (B, T) int8, both NumPy arrays.
#
# The inputs are tokens[:, :-1], the targets tokens[:, 1:]. `part` is the loss mask: a target whose part is 0
# is neither trained on nor counted; 1, 2, ... name the part of the task that the target belongs to. The last
# token of a window is the first of the next one, so windows of rows that continue join into one stream.


class Rows:
    """B rows that read pieces of a text.

    corpus, split: a Corpus of Appendix A, and its "train" or "val"
    continues: every row reads on where its last piece ended (for TBTT and for streams); otherwise every piece
        begins at a place that is drawn anew
    """

    def __init__(self, corpus, split, B, continues, seed):
        self.corpus = corpus
        self.tokens = getattr(corpus, split)  # (N,)
        self.B = B
        self.continues = continues
        self.rng = torch.Generator().manual_seed(seed)
        self.at = None  # (B,) the place where each row reads next
        # a document lies between two boundaries
        boundaries = np.flatnonzero(self.tokens == corpus.bos)
        self.begins = np.append(0, boundaries + 1)
        self.ends = np.append(boundaries, len(self.tokens))

    def state_dict(self):
        return dict(rng=self.rng.get_state(), at=self.at)

    def load_state_dict(self, saved):
        self.rng.set_state(saved["rng"])
        self.at = at = saved["at"]
        if at is not None:
            in_text = at.shape == (self.B,) and 0 <= at.min() <= at.max() <= len(self.tokens)
            assert in_text and at.dtype == torch.int64, f"{self.B} rows cannot go on from the places {at}"

    def next_batch(self, n, overlap=0, inside_document=False):
        """(B, n) int64 tokens. Rows that continue advance by n - overlap, and wrap around at the text's end.

        inside_document: a row skips to the next document of n tokens where its own has fewer left.
        """
        last = len(self.tokens) - n  # the last place where a piece can begin
        if last < 0:
            raise ValueError(f"the text has {len(self.tokens)} tokens, shorter than the {n} that are needed")
        if self.at is None or not self.continues:
            self.at = torch.randint(last + 1, (self.B,), generator=self.rng)
        at = np.where(self.at > last, 0, self.at)
        if inside_document:
            long_enough = self.begins[self.ends - self.begins >= n]
            if not len(long_enough):
                raise ValueError(f"no document of the text has the {n} tokens that are needed")
            end = self.ends[np.searchsorted(self.ends, at)]
            following = long_enough[np.searchsorted(long_enough, at) % len(long_enough)]
            at = np.where(at + n <= end, at, following)
        self.at = torch.from_numpy(at + n - overlap)
        return self.tokens[at[:, None] + np.arange(n)].astype(np.int64)


def text(rows, T):
    """Plain text, in windows of T tokens, for example `import os<|bos|>"`. All of the targets count."""
    tokens = rows.next_batch(T + 1, overlap=1)
    return tokens, np.ones((rows.B, T), dtype=np.int8)


def echo(rows, T):
    """A passage of real text, then the same passage again. T = 2n + 2 for a passage of n tokens, here n = 3.

    input    <bos> d  e  f <sep> d  e  f
    target     d   e  f <sep> d  e  f <bos>
    part       1   1  1   0   2  2  2   0       1 text, 2 echo

    Inside T nothing ever needs to be forgotten, so a model trained from zero states does not learn to forget.
    """
    n = T // 2 - 1
    if T % 2 or n < 1:
        raise ValueError(f"echo needs an even T of at least 4, got {T}")
    passage = rows.next_batch(n, inside_document=True)
    bos = np.full((rows.B, 1), rows.corpus.bos)
    sep = np.full((rows.B, 1), rows.corpus.sep)
    tokens = np.concatenate([bos, passage, sep, passage, bos], axis=1)
    part = np.repeat(np.array([1, 0, 2, 0], dtype=np.int8), [n, 1, n, 1])
    return tokens, np.tile(part, (rows.B, 1))


ECHO_SHARE = 0.5


def mixed(rows, T):
    """Half of the rows of a window are echo, the others plain text that begins anywhere; parts as in echo.

    Plain text alone does not break models as small as ours. Echo rewards them for keeping the state, and then
    streams of pure text break them, too. A row that continues goes on after the text, or the passage, that it
    has read.
    """
    text_tokens, text_part = text(rows, T)
    after_text = rows.at
    rows.at = after_text - T  # rows that continue echo the same text, others draw a new place
    echo_tokens, echo_part = echo(rows, T)
    is_echo = torch.rand(rows.B, 1, generator=rows.rng) < ECHO_SHARE
    rows.at = torch.where(is_echo[:, 0], rows.at, after_text)
    is_echo = is_echo.numpy()
    return np.where(is_echo, echo_tokens, text_tokens), np.where(is_echo, echo_part, text_part)


def copy(rows, T, shortest=5, longest=20):
    """The paper's synthetic copying (Jelassi et al. 2024): 5 to 20 random letters to repeat, packed into T.

    input    $  x  k  c  q  h  |  x  k  c  q  h  .  $  ...
    target   x  k  c  q  h  |  x  k  c  q  h  .  $  ...
    part     0  0  0  0  0  0  1  1  1  1  1  2  0  ...    1 copy, 2 stop, which no accuracy counts

    Every window starts a new string: rows that continue carry only their state. A string that the end of the
    window cuts off is not trained on, as in their code. T = 2n + 3, shortest = longest = n: one string.
    """
    if T < 2 * longest + 3:  # a window could hold nothing to copy, and the loss over nothing is no number
        raise ValueError(f"copy needs a T of at least {2 * longest + 3}, the longest string twice, got {T}")
    tokens, part = empty_windows(rows, T)
    tokens[:] = ord("$")
    for b in range(rows.B):
        start = 0
        while start < T:
            n = int(torch.randint(shortest, longest + 1, (), generator=rows.rng))
            letters = torch.randint(ord("a"), ord("z") + 1, (n,), generator=rows.rng).numpy()
            string = [ord("$"), *letters, ord("|"), *letters, ord(".")]
            stop = start + len(string)
            tokens[b, start : min(stop, T)] = string[: T - start]
            if stop <= T:
                part[b, start + n + 1 : stop - 1] = [1] * n + [2]
            start = stop
    return tokens, part


FILLER = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def passkey(rows, T, depth=None):
    """Five digits hidden in filler and asked for at the end, in Landmark Attention's words (2023), in bytes.

    <bos>The grass is gr|The pass key is 30719. Remember it. 30719 is the pass key. |The grass is green. The s
    part 0, and 1 on                                         11111
    |What is the pass key? The pass key is 30719<bos>              | marks joints, the filler fills the window
                                   2 on    22222

    depth: the share of the filler that comes before the key; None draws a place for each row. The opening
    line of the published task is left out, because it is longer than our T.
    """
    tokens, part = empty_windows(rows, T)
    for b in range(rows.B):
        key = b"%05d" % int(torch.randint(10**5, (), generator=rows.rng))
        needle = b"The pass key is %b. Remember it. %b is the pass key. " % (key, key)
        question = b"What is the pass key? The pass key is " + key
        n = T - 1 - len(needle) - len(question)  # bytes of filler
        if n < 0:
            raise ValueError(f"passkey needs a T of at least {T - n}, got {T}")
        before = int(torch.randint(n + 1, (), generator=rows.rng))
        if depth is not None:
            before = round(depth * n)
        filler = FILLER * (n // len(FILLER) + 1)
        window = filler[:before] + needle + filler[: n - before] + question
        tokens[b, 1:T] = np.frombuffer(window, dtype=np.uint8)
        mention = before + needle.rindex(key)
        part[b, mention : mention + 5] = 1
        part[b, T - 6 : T - 1] = 2
    return tokens, part


def empty_windows(rows, T):
    """tokens (B, T+1), all <bos>, and part (B, T), all 0, for a task that is written in bytes."""
    if rows.corpus.words != 256:
        raise ValueError(f"this task is in bytes, not in {rows.corpus.words} words: use --tokenizer bytes")
    return np.full((rows.B, T + 1), rows.corpus.bos, dtype=np.int64), np.zeros((rows.B, T), dtype=np.int8)


# The words of bAbI v1.2, task qa1
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
ACTORS = ("Daniel", "John", "Mary", "Sandra")
MOVE = ("moved", "went", "went back", "journeyed", "travelled")


def babi(rng):
    """A story of bAbI's first task, from our own generator: three sentences, a question, and its answer."""

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=rng))]

    facts = []
    room_of = {}
    for _ in range(3):
        actor = pick(ACTORS)
        room_of[actor] = pick([room for room in ROOMS if room != room_of.get(actor)])
        facts.append(f"{actor} {pick(MOVE)} to the {room_of[actor]}.")
    actor = pick(list(room_of))
    return facts, f"Where is {actor}?", room_of[actor]


def babilong(rows, T):
    """The facts of a bAbI story in order, at drawn places between lines of background text (BABILong, 2024).

    <bos>import os/Mary went to the office. class A:/John moved to the garden. xWhere is Mary? office.<bos>
    part 0, and 1 on               (here / ends a line)                                        1111111

    In bytes; the background fills the window.
    """
    if T < 128:  # of the longest story
        raise ValueError(f"babilong needs a T of at least 128, got {T}")
    tokens, part = empty_windows(rows, T)
    background = rows.next_batch(T)
    for b in range(rows.B):
        facts, question, answer = babi(rows.rng)
        ending = f"{question} {answer}."
        n = T - 1 - len(" ".join([*facts, ending]))  # bytes of background

        # a fact stands between lines, so its drawn place moves on to the end of the line
        line_ends = np.append(np.flatnonzero(background[b, :n] == ord("\n")) + 1, n)
        places = torch.randint(n + 1, (len(facts),), generator=rows.rng).sort().values.numpy()
        places = line_ends[np.searchsorted(line_ends, places)]
        window = [*background[b, :n], *ending.encode()]
        # the last fact first, so that the places of the others stay
        for fact, place in zip(reversed(facts), reversed(places), strict=True):
            window[place:place] = f"{fact} ".encode()
        tokens[b, 1:T] = window
        part[b, T - 2 - len(answer) : T - 1] = 1
    return tokens, part


TASKS = {  # name: (function, default T, names of the parts)
    "echo": (echo, 50, ("text", "echo")),
    "mixed": (mixed, 50, ("text", "echo")),
    "text": (text, 256, ("text",)),
    "copy": (copy, 64, ("copy", "stop")),
    "passkey": (passkey, 160, ("mention", "key")),
    "babilong": (babilong, 144, ("answer",)),
}


def stream(task, rows, T, windows):
    """Join consecutive windows of a task: tokens (B, windows*T + 1), part (B, windows*T)."""
    batches = [task(rows, T) for _ in range(windows)]
    tokens, parts = zip(*batches, strict=True)
    inputs = [window[:, :-1] for window in tokens]
    return np.concatenate([*inputs, tokens[-1][:, -1:]], axis=1), np.concatenate(parts, axis=1)


# ---- 6. The measures ----


def masked_loss(logits, targets, part):
    """Mean float32 cross-entropy, nats, where part is not 0. logits (B, T, C), targets and part (B, T)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.masked_fill(part == 0, -100).flatten())


@torch.no_grad()
def read_stream(model, tokens, segment, state=None):
    """Read tokens (B, N+1) a segment at a time, carrying the state, in the memory of one segment.

    Yields (start, logits, targets): of the inputs from `start` on, the logits (B, n, C), float32 or float64,
    and their targets (B, n). tokens are integers, NumPy or memory-mapped.
    """
    assert segment >= 1, f"segment must be positive, got {segment}"
    device = model.lm_head.weight.device
    for start in range(0, tokens.shape[1] - 1, segment):
        window = np.asarray(tokens[:, start : start + segment + 1], dtype=np.int64)
        window = torch.from_numpy(window).to(device)
        logits, state = model(window[:, :-1], state)
        yield start, logits.to(torch.promote_types(logits.dtype, torch.float32)), window[:, 1:]


def segment_for(B):
    """How many tokens of B rows to read at a time: more would overflow the caches of a CPU."""
    return max(1, 12800 // B)


def streaming_loss(model, tokens, bins, segment=1024, state=None, progress=None):
    """Sum of losses (nats, float64) and number of targets in each bin, whatever the segment.

    tokens: (B, N+1) integers. The inputs are all but the last column, the targets all but the first, each
        counted once. Boundaries of documents are tokens like any other, as in training.
    bins: (N,) or (B, N) integers, the bin of each target; -1 leaves a target out
    progress: a function that is called after each segment with the share that is done
    """
    B, N = tokens.shape[0], tokens.shape[1] - 1
    bins = np.broadcast_to(bins, (B, N))
    n_bins = int(bins.max()) + 1
    total = torch.zeros(n_bins, dtype=torch.float64)
    count = torch.zeros(n_bins, dtype=torch.int64)
    for start, logits, targets in read_stream(model, tokens, segment, state):
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").cpu().double()
        stop = start + targets.shape[1]
        bin_of = torch.from_numpy(bins[:, start:stop].astype(np.int64)).flatten()
        counted = bin_of >= 0
        total += torch.bincount(bin_of[counted], loss[counted], n_bins)
        count += torch.bincount(bin_of[counted], minlength=n_bins)
        if progress:
            progress(stop / N)
    return total, count


def position_wise(model, task_name, corpus, T, B, windows=64, seed=0, progress=None):
    """Loss by position on B streams of validation text from a zero state (the paper's figure 1).

    Returns {"x": where ranges of positions end, in multiples of T, part: the mean loss in each range, nats}.
    The ranges end at 1, 2, 3, 4, 6, 8, 12, ... T, for plain text also at 1/8, 1/4 and 1/2 T. The loss of a
    range without targets is NaN.
    """
    task, _, parts = TASKS[task_name]
    tokens, part = stream(task, Rows(corpus, "val", B, True, seed), T, windows)

    # the ranges
    ends = [1 / 8, 1 / 4, 1 / 2, 1] if task_name == "text" else [1]
    for i in range(1, windows.bit_length()):
        ends += [2**i, 1.5 * 2**i]
    ends = [end for end in ends if end < windows] + [windows]

    # the bin of a target is its range and its part
    range_of = np.searchsorted(np.array(ends) * T, np.arange(T * windows), side="right")  # (N,)
    bins = np.where(part > 0, range_of * len(parts) + part - 1, -1)
    total, count = streaming_loss(model, tokens, bins, segment_for(B), progress=progress)
    losses = F.pad(total / count, (0, len(ends) * len(parts) - len(total)), value=math.nan)
    measured = {"x": ends}
    for i, name in enumerate(parts):
        measured[name] = losses[i :: len(parts)].tolist()
    return measured


def paired_gap(model, tokens, T):
    """What the past costs in nats: the loss after the whole stream minus that after at most T tokens.

    tokens: (B, N+1) with N a multiple of T, a stream from a zero state. The targets are those in the second
    half of each block of T, so the short context has T/2 to T tokens. Returns (N/T,), 0 for the first block.
    """
    B, N = tokens.shape[0], tokens.shape[1] - 1
    assert N % T == 0, f"paired_gap needs N + 1 tokens with N a multiple of T {T}, got {N + 1}"
    block = np.arange(N) // T
    block[np.arange(N) % T < T // 2] = -1
    whole, count = streaming_loss(model, tokens, block, segment_for(B))
    short = torch.zeros_like(whole)
    for i in range(N // T):
        window = tokens[:, i * T : (i + 1) * T + 1]
        total, _ = streaming_loss(model, window, block[i * T : (i + 1) * T], segment=T)
        short[i] = total[i]
    return (whole - short) / count


def accuracy(model, tokens, part):
    """Whether the likeliest token is the target, in one teacher-forced pass from a zero state.

    tokens (B, N+1), part (B, N) -> (B, N) float64: 1 right, 0 wrong, NaN where part is 0. The greedy
    continuation of a prompt is the answer exactly where all targets of the answer are right.
    """
    right = []
    for _, logits, targets in read_stream(model, tokens, segment_for(len(tokens))):
        right.append((logits.argmax(-1) == targets).cpu().double())
    return torch.cat(right, 1).masked_fill(torch.from_numpy(part) == 0, math.nan)


@torch.no_grad()
def prefill(model, tokens, state=None):
    """Read tokens (B, T) in constant memory. Returns the logits (B, C) after the last one, and the state."""
    for window in torch.as_tensor(tokens).split(segment_for(len(tokens)), dim=1):
        logits, state = model(window.to(model.lm_head.weight.device), state)
    return logits[:, -1], state


def generate(model, tokens, n, temperature=0.0):
    """Read tokens (B, T), then yield the next n tokens, each (B,); temperature 0 takes the likeliest."""
    logits, state = prefill(model, tokens)
    for _ in range(n):
        token = logits.argmax(-1)
        if temperature > 0:
            # float64, in which the division by a tiny temperature does not overflow
            token = torch.multinomial((logits.cpu().double() / temperature).softmax(-1), 1)[:, 0]
        yield token
        logits, state = prefill(model, token[:, None], state)


def state_std(model, tokens, at):
    """Std of the state S after each of the ascending positions `at` of tokens (B, N), in float64.

    Returns full (n,), over all entries as in the paper's figure; layers (n, L); heads (n, L, H).
    """
    assert list(at) == sorted({*at}) and 0 < at[0] and at[-1] <= tokens.shape[1], f"at is {at}"
    full, layers, heads = [], [], []
    state = None
    for start, stop in itertools.pairwise([0, *at]):
        _, state = prefill(model, tokens[:, start:stop], state)
        S = torch.stack([layer.scan.cpu().double() for layer in state])  # (L, B, H, K, V)
        full.append(S.std(correction=0))
        layers.append(S.std((1, 2, 3, 4), correction=0))
        heads.append(S.std((1, 3, 4), correction=0))
    return torch.stack(full), torch.stack(layers), torch.stack(heads)


@contextlib.contextmanager
def changed_decay(model, change):
    """Within the block, the layers of the model use change(log_a) in the place of log_a."""

    def changed_scan(q, k, v, log_a, state):
        return scan(q, k, v, change(log_a), state, model.config.backend)

    BACKENDS["decay changed"] = changed_scan
    for layer in model.recurrent_layers():
        layer.backend = "decay changed"
    try:
        yield
    finally:
        for layer in model.recurrent_layers():
            layer.backend = model.config.backend
        del BACKENDS["decay changed"]


@torch.no_grad()
def decays(model, tokens):
    """The log_a of every layer on tokens (B, T) from a zero state: a list of (B, T, H) or (B, T, H, K)."""
    layers = []

    def record(log_a):
        layers.append(log_a)
        return log_a

    with changed_decay(model, record):
        model(torch.as_tensor(tokens).to(model.lm_head.weight.device))
    return layers


@torch.no_grad()
def effective_remembrance(model, tokens, starts, end):
    """How much the first t tokens still matter: EffRem(t) = TV(q(.|x[0:T]), q(.|x[t:T])) (paper, section 5).

    Here q is the model's distribution of the next token, and T the number of tokens so far.
    tokens: (B, N), read from a zero state; starts: ascending t, 0 < t <= end. The suffixes x[t:] run as one
    batch, which grows by B rows at each t. Returns (len(starts), B, N - end) numbers in [0, 1], for the
    predictions after T = end + 1, ..., N tokens.
    """
    assert list(starts) == sorted({*starts}) and 0 < starts[0] and starts[-1] <= end, f"{starts}, end {end}"
    tokens = torch.as_tensor(tokens).to(model.lm_head.weight.device)
    zeros = model.zero_state(len(tokens))
    state = zeros
    suffixes = 1
    for start, stop in itertools.pairwise([0, *starts, end]):
        if start > 0:  # one more suffix begins here
            state = map_state(lambda x, zero: torch.cat([x, zero]), state, zeros)
            suffixes += 1
        if start < stop:
            _, state = model(tokens[:, start:stop].repeat(suffixes, 1), state)
    logits, _ = model(tokens[:, end:].repeat(suffixes, 1), state)
    q = logits.float().softmax(-1).unflatten(0, (suffixes, -1))  # (1 + len(starts), B, N - end, C)
    return ((q[1:] - q[:1]).abs().sum(-1) / 2).cpu()


def babilong_score(output, answer, question, qa):
    """BABILong's rule: before the first '.' or tag, the answer is the only label not in the question."""
    # the answers of qa1 to qa4 are rooms, those of qa5 receivers and objects
    labels = ROOMS if qa < 5 else ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk")
    sentence = re.split(r"\.|<context>|<example>", output.lower())[0]
    named = {x for x in labels if x.lower() in sentence and x not in question}
    return named == {answer}


# ---- Appendix A: text and tokenizers ----
# Every document starts with the token <|bos|>, in training as in a stream.


@contextlib.contextmanager
def reading(file, what):
    """Turn any error of the block, which reads `file`, into a ValueError of one line.

    A damaged file can make a library raise anything, even a panic of its Rust code, which is no Exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, (ValueError, AssertionError)):
            reason = f"{type(error).__name__}: {reason}"  # a KeyError, for one, says nothing but the key
        raise ValueError(f"{file} cannot be read as {what}: {reason}"[:500]) from None


def require(name, value, *known):
    """Raise a ValueError unless a setting in a file has one of the values that the code here stands for."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}, but only {known[0]!r} is known here")


BYTES = tiktoken.Encoding(  # one token for each byte of UTF-8; the pattern only bounds the work per piece
    "bytes", pat_str=r"(?s:.{1,16})", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
)
BYTES.special = ()  # ids of an encoding's special tokens: Corpus takes the first two for bos and sep
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class HuggingFaceEncoding(tiktoken.Encoding):
    """A tokenizer.json of byte-level BPE (GPT-2, GPT-NeoX, ...), with the ids of Hugging Face's tokenizers.

    Raises ValueError for a file of another kind.
    """

    def __init__(self, file):
        with reading(file, "a byte-level BPE tokenizer like GPT-NeoX's"):
            tokenizer = json.loads(Path(file).read_bytes())
            model, pre = tokenizer["model"], tokenizer["pre_tokenizer"]
            require("the model", model["type"], "BPE")
            require("the normalizer", tokenizer["normalizer"], {"type": "NFC"}, None)
            require("the pre_tokenizer", pre["type"], "ByteLevel")
            require("add_prefix_space", pre["add_prefix_space"], False)
            require("use_regex", pre.get("use_regex", True), True)
            for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
                require(name, model.get(name), None, "", 0)

            # added tokens are found in a text before its words are: the special ones and others
            added, special = {}, {}  # text -> id
            for token in tokenizer["added_tokens"]:
                for name in ("lstrip", "rstrip", "single_word"):
                    require(f"{name} of an added token", token[name], False)
                added[token["content"]] = token["id"]
                if token["special"]:
                    special[token["content"]] = token["id"]

            # the file spells bytes as characters: printable bytes as they are, the others from 256 on
            printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
            others = [byte for byte in range(256) if byte not in printable]
            byte_of = {chr(byte): byte for byte in printable}
            byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
            ranks = {}
            for word, i in model["vocab"].items():
                if i not in added.values():
                    ranks[bytes(byte_of[character] for character in word)] = i

            # tiktoken merges pairs in the order of the ids that they get, Hugging Face in the order of a list
            # of pairs, "a b" or ["a", "b"]
            merged = []
            for pair in model["merges"]:
                if isinstance(pair, str):
                    pair = pair.split(" ")
                merged.append(model["vocab"]["".join(pair)])
            if merged != sorted(i for word, i in ranks.items() if len(word) > 1):
                raise ValueError("its merges are not in the order of their ids")

            # what would go wrong later: UTF-8 has all bytes but 0xC0, 0xC1 and those from 0xF5 on
            for byte in range(0xF5):
                if byte not in (0xC0, 0xC1) and bytes([byte]) not in ranks:
                    raise ValueError(f"the byte {byte} has no token")
            if "" in added:
                raise ValueError("an added token is empty")
            super().__init__(file, pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=added)
            if self.n_vocab > os.path.getsize(file):
                raise ValueError(f"its vocabulary of {self.n_vocab} tokens is larger than the file")
            self.nfc, self.special = tokenizer["normalizer"] is not None, tuple(special.values())
            self.added, self.added_ordinary = any_of(added), any_of(added.keys() - special.keys())

    def encode(self, text, allowed_special=(), **_):
        """The ids of a text; special tokens that it spells out are text, unless allowed_special is "all"."""
        pattern = self.added if allowed_special == "all" else self.added_ordinary
        ids = []
        for i, piece in enumerate(pattern.split(text)):
            if i % 2:  # what the pattern has found
                ids.append(self._special_tokens[piece])
            else:
                if self.nfc:  # each piece apart: a combining mark after a special token must not join it
                    piece = unicodedata.normalize("NFC", piece)
                ids += self.encode_ordinary(piece)
        return ids

    def encode_to_numpy(self, text, **options):
        return np.array(self.encode(text, **options), dtype=np.uint32)


def any_of(words):
    """A pattern that finds the words, the longest first: tiktoken would cut 24 spaces into 13 + 8 + 3."""
    alternatives = map(re.escape, sorted(words, key=len, reverse=True))
    return re.compile(f"({'|'.join(alternatives) or '(?!)'})")


def load_encoding(name):
    """The tiktoken.Encoding that load_corpus calls `tokenizer`; ValueError if there is none."""
    if name == "bytes":
        return BYTES
    names = tiktoken.list_encoding_names()
    if name in names:
        with reading(name, "a tokenizer of tiktoken"):
            encoding = tiktoken.get_encoding(name)
        encoding.special = ()
        return encoding
    file = os.path.join(name, "tokenizer.json") if os.path.isdir(name) else name
    if not os.path.exists(name) and HUB_NAME.fullmatch(name):
        file = download(name, "tokenizer.json") or name
    if not os.path.isfile(file):
        raise ValueError(f"unknown tokenizer {name!r}, expected bytes or one of {names} or a tokenizer.json")
    return HuggingFaceEncoding(file)


@dataclass
class Corpus:
    """Tokens of a training and a validation split."""

    name: str  # what it is, for people; a run goes on only with a corpus of the same name
    train: np.ndarray  # (N,) uint16 or uint32
    val: np.ndarray
    words: int  # size of the tokenizer's vocabulary
    special: tuple = ()  # the tokenizer's own tokens for bos and sep; those that it lacks follow its words

    def __post_init__(self):
        ids = [*self.special, self.words, self.words + 1]  # the tokenizer's own, then free ones
        self.bos, self.sep = ids[:2]
        self.vocab_size = max(self.words, self.bos + 1, self.sep + 1)


# with so many documents a twentieth of them is held out whole, with fewer the last tenth of each
MANY_DOCUMENTS = 200


def load_corpus(paths=None, tokenizer="bytes", vocab_size=None):
    """Read text and tokenize it. Raises ValueError for a path that is missing, a corpus that is empty.

    paths: None for the Python standard library of this machine, else a list of files, folders or globs:
        text, .jsonl with a "text" field, or one nanoGPT-style .bin of uint16 tokens
    tokenizer: "bytes", the name of a tiktoken encoding ("gpt2", "o200k_base"), or a tokenizer.json, its
        folder or hub name; a .bin is tokenized already and takes only the vocabulary from it
    vocab_size: of the model that is to read a .bin of an unknown tokenizer ("bytes"); None: as in the .bin
    """
    encoding = load_encoding(tokenizer)
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    paths = list(map(os.fspath, paths or ()))
    if any(path.endswith(".bin") for path in paths):
        words = None
        if tokenizer != "bytes":
            words = encoding.n_vocab
        elif vocab_size is not None:
            words = vocab_size - 2  # the model's bos and sep follow its words
        return load_bin(paths, words, encoding.special)

    # equal texts are read once
    documents = {text: key for key, text in sorted(read_documents(paths)) if text}
    source = " ".join(paths) or "the Python standard library"
    if not documents:
        raise ValueError(f"the corpus is empty: no text in {source}")

    # the pieces of both splits, each document after a bos
    corpus = Corpus(f"{len(documents)} documents of {source}", None, None, encoding.n_vocab, encoding.special)
    dtype = np.uint16 if corpus.vocab_size <= 2**16 else np.uint32
    bos = np.array([corpus.bos], dtype)
    train, val = [bos[:0]], [bos[:0]]
    for text, key in documents.items():
        # a text that spells a special token, as pages about language models do, is text
        tokens = encoding.encode_to_numpy(text, disallowed_special=()).astype(dtype)
        if len(documents) < MANY_DOCUMENTS:
            cut = len(tokens) - len(tokens) // 10
            train += [bos, tokens[:cut]]
            val += [bos, tokens[cut:]]
        elif zlib.crc32(key.encode(errors="surrogateescape")) % 20 == 0:
            val += [bos, tokens]
        else:
            train += [bos, tokens]
    corpus.train, corpus.val = np.concatenate(train), np.concatenate(val)
    return corpus


def load_bin(paths, words, special):
    """The Corpus of one .bin, memory-mapped; words None: as many as its highest token asks for."""
    if len(paths) > 1:
        raise ValueError(f"a .bin of tokens stands alone, got {len(paths)} paths")
    with reading(paths[0], "a .bin of uint16 tokens"):
        tokens = np.memmap(paths[0], dtype=np.uint16, mode="r")
        highest = int(tokens.max())
        if words is not None and highest >= words:
            raise ValueError(f"it has a token {highest}, which is outside the vocabulary of {words} words")
    cut = len(tokens) - len(tokens) // 10
    return Corpus(paths[0], tokens[:cut], tokens[cut:], words or highest + 1, special)


def read_documents(paths):
    """Yield (key, text); the key is relative, so that a file is held out on every machine or on none."""
    for path in paths or [sysconfig.get_paths()["stdlib"]]:
        if os.path.isdir(path):
            with reading(path, "a folder of text"):
                os.listdir(path)  # glob takes a folder that cannot be read for an empty one
            root, files = path, glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True)
        elif os.path.exists(path):
            root, files = os.path.dirname(path), [path]
        else:
            root, files = os.path.dirname(re.split(r"[*?[]", path)[0]), glob.glob(path, recursive=True)
        files = list(filter(os.path.isfile, files))
        if not files:
            raise ValueError(f"no text at {path!r}, give an existing file, folder or glob")
        for file in files:
            key = os.path.relpath(file, root or ".").replace(os.sep, "/")
            if paths or (key.endswith(".py") and not re.search("(site|dist)-packages", key)):
                yield from read_file(file, key)


def read_file(file, key):
    """Yield (key, text) of a file, or of each line of a .jsonl."""
    with reading(file, "text"):
        with open(file, encoding="utf-8", errors="replace") as f:
            lines = f.readlines()
        if any("\0" in line for line in lines):
            raise ValueError("it has NUL bytes, so it is a binary file")
    if not file.endswith(".jsonl"):
        yield key, "".join(lines)
        return
    for i, line in enumerate(lines):
        with reading(f"{file} line {i + 1}", 'a JSON object with a "text"'):
            # halves of a surrogate pair, which JSON can spell, become "?"
            text = json.loads(line)["text"].encode(errors="replace").decode()
        yield f"{key}:{i:09d}", text


def read_babilong(file, rows):
    """The first entries of a published BABILong file: a list of (text with the question, question, answer).

    The file holds JSON objects with input, question and target, in one list or one a line.
    """
    with reading(file, "BABILong, JSON objects with input, question and target"):
        content = Path(file).read_text()
        if content.lstrip().startswith("["):
            objects = json.loads(content)
        else:
            objects = [json.loads(line) for line in content.splitlines() if line.strip()]
        entries = []
        for x in objects[:rows]:
            question = x["question"].strip()
            entries.append((f"{x['input'].strip()} {question}", question, x["target"].strip()))
        if not entries:
            raise ValueError("it is empty")
    return entries


# ---- Appendix B: checkpoints of other libraries ----
# No file is believed: nothing in it is executed, and a model that would be larger than its file is not built.

CHECKPOINT = "checkpoint.pt"  # of train.py
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # of the others
HUB = "https://huggingface.co/{name}/resolve/main/{file}"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
NEOX = "EleutherAI/gpt-neox-20b"  # has the tokenizer of the official Mambas, which come without
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

MAMBA_SSM = "d_model n_layer vocab_size tie_embeddings pad_vocab_size_multiple d_state d_conv expand"
SSM_CFG = ("d_state", "d_conv", "expand", "headdim", "ngroups", "dt_rank")  # those inside ssm_cfg
TRANSFORMERS = "hidden_size num_hidden_layers vocab_size tie_word_embeddings layer_norm_epsilon state_size"
FLA = "hidden_size num_hidden_layers vocab_size tie_word_embeddings norm_eps num_heads expand_k expand_v"
OFFICIAL = dict(d_model=2560, n_layer=64, pad_vocab_size_multiple=8)
PADDED = dict(pad_vocab_size_multiple=1)  # in transformers the padding of a vocabulary counts as words
LARGE2 = dict(PADDED, d_model=4096, n_layer=64, vocab_size=32768, ngroups=8, tie_embeddings=False)
MEDIUM1 = dict(PADDED, n_layer=32, vocab_size=50280)
KINDS = {  # ssm_cfg.layer or model_type: (library, layer, its settings, the values of missing ones)
    "Mamba2": ("mamba_ssm", "mamba2", MAMBA_SSM + " headdim ngroups", OFFICIAL),
    "Mamba1": ("mamba_ssm", "mamba1", MAMBA_SSM + " dt_rank", OFFICIAL),
    "mamba2": ("transformers", "mamba2", TRANSFORMERS + " conv_kernel expand head_dim n_groups", LARGE2),
    "mamba": ("transformers", "mamba1", TRANSFORMERS + " conv_kernel expand time_step_rank", MEDIUM1),
    "gla": ("fla", "gla", FLA + " hidden_ratio", dict(d_model=2048, vocab_size=32000)),
}
FIELDS = dict(  # a setting -> the field of ModelConfig that has another name
    hidden_size="d_model", num_hidden_layers="n_layer", tie_word_embeddings="tie_embeddings",
    layer_norm_epsilon="norm_eps", state_size="d_state", conv_kernel="d_conv", head_dim="headdim",
    n_groups="ngroups", time_step_rank="dt_rank",
)  # fmt: skip
REQUIRED = {  # settings that change the formulas, with the values that the formulas of this file stand for
    "mamba_ssm": dict(
        rms_norm=[True], d_intermediate=[0], attn_layer_idx=[[]], bias=[False], conv_bias=[True],
        rmsnorm=[True], norm_before_gate=[False], D_has_hdim=[False], d_ssm=[None],
        dt_limit=[[0.0, math.inf]],
    ),
    "transformers": dict(
        hidden_act=["silu", "swish"], use_bias=[False], use_conv_bias=[True], rms_norm=[True], attn=[None],
        time_step_limit=[[0.0, math.inf], [0.0, {"__float__": "Infinity"}]],
    ),
    "fla": dict(
        hidden_act=["swish", "silu"], attn=[None], num_kv_heads=[None], feature_map=[None], clamp_min=[None],
        use_short_conv=[False], use_output_gate=[True], elementwise_affine=[True], use_gk=[True],
        use_gv=[False], attnres_block_size=[None],
    ),
}  # fmt: skip


def load_checkpoint(name_or_folder):
    """A checkpoint on disk or on the hub: a dictionary with "config", "model" (the weights) and "settings".

    name_or_folder: a run of train.py (its folder or file), a folder of another library, or a name of the hub.
    Weights get our names and float32, "settings" are what train.py is to go on with. Raises ValueError, one
    sentence that names the file, for all that is missing, extra, misshapen, not finite or not understood.
    """
    name = os.fspath(name_or_folder)
    file = path = name if os.path.exists(name) else download_model(name)
    if os.path.isdir(path):
        with reading(path, "a folder with a checkpoint"):
            present = os.listdir(path)
            found = [file for file in (CHECKPOINT, *WEIGHTS) if file in present]
            if not found:
                raise ValueError(f"no checkpoint, expected {CHECKPOINT}, or config.json and {WEIGHTS[-1]}")
        file = os.path.join(path, found[0])
    if not file.endswith((".safetensors", ".json", ".bin")):
        with reading(file, "a checkpoint of train.py"):
            checkpoint = read_pickle(file)
            settings = checkpoint["settings"] = dict(task="text", T=2048) | checkpoint["settings"]
            for setting, value in settings.items():
                kind = dict(T=int, tokenizer=str | None).get(setting, str | int | float | None)
                assert isinstance(value, kind), f"its {setting} is {value!r}"
            assert settings["task"] in TASKS and 0 < settings["T"] <= 10**7, f"its settings are {settings}"
            checkpoint["config"].pop("torch_dtype", None)  # of runs of an earlier version
            config = ModelConfig(**checkpoint["config"])
            checkpoint["config"] = asdict(config)
            checkpoint["model"] = load_weights(config, checkpoint["model"])
        return checkpoint

    # a file of weights of another library, and config.json beside it
    folder = os.path.dirname(file)
    config_file = os.path.join(folder, "config.json")
    with reading(config_file, "the settings of a model"):
        settings = json.loads(Path(config_file).read_bytes())
        config = import_settings(settings)
    weights = {}
    for part in read_index(file) if file.endswith(".json") else [file]:
        with reading(part, "weights"):
            weights.update(read_pickle(part) if part.endswith(".bin") else read_safetensors(part))
    with reading(file, "a checkpoint"):
        weights = load_weights(config, weights)

    # the tokenizer: in the folder, or on the hub
    tokenizer = name if path != name else None
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        tokenizer = folder
    elif "model_type" not in settings and config.vocab_size == 50277:
        tokenizer = NEOX
    run = dict(task="text", T=2048, tokenizer=tokenizer, model=os.path.basename(os.path.abspath(folder)))
    return dict(config=asdict(config), model=weights, settings=run)


def download_model(name):
    """The folder with the files of the hub's model `name`. config.json comes last: with it, all are there."""
    unknown = f"no checkpoint at {name!r}, train one first or give a folder or a name of the hub"
    if not HUB_NAME.fullmatch(name):
        raise ValueError(unknown)
    folder = os.path.join(torch.hub.get_dir(), "lengthgen", name)
    if not os.path.isfile(os.path.join(folder, "config.json")):
        found = None
        for file in WEIGHTS:
            found = found or download(name, file)
        if found and found.endswith(".json"):
            for shard in read_index(found):
                download(name, os.path.basename(shard))
        if not download(name, "config.json"):
            raise ValueError(unknown)
    return folder


def download(name, file):
    """The path of a file of the hub's model `name`, downloaded at its first use; None if there is none."""
    path = os.path.join(torch.hub.get_dir(), "lengthgen", name, file)
    if os.path.isfile(path):
        return path
    url, part = HUB.format(name=name, file=file), f"{path}.{os.getpid()}"
    with reading(url, f"{file} of {name!r}, which is not on this machine"):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            urllib.request.urlretrieve(url, part)  # notices a connection that breaks off
            os.replace(part, path)
        except urllib.error.HTTPError as error:
            if error.code not in (401, 404):  # the hub says 401 where there is no such model
                raise
            return None
        finally:
            Path(part).unlink(missing_ok=True)
    return path


def import_settings(settings):
    """The ModelConfig of another library's config.json; ValueError where it means other formulas."""
    flat = dict(settings)
    flat.update(flat.pop("ssm_cfg", None) or {})  # mamba_ssm keeps the settings of its layers apart
    kind = str(flat.pop("model_type", None) or flat.pop("layer", None) or "Mamba1")
    if kind not in KINDS:
        raise ValueError(f"unknown kind of model {kind!r}, expected one of {', '.join(KINDS)}")
    if flat.get("num_kv_heads") == flat.get("num_heads", 4):
        flat["num_kv_heads"] = None  # which means the same

    # settings that the library leaves to its defaults, that must have a value, that are fields of ours
    library, layer, names, defaults = KINDS[kind]
    required = REQUIRED[library]
    config, ignored = dict(defaults, layer=layer), []
    for name, value in flat.items():
        if name in required:
            require(name, value, *required[name])
        elif name not in names.split():
            ignored.append(name)
        elif value not in (None, "auto"):  # both mean the default
            config[FIELDS.get(name, name)] = value
    if ignored:
        print(f"config.json: settings that are unknown here and ignored: {', '.join(ignored)}", flush=True)
    return ModelConfig(**config)


def read_index(index):
    """The .safetensors files, all in its own folder, that an index.json lists."""
    with reading(index, "an index of weights"):
        names = sorted(set(json.loads(Path(index).read_bytes())["weight_map"].values()))
        for name in names:
            if not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise ValueError(f"{name!r} is no .safetensors of the same folder")
        return [os.path.join(os.path.dirname(index), name) for name in names]


def read_safetensors(file):
    """{name: tensor}, memory-mapped.

    The format: 8 bytes with the size n of the header; n bytes of JSON, {name: {dtype, shape, data_offsets:
    [start, stop]}}; the tensors, without gaps.
    """
    size = os.path.getsize(file)
    with open(file, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if n > size:
            raise ValueError(f"it has {size} bytes and claims a header of {n}, fetch it again")
        header = json.loads(f.read(n))
    header.pop("__metadata__", None)
    weights, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start != end:
            raise ValueError(f"{name} starts at {start}, but the weight before it ends at {end}")
        # one map for each tensor: it goes when the tensor goes. Mode c: what is written stays in memory
        data = np.memmap(file, np.uint8, mode="c", offset=8 + n + start, shape=stop - start)
        weights[name] = torch.from_numpy(data).view(DTYPES[entry["dtype"]]).view(entry["shape"])
        end = stop
    if 8 + n + end != size:
        raise ValueError(f"it has {size} bytes, but its weights end at {8 + n + end}")
    return weights


def read_pickle(file):
    """The dictionary in a file of torch.save; executes nothing."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > os.path.getsize(file):  # torch.save does not compress
        raise ValueError(f"it would unpack to {unpacked} bytes, more than it has")
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError:  # whose own text tells how to execute the file
        raise ValueError("it is damaged, or holds code that would be executed") from None


def load_weights(config, weights):
    """The weights of a model of config by our names, in float32; empties `weights`.

    Raises ValueError unless such a model has exactly these.
    """
    # what would load but be wrong: other numbers than floats, or a few bytes that pose as a large tensor
    ours, storages = {}, {}
    for name, x in weights.items():
        if not isinstance(x, torch.Tensor) or x.layout != torch.strided or x.dtype not in DTYPES.values():
            kind = getattr(x, "dtype", type(x).__name__)
            raise ValueError(f"{name} is {kind}, expected dense floating point of 16 to 64 bits")
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        name = str(name).replace("backbone.embeddings.", "backbone.embedding.")  # of transformers
        ours[name.replace(".g_norm.", ".g_norm_swish_gate.")] = x  # of fla where fuse_norm is off

    # no model is larger than its file: before there are modules, and before there are numbers
    n_bytes = sum(storages.values())
    if config.n_layer > len(ours):
        raise ValueError(f"its settings ask for {config.n_layer} layers, it has {len(ours)} weights")
    with torch.device("meta"):
        model = LanguageModel(config)
    needed = 2 * sum(p.numel() for p in model.parameters())
    if needed > n_bytes:
        raise ValueError(f"its settings ask for {needed} bytes or more, its weights have {n_bytes}")

    # PyTorch names what is missing, extra or misshapen
    embedding = embedding_name(config)
    if config.tie_embeddings and embedding in ours:
        ours.setdefault("lm_head.weight", ours[embedding])
    model.load_state_dict(ours, assign=True)
    if config.tie_embeddings and not ours["lm_head.weight"].equal(ours[embedding]):
        raise ValueError("lm_head.weight differs from the embedding that its settings tie it to")
    model.tie_weights()

    # one weight after the other, and the old one goes: at no time are there two copies of them all
    weights.clear()
    ours.clear()
    for name, p in model.named_parameters():
        p.data = p.data.to(torch.float32, copy=True)
        if not all_finite(p.data):
            raise ValueError(f"{name} has numbers that are not finite, fetch it again")
    return model.state_dict()


def all_finite(x):
    """Whether all numbers of a tensor are finite; x.isfinite() would make a copy as large as x."""
    return all(map(math.isfinite, x.aminmax()))


def embedding_name(config):
    _, trunk, embedding, _ = LAYERS[config.layer]
    return f"{trunk}.{embedding}.weight"


def write_atomically(path, write):
    """Call write(temporary path) and rename: whoever reads the file sees all of it, or the old one.

    Makes the file's folder. Raises ValueError where that fails, for one because the disk is full.
    """
    temporary = f"{path}.tmp"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: of torch.save
        if os.path.exists(temporary):
            os.remove(temporary)
        raise ValueError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None


def write_text(path, text):
    """Write a file of text as write_atomically does."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


def model_from_checkpoint(checkpoint):
    """The model of a dictionary from load_checkpoint, whose tensors become the weights, uncopied."""
    with torch.device("meta"):
        model = LanguageModel(ModelConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"], assign=True)
    model.tie_weights()
    return model


def export_model(model, folder, format=None, dtype=torch.float32):
    """Write config.json and pytorch_model.bin as another library loads them; ValueError where it could not.

    format: "mamba_ssm" (the default for Mamba), "transformers" (version 5 if ngroups > 1; padding rows of the
        vocabulary count there as words) or "fla" (GLA)
    dtype: torch dtype of the stored weights
    """
    # what cannot be written is refused before there is a file
    config, weights = model.config, {}
    kinds = {library: kind for kind, (library, layer, _, _) in KINDS.items() if layer == config.layer}
    if format is None:
        format = "fla" if config.layer == "gla" else "mamba_ssm"
    if format not in kinds:
        raise ValueError(f"unknown format {format!r} for {config.layer}, expected {' or '.join(kinds)}")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}, expected a floating-point one of 16 to 64 bits")
    for library, field in (("mamba_ssm", "norm_eps"), ("fla", "gate_low_rank_dim")):
        value = getattr(config, field)
        if format == library and value != getattr(ModelConfig(layer=config.layer), field):
            raise ValueError(f"{format} has no setting for {field} {value}, choose another format")
    for file in (CHECKPOINT, *WEIGHTS[:-1]):
        if os.path.exists(os.path.join(folder, file)):
            raise ValueError(f"{folder!r} holds {file}, which would be read instead: choose another folder")

    # the weights by the library's names, a tied one stored once
    for name, x in model.state_dict().items():
        weights[name] = x.to("cpu", dtype).contiguous()
        if not all_finite(weights[name]):
            raise ValueError(f"{name} is not finite or too large for {dtype}, choose another dtype")
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights[embedding_name(config)]
    if format == "transformers":
        config = replace(config, vocab_size=len(model.lm_head.weight))
        weights = {name.replace(".embedding.", ".embeddings."): x for name, x in weights.items()}
    settings = export_settings(config, kinds[format], dtype)
    write_atomically(os.path.join(folder, WEIGHTS[-1]), functools.partial(torch.save, weights))
    write_text(os.path.join(folder, "config.json"), json.dumps(settings, indent=2) + "\n")


def export_settings(config, kind, dtype):
    """What config.json says of a model: a dictionary."""
    library, _, names, _ = KINDS[kind]
    settings = {name: getattr(config, FIELDS.get(name, name)) for name in names.split()}
    if library == "mamba_ssm":
        ssm_cfg = dict(layer=kind)
        for name in SSM_CFG:
            if name in settings:
                ssm_cfg[name] = settings.pop(name)
        return dict(settings, rms_norm=True, residual_in_fp32=True, ssm_cfg=ssm_cfg)
    if kind == "mamba2":
        settings["num_heads"] = config.expand * config.d_model // config.headdim
    if library == "transformers":  # <|endoftext|>; by its own default generation would end at a "!"
        settings.update(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return dict(settings, model_type=kind, torch_dtype=str(dtype).removeprefix("torch."))
