"""The numbers of the README are those of assets/results.json, which `python eval.py --seeds 3` has written.

`python tests/test_readme.py` prints every line and phrase that the README must hold.
"""

import json
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
MINUS, TIMES = "d: log_a minus d", "c: log_a times c"
GAP = "the paired gap"


def curve(figure, title, label, xlabel=None, model="mamba2"):
    """{x: the values of all seeds (seeds,)} of one curve of a figure."""
    results = json.loads((ROOT / "assets" / "results.json").read_text())
    for panel in results[model][figure]["panels"]:
        if panel["title"] == title and xlabel in (None, panel["xlabel"]) and label in panel["curves"]:
            x, values = panel["curves"][label]
            return dict(zip(x, np.array(values).T, strict=True))
    raise KeyError(f"{figure}, {title}, {label}")


def at(x, figure, title, labels, form=".2f", **options):
    """The means over seeds at x of some curves, written out."""
    return [format(curve(figure, title, label, **options)[x].mean(), form) for label in labels]


def main_table():
    """The rows of the table of the main job, which is seed 0."""
    for title in ("text", "echo"):
        for name, label in (("base", "base"), ("state passing", "state_passing")):
            losses = curve("interventions", title, label).values()
            yield f"{name:26}" + "".join(f"{loss[0]:7.3f}" for loss in losses)


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
    losses = {}
    for title in ("text", "echo"):
        for xlabel in (MINUS, TIMES):
            losses[title, xlabel] = curve("forgetting", title, "base", xlabel)
    base = [losses[title, MINUS][0].mean() for title in ("text", "echo")]
    cured = [curve("forgetting", title, "state_passing", MINUS)[0].mean() for title in ("text", "echo")]
    yield "the base has a loss of {:.2f} nats on text and {:.2f} on echo".format(*base)
    yield "state passing {:.2f} and {:.2f}".format(*cured)
    for title, words in (("text", "(d = 0.1: {:.2f}; c = 5: {:.2f})"), ("echo", "({:.2f} and {:.2f};")):
        yield words.format(losses[title, MINUS][0.1].mean(), losses[title, TIMES][5].mean())
    best = [min(x.mean() for x in losses["echo", xlabel].values()) for xlabel in (MINUS, TIMES)]
    yield "at the best d {:.2f}, at the best c {:.2f})".format(*best)


def budget():
    """The loss at 64 T of the base, and after each number of steps of state passing."""
    words = "{} (base), {}, {}, {}, {} and {}"
    for title in ("text", "echo"):
        losses = curve("budget", title, "state_passing").values()
        yield words.format(*(f"{loss.mean():.2f}" for loss in losses))


def plain_text():
    """The two rows of the table: the rise past T, and the paired gap."""
    labels = ("base", "zero", "random_noise", "fitted_noise", "state_passing", "tbtt")
    for title in ("loss by position, minus that in T", GAP):
        yield f"| {' | '.join(at(64, 'text', title, labels, '.3f'))} |"


def passkey():
    found = []
    for label in ("zero", "state_passing"):
        for x in (8, 16):
            cells = []
            for depth in (0.1, 0.5, 0.9):
                cells += at(x, "passkey", f"the key at depth {depth}", [label])
            found.append(", ".join(cells).replace("0.", "."))
    yield "the control finds at 8 T {} of the keys and at 16 T {}, state passing {} and {}".format(*found)


def babilong():
    title, labels = "our own stories", ("base", "state_passing", "tbtt")
    words = "where {} of the answers are right ({} after state passing)"
    yield words.format(*at(1, "babilong", title, labels[:2]))
    words = "At 4 T {} are right from the base, {} from state passing and {} from TBTT, at 16 T {}, {} and {}"
    yield words.format(*at(4, "babilong", title, labels), *at(16, "babilong", title, labels))


def gla():
    """GLA, which is one seed."""
    gap = at(64, "text", GAP, ("base", "state_passing"), ".3f", model="gla")
    yield "has a gap of {}, which state passing does not cure: {}".format(*gap)
    labels = ("base", "zero", "state_passing")
    words = "text {}, {} and {} nats, echo {}, {} and {}"
    cells = [
        *at(64, "interventions", "text", labels, model="gla"),
        *at(64, "interventions", "echo", labels, model="gla"),
    ]
    yield words.format(*cells)


def copying():
    words = "{} are right in T for the control and {} after state passing, at 4 T {} and {}"
    in_T, at_4T = (at(x, "copying", "packed strings", ("zero", "state_passing")) for x in (1, 4))
    yield words.format(*in_T, *at_4T)
    yield "Our base, {} in T".format(*at(1, "copying", "packed strings", ["base"]))


def sweep():
    rises = []
    for label in ("200 steps", "400 steps", "1400 steps", "T = 26", "T = 50", "T = 98"):
        text = curve("sweep", "text", label)
        rises.append(f"{text[64].mean() - text[1].mean():.2f}")
    yield "{}, {} and {} nats after 200, 400 and 1400 steps".format(*rises[:3])
    yield "at T = 26, 50 and 98 {}, {} and {}".format(*rises[3:])


def other_figures():
    labels = ("base", "zero", "state_passing", "tbtt")
    words = "text {} (base), {} (control), {} (state passing) and {} (TBTT) nats, echo {}, {}, {} and {}"
    yield words.format(*at(256, "poswise", "text", labels), *at(256, "poswise", "echo", labels))
    base, cured = (curve("state", "the full state", label)[64] for label in ("base", "state_passing"))
    grows = f"grows {base.mean():.2f} times ({base.min():.2f} to {base.max():.2f}, by seed) in the base"
    yield f"{grows} and {cured.mean():.2f} times after state passing"
    base, cured = (curve("state", "layer 0", label)[64] for label in ("base", "state_passing"))
    grows = f"{base.mean():.2f} times ({base.min():.2f} to {base.max():.2f})"
    yield f"that of layer 0 alone {grows} and {cured.mean():.2f} times"
    (base,), (cured,) = (
        at(1, "effrem", "predictions of text", [label], ".3f") for label in ("base", "state_passing")
    )
    yield f"by a total variation of {base} and those after state passing by {cured}"


PARTS = (
    main_table,
    interventions,
    forgetting,
    budget,
    plain_text,
    passkey,
    babilong,
    gla,
    copying,
    sweep,
    other_figures,
)


@pytest.mark.parametrize("phrases", PARTS)
def test_the_readme_holds_the_numbers_that_were_measured(phrases):
    readme = " ".join((ROOT / "README.md").read_text().split())
    for phrase in phrases():
        assert " ".join(phrase.split()) in readme, phrase


if __name__ == "__main__":
    for phrases in PARTS:
        print(*phrases(), sep="\n")
