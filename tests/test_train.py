"""Training from the command line: every choice runs, stops, goes on and fails the way train.py says."""

import functools
import itertools
import json
import math
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import lengthgen as lg
import train

ROOT = pathlib.Path(__file__).parents[1]
FLOAT32 = 1e-5  # float32 losses of windows against those of the uncut stream
RANKS = 1e-4  # weights after 3 steps of 1e-3: the order of additions, which AdamW's division magnifies
ACCUMULATED = 1e-5  # after 5 steps of 1e-3 and 3e-3
FILES = ["checkpoint.pt", "lock", "loss_by_position.json", "metrics.jsonl", "position_wise.png"]


def two_rows(position_wise):
    return lambda model, task, corpus, T, B, **options: position_wise(model, task, corpus, T, 2, **options)


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Makes training a matter of milliseconds; a folder with a text and a place for the runs."""
    monkeypatch.setattr(lg, "position_wise", two_rows(lg.position_wise))
    monkeypatch.setitem(train.RECIPES, "base", train.RECIPES["base"] | dict(steps=2, batch=2))
    monkeypatch.setitem(train.TINY_MODELS, "mamba2", dict(d_model=8, n_layer=2, d_state=4, headdim=8))
    monkeypatch.setitem(train.TINY_MODELS, "mamba1", dict(d_model=8, n_layer=2, d_state=4))
    monkeypatch.setitem(train.TINY_MODELS, "gla", dict(d_model=8, n_layer=2, num_heads=2))
    monkeypatch.chdir(tmp_path)
    words = np.random.default_rng(0).choice("one two three four five six seven".split(), 1000)
    pathlib.Path("text.txt").write_text(" ".join(words))
    return tmp_path / "runs"


def run(*options, T=8, steps=3):
    train.main(f"--data text.txt --T {T} --steps {steps} --batch 2".split() + [str(x) for x in options])


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same(a, b):
    """Equal bit for bit, whatever is in it."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Stopped(Exception):
    """Stands for a power cut."""


def stop_after(monkeypatch, step, steps, save_every):
    """The next run dies after `step`, past the checkpoint at a multiple of save_every."""
    monkeypatch.setattr(train, "SAVE_EVERY", save_every)
    print_rank0 = train.print_rank0

    def stopping(message):
        if message.startswith(f"  step {step:5}/{steps} "):
            monkeypatch.setattr(train, "print_rank0", print_rank0)
            raise Stopped
        print_rank0(message)

    monkeypatch.setattr(train, "print_rank0", stopping)


# --------------------------------------------------------------------------------------------------
# It runs


@pytest.mark.parametrize("model", train.TINY_MODELS)
def test_every_intervention_trains_every_model_and_fills_its_folder(model, out, capsys):
    for name in lg.INTERVENTIONS:
        run("--intervention", name, "--model", model)
        folder = out / f"{model}-echo-{name}-s0"
        assert sorted(os.listdir(folder)) == FILES
        lines = metrics(folder)
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert all(math.isfinite(line["loss"]) for line in lines)
        assert [line["tokens"] for line in lines] == [16, 32, 48]
        saved = lg.load_checkpoint(folder)
        assert saved["settings"]["intervention"] == name and saved["versions"]["torch"] == torch.__version__
        printed = capsys.readouterr().out
        assert "text: loss (nats per token) by position (T)" in printed and "echo: loss" in printed
        row = next(line for line in printed.splitlines() if line.startswith(f"{train.style_of(name)[0]:26} "))
        assert len(row[26:].split()) == 12 and "step     3/3  100%" in printed
        assert " tokens/s " in printed and " left\n" in printed
    assert sorted(os.listdir(out / f"{model}-echo-base-s0")) == [f for f in FILES if not f.endswith("png")]


def test_interventions_lead_to_different_weights(out, monkeypatch):
    monkeypatch.setattr(train, "draw", lambda *_: None)  # which takes most of the time
    weights = {}
    for name in lg.INTERVENTIONS:
        for carry in ("full", "scan"):
            run("--intervention", name, "--carry", carry, "--noise-std", 1)
            folder = out / f"mamba2-echo-{name}{'-scan' if carry == 'scan' else ''}-s0"
            weights[name, carry] = lg.load_checkpoint(folder)["model"]["embedding.weight"]
    for a in weights:
        for b in weights:
            equal = a == b or {a, b} == {("zero", "full"), ("zero", "scan")}
            assert torch.equal(weights[a], weights[b]) == equal, (a, b)


