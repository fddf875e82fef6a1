"""The ladder: each rung is one claim of the design, tested on small inputs; its measured errors are printed.

`pytest tests/test_ladder.py` prints them as a table at the end, with -s also one by one. Inputs are signed,
K != V and G < H, the oracle is the recurrence in float64, and both outputs of a scan get random cotangents.
An error is |got - exact| / |exact| of the worst of o, the final state and the five gradients.
"""

import importlib.util
import math
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import test_delta_rule as delta
import torch
from test_train import Stopped, metrics, same, stop_after

import lengthgen as lg
import train
from kernels import chunked_scan, recurrent_scan, triton_scan

FLOAT64 = 1e-10  # rounding of some hundred float64 additions, with room
FLOAT32 = 3e-5  # log_a sums to -200 in a chunk, which float32 holds to 1e-5, and e^b is off by as much
WEIGHTS = 1e-5  # after 4 steps of 1e-3: the order of float32 additions, which AdamW's division magnifies
LOSSES = 1e-5  # of 5.6 nats in float32: its rounding is 5e-7
SMALL = 1.0  # a norm below it counts as 1: exact gradients may be 0, as that of a state that is forgotten
CHUNK = 16
LENGTHS = (1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
DECAYS = ("almost 1", "mixed", "strong", "with resets")


@pytest.fixture
def ladder(record_property):
    """A function that prints a rung and keeps it for the table, which conftest.py prints at the very end."""

    def rung(claim, errors):
        line = f"{claim}: {errors}"
        print(line)
        record_property("rung", line)

    return rung


def make_log_a(shape, decay, rng):
    """Decays a from almost 1 (log a = -1e-6) over e^-20 a step to 0 (log a = -inf)."""
    uniform = torch.rand(*shape, generator=rng, dtype=torch.float64)
    if decay == "almost 1":
        return -1e-6 * (1 + uniform)
    if decay == "strong":
        return -20 * uniform
    log_a = -torch.exp(math.log(1e-6) + math.log(5e6) * uniform)  # up to 5, evenly in the exponent
    if decay == "with resets":
        log_a[torch.rand(*shape, generator=rng) < 0.1] = -math.inf
    return log_a


def make_inputs(T, per_channel, decay="mixed", B=2, G=2, H=4, K=5, V=3):
    """q, k, v, log_a, state, and the cotangents of o and of the final state, in float64."""
    rng = torch.Generator().manual_seed(T)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    log_a = make_log_a((B, T, H, K) if per_channel else (B, T, H), decay, rng)
    inputs = [normal(B, T, G, K), normal(B, T, G, K), normal(B, T, H, V), log_a, normal(B, H, K, V)]
    return inputs, [normal(B, T, H, V), normal(B, H, K, V)]


def run(function, inputs, cotangents, dtype=torch.float64):
    """o, the final state and the gradients of q, k, v, log_a, state."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [x.to(dtype) for x in cotangents])]


def error(got, exact):
    """The largest relative error of all tensors."""
    errors = [(x.double() - y).norm() / y.norm().clamp(min=SMALL) for x, y in zip(got, exact, strict=True)]
    return torch.stack(errors).max().item()  # NaN where one of them is


def exact_loop(q, k, v, log_a, state):
    """The recurrence in float64 with e^-inf = 0, written apart from kernels.py, which cuts decays off."""
    J = v.shape[2] // q.shape[2]
    S, o = state, []
    for t in range(q.shape[1]):
        q_t, k_t = (x[:, t].repeat_interleave(J, 1) for x in (q, k))  # (B, H, K)
        a_t = log_a[:, t].exp().reshape(*S.shape[:2], -1, 1)
        S = a_t * S + k_t[..., None] * v[:, t, :, None]
        o.append((q_t[..., None] * S).sum(-2))
    return torch.stack(o, 1), S


def chunks(*inputs):
    return chunked_scan(*inputs, chunk=CHUNK)


def kernel(*inputs):
    return triton_scan(*inputs, tile=(CHUNK, 16, 4, 1))


def worst(function, dtype=torch.float64, lengths=LENGTHS, per_channel=(False, True), **sizes):
    """The largest error of a scan over lengths, decays, and decays per head and per channel."""
    errors = []
    for T in lengths:
        for decay in DECAYS:
            for vector in per_channel:
                inputs, cotangents = make_inputs(T, vector, decay, **sizes)
                exact = run(exact_loop, inputs, cotangents)
                errors.append(error(run(function, inputs, cotangents, dtype), exact))
    return torch.tensor(errors).max().item()


# ---- the scans ----


def test_loop_equals_chunks(ladder):
    loop, in_chunks = worst(recurrent_scan), worst(chunks)
    loop_32, in_chunks_32 = worst(recurrent_scan, torch.float32), worst(chunks, torch.float32)
    errors = f"{in_chunks:.1e} (float64), {in_chunks_32:.1e} (float32)"
    ladder("loop = chunks", f"{errors}; the loop itself {loop:.1e}, {loop_32:.1e}")
    assert loop < FLOAT64 and in_chunks < FLOAT64
    assert loop_32 < FLOAT32 and in_chunks_32 < FLOAT32


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")
def test_loop_equals_kernel(ladder):
    in_kernel = worst(kernel, torch.float32, lengths=[CHUNK + 1], B=1, G=1, H=2)  # the interpreter is slow
    ladder("loop = kernel", f"{in_kernel:.1e} (float32)")
    assert in_kernel < FLOAT32


def test_chunks_of_one_step_equal_the_loop(ladder):
    def steps(*inputs):
        return chunked_scan(*inputs, chunk=1)

    of_64, of_32 = worst(steps, lengths=(1, 2, 13)), worst(steps, torch.float32, lengths=(1, 2, 13))
    ladder("chunks of 1 step = loop", f"{of_64:.1e} (float64), {of_32:.1e} (float32)")
    assert of_64 < FLOAT64 and of_32 < FLOAT32


def test_gla_with_equal_gates_is_the_scan_of_mamba2(ladder):
    def gla(scan):
        def with_equal_gates(q, k, v, log_a, state):
            return scan(q, k, v, log_a[..., None].expand(*log_a.shape, q.shape[-1]), state)

        return with_equal_gates

    # the gradient of the one gate is the sum over the key channels
    loop, in_chunks = (worst(gla(scan), per_channel=[False]) for scan in (recurrent_scan, chunks))
    of_32 = worst(gla(chunks), torch.float32, per_channel=[False])
    errors = f"{max(loop, in_chunks):.1e} (float64), {of_32:.1e} (float32)"
    ladder("GLA with equal gates = Mamba-2's scan", errors)
    assert loop < FLOAT64 and in_chunks < FLOAT64 and of_32 < FLOAT32


def selective_scan(u, dt, A, B, C, h):
    """Mamba-1 in its own letters: u, dt (batch, T, D), A (D, N), B and C (batch, T, N), h (batch, D, N)."""
    y = []
    for t in range(u.shape[1]):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1))
    return torch.stack(y, 1), h


def test_mamba1_is_heads_of_V_1(ladder):
    def heads(scan):
        def mamba1(u, dt, A, B, C, h):
            v = (dt * u)[..., None]  # (batch, T, D, 1)
            o, S = scan(C[:, :, None], B[:, :, None], v, dt[..., None] * A, h[..., None])
            return o[..., 0], S[..., 0]

        return mamba1

    batch, T, D, N = 2, 2 * CHUNK + 3, 6, 5
    rng = torch.Generator().manual_seed(0)
    shapes = ((batch, T, D), (batch, T, D), (D, N), (batch, T, N), (batch, T, N), (batch, D, N))
    u, dt, A, B, C, h = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in shapes)
    inputs = [u, dt.exp(), -A.exp(), B, C, h]
    cotangents = [torch.randn_like(u), torch.randn_like(h)]
    exact = run(selective_scan, inputs, cotangents)
    loop, in_chunks = (error(run(heads(f), inputs, cotangents), exact) for f in (recurrent_scan, chunks))
    of_32 = error(run(heads(chunks), inputs, cotangents, torch.float32), exact)
    errors = f"{max(loop, in_chunks):.1e} (float64), {of_32:.1e} (float32)"
    ladder("Mamba-1 = heads of V 1", errors)
    assert loop < FLOAT64 and in_chunks < FLOAT64 and of_32 < FLOAT32


def test_the_delta_rule_is_its_formula(ladder):
    def worst_of(function, dtype=torch.float64):
        errors = []
        for T in delta.LENGTHS:
            for decay in ("none", "mixed", "with resets"):
                for per_channel in (False, True):
                    inputs, cotangents = delta.make_inputs(T, per_channel, decay)
                    exact = run(delta.formula, inputs, cotangents)
                    errors.append(error(run(function, inputs, cotangents, dtype), exact))
        return torch.tensor(errors).max().item()

    loop, in_chunks, of_32 = (
        worst_of(delta.loop),
        worst_of(delta.chunks),
        worst_of(delta.chunks, torch.float32),
    )
    errors = f"{max(loop, in_chunks):.1e} (float64), {of_32:.1e} (float32)"
    ladder("delta rule = its formula", errors)
    assert loop < FLOAT64 and in_chunks < FLOAT64 and of_32 < FLOAT32


# ---- the models ----

MODELS = {
    "mamba2": dict(d_state=6, headdim=4, ngroups=2),
    "gla": dict(num_heads=2),
    "mamba1": dict(d_state=6, dt_rank=3),
    "gdn": dict(num_heads=2, headdim=4, expand_v=1.5),
}


@pytest.mark.parametrize("layer", MODELS)
def test_a_sequence_cut_anywhere_is_the_sequence_not_cut_gradients_included(layer, ladder):
    torch.manual_seed(0)
    sizes = dict(vocab_size=11, d_model=8, n_layer=2, backend="chunked") | MODELS[layer]
    model = lg.LanguageModel(lg.ModelConfig(layer=layer, **sizes)).double()
    tokens = torch.randint(0, 11, (2, 19))
    start = lg.map_state(lambda x: torch.randn_like(x).requires_grad_(), model.zero_state(2))
    leaves = [*model.parameters(), *(x for layer in start for x in layer if x is not None)]
    weights = []  # the cotangents of logits and final state

    def everything(pieces):
        state, logits = start, []
        for piece in pieces:
            out, state = model(piece, state)
            logits.append(out)
        outputs = [torch.cat(logits, 1), *(x for layer in state for x in layer if x is not None)]
        if not weights:
            weights.extend(torch.randn_like(x) for x in outputs)
        return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]

    exact = everything([tokens])
    cuts = [tokens.split([cut, 19 - cut], dim=1) for cut in range(1, 19)] + [tokens.split(1, dim=1)]
    worst_cut = max(error(everything(pieces), exact) for pieces in cuts)
    ladder(f"cut anywhere = not cut, {layer}", f"{worst_cut:.1e} (float64)")
    assert worst_cut < FLOAT64


# ---- training ----

RUN = "--data text.txt --T 8 --batch 2 --zero-prob 0 --lr 1e-3 --intervention state_passing"
FOLDER = "mamba2-echo-state_passing-s0"
TINY = dict(d_model=8, n_layer=2, d_state=4, headdim=8)


def make_training_small(set_attribute):
    set_attribute(train, "TINY_MODELS", {"mamba2": TINY})
    recipe = dict(steps=2, lr=1e-3, hold=0.0, batch=2, zero_prob=0.0)
    set_attribute(train, "RECIPES", dict.fromkeys(train.RECIPES, recipe))
    losses = dict(xlabel="position (T)", ylabel="loss", x=[1], panels={"text": [0.0]})
    set_attribute(train, "load_or_measure", lambda *args: losses)  # and what a run ends with is left out
    set_attribute(train, "report", lambda *args: None)


@pytest.fixture
def small(tmp_path, monkeypatch):
    make_training_small(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    words = np.random.default_rng(0).choice("one two three four five six seven".split(), 1000)
    pathlib.Path("text.txt").write_text(" ".join(words))


TWO_RANKS = f"""
import train
from test_ladder import make_training_small

make_training_small(setattr)
train.main("{RUN} --steps 4 --out two".split())
"""


def in_two_ranks(program):
    """Run a program as torchrun does, without the seconds that its launcher needs to start."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # a free one
    here = pathlib.Path(__file__).parent
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    shared["PYTHONPATH"] = f"{here.parent}:{here}"
    ranks = []
    for rank in ("0", "1"):
        environment = os.environ | shared | dict(RANK=rank, LOCAL_RANK=rank)
        command = [sys.executable, "-c", program]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_two_ranks_equal_one_process(small, monkeypatch, ladder):
    in_two_ranks(TWO_RANKS)

    # one process with two micro-batches, which read what the two ranks have read
    make_rows = lg.Rows

    def rows_of_ranks(corpus, split, B, continues, seed):
        return make_rows(corpus, split, B, continues, seed // 10**6)

    monkeypatch.setattr(lg, "Rows", rows_of_ranks)
    train.main("--data text.txt --T 8 --batch 2 --accumulate 2 --lr 1e-3 --steps 2 --out one".split())
    train.main(f"{RUN} --steps 4 --out one --accumulate 2 --init one/mamba2-echo-base-s0".split())
    one, two = (lg.load_checkpoint(f"{out}/{FOLDER}") for out in ("one", "two"))
    assert (one["settings"]["ranks"], two["settings"]["ranks"]) == (1, 2)
    apart = max((weight - two["model"][name]).abs().max().item() for name, weight in one["model"].items())
    losses = [[line["loss"] for line in metrics(pathlib.Path(out, FOLDER))] for out in ("one", "two")]
    losses_apart = np.abs(np.subtract(*losses)).max()
    errors = f"{apart:.1e} (float32 weights of 4 steps), {losses_apart:.1e} (their losses)"
    ladder("two ranks = one process", errors)
    assert one["model"]["norm_f.weight"].sub(1).abs().max() > 100 * WEIGHTS  # it has trained
    assert apart < WEIGHTS and losses_apart < LOSSES


def test_stopped_equals_not_stopped_bit_for_bit(small, monkeypatch, ladder):
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    train.main(f"{RUN} --steps 6 --out a".split())
    stop_after(monkeypatch, 5, 6, save_every=3)
    with pytest.raises(Stopped):
        train.main(f"{RUN} --steps 6 --out b".split())
    assert lg.load_checkpoint(f"b/{FOLDER}")["step"] == 3
    train.main(f"{RUN} --steps 6 --out b".split())
    a, b = (lg.load_checkpoint(f"{out}/{FOLDER}") for out in "ab")
    for key in ("step", "model", "optimizer", "carried"):  # carried: text, states, statistics and noise
        assert same(a[key], b[key]), key
    losses = [[line["loss"] for line in metrics(pathlib.Path(out, FOLDER))] for out in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    ladder("stopped = not stopped", "0, bit for bit (weights, moments, states, places in the text)")
