"""The Triton kernel against the recurrence in float64: o, the final state and all five gradients.

Without a GPU the kernel runs in Triton's interpreter, in float32 and float16 (the interpreter multiplies bfloat16 wrongly).
Every comparison draws random gradients for both outputs. Errors are norms: |got - wanted| / |wanted|.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import chunked_scan, recurrent_scan, scan, triton_scan

ROOT = Path(__file__).parents[1]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NAMES = ("o", "final state", "dq", "dk", "dv", "dlog_a", "dstate")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")

FLOAT32 = 2e-5  # sums of up to 130 products in float32, each about 1e-7 off
HANDOVER = 1e-5  # two float32 runs of the same sums, cut differently
STRONG = 1e-4  # float32 holds b = -700 to 3e-5, and e^b is off by as much
IDENTITY = 1e-4  # of the sum of absolute values, which is far larger than the sum
FLOAT16 = {"dlog_a": 3e-3, None: 1e-3}  # operands have 11 bits; dlog_a is a small difference of large sums
BFLOAT16 = {"dlog_a": 2e-2, None: 5e-3}  # operands have 8 bits
BFLOAT16_VECTOR = {"dlog_a": 5e-2, None: 5e-3}
TRAINING = 1e-4  # 20 steps of AdamW from equal weights: float32 noise of 1e-6 has begun to grow
NOTHING = 1e-30  # float32 cannot hold much less: a gradient that small counts as zero


def draw(B, T, G, H, K, V, vector, decay=1.0, seed=0):
    """Inputs q, k, v, log_a, state and the gradients of o and of the final state, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE)

    q, k, v = randn(B, T, G, K), randn(B, T, G, K) / K**0.5, randn(B, T, H, V)
    log_a = -decay * F.softplus(randn(B, T, H, K) - 1 if vector else randn(B, T, H) - 1)
    return [q, k, v, log_a, randn(B, H, K, V)], [randn(B, T, H, V), randn(B, H, K, V)]


def run(fn, inputs, cotangents, dtype=torch.float64):
    """o, the final state and the gradients, by name; None as an input or a cotangent leaves it out."""
    # q, k, v carry the dtype; log_a and the state stay in float32 as in a model under autocast
    dtypes = [dtype] * 3 + [torch.promote_types(dtype, torch.float32)] * 2
    leaves = [x if x is None else x.to(t).detach().requires_grad_() for x, t in zip(inputs, dtypes, strict=True)]
    outputs = fn(*leaves)
    assert [y.dtype for y in outputs] == [dtypes[0], dtypes[4]]
    reached = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, cotangents, strict=True) if dy is not None]
    present = [x for x in leaves if x is not None]
    gradients = iter(torch.autograd.grad([y for y, _ in reached], present, [dy for _, dy in reached]))
    return dict(zip(NAMES, [*outputs, *(None if x is None else next(gradients) for x in leaves)], strict=True))


def assert_close(got, wanted, tolerance, skip=()):
    for name in NAMES:
        if wanted[name] is None or name in skip:
            continue
        limit = tolerance.get(name, tolerance[None]) if isinstance(tolerance, dict) else tolerance
        error = ((got[name].double() - wanted[name]).norm() / wanted[name].norm().clamp_min(NOTHING)).item()
        assert error <= limit, f"{name} is off by {error:.1e}, more than {limit:.0e}"


def check(
    *size, vector, decay=1.0, state=True, dfinal=True, log_a=None, dtype=torch.float32, tolerance=FLOAT32, skip=(), **options
):
    inputs, cotangents = draw(*size, vector, decay)
    if log_a is not None:
        inputs[3] = log_a(inputs[3])
    if dtype != torch.float32:  # the reference gets the same rounded numbers
        inputs[:3] = [x.to(dtype).double() for x in inputs[:3]]
    inputs[4] = inputs[4] if state else None
    cotangents[1] = cotangents[1] if dfinal else None
    wanted = run(recurrent_scan, inputs, cotangents)
    got = run(lambda *x: triton_scan(*x, **options), inputs, cotangents, dtype)
    assert_close(got, wanted, tolerance, skip)