def test_the_state_that_the_next_step_starts_from_is_as_the_options_say(out):
    """Read from the checkpoint: the noise has its std, rows start from zeros, the convolution is left out."""
    options = ["--intervention", "random_noise", "--batch", 100, "--carry", "scan"]
    run(*options, "--noise-std", 0.7, "--zero-prob", 0.4)
    saved = lg.load_checkpoint(out / "mamba2-echo-random_noise-scan-s0")
    for conv, scan in saved["carried"][0]["states"][0]:
        zeroed = (scan.flatten(1) == 0).all(1)
        assert abs(zeroed.double().mean() - 0.4) < 5 * math.sqrt(0.4 * 0.6 / 100)
        n = scan[~zeroed].numel()
        assert abs(scan[~zeroed].std() - 0.7) < 5 * 0.7 / math.sqrt(2 * n)
        assert not conv.any()


@pytest.mark.parametrize("task, T", [("text", 8), ("copy", 43), ("echo", 16)])
def test_every_task_trains_and_is_measured(task, T, out, monkeypatch):
    drawn = []
    monkeypatch.setattr(train, "print_table", drawn.extend)
    run("--intervention", "tbtt", "--task", task, "--accumulate", 2, T=T)
    folder = out / f"mamba2-{task}-tbtt-s0"
    assert sorted(os.listdir(folder)) == FILES and len(metrics(folder)) == 3
    assert [panel["title"] for panel in drawn] == list(lg.TASKS[task][2])
    for panel in drawn:
        for x, values in panel["curves"].values():
            assert np.isfinite(np.array(values)[0, np.array(x) >= 1]).all()


def test_without_an_intervention_only_the_base_is_made(out):
    run()
    assert os.listdir(out) == ["mamba2-echo-base-s0"]
    assert sorted(os.listdir(out / "mamba2-echo-base-s0")) == FILES
    saved = lg.load_checkpoint(out / "mamba2-echo-base-s0")
    assert saved["settings"]["intervention"] == "zero" and saved["step"] == 3


def test_init_starts_from_the_weights_T_and_task_of_a_checkpoint(out, monkeypatch):
    run("--task", "text", "--out", out / "first", T=12)
    base = out / "first" / "mamba2-text-base-s0"
    monkeypatch.setattr(train, "learning_rate", lambda *_: 0.0)
    train.main(f"--data text.txt --steps 2 --batch 2 --intervention zero --init {base} --out {out}".split())
    saved = lg.load_checkpoint(out / "mamba2-text-zero-s0")
    assert (saved["settings"]["T"], saved["settings"]["task"]) == (12, "text")
    assert same(saved["model"], lg.load_checkpoint(base)["model"])
    assert sorted(os.listdir(out)) == ["first", "mamba2-text-zero-s0"]  # no base of its own


def test_tbtt_trains_on_the_uncut_stream(out, monkeypatch):
    """With the weights held still, the losses in metrics.jsonl are those of one long pass in each slot."""
    monkeypatch.setattr(train, "learning_rate", lambda *_: 0.0)
    options = ["--intervention", "tbtt", "--task", "text", "--zero-prob", 0, "--accumulate", 2]
    run(*options, "--seed", 1, T=8, steps=5)
    model = lg.LanguageModel.from_pretrained(out / "mamba2-text-tbtt-s1").double()
    losses = []
    for seed in (1000, 1000 + 10**6):
        rows = lg.Rows(lg.load_corpus(["text.txt"]), "train", 2, True, seed=seed)
        tokens = torch.from_numpy(lg.stream(lg.text, rows, 8, 5)[0])
        assert rows.at.min() >= 40  # no row came to the end of the text and began again
        with torch.no_grad():
            log_p = model(tokens[:, :-1])[0].log_softmax(-1)
        losses.append(-log_p.gather(-1, tokens[:, 1:, None]).view(2, 5, 8))
    for line, loss in zip(metrics(out / "mamba2-text-tbtt-s1"), torch.cat(losses).mean((0, 2)), strict=True):
        assert abs(line["loss"] - loss) < FLOAT32


