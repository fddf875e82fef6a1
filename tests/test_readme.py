"""The numbers of the README are those of assets/results.json, which `python eval.py --seeds 3` has written.

`python tests/test_readme.py` prints every line and phrase that the README must hold.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import lengthgen as lg
import train

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "assets" / "results.json").read_text())
MINUS, TIMES = "d: log_a minus d", "c: log_a times c"
GAP = "the paired gap"
CUT = 1e-9  # float64: only the order of additions differs


def curve(figure, title, label, xlabel=None, model="mamba2"):
    """{x: the values of all seeds (seeds,)} of one curve of a figure. title: how the panel's title begins"""
    for panel in RESULTS[model][figure]["panels"]:
        if (
            panel["title"].startswith(title)
            and xlabel in (None, panel["xlabel"])
            and label in panel["curves"]
        ):
            x, values = panel["curves"][label]
            return dict(zip(x, np.array(values).T, strict=True))
    raise KeyError(f"{figure}, {title}, {label}")


def at(x, figure, title, labels, form=".2f", **options):
    """The means over seeds at x of some curves, written out."""
    return [format(curve(figure, title, label, **options)[x].mean(), form) for label in labels]


RUNS = {  # name: label in results.json
    "base": "base",
    "control": "zero",
    "random noise": "random_noise",
    "fitted noise": "fitted_noise",
    "state passing": "state_passing",
    "TBTT": "tbtt",
}


def main_table():
    """The rows of the table of the main job, which is seed 0."""
    for title in ("text", "echo"):
        for name in ("base", "state passing"):
            losses = curve("interventions", title, RUNS[name]).values()
            yield f"{name:26}" + "".join(f"{loss[0]:7.3f}" for loss in losses)


def gated_deltanet():
    """The rows of its table, which are seed 0; its echo on three seeds; what its decay alone can do."""
    for name, label in RUNS.items():
        cells = [name]
        for title in ("text", "echo"):
            losses = curve("interventions", title, label, model="gdn")
            cells += [f"{losses[x][0]:.3f}" for x in (1, 2, 4, 16, 64)]
        yield f"| {' | '.join(cells)} |"
    echo = curve("architectures", "gdn: echo", "state_passing", model="all")
    yield f"echo still grows from {echo[1].mean():.2f} in T to {echo[64].mean():.2f} at 64 T"
    for label in ("base", "state_passing"):
        kept = list(curve("forgetting", "what heads keep over T", label, model="gdn").values())
        assert len(kept) == 8 and sum(share[0] > 0.99 for share in kept) == 2
    best = [min(curve("forgetting", "echo", "base", x, "gdn").values())[0] for x in (MINUS, TIMES)]
    yield f"stays above {min(best):.2f} nats on echo"


def architectures():
    """The rows of the table: sizes, and losses with their spread where there are several seeds."""
    for name, model in (
        ("Mamba-2", "mamba2"),
        ("GLA", "gla"),
        ("Mamba-1", "mamba1"),
        ("Gated DeltaNet", "gdn"),
    ):
        config = lg.ModelConfig(layer=model, vocab_size=258, **train.TINY_MODELS[model])
        with torch.device("meta"):
            size = sum(p.numel() for p in lg.LanguageModel(config).parameters())
        cells = [f"{name} (`{model}`)", f"{size // 1000}k"]
        seeds = []
        for part in ("text", "echo"):
            for label, x in (("base", 1), ("base", 64), ("zero", 64), ("state_passing", 64)):
                losses = curve("architectures", f"{model}: {part}", label, model="all")[x]
                seeds.append(len(losses))
                spread = f" ({np.ptp(losses):.2f})" if x == 64 and len(losses) > 1 else ""
                cells.append(f"{losses.mean():.2f}{spread}")
        assert len({*seeds}) == 1  # as many seeds of every run
        yield f"| {' | '.join([*cells[:2], str(seeds[0]), *cells[2:]])} |"


def interventions():
    """The cells of the table of the interventions."""
    for label in (
        "base",
        "zero",
        "random_noise",
        "fitted_noise",
        "state_passing-scan",
        "state_passing",
        "tbtt",
    ):
        text, echo = (curve("interventions", title, label) for title in ("text", "echo"))
        cells = [f"{x.mean():.2f} ({np.ptp(x):.2f})" for x in (text[1], text[64], echo[64])]
        yield f" | {' | '.join(cells)} |"


