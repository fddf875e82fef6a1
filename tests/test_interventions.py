"""Each intervention starts the next batch from the state it promises, and from nothing else."""

import math

import numpy as np
import pytest
import torch

import lengthgen as lg

MODELS = {
    "mamba2": dict(layer="mamba2", d_state=6, headdim=4, ngroups=2),
    "gla": dict(layer="gla", num_heads=2),
    "gdn": dict(layer="gdn", num_heads=2, headdim=4, expand_v=1.5),
}
EXACT = 1e-9  # float64: only the order of additions differs
FLOAT32 = 1e-5  # float32 sums of some hundred numbers; the difference of squares costs a digit
SIGMAS = 5  # a sample mean or std strays this many standard errors once in a million tests


def make_model(name="mamba2"):
    torch.manual_seed(0)
    config = dict(vocab_size=258, d_model=8, n_layer=2, backend="chunked") | MODELS[name]
    return lg.LanguageModel(lg.ModelConfig(**config)).double()


def make_state(B=3, H=2, K=4, V=3, channels=5, layers=2, seed=0):
    """States whose every layer, head and channel has a mean and a std of its own."""
    rng = torch.Generator().manual_seed(seed)
    state = []
    for _ in range(layers):
        conv, scan = torch.randn(B, 3, channels, generator=rng), torch.randn(B, H, K, V, generator=rng)
        scale, shift = torch.rand(2, 1, H, 1, 1, generator=rng) + 0.5
        conv_scale, conv_shift = torch.rand(2, 1, 1, channels, generator=rng) + 0.5
        state.append(lg.LayerState(conv * conv_scale + conv_shift, scan * scale + shift))
    return state


def next_state(name, state, stats=None, seed=0, **options):
    function, _ = lg.INTERVENTIONS[name]
    rng = torch.Generator().manual_seed(seed)
    return lg.next_initial_state(function, state, stats or lg.StateStatistics(), rng, **options)


def tensors(state):
    return [x for layer in state for x in layer if x is not None]


def test_zero_starts_from_zeros():
    state = make_state()
    for x, like in zip(tensors(next_state("zero", state)), tensors(state), strict=True):
        assert torch.equal(x, torch.zeros_like(like))


def test_random_noise_is_normal_with_the_std_asked_for_in_every_layer_and_head():
    rng = torch.Generator().manual_seed(0)
    noise = lg.random_noise(make_state(B=5000), lg.StateStatistics(), rng, std=0.3)
    for layer in noise:
        for x in [layer.conv, *layer.scan.unbind(1)]:
            n = x.numel()
            assert abs(x.mean()) < SIGMAS * 0.3 / math.sqrt(n)
            assert abs(x.std() - 0.3) < SIGMAS * 0.3 / math.sqrt(2 * n)
            assert abs((x.abs() < 0.3).double().mean() - 0.6827) < SIGMAS * math.sqrt(0.22 / n)  # normal
    a, b = (next_state("random_noise", make_state(), seed=seed) for seed in (1, 2))
    assert not torch.equal(a[0].scan, b[0].scan) and not torch.equal(a[0].scan[0], a[0].scan[1])


def test_statistics_are_those_of_float64_per_layer_head_and_channel():
    """Against sums in float64: the first batch counts in full, then 1/n, later `rate`."""
    stats, mean, square = lg.StateStatistics(rate=0.2), None, None
    for n in range(1, 9):
        state = make_state(seed=n)
        stats.update(state)
        batch = []
        for layer in state:
            conv, scan = layer.conv.double().numpy(), layer.scan.double().numpy()
            batch.append([scan[:, h] for h in range(2)] + [conv[:, :, c] for c in range(5)])
        new = np.array([[x.mean() for x in layer] for layer in batch])
        new_square = np.array([[(x * x).mean() for x in layer] for layer in batch])
        w = max(0.2, 1 / n)
        mean = new if n == 1 else mean + w * (new - mean)
        square = new_square if n == 1 else square + w * (new_square - square)
        for i, (m, s) in enumerate(zip(stats.mean, stats.std, strict=True)):
            assert m.scan.shape == (1, 2, 1, 1) and m.conv.shape == (1, 1, 5)
            got_mean = [*m.scan.flatten().tolist(), *m.conv.flatten().tolist()]
            got_std = [*s.scan.flatten().tolist(), *s.conv.flatten().tolist()]
            assert np.allclose(got_mean, mean[i], atol=FLOAT32)
            assert np.allclose(got_std, np.sqrt(square[i] - mean[i] ** 2), atol=FLOAT32)


