"""The delta rule: both scans equal its formula, gradients included; the layer equals that of Qwen3-Next."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_checkpoint import needs
from test_model import MODELS, make_model
from test_scan import relative_error, values_and_gradients

import kernels
import lengthgen as lg
import train
from kernels import chunked_scan, recurrent_scan, scan

CHUNK = 8
LENGTHS = [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
FLOAT64 = 1e-10  # rounding of some hundred float64 additions, with room
FLOAT32 = 1e-4  # as in test_scan.py; about 1e-6 is usual
CUT = 1e-10  # e^-30 = 1e-13 of a state stays where -inf would leave nothing, with room
THEIRS = 1e-5  # two float32 computations in another order
NAMES = ["o", "final state", "dq", "dk", "dv", "dlog_a", "dstate", "dbeta"]


def make_inputs(T, per_channel, decay="mixed", kind_of_beta="mixed", B=2, G=2, H=4, K=5, V=3):
    """Signed inputs with K != V and G < H, keys of length 1, and cotangents of both outputs, all float64."""
    rng = torch.Generator().manual_seed(T)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    shape = (B, T, H, K) if per_channel else (B, T, H)
    log_a = {
        "none": torch.zeros(shape, dtype=torch.float64),  # plain DeltaNet
        "mixed": -torch.exp(math.log(1e-6) + math.log(2e7) * uniform(*shape)),  # up to e^-20 a step
        "with resets": -uniform(*shape).masked_fill(uniform(*shape) < 0.2, math.inf),
    }[decay]
    beta = {
        "mixed": uniform(B, T, H),
        "zero": torch.zeros(B, T, H, dtype=torch.float64),
        "one": torch.ones(B, T, H, dtype=torch.float64),
    }[kind_of_beta]
    k = F.normalize(normal(B, T, G, K), dim=-1)
    inputs = [normal(B, T, G, K), k, normal(B, T, H, V), log_a, normal(B, H, K, V), beta]
    return inputs, [normal(B, T, H, V), normal(B, H, K, V)]


def loop(q, k, v, log_a, state, beta):
    return recurrent_scan(q, k, v, log_a, state, beta=beta)


def chunks(q, k, v, log_a, state, beta, chunk=CHUNK):
    return chunked_scan(q, k, v, log_a, state, chunk=chunk, beta=beta)


def formula(q, k, v, log_a, state, beta):
    """S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T, the form in the papers."""
    heads_of_a_group = v.shape[2] // q.shape[2]
    S, o = state, []
    for t in range(q.shape[1]):
        q_t, k_t = (x[:, t].repeat_interleave(heads_of_a_group, 1) for x in (q, k))
        a_t = log_a[:, t].exp().reshape(*S.shape[:2], -1, 1)  # (B, H, 1 or K, 1)
        forget = torch.eye(k.shape[-1], dtype=S.dtype) - beta[:, t, :, None, None] * torch.einsum(
            "bhk,bhl->bhkl", k_t, k_t
        )
        write = torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k_t, v[:, t])
        S = forget @ (a_t * S) + write
        o.append(torch.einsum("bhk,bhkv->bhv", q_t, S))
    return torch.stack(o, 1), S


@pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])
@pytest.mark.parametrize("beta", ["mixed", "zero", "one"])
@pytest.mark.parametrize("decay", ["none", "mixed", "with resets"])
@pytest.mark.parametrize("T", LENGTHS)
def test_loop_and_chunks_are_the_formula_gradients_included(T, decay, beta, per_channel):
    inputs, cotangents = make_inputs(T, per_channel, decay, beta)
    exact = values_and_gradients(formula, inputs, cotangents, torch.float64)
    for function in (loop, chunks):
        for dtype, tolerance in ((torch.float64, CUT), (torch.float32, FLOAT32)):
            got = values_and_gradients(function, inputs, cotangents, dtype)
            for name, a, b in zip(NAMES, got, exact, strict=True):
                # an exact gradient may be 0, as that of v where beta is 0
                error = (a.double() - b).norm() / b.norm().clamp(min=1)
                assert error < tolerance, (name, function, dtype)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])
@pytest.mark.parametrize("function", [loop, lambda *x: chunks(*x, chunk=2)], ids=["loop", "chunks"])
def test_gradients_equal_finite_differences(function, per_channel):
    inputs, _ = make_inputs(5, per_channel, "none", B=1, G=1, H=2, K=3, V=2)
    inputs[3] -= 0.5  # log_a: every step keeps e^-0.5
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("function", [loop, chunks])
def test_a_beta_of_0_writes_nothing_and_forgets_only_what_decays(function):
    (q, k, v, _, state, beta), _ = make_inputs(20, False, "none", "zero")
    _, final = function(q, k, v, torch.zeros_like(beta), state, beta)
    assert relative_error(final, state) < FLOAT64
    _, final = function(q, k, v, torch.full_like(beta, -0.1), state, beta)
    assert relative_error(final, math.exp(-2) * state) < FLOAT64


@pytest.mark.parametrize("function", [loop, chunks])
def test_a_beta_of_1_puts_the_value_of_a_key_in_place_of_the_old_one(function):
    (_, k, v, _, state, beta), _ = make_inputs(20, False, "none", "one")
    o, _ = function(k, k, v, torch.zeros_like(beta), state, beta)  # reading with the key just written
    assert relative_error(o, v) < FLOAT64


def test_the_kernel_is_not_chosen_for_the_delta_rule_and_refuses_it():
    inputs, _ = make_inputs(5, False)
    gpu = torch.device("cuda")
    assert kernels.choose_backend(gpu, torch.float32, 32, 48, delta_rule=True)[0] == "chunked"
    with pytest.raises(AssertionError, match="the delta rule"):
        scan(*inputs[:5], backend="triton", beta=inputs[5])
    assert torch.equal(scan(*inputs[:5], beta=inputs[5])[0], chunked_scan(*inputs[:5], beta=inputs[5])[0])


def test_a_beta_of_another_shape_is_refused():
    inputs, _ = make_inputs(5, False)
    with pytest.raises(AssertionError, match=r"beta \(2, 5, 3\)"):
        recurrent_scan(*inputs[:5], beta=inputs[5][..., :3])


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_says_whether_it_gives_a_beta_and_the_announced_scan_goes_by_that(name, monkeypatch):
    given, asked = [], []

    def recorded(q, k, v, log_a, state, backend, beta=None):
        given.append(beta is not None)
        return kernels.scan(q, k, v, log_a, state, backend, beta)

    def choose(device, dtype, K, V, delta_rule):
        asked.append(delta_rule)
        return "chunked", "a test asks"

    monkeypatch.setattr(lg, "scan", recorded)
    model = make_model(name)
    model(torch.zeros(1, 3, dtype=torch.long))
    monkeypatch.setattr(kernels, "choose_backend", choose)
    train.tell_scan(model)
    assert given == 2 * [lg.LAYERS[name].HAS_BETA] and asked == [lg.LAYERS[name].HAS_BETA]


def test_beta_stays_in_float32_where_autocast_computes_in_bfloat16(monkeypatch):
    layer = make_model("gdn").layers[0].mixer.float()
    seen = []

    def recorded(q, k, v, log_a, state, backend, beta):
        seen.append((q.dtype, log_a.dtype, beta.dtype))
        return kernels.scan(q, k, v, log_a, state, backend, beta)

    monkeypatch.setattr(lg, "scan", recorded)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 5, 8), layer.zero_state(2))
    assert seen == [(torch.bfloat16, torch.float32, torch.float32)]


# ---- other libraries ----


def assert_both_scans_equal(theirs):
    """theirs(q, k, v, log_a, beta, state) -> o, final state; it divides q by sqrt(K) itself"""
    inputs, _ = make_inputs(37, False, G=4)  # as many heads of q and k as of v
    q, k, v, log_a, state, beta = (x.float() for x in inputs)
    o, final = theirs(q, k, v, log_a, beta, state)
    for function in (loop, chunks):
        got, got_final = function(q * q.shape[-1] ** -0.5, k, v, log_a, state, beta)
        assert relative_error(got, o.double()) < THEIRS
        assert relative_error(got_final, final.double()) < THEIRS


@pytest.mark.parametrize("name", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_both_scans_equal_those_of_transformers(name):
    needs("transformers")
    from transformers.models.qwen3_next import modeling_qwen3_next

    def theirs(q, k, v, log_a, beta, state):
        scan = getattr(modeling_qwen3_next, name)
        return scan(q, k, v, g=log_a, beta=beta, initial_state=state, output_final_state=True)

    assert_both_scans_equal(theirs)


def test_both_scans_equal_the_naive_one_of_flash_linear_attention():
    naive = needs("fla.ops.gated_delta_rule.naive")

    def theirs(q, k, v, log_a, beta, state):
        scan = naive.naive_recurrent_gated_delta_rule
        return scan(q, k, v, beta, log_a, initial_state=state, output_final_state=True)

    assert_both_scans_equal(theirs)


def test_the_layer_is_that_of_qwen3_next():
    transformers = needs("transformers")
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    ours = make_model("gdn").layers[0].mixer.float()
    H, K, V = ours.H, ours.K, ours.V
    config = transformers.Qwen3NextConfig(
        hidden_size=8,
        linear_num_value_heads=H,
        linear_num_key_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_conv_kernel_dim=4,
        rms_norm_eps=ours.o_norm.eps,
        num_hidden_layers=4,
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0)

    # they keep the weights of q, k, v and the gate in one matrix, head by head, and b and a in another
    by_head = [x.weight.unflatten(0, (H, -1)) for x in (ours.q_proj, ours.k_proj, ours.v_proj, ours.g_proj)]
    b_and_a = [x.weight.unflatten(0, (H, 1)) for x in (ours.b_proj, ours.a_proj)]
    weights = {
        "in_proj_qkvz.weight": torch.cat(by_head, 1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat(b_and_a, 1).flatten(0, 1),
        "conv1d.weight": torch.cat([ours.q_conv1d.weight, ours.k_conv1d.weight, ours.v_conv1d.weight]),
        "dt_bias": ours.dt_bias,
        "A_log": ours.A_log,
        "norm.weight": ours.o_norm.weight,
        "out_proj.weight": ours.o_proj.weight,
    }
    theirs.load_state_dict(weights)  # strict: every weight is there, and no other
    x = torch.randn(2, 37, 8)
    y, _ = ours(x, ours.zero_state(2))
    assert relative_error(y, theirs(x).double()) < THEIRS