def forgetting():
    kept = []
    for label in ("base", "state_passing"):
        heads = list(curve("forgetting", "what heads keep over T", label).values())
        kept.append(np.mean(heads[len(heads) // 2 :]))
    yield "keep {:.0%} of their state over T tokens in the base, and {:.0%} after state passing".format(*kept)
    for title in ("text", "echo"):
        minus, times = (curve("forgetting", title, "base", xlabel) for xlabel in (MINUS, TIMES))
        cured = curve("forgetting", title, "state_passing", MINUS)
        best = [min(x.mean() for x in losses.values()) for losses in (minus, times)]
        cells = [minus[0].mean(), minus[0.1].mean(), best[0], times[5].mean(), best[1], cured[0].mean()]
        yield f"| {title} | {' | '.join(f'{cell:.2f}' for cell in cells)} |"


def budget():
    """The loss at 64 T of the base, and after each number of steps of state passing."""
    for title in ("text", "echo"):
        losses = curve("budget", title, "state_passing").values()
        yield f"| {title} at 64 T | {' | '.join(f'{loss.mean():.2f}' for loss in losses)} |"


def plain_text():
    """The two rows of the table: the rise past T, and the paired gap."""
    for title in ("loss by position, minus that in T", GAP):
        yield f"| {' | '.join(at(64, 'text', title, RUNS.values(), '.3f'))} |"


def babilong():
    base, cured = (curve("babilong", "our own stories", label) for label in ("base", "state_passing"))
    yield f"where the base has {base[1].mean():.2f} of the answers right"
    yield f"At 4 T it has {base[4].mean():.2f}, and {cured[4].mean():.2f} if it was post-trained"
    yield f"the spread of seeds is {np.ptp(base[4]):.2f}"


def gla():
    """GLA on plain text, which is one seed."""
    gap = at(64, "text", GAP, ("base", "state_passing"), ".3f", model="gla")
    yield "GLA has a gap of {}, which state passing does not cure: {}".format(*gap)


def sweep():
    rises = []
    for label in ("400 steps", "1400 steps", "T = 98", "T = 26"):
        text = curve("sweep", "text", label)
        rises.append(f"{text[64].mean() - text[1].mean():.2f}")
    yield "is {} nats worse than in T after 400 steps, and {} after 1400".format(*rises[:2])
    yield "at T = 98, where echo is not learned, {}, and at T = 26 {}".format(*rises[2:])


def other_figures():
    """The rows of the table of the other figures."""

    def row(name, what, figure, title, x, form=".2f"):
        cells = []
        for label in RUNS.values():
            try:
                values = curve(figure, title, label)[x]
                cells.append(f"{values.mean():{form}} ({np.ptp(values):{form}})")
            except KeyError:  # the figure does not draw this run
                cells.append("")
        return " ".join(f"| {name} | {what} | {' | '.join(cells)} |".split())

    yield row("`poswise`", "text at 256 T, nats", "poswise", "text", 256)
    yield row("", "echo at 256 T, nats", "poswise", "echo", 256)
    yield row("`state`", "std of the state at 64 T, divided by that at T", "state", "the full state", 64)
    yield row("`effrem`", "change without the first T tokens", "effrem", "predictions of text", 1)
    for x in (1, 4):
        yield row(
            "`copying`" if x == 1 else "", f"share of right letters at {x} T", "copying", "packed strings", x
        )
    for x in (16, 32, 64):
        title = "the key at depth 0.5"
        yield row("`passkey`" if x == 16 else "", f"share of right keys at {x} T", "passkey", title, x)
    base = curve("state", "the full state", "base")[64]
    yield f"in the base from {base.min():.2f} to {base.max():.2f}, by seed"
    for label, words in (("state_passing", "(echo {}, "), ("zero", "the control {})")):
        yield words.format(*at(1, "interventions", "echo", [label]))


PARTS = (
    main_table,
    architectures,
    interventions,
    gated_deltanet,
    forgetting,
    budget,
    plain_text,
    babilong,
    gla,
    sweep,
    other_figures,
)


def python_blocks():
    """The Python code of the README: an intervention and a layer."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return {re.search(r"(INTERVENTIONS|LAYERS)\[", block)[1]: block for block in blocks}


def test_the_intervention_and_the_layer_of_the_readme_train_in_a_copy(tmp_path):
    for name in ("lengthgen", "kernels", "train"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    source = (tmp_path / "lengthgen.py").read_text()
    for title, section in (("LAYERS", "# ---- 3."), ("INTERVENTIONS", "def next_initial_state")):
        source = source.replace(section, f"{python_blocks()[title]}\n\n{section}", 1)
    (tmp_path / "lengthgen.py").write_text(source)
    size = re.search(r'in TINY_MODELS: ("headwise": .*)', python_blocks()["LAYERS"])[1]
    source = (tmp_path / "train.py").read_text()
    (tmp_path / "train.py").write_text(source.replace("TINY_MODELS = {", f"TINY_MODELS = {{ {size},", 1))
    (tmp_path / "text.txt").write_text("some words to learn from\n" * 400)
    options = "--model headwise --intervention halved --steps 2 --batch 2 --T 4 --data text.txt --device cpu"
    command = [sys.executable, "train.py", *options.split()]
    for text in ("halved: echo loss", "found, all 2 steps"):  # trained at first, then found again
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert text in done.stdout


def test_the_layer_of_the_readme_may_be_cut_anywhere(monkeypatch, tmp_path):
    namespace = dict(vars(lg), LAYERS={})
    exec(python_blocks()["LAYERS"], namespace)
    monkeypatch.setitem(lg.LAYERS, "headwise", namespace["LAYERS"]["headwise"])
    model = lg.LanguageModel(
        lg.ModelConfig(layer="headwise", vocab_size=11, d_model=8, n_layer=2, num_heads=2)
    )
    tokens = torch.randint(0, 11, (2, 20))
    whole, _ = model.double()(tokens)
    first, state = model(tokens[:, :7])
    second, _ = model(tokens[:, 7:], state)
    assert (torch.cat([first, second], 1) - whole).abs().max() < CUT
    with pytest.raises(ValueError, match="no other library is known that has the layer headwise"):
        model.save_pretrained(str(tmp_path))


@pytest.mark.parametrize("phrases", PARTS)
def test_the_readme_holds_the_numbers_that_were_measured(phrases):
    readme = " ".join((ROOT / "README.md").read_text().split())
    for phrase in phrases():
        assert " ".join(phrase.split()) in readme, phrase


if __name__ == "__main__":
    for phrases in PARTS:
        print(*phrases(), sep="\n")
