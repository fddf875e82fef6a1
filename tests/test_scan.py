"""The scans are the recurrence: outputs, final state, every gradient, any length, any decay, also -inf."""

import math

import pytest
import torch

import kernels
from kernels import chunked_scan, recurrent_scan, scan, triton_scan

CHUNK = 8
LENGTHS = [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
DECAYS = {"almost none": (1e-6, 1e-6), "mixed": (1e-6, 29.9), "e^-29.9 a step": (29.9, 29.9)}
FLOAT64 = 1e-10  # rounding of some hundred float64 additions, with room
FLOAT32 = 1e-4  # the promise of the docstring; about 1e-6 is usual
CUT = 1e-10  # of a float64 result: e^-30 = 1e-13 of a state stays where -inf would leave nothing, with room
STRONG = 2e-5  # of a float32 result: b reaches -480 in a chunk with 16 cut steps, which float32 holds to 3e-5
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


def test_shapes_that_do_not_fit_are_refused_by_every_scan():
    (q, k, v, log_a, state), _ = make_inputs(5, False, (0.1, 3.0))
    for bad, name in (
        ((q, k[:, :4], v, log_a, state), r"k \(2, 4, 2, 5\)"),
        ((q, k, v[:, :, :3], log_a, state), r"v \(2, 5, 3, 3\)"),
        ((q, k, v, log_a[..., :2], state), r"log_a \(2, 5, 2\)"),
        ((q, k, v, log_a, state[:1]), r"state \(1, 4, 5, 3\)"),
        ((q[:, :0], k[:, :0], v[:, :0], log_a[:, :0], state), r"q \(2, 0, 2, 5\)"),
        ((q, k, v.float(), log_a, state), "k torch.float64, v torch.float32"),
    ):
        for function in kernels.BACKENDS.values():
            with pytest.raises(AssertionError, match=name):
                function(*bad)


def test_scan_chooses_a_backend_for_the_device_and_the_sizes():
    cpu = torch.device("cpu")
    assert kernels.choose_backend(cpu, torch.float32, 64, 16)[0] == "chunked"
    assert kernels.choose_backend(cpu, torch.float32, 16, 1)[0] == "recurrent"
    inputs, _ = make_inputs(5, False, (0.1, 3.0))
    for name, function in list(kernels.BACKENDS.items())[:2]:
        assert torch.equal(scan(*inputs, backend=name)[0], function(*inputs)[0])
    assert torch.equal(scan(*inputs)[0], chunked_scan(*inputs)[0])


# ---- strong decay ----


def exact_loop(q, k, v, log_a, state):
    """The recurrence in float64 with e^-inf = 0, written apart from kernels.py, which cuts decays off."""
    heads_of_a_group = v.shape[2] // q.shape[2]
    S, o = state, []
    for t in range(q.shape[1]):
        q_t, k_t = (x[:, t].repeat_interleave(heads_of_a_group, 1) for x in (q, k))
        a_t = log_a[:, t].exp().reshape(*S.shape[:2], -1, 1)
        S = a_t * S + torch.einsum("bhk,bhv->bhkv", k_t, v[:, t])
        o.append(torch.einsum("bhk,bhkv->bhv", q_t, S))
    return torch.stack(o, 1), S


def chunked(*inputs):
    return chunked_scan(*inputs, chunk=32)


STRENGTHS = [-1e4, -1e6, -1e9, -math.inf]


def in_the_kernel(*inputs):
    return triton_scan(*inputs, tile=(16, 16, 4, 1))


PLACES = [[7], [0], [3, 4, 11], list(range(0, 32, 2))]
CASES = [
    (function, r, places) for function in (recurrent_scan, chunked) for r in STRENGTHS for places in PLACES
]
CASES += [(in_the_kernel, r, [7]) for r in STRENGTHS] + [(in_the_kernel, -math.inf, PLACES[-1])]


@pytest.mark.parametrize("function, r, places", CASES)
@pytest.mark.parametrize("vector", [False, True], ids=["per head", "per channel"])
def test_one_strong_decay_among_weak_ones_loses_nothing(vector, function, r, places):
    inputs, cotangents = make_inputs(32, vector, (0.1, 0.1))
    inputs[3][:, places] = r
    exact = values_and_gradients(exact_loop, inputs, cotangents, torch.float64)
    for dtype, tolerance in ((torch.float64, CUT), (torch.float32, STRONG)):
        if (function, dtype) == (in_the_kernel, torch.float64):  # the kernel takes float32 and less
            continue
        got = values_and_gradients(function, inputs, cotangents, dtype)
        for name, a, b in zip(NAMES, got, exact, strict=True):
            # an exact gradient may be 0, as that of a state that is forgotten at the first step
            error = (a.double() - b).norm() / b.norm().clamp(min=1)
            assert error < tolerance, (name, dtype)


@pytest.mark.parametrize("function", [recurrent_scan, chunked, in_the_kernel])
def test_minus_infinity_forgets_what_came_before(function):
    (q, k, v, log_a, state), _ = make_inputs(20, False, (0.1, 0.1))
    q, k, v, log_a, state = (x.float() for x in (q, k, v, log_a, state))
    log_a[:, 8] = -math.inf
    whole, final = function(q, k, v, log_a, 1e3 * state)
    after, final_after = function(q[:, 8:], k[:, 8:], v[:, 8:], log_a[:, 8:])
    assert relative_error(whole[:, 8:], after.double()) < STRONG
    assert relative_error(final, final_after.double()) < STRONG
