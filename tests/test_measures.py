"""Streaming counts every target once, loses what the uncut stream loses, and needs memory for a segment."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import lengthgen as lg

ROOT = pathlib.Path(__file__).parents[1]
MODELS = {
    "mamba2": dict(layer="mamba2", d_state=6, headdim=4, ngroups=2),
    "gla": dict(layer="gla", num_heads=2),
    "gdn": dict(layer="gdn", num_heads=2, headdim=4, expand_v=1.5),
}
EXACT = 1e-9  # float64: only the order of additions differs
SEGMENTS = 1e-6  # the promise for float32, relative: its rounding is 6e-8, and sums are in float64
FLAT = 1.05  # memory: what 900,000 more tokens may add: 12 MB or so, of 250; their logits would be 230 MB


def make_model(name="mamba2", C=258):
    torch.manual_seed(0)
    config = dict(vocab_size=C, d_model=8, n_layer=2, backend="chunked") | MODELS[name]
    model = lg.LanguageModel(lg.ModelConfig(**config))
    with torch.no_grad():  # far from uniform predictions, so that no two targets lose the same
        model.lm_head.weight *= 20
    return model


def make_corpus(N=3000):
    tokens = np.random.default_rng(0).integers(97, 123, N)
    tokens[:: N // 3] = 256
    return lg.Corpus("letters", tokens, tokens, 256)


def plain_losses(model, tokens):
    """(B, N) losses of every target, the whole stream at once in float64, straight from the definition."""
    tokens = torch.from_numpy(tokens)
    with torch.no_grad():
        logits, _ = model.double()(tokens[:, :-1])
    losses = torch.logsumexp(logits, -1) - logits.gather(-1, tokens[:, 1:, None])[..., 0]
    model.float()
    return losses.numpy()


def test_every_target_is_counted_once():
    model, tokens = make_model(C=11), np.random.default_rng(0).integers(0, 11, (3, 38))
    for segment in (1, 5, 37, 1000):
        total, count = lg.streaming_loss(model, tokens, np.arange(37), segment)
        assert count.tolist() == [3] * 37  # the first target too, and the last
        assert np.allclose(total.numpy(), plain_losses(model, tokens).sum(0), rtol=SEGMENTS * 10)


def test_targets_are_counted_in_their_own_bin_or_in_none():
    model, rng = make_model(C=11), np.random.default_rng(0)
    tokens, bins = rng.integers(0, 11, (3, 38)), rng.integers(-1, 4, (3, 37))
    total, count = lg.streaming_loss(model.double(), tokens, bins, segment=10)
    losses = plain_losses(model, tokens)
    for i in range(4):
        assert count[i] == (bins == i).sum()
        assert abs(total[i] - losses[bins == i].sum()) < EXACT * 100


@pytest.mark.parametrize("name", MODELS)
def test_streaming_gives_the_loss_of_the_uncut_stream_for_any_segment(name):
    model, tokens = make_model(name, C=11), np.random.default_rng(0).integers(0, 11, (2, 301))
    bins = np.arange(300) // 100
    exact = plain_losses(model, tokens).reshape(2, 3, 100).sum((0, 2))
    for segment in (1, 7, 100, 128, 299, 300, 301):
        total, _ = lg.streaming_loss(model.double(), tokens, bins, segment)
        assert (abs(total.numpy() - exact) < EXACT * exact).all()
        total, _ = lg.streaming_loss(model.float(), tokens, bins, segment)
        assert (abs(total.numpy() - exact) < SEGMENTS * exact).all(), segment


def test_streaming_starts_from_the_state_it_is_given():
    model, tokens = make_model(C=11).double(), np.random.default_rng(0).integers(0, 11, (2, 61))
    with torch.no_grad():
        _, state = model(torch.from_numpy(tokens[:, :20]))
    total, _ = lg.streaming_loss(model, tokens[:, 20:], np.zeros(40, dtype=int), 7, state)
    assert abs(total[0] - plain_losses(model, tokens)[:, 20:].sum()) < EXACT * 100


MEMORY = """
import os, resource, sys
import numpy as np
import lengthgen as lg

def peak():
    if os.path.exists("/proc/self/status"):  # where getrusage also counts the program that started this one
        return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

model = lg.LanguageModel(lg.ModelConfig(
    vocab_size=64, d_model=8, n_layer=1, d_state=4, headdim=16))
