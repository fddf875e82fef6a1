"""Cutting a sequence anywhere changes nothing; names, sizes and formulas are the official ones."""

import pytest
import torch
import torch.nn.functional as F

import kernels
import lengthgen as lg

MODELS = {
    "mamba2": dict(layer="mamba2", d_state=6, headdim=4, ngroups=2),
    "mamba1": dict(layer="mamba1", d_state=6, dt_rank=3),
    "gla": dict(layer="gla", num_heads=2),
    "gdn": dict(layer="gdn", num_heads=2, headdim=4, expand_v=1.5),
}
EXACT = 1e-9  # float64: only the order of additions differs
FLOAT32 = 1e-5  # of the largest value, after two layers of float32


def make_model(name, **changes):
    torch.manual_seed(0)
    config = dict(vocab_size=11, d_model=8, n_layer=2, backend="chunked") | MODELS[name] | changes
    model = lg.LanguageModel(lg.ModelConfig(**config)).double()
    with torch.no_grad():  # so that every weight matters: the gate's bias, for one, starts at zero
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def random_state(model, B):
    return lg.map_state(lambda x: torch.randn_like(x).requires_grad_(), model.zero_state(B))


def tensors(state):
    return [x for layer in state for x in layer if x is not None]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cuts", [[20], [1] * 37, [36], [3, 1, 1, 17, 2], [5, 30]])