def test_the_learning_rate_warms_up_over_a_tenth_then_falls_as_a_cosine():
    rates = [train.learning_rate(step, 500, 1e-3) for step in range(500)]
    for step in range(50):
        assert rates[step] == pytest.approx(1e-3 * (step + 1) / 50)
    assert max(rates) == rates[49] == rates[50] == 1e-3
    assert rates[50 + 225] == pytest.approx((1e-3 + 1e-5) / 2)  # half-way
    assert all(a > b for a, b in itertools.pairwise(rates[50:]))
    assert 1e-5 < rates[-1] < 1.1e-5
    assert train.learning_rate(0, 1, 1e-3) == 1e-3


def test_a_rate_that_is_held_falls_as_a_cosine_after_its_share_of_the_steps():
    rates = [train.learning_rate(step, 200, 1e-3, hold=0.85) for step in range(200)]
    assert rates[:20] == [train.learning_rate(step, 200, 1e-3) for step in range(20)]
    assert set(rates[20:171]) == {1e-3}
    assert rates[185] == pytest.approx((1e-3 + 1e-5) / 2)  # half-way
    assert all(a > b for a, b in itertools.pairwise(rates[170:]))


def test_the_learning_rate_is_that_of_the_schedule(out):
    run("--lr", 1e-3, steps=20)
    wanted = [train.learning_rate(step, 20, 1e-3) for step in range(20)]
    assert [line["lr"] for line in metrics(out / "mamba2-echo-base-s0")] == wanted


@pytest.mark.parametrize("model", train.TINY_MODELS)
def test_norms_biases_and_the_vectors_of_the_recurrence_do_not_decay(model, out):
    config = lg.ModelConfig(layer=model, vocab_size=258, **train.TINY_MODELS[model])
    model = lg.LanguageModel(config)
    groups = train.make_optimizer(model).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        free = "norm" in name or name.endswith(("bias", "A_log", ".D"))
        assert decay[id(p)] == (0 if free else train.WEIGHT_DECAY), name


# --------------------------------------------------------------------------------------------------
# It stops and goes on


@pytest.mark.parametrize("name", [*lg.INTERVENTIONS, None])
def test_twenty_steps_are_ten_and_a_stop_and_ten_bit_for_bit(name, out, monkeypatch):
    options = ["--batch", 4, "--accumulate", 2]
    options += ["--intervention", name, "--zero-prob", 0.3] if name else []
    options += ["--carry", "scan"] if name == "tbtt" else []
    options += ["--model", "gla"] if name == "fitted_noise" else []
    monkeypatch.setattr(train, "SAVE_EVERY", 10)
    run(*options, "--out", out / "a", steps=20)
    stop_after(monkeypatch, 15, 20, save_every=10)
    with pytest.raises(Stopped):
        run(*options, "--out", out / "b", steps=20)
    folder = next(p.name for p in (out / "a").iterdir() if p.name.endswith("base-s0") != bool(name))
    assert lg.load_checkpoint(out / "b" / folder)["step"] == 10
    assert len(metrics(out / "b" / folder)) == 15  # five of them will be made again
    with open(out / "b" / folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 16, "lo')  # the power went in the middle of a line
    run(*options, "--out", out / "b", steps=20)
    a, b = (lg.load_checkpoint(out / x / folder) for x in "ab")
    for key in ("config", "step", "model", "optimizer", "carried"):
        assert same(a[key], b[key]), key
    # two batches a step for the intervention that uses statistics, none for the others
    assert a["step"] == 20 and a["carried"][0]["stats"]["count"] == (40 if name == "fitted_noise" else 0)
    losses = [[line["loss"] for line in metrics(out / x / folder)] for x in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 20
    seconds = [line["seconds"] for line in metrics(out / "b" / folder)]
    assert seconds == sorted(seconds)


def test_a_finished_run_is_found_and_not_repeated(out, monkeypatch, capsys):
    run("--intervention", "tbtt")
    folders = [out / "mamba2-echo-base-s0", out / "mamba2-echo-tbtt-s0"]
    kept = ["checkpoint.pt", "metrics.jsonl"]
    before = [(folder / f).read_bytes() for folder in folders for f in kept]
    first = capsys.readouterr().out

    def no_training(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(lg, "masked_loss", no_training)
    run("--intervention", "tbtt")
    assert before == [(folder / f).read_bytes() for folder in folders for f in kept]
    second = capsys.readouterr().out
    table = [line for line in first.splitlines() if line.startswith(("base ", "TBTT "))]
    assert table == [line for line in second.splitlines() if line.startswith(("base ", "TBTT "))]
    assert len(table) == 4


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: c["optimizer"]["state"][1].update(exp_avg=torch.zeros(3)), "exp_avg of .* is damaged"),
        (lambda c: c["optimizer"]["state"].pop(1), "KeyError"),
        (lambda c: c["optimizer"]["state"][0]["exp_avg"].fill_(math.nan), "exp_avg of .* is damaged"),
        (lambda c: c["optimizer"]["state"][0]["exp_avg_sq"].fill_(math.inf), "exp_avg_sq of .* is damaged"),
        (lambda c: c.update(step=0), "it claims to be at step 0"),
        (lambda c: c.update(step=10**7), "it claims to be at step 10000000"),
        (lambda c: c.update(carried=[]), "IndexError"),
        (lambda c: c["carried"][0].update(stats=5), "TypeError"),
        (lambda c: c["carried"][0]["rows"].append(c["carried"][0]["rows"][0]), "zip"),
    ],
)
def test_a_damaged_checkpoint_is_not_gone_on_from(spoil, message, out, monkeypatch):
    stop_after(monkeypatch, 3, 3, save_every=2)
    with pytest.raises(Stopped):
        run()
    file = out / "mamba2-echo-base-s0" / lg.CHECKPOINT
    checkpoint = torch.load(file)
    spoil(checkpoint)
    torch.save(checkpoint, file)
    before = snapshot(out)
    with pytest.raises(ValueError, match=f"cannot be read as a run of train.py: .*{message}") as caught:
        run()
    assert snapshot(out) == before and "\n" not in str(caught.value)


