"""Understanding and improving length generalization in recurrent models, in one file.

Recurrent language models break past the length that they were trained on. Trained from a zero state, they
meet only a part of the states that a long sequence reaches ("unexplored states"). The cure is to start
training sequences from other states. Paper: Buitrago & Gu, ICML 2025, arXiv 2507.02782; "paper, section 4"
is a section of its version 1. Sections 1 to 4 of this file are its method; the recurrence is in kernels.py.

    1 configuration and state              5 tasks: what the models are trained and tested on
    2 the layers of the paper              6 measures: what the figures show
    3 blocks and the language model        7 Gated DeltaNet, a layer that is not in the paper
    4 the interventions                    Appendix A, B: text and tokenizers, checkpoints of other libraries

    B batch    T length of the input, in sections 5 and 6 the training length    D model width    C vocabulary
    H heads    G groups (H/G heads share q and k)    K key size of a head    V value size of a head
    Mamba's own B and C are called k and q here.
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
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple
from unittest import mock

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

import kernels
from kernels import scan  # the layers find it by this name, so that changed_decay can swap it

# ---- 1. Configuration and state ----


@dataclass
class ModelConfig:
    """The sizes of a model, named as in mamba_ssm and flash-linear-attention.

    A size that is None takes the official default, which OFFICIAL of the layer's class holds.
    """

    layer: str = "mamba2"  # a name of LAYERS
    vocab_size: int = 50277  # C
    d_model: int = 768  # D
    n_layer: int = 24
    pad_vocab_size_multiple: int | None = None  # the rows of the embedding are a multiple of this
    tie_embeddings: bool | None = None  # the output layer shares the weights of the embedding
    norm_eps: float | None = None
    # Mamba-2 and Mamba-1; Gated DeltaNet has d_conv and headdim, too
    d_state: int | None = None  # K
    d_conv: int = 4  # inputs that a convolution sees, the present one included
    expand: int = 2  # H * V = expand * D
    headdim: int | None = None  # Mamba-2: V; Gated DeltaNet: K
    ngroups: int = 1  # G, Mamba-2 only
    dt_rank: int | None = None  # Mamba-1 only; None: D / 16, rounded up
    # GLA and Gated DeltaNet
    num_heads: int | None = None  # H
    expand_k: float = 0.5  # GLA only: H * K = expand_k * D
    expand_v: float | None = None  # GLA: H * V = expand_v * D; Gated DeltaNet: V = expand_v * K
    hidden_ratio: float = 4  # the MLP is 2/3 * hidden_ratio * D wide, rounded up
    gate_low_rank_dim: int = 16  # GLA only
    # how to compute, which changes no result
    backend: str | None = None  # a scan of kernels.py; None lets scan() choose
    recompute: bool = False  # compute each layer again in the backward pass: less memory, a third more work

    def __post_init__(self):
        assert self.layer in LAYERS, f"unknown layer {self.layer!r}: {', '.join(LAYERS)}"
        assert self.backend in (None, *kernels.BACKENDS), f"unknown backend {self.backend!r}"
        for name, value in LAYERS[self.layer].OFFICIAL.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.dt_rank is None:
            self.dt_rank = math.ceil(self.d_model / 16)


class LayerState(NamedTuple):
    """What one layer remembers: all that its future outputs can know of the past.

    conv: (B, d_conv-1, channels), the last *inputs* of the causal convolutions, side by side; None if none
    scan: (B, H, K, V), the S of the recurrence; float32, or float64 where the weights are float64
    """

    conv: torch.Tensor | None
    scan: torch.Tensor


def map_state(function, *states):
    """Apply a function to the matching tensors of one or more states, which are lists of LayerState."""
    new_state = []
    for layers in zip(*states, strict=True):  # layers[i] is this layer in states[i]
        convs, scans = zip(*layers, strict=True)
        conv = None if convs[0] is None else function(*convs)
        new_state.append(LayerState(conv, function(*scans)))
    return new_state


# ---- 2. The layers of the paper ----


class Layer(nn.Module):
    """What the layers share. A layer is called as y, state = layer(x, state), with x and y (B, T, D).

    state is a LayerState. A layer computes q, k, v and log_a from x and leaves the recurrence to the scan:

        S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        a_t = exp(log_a_t) in [0, 1]
    """

    OFFICIAL = {}  # the official values of those fields of ModelConfig that are None
    # Is the model built as in flash-linear-attention? Then an MLP follows the layer in every block, and all
    # matrices and convolutions start with the std 0.02
    HAS_MLP = False
    HAS_BETA = False  # does the layer give the scan a beta, for the delta rule of section 7?
    channels = 0  # how many channels go through convolutions; __init__ sets this, self.H, self.K and self.V

    def __init__(self, config):
        super().__init__()
        self.d_conv = config.d_conv
        self.backend = config.backend

    def zero_state(self, B):
        """The LayerState of B rows before their first token: float32, or float64 where the weights are."""
        weight = next(self.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        conv = None
        if self.channels:
            conv = weight.new_zeros(B, self.d_conv - 1, self.channels, dtype=dtype)
        return LayerState(conv, weight.new_zeros(B, self.H, self.K, self.V, dtype=dtype))


class Mamba2(Layer):
    """The Mamba-2 layer (Dao & Gu 2024): v = dt * x and log_a = -dt * exp(A_log), one decay per head."""

    OFFICIAL = dict(pad_vocab_size_multiple=16, tie_embeddings=True, norm_eps=1e-5, d_state=128, headdim=64)

    def __init__(self, config):
        super().__init__(config)
        # sizes
        self.K = config.d_state
        self.V = config.headdim
        self.G = config.ngroups
        self.d_inner = config.expand * config.d_model
        self.H = self.d_inner // self.V
        self.channels = self.d_inner + 2 * self.G * self.K  # x, k and q go through the convolution
        assert self.d_inner % self.V == 0, f"{self.d_inner} channels do not divide into heads of {self.V}"
        assert self.H % self.G == 0, f"{self.H} heads do not share {self.G} groups evenly"

        # weights, by their official names
        self.in_proj = nn.Linear(config.d_model, self.d_inner + self.channels + self.H, bias=False)
        self.conv1d = nn.Conv1d(self.channels, self.channels, config.d_conv, groups=self.channels)
        self.dt_bias = nn.Parameter(initial_dt_bias(self.H))
        self.A_log = nn.Parameter(torch.empty(self.H).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.H))  # of the skip connection, not the model width
        self.norm = nn.RMSNorm(self.d_inner, config.norm_eps)  # holds weight and eps, applied per group
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=False)

    def forward(self, x, state):
        B, T, _ = x.shape
        H, G, K, V = self.H, self.G, self.K, self.V

        # one projection gives the gate z, then x, k, q as inputs of the convolution, and the step size dt
        z_xkq_dt = self.in_proj(x)  # (B, T, 2 H V + 2 G K + H)
        z, xkq, dt = z_xkq_dt.split([self.d_inner, self.channels, H], dim=-1)

        # each channel of x, k and q is mixed with its last inputs
        xkq, conv_state = causal_conv(xkq, state.conv, self.conv1d)  # (B, T, H V + 2 G K)
        x, k, q = xkq.split([self.d_inner, G * K, G * K], dim=-1)
        x = x.view(B, T, H, V)
        k, q = k.view(B, T, G, K), q.view(B, T, G, K)

        # the recurrence: a large step size dt writes much and forgets much
        dt = F.softplus(dt + self.dt_bias)  # (B, T, H), float32 because dt_bias is
        v = (dt[..., None] * x).to(x.dtype)  # (B, T, H, V)
        log_a = -dt * self.A_log.exp()  # (B, T, H)
        o, scan_state = scan(q, k, v, log_a, state.scan, self.backend)  # (B, T, H, V), (B, H, K, V)

        # the skip connection and the gate, then a norm over the channels of each group
        y = torch.addcmul(o, self.D[:, None], x)  # o + D * x in one pass, (B, T, H, V)
        y = y.flatten(-2) * F.silu(z)  # (B, T, H V)
        y = y.view(B, T, G, self.d_inner // G)
        y = F.rms_norm(y, y.shape[-1:], eps=self.norm.eps).flatten(-2) * self.norm.weight
        return self.out_proj(y), LayerState(conv_state, scan_state)


def causal_conv(x, state, conv1d):
    """Depthwise causal convolution of x (B, T, channels), then SiLU. Returns the outputs and the next state.

    state: (B, d_conv-1, channels), the inputs before x. Computed as a 2-d convolution of height 1, which is
    several times faster on a CPU than conv1d.
    """
    T = x.shape[1]
    x = torch.cat([state.to(x.dtype), x], dim=1)  # (B, d_conv-1 + T, channels)
    y = F.conv2d(x.transpose(1, 2)[:, :, None], conv1d.weight[:, :, None], conv1d.bias, groups=x.shape[2])
    y = y.squeeze(2).transpose(1, 2)  # (B, T, channels)
    # the state is a copy, because a view would keep all of x in memory
    return F.silu(y), x[:, T:].clone()


def initial_dt_bias(n):
    """Biases (n,) for which dt = softplus(bias) is log-uniform over [1e-3, 1e-1]."""
    dt = torch.exp(torch.empty(n).uniform_(math.log(1e-3), math.log(1e-1)))
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


class GLA(Layer):
    """Gated linear attention (Yang et al. 2024): a decay per key channel, log_a = logsigmoid(gate) / 16."""

    OFFICIAL = dict(pad_vocab_size_multiple=1, tie_embeddings=False, norm_eps=1e-6, num_heads=4, expand_v=1.0)
    HAS_MLP = True

    def __init__(self, config):
        super().__init__(config)
        # sizes
        self.H = config.num_heads
        key_dim = int(config.d_model * config.expand_k)
        value_dim = int(config.d_model * config.expand_v)
        self.K = key_dim // self.H
        self.V = value_dim // self.H
        assert self.H * self.K == key_dim, f"{key_dim} key channels do not divide into {self.H} heads"
        assert self.H * self.V == value_dim, f"{value_dim} channels do not divide into {self.H} heads"

        # weights, by their official names
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
        nn.init.zeros_(self.gk_proj[1].bias)

    def forward(self, x, state):
        # queries, keys and values
        q = self.q_proj(x).unflatten(-1, (self.H, self.K)) * self.K**-0.5  # (B, T, H, K)
        k = self.k_proj(x).unflatten(-1, (self.H, self.K))  # (B, T, H, K)
        v = self.v_proj(x).unflatten(-1, (self.H, self.V))  # (B, T, H, V)

        # the recurrence
        log_a = self.log_decay(x)  # (B, T, H, K)
        o, scan_state = scan(q, k, v, log_a, state.scan, self.backend)  # (B, T, H, V), (B, H, K, V)

        # a norm over the channels of each head, then the output gate
        y = self.g_norm_swish_gate(o).flatten(-2) * F.silu(self.g_proj(x))  # (B, T, H V)
        return self.o_proj(y), LayerState(None, scan_state)

    def log_decay(self, x):
        """The log_a (B, T, H, K) of x (B, T, D), in float32 even where autocast computes in bfloat16."""
        gate = self.gk_proj(x).unflatten(-1, (self.H, self.K))
        gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
        return F.logsigmoid(gate) / 16


class Mamba1(Layer):
    """The Mamba layer (Gu & Dao 2023): v = dt * x and log_a = -dt * exp(A_log).

    Every channel is a head with V = 1, and has a decay for each of its K key channels.
    """

    OFFICIAL = dict(pad_vocab_size_multiple=8, tie_embeddings=True, norm_eps=1e-5, d_state=16)

    def __init__(self, config):
        super().__init__(config)
        # sizes
        self.H = config.expand * config.d_model
        self.K = config.d_state
        self.V = 1
        self.channels = self.H  # all go through the convolution
        self.dt_rank = config.dt_rank

        # weights, by their official names
        self.in_proj = nn.Linear(config.d_model, 2 * self.H, bias=False)
        self.conv1d = nn.Conv1d(self.H, self.H, config.d_conv, groups=self.H)
        self.x_proj = nn.Linear(self.H, self.dt_rank + 2 * self.K, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.H)
        self.A_log = nn.Parameter(torch.arange(1.0, self.K + 1).log().repeat(self.H, 1))
        self.D = nn.Parameter(torch.ones(self.H))  # of the skip connection, not the model width
        self.out_proj = nn.Linear(self.H, config.d_model, bias=False)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
            self.dt_proj.bias.copy_(initial_dt_bias(self.H))

    def forward(self, x, state):
        # the input of the convolution and the gate z
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, H) each
        x, conv_state = causal_conv(x, state.conv, self.conv1d)  # (B, T, H)

        # step size, key and query all depend on the output of the convolution
        dt, k, q = self.x_proj(x).split([self.dt_rank, self.K, self.K], dim=-1)
        # dt_proj(dt), with the bias added outside of it: a float32 bias makes dt float32 under autocast
        dt = F.softplus(F.linear(dt, self.dt_proj.weight) + self.dt_proj.bias)  # (B, T, H)
        v = (dt * x).to(x.dtype)  # (B, T, H)
        log_a = -dt[..., None] * self.A_log.exp()  # (B, T, H, K)

        # the recurrence, with q and k as one group and V = 1
        q, k, v = q[:, :, None], k[:, :, None], v[..., None]  # (B, T, 1, K) twice, (B, T, H, 1)
        o, scan_state = scan(q, k, v, log_a, state.scan, self.backend)  # (B, T, H, 1), (B, H, K, 1)

        # the skip connection and the gate
        y = (o[..., 0] + self.D * x) * F.silu(z)  # (B, T, H)
        return self.out_proj(y), LayerState(conv_state, scan_state)


LAYERS = {"mamba2": Mamba2, "gla": GLA, "mamba1": Mamba1}  # section 7 adds Gated DeltaNet, "gdn"

# ---- 3. Blocks and the language model ----


class Block(nn.Module):
    """Norm, layer, residual connection; then, if the layer HAS_MLP, norm, MLP, residual connection."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.mixer = LAYERS[config.layer](config)
        self.mlp = None
        if self.mixer.HAS_MLP:
            self.mlp_norm = nn.RMSNorm(config.d_model, config.norm_eps)
            self.mlp = SwiGLU(config)

    def forward(self, x, state):
        y, state = self.mixer(self.norm(x), state)
        x = x + y
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state