def test_cutting_anywhere_changes_nothing(name, cuts):
    model, T = make_model(name), 37
    tokens = torch.randint(0, 11, (3, T))
    weight = torch.randn(3, T, 11, dtype=torch.float64)
    start = random_state(model, 3)
    end_weights = [torch.randn_like(x) for x in tensors(start)]

    def run(lengths):
        state, logits = start, []
        for piece in tokens.split(lengths, dim=1):
            out, state = model(piece, state)
            logits.append(out)
        logits = torch.cat(logits, 1)
        loss = (logits * weight).sum() + sum(
            (x * w).sum() for x, w in zip(tensors(state), end_weights, strict=True)
        )
        inputs = [*model.parameters(), *tensors(start)]
        return [logits, *tensors(state), *torch.autograd.grad(loss, inputs)]

    lengths = cuts + ([T - sum(cuts)] if sum(cuts) < T else [])
    for whole, cut in zip(run([T]), run(lengths), strict=True):
        assert (whole - cut).abs().max() <= EXACT * max(1, whole.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_no_state_is_a_state_of_zeros_bit_for_bit(name):
    model = make_model(name).float()
    tokens = torch.randint(0, 11, (2, 9))
    (a, state_a), (b, state_b) = model(tokens), model(tokens, model.zero_state(2))
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(tensors(state_a), tensors(state_b), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_the_last_logits_alone_are_the_last_of_all_and_leave_the_same_state(name):
    model = make_model(name)
    tokens, start = torch.randint(0, 11, (3, 20)), random_state(model, 3)
    logits, state = model(tokens, start)
    last, state_of_last = model(tokens, start, last_only=True)
    assert last.shape == (3, 1, 11) and (last - logits[:, -1:]).abs().max() < EXACT
    assert all(torch.equal(x, y) for x, y in zip(tensors(state), tensors(state_of_last), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_state_is_not_edited(name):
    model = make_model(name)
    state = random_state(model, 2)
    before = [x.clone() for x in tensors(state)]
    model(torch.randint(0, 11, (2, 9)), state)
    assert all(torch.equal(x, y) for x, y in zip(before, tensors(state), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_chunks_and_definition_give_the_same_model(name):
    tokens = torch.randint(0, 11, (2, 40))
    chunked, recurrent = make_model(name), make_model(name, backend="recurrent")
    assert (chunked(tokens)[0] - recurrent(tokens)[0]).abs().max() < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_takes_the_scan_that_the_settings_name(name, monkeypatch):
    asked = []

    def recorded(*args, **options):
        asked.append(1)
        return kernels.recurrent_scan(*args, **options)

    monkeypatch.setitem(kernels.BACKENDS, "recurrent", recorded)
    make_model(name, backend="recurrent")(torch.randint(0, 11, (2, 5)))
    assert len(asked) == 2  # once in each layer


@pytest.mark.parametrize("name", MODELS)
def test_float32_gives_what_float64_gives(name):
    model, tokens = make_model(name), torch.randint(0, 11, (3, 37))
    with torch.no_grad():
        logits, state = model(tokens)
        logits_32, state_32 = model.float()(tokens)
    for got, want in zip([logits_32, *tensors(state_32)], [logits, *tensors(state)], strict=True):
        assert (got - want).abs().max() <= FLOAT32 * want.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_computing_layers_again_in_the_backward_pass_changes_nothing(name):
    model, again = make_model(name), make_model(name, recompute=True)
    tokens, start = torch.randint(0, 11, (2, 20)), random_state(model, 2)

    def gradients(model):
        logits, state = model(tokens, start)
        loss = logits.square().sum() + sum(x.square().sum() for x in tensors(state))
        return torch.autograd.grad(loss, [*model.parameters(), *tensors(start)])

    for x, y in zip(gradients(model), gradients(again), strict=True):
        assert torch.equal(x, y)


def test_the_mamba2_layer_is_the_published_formula():
    """One layer step by step, straight from the equations; 2 groups, so the gated norm is per group."""
    model = make_model("mamba2", n_layer=1)
    w = dict(model.state_dict())
    tokens = torch.randint(0, 11, (1, 12))

    def norm(x, weight, eps=1e-5):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    H, V, K, G, d_inner = 4, 4, 6, 2, 16
    m = "layers.0.mixer."
    S = torch.zeros(H, K, V, dtype=torch.float64)
    window = torch.zeros(4, d_inner + 2 * G * K, dtype=torch.float64)
    for t in range(12):
        x = w["embedding.weight"][tokens[0, t]]
        h = w[m + "in_proj.weight"] @ norm(x, w["layers.0.norm.weight"])
        z, xBC, dt = h[:d_inner], h[d_inner : 2 * d_inner + 2 * G * K], F.softplus(h[-H:] + w[m + "dt_bias"])
        window = torch.cat([window[1:], xBC[None]])
        xBC = F.silu((window * w[m + "conv1d.weight"][:, 0].T).sum(0) + w[m + "conv1d.bias"])
        xs, Bs, Cs = xBC[:d_inner].view(H, V), xBC[d_inner:-12].view(G, K), xBC[-12:].view(G, K)
        y = torch.zeros(H, V, dtype=torch.float64)
        for head in range(H):
            g = head // (H // G)
            a = torch.exp(-dt[head] * w[m + "A_log"][head].exp())
            S[head] = a * S[head] + dt[head] * torch.outer(Bs[g], xs[head])
            y[head] = S[head].T @ Cs[g] + w[m + "D"][head] * xs[head]
        y = (y.flatten() * F.silu(z)).view(G, -1)
        y = norm(y, 1.0).flatten() * w[m + "norm.weight"]
        x = norm(x + w[m + "out_proj.weight"] @ y, w["norm_f.weight"])
        logits = (w["lm_head.weight"] @ x)[:11]
        assert (model(tokens[:, : t + 1])[0][0, -1] - logits).abs().max() < EXACT


def test_the_mamba1_layer_is_the_published_formula():
    model = make_model("mamba1", n_layer=1)
    w = {name.replace("layers.0.mixer.", ""): x for name, x in model.state_dict().items()}
    tokens = torch.randint(0, 11, (1, 12))

    def norm(x, weight, eps=1e-5):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    channels, N, R = 16, 6, 3
    h = torch.zeros(channels, N, dtype=torch.float64)
    window = torch.zeros(4, channels, dtype=torch.float64)
    for t in range(12):
        x = w["embedding.weight"][tokens[0, t]]
        u, z = (w["in_proj.weight"] @ norm(x, w["layers.0.norm.weight"])).chunk(2)
        window = torch.cat([window[1:], u[None]])
        u = F.silu((window * w["conv1d.weight"][:, 0].T).sum(0) + w["conv1d.bias"])
        dt, B, C = (w["x_proj.weight"] @ u).split([R, N, N])
        dt = F.softplus(w["dt_proj.weight"] @ dt + w["dt_proj.bias"])
        for c in range(channels):
            A = -w["A_log"][c].exp()
            h[c] = torch.exp(dt[c] * A) * h[c] + dt[c] * B * u[c]
        y = (h @ C + w["D"] * u) * F.silu(z)
        x = norm(x + w["out_proj.weight"] @ y, w["norm_f.weight"])
        logits = (w["lm_head.weight"] @ x)[:11]
        assert (model(tokens[:, : t + 1])[0][0, -1] - logits).abs().max() < EXACT


def test_the_gla_layer_is_the_published_formula():
    model = make_model("gla", n_layer=1)
    w = {name.replace("layers.0.", ""): x for name, x in model.state_dict().items()}
    tokens = torch.randint(0, 11, (1, 12))

    def norm(x, weight, eps=1e-6):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    H, K, V = 2, 2, 4
    S = torch.zeros(H, K, V, dtype=torch.float64)
    for t in range(12):
        x = w["embedding.weight"][tokens[0, t]]
        h = norm(x, w["norm.weight"])
        q, k, v, g = (w[f"mixer.{n}_proj.weight"] @ h for n in "qkvg")
        gate = w["mixer.gk_proj.1.weight"] @ (w["mixer.gk_proj.0.weight"] @ h) + w["mixer.gk_proj.1.bias"]
        a = torch.sigmoid(gate).view(H, K) ** (1 / 16)
        S = a[..., None] * S + k.view(H, K, 1) * v.view(H, 1, V)
        o = (S * q.view(H, K, 1)).sum(1) * K**-0.5
        o = norm(o, w["mixer.g_norm_swish_gate.weight"]).flatten() * F.silu(g)
        x = x + w["mixer.o_proj.weight"] @ o
        h = norm(x, w["mlp_norm.weight"])
        h = F.silu(w["mlp.gate_proj.weight"] @ h) * (w["mlp.up_proj.weight"] @ h)
        x = norm(x + w["mlp.down_proj.weight"] @ h, w["norm_f.weight"])
        assert (model(tokens[:, : t + 1])[0][0, -1] - w["lm_head.weight"] @ x).abs().max() < EXACT


@pytest.mark.parametrize(
    "d_model, n_layer, parameters",
    [(768, 24, 128_989_632), (1024, 48, 368_346_624), (1536, 48, 780_161_280), (2048, 48, 1_343_757_312)],
)
def test_official_sizes_have_the_published_number_of_parameters(d_model, n_layer, parameters):
    with torch.device("meta"):
        model = lg.LanguageModel(lg.ModelConfig(d_model=d_model, n_layer=n_layer))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.lm_head.weight is model.embedding.weight


def test_weights_start_as_the_official_ones_do():
    torch.manual_seed(0)
    mixer = lg.LanguageModel(lg.ModelConfig(vocab_size=500, d_model=256, n_layer=4)).layers[0].mixer
    dt, A = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert dt.min() >= 0.99e-4 and dt.max() <= 0.101 and A.min() >= 1 and A.max() <= 16
    bound = mixer.d_inner**-0.5 / 4**0.5  # Kaiming-uniform, divided by sqrt(n_layer)
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    for name in ("gla", "gdn"):
        model = lg.LanguageModel(lg.ModelConfig(layer=name, vocab_size=500, d_model=256, n_layer=2))
        assert all(abs(p.std() - 0.02) < 0.002 for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_states_of_other_shapes_are_refused(name):
    model = make_model(name)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    good = model.zero_state(2)
    for bad in (
        (tokens + 16,),  # outside the embedding
        (tokens - 1,),
        (tokens[:, :0],),
        (tokens[:0],),
        (tokens[0],),
        (tokens.float(),),
        (tokens, good[:1]),
        (tokens, model.zero_state(3)),
        (tokens, model.zero_state(1)),  # would broadcast
        (tokens, [good[0], good[1]._replace(scan=good[1].scan[:, :, :1])]),
    ):
        with pytest.raises((AssertionError, ValueError, IndexError, RuntimeError)):
            model(*bad)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(layer="transformer"), "unknown layer 'transformer': mamba2, gla, mamba1, gdn"),
        (dict(backend="magic"), "unknown backend 'magic'"),
    ],
)
def test_settings_that_make_no_model_are_named(settings, message):
    with pytest.raises(AssertionError, match=message):
        lg.ModelConfig(**settings)


def test_heads_that_do_not_divide_the_width_are_named():
    for settings, message in (
        (dict(layer="mamba2", d_model=8, headdim=5), "16 channels do not divide into heads of 5"),
        (dict(layer="mamba2", d_model=8, headdim=4, ngroups=3), "4 heads do not share 3 groups evenly"),
        (dict(layer="gla", d_model=8, num_heads=3), "do not divide into 3 heads"),
    ):
        with pytest.raises(AssertionError, match=message):
            lg.LanguageModel(lg.ModelConfig(**settings, n_layer=1))