def test_fitted_noise_has_the_mean_and_std_of_the_final_states():
    state = make_state(B=4000, seed=1)
    noise = next_state("fitted_noise", state)  # the very first batch: its statistics are already those used
    for fitted, real in zip(noise, state, strict=True):
        pieces = [(fitted.scan[:, h], real.scan[:, h]) for h in range(2)]
        pieces += [(fitted.conv[..., c], real.conv[..., c]) for c in range(5)]
        for a, b in pieces:
            n, std = a.numel(), b.std()
            assert abs(a.mean() - b.mean()) < SIGMAS * std / math.sqrt(n)
            assert abs(a.std() - std) < SIGMAS * std / math.sqrt(2 * n)
            assert abs(((a - b) / std).std() - math.sqrt(2)) < 0.05  # new numbers, not those of the state


def test_fitted_noise_of_a_layer_without_convolution_has_none():
    state = [layer._replace(conv=None) for layer in make_state()]
    assert all(layer.conv is None for layer in next_state("fitted_noise", state))


@pytest.mark.parametrize("name", ["state_passing", "tbtt"])
def test_state_passing_hands_over_the_final_state_itself_without_a_gradient(name):
    model = make_model()
    _, final = model(torch.randint(0, 258, (3, 7)))
    state = next_state(name, final)
    for x, y in zip(tensors(state), tensors(final), strict=True):
        assert x.data_ptr() == y.data_ptr() and torch.equal(x, y)
        assert y.requires_grad and not x.requires_grad
    tokens = torch.randint(0, 258, (3, 7))
    constant = lg.map_state(lambda x: torch.tensor(x.numpy()), state)
    gradients = [
        torch.autograd.grad(model(tokens, start)[0].square().sum(), [*model.parameters()])
        for start in (state, constant)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", lg.INTERVENTIONS)
@pytest.mark.parametrize("model_name", MODELS)
def test_every_intervention_works_for_every_model_and_leaves_the_final_state_alone(name, model_name):
    model = make_model(model_name)
    tokens = torch.randint(0, 258, (3, 7))
    _, final = model(tokens)
    before = [x.detach().clone() for x in tensors(final)]
    for carry in ("full", "scan"):
        state = next_state(name, final, carry=carry, zero_prob=0.5)
        for x, y in zip(tensors(state), tensors(final), strict=True):
            assert (x.shape, x.dtype, x.requires_grad) == (y.shape, y.dtype, False)
        assert torch.isfinite(model(tokens, state)[0]).all()
    assert all(torch.equal(x, y) for x, y in zip(before, tensors(final), strict=True))


def test_only_tbtt_has_rows_that_continue():
    assert [name for name, (_, continues) in lg.INTERVENTIONS.items() if continues] == ["tbtt"]


def test_carrying_the_scan_zeroes_the_convolution_and_nothing_else():
    state = make_state()
    for name in ("state_passing", "fitted_noise", "random_noise"):
        full, scan = (next_state(name, state, carry=carry) for carry in ("full", "scan"))
        for a, b in zip(full, scan, strict=True):
            assert torch.equal(a.scan, b.scan) and a.scan.any()
            assert a.conv.any() and torch.equal(b.conv, torch.zeros_like(a.conv))


def test_zero_starts_are_drawn_for_each_row_and_hold_for_all_its_layers():
    state = make_state(B=1000)
    started = next_state("state_passing", state, zero_prob=0.3)
    zeroed = torch.stack([(x.flatten(1) == 0).all(1) for x in tensors(started)])
    assert (zeroed == zeroed[0]).all()  # a row starts from zeros in every layer or in none
    assert abs(zeroed[0].double().mean() - 0.3) < SIGMAS * math.sqrt(0.3 * 0.7 / 1000)
    for x, y in zip(tensors(started), tensors(state), strict=True):
        assert torch.equal(x[~zeroed[0]], y[~zeroed[0]])  # and the other rows are untouched
    overflown = lg.map_state(lambda x: x.clone().fill_(torch.inf), state)  # zeros, not 0 * infinity
    assert not any(x.any() for x in tensors(next_state("state_passing", overflown, zero_prob=1.0)))
    for zero_prob, kept in ((0.0, True), (1.0, False)):
        rows = next_state("state_passing", state, zero_prob=zero_prob)[0].scan.flatten(1)
        assert rows.any(1).all() if kept else not rows.any()


def test_an_unknown_carry_is_named():
    with pytest.raises(AssertionError, match="carry 'half'"):
        next_state("zero", make_state(), carry="half")


def numbered_corpus(documents, length):
    """Every token of the text is different, so that a place in it can be read off."""
    words = documents * (length + 1)
    tokens = np.arange(words)
    tokens[:: length + 1] = words  # <bos>
    return lg.Corpus("numbers", tokens, tokens, words)


def test_continuing_rows_of_text_begin_with_the_token_where_they_ended():
    rows = lg.Rows(numbered_corpus(1, 999), "train", 4, True, seed=0)
    ends = None
    for _ in range(100):
        tokens, _ = lg.text(rows, 7)
        at = np.searchsorted(np.arange(1000), np.where(tokens == 1000, 0, tokens))
        if ends is not None:
            wrapped = ends[:, 0] + 8 > 1000  # no whole window is left: from the start again
            assert (at[:, 0] == np.where(wrapped, 0, ends[:, 0])).all()
            assert (tokens[~wrapped, 0] == ends[~wrapped, 1]).all()
        ends = np.stack([at[:, -1], tokens[:, -1]], axis=1)


def test_continuing_rows_of_echo_go_on_with_the_next_passage_of_the_document():
    corpus = numbered_corpus(5, 50)
    rows = lg.Rows(corpus, "train", 4, True, seed=0)
    before, same_document = None, 0
    for _ in range(60):
        tokens, _ = lg.echo(rows, 14)  # passages of 6
        passage = tokens[:, 1:7]
        assert (passage // 51 == passage[:, :1] // 51).all()  # within one document
        if before is not None:
            for old, new in zip(before, passage[:, 0], strict=True):
                left = 50 - old % 51  # tokens of the document after `old`
                document = old // 51 if left >= 6 else (old // 51 + 1) % 5
                assert new == (old + 1 if left >= 6 else document * 51 + 1)
                same_document += left >= 6
        before = passage[:, -1]
    assert same_document > 100


@pytest.mark.parametrize("name", MODELS)
def test_state_passing_over_continuing_rows_runs_the_long_stream(name):
    """Without updates of the weights: windows that hand their state over lose what the uncut stream loses."""
    model, T, windows = make_model(name), 9, 6
    tokens = np.random.default_rng(0).integers(0, 257, 5000)
    corpus = lg.Corpus("random", tokens, tokens, 256)
    long, _ = lg.stream(lg.text, lg.Rows(corpus, "train", 3, True, seed=0), T, windows)
    long = torch.from_numpy(long)
    uncut = torch.nn.functional.cross_entropy(
        model(long[:, :-1])[0].flatten(0, 1), long[:, 1:].flatten(), reduction="none"
    ).view(3, windows, T)
    rows, state = lg.Rows(corpus, "train", 3, True, seed=0), None
    for i in range(windows):
        window = torch.from_numpy(lg.text(rows, T)[0])
        logits, final = model(window[:, :-1], state)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none"
        )
        assert (loss.view(3, T) - uncut[:, i]).abs().max() < EXACT
        state = next_state("tbtt", final)
