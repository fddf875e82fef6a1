"""Understanding and improving length generalization in recurrent models, in one file.

Recurrent language models break past their training length because training from a zero state explores only
part of the states that a long rollout reaches (Buitrago & Gu, ICML 2025, arXiv 2507.02782). The cure is to
change the state that training sequences start from. This file holds the models and their state, those
interventions, the text and the tasks, and the measures. The recurrence itself is in kernels.py.

    B batch    T length (of training, when nothing else is said)    L layers    D model width    C vocabulary
    H heads    G groups (H/G heads share q and k)    K key size of a head (d_state)    V value size (headdim)
"""

import functools
import glob
import http.client
import itertools
import json
import math
import os
import re
import sysconfig
import unicodedata
import urllib.request
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

# --------------------------------------------------------------------------------------------------
# Models. Names of weights and of settings are those of the official checkpoints.


@dataclass
class ModelConfig:
    """Architecture. None means the official default of the layer (OFFICIAL, below)."""

    layer: str = "mamba2"  # "mamba2", "mamba1" or "gla"
    vocab_size: int = 50277
    d_model: int = 768
    n_layer: int = 24
    pad_vocab_size_multiple: int | None = None
    tie_embeddings: bool | None = None
    norm_eps: float | None = None
    # Mamba
    d_state: int | None = None  # K
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64  # V
    ngroups: int = 1  # G
    dt_rank: int | None = None  # Mamba-1
    # GLA
    num_heads: int = 4  # H
    expand_k: float = 0.5
    expand_v: float = 1.0
    hidden_ratio: int = 4
    gate_low_rank_dim: int = 16
    # which scan of kernels.py; None lets it choose
    backend: str | None = None
    # compute each layer again in the backward pass: only its input is kept, for a third more work
    recompute: bool = False
    # of the weights in the files the model came from; here they are float32
    torch_dtype: str = "float32"

    def __post_init__(self):
        if self.layer not in OFFICIAL:
            raise ValueError(f"unknown model {self.layer!r}, expected one of {', '.join(OFFICIAL)}")
        for name, value in OFFICIAL[self.layer].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for field in fields(self):
            value, kind = getattr(self, field.name), NUMBERS.get(field.type)
            if kind and value is not None and not (isinstance(value, kind) and value > 0):
                raise ValueError(f"{field.name} is {value!r}, expected a positive {field.type}")
        if self.backend not in (None, *BACKENDS):
            raise ValueError(f"unknown backend {self.backend!r}, expected one of {', '.join(BACKENDS)}")
        if self.dt_rank is None:
            self.dt_rank = math.ceil(self.d_model / 16)


NUMBERS = {int: int, int | None: int, float: int | float, float | None: int | float}  # what a field takes
OFFICIAL = {
    "mamba2": dict(pad_vocab_size_multiple=16, tie_embeddings=True, norm_eps=1e-5, d_state=128),
    "mamba1": dict(pad_vocab_size_multiple=8, tie_embeddings=True, norm_eps=1e-5, d_state=16),
    "gla": dict(pad_vocab_size_multiple=1, tie_embeddings=False, norm_eps=1e-6),
}


class LayerState(NamedTuple):
    """What one layer remembers: all that the future can know of the past.

    conv  (B, d_conv-1, channels) the last *inputs* of the causal convolution; None where a layer has none
    scan  (B, H, K, V) the recurrence's S, never below float32
    """

    conv: torch.Tensor | None
    scan: torch.Tensor


def map_state(f, *states):
    """Apply f to the tensors of one or several states (lists of LayerState) place by place."""
    return [
        LayerState(*(None if xs[0] is None else f(*xs) for xs in zip(*layers, strict=True)))
        for layers in zip(*states, strict=True)
    ]


class Linear(nn.Linear):
    """nn.Linear for x (B, T, D); without gradients, float32 on an x86 CPU goes through oneDNN where T > 1.

    MKL, which PyTorch takes there by itself, uses half the vector width of AMD's CPUs: twice the time. For
    one token the two changes of layout cost more than they save.
    """

    def forward(self, x):
        plain = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        cpu = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[1] > 1
        if plain or not cpu or not torch.backends.mkl.is_available():
            return super().forward(x)
        return F.linear(x.to_mkldnn(), self.weight, self.bias).to_dense()


class Mamba2(nn.Module):
    """The Mamba-2 mixer (Dao & Gu 2024): q = C, k = B, v = dt * x, log_a = -dt * exp(A_log).

    x (B, T, D), state LayerState -> (B, T, D), LayerState after the last step
    """

    def __init__(self, config):
        super().__init__()
        c = config
        self.d_inner, self.G, self.K, self.V = c.expand * c.d_model, c.ngroups, c.d_state, c.headdim
        if self.d_inner % self.V or (self.d_inner // self.V) % self.G:
            raise ValueError(
                f"d_inner {self.d_inner} must divide into heads of {self.V} and {self.G} equal groups"
            )
        self.H = self.d_inner // self.V
        self.channels, self.d_conv = self.d_inner + 2 * self.G * self.K, c.d_conv
        self.norm_eps, self.backend = c.norm_eps, c.backend

        self.in_proj = Linear(c.d_model, self.d_inner + self.channels + self.H, bias=False)
        self.conv1d = nn.Conv1d(self.channels, self.channels, c.d_conv, groups=self.channels)
        self.dt_bias = nn.Parameter(initial_dt_bias(self.H))
        self.A_log = nn.Parameter(torch.empty(self.H).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.H))
        self.norm = nn.RMSNorm(self.d_inner, c.norm_eps)
        self.out_proj = Linear(self.d_inner, c.d_model, bias=False)
        with torch.no_grad():  # the residual stream of every depth starts with the same variance
            self.out_proj.weight /= math.sqrt(c.n_layer)

    def zero_state(self, B):
        w = self.in_proj.weight
        S = w.new_zeros(B, self.H, self.K, self.V, dtype=torch.promote_types(w.dtype, torch.float32))
        return LayerState(w.new_zeros(B, self.d_conv - 1, self.channels), S)

    def forward(self, x, state):
        B, T, _ = x.shape
        z, xkq, dt = self.in_proj(x).split([self.d_inner, self.channels, self.H], dim=-1)
        xkq, conv = causal_conv(xkq, state.conv, self.conv1d.weight, self.conv1d.bias)
        x, k, q = xkq.split([self.d_inner, self.G * self.K, self.G * self.K], dim=-1)
        x = x.view(B, T, self.H, self.V)
        k, q = (y.view(B, T, self.G, self.K) for y in (k, q))
        dt = F.softplus(dt + self.dt_bias)  # float32 even where autocast computes in bfloat16
        v = (dt[..., None] * x).to(x.dtype)
        o, S = scan(q, k, v, -dt * self.A_log.exp(), state.scan, self.backend)
        y = torch.addcmul(o, self.D[:, None], x).flatten(-2) * F.silu(z)
        # the gated norm runs over each group's channels
        y = F.rms_norm(y.unflatten(-1, (self.G, -1)), (self.d_inner // self.G,), eps=self.norm_eps)
        y = y.flatten(-2) * self.norm.weight
        return self.out_proj(y), LayerState(conv, S)


def causal_conv(x, state, weight, bias):
    """Depthwise convolution and SiLU of x (B, T, channels) behind state, the d_conv-1 inputs before it.

    Returns (B, T, channels) and the d_conv-1 last inputs. As a 2-d convolution of height 1, because
    channels-last 2-d convolutions are several times faster on CPUs.
    """
    T = x.shape[1]
    x = torch.cat([state.to(x.dtype), x], dim=1)
    y = F.conv2d(x.transpose(1, 2)[:, :, None], weight[:, :, None], bias, groups=weight.shape[0])
    y = y.squeeze(2).transpose(1, 2)  # the gradient of y[:, :, 0] would fill a tensor with zeros
    return F.silu(y), x[:, T:].clone()  # a view would keep all of x in memory


def initial_dt_bias(n):
    """(n,) the inverse softplus of dt log-uniform in [1e-3, 1e-1]."""
    dt = torch.exp(torch.empty(n).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


class Mamba1(nn.Module):
    """The Mamba mixer (Gu & Dao 2023): every channel is a head with V = 1, and a decay per (channel, state).

    q = C, k = B, v = dt * x, log_a = -dt * exp(A_log)
    x (B, T, D), state LayerState -> (B, T, D), LayerState after the last step
    """

    def __init__(self, config):
        super().__init__()
        c = config
        self.H = self.channels = c.expand * c.d_model
        self.K, self.V, self.d_conv, self.dt_rank = c.d_state, 1, c.d_conv, c.dt_rank
        self.backend = c.backend
        self.in_proj = Linear(c.d_model, 2 * self.H, bias=False)
        self.conv1d = nn.Conv1d(self.H, self.H, c.d_conv, groups=self.H)
        self.x_proj = Linear(self.H, self.dt_rank + 2 * self.K, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.H)
        self.A_log = nn.Parameter(torch.arange(1.0, self.K + 1).log().repeat(self.H, 1))
        self.D = nn.Parameter(torch.ones(self.H))
        self.out_proj = Linear(self.H, c.d_model, bias=False)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
            self.dt_proj.bias.copy_(initial_dt_bias(self.H))
            self.out_proj.weight /= math.sqrt(c.n_layer)

    zero_state = Mamba2.zero_state

    def forward(self, x, state):
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, conv = causal_conv(x, state.conv, self.conv1d.weight, self.conv1d.bias)
        dt, k, q = self.x_proj(x).split([self.dt_rank, self.K, self.K], dim=-1)
        # float32 even where autocast computes in bfloat16
        dt = F.softplus(F.linear(dt, self.dt_proj.weight) + self.dt_proj.bias)
        v, log_a = (dt * x).to(x.dtype), -dt[..., None] * self.A_log.exp()
        o, S = scan(q[:, :, None], k[:, :, None], v[..., None], log_a, state.scan, self.backend)
        y = (o[..., 0] + self.D * x) * F.silu(z)
        return self.out_proj(y), LayerState(conv, S)


class GLA(nn.Module):
    """Gated linear attention (Yang et al. 2024): one decay per key channel, log_a = logsigmoid(gate) / 16.

    x (B, T, D), state LayerState -> (B, T, D), LayerState after the last step
    """

    def __init__(self, config):
        super().__init__()
        c = config
        self.H, self.backend = c.num_heads, c.backend
        key_dim, value_dim = int(c.d_model * c.expand_k), int(c.d_model * c.expand_v)
        if key_dim % self.H or value_dim % self.H:
            raise ValueError(
                f"{self.H} heads cannot share {key_dim} key and {value_dim} value channels evenly"
            )
        self.K, self.V = key_dim // self.H, value_dim // self.H
        self.q_proj = Linear(c.d_model, key_dim, bias=False)
        self.k_proj = Linear(c.d_model, key_dim, bias=False)
        self.v_proj = Linear(c.d_model, value_dim, bias=False)
        self.g_proj = Linear(c.d_model, value_dim, bias=False)
        self.gk_proj = nn.Sequential(
            Linear(c.d_model, c.gate_low_rank_dim, bias=False), Linear(c.gate_low_rank_dim, key_dim)
        )
        self.g_norm_swish_gate = nn.RMSNorm(self.V, c.norm_eps)  # one weight, shared by the heads
        self.o_proj = Linear(value_dim, c.d_model, bias=False)

    def zero_state(self, B):
        w = self.q_proj.weight
        return LayerState(
            None, w.new_zeros(B, self.H, self.K, self.V, dtype=torch.promote_types(w.dtype, torch.float32))
        )

    def forward(self, x, state):
        q = self.q_proj(x).unflatten(-1, (self.H, self.K)) * self.K**-0.5
        k = self.k_proj(x).unflatten(-1, (self.H, self.K))
        v = self.v_proj(x).unflatten(-1, (self.H, self.V))
        gate = self.gk_proj(x).unflatten(-1, (self.H, self.K))
        log_a = F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32))) / 16
        o, S = scan(q, k, v, log_a, state.scan, self.backend)
        y = self.g_norm_swish_gate(o).flatten(-2) * F.silu(self.g_proj(x))
        return self.o_proj(y), LayerState(None, S)


