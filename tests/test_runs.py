"""A run is its settings, model, text, base and source: nobody is ever shown the result of other code.

Every test runs the program on a copy of the four files, in which it has edited something, as a person does.
"""

import importlib
import json
import linecache
import pathlib
import shutil
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ("kernels", "lengthgen", "train", "eval")
TINY = [  # makes training a matter of milliseconds
    ("train", "d_model=96, n_layer=2, d_state=64, headdim=16", "d_model=8, n_layer=1, d_state=4, headdim=8"),
    ("train", "steps=1400, lr=3e-3, hold=0.0, batch=64", "steps=2, lr=3e-3, hold=0.0, batch=2"),
    ("train", "steps=500, lr=1e-3, hold=0.0, batch=64", "steps=2, lr=1e-3, hold=0.0, batch=2"),
    ("train", "B=None, windows=64", "B=2, windows=4"),
]


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """edited((file, old text, new text), ...) -> the modules train and eval of a copy with these edits."""
    count = iter(range(100))

    def make(*edits):
        folder = tmp_path / f"copy{next(count)}"
        folder.mkdir()
        for name in NAMES:
            content = (ROOT / f"{name}.py").read_text()
            for file, old, new in [*TINY, *edits]:
                if file == name:
                    assert content.count(old) == 1, f"{old!r} should be in {name}.py once"
                    content = content.replace(old, new)
            (folder / f"{name}.py").write_text(content)
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(folder)
        importlib.invalidate_caches()
        return [importlib.import_module(name) for name in ("train", "eval")]

    return make


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a text, a base on echo and its cure by state passing, made by the code as it is."""
    folder = tmp_path_factory.mktemp("made")
    words = np.random.default_rng(0).choice("one two three four five six seven".split(), 2000)
    (folder / "text.txt").write_text(" ".join(words))
    return folder


LINE = "--T 16 --intervention state_passing"


def run(train, folder, *options, data="text.txt", line=LINE):
    out = ["--out", str(folder / "runs")]
    train.main([*line.split(), "--data", str(folder / data), *out, *map(str, options)])


def made_once(edited, folder):
    if not (folder / "runs").exists():
        train, _ = edited()
        run(train, folder)


EDITS = {  # what is edited: (file, old, new)
    "state_passing": ("lengthgen", "    return state\n\n\nINTER", "    return [*state]\n\n\nINTER"),
    "Mamba2": ("lengthgen", "dt = F.softplus(dt + self.dt_bias)", "dt = 2 * F.softplus(dt + self.dt_bias)"),
    "causal_conv": ("lengthgen", "return F.silu(y), x[", "return F.gelu(y), x["),
    "Block": ("lengthgen", "        x = x + y\n        if", "        x = 2 * x + y\n        if"),
    "LanguageModel.forward": ("lengthgen", "x = self.embedding(tokens)", "x = 2 * self.embedding(tokens)"),
    "echo": ("lengthgen", "n = T // 2 - 1\n", "n = T // 2 - 1 + 0\n"),
    "Rows": ("lengthgen", "torch.from_numpy(at + n - overlap)", "torch.from_numpy(at + n)"),
    "next_initial_state": ("lengthgen", "if zero_prob > 0:", "if zero_prob >= 0:"),
    "masked_loss": ("lengthgen", "    if share > 0:\n", "    if share > 1:\n"),
    "chunked_scan": ("kernels", "return o.to(out_dtype), S.", "return 2 * o.to(out_dtype), S."),
    "MIN_LOG_A": ("kernels", "MIN_LOG_A = -30.0", "MIN_LOG_A = -3.0"),
    "learning_rate": ("train", "warmup = max(1, steps // 10)", "warmup = max(1, steps // 5)"),
    "CLIP": ("train", "CLIP = 1.0", "CLIP = 0.5"),
}


def draw(ev, folder, *options):
    """`python eval.py state`, for runs on the text of these tests."""
    corpus = ev.lg.load_corpus([str(folder / "text.txt")])
    ev.lg.load_corpus = lambda: corpus
    ev.main(["state", "--out", str(folder / "runs"), *options])


@pytest.mark.parametrize("name", EDITS)
def test_a_run_made_by_other_code_is_refused_by_train_and_eval(name, made, edited):
    made_once(edited, made)
    train, ev = edited(EDITS[name])
    message = rf"holds a run .*made by another {name}(,.*)?: remove the folder, choose another --out, or"
    with pytest.raises(ValueError, match=message):
        run(train, made)
    with pytest.raises(ValueError, match=message):
        draw(ev, made)


UNRELATED = {
    "another intervention": ("lengthgen", "lambda x: std * normal_like", "lambda x: 2 * std * normal_like"),
    "another task": ("lengthgen", 'tokens[:] = ord("$")', 'tokens[:] = ord("%")'),
    "another layer": ("lengthgen", "F.logsigmoid(gate) / 16", "F.logsigmoid(gate) / 8"),
    "another measure": ("lengthgen", "return (whole - short) / count", "return (short - whole) / count"),
    "checkpoints of other libraries": ("lengthgen", 'kind == "mamba2":', 'kind in ("mamba2",):'),
    "a new intervention": (
        "lengthgen",
        "INTERVENTIONS = {  # name",
        "def half(state, stats, rng):\n    return map_state(lambda x: x / 2, state)\n\n\n"
        "INTERVENTIONS = {  # name",
    ),
}


@pytest.mark.parametrize("name", UNRELATED)
def test_an_edit_that_a_run_does_not_use_leaves_it_found(name, made, edited, capsys):
    made_once(edited, made)
    train, _ = edited(UNRELATED[name])
    capsys.readouterr()
    run(train, made)
    assert capsys.readouterr().out.count("found, all 2 steps") == 2


def test_a_base_that_is_not_the_recipes_is_refused_and_init_takes_it(made, edited, tmp_path, capsys):
    train, _ = edited()
    shutil.copy(made / "text.txt", tmp_path)
    run(train, tmp_path, "--steps", 1, line="--T 16")
    with pytest.raises(
        ValueError, match=r"base-s0 holds a run with steps 1, not 2: remove the folder, choose"
    ):
        run(train, tmp_path)
    run(train, tmp_path, "--init", tmp_path / "runs" / "mamba2-echo-base-s0")
    assert (tmp_path / "runs" / "mamba2-echo-state_passing-s0" / "checkpoint.pt").exists()


def test_other_sizes_of_the_model_are_another_run(made, edited):
    made_once(edited, made)
    train, ev = edited(("train", "dict(d_model=96, n_layer=2, d_state=16)", "dict(d_model=8, n_layer=2)"))
    train.TINY_MODELS["mamba2"]["d_state"] = 8
    with pytest.raises(ValueError, match=r"base-s0 holds a run with d_state 4, not 8"):
        run(train, made)
    with pytest.raises(ValueError, match=r"base-s0 holds a run with d_state 4, not 8"):
        draw(ev, made)


def test_a_base_made_anew_does_not_keep_its_old_cures(made, edited, tmp_path):
    train, _ = edited()
    shutil.copytree(made / "runs", tmp_path / "runs")
    shutil.copy(made / "text.txt", tmp_path)
    base = tmp_path / "runs" / "mamba2-echo-base-s0"
    checkpoint = torch.load(base / "checkpoint.pt", weights_only=True)
    checkpoint["model"]["norm_f.weight"] *= 1.5  # as if it had been trained elsewhere
    torch.save(checkpoint, base / "checkpoint.pt")
    with pytest.raises(
        ValueError, match="state_passing-s0 holds a run made by another set of initial weights"
    ):
        run(train, tmp_path)


def test_a_file_that_is_edited_while_the_base_trains_does_not_change_what_is_recorded(made, edited, tmp_path):
    shutil.copy(made / "text.txt", tmp_path)
    train, _ = edited()
    file = pathlib.Path(train.lg.__file__)
    start = train.print_rank0

    def edit_when_training_starts(message):
        if "step     1/2" in message:
            file.write_text(file.read_text().replace(*EDITS["state_passing"][1:]))
        start(message)

    train.print_rank0 = edit_when_training_starts
    run(train, tmp_path)
    train, _ = edited(EDITS["state_passing"])
    with pytest.raises(ValueError, match="state_passing-s0 holds a run made by another state_passing"):
        run(train, tmp_path)


@pytest.mark.parametrize("kind", ["a function of another module", "functools.partial", "lambda"])
def test_interventions_of_other_kinds_are_known_by_their_source(kind, made, edited, tmp_path, monkeypatch):
    shutil.copy(made / "text.txt", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def forked(scale):
        train, _ = edited()
        (tmp_path / "fork.py").write_text(
            "import functools\nimport lengthgen as lg\n\n\n"
            f"def scaled(state, stats, rng, scale={scale}):\n"
            "    return lg.map_state(lambda x: x * scale, state)\n\n\n"
            f"KINDS = {{\n    'a function of another module': scaled,\n"
            f"    'functools.partial': functools.partial(scaled, scale={scale}),\n"
            f"    'lambda': lambda state, stats, rng: lg.map_state(lambda x: x * {scale}, state),\n}}\n"
        )
        sys.modules.pop("fork", None)
        linecache.clearcache()
        importlib.invalidate_caches()
        train.lg.INTERVENTIONS["mine"] = (importlib.import_module("fork").KINDS[kind], False)
        return train

    run(forked(0.5), tmp_path, line="--T 16 --intervention mine")
    run(forked(0.5), tmp_path, line="--T 16 --intervention mine")
    with pytest.raises(ValueError, match="mine-s0 holds a run made by another "):
        run(forked(0.25), tmp_path, line="--T 16 --intervention mine")


def test_text_is_known_by_its_content_and_not_by_its_path(made, edited, tmp_path, monkeypatch, capsys):
    train, _ = edited()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "runs", "runs")
    shutil.copy(made / "text.txt", "moved.txt")
    content = pathlib.Path("moved.txt").read_text()
    pathlib.Path("other.txt").write_text(content.replace("one", "two"))  # of the same length
    for data in ("moved.txt", tmp_path / "moved.txt"):
        capsys.readouterr()
        run(train, tmp_path, data=data)
        assert capsys.readouterr().out.count("found, all 2 steps") == 2
    with pytest.raises(ValueError, match="base-s0 holds a run made by another text"):
        run(train, tmp_path, data="other.txt")


def test_tokens_of_equal_number_are_told_apart(edited, tmp_path):
    train, _ = edited()
    for name in ("a", "b"):
        tokens = np.random.default_rng(ord(name)).integers(4, 300, 5000)
        tokens.astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    run(train, tmp_path, data="a.bin", line="--task text --T 16 --steps 2")
    with pytest.raises(ValueError, match=r"base-s0 holds a run .*made by another text"):
        run(train, tmp_path, data="b.bin", line="--task text --T 16 --steps 2")


def test_a_measurement_is_kept_and_made_again_after_an_edit_of_what_made_it(made, edited, tmp_path, capsys):
    made_once(edited, made)
    shutil.copytree(made / "runs", tmp_path / "runs")
    shutil.copy(made / "text.txt", tmp_path)
    capsys.readouterr()
    train, ev = edited()
    run(train, tmp_path)
    assert "measuring" not in capsys.readouterr().out
    ev.FIGURES["state"] = ("", "echo", [ev.PAIR], [train.loss_by_position])
    draw(ev, tmp_path)  # eval.py reads what train.py has measured
    assert "measuring" not in capsys.readouterr().out
    train, _ = edited(("lengthgen", "ends = [end for end in ends if end < windows]", "ends = [1, 2]"))
    run(train, tmp_path)
    assert capsys.readouterr().out.count("measuring loss_by_position") == 2  # of the base and of the cure


def test_a_curve_says_how_many_seeds_it_has_where_they_differ(made, edited, tmp_path, capsys):
    train, ev = edited()
    shutil.copytree(made / "runs", tmp_path / "runs")
    shutil.copy(made / "text.txt", tmp_path)
    run(train, tmp_path, "--seed", 1, line="--T 16")
    capsys.readouterr()
    names = []
    legend = train.Figure.legend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Figure, "legend", lambda self, _, labels, **kw: names.extend(labels))
        draw(ev, tmp_path, "--seeds", "2")
    assert legend and names == ["base", "state passing (1 of 2 seeds)"]
    assert "\nstate passing (1 of 2 seeds)" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["text", "echo", "copy"])
def test_streams_are_as_long_as_the_held_out_text_and_say_so(task, edited, tmp_path, capsys):
    train, ev = edited(("lengthgen", "shortest=5, longest=20", "shortest=2, longest=5"))
    (tmp_path / "text.txt").write_text("".join(chr(97 + i % 26) for i in range(1000)))  # 100 are held out
    run(train, tmp_path, line=f"--task {task} --T 16 --steps 1")
    folder = tmp_path / "runs" / f"mamba2-{task}-base-s0"
    panels = json.loads((folder / "loss_by_position.json").read_text())["measurement"]
    assert panels["x"][-1] == 4  # of the 4 T that are asked for
    capsys.readouterr()
    ev.main(["poswise", "--init", str(folder), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    # 101 tokens in windows of 16 or passages of 7, less what a row leaves out at the end; copy reads none
    end = {"text": 5, "echo": 12, "copy": 64}[task]
    assert (f"the streams end at {end} T, not 64 T: 101 tokens are held out" in printed) == (end < 64)
    assert json.loads((tmp_path / f"poswise-mamba2-{task}-base-s0.json").read_text())["x"][-1] == end