both_decays = pytest.mark.parametrize("vector", [False, True], ids=["per head", "per channel"])


@pytest.mark.parametrize("vector, chunk", [(False, 16), (False, 64), (True, 16), (True, 32)])
@pytest.mark.parametrize("T", [1, 50, 64, 129])
def test_all_seven_quantities_at_any_length_and_chunk(vector, chunk, T):
    check(1, T, 2, 2, 16, 32, vector=vector, chunk=chunk, block=16)


@both_decays
@pytest.mark.parametrize("state, dfinal", [(False, False), (True, False), (False, True)])
def test_initial_state_and_final_gradient_may_be_missing(vector, state, dfinal):
    check(2, 40, 1, 1, 16, 16, vector=vector, state=state, dfinal=dfinal, chunk=16)


@both_decays
def test_a_loss_on_the_final_state_alone_reaches_every_input(vector):
    inputs, cotangents = draw(1, 20, 1, 2, 16, 16, vector)
    cotangents[0] = None
    inputs[0].zero_()  # q does not touch the final state: autograd calls its gradient unused in the reference
    wanted = run(lambda q, *x: recurrent_scan(q + 0 * x[1].sum(), *x), inputs, [torch.zeros_like(inputs[2]), cotangents[1]])
    got = run(triton_scan, inputs, cotangents, torch.float32)
    assert_close(got, wanted, FLOAT32, skip=("o", "dq"))


@both_decays
def test_heads_share_q_and_k(vector):
    check(1, 40, 2, 4, 16, 16, vector=vector, chunk=16)
    check(2, 20, 1, 3, 16, 16, vector=vector, chunk=16)


@both_decays
@pytest.mark.parametrize("K, V", [(64, 16), (24, 48), (16, 1), (5, 3)])
def test_head_sizes_of_any_shape_are_padded(vector, K, V):
    check(1, 40, 1, 2, K, V, vector=vector)


@both_decays
@pytest.mark.parametrize("V, segments", [(256, 1), (144, 2)])
def test_wide_values_become_several_heads(vector, V, segments):
    check(1, 36, 1, 2, 16, V, vector=vector, chunk=16, block=64, segments=segments)


@pytest.mark.parametrize("decay", [1e-3, 1.0, 30.0, 1000.0])
def test_one_decay_per_head_is_right_at_any_strength(decay):
    check(1, 100, 2, 2, 16, 16, vector=False, decay=decay, chunk=64, skip=("dlog_a",) if decay == 1000 else ())


def uniform(log_a):
    return torch.full_like(log_a, -30.1)


def mixed(log_a):
    return -30 * torch.rand(log_a.shape, generator=torch.Generator().manual_seed(1), dtype=log_a.dtype).to(DEVICE)


@pytest.mark.parametrize("log_a", [uniform, mixed])
@pytest.mark.parametrize("segments", [1, 2])
def test_one_decay_per_channel_of_30_a_step_is_right(log_a, segments):
    # uniform: dlog_a is about 1e-13 everywhere, and right to 1e-4 of that, because no 1 - 1 happens on the way
    check(1, 40, 2, 2, 16, 16, vector=True, log_a=log_a, chunk=16, segments=segments, tolerance=STRONG)


def test_one_decay_per_channel_of_100_a_step_stays_finite_and_right():
    inputs, cotangents = draw(1, 40, 2, 2, 16, 16, True, decay=100)
    got = run(triton_scan, inputs, cotangents, torch.float32)
    assert all(x.isfinite().all() for x in got.values())
    assert_close(got, run(recurrent_scan, inputs, cotangents), STRONG)


@both_decays
@pytest.mark.parametrize("segments", [2, 4])
@pytest.mark.parametrize("state", [True, False])
def test_segments_change_nothing(vector, segments, state):
    check(1, 88, 1, 2, 16, 16, vector=vector, state=state, chunk=16, segments=segments)  # 2 of 48 + 40; 32 + 32 + 24