class SwiGLU(nn.Module):
    """The MLP after layers with HAS_MLP, 2/3 * hidden_ratio * D wide, rounded up to a multiple of 256."""

    def __init__(self, config):
        super().__init__()
        D = config.d_model
        width = 256 * math.ceil(int(D * config.hidden_ratio * 2 / 3) / 256)
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LanguageModel(nn.Module):
    """logits, state = model(tokens, state=None, last_only=False)

    tokens: (B, T) int64 below vocab_size, T >= 1; logits: (B, T, vocab_size)
    state: a list with one LayerState per layer, or None to start from zeros. The returned state is new, and
        gradients flow through it. So a sequence may be cut anywhere and the state handed over, and the result
        is the same. A caller that detaches the state in between stops the gradient there.
    last_only: compute the logits of the last token alone, (B, 1, vocab_size), which is much faster
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # the vocabulary is padded to a round number, which is faster on a GPU
        multiple = config.pad_vocab_size_multiple
        padded = multiple * math.ceil(config.vocab_size / multiple)
        self.embedding = nn.Embedding(padded, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = nn.RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, padded, bias=False)

        # initial weights of the official code: in flash-linear-attention all matrices and convolutions have
        # the std 0.02; in Mamba out_proj is divided by sqrt(n_layer)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if LAYERS[config.layer].HAS_MLP:
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Conv1d)):
                    nn.init.normal_(module.weight, std=0.02)
        else:
            for block in self.layers:
                block.mixer.out_proj.weight.data /= math.sqrt(config.n_layer)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def zero_state(self, B):
        """The state of B rows before their first token: a list of LayerState."""
        return [block.mixer.zero_state(B) for block in self.layers]

    def forward(self, tokens, state=None, last_only=False):
        assert tokens.dim() == 2 and tokens.numel(), f"tokens must be (B, T), got {tuple(tokens.shape)}"
        if state is None:
            state = self.zero_state(len(tokens))

        # every block reads the output of the block before it, and a state of its own
        x = self.embedding(tokens)  # (B, T, D)
        new_state = []
        for block, layer_state in zip(self.layers, state, strict=True):
            if self.config.recompute and torch.is_grad_enabled():
                x, layer_state = torch.utils.checkpoint.checkpoint(block, x, layer_state, use_reentrant=False)
            else:
                x, layer_state = block(x, layer_state)
            new_state.append(layer_state)

        # the padding of the vocabulary is cut off
        if last_only:
            x = x[:, -1:]  # (B, 1, D)
        logits = self.lm_head(self.norm_f(x))[..., : self.config.vocab_size]  # (B, T, vocab_size)
        return logits, new_state

    @staticmethod
    def from_pretrained(name_or_folder):
        """The model of a run of train.py, or of a checkpoint on disk or on the hub (Appendix B)."""
        return model_from_checkpoint(load_checkpoint(name_or_folder))

    def save_pretrained(self, folder, dtype=torch.float32):
        """Write the model for mamba_ssm or flash-linear-attention, as export_model of Appendix B says."""
        export_model(self, folder, dtype)


# ---- 4. The interventions: from which state does the next training sequence start? ----
# Each is a function (state, stats, rng) -> state. It takes the final state of the previous batch, a
# StateStatistics, and a torch.Generator on the device of the state, and returns the initial state of the next
# batch. For a new idea write one function and add one entry to INTERVENTIONS.


def zero(state, stats, rng):
    """Start from zeros: ordinary training. Equally many steps of it are the control for the others."""
    return map_state(torch.zeros_like, state)


def random_noise(state, stats, rng, std=1.0):
    """Start from independent N(0, std^2), with the same std in every layer and head (paper, section 4)."""
    return map_state(lambda x: std * normal_like(x, rng), state)


def fitted_noise(state, stats, rng):
    """Start from independent N(m, s^2), with the mean m and the std s of the final states seen in training.

    Every head of every layer has its own m and s (paper, section 4).
    """
    stats.update(state)

    def fitted(x, mean, std):
        return (mean + std * normal_like(x, rng)).to(x.dtype)

    return map_state(fitted, state, stats.mean, stats.std)


def state_passing(state, stats, rng):
    """Start from the final state of the previous batch, which holds other sequences (paper, section 4.4)."""
    return state


INTERVENTIONS = {  # name: (function, does row b of the next batch continue row b of this one?)
    "zero": (zero, False),
    "random_noise": (random_noise, False),
    "fitted_noise": (fitted_noise, False),
    "state_passing": (state_passing, False),
    "tbtt": (state_passing, True),  # truncated backpropagation through time (paper, section 4.5)
}


def next_initial_state(function, state, stats, rng, zero_prob=0.0, carry="full"):
    """The initial state of the next batch, made by an intervention from the final state of the previous one.

    function, state, stats, rng: the intervention and its arguments, as above
    zero_prob: the probability that a row starts from zeros instead, so that the model still works from zeros
    carry: "full" hands over the convolution's inputs and the scan's state; "scan" hands over the scan's state
        alone, as the pseudocode of the paper does
    """
    assert carry in ("full", "scan") and 0 <= zero_prob <= 1, f"carry {carry!r}, zero_prob {zero_prob}"
    # no gradient crosses from one batch to the next
    state = map_state(torch.Tensor.detach, state)
    state = function(state, stats, rng)

    # without its inputs the convolution starts from zeros
    if carry == "scan":
        zeros = map_state(torch.zeros_like, state)
        state = [LayerState(z.conv, layer.scan) for z, layer in zip(zeros, state, strict=True)]

    # some rows start from zeros all the same, in all layers
    if zero_prob > 0:
        draws = torch.rand(len(state[0].scan), generator=rng, device=state[0].scan.device)  # (B,)
        from_zeros = (draws < zero_prob).nonzero().flatten()
        state = map_state(lambda x: x.index_fill(0, from_zeros, 0), state)
    return state


def normal_like(x, rng):
    return torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)


class StateStatistics:
    """Running mean and std of the final states seen in training, for fitted noise (paper, section 4).

    Each layer has one mean and one std per head (scan) and per channel (conv). `mean` and `std` are states
    whose shapes broadcast: scan (1, H, 1, 1), conv (1, 1, channels). The paper does not say how it estimates
    them. Ours are exponential averages over about 1/rate updates; every micro-batch is an update.
    """

    def __init__(self, rate=0.05):
        self.rate = rate
        self.count = 0  # updates so far
        self.mean = None
        self.mean_square = None

    def update(self, state):
        """Take in the final state of one more micro-batch; in a distributed run, of all ranks."""
        # the plain average of the first 1/rate updates, an exponential one from then on
        self.count += 1
        weight = max(self.rate, 1 / self.count)

        def average(old, new):
            return old + weight * (new - old)

        # the first update has no old averages; its weight is 1, so the new ones can stand in for them
        mean = map_state(batch_mean, state)
        mean_square = map_state(lambda x: batch_mean(x.float() ** 2), state)
        self.mean = map_state(average, self.mean or mean, mean)
        self.mean_square = map_state(average, self.mean_square or mean_square, mean_square)

    @property
    def std(self):
        variance = map_state(lambda mean, square: square - mean * mean, self.mean, self.mean_square)
        return map_state(lambda x: x.clamp(min=0).sqrt(), variance)


def batch_mean(x):
    """The mean of scan (B, H, K, V) per head, of conv (B, d_conv-1, channels) per channel, over all ranks."""
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
# The inputs are tokens[:, :-1], the targets tokens[:, 1:]. `part` is the loss mask: part[:, i] belongs to the
# target tokens[:, i + 1]. A target whose part is 0 is neither trained on nor counted; 1, 2, ... name the part
# of the task that the target belongs to. What a task returns is a window; stream() joins windows.


class Rows:
    """Reads the B rows of every batch from a text.

    corpus, split: a Corpus of Appendix A, and its "train" or "val"
    continues: every row reads on where its previous piece ended, as TBTT and streams need it; otherwise every
        piece begins at a place that is drawn anew
    """

    def __init__(self, corpus, split, B, continues, seed):
        self.corpus = corpus
        self.tokens = getattr(corpus, split)  # (N,)
        self.B = B
        self.continues = continues
        self.rng = torch.Generator().manual_seed(seed)
        self.at = None  # (B,) int64, the place where each row reads next
        # document i goes from begins[i] to ends[i], without the bos before it
        boundaries = np.flatnonzero(self.tokens == corpus.bos)
        self.begins = np.append(0, boundaries + 1)
        self.ends = np.append(boundaries, len(self.tokens))

    def next_batch(self, n, overlap=0, inside_document=False):
        """(B, n) int64 tokens. Rows that continue advance by n - overlap, and wrap around at the text's end.

        inside_document: a row whose document has fewer than n tokens left goes to the next one of n or more
        """
        # where each row reads: after its previous piece, or at a drawn place
        last = len(self.tokens) - n  # the last place where a piece can begin
        if last < 0:
            raise ValueError(f"the text has {len(self.tokens)} tokens, shorter than the {n} that are needed")
        if self.at is None or not self.continues:
            self.at = torch.randint(last + 1, (self.B,), generator=self.rng)
        at = self.at.numpy()
        at = np.where(at > last, 0, at)

        # a row whose document ends too early goes to the next one that is long enough (% wraps to the first)
        if inside_document:
            long_enough = self.begins[self.ends - self.begins >= n]
            if not len(long_enough):
                raise ValueError(f"no document of the text has the {n} tokens that are needed")
            end = self.ends[np.searchsorted(self.ends, at)]  # where each row's document ends
            following = long_enough[np.searchsorted(long_enough, at) % len(long_enough)]
            at = np.where(at + n <= end, at, following)
        self.at = torch.from_numpy(at + n - overlap)
        return self.tokens[at[:, None] + np.arange(n)].astype(np.int64)


def text(rows, T):
    """Plain text, in windows of T tokens. All of the targets count."""
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


def mixed(rows, T, echo_share=0.5):
    """Half of the rows of a window are echo, the others plain text that begins anywhere; parts as in echo.

    Models as small as ours work past T when they are trained on plain text alone. Echo rewards them for
    keeping the state, and then they fail on streams of pure text, too.
    """
    # make both windows for every row; rows that continue go back by T, so that both begin at the same place
    text_tokens, text_part = text(rows, T)
    after_text = rows.at
    rows.at = after_text - T
    echo_tokens, echo_part = echo(rows, T)

    # take one of the two; rows that continue go on after it
    is_echo = torch.rand(rows.B, 1, generator=rows.rng) < echo_share
    rows.at = torch.where(is_echo[:, 0], rows.at, after_text)
    is_echo = is_echo.numpy()
    return np.where(is_echo, echo_tokens, text_tokens), np.where(is_echo, echo_part, text_part)


def copy(rows, T, shortest=5, longest=20):
    """The paper's synthetic copying (Jelassi et al. 2024): 5 to 20 random letters to repeat, packed into T.

    input    $  x  k  c  q  h  |  x  k  c  q  h  .  $  ...
    target   x  k  c  q  h  |  x  k  c  q  h  .  $  ...
    part     0  0  0  0  0  0  1  1  1  1  1  2  0  ...    1 copy, 2 stop (trained on, not in the accuracy)

    The tokens are bytes. Every window starts with a new string, so only the state goes on from one window to
    the next. A string that the end of the window cuts off is not trained on, as in the code of Jelassi et al.
    """
    if rows.corpus.words != 256:
        raise ValueError(f"copy is in bytes, not in {rows.corpus.words} words: use --tokenizer bytes")
    if T < 2 * longest + 3:  # else a window could hold nothing to copy, and have no loss
        raise ValueError(f"copy needs a T of at least {2 * longest + 3}, the longest string twice, got {T}")
    tokens, part = empty_windows(rows, T)
    tokens[:] = ord("$")  # the last target of a window is the $ of the next one
    for b in range(rows.B):
        row = []
        while len(row) < T:
            n = int(torch.randint(shortest, longest + 1, (), generator=rows.rng))
            letters = torch.randint(ord("a"), ord("z") + 1, (n,), generator=rows.rng).tolist()
            row += [ord("$"), *letters, ord("|"), *letters, ord(".")]
            if len(row) <= T:
                # the string's last n + 1 targets, letters and "."; part[i] belongs to token i + 1
                part[b, len(row) - n - 2 : len(row) - 1] = [1] * n + [2]
        tokens[b, :T] = row[:T]
    return tokens, part


FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def passkey(rows, T, depth=None):
    """Five digits hidden in filler and asked for at the end, in Landmark Attention's words (2023).

    targets  The grass is gr|The pass key is 30719. Remember it. 30719 is the pass key. |The grass
    part     .....................................................................................
    targets   is green.|What is the pass key? The pass key is 30719<bos>
    part     .................................................11111.

    The window takes two lines here, | marks where the filler is cut, . is part 0. The picture is in bytes,
    but any tokenizer will do. depth: the share of the filler that comes before the key; None draws a place
    for each row. The opening line of the published task is left out: it is longer than our T.
    """
    tokens, part = empty_windows(rows, T)
    encode = rows.corpus.encode
    # every word is at least one token
    filler = list(encode(FILLER * (T // len(FILLER.split()) + 1)))  # more than T tokens
    for b in range(rows.B):
        # the sentences with the key, and the question with the key as its answer
        key = f"{int(torch.randint(10**5, (), generator=rows.rng)):05}"
        told = list(encode(f"The pass key is {key}. Remember it. {key} is the pass key. "))
        asked, n_answer = encode_answer(rows.corpus, "What is the pass key? The pass key is", key)

        # the filler fills the window; `before` is drawn even if depth is given, so that the rows have the
        # same keys at every depth
        n = T - 1 - len(told) - len(asked)  # tokens of filler
        if n < 0:
            raise ValueError(f"passkey needs a T of at least {T - n}, got {T}")
        before = int(torch.randint(n + 1, (), generator=rows.rng))
        if depth is not None:
            before = round(depth * n)
        tokens[b, 1:T] = filler[:before] + told + filler[: n - before] + asked
        part[b, T - 1 - n_answer : T - 1] = 1
    return tokens, part


def encode_answer(corpus, prompt, answer):
    """The tokens of a prompt, a space and an answer, and how many of them are the answer's."""
    tokens = list(corpus.encode(f"{prompt} {answer}"))
    start = len(corpus.encode(prompt))
    # most tokenizers put the space into the first token of the answer; in bytes it is a token of its own
    if not corpus.decode(tokens[start : start + 1]).strip():
        start += 1
    return tokens, len(tokens) - start