class SwiGLU(nn.Module):
    """x (B, T, D) -> (B, T, D); inner width 2/3 * hidden_ratio * D, rounded up to a multiple of 256."""

    def __init__(self, config):
        super().__init__()
        D = config.d_model
        inner = 256 * math.ceil(int(D * config.hidden_ratio * 2 / 3) / 256)
        self.gate_proj = Linear(D, inner, bias=False)
        self.up_proj = Linear(D, inner, bias=False)
        self.down_proj = Linear(inner, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MambaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.mixer = (Mamba2 if config.layer == "mamba2" else Mamba1)(config)

    def zero_state(self, B):
        return self.mixer.zero_state(B)

    def forward(self, x, state):
        y, state = self.mixer(self.norm(x), state)
        return x + y, state


class GLABlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attn = GLA(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)

    def zero_state(self, B):
        return self.attn.zero_state(B)

    def forward(self, x, state):
        y, state = self.attn(self.attn_norm(x), state)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


# layer -> (block, and the official names of trunk, embedding and last norm)
LAYERS = {
    "mamba2": (MambaBlock, "backbone", "embedding", "norm_f"),
    "mamba1": (MambaBlock, "backbone", "embedding", "norm_f"),
    "gla": (GLABlock, "model", "embeddings", "norm"),
}


class LanguageModel(nn.Module):
    """logits, state = model(tokens, state=None)

    tokens (B, T) int64 in [0, vocab_size), T >= 1; logits (B, T, vocab_size); state a list of one LayerState
    per layer, None meaning zeros. The returned state is pure: nothing was edited in place and gradients flow
    through it, so cutting a sequence anywhere and handing the state over is the same as not cutting.
    Detaching is up to the caller: that choice is the whole difference between BPTT, TBTT and state passing.
    Bad tokens or states raise a ValueError.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        block, trunk, embedding, norm = LAYERS[c.layer]
        C = c.pad_vocab_size_multiple * math.ceil(c.vocab_size / c.pad_vocab_size_multiple)
        trunk_modules = {
            embedding: nn.Embedding(C, c.d_model),
            "layers": nn.ModuleList(block(c) for _ in range(c.n_layer)),
            norm: nn.RMSNorm(c.d_model, c.norm_eps),
        }
        self.add_module(trunk, nn.ModuleDict(trunk_modules))
        # the plain class: logits in two layouts would take twice the memory
        self.lm_head = nn.Linear(c.d_model, C, bias=False)
        self.apply(self._init_weights)
        if c.tie_embeddings:
            self.lm_head.weight = trunk_modules[embedding].weight

    def _init_weights(self, module):
        """Embedding N(0, .02). Linear maps: for Mamba PyTorch's own initialisation, for GLA N(0, .02)."""
        gla = self.config.layer == "gla"
        if isinstance(module, nn.Embedding) or (gla and isinstance(module, nn.Linear)):
            nn.init.normal_(module.weight, std=0.02)
        if gla and isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def zero_state(self, B):
        """The state of B rows before their first token: a list of LayerState."""
        _, trunk, _, _ = LAYERS[self.config.layer]
        return [layer.zero_state(B) for layer in getattr(self, trunk)["layers"]]

    def forward(self, tokens, state=None):
        if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.int64:
            raise ValueError(f"tokens must be int64, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
        if tokens.dim() != 2 or not tokens.numel():
            raise ValueError(f"tokens must be (B, T) with B, T >= 1, got {tuple(tokens.shape)}")
        C = self.config.vocab_size
        # on a GPU this look would wait for the device at every step, and the embedding asserts there anyway
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = tokens.min().item(), tokens.max().item()
            if low < 0 or high >= C:
                raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary of {C}")
        B = len(tokens)
        state = self.zero_state(B) if state is None else check_state(state, self.zero_state(0), B)

        _, trunk, embedding, norm = LAYERS[self.config.layer]
        trunk = getattr(self, trunk)
        x = trunk[embedding](tokens)
        new_state = []
        for layer, layer_state in zip(trunk["layers"], state, strict=True):
            if self.config.recompute and torch.is_grad_enabled():
                x, layer_state = torch.utils.checkpoint.checkpoint(layer, x, layer_state, use_reentrant=False)
            else:
                x, layer_state = layer(x, layer_state)
            new_state.append(layer_state)
        return self.lm_head(trunk[norm](x))[..., :C], new_state

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """The model of any checkpoint that load_checkpoint reads, on the CPU; ValueError if it cannot."""
        return cls.from_checkpoint(load_checkpoint(name_or_folder))

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """The model of a dictionary from load_checkpoint, whose tensors become the weights, uncopied."""
        with torch.device("meta"):
            model = cls(ModelConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"], assign=True)
        if model.config.tie_embeddings:
            model.lm_head.weight = model.get_parameter(embedding_name(model.config))
        return model

    def save_pretrained(self, folder, format=None, dtype=None):
        """Write config.json and weights as another library loads them; ValueError where it could not.

        format: "mamba_ssm" (the default for Mamba), "transformers" (version 5 if ngroups > 1; padding rows of
            the vocabulary count there as words) or "fla" (GLA)
        dtype: torch dtype of the stored weights; None for that of the files the model came from
        """
        c, weights = self.config, self.state_dict()
        dtype = dtype or getattr(torch, c.torch_dtype)
        formats = {theirs: kind for kind, (theirs, layer) in KINDS.items() if layer == c.layer}
        format = format or next(iter(formats))
        if format not in formats:
            raise ValueError(f"unknown format {format!r} for {c.layer}, expected {' or '.join(formats)}")
        if format == "transformers":
            c = replace(c, vocab_size=len(self.lm_head.weight), pad_vocab_size_multiple=1)
            weights = {name.replace(".embedding.", ".embeddings."): x for name, x in weights.items()}
        if format != "mamba_ssm" and c.tie_embeddings:
            del weights["lm_head.weight"]
        settings = foreign_settings(c, formats[format], dtype)
        read_back = ModelConfig(**foreign_config(settings, folder))
        for field in SETTINGS[format].keys() | {"norm_eps", "gate_low_rank_dim"}:
            if getattr(read_back, field) != getattr(c, field):
                raise ValueError(
                    f"{format} has no setting for {field} {getattr(c, field)}, choose another format"
                )
        if dtype not in SAFETENSORS.values():
            raise ValueError(f"dtype is {dtype}, expected a floating-point one of 16 to 64 bits")
        for name, x in weights.items():
            weights[name] = x.detach().to("cpu", dtype).contiguous()
            if not finite(weights[name]):
                raise ValueError(f"{name} is not finite or too large for {dtype}, choose another dtype")
        name, write = ("pytorch_model.bin", torch.save)
        if format != "mamba_ssm":
            name, write = (WEIGHTS[0], write_safetensors)
        for other in {CHECKPOINT, *WEIGHTS} - {name}:
            if os.path.exists(os.path.join(folder, other)):
                raise ValueError(
                    f"{folder!r} holds {other}, which would be read instead: choose another folder"
                )
        file, config_file = os.path.join(folder, name), os.path.join(folder, "config.json")
        try:
            os.makedirs(folder, exist_ok=True)
            write(weights, f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
            Path(f"{config_file}.tmp").write_text(json.dumps(settings, indent=2) + "\n")
            os.replace(f"{config_file}.tmp", config_file)
        except (OSError, RuntimeError) as error:  # torch.save: RuntimeError
            raise ValueError(f"the folder {folder!r} cannot be written to: {error}") from None


def check_state(state, empty, B):
    """Raise a ValueError unless `state` is one of B rows and else like `empty`, one of none; return it."""
    try:
        state = [LayerState(*layer) for layer in state]
    except TypeError:
        raise ValueError(f"state is a {type(state).__name__}, expected a list of LayerState") from None
    if len(state) != len(empty):
        raise ValueError(f"state has {len(state)} layers, expected {len(empty)}")
    for i, (given, wanted) in enumerate(zip(state, empty, strict=True)):
        for name, x, like in zip(LayerState._fields, given, wanted, strict=True):
            shape = tuple(x.shape) if isinstance(x, torch.Tensor) else x
            expected = None if like is None else (B, *like.shape[1:])
            if shape != expected:
                raise ValueError(f"state[{i}].{name} has shape {shape}, expected {expected}")
            if x is None:
                continue
            # autocast computes the convolution's inputs in a dtype of its own; S keeps float32 even there
            other = name == "conv" and torch.is_autocast_enabled(x.device.type)
            if x.device != like.device or (x.dtype != like.dtype and not other):
                found, fit = (f"{y.dtype} on {y.device}" for y in (x, like))
                raise ValueError(f"state[{i}].{name} is {found}, expected {fit}")
    return state


# --------------------------------------------------------------------------------------------------
# Checkpoints: a run of train.py, or a folder of another library with config.json and weights. No file is
# believed: nothing in it is executed, and everything is checked before there is a model.

CHECKPOINT = "checkpoint.pt"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
HUB = "https://huggingface.co/{name}/resolve/main/{file}"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
NEOX = "EleutherAI/gpt-neox-20b"  # has the tokenizer of the official Mambas, which come without

KINDS = {  # ssm_cfg.layer or model_type in config.json -> the library that writes it, and our layer
    "Mamba2": ("mamba_ssm", "mamba2"),
    "Mamba1": ("mamba_ssm", "mamba1"),
    "mamba2": ("transformers", "mamba2"),
    "mamba": ("transformers", "mamba1"),
    "gla": ("fla", "gla"),  # flash-linear-attention
}
SSM_CFG = ("d_state", "d_conv", "expand", "headdim", "ngroups", "dt_rank")
SETTINGS = {  # field of ModelConfig -> the library's name of it; ssm_cfg.x is x inside ssm_cfg
    "mamba_ssm": {
        x: x for x in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "tie_embeddings")
    } | {x: f"ssm_cfg.{x}" for x in SSM_CFG},
    "transformers": dict(
        d_model="hidden_size", n_layer="num_hidden_layers", vocab_size="vocab_size",
        tie_embeddings="tie_word_embeddings", norm_eps="layer_norm_epsilon", d_state="state_size",
        d_conv="conv_kernel", expand="expand", headdim="head_dim", ngroups="n_groups",
        dt_rank="time_step_rank",
    ),
    "fla": dict(
        d_model="hidden_size", n_layer="num_hidden_layers", vocab_size="vocab_size", norm_eps="norm_eps",
        tie_embeddings="tie_word_embeddings", num_heads="num_heads", expand_k="expand_k", expand_v="expand_v",
        hidden_ratio="hidden_ratio",
    ),
}  # fmt: skip
FOREIGN_DEFAULTS = {  # where they are not ours
    "Mamba2": dict(pad_vocab_size_multiple=8),
    "mamba2": dict(pad_vocab_size_multiple=1, tie_embeddings=False),
    "mamba": dict(pad_vocab_size_multiple=1),
}
COMPUTED = {  # settings, with the values that the formulas of this file stand for
    "rms_norm": [True], "d_intermediate": [0], "attn_layer_idx": [[]], "ssm_cfg.bias": [False],
    "ssm_cfg.conv_bias": [True], "ssm_cfg.rmsnorm": [True], "ssm_cfg.norm_before_gate": [False],
    "ssm_cfg.D_has_hdim": [False], "ssm_cfg.d_ssm": [None], "ssm_cfg.dt_limit": [[0.0, math.inf]],
    "hidden_act": ["silu", "swish"], "use_bias": [False], "use_conv_bias": [True],
    "time_step_limit": [[0.0, math.inf], [0.0, {"__float__": "Infinity"}]],
    "attn": [None], "num_kv_heads": [None], "feature_map": [None], "use_short_conv": [False],
    "clamp_min": [None], "use_output_gate": [True], "elementwise_affine": [True], "use_gk": [True],
    "use_gv": [False], "attnres_block_size": [None],
}  # fmt: skip
HARMLESS = (  # settings that change no logits, or that show in the shapes of the weights
    r"residual_in_fp32|fused_add_norm|attn_cfg|ssm_cfg\.(chunk_size|use_mem_eff_path|dt_m..|dt_init.*|dt_scale"
    r"|A_init_range|conv_init)|model_type|architectures|.*token_id|(torch_)?dtype|transformers_version|_.*"
    r"|use_cache|.*initializer_range|time_step_(min|max|floor|scale|init_scheme|rank)|rescale_prenorm_residual"
    r"|num_heads|chunk_size|use_mambapy|use_associative_scan|norm_before_gate|pad_vocab_size_multiple"
    r"|intermediate_size|max_position_embeddings|attn_mode|conv_size|share_conv_kernel|fuse_.*|use_l2warp"
    r"|d_model|d_inner|n_layer"  # mamba_ssm's, which state-spaces/mamba-*-hf carry as well
)


def foreign_settings(c, kind, dtype):
    """What another library's config.json says of ModelConfig c: a dictionary."""
    format, layer = KINDS[kind]
    unused = {"mamba2": ("dt_rank",), "mamba1": ("headdim", "ngroups")}.get(layer, ())
    settings = {theirs: getattr(c, x) for x, theirs in SETTINGS[format].items() if x not in unused}
    if format == "mamba_ssm":
        inside = {x: settings.pop(f"ssm_cfg.{x}") for x in SSM_CFG if x not in unused}
        return settings | dict(rms_norm=True, residual_in_fp32=True, ssm_cfg=dict(layer=kind, **inside))
    if kind == "mamba2":
        settings["num_heads"] = c.expand * c.d_model // c.headdim
    if format == "transformers":  # <|endoftext|>; by its own default generation would end at a "!"
        settings |= dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return settings | dict(model_type=kind, torch_dtype=str(dtype).removeprefix("torch."))


def foreign_config(settings, file):
    """Another library's config.json as arguments of ModelConfig; ValueError for what is not understood."""
    ssm = settings.get("ssm_cfg", {})
    if not isinstance(ssm, dict):
        raise ValueError(f"{file}: ssm_cfg is {ssm!r}, expected a JSON object")
    flat = {k: v for k, v in settings.items() if k != "ssm_cfg"} | {f"ssm_cfg.{k}": v for k, v in ssm.items()}
    kind = str(flat.get("model_type") or flat.pop("ssm_cfg.layer", "Mamba1"))
    if kind not in KINDS or SETTINGS[KINDS[kind][0]]["d_model"] not in flat:
        raise ValueError(f"{file}: unknown kind of model {kind!r}, expected one of {', '.join(KINDS)}")
    format, layer = KINDS[kind]
    ours = {theirs: x for x, theirs in SETTINGS[format].items()}
    config = dict(layer=layer) | FOREIGN_DEFAULTS.get(kind, {})
    for name, value in flat.items():
        if name in ours:
            config[ours[name]] = None if value == "auto" else value  # the rank of Mamba-1's dt
        elif name in COMPUTED and value not in COMPUTED[name]:
            raise ValueError(f"{file}: {name} is {value!r}, but only {COMPUTED[name][0]!r} is known here")
        elif name not in COMPUTED and not re.fullmatch(HARMLESS, name):
            raise ValueError(f"{file}: unknown setting {name} {value!r}, remove it if it changes no logits")
    return config


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(file):
    """{name: tensor}, memory-mapped; ValueError where header and file disagree.

    The format: 8 bytes with the size n of the header; n bytes of JSON, {name: {dtype, shape, data_offsets:
    [start, stop]}}; the tensors, without gaps.
    """
    if not os.path.isfile(file):
        raise ValueError(f"{file} is missing, which the index of weights lists")
    size = os.path.getsize(file)
    with open(file, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if n > min(size - 8, 100_000_000):
            raise ValueError(f"{file} has {size} bytes and claims a header of {n}, fetch it again")
        header = parse_json(f.read(n), file)
    header.pop("__metadata__", None)
    weights, ranges = {}, []
    for name, entry in header.items():
        try:
            (start, stop), shape, dtype = entry["data_offsets"], entry["shape"], SAFETENSORS[entry["dtype"]]
            if not 0 <= start < stop <= size - 8 - n or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError
            # one map per tensor: it goes when the tensor goes. Mode c: what is written stays in memory
            data = np.memmap(file, np.uint8, "c", offset=8 + n + start, shape=stop - start)
            weights[name] = torch.from_numpy(data).view(dtype).view(shape)
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise ValueError(f"{file}: the header's entry for {name} is wrong: {str(entry)[:100]}") from None
        ranges.append((start, stop))
    starts, stops = zip(*sorted(ranges), strict=True) if ranges else ((), ())
    if (*starts, size - 8 - n) != (0, *stops):
        raise ValueError(f"{file}: the header's weights overlap or do not fill the file, fetch it again")
    return weights


def write_safetensors(weights, file):
    """weights: {name: contiguous tensor on the CPU}."""
    names, header, end = {v: k for k, v in SAFETENSORS.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name, x in weights.items():
        header[name] = dict(dtype=names[x.dtype], shape=list(x.shape), data_offsets=[end, end + x.nbytes])
        end += x.nbytes
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(file, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for x in weights.values():
            f.write(x.view(torch.uint8).numpy())


def parse_json(data, file):
    """A dictionary from JSON, or a ValueError that names the file."""
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{file} is no JSON object or cut off, fetch it again") from None


def unpickle(file):
    """The dictionary in a file of torch.save; executes nothing."""
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a foreign or cut-off file makes of the unpickler
        kind = "checkpoint of train.py or mamba_ssm"
        raise ValueError(f"{file!r} is not a {kind}, cut off or unsafe ({type(error).__name__})") from None


def read_weights(file):
    """{name: tensor} of a .safetensors, an index.json of several, or a .bin."""
    if file.endswith(".safetensors"):
        return read_safetensors(file)
    if file.endswith(".bin"):
        return unpickle(file)
    folder, weights = os.path.dirname(file), {}
    for shard in shards(file):
        weights |= read_safetensors(os.path.join(folder, shard))
    return weights


def shards(index):
    """The files, in the same folder, that an index.json lists."""
    where = parse_json(Path(index).read_bytes(), index).get("weight_map")
    if not isinstance(where, dict) or not all(
        re.fullmatch(r"[\w.-]+\.safetensors", str(x)) for x in where.values()
    ):
        raise ValueError(f"{index}: weight_map must say which .safetensors of this folder holds which weight")
    return sorted(set(where.values()))


def fetch(name, file):
    """The path of a file of the hub's model `name`, downloaded at its first use; None if there is none."""
    path = os.path.join(torch.hub.get_dir(), "lengthgen", name, file)
    if os.path.isfile(path):
        return path
    url, part = HUB.format(name=name, file=file), f"{path}.{os.getpid()}"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            size = int(response.headers["Content-Length"])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(url, part)
        if os.path.getsize(part) != size:  # torch takes a connection that breaks off for the end
            raise OSError(f"only {os.path.getsize(part)} of {size} bytes came, try again")
        os.replace(part, path)
    except (OSError, http.client.HTTPException, TypeError) as error:
        if getattr(error, "code", None) == 404:
            return None
        raise ValueError(f"no {file} of {name!r} here, and {url} failed: {error}") from None
    finally:
        Path(part).unlink(missing_ok=True)
    return path


def fetch_model(name):
    """The folder with config.json and weights of the hub's model `name`."""
    config = fetch(name, "config.json") if HUB_NAME.fullmatch(name) else None
    if config is None:
        raise ValueError(f"no checkpoint at {name!r}, train one first or give a folder or a name of the hub")
    folder = os.path.dirname(config)
    if not any(os.path.isfile(os.path.join(folder, file)) for file in WEIGHTS):
        next((file for file in WEIGHTS if fetch(name, file)), None)
    if os.path.isfile(index := os.path.join(folder, WEIGHTS[1])):
        for shard in shards(index):
            fetch(name, shard)
    return folder


def load_checkpoint(name_or_folder):
    """A checkpoint in a folder, a file or on the hub: a dictionary with "config", "model" and "settings".

    Ours as train.py saved it; those of mamba_ssm, transformers and flash-linear-attention with our names, in
    float32, and with the settings that train.py is to go on with. Raises ValueError, one sentence that names
    file and weight, for all that is missing, extra, misshapen, not finite, cut off or not understood.
    """
    name = os.fspath(name_or_folder)
    path = name if os.path.exists(name) else fetch_model(name)
    folder, given = (path, None) if os.path.isdir(path) else os.path.split(path)
    file = os.path.join(folder, given or CHECKPOINT)
    if os.path.isfile(file) and not file.endswith((".safetensors", ".json", ".bin")):
        checkpoint = unpickle(file)
        if not all(isinstance(checkpoint.get(x), dict) for x in ("config", "model", "settings")):
            raise ValueError(f"{file!r} is not a checkpoint of train.py")
        check_weights(checkpoint["config"], checkpoint["model"], file)
        return checkpoint

    config_file = os.path.join(folder, "config.json")
    files = [path] if given and given != "config.json" else [os.path.join(folder, x) for x in WEIGHTS]
    file = next(filter(os.path.isfile, files), None)
    if not (file and os.path.isfile(config_file)):
        raise ValueError(f"no checkpoint at {path!r}, expected {CHECKPOINT}, or config.json and {WEIGHTS[0]}")
    settings = parse_json(Path(config_file).read_bytes(), config_file)
    config, weights = foreign_config(settings, config_file), {}
    for theirs, x in read_weights(file).items():
        ours = str(theirs).replace("backbone.embeddings.", "backbone.embedding.")
        weights[ours.replace(".g_norm.", ".g_norm_swish_gate.")] = x  # fla's name where fuse_norm is off
    config = check_weights(config, weights, file)
    dtype = functools.reduce(torch.promote_types, {x.dtype for x in weights.values()})
    config.torch_dtype = str(dtype).removeprefix("torch.")
    if config.tie_embeddings:
        del weights["lm_head.weight"]
    # one by one, so that at no time there are two copies in memory
    weights = {x: weights.pop(x).to(torch.float32, copy=True) for x in list(weights)}
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights[embedding_name(config)]
    tokenizer = name if path != name else None
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        tokenizer = folder
    elif "model_type" not in settings and config.vocab_size == 50277:
        tokenizer = NEOX
    run = dict(task="text", T=2048, tokenizer=tokenizer, name=os.path.basename(os.path.abspath(folder)))
    return dict(config=asdict(config), model=weights, settings=run)


def check_weights(config, weights, file):
    """The ModelConfig of a dictionary, if a model of it has exactly these weights, else a ValueError."""
    try:
        config = ModelConfig(**config)
        with torch.device("meta"):
            expected = LanguageModel(config).state_dict()
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{file}: its settings make no model: {str(error).splitlines()[0]}") from None
    embedding = embedding_name(config)
    if config.tie_embeddings and embedding in weights:
        weights.setdefault("lm_head.weight", weights[embedding])
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise ValueError(f"{file} lacks the weight {name}, which its settings ask for")
        if name not in expected:
            raise ValueError(f"{file} has a weight {name}, which its settings do not ask for")
        x, shape = weights[name], tuple(expected[name].shape)
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.shape != shape:
            found = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{file}: {name} is {found}, expected {shape} of a float dtype")
        if not finite(x):
            raise ValueError(f"{file}: {name} has numbers that are not finite, fetch it again")
    if config.tie_embeddings and not weights["lm_head.weight"].equal(weights[embedding]):
        raise ValueError(f"{file}: lm_head.weight differs from the embedding that its settings tie it to")
    return config


def finite(x):
    """Whether all of x is; without copies as large as x, which x.isfinite() makes."""
    return all(math.isfinite(extreme) for extreme in x.aminmax())


def embedding_name(config):
    _, trunk, embedding, _ = LAYERS[config.layer]
    return f"{trunk}.{embedding}.weight"


# --------------------------------------------------------------------------------------------------
# Interventions: from which state does the next training sequence start?
#
# Each is a function (state, stats, rng) -> state: the final state of the previous batch (detached), running
# statistics of final states, a torch.Generator on the state's device. For a new idea write one function and
# add one entry.


class StateStatistics:
    """Running mean and std of the final states seen in training (fitted noise, paper section 3.2).

    The scan's S per layer and head, the convolution's inputs per layer and channel; `mean` and `std` are
    states of shapes that broadcast: scan (1, H, 1, 1), conv (1, 1, channels). The paper leaves its estimator
    open: ours is an exponential average over about 1/rate batches.
    """

    def __init__(self, rate=0.05):
        self.rate, self.count, self.mean, self.square = rate, 0, None, None

    def update(self, state):
        def moment(p):
            def of(x):
                dims = (0, 1) if x.dim() == 3 else (0, 2, 3)
                return (x.float() ** p).mean(dims, keepdim=True)

            return all_reduce_mean(map_state(of, state))

        mean, square = moment(1), moment(2)
        if self.count:  # the first batches count alike, so that the zeros before them never enter
            w = max(self.rate, 1 / (self.count + 1))
            mean = map_state(lambda old, new: old + w * (new - old), self.mean, mean)
            square = map_state(lambda old, new: old + w * (new - old), self.square, square)
        self.mean, self.square, self.count = mean, square, self.count + 1

    def state_dict(self):
        means = [tuple(x) for x in self.mean], [tuple(x) for x in self.square]
        return dict(count=self.count, mean=means[0], square=means[1])

    def load_state_dict(self, saved, device):
        self.count = saved["count"]
        for name in ("mean", "square"):
            setattr(self, name, map_state(lambda x: x.to(device), [LayerState(*x) for x in saved[name]]))

    @property
    def std(self):
        return map_state(lambda m, sq: (sq - m * m).clamp(min=0).sqrt(), self.mean, self.square)


def all_reduce_mean(state):
    """Average over the ranks of a distributed run; alone, nothing."""
    if not torch.distributed.is_initialized():
        return state
    for layer in state:
        for x in layer:
            if x is not None:
                torch.distributed.all_reduce(x)
    return map_state(lambda x: x / torch.distributed.get_world_size(), state)


def normal_like(x, rng):
    return torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)


def zero(state, stats, rng):
    """Ordinary training; with extra steps also the control of every experiment."""
    return map_state(torch.zeros_like, state)


def random_noise(state, stats, rng, std=1.0):
    """IID N(0, std^2), the same std in every layer and head."""
    return map_state(lambda x: std * normal_like(x, rng), state)


def fitted_noise(state, stats, rng):
    """IID normal with the mean and std that final states have, per layer and head."""
    return map_state(lambda x, m, s: (m + s * normal_like(x, rng)).to(x.dtype), state, stats.mean, stats.std)


def state_passing(state, stats, rng):
    """The final state of the previous batch, of other sequences: states compound over the whole run."""
    return state


# TBTT is state passing with rows that continue: the difference is in the second field of its entry
INTERVENTIONS = {  # name: (function, does row b of the next batch continue row b?)
    "zero": (zero, False),
    "random_noise": (random_noise, False),
    "fitted_noise": (fitted_noise, False),
    "state_passing": (state_passing, False),
    "tbtt": (state_passing, True),
}


def next_initial_state(function, state, stats, rng, zero_prob=0.0, carry="full"):
    """Apply an intervention to the final state of a batch; no gradient crosses from one batch to the next.

    zero_prob: each row starts from zeros with this probability instead: a zero start is never unlearned.
    carry: "full" hands over convolution and scan, "scan" the scan alone, all that the paper's kernel takes.
    """
    if carry not in ("full", "scan"):
        raise ValueError(f"unknown carry {carry!r}, expected full or scan")
    if not 0 <= zero_prob <= 1:
        raise ValueError(f"zero_prob is {zero_prob}, expected 0 to 1")
    state = map_state(torch.Tensor.detach, state)
    stats.update(state)
    state = function(state, stats, rng)
    if carry == "scan":
        state = [s._replace(conv=None if s.conv is None else torch.zeros_like(s.conv)) for s in state]
    if zero_prob:
        scan_state = state[0].scan
        zeroed = torch.rand(len(scan_state), generator=rng, device=scan_state.device) < zero_prob
        state = map_state(lambda x: x.masked_fill(zeroed.view(-1, *[1] * (x.dim() - 1)), 0), state)
    return state


# --------------------------------------------------------------------------------------------------
# Corpus: documents -> tokens. Every document starts with the token <|bos|>, in training as in a long stream.

BYTES = tiktoken.Encoding(  # one token per byte of UTF-8; the pieces only bound the work per piece
    "bytes", pat_str=r"(?s:.{1,16})", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
)
BYTES.special = ()  # ids of an encoding's own that can stand for bos and sep


class HuggingFaceEncoding(tiktoken.Encoding):
    """A tokenizer.json of byte-level BPE (GPT-2, GPT-NeoX, ...), with the ids of Hugging Face's tokenizers.

    Raises ValueError for a file of another kind.
    """

    def __init__(self, file):
        t = parse_json(Path(file).read_bytes(), file)
        try:
            model, vocab, added = t["model"], t["model"]["vocab"], t["added_tokens"]
            self.nfc = t["normalizer"] == {"type": "NFC"}
            pre = t["pre_tokenizer"]
            if (
                (model["type"], pre["type"]) != ("BPE", "ByteLevel")
                or pre["add_prefix_space"]
                or not pre.get("use_regex", True)
                or not (self.nfc or t["normalizer"] is None)
                or any(model.get(x) for x in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
                or any(x["lstrip"] or x["rstrip"] or x["single_word"] for x in added)
            ):
                raise ValueError
            # the 256 bytes as printable characters: the printable ones as they are, the others from 256 on
            printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
            byte_of = {chr(b): b for b in printable}
            byte_of |= {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(printable)))}
            apart = {x["id"] for x in added}
            ranks = {bytes(byte_of[c] for c in word): i for word, i in vocab.items() if i not in apart}
            # tiktoken merges in the order of ids
            merged = [vocab["".join(m.split(" ") if isinstance(m, str) else m)] for m in model["merges"]]
            if merged != sorted(set(merged)) or set(merged) != {i for x, i in ranks.items() if len(x) > 1}:
                raise ValueError
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(
                f"{file} is not a byte-level BPE like GPT-NeoX's, which is all that is implemented here"
            ) from None
        super().__init__(
            file,
            pat_str=GPT2_WORDS,
            mergeable_ranks=ranks,
            special_tokens={x["content"]: x["id"] for x in added},
        )
        self.special = tuple(x["id"] for x in added if x["special"])

        def splitter(contents):  # longest first: tiktoken itself would cut a run of 24 spaces into 13 + 8 + 3
            contents = map(re.escape, sorted(contents, key=len, reverse=True))
            return re.compile(f"({'|'.join(contents) or '(?!)'})")

        self.split_all = splitter(x["content"] for x in added)
        self.split_added = splitter(x["content"] for x in added if not x["special"])

    def encode(self, text, allowed_special=(), **_):
        """The ids of a text; special tokens that it spells out are text, unless allowed_special is "all"."""
        ids = []
        pieces = (self.split_all if allowed_special == "all" else self.split_added).split(text)
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self._special_tokens[piece])
            else:  # normalized apart: a combining mark that follows a special token must not join it
                ids += self.encode_ordinary(unicodedata.normalize("NFC", piece) if self.nfc else piece)
        return ids

    def encode_to_numpy(self, text, **options):
        return np.array(self.encode(text, **options), dtype=np.uint32)


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# From here on a twentieth of the documents is held out, below it (where that may be none) a tenth of each
MANY_DOCUMENTS = 200


@dataclass
class Corpus:
    """Tokens of a training and a validation split."""

    name: str  # what it is, for people
    train: np.ndarray  # (N,) uint16 or uint32
    val: np.ndarray
    words: int  # size of the tokenizer's vocabulary
    special: tuple = ()  # its own tokens for bos and sep; those that it has not follow its words

    @property
    def bos(self):
        return (*self.special, self.words)[0]

    @property
    def sep(self):
        return (*self.special, self.words, self.words + 1)[1]

    @property
    def vocab_size(self):
        return max(self.words, self.bos + 1, self.sep + 1)


def load_corpus(paths=None, tokenizer="bytes", vocab_size=None):
    """Read text and tokenize it. Raises ValueError for a path that is missing, a corpus that is empty.

    paths: None for the Python standard library of this machine, else a list of files, folders or globs:
        text, .jsonl with a "text" field, or one nanoGPT-style .bin of uint16 tokens
    tokenizer: "bytes", the name of a tiktoken encoding ("gpt2", "o200k_base"), or a tokenizer.json, its
        folder or hub name; a .bin is tokenized already and takes only the vocabulary from it
    vocab_size: of the model that is to read a .bin of an unknown tokenizer ("bytes"); None: as in the .bin
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    paths = paths and [os.fspath(path) for path in paths]
    encoding = load_encoding(tokenizer)
    special = encoding.special
    if paths and any(p.endswith(".bin") for p in paths):
        words = encoding.n_vocab if tokenizer != "bytes" else vocab_size and vocab_size - 2
        return _load_bin(paths, words, special)
    documents = {text: key for key, text in sorted(_read_documents(paths)) if text}  # equal files once
    if not documents:
        raise ValueError(f"the corpus is empty: no text in {paths or 'the standard library'}")
    splits = {"train": [], "val": []}
    for text, key in documents.items():
        # a text that spells a special token, as pages about language models do, is text
        tokens = encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint32)
        if len(documents) >= MANY_DOCUMENTS:
            splits["val" if zlib.crc32(key.encode()) % 20 == 0 else "train"].append(tokens)
        else:
            cut = len(tokens) - len(tokens) // 10
            splits["train"].append(tokens[:cut])
            splits["val"].append(tokens[cut:])
    dtype = np.uint16 if encoding.n_vocab + 2 <= 2**16 else np.uint32
    bos = np.array([(*special, encoding.n_vocab)[0]])
    joined = {
        split: np.concatenate([part for tokens in pieces for part in (bos, tokens)] or [bos]).astype(dtype)
        for split, pieces in splits.items()
    }
    name = f"{len(documents)} documents of {'the Python standard library' if not paths else ' '.join(paths)}"
    return Corpus(name, joined["train"], joined["val"], encoding.n_vocab, special)


def load_encoding(name):
    """The tiktoken.Encoding that load_corpus calls `tokenizer`; ValueError if there is none."""
    if name == "bytes":
        return BYTES
    file = os.path.join(name, "tokenizer.json") if os.path.isdir(name) else name
    if not os.path.exists(file) and HUB_NAME.fullmatch(name):
        file = fetch(name, "tokenizer.json") or name
    if os.path.isfile(file):
        return HuggingFaceEncoding(file)
    try:
        encoding = tiktoken.get_encoding(name)
    except ValueError:
        raise ValueError(
            f"unknown tokenizer {name!r}, expected bytes or one of {tiktoken.list_encoding_names()} "
            "or a tokenizer.json"
        ) from None
    except OSError as error:
        raise ValueError(f"the tokenizer {name!r} cannot be fetched: {type(error).__name__}") from None
    encoding.special = ()
    return encoding


def _read_documents(paths):
    """Yield (key, text); the key is relative, so that a file is held out on every machine or on none."""
    library = glob.escape(sysconfig.get_paths()["stdlib"])
    for path in paths or [os.path.join(library, "**", "*.py")]:
        if os.path.isfile(path):
            files, root = [path], os.path.dirname(path)
        elif os.path.isdir(path):
            files, root = glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True), path
        else:
            files, root = glob.glob(path, recursive=True), os.path.dirname(re.split(r"[*?[]", path)[0])
        files = [f for f in files if os.path.isfile(f)]
        if not files:
            raise ValueError(f"no text at {path!r}, give an existing file, folder or glob")
        for file in files:
            key = os.path.relpath(file, root or ".").replace(os.sep, "/")
            if not paths and ("site-packages" in key or "dist-packages" in key):
                continue
            with open(file, encoding="utf-8", errors="replace") as f:
                if file.endswith(".jsonl"):
                    for i, line in enumerate(f):
                        yield f"{key}:{i:09d}", _text_field(line, f"{file} line {i + 1}")
                else:
                    yield key, f.read()


def _text_field(line, where):
    """The "text" of a line of .jsonl; halves of a surrogate pair, which JSON can spell, become "?"."""
    try:
        return json.loads(line)["text"].encode(errors="replace").decode()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{where} is no JSON object with a "text"') from None


def _load_bin(paths, words, special):
    if len(paths) > 1:
        raise ValueError(f"a .bin of tokens stands alone, got {len(paths)} paths")
    if not os.path.isfile(paths[0]):
        raise ValueError(f"no tokens at {paths[0]!r}, give an existing .bin of uint16")
    size = os.path.getsize(paths[0])
    if size == 0:
        raise ValueError(f"the corpus is empty: no tokens in {paths[0]}")
    if size % 2:
        raise ValueError(f"{paths[0]} has {size} bytes, an odd number, so it is no .bin of uint16")
    tokens = np.memmap(paths[0], dtype=np.uint16, mode="r")
    highest = int(tokens.max())
    words = words or highest + 1
    if highest >= words:
        raise ValueError(
            f"{paths[0]} has a token {highest}, which is outside the vocabulary of {words} words"
        )
    cut = len(tokens) - len(tokens) // 10
    return Corpus(paths[0], tokens[:cut], tokens[cut:], words, special)


class Rows:
    """B rows that read pieces of text, at random places or each row onwards from where it was.

    tokens (N,), from one split; continues: row b of the next piece continues row b of this one (for TBTT and
    for streams). `rng` (torch.Generator) and `at` are all there is to save.
    """

    def __init__(self, corpus, split, B, continues, seed):
        self.tokens, self.corpus, self.B, self.continues = getattr(corpus, split), corpus, B, continues
        self.rng = torch.Generator().manual_seed(seed)
        self.boundaries = np.flatnonzero(self.tokens == corpus.bos)
        self.at = None

    def state_dict(self):
        return dict(rng=self.rng.get_state(), at=None if self.at is None else torch.from_numpy(self.at))

    def load_state_dict(self, saved):
        self.rng.set_state(saved["rng"])
        self.at = None if saved["at"] is None else saved["at"].numpy()

    def take(self, n, overlap=0, inside_document=False):
        """(B, n) int64 tokens. A continuing row advances by n - overlap and wraps around at the end.

        inside_document: skip what is left of a document shorter than n, so that no piece crosses a boundary.
        """
        last = len(self.tokens) - n
        if last < 0:
            raise ValueError(f"the text has {len(self.tokens)} tokens, shorter than the {n} that are needed")
        if self.at is None or not self.continues:
            self.at = torch.randint(last + 1, (self.B,), generator=self.rng).numpy()
        at = np.where(self.at > last, 0, self.at)
        if inside_document:
            at = self._skip_boundaries(at, n, last)
        self.at = at + n - overlap
        return self.tokens[at[:, None] + np.arange(n)].astype(np.int64)

    def _skip_boundaries(self, at, n, last):
        """Move each place forward until n tokens without a boundary follow, past the end to the start."""
        for _ in range(len(self.boundaries) + 2):
            i = np.searchsorted(self.boundaries, at)
            boundary = np.append(self.boundaries, len(self.tokens))[i]
            crosses = boundary < at + n
            if not crosses.any():
                return at
            at = np.where(crosses, boundary + 1, at)
            at = np.where(at > last, 0, at)
        raise ValueError(f"no document of the text has the {n} tokens that are needed")


# --------------------------------------------------------------------------------------------------
# Tasks: (rows, T) -> tokens (B, T+1), part (B, T). Inputs are tokens[:, :-1], targets tokens[:, 1:]; `part`
# is the loss mask: 0 is not trained on and not counted, 1, 2, ... name the part of the task that the target
# belongs to. The last token of a window is the first of the next, so windows of continuing rows join into one
# long stream.


def text(rows, T):
    """Plain text, windows of T.

    import os<|bos|>"""
    tokens = rows.take(T + 1, overlap=1)
    return tokens, np.ones((rows.B, T), dtype=np.int8)


def echo(rows, T):
    """A passage of real text, then the same passage again. T = 2n + 2 for a passage of n tokens, here n = 3.

    input    <bos> d  e  f <sep> d  e  f
    target     d   e  f <sep> d  e  f <bos>
    part       1   1  1   0   2  2  2   0       1 text, 2 echo

    Inside T nothing need ever be forgotten, so a model trained from zero states never learns to.
    """
    n = T // 2 - 1
    if T % 2 or n < 1:
        raise ValueError(f"echo needs an even T of at least 4, got {T}")
    passage = rows.take(n, inside_document=True)
    bos, sep = (np.full((rows.B, 1), x) for x in (rows.corpus.bos, rows.corpus.sep))
    tokens = np.concatenate([bos, passage, sep, passage, bos], axis=1)
    part = np.repeat(np.array([1, 0, 2, 0], dtype=np.int8), [n, 1, n, 1])
    return tokens, np.tile(part, (rows.B, 1))


EPISODES = 4


def echo_windows(rows, T):
    """Windows of four episodes of echo, T/4 tokens each, cut at random offsets: the sceptic's control.

    ... e  f <bos> g  h  i <sep> g  h  i <bos> j  k  l <sep> j  k  l <bos> m  n ...

    Models trained on it see one episode follow another. Continuing rows (streams) are cut at whole episodes.
    """
    if T % (2 * EPISODES) or T < 4 * EPISODES:  # every episode an even number of tokens, at least 4
        raise ValueError(
            f"echo_windows needs a T of at least {4 * EPISODES} that {2 * EPISODES} divides, got {T}"
        )
    short = T // EPISODES
    if rows.continues:
        return stream(echo, rows, short, EPISODES)
    tokens, part = stream(echo, rows, short, EPISODES + 1)
    at = torch.randint(short, (rows.B, 1), generator=rows.rng).numpy() + np.arange(T + 1)
    return np.take_along_axis(tokens, at, 1), np.take_along_axis(part, at[:, :-1], 1)


def copy(rows, T, shortest=5, longest=20):
    """The paper's synthetic copying (Jelassi et al. 2024): letters to repeat, 5 to 20 of them, packed into T.

    input    $  x  k  c  q  h  |  x  k  c  q  h  .  $  ...
    target   x  k  c  q  h  |  x  k  c  q  h  .  $  ...
    part     0  0  0  0  0  0  1  1  1  1  1  1  0  ...    1 the copy and the stop

    Every window starts a new string, its last one is cut off: rows that continue carry only their state.
    T = 2n + 3 and shortest = longest = n make one string of n letters.
    """
    if T < 2 * longest + 3:  # else a window could hold nothing to copy, and a loss over nothing is no number
        raise ValueError(
            f"copy needs a T of at least {2 * longest + 3}, the longest string and its copy, got {T}"
        )
    tokens = np.full((rows.B, T + 1), ord("$"), dtype=np.int64)
    part = np.zeros((rows.B, T), dtype=np.int8)
    for b in range(rows.B):
        t = 0
        while t < T:
            n = int(torch.randint(shortest, longest + 1, (), generator=rows.rng))
            string = torch.randint(ord("a"), ord("z") + 1, (n,), generator=rows.rng).numpy()
            one = np.concatenate([[ord("$")], string, [ord("|")], string, [ord(".")]])
            tokens[b, t : min(t + len(one), T)] = one[: T - t]
            part[b, t + n + 1 : t + 2 * n + 2] = 1
            t += len(one)
    part[:, -1] = 0  # its target opens the next window
    return tokens, part


FILLER = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def passkey(rows, T, depth=None):
    """Five digits hidden in filler and asked for at the end, in Landmark Attention's words (2023), in bytes.

    <bos>The grass is gr|The pass key is 30719. Remember it. 30719 is the pass key. |The grass is green. The s
    part 0, and 1 on                                        11111
    |What is the pass key? The pass key is 30719<bos>              | marks joints, the filler fills the window
                                           11111

    depth: the share of the filler that comes before the key, None for a place drawn in each row. The task's
    opening line is left out: it is longer than our T.
    """
    check_bytes(rows.corpus)
    tokens = np.full((rows.B, T + 1), rows.corpus.bos, dtype=np.int64)
    part = np.zeros((rows.B, T), dtype=np.int8)
    for b in range(rows.B):
        key = b"%05d" % int(torch.randint(10**5, (), generator=rows.rng))
        needle = b"The pass key is %b. Remember it. %b is the pass key. " % (key, key)
        question = b"What is the pass key? The pass key is " + key
        n = T - 1 - len(needle) - len(question)
        if n < 0:
            raise ValueError(f"passkey needs a T of at least {T - n}, got {T}")
        filler = FILLER * (n // len(FILLER) + 1)
        before = int(torch.randint(n + 1, (), generator=rows.rng)) if depth is None else round(depth * n)
        one = filler[:before] + needle + filler[: n - before] + question
        tokens[b, 1:T] = np.frombuffer(one, dtype=np.uint8)
        for start in (before + 36, T - 6):  # the target of input t is byte t of `one`
            part[b, start : start + 5] = 1
    return tokens, part


def check_bytes(corpus):
    if corpus.words != 256:
        raise ValueError(
            f"this task is written in bytes, the corpus has {corpus.words} words: use --tokenizer bytes"
        )


ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
ACTORS = {5: ("Bill", "Fred", "Jeff", "Mary")}  # of question 5; the other questions have
OTHER_ACTORS = ("Daniel", "John", "Mary", "Sandra")
WORDS = {  # the verbs of bAbI v1.2
    "move": ("moved", "went", "went back", "journeyed", "travelled"),
    "take": ("got", "took", "grabbed", "picked up"),
    "drop": ("dropped", "put down", "discarded", "left"),
    "give": ("gave", "handed", "passed"),
}
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
EVENTS = {1: 3, 2: 5, 3: 7, 5: 5}  # in a story


def babi(qa, rng):
    """One story of bAbI task qa (1 to 5): facts (list of sentences), question, answer. Our own generator."""
    if qa not in range(1, 6):
        raise ValueError(f"qa is {qa}, expected 1 to 5")

    def pick(xs):
        return list(xs)[int(torch.randint(len(xs), (), generator=rng))]

    if qa == 4:
        d, middle = pick(OPPOSITE), pick(ROOMS)
        a, c = pick([x for x in ROOMS if x != middle]), middle
        while c in (a, middle):
            c = pick(ROOMS)
        facts = [f"The {a} is {d} of the {middle}.", f"The {c} is {OPPOSITE[d]} of the {middle}."]
        return facts, *pick([(f"What is {d} of the {middle}?", a), (f"What is the {middle} {d} of?", c)])
    place, holder, trail, gift, facts = {}, {}, {}, None, []  # trail: the rooms an object was in
    for _ in range(EVENTS[qa]):
        X = pick(ACTORS.get(qa, OTHER_ACTORS))
        mine = [o for o in OBJECTS if holder.get(o) == X]
        free = [o for o in OBJECTS if not holder.get(o) and trail.get(o, [place.get(X)])[-1] == place.get(X)]
        near = [y for y in place if y != X and place[y] == place.get(X)]
        can = ["move"]
        if qa > 1 and X in place:
            can += (
                ["take"] * 2 * bool(free)
                + ["drop"] * bool(mine)
                + ["give"] * 3 * bool(qa == 5 and mine and near)
            )
        event = pick(can)
        verb = pick(WORDS[event])
        if event == "move":
            place[X] = pick([room for room in ROOMS if room != place.get(X)])
            facts.append(f"{X} {verb} to the {place[X]}.")
            for o in mine:
                trail[o].append(place[X])
        elif event == "give":
            gift = X, pick(mine), pick(near)
            holder[gift[1]] = gift[2]
            facts.append(f"{X} {verb} the {gift[1]} to {gift[2]}.")
        else:
            o = pick(free if event == "take" else mine)
            holder[o] = X if event == "take" else None
            trail.setdefault(o, [place[X]])
            facts.append(f"{X} {verb} the {o}{pick(['', ' there'])}.")
    answers = []
    if qa == 1:
        answers = [(f"Where is {x}?", room) for x, room in place.items()]
    elif qa == 2:
        answers = [(f"Where is the {o}?", rooms[-1]) for o, rooms in trail.items()]
    elif qa == 3:
        answers = [(f"Where was the {o} before the {r[-1]}?", r[-2]) for o, r in trail.items() if len(r) > 1]
    elif gift:
        X, o, Y = gift
        answers = [
            (f"What did {X} give to {Y}?", o), (f"Who gave the {o} to {Y}?", X), (f"Who gave the {o}?", X),
            (f"Who did {X} give the {o} to?", Y), (f"Who received the {o}?", Y),
        ]  # fmt: skip
    return (facts, *pick(answers)) if answers else babi(qa, rng)  # a story that allows no question: again


def babilong(rows, T, qa=None):
    """bAbI facts in order, at drawn places between lines of background text (BABILong, 2024), in bytes.

    <bos>import os/Mary went to the office. class A:/John moved to the garden. x/Where is Mary? office.<bos>
    part 0, and 1 on               (here / ends a line)                                         1111111

    qa: 1 to 5, None for one drawn in each row. The background fills the window.
    """
    check_bytes(rows.corpus)
    tokens = np.full((rows.B, T + 1), rows.corpus.bos, dtype=np.int64)
    part = np.zeros((rows.B, T), dtype=np.int8)
    background = rows.take(T)
    for b in range(rows.B):
        for _ in range(100):
            drawn = 1 + int(torch.randint(5, (), generator=rows.rng)) if qa is None else qa
            facts, question, answer = babi(drawn, rows.rng)
            n = T - 1 - sum(len(f) + 1 for f in facts) - len(f"{question} {answer}.")
            if n >= 0:
                break
        else:
            raise ValueError(f"T is {T}, too short for the stories of babilong: give it about 256")
        places = torch.randint(n + 1, (len(facts),), generator=rows.rng).sort().values.tolist()
        lines = np.flatnonzero(background[b, :n] == ord("\n")) + 1  # places move on to the end of their line
        places = [int(lines[lines >= p][0]) if (lines >= p).any() else n for p in places]
        pieces = np.split(background[b, :n], places)
        for i, sentence in enumerate([f"{f} " for f in facts] + [f"{question} {answer}."]):
            pieces.insert(2 * i + 1, np.frombuffer(sentence.encode(), dtype=np.uint8))
        tokens[b, 1:T] = np.concatenate(pieces)
        part[b, T - 2 - len(answer) : T - 1] = 1
    return tokens, part


def babilong_score(output, answer, question, qa):
    """BABILong's rule: up to the first '.', the answer is the only label that the question lacks."""
    labels = ROOMS if qa < 5 else ACTORS[5] + OBJECTS
    said = output.lower().split(".")[0]
    return {x for x in labels if x.lower() in said and x not in question} == {answer}


TASKS = {  # name: (function, default T, names of the parts)
    "echo": (echo, 50, ("text", "echo")),
    "echo_windows": (echo_windows, 200, ("text", "echo")),
    "text": (text, 256, ("text",)),
    "copy": (copy, 64, ("copy",)),
    "passkey": (passkey, 160, ("key",)),
    "babilong": (babilong, 256, ("answer",)),
}


def stream(task, rows, T, windows):
    """Join consecutive windows of a task: tokens (B, windows*T + 1), part (B, windows*T)."""
    pairs = [task(rows, T) for _ in range(windows)]
    tokens = np.concatenate([tokens[:, :-1] for tokens, _ in pairs] + [pairs[-1][0][:, -1:]], axis=1)
    return tokens, np.concatenate([part for _, part in pairs], axis=1)


# --------------------------------------------------------------------------------------------------
# Measures


def masked_loss(logits, targets, part):
    """Mean float32 cross-entropy, nats, where part is not 0. logits (B, T, C), targets and part (B, T)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.masked_fill(part == 0, -100).flatten())


@torch.no_grad()
def streaming_loss(model, tokens, bins, segment=1024, state=None, progress=None):
    """Sum of losses (nats, float64) and number of targets per bin, streaming: memory is that of a segment.

    tokens (B, N+1) integers, NumPy or memory-mapped: inputs are all but the last column, targets all but
        the first, each counted once; document boundaries are tokens like any other, here as in training
    bins (N,) or (B, N) integers: the bin that each target is counted in, -1 for none
    progress: a function of the share that is done, called after each segment

    The result does not depend on `segment`. Cross-entropy in float32 (float64 if the model is).
    """
    if segment < 1:
        raise ValueError(f"segment must be positive, got {segment}")
    n_bins = int(bins.max()) + 1
    total = torch.zeros(n_bins, dtype=torch.float64)
    count = torch.zeros(n_bins, dtype=torch.int64)
    device = model.lm_head.weight.device
    B, N = tokens.shape[0], tokens.shape[1] - 1
    for start in range(0, N, segment):
        stop = min(start + segment, N)
        piece = torch.from_numpy(np.asarray(tokens[:, start : stop + 1], dtype=np.int64)).to(device)
        logits, state = model(piece[:, :-1], state)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten(), reduction="none")
        b = np.broadcast_to(bins[..., start:stop], (B, stop - start)).reshape(-1).astype(np.int64)
        b = torch.from_numpy(b)
        total.index_add_(0, b.clamp(min=0), loss.double().cpu() * (b >= 0))
        count.index_add_(0, b.clamp(min=0), (b >= 0).long())
        if progress:
            progress(stop / N)
    return total, count


def position_edges(T, windows, inside):
    """Edges of position ranges in tokens: T times 0, 1, 2, 3, 4, 6, 8, 12, ...; finer below T if `inside`."""
    first = [0] + ([T // 8, T // 4, T // 2] if inside else [])
    beyond = sorted({T * m * 2**j for j in range(12) for m in (1, 3)} | {T * 2})
    return sorted(set(first)) + [e for e in beyond if e < T * windows] + [T * windows]


# what is at hand at one time; more overflows the caches of a CPU, to a quarter of the speed
STREAM_ROWS, STREAM_TOKENS = 64, 64 * 200


def position_wise(model, task_name, corpus, T, windows=64, rows=None, seed=0, progress=None):
    """Loss by position on streams of validation text from a zero state (the paper's position-wise figure).

    Returns {"T", "edges": tokens, "parts": {part: {"loss": nats, "count": targets}}}, per range of edges.
    progress: a function of the share that is done.
    """
    task, _, parts = TASKS[task_name]
    rows = rows or max(1, min(256, 2**22 // (T * windows)))  # 4M tokens are enough
    edges = position_edges(T, windows, inside=len(parts) == 1)
    where = np.searchsorted(edges, np.arange(T * windows), side="right") - 1
    total, count = 0, 0
    for start in range(0, rows, STREAM_ROWS):
        some = Rows(corpus, "val", min(STREAM_ROWS, rows - start), True, seed + start)
        tokens, part = stream(task, some, T, windows)
        bins = np.where(part > 0, where * len(parts) + part - 1, -1)
        segment, n = max(1, STREAM_TOKENS // len(tokens)), len(tokens)
        share = progress and (lambda done, start=start, n=n: progress((start + n * done) / rows))
        bin_total, bin_count = streaming_loss(model, tokens, bins, segment, progress=share)
        total, count = total + bin_total, count + bin_count
    total, count = (x.view(-1, len(parts)).T for x in (total, count))
    losses = {
        name: {"loss": (total[i] / count[i]).tolist(), "count": count[i].tolist()}
        for i, name in enumerate(parts)
    }
    return {"T": T, "edges": edges, "parts": losses}


@torch.no_grad()
def paired_gap(model, tokens, T):
    """The same tokens behind the whole stream and behind at most their last T: what the past costs, nats.

    tokens (B, N+1) with N a multiple of T, a stream from a zero state. Targets are those in the second half
    of each block of T, so that the short context is T/2 to T long. Returns (N/T,), 0 for the first block.
    """
    B, N = tokens.shape[0], tokens.shape[1] - 1
    if N % T:
        raise ValueError(f"paired_gap needs N + 1 tokens with N a multiple of T {T}, got {N + 1}")
    block = np.where(np.arange(N) % T < T // 2, -1, np.arange(N) // T)
    whole, count = streaming_loss(model, tokens, block, segment=max(1, STREAM_TOKENS // B))
    short = torch.zeros_like(whole)
    for i in range(N // T):
        at = slice(i * T, (i + 1) * T)
        short[i] = streaming_loss(model, tokens[:, i * T : (i + 1) * T + 1], block[at], segment=T)[0][-1]
    return (whole - short) / count


@torch.no_grad()
def absorb(model, tokens, state=None):
    """Read tokens (B, T) in constant memory: logits (B, C) after the last one, and the state."""
    for piece in torch.as_tensor(tokens).split(max(1, STREAM_TOKENS // len(tokens)), dim=1):
        logits, state = model(piece.to(model.lm_head.weight.device), state)
    return logits[:, -1], state


@torch.no_grad()
def generate(model, tokens, n, temperature=0.0, top_k=None, rng=None):
    """Read tokens (B, T), then yield the next n, one (B,) at a time; temperature 0 takes the likeliest."""
    logits, state = absorb(model, tokens)
    for _ in range(n):
        if top_k:
            lowest = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -math.inf)
        token = logits.argmax(-1)
        if temperature > 0:
            token = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=rng)[:, 0]
        yield token
        logits, state = absorb(model, token[:, None], state)


def check_positions(name, at, end):
    """ValueError unless the positions ascend and none lies behind `end`."""
    if len(at) < 2 or any(a >= b for a, b in itertools.pairwise(at)) or at[-1] > end:
        raise ValueError(f"{name} must ascend from above 0 to at most {end}, got {list(at[1:])}")


def state_std(model, tokens, at):
    """Std of the state S after each of the ascending positions `at` of tokens (B, N), and over what.

    Returns full (n,) over everything, as in the paper's figure; layers (n, L); heads (n, L, H); float64.
    """
    check_positions("at", [0, *at], tokens.shape[1])
    moments, state = [], None
    for start, stop in zip([0, *at[:-1]], at, strict=True):
        _, state = absorb(model, tokens[:, start:stop], state)
        S = torch.stack([layer.scan.double() for layer in state])  # (L, B, H, K, V)
        moments.append(torch.stack([S.mean((1, 3, 4)), (S**2).mean((1, 3, 4))]))
    moments = torch.stack(moments, 1).cpu()  # (2, n, L, H)

    def std(dims):
        mean, square = moments.mean(dims) if dims else moments
        return (square - mean**2).clamp(min=0).sqrt()

    return std((2, 3)), std((3,)), std(())


@torch.no_grad()
def effective_remembrance(model, tokens, starts, end):
    """EffRem(t) = TV(q(.|x[0:T]), q(.|x[t:T])): how much the tokens before t still matter (paper section 5).

    tokens (B, N) from a zero state; starts: ascending t, 0 < t <= end. All suffixes x[t:] run as one batch
    that grows at each t. Returns (len(starts), B, N - end) in [0, 1], for the final tokens end, ..., N - 1.
    """
    check_positions("starts", [0, *starts], end)
    tokens, B = torch.as_tensor(tokens).to(model.lm_head.weight.device), len(tokens)
    zeros = state = model.zero_state(B)
    for i, (start, stop) in enumerate(zip([0, *starts], [*starts, end], strict=True)):
        state = state if i == 0 else map_state(lambda x, z: torch.cat([x, z]), state, zeros)
        if stop > start:
            _, state = model(tokens[:, start:stop].repeat(i + 1, 1), state)
    logits, _ = model(tokens[:, end:].repeat(len(starts) + 1, 1), state)
    q = logits.float().softmax(-1).unflatten(0, (-1, B))  # (1 + starts, B, N - end, C)
    return ((q[1:] - q[:1]).abs().sum(-1) / 2).cpu()


@torch.no_grad()
def accuracy(model, tokens, part):
    """Is the likeliest token the target? One teacher-forced pass from a zero state (the paper's copying).

    tokens (B, T+1), part (B, T) -> (B, T) float64: 1 right, 0 wrong, NaN where part is 0
    """
    device = model.lm_head.weight.device
    tokens, part = torch.as_tensor(tokens), torch.as_tensor(part)
    logits, _ = model(tokens[:, :-1].to(device))
    return (logits.argmax(-1).cpu() == tokens[:, 1:]).double().masked_fill(part == 0, math.nan)


def passkey_accuracy(model, corpus, T, depth, rows, seed=0):
    """Share of `rows` windows of T tokens whose five digits come first in the greedy continuation."""
    tokens, _ = passkey(Rows(corpus, "val", rows, False, seed), T, depth)
    answer = torch.stack(list(generate(model, tokens[:, : T - 5], 5)), dim=1)
    return float((answer.cpu().numpy() == tokens[:, T - 5 : T]).all(1).mean())


def babilong_prompts(corpus, T, qa, rows, examples=0, seed=0):
    """What babilong_accuracy asks: `rows` windows of T tokens up to the answer, behind solved `examples`."""
    some = Rows(corpus, "val", rows, False, seed)
    windows = [row[:-1] for row in babilong(some, T, qa)[0]]
    shots = [babilong(some, TASKS["babilong"][1], qa)[0][:, :-1] for _ in range(examples)]
    asked = [re.search(r".*((?:Where|What|Who) [^?]*\?) (\w+)\.$", decode(x), re.S).groups() for x in windows]
    cut = [row[: -len(answer) - 1] for row, (_, answer) in zip(windows, asked, strict=True)]
    return [np.concatenate([*(shot[b] for shot in shots), row]) for b, row in enumerate(cut)], asked


def babilong_published(file, encoding, bos, rows):
    """The same from the first `rows` of a published file: JSON objects with input, question and target, in
    one list or one a line."""
    content = Path(file).read_bytes().strip()
    try:
        lines = filter(bytes.strip, content.split(b"\n"))
        entries = json.loads(content if content.startswith(b"[") else b"[%b]" % b",".join(lines))[:rows]
        asked = [(x["question"].strip(), x["target"].strip()) for x in entries]
        texts = [f"{x['input'].strip()} {x['question'].strip()}" for x in entries]
        if not entries:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is no list of JSON objects with input, question and target") from None
    # vocabularies of more than bytes have the space in front of the word that follows
    space = " " if encoding.n_vocab == 256 else ""
    return [np.array([bos, *encoding.encode(text + space, disallowed_special=())]) for text in texts], asked


def decode(tokens):
    """Text of byte tokens (N,); the special tokens are left out."""
    return bytes(int(x) for x in tokens if x < 256).decode(errors="replace")


def babilong_accuracy(model, prompts, asked, qa, decode=decode):
    """Share of right answers. prompts: list of (n,) tokens; asked: their (question, answer)."""
    right = 0
    for n in {len(prompt) for prompt in prompts}:  # prompts of one length run together
        some = [b for b, prompt in enumerate(prompts) if len(prompt) == n]
        outputs = torch.stack(list(generate(model, np.stack([prompts[b] for b in some]), 16)), dim=1)
        for b, output in zip(some, outputs.cpu().numpy(), strict=True):
            question, answer = asked[b]
            right += babilong_score(decode(output), answer, question, qa)
    return right / len(prompts)
