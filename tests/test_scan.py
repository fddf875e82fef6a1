"""The scan in chunks is the recurrence: outputs, final state, every gradient, any length, any decay."""

import math

import pytest
import torch

from kernels import chunked_scan, recurrent_scan, scan

CHUNK = 8
LENGTHS = [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
DECAYS = {"almost none": (1e-6, 1e-6), "mixed": (1e-6, 30.0), "e^-30 a step": (30.0, 30.0)}
FLOAT64 = 1e-10  # rounding of some hundred float64 additions, with room
FLOAT32 = 1e-4  # the promise of the docstring; about 1e-6 is usual
NAMES = ["o", "final state", "dq", "dk", "dv", "dlog_a", "dstate"]


def make_inputs(T, vector, decay, B=2, G=2, H=4, K=5, V=3, seed=0):
    """Signed inputs with K != V and G < H, and random cotangents of both outputs, all float64."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    low, high = (math.log(x) for x in decay)
    shape = (B, T, H, K) if vector else (B, T, H)
    log_a = -torch.exp(low + (high - low) * torch.rand(*shape, generator=rng, dtype=torch.float64))
    inputs = [normal(B, T, G, K), normal(B, T, G, K), normal(B, T, H, V), log_a, normal(B, H, K, V)]
    return inputs, [normal(B, T, H, V), normal(B, H, K, V)]


def values_and_gradients(function, inputs, cotangents, dtype):
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [c.to(dtype) for c in cotangents])]


def relative_error(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize("T", LENGTHS)
def test_chunks_equal_the_recurrence(T, decay, vector):
    inputs, cotangents = make_inputs(T, vector, decay)
    exact = values_and_gradients(recurrent_scan, inputs, cotangents, torch.float64)
    for dtype, tolerance in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
        got = values_and_gradients(lambda *x: chunked_scan(*x, chunk=CHUNK), inputs, cotangents, dtype)
        for name, a, b in zip(NAMES, got, exact, strict=True):
            assert relative_error(a, b) < tolerance, (name, dtype)


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("function", [recurrent_scan, lambda *x: chunked_scan(*x, chunk=2)])
def test_gradients_equal_finite_differences(function, vector):
    inputs, _ = make_inputs(5, vector, (0.1, 3.0), B=1, G=1, H=2, K=3, V=2)
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_no_state_is_a_state_of_zeros_bit_for_bit(vector):
    (q, k, v, log_a, state), _ = make_inputs(13, vector, (0.1, 3.0))
    for function in (recurrent_scan, chunked_scan):
        for a, b in zip(
            function(q, k, v, log_a), function(q, k, v, log_a, torch.zeros_like(state)), strict=True
        ):
            assert torch.equal(a, b)


def test_state_is_never_below_float32():
    inputs, _ = make_inputs(5, False, (0.1, 3.0))
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        o, state = chunked_scan(*(x.to(dtype) for x in inputs[:4]))
        assert (o.dtype, state.dtype) == (dtype, wanted)


def test_bad_shapes_are_named():
    (q, k, v, log_a, state), _ = make_inputs(5, False, (0.1, 3.0))
    for bad, name in (
        ((q, k[:, :4], v, log_a, state), "k has shape"),
        ((q, k, v[:, :, :3], log_a, state), "v has 3 heads"),
        ((q, k, v, log_a[..., :2], state), "log_a has shape"),
        ((q, k, v, log_a, state[:1]), "state has shape"),
        ((q[:, :0], k[:, :0], v[:, :0], log_a[:, :0], state), "no size below 1"),
    ):
        with pytest.raises(ValueError, match=name):
            scan(*bad)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        scan(q, k, v, log_a, backend="fast")


def test_scan_says_once_which_backend_and_why(capsys, monkeypatch):
    monkeypatch.setattr("kernels._announced", set())
    inputs, _ = make_inputs(5, False, (0.1, 3.0))
    scan(*inputs)
    scan(*inputs)
    assert capsys.readouterr().out.count("scan: ") == 1
