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


def test_position_ranges_are_powers_of_two_and_the_steps_between_in_units_of_T():
    assert [e // 50 for e in lg.position_edges(50, 64, False)] == [
        0,
        1,
        2,
        3,
        4,
        6,
        8,
        12,
        16,
        24,
        32,
        48,
        64,
    ]
    assert lg.position_edges(64, 3, True) == [0, 8, 16, 32, 64, 128, 192]
    assert lg.position_edges(64, 1, False) == [0, 64]


@pytest.mark.parametrize("task_name", ["echo", "text", "echo_windows"])
def test_position_wise_loss_is_the_mean_over_each_range_and_part(task_name, monkeypatch):
    """Rows come in groups; each range and part against the uncut streams, target by target."""
    monkeypatch.setattr(lg, "STREAM_ROWS", 2)
    monkeypatch.setattr(lg, "STREAM_TOKENS", 70)
    model, corpus, T, windows = make_model(), make_corpus(), 16, 5
    got = lg.position_wise(model, task_name, corpus, T, windows, rows=5, seed=3)
    function, _, parts = lg.TASKS[task_name]
    losses, part = [], []
    for start, B in ((0, 2), (2, 2), (4, 1)):
        tokens, p = lg.stream(function, lg.Rows(corpus, "val", B, True, 3 + start), T, windows)
        losses.append(plain_losses(model, tokens))
        part.append(p)
    losses, part = np.concatenate(losses), np.concatenate(part)
    assert got["T"] == T and got["edges"][0] == 0 and got["edges"][-1] == T * windows
    assert list(got["parts"]) == list(parts)
    counted = 0
    for number, name in enumerate(parts, 1):
        for i, (a, b) in enumerate(zip(got["edges"], got["edges"][1:], strict=False)):
            here = losses[:, a:b][part[:, a:b] == number]
            assert got["parts"][name]["count"][i] == here.size
            assert abs(got["parts"][name]["loss"][i] - here.mean()) < 10 * SEGMENTS * here.mean()
            counted += here.size
    assert counted == (part > 0).sum()


def test_positions_that_make_no_measure_are_named():
    model, tokens = make_model(C=11), np.zeros((2, 41), dtype=np.int64)
    for measure, message in (
        (lambda: lg.streaming_loss(model, tokens, np.zeros(40, int), segment=-1), "segment must be positive"),
        (lambda: lg.paired_gap(model, tokens, 7), "N a multiple of T 7, got 41"),
        (
            lambda: lg.state_std(model, tokens, [5, 50]),
            r"at must ascend from above 0 to at most 41, got \[5, 50",
        ),
        (lambda: lg.state_std(model, tokens, []), "at must ascend"),
        (
            lambda: lg.effective_remembrance(model, tokens, [20, 10], 30),
            "starts must ascend from above 0 to at",
        ),
        (lambda: lg.effective_remembrance(model, tokens, [31], 30), "starts must ascend"),
    ):
        with pytest.raises(ValueError, match=message):
            measure()


def test_progress_runs_to_the_end_over_all_rows(monkeypatch):
    monkeypatch.setattr(lg, "STREAM_ROWS", 2)
    said = []
    lg.position_wise(make_model(), "text", make_corpus(), 8, windows=4, rows=5, progress=said.append)
    assert said == sorted(said) and len(said) >= 3 and said[-1] == 1


def test_masked_loss_is_the_mean_over_what_is_not_masked():
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(0, 7, (2, 5))
    part = torch.tensor([[0, 1, 1, 0, 2], [0, 0, 0, 0, 2]])
    log_p = logits.log_softmax(-1)
    wanted = -sum(log_p[b, t, targets[b, t]] for b, t in ((0, 1), (0, 2), (0, 4), (1, 4))) / 4
    assert abs(lg.masked_loss(logits, targets, part) - wanted) < SEGMENTS