@both_decays
def test_handing_over_the_state_equals_not_cutting(vector):
    (q, k, v, log_a, state), _ = draw(1, 96, 2, 2, 16, 16, vector)
    q, k, v, log_a, state = (x.float() for x in (q, k, v, log_a, state))
    whole, final = triton_scan(q, k, v, log_a, state)
    o, parts = state, []
    for cut in (slice(0, 41), slice(41, None)):
        o, state = triton_scan(q[:, cut], k[:, cut], v[:, cut], log_a[:, cut], state)
        parts.append(o)
    for got, wanted in ((torch.cat(parts, 1), whole), (state, final)):
        assert (got - wanted).norm() <= HANDOVER * wanted.norm()


@both_decays
def test_what_q_reads_was_written_by_k_or_the_state(vector):
    """sum_t (q . dq - k . dk) + <S_T, R_T> = <S_0, dS_0>, for every head (and key channel)."""
    inputs, cotangents = draw(1, 50, 2, 2, 16, 16, vector)
    got = run(triton_scan, inputs, cotangents, torch.float32)
    q, k, _, _, state = inputs
    read, written = (q * got["dq"]).sum(1), (k * got["dk"]).sum(1)
    left = (read - written + (got["final state"] * cotangents[1]).sum(-1)).sum(-1)
    right = (state * got["dstate"]).sum((-1, -2))
    assert (left - right).abs().max() <= IDENTITY * (q * got["dq"]).abs().sum((1, 3)).max()


@both_decays
def test_float16(vector):
    check(1, 50, 1, 2, 16, 16, vector=vector, dtype=torch.float16, tolerance=FLOAT16)


def test_no_state_equals_a_state_of_zeros_bit_for_bit():
    (q, k, v, log_a, state), _ = draw(1, 20, 1, 2, 16, 16, False)
    q, k, v, log_a, state = (x.float() for x in (q, k, v, log_a, state))
    for a, b in zip(triton_scan(q, k, v, log_a), triton_scan(q, k, v, log_a, 0 * state), strict=True):
        assert torch.equal(a, b)


def test_strided_inputs_are_read_right():
    inputs, cotangents = draw(1, 40, 2, 2, 16, 16, True)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    strided[4] = inputs[4].transpose(2, 3).contiguous().transpose(2, 3)
    got, wanted = (run(triton_scan, x, cotangents, torch.float32) for x in (strided, inputs))
    assert all(torch.equal(got[name], wanted[name]) for name in NAMES)


# ---- where it is called from ----


@both_decays
def test_compiles_without_a_graph_break(vector):
    inputs, cotangents = draw(1, 20, 1, 2, 16, 16, vector)

    def layer(q, k, v, log_a, state):
        o, final = scan(q * 2, k, v, log_a, state, backend="triton")
        return o * 3, final

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    got, wanted = (run(fn, inputs, cotangents, torch.float32) for fn in (compiled, layer))
    assert all(torch.equal(got[name], wanted[name]) for name in NAMES)


def test_autocast_leaves_decay_and_state_in_float32():
    inputs, cotangents = draw(1, 20, 1, 2, 16, 16, False)
    with torch.autocast(DEVICE, dtype=torch.float16):
        got = run(triton_scan, inputs, cotangents, torch.float16)
    wanted = run(triton_scan, inputs, cotangents, torch.float16)
    assert all(torch.equal(got[name], wanted[name]) for name in NAMES)


def test_scan_says_once_what_it_picks_and_why(capsys):
    inputs, _ = draw(1, 4, 1, 1, 16, 16, False)
    inputs = [x.float() for x in inputs]
    kernels._announced.clear()
    for _ in range(2):
        scan(*inputs, backend="triton")
        scan(*inputs)
    picked = "" if GPU else "scan: chunked, plain PyTorch matmuls run on any device\n"
    assert capsys.readouterr().out == "scan: triton, asked for\n" + picked