def test_another_run_in_the_folder_is_not_written_over(out, monkeypatch):
    run("--intervention", "tbtt")
    stop_after(monkeypatch, 3, 3, save_every=2)
    with pytest.raises(Stopped):
        run("--intervention", "zero")
    run("--intervention", "tbtt")  # which measures again what was measured with another print_rank0
    before = snapshot(out)
    for options, steps, message in (
        (["--intervention", "tbtt"], 4, "tbtt-s0 holds a run with steps 3, not 4: remove the folder"),
        (["--intervention", "zero", "--lr", 5], 3, "zero-s0 holds a run with lr 0.001, not 5.0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*options, steps=steps)
    with pytest.raises(ValueError, match="base-s0 holds a run with T 8, not 10: remove the folder, choose"):
        run("--intervention", "zero", T=10)
    assert snapshot(out) == before


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    where, out, monkeypatch
):
    """At a step that would have saved the spoilt weights."""
    monkeypatch.setattr(train, "SAVE_EVERY", 5)
    masked_loss, calls = lg.masked_loss, []

    def spoilt(*inputs):
        calls.append(1)
        loss = masked_loss(*inputs)
        if len(calls) == 10:
            if where == "loss":
                return loss * math.nan
            loss.register_hook(lambda g: g * math.inf)
        return loss

    monkeypatch.setattr(lg, "masked_loss", spoilt)
    with pytest.raises(FloatingPointError, match=r"nan.* in step 10, the checkpoint of step 5 is kept in"):
        run(steps=20)
    saved = lg.load_checkpoint(out / "mamba2-echo-base-s0")
    assert saved["step"] == 5 and all(x.isfinite().all() for x in saved["model"].values())
    assert len(metrics(out / "mamba2-echo-base-s0")) == 9


def test_the_learning_rate_never_rises_after_its_peak():
    for peak in (1e-3, 1e-6):
        rates = [train.learning_rate(step, 100, peak) for step in range(10, 100)]
        assert max(rates) <= peak and rates == sorted(rates, reverse=True)


# --------------------------------------------------------------------------------------------------
# It refuses


def command(monkeypatch, capsys, arguments):
    """Exit code, stdout and stderr of `python train.py arguments`, without starting another Python."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments.split()])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return exit.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--intervention magic", "argument --intervention: invalid choice: 'magic'"),
        ("--model transformer", "argument --model: invalid choice: 'transformer'"),
        ("--task magic", "argument --task: invalid choice: 'magic'"),
        ("--carry half", "argument --carry: invalid choice: 'half'"),
        ("--magic", "unrecognized arguments: --magic"),
        ("--T 0", "--T: must lie between 1 and 100000000, got 0"),
        ("--T -8", "--T: must lie between 1 and 100000000, got -8"),
        ("--T eight", "argument --T: invalid int value: 'eight'"),
        ("--T 9", "echo needs an even T of at least 4, got 9"),
        ("--steps 0", "--steps: must lie between 1 and 100000000, got 0"),
        ("--batch 0", "--batch: must lie between 1 and 100000000, got 0"),
        ("--accumulate -1", "--accumulate: must lie between 1 and 100000000, got -1"),
        ("--lr 0", "--lr: must lie between 1e-30 and 1e+38, got 0"),
        ("--lr nan", "--lr: must lie between 1e-30 and 1e+38, got nan"),
        ("--noise-std -1 --intervention zero", "--noise-std: must lie between 0 and 1000000.0, got -1"),
        ("--noise-std inf --intervention zero", "--noise-std: must lie between 0 and 1000000.0, got inf"),
        ("--noise-std 2", "--noise-std needs an --intervention"),
        ("--carry scan", "--carry needs an --intervention"),
        ("--zero-prob 0.1", "--zero-prob needs an --intervention"),
        ("--seed -1", "--seed: must lie between 0 and 4294967295, got -1"),
        ("--task babilong --T 40", "babilong needs a T of at least 128, got 40"),
        ("--intervention zero --zero-prob 1.5", "--zero-prob: must lie between 0 and 1, got 1.5"),
        ("--intervention zero --zero-prob nan", "--zero-prob: must lie between 0 and 1, got nan"),
        ("--data nowhere.txt", "no text at 'nowhere.txt'"),
        ("--data empty.txt", "the corpus is empty: no text in empty.txt"),
        ("--data short.txt --task text", "the text has 10 tokens, shorter than the 257 that are needed"),
        ("--data short.txt", "the text has 10 tokens, shorter than the 24 that are needed"),
        ("--tokenizer magic", "magic cannot be read as a tokenizer, expected bytes, gpt2"),
        ("--device meta", "argument --device: invalid choice: 'meta'"),
        ("--out text.txt", "Not a directory: 'text.txt/mamba2-echo-base-s0'"),
        ("--out file", "File exists: 'file/mamba2-echo-base-s0'"),
        ("--out corrupt", "corrupt/mamba2-echo-base-s0/checkpoint.pt cannot be read as a checkpoint"),
        ("--init nowhere --intervention zero", "no checkpoint at 'nowhere'"),
        ("--init text.txt --intervention zero", "text.txt cannot be read as a checkpoint of train.py"),
        ("--init nowhere", "--init needs an --intervention to go on with"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2_and_nothing_is_written(
    arguments, message, out, monkeypatch, capsys
):
    pathlib.Path("empty.txt").write_text("")
    pathlib.Path("short.txt").write_text("123456789 ")
    for folder in ("corrupt/mamba2-echo-base-s0", "file"):
        os.makedirs(folder)
    pathlib.Path("file/mamba2-echo-base-s0").write_text("in the way")
    pathlib.Path("corrupt/mamba2-echo-base-s0/checkpoint.pt").write_bytes(b"PK\x03\x04 cut off")
    pathlib.Path("corrupt/mamba2-echo-base-s0/lock").touch()  # an earlier run has left it
    before = snapshot(out.parent)
    code, _, error = command(monkeypatch, capsys, "--data text.txt " + arguments)
    assert code == 2
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert snapshot(out.parent) == before


def test_a_diverging_run_is_one_sentence_and_exit_code_1(out, monkeypatch, capsys):
    code, printed, error = command(monkeypatch, capsys, "--data text.txt --T 4 --batch 2 --steps 5 --lr 1e38")
    assert code == 1 and "step" in printed
    assert error.startswith("stopped: loss ") and error.count("\n") == 1
    assert "nothing was saved yet in " in error and "try a smaller --lr than 1e+38" in error
    assert not (out / "mamba2-echo-base-s0" / "checkpoint.pt").exists()


def test_a_base_of_another_model_tokenizer_or_recipe_is_refused(out):
    run()
    with pytest.raises(
        ValueError, match="holds a run with steps 3, not 4: remove the folder, choose another"
    ):
        run(steps=4)
    with pytest.raises(ValueError, match="is a mamba2, no gla: leave --model out"):
        run("--init", out / "mamba2-echo-base-s0", "--intervention", "zero", "--model", "gla")
    np.tile(np.array([7, 300], dtype=np.uint16), 500).tofile("a.bin")
    with pytest.raises(ValueError, match=r"a.bin has a token 300, outside the vocabulary of 258 words"):
        init = out / "mamba2-echo-base-s0"
        train.main(f"--data a.bin --intervention zero --init {init} --out {out}/b".split())


# --------------------------------------------------------------------------------------------------
# Several ranks

TWO_RANKS = """
import sys
import pytest, torch, torch.distributed as dist
import lengthgen as lg, train
from test_train import Stopped, stop_after, two_rows

lg.position_wise = two_rows(lg.position_wise)
train.RECIPES["base"].update(steps=3, batch=2)
train.TINY_MODELS["mamba2"] = dict(d_model=8, n_layer=2, d_state=4, headdim=8)
destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
run = "--data text.txt --task text --T 8 --batch 2 --steps 4 --lr 1e-3 --intervention fitted_noise"
train.RECIPES["base"]["lr"] = 1e-3
train.main([*run.split(), "--out", "a"])

monkeypatch = pytest.MonkeyPatch()
stop_after(monkeypatch, 3, 4, save_every=2)
with pytest.raises(Stopped):
    train.main([*run.split(), "--out", "b"])
train.main([*run.split(), "--out", "b"])

# statistics are those of the rows of both ranks together
torch.manual_seed(0)
both = [lg.LayerState(torch.randn(4, 3, 5), torch.randn(4, 2, 3, 3) + 2)]
stats = lg.StateStatistics()
stats.update(lg.map_state(lambda x: x[2 * dist.get_rank() :][:2], both))
for x, dims in ((both[0].scan, (0, 2, 3)), (both[0].conv, (0, 1))):
    name = "scan" if x is both[0].scan else "conv"
    mean, std = getattr(stats.mean[0], name), getattr(stats.std[0], name)
    assert torch.allclose(mean, x.mean(dims, keepdim=True), atol=1e-5)
    assert torch.allclose(std, x.std(dims, correction=0, keepdim=True), atol=1e-5)
destroy()
"""


def in_two_ranks(program):
    """What torchrun --nproc-per-node 2 says of a program."""
    pathlib.Path("ranks.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ranks.py"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_ranks_train_on_the_mean_of_their_gradients_share_statistics_and_go_on(out):
    printed = in_two_ranks(TWO_RANKS)
    assert printed.count("2 ranks") == 3  # one of them speaks, when each of three command lines begins

    # the base is that of a loop over both ranks' rows
    corpus = lg.load_corpus(["text.txt"])
    torch.manual_seed(0)
    config = lg.ModelConfig(vocab_size=258, d_model=8, n_layer=2, d_state=4, headdim=8)
    model = lg.LanguageModel(config)
    optimizer = train.make_optimizer(model)
    rows = [lg.Rows(corpus, "train", 2, False, seed=rank) for rank in (0, 1)]
    losses = []
    for step in range(3):
        loss = 0
        for some in rows:
            tokens, part = map(torch.from_numpy, lg.text(some, 8))
            loss = loss + lg.masked_loss(model(tokens[:, :-1])[0], tokens[:, 1:], part) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.CLIP)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, 3, 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    runs = pathlib.Path("a")
    base = lg.load_checkpoint(runs / "mamba2-text-base-s0")
    for name, p in model.state_dict().items():
        assert (p - base["model"][name]).abs().max() < RANKS, name
    got = [line["loss"] for line in metrics(runs / "mamba2-text-base-s0")]
    assert np.allclose(got, losses, atol=FLOAT32)
    assert metrics(runs / "mamba2-text-base-s0")[-1]["tokens"] == 3 * 2 * 2 * 8

    # each rank carries its own rows and states; the statistics are common
    a, b = (lg.load_checkpoint(f"{x}/mamba2-text-fitted_noise-s0") for x in "ab")
    first, second = a["carried"]
    assert same(first["stats"], second["stats"])
    assert not same(first["rows"], second["rows"]) and not same(first["states"], second["states"])
    # and a stop changes no bit
    for key in ("step", "model", "optimizer", "carried"):
        assert same(a[key], b[key]), key

    # one rank cannot go on with the run of two
    with pytest.raises(ValueError, match="with ranks 2, not 1"):
        options = "--task text --T 8 --batch 2 --steps 4 --lr 1e-3 --intervention fitted_noise --out a"
        train.main(["--data", "text.txt", *options.split()])


ACCUMULATE = """
import torch.distributed as dist
import lengthgen as lg, train
from test_train import two_rows

all_reduce, reduced = dist.all_reduce, []
dist.all_reduce = lambda x: (reduced.append(tuple(x.shape)), all_reduce(x))
lg.position_wise = two_rows(lg.position_wise)
train.TINY_MODELS["mamba2"] = dict(d_model=8, n_layer=2, d_state=4, headdim=8)
destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
options = "--data text.txt --T 8 --batch 2 --accumulate 4 --out two"
train.main(f"{options} --steps 2".split())
train.main(f"{options} --steps 3 --zero-prob 0 --intervention state_passing"
           " --init two/mamba2-echo-base-s0".split())
destroy()
assert reduced.count((272, 8)) == 2 + 3, reduced  # the gradient of the embedding, in five steps
"""


def test_two_ranks_that_accumulate_equal_one_process_and_reduce_gradients_once_a_step(out, monkeypatch):
    in_two_ranks(ACCUMULATE)
    rows = lg.Rows

    def rows_of_both(corpus, split, B, continues, seed):  # slot 5 of one process is slot 1 of rank 1
        rank, slot = divmod(seed // 10**6, 4)
        return rows(corpus, split, B, continues, rank + 10**6 * slot)

    monkeypatch.setattr(lg, "Rows", rows_of_both)
    run("--accumulate", 8, "--out", "one", steps=2)
    options = ["--accumulate", 8, "--zero-prob", 0, "--intervention", "state_passing", "--out", "one"]
    run(*options, "--init", "one/mamba2-echo-base-s0")
    for folder in ("mamba2-echo-base-s0", "mamba2-echo-state_passing-s0"):
        one, two = (lg.load_checkpoint(f"{parent}/{folder}") for parent in ("one", "two"))
        assert one["settings"]["ranks"] == 1 and two["settings"]["ranks"] == 2
        for name, weight in one["model"].items():
            assert (weight - two["model"][name]).abs().max() < ACCUMULATED, name


# --------------------------------------------------------------------------------------------------
# It is stopped, run twice, runs out of disk


def start(*options, **environment):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--data",
        "text.txt",
        "--T",
        "8",
        "--batch",
        "2",
        *options,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step_in_work_and_the_run_goes_on_from_there(number, out):
    child = start("--steps", "100000")
    metrics_file = out / "mamba2-echo-base-s0" / "metrics.jsonl"
    while not (metrics_file.exists() and metrics_file.read_text().count("\n") >= 3):
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.05)
    child.send_signal(number)
    printed, _ = child.communicate(timeout=60)
    assert child.returncode == 128 + number and "Traceback" not in printed
    step = lg.load_checkpoint(out / "mamba2-echo-base-s0")["step"]
    assert step == len(metrics(out / "mamba2-echo-base-s0")) >= 3
    assert f"stopped after step {step}: the same command goes on from there" in printed


SMALL = """
import sys, train
train.RECIPES["base"].update(steps=300, batch=2)
train.main(sys.argv[1:])
"""


def test_two_processes_that_need_the_same_base_train_it_once(out):
    options = "--data text.txt --T 8 --batch 2 --steps 3 --intervention".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    children = []
    for name in ("zero", "tbtt"):
        command = [sys.executable, "-c", SMALL, *options, name]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    printed = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert [line["step"] for line in metrics(out / "mamba2-echo-base-s0")] == list(range(1, 301))
    assert sum("another process trains here, waiting" in text for text in printed) == 1


def test_long_work_says_at_once_how_long_it_will_take(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(train.time, "time", lambda: now[0])
    long, short = train.Progress(), train.Progress()
    now[0] = 4.0
    long(0.01)  # 4 seconds for a hundredth
    short(0.1)
    assert capsys.readouterr().out == "    1%  6:36 left\n"
    now[0] = 13.0
    long(0.03)  # not yet ten seconds after the last time
    short(0.4)
    assert capsys.readouterr().out == "   40%  0:19 left\n"


def test_a_full_disk_is_one_sentence_with_the_file_and_leaves_nothing(tmp_path):
    class FullDisk:  # /dev/full has no space, however much it gets
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    (tmp_path / "checkpoint.pt").write_text("the old one")
    with pytest.raises(ValueError, match=r"checkpoint.pt cannot be written: .*No space left") as caught:
        lg.write_atomically(str(tmp_path / "checkpoint.pt"), functools.partial(torch.save, FullDisk()))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    assert (tmp_path / "checkpoint.pt").read_text() == "the old one"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_torch_says_of_a_full_disk_that_it_is_full():
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb", buffering=0) as file:
        torch.save(torch.zeros(10**5), file)