tokens = np.memmap(sys.argv[1], dtype=np.uint16, mode="r").reshape(20, -1)
for N in (5_000, 50_000):
    total, count = lg.streaming_loss(model, tokens[:, : N + 1], np.broadcast_to(0, N), segment=500)
    assert count.item() == 20 * N
    print(peak())
"""


def test_a_million_tokens_need_the_memory_of_a_hundred_thousand(tmp_path):
    np.random.default_rng(0).integers(0, 64, 20 * 50_001, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "tokens.bin"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    short, long = (int(x) for x in done.stdout.split()[-2:])
    assert long < FLAT * short


@pytest.mark.parametrize("task_name, T, windows", [("echo", 16, 5), ("text", 16, 5), ("text", 16, 1)])
def test_position_wise_loss_is_the_mean_over_each_range_and_part(task_name, T, windows):
    """Each range and part against the uncut streams, target by target."""
    model, corpus = make_model(), make_corpus()
    got = lg.position_wise(model, task_name, corpus, T, 5, windows, seed=3)
    function, _, parts, _ = lg.TASKS[task_name]
    tokens, part = lg.stream(function, lg.Rows(corpus, "val", 5, True, 3), T, windows)
    losses = plain_losses(model, tokens)
    ends = [1, 2, 3, 4, 5] if windows == 5 else [1]
    assert got["x"] == (ends if task_name == "echo" else [1 / 8, 1 / 4, 1 / 2, *ends])
    assert list(got)[1:] == list(parts)
    for number, name in enumerate(parts, 1):
        start = 0
        for loss, end in zip(got[name], got["x"], strict=True):
            stop = int(end * T)
            wanted = losses[:, start:stop][part[:, start:stop] == number].mean()
            assert abs(loss - wanted) < 10 * SEGMENTS * wanted
            start = stop


def test_position_ranges_are_powers_of_two_and_the_steps_between_in_units_of_T():
    got = lg.position_wise(make_model(), "echo", make_corpus(), 16, 1, windows=64)
    assert got["x"] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]


@pytest.mark.parametrize("task_name", ["text", "echo", "mixed"])
def test_position_wise_ends_where_the_text_does(task_name):
    model, corpus, T = make_model(), make_corpus(200), 16
    task, _, names, _ = lg.TASKS[task_name]
    _, part = lg.stream(task, lg.Rows(corpus, "val", 5, True, seed=0), T, 64)
    windows = part.shape[1] // T
    got = lg.position_wise(model, task_name, corpus, T, 5, windows=64)
    assert 8 < windows < 32 and got["x"][-1] == windows
    short = lg.position_wise(model, task_name, corpus, T, 5, windows=windows)
    assert got["x"] == short["x"]
    for name in names:
        assert np.isfinite(got[name]).all() and np.allclose(got[name], short[name], rtol=SEGMENTS)


def test_a_range_without_targets_of_a_part_is_no_number_and_every_list_is_as_long(monkeypatch):
    def no_echo(rows, T):
        tokens, part = lg.echo(rows, T)
        return tokens, np.where(part == 2, 0, part)

    monkeypatch.setitem(lg.TASKS, "echo", (no_echo, 16, ("text", "echo"), 0.0))
    got = lg.position_wise(make_model(), "echo", make_corpus(), 16, 1, windows=2)
    assert np.isfinite(got["text"]).all() and np.isnan(got["echo"]).all()
    assert len(got["x"]) == len(got["text"]) == len(got["echo"]) == 2


def test_positions_that_make_no_measure_are_named():
    model, tokens = make_model(C=11), np.zeros((2, 41), dtype=np.int64)
    for measure, message in (
        (lambda: lg.streaming_loss(model, tokens, np.zeros(40, int), segment=-1), "segment must be positive"),
        (lambda: lg.paired_gap(model, tokens, 7), "N a multiple of T 7, got 41"),
        (lambda: lg.state_std(model, tokens, [5, 50]), r"at is \[5, 50\]"),
        (lambda: lg.state_std(model, tokens, [5, 5]), r"at is \[5, 5\]"),
        (lambda: lg.effective_remembrance(model, tokens, [20, 10], 30), r"\[20, 10\], end 30"),
        (lambda: lg.effective_remembrance(model, tokens, [31], 30), r"\[31\], end 30"),
    ):
        with pytest.raises(AssertionError, match=message):
            measure()


def test_progress_runs_to_the_end():
    shares = []
    lg.position_wise(make_model(), "text", make_corpus(), 800, 50, windows=2, progress=shares.append)
    assert shares == sorted(shares) and len(shares) >= 3 and shares[-1] == 1


def test_prefill_generation_and_state_std_compute_logits_of_the_last_position_alone():
    """Counts the rows that pass through the output layer, which costs most where there are many words."""
    model = make_model(C=11)
    tokens = np.random.default_rng(0).integers(0, 11, (200, 150))
    segments = -(-150 // lg.segment_for(200))
    assert segments > 1
    shapes = []
    model.lm_head.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    for measure, calls in (
        (lambda: lg.prefill(model, tokens), segments),
        (lambda: list(lg.generate(model, tokens, 5)), segments + 4),
        (lambda: lg.state_std(model, tokens, [60, 149]), 3),
    ):
        shapes.clear()
        measure()
        assert set(shapes) == {(200, 1, 8)} and len(shapes) == calls
    # where the answer is at the end, the logits before it are left out
    shapes.clear()
    asked = np.zeros((200, 149), bool)
    asked[7, 140:] = True
    right = lg.accuracy(model, tokens, asked)
    assert sum(shape[1] for shape in shapes if shape[1] > 1) == 9
    with torch.no_grad():
        logits, state = model(torch.from_numpy(tokens))
    wanted = logits[7, 140:149].argmax(-1) == torch.from_numpy(tokens[7, 141:])
    assert torch.equal(right[7, 140:], wanted.double()) and right.isnan().sum() == 200 * 149 - 9
    last, state_of_last = lg.prefill(model, tokens)
    assert torch.allclose(last, logits[:, -1], rtol=0, atol=SEGMENTS * logits.abs().max())
    for layer, same_layer in zip(state, state_of_last, strict=True):
        assert torch.allclose(layer.scan, same_layer.scan, atol=SEGMENTS)


@pytest.mark.parametrize("answer", ["garden", "Garden", "GARDEN"])
@pytest.mark.parametrize(
    "question", ["Where was the milk before the kitchen?", "WHERE WAS IT BEFORE THE KITCHEN?"]
)
@pytest.mark.parametrize(
    "output", ["garden", "The Garden", "In the KITCHEN, before that the gArDeN. The office."]
)
def test_upper_and_lower_case_change_no_score_of_babilong(output, question, answer):
    assert lg.babilong_score(output, answer, question, qa=3)
    assert not lg.babilong_score(output.replace("a", "o").replace("A", "O"), answer, question, qa=3)
    assert lg.babilong_score("to MARY<Example> Bill", "mary", "Who did FRED give it to?", qa=5)
    assert not lg.babilong_score("to MARY, Bill", "mary", "Who did FRED give it to?", qa=5)


def test_masked_loss_is_the_mean_over_what_is_not_masked():
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(0, 7, (2, 5))
    part = torch.tensor([[0, 1, 1, 0, 2], [0, 0, 0, 0, 2]])
    log_p = logits.log_softmax(-1)
    wanted = -sum(log_p[b, t, targets[b, t]] for b, t in ((0, 1), (0, 2), (0, 4), (1, 4))) / 4
    assert abs(lg.masked_loss(logits, targets, part) - wanted) < SEGMENTS


def test_with_another_decay_a_model_forgets_as_much_as_asked_for_and_then_is_itself_again():
    model = make_model("gla", C=11).double()
    tokens = torch.randint(0, 11, (2, 9))
    with torch.no_grad():
        before, _ = model(tokens)
        alone, _ = model(tokens.reshape(-1, 1))  # every token on its own
        with lg.changed_decay(lambda log_a: torch.full_like(log_a, -torch.inf)):
            nothing_kept, _ = model(tokens)
        after, _ = model(tokens)
    assert (nothing_kept - alone.view(2, 9, 11)).abs().max() < EXACT
    assert torch.equal(before, after) and not torch.allclose(before, nothing_kept)


@pytest.mark.parametrize("name", ["mamba2", "gla"])  # the delta rule overwrites, too
def test_the_decay_is_what_remains_of_an_initial_state(name):
    model = make_model(name, C=11).double()
    tokens = torch.randint(0, 11, (2, 9))
    zeros = model.zero_state(2)
    S = torch.randn_like(zeros[0].scan)
    with torch.no_grad():
        _, with_S = model(tokens, [zeros[0]._replace(scan=S), *zeros[1:]])
        _, without = model(tokens, zeros)
        share = lg.decays(model, tokens)[0].sum(1).exp()  # (B, H) or (B, H, K)
    share = share[..., None, None] if name == "mamba2" else share[..., None]
    assert (with_S[0].scan - without[0].scan - share * S).abs().max() < EXACT