def test_without_triton_everything_else_works():
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
x = torch.ones(1, 3, 1, 4)
kernels.scan(x, x, x, -x)
try:
    kernels.triton_scan(x, x, x, -x)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "triton_scan needs the triton package, which is not installed: use chunked_scan" in done.stdout


def bad(**change):
    x = torch.zeros(2, 5, 1, 4)
    good = {"q": x, "k": x, "v": x.new_zeros(2, 5, 3, 6), "log_a": x.new_zeros(2, 5, 3)}
    return good | change


BAD = {
    "q must be": bad(q=torch.zeros(2, 5, 4)),
    r"k has shape \(2, 5, 1, 5\), expected \(2, 5, 1, 4\)": bad(k=torch.zeros(2, 5, 1, 5)),
    r"v has shape \(2, 6, 3, 6\), expected \(2, 5, 3, 6\)": bad(v=torch.zeros(2, 6, 3, 6)),
    r"v has 3 heads, which 2 groups": bad(q=torch.zeros(2, 5, 2, 4), k=torch.zeros(2, 5, 2, 4)),
    r"log_a has shape \(2, 5\), expected \(2, 5, 3\) or \(2, 5, 3, 4\)": bad(log_a=torch.zeros(2, 5)),
    r"state has shape \(2, 3, 6, 4\), expected \(2, 3, 4, 6\)": bad(state=torch.zeros(2, 3, 6, 4)),
    r"v \(2, 5, 3, 6\) is torch.float16, expected torch.float32 like q": bad(v=torch.zeros(2, 5, 3, 6).half()),
    r"log_a \(2, 5, 3\) is torch.int64, expected a floating-point dtype": bad(log_a=torch.zeros(2, 5, 3).long()),
    r"k \(2, 5, 1, 4\) is on meta, expected cpu like q": bad(k=torch.zeros(2, 5, 1, 4, device="meta")),
    r"log_a \(2, 5, 3\) reaches 0.5, expected no log decay above 0": bad(log_a=torch.full((2, 5, 3), 0.5)),
    r"q has shape \(2, 0, 1, 4\)": bad(q=torch.zeros(2, 0, 1, 4)),
}


@pytest.mark.parametrize("backend", [recurrent_scan, chunked_scan, triton_scan])
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(backend, message):
    with pytest.raises(ValueError, match=message):
        backend(**BAD[message])


@pytest.mark.parametrize(
    "message, inputs",
    [
        ("q is torch.float64, but the kernel computes in float32", {k: x.double() for k, x in bad().items()}),
        ("room for K = 256: use chunked_scan", bad(q=torch.zeros(2, 5, 1, 257), k=torch.zeros(2, 5, 1, 257))),
        ("chunk is 24, expected a power of two", bad(chunk=24)),
        ("block is 8, expected a power of two", bad(block=8)),
        ("segments is 0, expected at least 1", bad(segments=0)),
    ],
)
def test_what_the_kernel_cannot_take_is_named(message, inputs):
    with pytest.raises(ValueError, match=message):
        triton_scan(**inputs)


def test_a_model_trained_with_the_kernel_follows_the_chunked_one():
    from lengthgen import LanguageModel, ModelConfig

    losses = {}
    for backend in ("chunked", "triton"):
        torch.manual_seed(0)
        size = dict(vocab_size=17, d_model=16, n_layer=1, d_state=16, headdim=16)
        model = LanguageModel(ModelConfig(layer="mamba2", backend=backend, **size)).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        state, losses[backend] = None, []
        for _ in range(20):
            tokens = torch.randint(17, (2, 21)).to(DEVICE)
            logits, state = model(tokens[:, :-1], state)
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = [type(layer)(*(x.detach() for x in layer)) for layer in state]  # state passing
            losses[backend].append(loss.item())
    chunked, triton = torch.tensor(losses["chunked"]), torch.tensor(losses["triton"])
    assert (chunked - triton).abs().max() <= TRAINING
    assert chunked[-1] != chunked[0]