def empty_windows(rows, T):
    """tokens (B, T+1), all <bos>, and part (B, T), all 0."""
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

    targets  import os/Mary went to the office. x = 1/John moved to the garden. Where is Mary? office.<bos>
    part     ..................................................................................1111111.

    Here / ends a line, . is part 0, and one of the three facts is left out. The background fills the window.
    The picture is in bytes, but any tokenizer will do.
    """
    if T < 128:  # the longest story in bytes
        raise ValueError(f"babilong needs a T of at least 128, got {T}")
    tokens, part = empty_windows(rows, T)
    background = rows.next_batch(T)
    newline_tokens = [token for token in np.unique(background) if "\n" in rows.corpus.decode([token])]
    for b in range(rows.B):
        facts, question, answer = babi(rows.rng)
        facts = [rows.corpus.encode(f"{fact} ") for fact in facts]
        asked, n_answer = encode_answer(rows.corpus, question, f"{answer}.")
        n = T - 1 - sum(map(len, facts)) - len(asked)  # tokens of background

        # a fact stands between lines, so its drawn place moves on to the end of the line
        line_ends = np.append(np.flatnonzero(np.isin(background[b, :n], newline_tokens)) + 1, n)
        places = torch.randint(n + 1, (len(facts),), generator=rows.rng).sort().values.numpy()
        places = line_ends[np.searchsorted(line_ends, places)]
        # np.insert puts every token of the facts in front of the background token at its place
        place_of_token = np.repeat(places, [len(fact) for fact in facts])
        window = np.insert(background[b, :n], place_of_token, np.concatenate(facts))
        tokens[b, 1:T] = [*window, *asked]
        part[b, T - 1 - n_answer : T - 1] = 1
    return tokens, part


# name: (function, default T, names of the parts, share)
# loss = loss on the parts + share * loss on all targets
TASKS = {
    "echo": (echo, 50, ("text", "echo"), 0.0),
    "mixed": (mixed, 50, ("text", "echo"), 0.0),
    "text": (text, 256, ("text",), 0.0),
    "copy": (copy, 64, ("copy", "stop"), 0.0),
    "passkey": (passkey, 160, ("key",), 0.1),  # the 0.1 teaches the filler
    "babilong": (babilong, 144, ("answer",), 0.0),
}


def stream(task, rows, T, windows):
    """Join consecutive windows of a task: tokens (B, windows*T + 1), part (B, windows*T).

    rows must continue. If a row would read the same text twice, the stream ends there.
    """
    batches = [task(rows, T)]
    N = len(rows.tokens)
    advanced = torch.zeros(rows.B, dtype=torch.int64)  # how far each row has read since the first window
    for _ in range(windows - 1):
        at = rows.at
        batch = task(rows, T)
        if at is not None:  # the task reads text
            advanced += (rows.at - at - 1) % N + 1  # modulo N, but 1 to N
            if advanced.max() > N - T:  # with the T of the first window, > N
                break
        batches.append(batch)

    # in mixed the last target of a window may differ from the first token of the next; then it does not count
    for (tokens, part), (following, _) in itertools.pairwise(batches):
        part[:, -1] *= tokens[:, -1] == following[:, 0]

    inputs = [tokens[:, :-1] for tokens, _ in batches]
    inputs.append(batches[-1][0][:, -1:])
    return np.concatenate(inputs, axis=1), np.concatenate([part for _, part in batches], axis=1)


# ---- 6. The measures ----


def masked_loss(logits, targets, part, share=0.0):
    """Mean float32 cross-entropy, nats, where part is not 0, plus a share of the mean over all targets.

    logits (B, T, C), targets and part (B, T)
    """
    logits = logits.float().flatten(0, 1)
    loss = F.cross_entropy(logits, targets.masked_fill(part == 0, -100).flatten(), ignore_index=-100)
    if share > 0:
        loss = loss + share * F.cross_entropy(logits, targets.flatten())
    return loss


@torch.no_grad()
def read_stream(model, tokens, segment, state=None):
    """Read tokens (B, N+1) a segment at a time, carrying the state, in the memory of one segment.

    Yields (start, logits, targets) of each segment: the position of its first input, logits (B, n, C) of its
    n inputs, float32 or float64, and their targets (B, n). tokens are integers, NumPy or memory-mapped.
    """
    assert segment >= 1, f"segment must be positive, got {segment}"
    device = model.lm_head.weight.device
    for start in range(0, tokens.shape[1] - 1, segment):
        piece = np.asarray(tokens[:, start : start + segment + 1], dtype=np.int64)
        piece = torch.from_numpy(piece).to(device)
        logits, state = model(piece[:, :-1], state)
        yield start, logits.to(torch.promote_types(logits.dtype, torch.float32)), piece[:, 1:]


def segment_for(B):
    """The segment with which B rows have about 12800 tokens; many more do not fit into a CPU's caches."""
    return max(1, 12800 // B)


def streaming_loss(model, tokens, bins, segment=1024, state=None, progress=None):
    """Sum of losses (nats, float64) and number of targets in each bin. They do not depend on the segment.

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
        total += torch.bincount(bin_of[counted], weights=loss[counted], minlength=n_bins)
        count += torch.bincount(bin_of[counted], minlength=n_bins)
        if progress:
            progress(stop / N)
    return total, count


def position_wise(model, task_name, corpus, T, B, windows=64, seed=0, progress=None):
    """Loss by position on B streams of validation text from a zero state (the paper's figure 1).

    Returns a dictionary of lists with an entry for each range of positions: "x", the ends of the ranges in
    multiples of T, and under the name of each part the mean losses in nats, NaN for a range without targets.
    The ranges end at 1, 2, 3, 4, 6, 8, 12, ... times T, for plain text also at 1/8, 1/4 and 1/2. The streams
    are shorter than `windows` T if the text is too short (see stream).
    """
    task, _, parts, _ = TASKS[task_name]
    tokens, part = stream(task, Rows(corpus, "val", B, continues=True, seed=seed), T, windows)
    windows = part.shape[1] // T

    # where the ranges end: at 2 T, 3 T, 4 T, 6 T, ... up to the number of windows
    ends = [1 / 8, 1 / 4, 1 / 2, 1] if task_name == "text" else [1]
    for i in range(1, windows.bit_length()):
        ends += [2**i, 1.5 * 2**i]
    ends = [end for end in ends if end < windows] + [windows]

    # the bin of a target is (part - 1) * number of ranges + range; part 0 is left out
    range_of = np.searchsorted(np.array(ends) * T, np.arange(T * windows), side="right")  # (T * windows,)
    bins = np.where(part > 0, (part.astype(int) - 1) * len(ends) + range_of, -1)
    total, count = streaming_loss(model, tokens, bins, segment_for(B), progress=progress)

    # the mean loss of each bin; streaming_loss returns no bins after the last one that has targets
    losses = torch.full((len(parts), len(ends)), math.nan, dtype=torch.float64)
    losses.view(-1)[: len(total)] = total / count
    return {"x": ends, **dict(zip(parts, losses.tolist(), strict=True))}


def paired_gap(model, tokens, T):
    """How much worse targets are predicted after their whole past than after at most T tokens, in nats.

    tokens: (B, N+1) with N a multiple of T, a stream that starts from a zero state. The targets are the
    second half of each block of T: so the short past has T/2 to T tokens. Returns the mean loss after the
    whole past minus that after the short one, (N/T,) float64; for the first block it is 0 but for rounding.
    The paper has no such measure.
    """
    B, N = tokens.shape[0], tokens.shape[1] - 1
    assert N % T == 0, f"paired_gap needs N + 1 tokens with N a multiple of T {T}, got {N + 1}"
    # the bin of a target is its block; the first half of each block is left out
    block = np.where(np.arange(N) % T < T // 2, -1, np.arange(N) // T)

    # once with the whole stream before it, once from a zero state at the beginning of its block
    whole, count = streaming_loss(model, tokens, block, segment_for(B))
    short = torch.zeros_like(whole)
    for i in range(N // T):
        piece = tokens[:, i * T : (i + 1) * T + 1]
        total, _ = streaming_loss(model, piece, block[:T], segment=T)  # block[:T] has only bin 0
        short[i] = total[0]
    return (whole - short) / count


def accuracy(model, tokens, part):
    """Whether the likeliest token is the target, in one teacher-forced pass from a zero state.

    tokens (B, N+1), part (B, N) -> (B, N) float64: 1 right, 0 wrong, NaN where part is 0. Greedy decoding
    gives a whole answer if and only if all targets of the answer are right here.
    """
    # up to the first column with a target that counts, the tokens are only read
    counted = torch.from_numpy(part) != 0
    first = int(counted.any(0).int().argmax())
    state = prefill(model, tokens[:, :first])[1] if first else None
    right = [torch.full((len(tokens), first), math.nan, dtype=torch.float64)]
    for _, logits, targets in read_stream(model, tokens[:, first:], segment_for(len(tokens)), state):
        right.append((logits.argmax(-1) == targets).cpu().double())
    return torch.cat(right, 1).masked_fill(~counted, math.nan)


@torch.no_grad()
def prefill(model, tokens, state=None):
    """Read tokens (B, T) in constant memory. Returns the logits (B, C) after the last one, and the state."""
    for piece in torch.as_tensor(tokens).split(segment_for(len(tokens)), dim=1):
        logits, state = model(piece.to(model.lm_head.weight.device), state, last_only=True)
    return logits[:, -1], state


def generate(model, tokens, n, temperature=0.0):
    """Read tokens (B, T), then yield the next n tokens, each (B,); temperature 0 takes the likeliest."""
    state = None
    for _ in range(n):
        logits, state = prefill(model, tokens, state)
        token = logits.argmax(-1)
        if temperature > 0:
            # float64, in which the division by a tiny temperature does not overflow
            token = torch.multinomial((logits.cpu().double() / temperature).softmax(-1), 1)[:, 0]
        yield token
        tokens = token[:, None]


def state_std(model, tokens, at):
    """Std of the state S after each of n ascending positions `at` of tokens (B, N), in float64.

    Returns three stds: over all entries of S (n,), as in the paper's figure; per layer (n, n_layer); and per
    head (n, n_layer, H).
    """
    assert list(at) == sorted({*at}) and 0 < at[0] and at[-1] <= tokens.shape[1], f"at is {at}"
    full, layers, heads = [], [], []
    state = None
    for start, stop in itertools.pairwise([0, *at]):
        _, state = prefill(model, tokens[:, start:stop], state)
        S = torch.stack([layer.scan.cpu().double() for layer in state])  # (n_layer, B, H, K, V)
        full.append(S.std(correction=0))
        layers.append(S.std((1, 2, 3, 4), correction=0))
        heads.append(S.std((1, 3, 4), correction=0))
    return torch.stack(full), torch.stack(layers), torch.stack(heads)


def changed_decay(change):
    """A context manager. Within its block, the layers of all models take change(log_a) for log_a."""

    def changed_scan(q, k, v, log_a, state, backend, beta=None):
        return kernels.scan(q, k, v, change(log_a), state, backend, beta)

    # the global `scan` of this file, until the block ends
    return mock.patch(f"{__name__}.scan", changed_scan)


@torch.no_grad()
def decays(model, tokens):
    """The log_a of every layer on tokens (B, T) from a zero state: a list of (B, T, H) or (B, T, H, K)."""
    layers = []

    def record(log_a):
        layers.append(log_a)
        return log_a

    with changed_decay(record):
        model(torch.as_tensor(tokens).to(model.lm_head.weight.device))
    return layers


@torch.no_grad()
def effective_remembrance(model, tokens, starts, end):
    """How much the first t tokens still matter: EffRem(t) = TV(p(.|x[0:n]), p(.|x[t:n])) after n tokens.

    p is the model's distribution of the next token, TV the total variation (paper, effective remembrance).
    tokens: (B, N), read from a zero state; starts: ascending t, 0 < t <= end. Returns numbers in [0, 1] of
    shape (len(starts), B, N - end), for the predictions after n = end + 1, ..., N tokens.
    """
    assert list(starts) == sorted({*starts}) and 0 < starts[0] and starts[-1] <= end, f"{starts}, end {end}"
    tokens = torch.as_tensor(tokens).to(model.lm_head.weight.device)
    zero_state = model.zero_state(len(tokens))

    # x[0:] and the suffixes x[t:] run as one batch, which B rows from zeros join at 0 and at each t; `copies`
    # counts these groups of B rows
    state = model.zero_state(0)
    for copies, (start, stop) in enumerate(itertools.pairwise([0, *starts, end]), 1):
        state = map_state(lambda x, new_rows: torch.cat([x, new_rows]), state, zero_state)
        if start < stop:  # the last t may be `end` itself
            _, state = model(tokens[:, start:stop].repeat(copies, 1), state)

    # from `end` on compare the predictions of each suffix with those of the whole
    logits, _ = model(tokens[:, end:].repeat(copies, 1), state)
    p = logits.float().softmax(-1).unflatten(0, (copies, -1))  # (1 + len(starts), B, N - end, C)
    return ((p[1:] - p[:1]).abs().sum(-1) / 2).cpu()


def babilong_score(output, answer, question, qa):
    """BABILong's rule: up to its first ".", <context> or <example>, the output names only the answer.

    Possible answers (labels) that the question names do not count, and upper and lower case are the same.
    output: what a model wrote; qa: the number of the task, 1 to 5.
    """
    # the answers of qa1 to qa4 are rooms, those of qa5 people and objects
    labels = ROOMS if qa < 5 else ("bill", "fred", "jeff", "mary", "apple", "football", "milk")
    sentence = re.split(r"\.|<context>|<example>", output.lower())[0]
    named = {label for label in labels if label in sentence and label not in question.lower()}
    return named == {answer.lower()}


# ---- 7. Gated DeltaNet, a layer that is not in the paper ----


class GatedDeltaNet(Layer):
    """Gated DeltaNet (Yang, Kautz & Hatamizadeh 2025): one decay per head, as in Mamba-2, and the delta rule.

    The delta rule writes beta_t (v_t - (diag(a_t) S_{t-1})^T k_t) in place of v_t: beta_t of the difference
    between v_t and what k_t reads from the decayed state. With beta_t = 1, v_t replaces the value that the
    state holds for k_t. Keys have length 1, and beta_t lies between 0 and 1.
    """

    OFFICIAL = dict(
        pad_vocab_size_multiple=1, tie_embeddings=False, norm_eps=1e-6, num_heads=6, headdim=256, expand_v=2.0
    )
    HAS_MLP = True
    HAS_BETA = True

    def __init__(self, config):
        super().__init__(config)
        # sizes
        self.H = config.num_heads
        self.K = config.headdim
        self.V = int(config.headdim * config.expand_v)
        assert math.isclose(self.V, config.headdim * config.expand_v, rel_tol=1e-5), (
            f"headdim {config.headdim} * expand_v {config.expand_v} is no integer"
        )
        key_dim = self.H * self.K
        value_dim = self.H * self.V
        self.channels = 2 * key_dim + value_dim  # q, k and v go through convolutions

        # weights, by their official names
        self.q_proj = nn.Linear(config.d_model, key_dim, bias=False)
        self.k_proj = nn.Linear(config.d_model, key_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, value_dim, bias=False)
        self.a_proj = nn.Linear(config.d_model, self.H, bias=False)
        self.b_proj = nn.Linear(config.d_model, self.H, bias=False)
        self.g_proj = nn.Linear(config.d_model, value_dim, bias=False)
        self.q_conv1d = nn.Conv1d(key_dim, key_dim, config.d_conv, groups=key_dim, bias=False)
        self.k_conv1d = nn.Conv1d(key_dim, key_dim, config.d_conv, groups=key_dim, bias=False)
        self.v_conv1d = nn.Conv1d(value_dim, value_dim, config.d_conv, groups=value_dim, bias=False)
        self.dt_bias = nn.Parameter(initial_dt_bias(self.H))
        self.A_log = nn.Parameter(torch.empty(self.H).uniform_(0, 16).log())
        self.o_norm = nn.RMSNorm(self.V, config.norm_eps)  # one weight, shared by the heads
        self.o_proj = nn.Linear(value_dim, config.d_model, bias=False)

    def forward(self, x, state):
        H, K, V = self.H, self.K, self.V

        # queries, keys and values, each mixed with its last inputs
        conv_q, conv_k, conv_v = state.conv.split([H * K, H * K, H * V], dim=-1)
        q, conv_q = causal_conv(self.q_proj(x), conv_q, self.q_conv1d)  # (B, T, H K)
        k, conv_k = causal_conv(self.k_proj(x), conv_k, self.k_conv1d)  # (B, T, H K)
        v, conv_v = causal_conv(self.v_proj(x), conv_v, self.v_conv1d)  # (B, T, H V)
        conv_state = torch.cat([conv_q, conv_k, conv_v], dim=-1)  # (B, d_conv-1, 2 H K + H V)
        q = unit_length(q.unflatten(-1, (H, K))) * K**-0.5  # (B, T, H, K)
        k = unit_length(k.unflatten(-1, (H, K)))  # (B, T, H, K)
        v = v.unflatten(-1, (H, V))  # (B, T, H, V)

        # the recurrence, with a decay and a beta for each head
        dt = F.softplus(self.a_proj(x) + self.dt_bias)  # (B, T, H), float32 because dt_bias is
        log_a = -dt * self.A_log.exp()  # (B, T, H)
        # float32, as dt, because bfloat16 makes every beta above 0.998 equal to 1, without a gradient
        beta = self.b_proj(x).to(dt.dtype).sigmoid()  # (B, T, H)
        o, scan_state = scan(q, k, v, log_a, state.scan, self.backend, beta)  # (B, T, H, V), (B, H, K, V)

        # a norm over the channels of each head, then the output gate
        y = self.o_norm(o).flatten(-2) * F.silu(self.g_proj(x))  # (B, T, H V)
        return self.o_proj(y), LayerState(conv_state, scan_state)


def unit_length(x):
    """Scale each vector along the last axis to length 1. The 1e-6 is that of flash-linear-attention."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))  # in bfloat16 the length would be off by 1%
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


LAYERS["gdn"] = GatedDeltaNet

# ---- Appendix A: text and tokenizers ----
# Every document starts with the token bos, in training as in a stream.


@contextlib.contextmanager
def reading(file, what):
    """Turn any error of the block, which reads `file`, into a ValueError of one line."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust code, as in tokenizers, is no Exception
        reason = str(error)
        if isinstance(error, ImportError):
            reason = f"{error}: pip install huggingface_hub safetensors tokenizers"
        elif isinstance(error, pickle.UnpicklingError):  # PyTorch's message advises to execute the code in it
            reason = "it is damaged, or holds code that would be executed"
        elif not isinstance(error, (ValueError, AssertionError)):
            reason = f"{type(error).__name__}: {error}"  # a KeyError, for one, says nothing but the key
        raise ValueError(f"{file} cannot be read as {what}: {' '.join(reason.split())}"[:500]) from None


class Tokenizer(NamedTuple):
    """How text becomes tokens. special: the ids (bos, sep); if empty, they are words and words + 1.

    Special tokens that a text spells out, like "<|endoftext|>", are encoded as plain characters.
    """

    words: int  # how many tokens the vocabulary has; bos and sep may come on top
    special: tuple
    encode: Callable  # text -> ids
    decode: Callable  # a list of ids -> text


def encode_bytes(text):
    return np.frombuffer(text.encode(), dtype=np.uint8)


def decode_bytes(ids):
    return bytes(i for i in ids if i < 256).decode(errors="replace")  # without bos and sep


BYTES = Tokenizer(256, (), encode_bytes, decode_bytes)  # one token for each byte of UTF-8
NEOX = "EleutherAI/gpt-neox-20b"  # the tokenizer of the official Mambas, whose checkpoints do not hold it
# name: (words, special), enough to read a .bin without a download
KNOWN = {"gpt2": (50257, (50256, 50256)), NEOX: (50277, (0, 1))}
END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


@functools.cache
def load_tokenizer(name):
    """A Tokenizer: "bytes", one of tiktoken ("gpt2", ...), or a tokenizer.json, its folder or hub name."""
    if name == "bytes":
        return BYTES
    names = tiktoken.list_encoding_names()
    with reading(name, f"a tokenizer, expected bytes, {', '.join(names)} or a tokenizer.json"):
        if name in names:
            gpt = tiktoken.get_encoding(name)
            return Tokenizer(gpt.n_vocab, (gpt.eot_token, gpt.eot_token), gpt.encode_ordinary, gpt.decode)

        # any other is a tokenizer.json, read by the library of Hugging Face
        import tokenizers

        file = name
        if not os.path.isfile(name):
            file = os.path.join(find_folder(name, "tokenizer.json"), "tokenizer.json")
        tokenizer = tokenizers.Tokenizer.from_file(file)
        tokenizer.encode_special_tokens = True  # despite its name: they become plain characters

        def encode(text):
            return tokenizer.encode(text, add_special_tokens=False).ids

        # The file does not say which token is bos: take the first of END_OF_TEXT, else the first special
        # token, else the last word. sep is another special token, else the same one
        ids = tokenizer.get_vocab()
        special_ids = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
        words = max(ids.values()) + 1  # there may be gaps between the ids
        candidates = [ids[word] for word in END_OF_TEXT if word in ids] + special_ids + [words - 1]
        bos = candidates[0]
        sep = next((i for i in special_ids if i != bos), bos)
        return Tokenizer(words, (bos, sep), encode, tokenizer.decode)


@dataclass
class Corpus:
    """The tokens of a training and a validation split, and the fields of the Tokenizer that made them."""

    name: str  # what it is, for people
    train: np.ndarray  # (N,) uint16 or uint32
    val: np.ndarray
    words: int = 256
    special: tuple = ()
    encode: Callable = encode_bytes
    decode: Callable = decode_bytes

    def __post_init__(self):
        # the border between documents, and the sign after which echo repeats a passage
        self.bos, self.sep = self.special or (self.words, self.words + 1)
        self.vocab_size = max(self.words, self.bos + 1, self.sep + 1)

    @functools.cached_property
    def checksum(self):
        """A number that tells this text from others, whatever their names."""
        crc = zlib.crc32(f"{self.bos} {self.sep} {self.vocab_size}".encode())
        for split in (self.train, self.val):
            crc = zlib.crc32(np.ascontiguousarray(split), crc)
        return crc


# With this many documents or more about one in twenty is held out; with fewer, the last tenth of each
MANY_DOCUMENTS = 200


def load_corpus(paths=None, tokenizer="bytes", vocab_size=None):
    """Read text and tokenize it. Raises ValueError for a path that is missing, a corpus that is empty.

    paths: None for the Python standard library of this machine, else files, folders or globs: text, .jsonl
        with a "text" field, or nanoGPT's token files, train.bin and val.bin or one .bin of uint16
    tokenizer: a name for load_tokenizer; for a .bin it only names the vocabulary, and "bytes", the default,
        means that this is unknown
    vocab_size: of a .bin of an unknown tokenizer; None: its highest token + 1
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    files = list_files(paths)
    bin_files = sorted(file for file, _ in files if file.endswith(".bin"))
    names = [os.path.basename(file) for file in bin_files]
    if names == ["train.bin", "val.bin"] or (bin_files and len(files) == 1):
        return load_bins(bin_files, tokenizer, vocab_size)
    if bin_files:
        raise ValueError(f"a .bin stands alone, or is train.bin beside val.bin, got {len(files)} files")

    # {text: key}, so that equal texts become one document
    documents = {text: key for key, text in sorted(read_documents(files)) if text}
    source = " ".join(map(os.fspath, paths or ["the Python standard library"]))
    if not documents:
        raise ValueError(f"the corpus is empty: no text in {source}")

    # the pieces of both splits, each document after a bos; np.concatenate needs one, so the first is empty
    name = f"{len(documents)} documents of {source}"
    corpus = Corpus(name, None, None, **load_tokenizer(tokenizer)._asdict())
    dtype = np.uint16 if corpus.vocab_size <= 2**16 else np.uint32
    bos = np.array([corpus.bos], dtype)
    train, val = [np.empty(0, dtype)], [np.empty(0, dtype)]
    for text, key in documents.items():
        with reading(key, f"text for the tokenizer {tokenizer}"):
            tokens = np.array(corpus.encode(text), dtype)
        if len(documents) < MANY_DOCUMENTS:
            cut = len(tokens) - len(tokens) // 10
            train += [bos, tokens[:cut]]
            val += [bos, tokens[cut:]]
        elif zlib.crc32(key.encode(errors="surrogateescape")) % 20 == 0:  # names of files may be no UTF-8
            val += [bos, tokens]
        else:
            train += [bos, tokens]
    corpus.train, corpus.val = np.concatenate(train), np.concatenate(val)
    return corpus


def load_bins(files, tokenizer, vocab_size):
    """The Corpus of train.bin and val.bin, or of one .bin whose last tenth is held out; memory-mapped."""
    splits = []
    for file in files:
        with reading(file, "a .bin of uint16 tokens"):
            tokens = np.memmap(file, dtype=np.uint16, mode="r")
            # refuse files of NumPy, torch.save (a zip) and llm.c (two versions) by their first bytes
            start = tokens[:2].tobytes()
            has_header = start in (b"\x93NUM", b"PK\3\4", b"\x88\xd8\x34\x01", b"\xa1\xd9\x34\x01")
            # refuse 32 or 64 bits: the upper 16 bits of a token are below 4 for a vocabulary below 4 * 2^16
            low, high = sorted([tokens[::2].max(), tokens[1::2].max()])
            if has_header or low < 4 <= high:
                raise ValueError("it has a header, or more than 16 bits for each token")
            splits.append(tokens)
    if len(files) == 1:
        (tokens,) = splits
        cut = len(tokens) - len(tokens) // 10
        splits = [tokens[:cut], tokens[cut:]]

    # the vocabulary; if the tokenizer is unknown, bos is GPT-2's 50256, or the last token if there are fewer
    highest = max(int(tokens.max(initial=0)) for tokens in splits)
    if tokenizer == "bytes":
        words = vocab_size or highest + 1
        bos = min(words - 1, 50256)
        special = (bos, bos)
    else:
        words, special = KNOWN.get(tokenizer) or load_tokenizer(tokenizer)[:2]
    if highest >= words:
        raise ValueError(f"{files[0]} has a token {highest}, outside the vocabulary of {words} words")

    def encode(text):
        if tokenizer == "bytes":
            raise ValueError("this task must encode text: name the tokenizer of the .bin with --tokenizer")
        return load_tokenizer(tokenizer).encode(text)

    def decode(ids):
        return load_tokenizer(tokenizer).decode(ids)

    return Corpus(" ".join(files), *splits, words, special, encode, decode)


def list_files(paths):
    """A list of (file, key); read_documents and load_corpus use the key."""
    files = []
    for path in map(os.fspath, paths or [sysconfig.get_paths()["stdlib"]]):
        if os.path.isdir(path):
            with reading(path, "a folder of text"):
                os.listdir(path)  # an error if it cannot be read, where glob would only find nothing
            root, pattern = path, os.path.join(glob.escape(path), "**", "*")
        elif os.path.isfile(path):
            root, pattern = os.path.dirname(path), glob.escape(path)
        else:
            before_wildcard = re.split(r"[*?[]", path)[0]
            root, pattern = os.path.dirname(before_wildcard), path
        found = [file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file)]
        if not found:
            raise ValueError(f"no text at {path!r}, give an existing file, folder or glob")
        for file in found:
            # keys decide what is held out, so they are relative paths, the same on all machines
            key = os.path.relpath(file, root or ".").replace(os.sep, "/")
            # of the standard library only .py files, and no installed packages
            if paths or (key.endswith(".py") and not re.search("(site|dist)-packages", key)):
                files.append((file, key))
    return files


def read_documents(files):
    """Yield (key, text) of every file, or of every object of a .jsonl."""
    for file, key in files:
        if file.endswith(".jsonl"):
            for i, fields in enumerate(read_json(file, ["text"])):
                yield f"{key}:{i:09d}", fields[0]
            continue
        with reading(file, "text"), open(file, encoding="utf-8", errors="replace") as f:
            text = f.read()
            if "\0" in text:
                raise ValueError("it has NUL bytes, so it is a binary file")
        yield key, text


def read_json(file, fields):
    """The fields, all of them text, of the JSON objects in a file: one object a line, or one list."""
    with reading(file, "text"), open(file, encoding="utf-8-sig", errors="replace") as f:
        content = f.read()
    pieces = [content] if content.lstrip().startswith("[") else content.split("\n")
    objects = []
    for i, piece in enumerate(pieces):
        if piece.strip():
            with reading(f"{file} line {i + 1}", f"a JSON object with {', '.join(fields)}"):
                parsed = json.loads(piece)
                if not isinstance(parsed, list):
                    parsed = [parsed]
                for x in parsed:
                    # halves of a surrogate pair, which JSON can spell, become "?"
                    objects.append([x[field].encode(errors="replace").decode() for field in fields])
    return objects


def read_babilong(file, n):
    """The first n entries of a published BABILong file: (text and question, question, answer) of each."""
    entries = []
    for text, question, answer in read_json(file, ["input", "question", "target"])[:n]:
        question = question.strip()
        entries.append((f"{text.strip()} {question}", question, answer.strip()))
    if not entries:
        raise ValueError(f"{file} is empty")
    return entries


# ---- Appendix B: checkpoints of other libraries ----
# We read checkpoints of mamba_ssm and transformers (Mamba-2 and Mamba-1) and of flash-linear-attention,
# called fla below (GLA and Gated DeltaNet). We write those of mamba_ssm and fla; transformers has a script
# that converts from mamba_ssm.

CHECKPOINT = "checkpoint.pt"  # of train.py

# the settings that are read from config.json, by their names there
MAMBA_SSM = ("d_model", "n_layer", "vocab_size", "tie_embeddings", "pad_vocab_size_multiple")
# mamba_ssm keeps the settings of its layers, here those after *MAMBA_SSM, in a dictionary "ssm_cfg"
MAMBA_SSM_1 = (*MAMBA_SSM, "d_state", "d_conv", "expand", "dt_rank")
MAMBA_SSM_2 = (*MAMBA_SSM, "d_state", "d_conv", "expand", "headdim", "ngroups")
TRANSFORMERS = ("hidden_size", "num_hidden_layers", "tie_word_embeddings", "layer_norm_epsilon", "vocab_size")
TRANSFORMERS += ("state_size", "conv_kernel", "expand", "head_dim", "n_groups", "time_step_rank")
FLA = ("hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings", "norm_eps", "num_heads")
FLA += ("expand_v", "hidden_ratio")
OUR_FIELD = {  # a setting's name there: our field, where they differ
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "tie_word_embeddings": "tie_embeddings",
    "layer_norm_epsilon": "norm_eps",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "conv_size": "d_conv",
    "head_dim": "headdim",
    "n_groups": "ngroups",
    "time_step_rank": "dt_rank",
}

# kind: (our layer, names of settings, values of our fields that the file leaves out). The kind is model_type
# or, in mamba_ssm, the "layer" of ssm_cfg. Of two kinds with the same layer, export_model writes the first.
KINDS = {
    "Mamba1": ("mamba1", MAMBA_SSM_1, dict(pad_vocab_size_multiple=8)),
    "Mamba2": ("mamba2", MAMBA_SSM_2, dict(pad_vocab_size_multiple=8)),
    # the vocab_size of transformers includes the padding
    "mamba": ("mamba1", TRANSFORMERS, dict(pad_vocab_size_multiple=1)),
    "mamba2": ("mamba2", TRANSFORMERS, dict(pad_vocab_size_multiple=1, ngroups=8, tie_embeddings=False)),
    "gla": ("gla", (*FLA, "expand_k"), {}),
    "gated_deltanet": ("gdn", (*FLA, "head_dim", "conv_size"), {}),
}

# settings that change the formulas, above all those that no weight's name or shape would show; REQUIRED is
# {names of settings: the values that our formulas allow}, and a file without the setting has the first value
REQUIRED = {
    ("rms_norm", "use_gate"): [True],
    ("norm_before_gate", "allow_neg_eigval"): [False],
    ("attn_layer_idx", "attn", "feature_map", "clamp_min", "attnres_block_size"): [None, []],
    ("hidden_act", "output_gate_activation"): ["silu", "swish"],
    # JSON has two ways to say infinity
    ("dt_limit", "time_step_limit"): [[0.0, math.inf], [0.0, {"__float__": "Infinity"}]],
}

# {part of our name of a weight: (that part in mamba_ssm, in fla)}. The order counts when a model is exported:
# ".norm." comes before "norm_f.", which becomes "model.norm." in fla
NAMES = {
    "embedding.": ("backbone.embedding.", "model.embeddings."),
    "layers.": ("backbone.layers.", "model.layers."),
    ".norm.": (".norm.", ".attn_norm."),
    ".mixer.": (".mixer.", ".attn."),
    "norm_f.": ("backbone.norm_f.", "model.norm."),
}


def load_checkpoint(name_or_folder):
    """A checkpoint on disk or on the hub: a dictionary with "config", "model" (the weights) and "settings".

    name_or_folder: a run of train.py (its folder or file), a folder or file of weights of another library,
        or a name of the hub
    The weights get our names and float32; "settings" are options of train.py for further training. Raises
    ValueError, one sentence, for all that is missing, extra, misshapen, not finite or not understood.
    """
    # a run of train.py
    name = os.fspath(name_or_folder)
    if name.endswith((".safetensors", ".bin", ".json")):
        name = os.path.dirname(name) or "."
    file = os.path.join(name, CHECKPOINT) if os.path.isdir(name) else name
    if os.path.isfile(file):
        with reading(file, "a checkpoint of train.py"):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            checkpoint["model"] = check_weights(ModelConfig(**checkpoint["config"]), checkpoint["model"])
            return checkpoint

    # config.json and weights of another library
    folder, weights = load_weights(name)
    file = os.path.join(folder, "config.json")
    with reading(file, "the settings of a model"), open(file, encoding="utf-8") as f:
        their_settings = json.load(f)
        config = import_settings(their_settings)
    with reading(folder, "a checkpoint"):
        weights = check_weights(config, rename_weights(config, weights))

    # the tokenizer: one in the folder, or that of the official Mambas, whose config.json has no model_type
    settings = dict(task="text", T=2048, tokenizer=None, model=os.path.basename(os.path.abspath(name)))
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        settings["tokenizer"] = name
    elif "model_type" not in their_settings and config.vocab_size == KNOWN[NEOX][0]:
        settings["tokenizer"] = NEOX
    return dict(config=asdict(config), model=weights, settings=settings)


def find_folder(name, *patterns):
    """The folder `name`, or one with those files of the hub's model `name` that fit the patterns."""
    if os.path.isdir(name):
        return name
    if name.count("/") != 1:
        raise ValueError(f"no checkpoint at {name!r}, train one first or give a folder or a name of the hub")
    with reading(name, "a folder on this disk, or a name of the hub"):
        import huggingface_hub

        return huggingface_hub.snapshot_download(name, allow_patterns=patterns)


def load_weights(name):
    """The folder of a checkpoint of another library, and {name: tensor} of all its files of weights."""
    weights = {}
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        folder = find_folder(name, "config.json", "tokenizer.json", pattern)
        for file in glob.glob(os.path.join(glob.escape(folder), pattern)):
            with reading(file, "weights"):
                if file.endswith(".bin"):
                    weights.update(torch.load(file, map_location="cpu", weights_only=True))
                else:
                    import safetensors.torch

                    weights.update(safetensors.torch.load_file(file))
        if weights:
            return folder, weights
    raise ValueError(f"{name} has no checkpoint: no {CHECKPOINT}, model.safetensors or pytorch_model.bin")


def import_settings(theirs):
    """The ModelConfig of another library's config.json."""
    settings = dict(theirs)
    settings.update(settings.pop("ssm_cfg", None) or {})
    kind = settings.pop("model_type", None) or settings.pop("layer", None) or "Mamba1"
    if kind not in KINDS:
        raise ValueError(f"unknown kind of model {kind!r}, expected one of {', '.join(KINDS)}")
    layer, names, defaults = KINDS[kind]

    # refuse settings under which the formulas are not ours
    if kind == "mamba2":
        settings.pop("norm_before_gate", None)  # published files have it, transformers does not read it
    num_heads = settings.get("num_heads", LAYERS[layer].OFFICIAL.get("num_heads"))
    required = REQUIRED | {("num_kv_heads", "num_v_heads"): [None, num_heads]}
    for required_names, values in required.items():
        for name in required_names:
            value = settings.pop(name, values[0])
            if value not in values:
                raise ValueError(f"its {name} is {value!r}, but only {values[0]!r} is known here")

    # our fields; None and "auto" mean the default
    config = dict(defaults, layer=layer)
    for name in names:
        value = settings.pop(name, None)
        if value not in (None, "auto"):
            if not isinstance(value, (int, float)):
                raise ValueError(f"its {name} is {value!r}, expected a number")
            config[OUR_FIELD.get(name, name)] = value
    for name in ("residual_in_fp32", "fused_add_norm"):  # how to compute, which changes no result
        settings.pop(name, None)
    if settings:
        print(f"config.json: settings that are not read here: {', '.join(settings)}", flush=True)
    return ModelConfig(**config)


def rename_weights(config, theirs):
    """The weights of another library by our names."""
    ours = {}
    for name, x in theirs.items():
        if config.layer == "gdn" and name.endswith(".attn.D"):
            continue  # no formula uses this weight of older versions of fla
        # two names differ in transformers and in older versions of fla
        name = name.replace("backbone.embeddings.", "backbone.embedding.")
        name = name.replace(".g_norm.", ".g_norm_swish_gate.")
        for our_part, their_parts in NAMES.items():
            for their_part in their_parts:
                name = name.replace(their_part, our_part)
        ours[name] = x
    return ours


def check_weights(config, weights):
    """The weights as Parameters in float32. Raises an error unless a model of config has exactly these."""
    if config.n_layer > len(weights):  # before a damaged file makes us build a million layers
        raise ValueError(f"its settings ask for {config.n_layer} layers, it has {len(weights)} weights")
    weights = dict(weights)

    # a tied weight may be there under one of its names only
    if config.tie_embeddings:
        for name, other in itertools.permutations(("embedding.weight", "lm_head.weight")):
            if other in weights:
                weights.setdefault(name, weights[other])

    # build a model only to check: PyTorch's error names what is missing, extra or misshapen
    model_from_checkpoint(dict(config=asdict(config), model=weights))
    for name, x in weights.items():
        if not x.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite, fetch it again")
        weights[name] = nn.Parameter(x.to(torch.float32, copy=True))  # x may be a view of the file

    # both names of a tied weight get one Parameter, so that it stays tied
    if config.tie_embeddings:
        if not torch.equal(weights["lm_head.weight"], weights["embedding.weight"]):
            raise ValueError("lm_head.weight differs from the embedding that its settings tie it to")
        weights["lm_head.weight"] = weights["embedding.weight"]
    return weights


def model_from_checkpoint(checkpoint):
    """The model of a dictionary from load_checkpoint, whose tensors become its weights."""
    with torch.device("meta"):  # no time and no memory for weights that are replaced at once
        model = LanguageModel(ModelConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"], assign=True)
    return model


def export_model(model, folder, dtype=torch.float32):
    """Write config.json and pytorch_model.bin for mamba_ssm or (GLA, Gated DeltaNet) flash-linear-attention.

    dtype: of the stored weights. Raises ValueError, before anything is written, for what would be loaded
    wrongly.
    """
    assert dtype.is_floating_point, f"dtype is {dtype}, expected a floating-point one"
    config = model.config
    kinds = [kind for kind, (layer, _, _) in KINDS.items() if layer == config.layer]
    if not kinds:
        raise ValueError(f"no other library is known that has the layer {config.layer}")
    kind = kinds[0]
    _, names, defaults = KINDS[kind]
    is_fla = LAYERS[config.layer].HAS_MLP

    # refuse values for which the library has no setting, and files that it would read instead
    assumed = ModelConfig(**defaults, layer=config.layer)
    for field in ("norm_eps", "gate_low_rank_dim", "pad_vocab_size_multiple"):
        if field not in names and getattr(config, field) != getattr(assumed, field):
            raise ValueError(f"the other library has no setting for {field} {getattr(config, field)}")
    for pattern in (CHECKPOINT, "model*.safetensors", "pytorch_model-*.bin"):
        for file in glob.glob(pattern, root_dir=folder):  # the first one is enough to refuse
            raise ValueError(f"{folder}/{file} would be read instead of this model: choose another folder")

    # the weights by the library's names
    weights = {}
    for name, x in model.state_dict().items():
        for our_part, (in_mamba_ssm, in_fla) in NAMES.items():
            name = name.replace(our_part, in_fla if is_fla else in_mamba_ssm)
        weights[name] = x.to("cpu", dtype)
        if not weights[name].isfinite().all():
            raise ValueError(f"{name} is not finite or too large for {dtype}, choose another dtype")
    if config.tie_embeddings:  # a tensor with two names is stored once
        weights["lm_head.weight"] = next(x for name, x in weights.items() if "embedding" in name)

    # the settings by the library's names
    settings = {name: getattr(config, OUR_FIELD.get(name, name)) for name in names}
    if is_fla:
        settings["model_type"] = kind
    else:
        ssm_cfg = {name: settings.pop(name) for name in names if name not in MAMBA_SSM}
        settings.update(rms_norm=True, residual_in_fp32=True, ssm_cfg=dict(ssm_cfg, layer=kind))
    write_atomically(os.path.join(folder, "pytorch_model.bin"), lambda file: torch.save(weights, file))
    write_text(os.path.join(folder, "config.json"), json.dumps(settings, indent=2) + "\n")


def write_atomically(path, write):
    """Write a file by write(file) and a rename, so that readers see all of the new file or the old one.

    Makes its folder.
    """
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as file:  # given a path, torch.save hides that a disk is full
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise ValueError(f"{path} cannot be written: {error}") from None


def write_text(path, content):
    """Write a file of text as write_atomically does."""
    write_atomically(path, lambda file: file.write(content.encode()))
