"""Every figure and table of the paper (Buitrago & Gu, ICML 2025), from one command.

    python eval.py reproduce                       train what is missing, then draw everything
    python eval.py                                 draw all that the runs found allow
    python eval.py poswise effrem                  draw these
    python eval.py poswise --init RUN --data PATH  how a given checkpoint breaks past its training length
    python eval.py babilong --init RUN --data PATH accuracy on the published BABILong files
    python eval.py sample --init RUN --prompt "import os"

Runs are the folders of train.py under --out. Every measurement is kept beside its checkpoint as one JSON
file, written when it is complete: killed at any moment, the next start loses only the piece in work. Pictures
go to {out}/figures (on white, which reads on light and dark pages alike), every number drawn to
{out}/results.json. Letters are those of lengthgen.py; positions are counted in tokens.
"""

import argparse
import codecs
import functools
import glob
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

import numpy as np
import torch

import lengthgen as lg
import train
from train import curve, dress, keep, label, middles, page

# --------------------------------------------------------------------------------------------------
# What is trained. A preset names its experiments; an experiment is a task and some kinds of runs on it.


@dataclass
class Experiment:
    task: str
    kinds: tuple  # "base" and interventions; "zero" is the control, or fine-tuning without an intervention
    both: str = ""  # arguments of train.py for every run
    base: str = ""  # ... for the base alone
    after: str = ""  # ... for what starts from the base
    init: tuple = ()  # (experiment, kind) whose checkpoint everything starts from instead of an own base


TINY = {
    "echo": Experiment("echo", ("base", *lg.INTERVENTIONS, "state_passing-scan")),
    "text": Experiment("text", ("base", "zero", "state_passing"), "--T 64", "--steps 1000", "--steps 200"),
    # pre-trained no longer than it takes: later on the base learns to drop the string before by itself
    "copy": Experiment(
        "copy",
        ("base", "zero", "state_passing"),
        "--T 44",
        "--steps 1000",
        "--steps 1000 --lr 2e-3 --zero-prob 0.2",
    ),
    # passkeys are fine-tuned from the echo base, which can repeat what it has just read
    "passkey": Experiment(
        "passkey",
        ("zero", "fitted_noise"),
        "--T 640 --batch 8",  # the longer T, the more times its length a key is kept
        after="--steps 300 --lr 3e-3 --zero-prob 0.1",
        init=("echo", "base"),
    ),
} | {
    f"babilong/{kind}": Experiment(
        "babilong", ("zero",), "--T 256 --batch 32", after="--steps 300 --lr 2e-3", init=("echo", kind)
    )
    for kind in ("base", "state_passing", "tbtt")
} | {
    f"sweep/steps{steps}": Experiment("echo", ("base",), base=f"--steps {steps}")
    for steps in (200, 400, 800)
} | {  # as many tokens in every run
    f"sweep/T{T}": Experiment("echo", ("base",), f"--T {T} --batch {batch}")
    for T, batch in ((26, 123), (98, 33))
}  # fmt: skip
MEASURES = {  # how much is measured; rows are sequences
    "poswise": dict(rows=64, windows=256),
    "gap": dict(rows=64, windows=64),
    "interventions": dict(rows=256, windows=64),
    "sweep": dict(rows=128, windows=64),
    "state": dict(rows=64, windows=64),
    "effrem": dict(rows=64),
    "passkey": dict(rows=16, lengths=(1, 2, 4, 8, 16, 32, 64, 128), depths=(0.1, 0.5, 0.9)),
    "copying": dict(rows=256, windows=4, letters=(10, 20, 30, 40, 60)),
    "babilong": dict(rows=32, lengths=(1, 2, 4, 8, 16), examples=0),
    "fewshot": dict(rows=32, lengths=(1, 2, 4, 8, 16), examples=2),
}
PRESETS = {"tiny": (TINY, MEASURES)}
TRAIN_RATE, READ_RATE = 30e3 * 60, 90e3 * 60  # tokens a minute on two CPU cores, for the budget


@dataclass
class Run:
    """One folder of train.py: where it is, how it is made, and about how long that takes."""

    experiment: str
    seed: int
    folder: str
    argv: list
    needs: "Run | None"  # what it starts from

    @property
    def minutes(self):
        a = train.parse_arguments(self.argv)
        steps = a.steps or (train.POSTTRAIN if a.intervention else train.PRETRAIN)["steps"]
        measured = (2 if a.intervention else 1) * 13e3 * 64  # tokens: train.py ends with loss by position
        tokens = steps * (a.batch or train.POSTTRAIN["batch"]) * (a.T or lg.TASKS[a.task][1])
        return tokens / TRAIN_RATE + measured / READ_RATE


class MissingRuns(ValueError):
    """A figure needs runs that were not trained."""


@dataclass
class Lab:
    """The runs under one folder, their measurements, and the figures made of them."""

    out: str
    model: str = "mamba2"
    seeds: tuple = (0,)
    preset: str = "tiny"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    measurements: dict = field(default_factory=dict)  # of the figure at hand: {file: content}

    @functools.cached_property
    def corpus(self):
        return lg.load_corpus()

    def run(self, experiment, kind, seed):
        e = PRESETS[self.preset][0][experiment]
        parent = self.out if experiment == e.task else os.path.join(self.out, experiment)
        argv = ["--task", e.task, "--seed", str(seed), "--out", parent, *e.both.split()]
        needs = None
        if e.init:
            needs = self.run(*e.init, seed)
            argv += ["--init", needs.folder]
        else:
            argv += ["--model", self.model]
            needs = self.run(experiment, "base", seed) if kind != "base" else None
        if kind == "base":
            argv += e.base.split()
        else:
            intervention, _, scan = kind.partition("-")
            argv += ["--intervention", intervention, *(["--carry", "scan"] if scan else []), *e.after.split()]
        folder = os.path.join(parent, f"{self.model}-{e.task}-{kind}-s{seed}")
        return Run(experiment, seed, folder, argv, needs)

    def planned(self, experiments, kinds=None):
        """{(experiment, kind): runs, one per seed}, whether they exist or not."""
        return {
            (name, kind): [self.run(name, kind, seed) for seed in self.seeds]
            for name in experiments
            for kind in PRESETS[self.preset][0][name].kinds
            if kinds is None or kind in kinds
        }

    def runs(self, *experiments, kinds=None):
        """Those of `planned` that are finished; MissingRuns if there are none."""
        plan = self.planned(experiments, kinds)
        found = {key: [run for run in runs if train.finished(run.folder)] for key, runs in plan.items()}
        found = {key: runs for key, runs in found.items() if runs}
        if not found:
            raise MissingRuns(
                f"no finished run of {self.model} on {' or '.join(experiments)} under {self.out!r}, make "
                f"them with: python eval.py reproduce --model {self.model} --out {self.out}"
            )
        return found

    def measure(self, run, name, function):
        """function(model, T, **settings), kept in the run's folder as eval-{name}.json and read from there if
        that is younger than the checkpoint and was made with the same settings."""
        settings = json.loads(json.dumps(PRESETS[self.preset][1].get(name, {})))
        file, checkpoint = (os.path.join(run.folder, f) for f in (f"eval-{name}.json", lg.CHECKPOINT))
        again = f"python eval.py --out {self.out} --model {self.model}"
        kept = read_json(file, again) if os.path.exists(file) else {}
        if not (
            kept.get("settings") == settings
            and os.path.exists(checkpoint)
            and os.path.getmtime(file) >= os.path.getmtime(checkpoint)
        ):
            saved = lg.load_checkpoint(run.folder)
            layer, trained = saved["config"]["layer"], saved["settings"]
            if layer != self.model:
                raise ValueError(f"{run.folder} holds a {layer}, not a {self.model}: choose another --out")
            model = lg.LanguageModel.from_checkpoint(saved).to(self.device).eval()
            print(f"  {name} of {run.folder} ...", end="", flush=True)
            started = time.time()
            value = function(model, trained["T"], **settings)
            versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
            kept = dict(
                value=value, settings=settings, seed=run.seed, trained=trained, command=again,
                versions=versions, made=time.strftime("%Y-%m-%d %H:%M:%S"), seconds=time.time() - started,
            )  # fmt: skip
            train.write_json(file, kept)
            print(f" {kept['seconds']:.0f} s", flush=True)
        self.measurements[file] = kept
        return kept["value"]


def read_json(file, again):
    try:
        with open(file) as f:
            content = json.load(f)
        if not isinstance(content, dict):
            raise ValueError
        return content
    except ValueError:
        raise ValueError(f"{file} is cut off or no results of eval.py: remove it and run {again}") from None


# --------------------------------------------------------------------------------------------------
# The figures. Each takes (lab, path of its picture) and returns its lines of the summary: {what: number}


def heat(axis, values, rows, columns, title, highest, form="{:.2f}"):
    """A map with its numbers written in, dark blue for high: values (rows, columns)."""
    values = np.array(values)
    axis.imshow(values, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    for i, j in np.ndindex(*values.shape):
        colour = "white" if values[i, j] > 0.55 * highest else "black"
        axis.text(j, i, form.format(values[i, j]), ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_title(title, fontsize=10)


def losses(lab, runs, name="poswise"):
    """Per seed the result of lengthgen.position_wise on the task of the runs."""
    task = PRESETS[lab.preset][0][runs[0].experiment].task

    def function(model, T, rows, windows):
        return lg.position_wise(model, task, lab.corpus, T, windows, rows)

    return [lab.measure(run, name, function) for run in runs]


def mean_losses(measured, part, low, high=math.inf):
    return np.array([train.mean_loss(m, part, low, high) for m in measured])


def perplexity(axis, measured, part, kind):
    x = middles(measured[0]["edges"])
    curve(axis, x, [np.exp(m["parts"][part]["loss"]) for m in measured], kind)


def poswise(lab, path):
    """Position-wise perplexity (the paper's first figure): base, control and cured, far beyond T."""

    def gap(model, T, rows, windows):
        tokens, _ = lg.stream(lg.text, lg.Rows(lab.corpus, "val", rows, True, 0), T, windows)
        gap = lg.paired_gap(model, tokens, T)
        edges = [2**i for i in range(windows.bit_length())]  # ranges of blocks, doubling
        return dict(edges=edges, gap=[float(gap[a:b].mean()) for a, b in itertools.pairwise(edges)])

    found = lab.runs("echo", "text", kinds=("base", "zero", "state_passing", "tbtt"))
    panels = [
        p for task, n in (("echo", 2), ("text", 2)) for p in [task] * n if any(t == task for t, _ in found)
    ]
    figure, axes = page(len(panels))
    summary = {}
    for (task, kind), runs in found.items():
        measured, mine = losses(lab, runs), axes[panels.index(task) :]
        T, parts = measured[0]["T"], measured[0]["parts"]
        for axis, part in zip(mine, parts, strict=False):
            perplexity(axis, measured, part, kind)
            title = f"echo: {train.PART_MEANING[part]}" if task == "echo" else "trained on plain text"
            dress(axis, T, title, "position (tokens)", "perplexity")
            for where, low, high in (("inside T", 0, 1), ("beyond 64 T", 64, math.inf)):
                what = f"{task}, {part} part, {label(kind)}: loss {where}"
                summary[what] = mean_losses(measured, part, low, high).mean()
        if task == "text":
            gaps = [lab.measure(run, "gap", gap) for run in runs]
            edges = gaps[0]["edges"]
            curve(mine[1], middles(np.array(edges) * T), [g["gap"] for g in gaps], kind)
            dress(
                mine[1], T, "plain text: what the past costs", "position (tokens)", "paired gap (nats)", False
            )
            far = f"{edges[-2]} to {edges[-1]} T"
            summary[f"text, {label(kind)}: paired gap at {far}"] = np.mean([g["gap"][-1] for g in gaps])
    axes[0].legend(frameon=False, fontsize=8)
    keep(figure, path, f"Position-wise perplexity of {lab.model}, streamed from a zero state")
    return summary


def interventions(lab, path):
    """The four interventions and the control, mean and spread over seeds (the paper's second figure)."""
    figure, axes = page(2, width=5, height=4)
    summary = {}
    found = {kind: losses(lab, runs, "interventions") for (_, kind), runs in lab.runs("echo").items()}
    for axis, part in zip(axes, ("text", "echo"), strict=True):
        for kind, measured in found.items():
            perplexity(axis, measured, part, kind)
            for where, low, high in (("inside T", 0, 1), ("beyond 4 T", 4, math.inf)):
                means = mean_losses(measured, part, low, high)
                summary[f"{part} part, {label(kind)}: loss {where}"] = means.mean()
                if len(means) > 1:
                    summary[f"{part} part, {label(kind)}: loss {where}, highest minus lowest"] = np.ptp(means)
        dress(axis, measured[0]["T"], f"echo: {train.PART_MEANING[part]}", "position (tokens)", "perplexity")
    axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    n = len(lab.seeds)
    seeds = f"mean and range of {n} seeds" if n > 1 else f"seed {lab.seeds[0]}"
    keep(figure, path, f"Interventions on the initial state, {lab.model}, {seeds}")
    return summary


def state(lab, path):
    """Std of the full state over t, as in the paper, and how much each head grows beyond its size at T."""

    def function(model, T, rows, windows):
        at = [T // 4, T // 2, *(T * 2**i for i in range(windows.bit_length()))]
        some = lg.Rows(lab.corpus, "val", rows, True, 0)
        tokens, _ = lg.stream(lg.echo, some, T, windows)
        full, layers, heads = lg.state_std(model, tokens, at)
        return dict(T=T, at=at, full=full.tolist(), layers=layers.tolist(), heads=heads.tolist())

    kinds = ("base", "state_passing")
    figure, axes = page(3, width=5)
    summary, growths = {}, {}
    for (_, kind), runs in lab.runs("echo", kinds=kinds).items():
        measured = [lab.measure(run, "state", function) for run in runs]
        T, at = measured[0]["T"], measured[0]["at"]
        curve(axes[0], at, [m["full"] for m in measured], kind)
        first = at.index(T)
        full = np.mean([m["full"][-1] / m["full"][first] for m in measured])
        summary[f"{label(kind)}: std of the full state at {at[-1] // T} T over that at T"] = full
        growth = [np.array(m["layers"][-1]) / np.array(m["layers"][first]) for m in measured]
        growths[kind] = np.mean([np.array(m["heads"][-1]) / m["heads"][first] for m in measured], axis=0)
        for i, g in enumerate(np.mean(growth, axis=0)):
            summary[f"{label(kind)}: std of layer {i} at {at[-1] // T} T over that at T"] = g
    dress(axes[0], T, "std of the full state", "t (tokens)", "std")
    axes[0].legend(frameon=False, fontsize=8)
    for axis, (kind, growth) in zip(axes[1:], growths.items(), strict=False):
        L, H = growth.shape
        title = f"{label(kind)}: std at {at[-1] // T} T over std at T"
        heat(axis, growth, [f"layer {i}" for i in range(L)], range(H), title, 4, "{:.1f}")
        axis.set_xlabel("head")
    keep(figure, path, f"The state over time, {lab.model} on echo")
    return summary


def effrem(lab, path):
    """Effective remembrance: how much the predictions past 4 T change without the first t tokens."""

    def function(model, T, rows):
        starts = sorted({1, *(T * i // 8 for i in (1, 2, 4, 8, 12, 16, 20, 24, 28, 32))})
        some = lg.Rows(lab.corpus, "val", rows, True, 0)
        tokens, part = lg.stream(lg.echo, some, T, 5)
        pieces = [
            lg.effective_remembrance(model, x, starts, 4 * T) for x in np.split(tokens[:, :-1], rows // 16)
        ]
        distance = torch.cat(pieces, dim=1)  # in pieces, because every suffix is one more row of the batch
        means = [distance[:, torch.from_numpy(part[:, 4 * T :] == p)].mean(1).tolist() for p in (1, 2)]
        return dict(T=T, starts=starts, text=means[0], echo=means[1])

    figure, axes = page(2)
    summary = {}
    for (_, kind), runs in lab.runs("echo", kinds=("base", "zero", "state_passing", "tbtt")).items():
        measured = [lab.measure(run, "effrem", function) for run in runs]
        T, starts = measured[0]["T"], measured[0]["starts"]
        for axis, part in zip(axes, ("text", "echo"), strict=True):
            curve(axis, starts, [m[part] for m in measured], kind)
            at_T = np.mean([m[part][starts.index(T)] for m in measured])
            summary[f"EffRem(T) at 4 T, {part} part, {label(kind)}"] = at_T
    for axis, part in zip(axes, ("text", "echo"), strict=True):
        dress(axis, T, f"predictions of {part}", "t: tokens left out", "EffRem(t), total variation")
    axes[0].legend(frameon=False, fontsize=8)
    keep(figure, path, f"Effective remembrance at 4 T, {lab.model} on echo")
    return summary


def passkey(lab, path):
    """Passkey accuracy by depth and length, after fine-tuning at T: plain, and with fitted noise."""

    def function(model, T, rows, lengths, depths):
        accuracy = [[lg.passkey_accuracy(model, lab.corpus, T * n, d, rows) for n in lengths] for d in depths]
        return dict(T=T, lengths=lengths, depths=depths, accuracy=accuracy)

    figure, axes = page(2, width=5.5, height=3.2)
    summary = {}
    for axis, ((_, kind), runs) in zip(axes, lab.runs("passkey").items(), strict=False):
        measured = [lab.measure(run, "passkey", function) for run in runs]
        m, mean = measured[0], np.mean([m["accuracy"] for m in measured], axis=0)
        title = "fine-tuned, " + ("plain" if kind == "zero" else label(kind))
        heat(axis, mean, m["depths"], [f"{n}T" for n in m["lengths"]], title, 1)
        axis.set(xlabel="length", ylabel="depth of the key")
        for limit in (1, 8, 32, 128):
            upto = [i for i, n in enumerate(m["lengths"]) if n <= limit]
            summary[f"passkey, {title}: lowest accuracy up to {limit} T"] = mean[:, upto].min()
    keep(figure, path, f"Accuracy on a passkey of five digits, {lab.model}, T = {m['T']}")
    return summary


def copying(lab, path):
    """Copying accuracy: packed streams at 1 to 4 T, and single strings longer than those of training."""

    def function(model, T, rows, windows, letters):
        some = lg.Rows(lab.corpus, "val", rows, True, 0)
        tokens, part = lg.stream(lg.copy, some, T, windows)
        packed = lg.accuracy(model, tokens, part).unflatten(1, (windows, T)).nanmean((0, 2)).tolist()
        single = [float(lg.accuracy(model, *lg.copy(some, 2 * n + 3, n, n)).nanmean()) for n in letters]
        return dict(T=T, packed=packed, letters=letters, single=single)

    figure, axes = page(2)
    summary = {}
    for (_, kind), runs in lab.runs("copy").items():
        measured = [lab.measure(run, "copying", function) for run in runs]
        m = measured[0]
        x = np.arange(1, len(m["packed"]) + 1)
        for axis, where, key in ((axes[0], x, "packed"), (axes[1], m["letters"], "single")):
            curve(axis, where, [m[key] for m in measured], kind)
            for i, n in enumerate(where):
                what = f"packed stream at {n} T" if key == "packed" else f"one string of {n} letters"
                values = [m[key][i] for m in measured]
                summary[f"copying, {label(kind)}: {what}"] = np.mean(values)
    axes[0].set_title(f"packed strings of 5-20 letters, T = {m['T']}", fontsize=10)
    axes[0].set(xlabel="position in the stream (T)", ylabel="accuracy", ylim=(0, 1.02), xticks=x)
    axes[1].set_title("one string, from a zero state", fontsize=10)
    axes[1].set(xlabel="letters", ylim=(0, 1.02))
    axes[1].axvline(20, linestyle=":", color="black", linewidth=1)
    axes[1].text(20, 0.02, " longest in training", fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(frameon=False, fontsize=8)
    keep(figure, path, f"Copying random letters, {lab.model}")
    return summary


def babilong(lab, path):
    """BABILong qa1-qa5 by length, fine-tuned at T without interventions from three starts, and few-shot."""

    def function(model, T, rows, lengths, examples):
        T = lg.TASKS["babilong"][1]  # few-shot the checkpoint's own T is that of another task
        accuracy = [
            [
                lg.babilong_accuracy(model, *lg.babilong_prompts(lab.corpus, T * n, qa, rows, examples), qa)
                for n in lengths
            ]
            for qa in range(1, 6)
        ]
        return dict(T=T, lengths=lengths, accuracy=accuracy)

    starts = ("base", "state_passing", "tbtt")
    figure, axes = page(2 + len(starts), width=3.4)
    summary = {}
    for name, tuned, axis in (("babilong", "fine-tuned", axes[0]), ("fewshot", "two examples", axes[1])):
        for i, start in enumerate(starts):
            found = lab.runs(f"babilong/{start}") if name == "babilong" else lab.runs("echo", kinds=(start,))
            measured = [lab.measure(run, name, function) for runs in found.values() for run in runs]
            m, accuracy = measured[0], np.array([m["accuracy"] for m in measured])  # (seeds, qa, lengths)
            curve(axis, np.array(m["lengths"]) * m["T"], accuracy.mean(1), start)
            for n, value in zip(m["lengths"], accuracy.mean((0, 1)), strict=True):
                summary[f"BABILong, mean of qa1-5, {tuned}, {label(start)}, {n} T"] = value
            if name == "babilong":
                columns = [f"{n}T" for n in m["lengths"]]
                rows = [f"qa{k}" for k in range(1, 6)]
                heat(axes[2 + i], accuracy.mean(0), rows, columns, f"fine-tuned from {label(start)}", 1)
        dress(axis, m["T"], f"mean of qa1-qa5, {tuned}", "length (tokens)", "accuracy", logy=False)
        axis.set_ylim(0, 1)
        axis.axhline(1 / 6, color="black", linewidth=0.6)
    axes[0].legend(frameon=False, fontsize=8)
    keep(figure, path, f"BABILong, {lab.model}, T = {m['T']}; thin line: one of six rooms, blindly")
    return summary


def sweep(lab, path):
    """When does a model break? Loss beyond 4 T over that inside T, against training steps and against T."""
    points = {"steps": [], "T": []}
    names = [name for name in PRESETS[lab.preset][0] if name == "echo" or name.startswith("sweep/")]
    for (name, _), runs in lab.runs(*names, kinds=("base",)).items():
        measured = losses(lab, runs, "sweep")
        worse = mean_losses(measured, "text", 4) - mean_losses(measured, "text", 0, 1)
        steps = lg.load_checkpoint(runs[0].folder)["settings"]["steps"]
        for what, x in (("steps", steps), ("T", measured[0]["T"])):
            if name == "echo" or name.startswith(f"sweep/{what}"):
                points[what].append((x, worse.mean()))
    figure, axes = page(2, sharey=True)
    summary = {}
    for axis, (what, unit) in zip(
        axes, (("steps", "training steps"), ("T", "training length T")), strict=True
    ):
        x, y = zip(*sorted(points[what]), strict=True)
        curve(axis, x, [y], "base")
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, x)
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3)
        summary |= {f"loss beyond 4 T minus inside T, {what} = {a}": b for a, b in zip(x, y, strict=True)}
    axes[0].set_ylabel("text loss beyond 4 T minus in T (nats)")
    axes[0].set_title("longer training, the same T", fontsize=10)
    axes[1].set_title("longer T, as many tokens", fontsize=10)
    keep(figure, path, f"Unexplored states: when does {lab.model} break?")
    return summary


FIGURES = {  # name: (function, experiments it is made of, minutes of measuring a seed on two CPU cores)
    "poswise": (poswise, ("echo", "text"), 1.5),
    "interventions": (interventions, ("echo",), 1),
    "state": (state, ("echo",), 0.3),
    "effrem": (effrem, ("echo",), 0.3),
    "copying": (copying, ("copy",), 0.2),
    "passkey": (passkey, ("passkey",), 3),
    "sweep": (sweep, ("echo", *(e for e in TINY if e.startswith("sweep/"))), 1.5),
    "babilong": (babilong, ("echo", *(e for e in TINY if e.startswith("babilong/"))), 4),
}  # fmt: skip


def draw(lab, name):
    """One figure: its picture, its lines of the summary, its part of results.json."""
    started = time.time()
    folder = os.path.join(lab.out, "figures")
    train.make_folder(folder)
    path = os.path.join(folder, f"{lab.model}-{name}.png")
    lab.measurements = {}
    summary = {what: float(value) for what, value in FIGURES[name][0](lab, path).items()}
    file = os.path.join(lab.out, "results.json")
    results = read_json(file, "python eval.py") if os.path.exists(file) else {}
    results.setdefault(lab.model, {})[name] = dict(
        picture=path, command=f"python eval.py {name} --out {lab.out} --model {lab.model}", summary=summary,
        measurements=lab.measurements,
    )  # fmt: skip
    train.write_json(file, results)
    print(f"{name}: {path}   ({train.clock(time.time() - started)})", flush=True)
    return summary


def print_summary(summaries):
    for name, summary in summaries.items():
        print(f"\n{name}: {FIGURES[name][0].__doc__.splitlines()[0]}")
        for what, value in summary.items():
            print(f"  {what:84}{value:9.3f}")


def reproduce(lab, names):
    """Train what is missing and draw, figure by figure; goes on where it was stopped."""

    def chain(run):
        return [*(chain(run.needs) if run.needs else []), run]

    work, planned = [], set()  # of (figure, minutes, Run or None to draw)
    for name in names:
        _, experiments, minutes = FIGURES[name]
        missing = [r for some in lab.planned(experiments).values() for run in some for r in chain(run)]
        missing = {r.folder: r for r in missing if r.folder not in planned and not train.finished(r.folder)}
        planned |= missing.keys()
        work += [(name, run.minutes, run) for run in missing.values()]
        drawn = os.path.exists(os.path.join(lab.out, "figures", f"{lab.model}-{name}.png")) and not missing
        work.append((name, 0.05 if drawn else minutes * len(lab.seeds), None))
    print("budget in minutes on two CPU cores, of what is still to do")
    for name in names:
        runs = [minutes for figure, minutes, run in work if figure == name and run]
        draws = sum(minutes for figure, minutes, run in work if figure == name and not run)
        print(f"  {name:14}{sum(runs):5.1f} to train {len(runs):2} runs {draws:5.1f} to measure")
    total, done, started = sum(minutes for _, minutes, _ in work), 0.0, time.time()
    print(f"  {'in all':14}{total:5.1f}")
    summaries = {}
    for name, minutes, run in work:
        pace = (time.time() - started) / done if done > 2 else 60  # seconds for a minute of the budget
        left = train.clock((total - done) * pace)
        what = f"python train.py {' '.join(run.argv)}" if run else "measure and draw"
        print(f"\n[{done / total:4.0%}, about {left} left] {name}: {what}", flush=True)
        if run:
            train.main(run.argv, lab.corpus)
        else:
            summaries[name] = draw(lab, name)
        done += minutes
    print(f"\nreproduced in {train.clock(time.time() - started)}, budget {total:.0f} minutes")
    return summaries


def load_init(args, device):
    """The model of --init on the device, its settings, and the name of its tokenizer."""
    checkpoint = lg.load_checkpoint(args.init)
    settings = checkpoint["settings"]
    model = lg.LanguageModel.from_checkpoint(checkpoint).to(device).eval()
    return model, settings, args.tokenizer or settings.get("tokenizer") or "bytes"


def given_checkpoint(args, device):
    """poswise of one checkpoint, ours or another's: how it breaks past its training length."""
    model, settings, tokenizer = load_init(args, device)
    T, task = args.T or settings["T"], args.task or settings["task"]
    corpus = lg.load_corpus(args.data, tokenizer, model.config.vocab_size)
    train.check_vocabulary(model, corpus, args.init)
    train.make_folder(args.out)
    progress = train.Progress("loss by position")
    measured = lg.position_wise(model, task, corpus, T, args.windows, args.rows, progress=progress)
    path = os.path.join(args.out, f"poswise-{name_of(args.init)}")
    train.print_table({"base": measured})
    train.draw_position_wise({"base": measured}, f"{path}.png", f"{args.init} on {task}")
    train.write_json(f"{path}.json", dict(measured, command=" ".join(sys.argv)))
    print(f"picture: {path}.png")


def name_of(checkpoint):
    """The last part of a path or of a hub name: for the names of files."""
    return os.path.basename(os.path.abspath(checkpoint))


def load_speaker(args, device):
    """The model of --init, its encoding, and a corpus of nothing but the special tokens."""
    model, _, tokenizer = load_init(args, device)
    encoding = lg.load_encoding(tokenizer)
    corpus = lg.Corpus("what is said to it", None, None, encoding.n_vocab, encoding.special)
    train.check_vocabulary(model, corpus, args.init)
    return model, encoding, corpus


def given_babilong(args, device):
    """Accuracy of one checkpoint on published BABILong files: --data with qa1 to qa5 in their paths."""
    found = [
        glob.glob(os.path.join(p, "**", "*.json"), recursive=True) if os.path.isdir(p) else [p]
        for p in args.data
    ]
    files = {f: int(m[1]) for f in sorted(itertools.chain(*found)) if (m := re.search(r"qa([1-5])(?!\d)", f))}
    if not files:
        raise ValueError(f"no file with qa1 to qa5 in its path in {' '.join(args.data)}")
    model, encoding, corpus = load_speaker(args, device)
    train.make_folder(args.out)

    def decode(tokens):
        return encoding.decode([int(x) for x in tokens if x < encoding.n_vocab])

    accuracy = {}
    for i, (file, qa) in enumerate(files.items()):
        asked = lg.babilong_published(file, encoding, corpus.bos, args.rows)
        accuracy[file] = lg.babilong_accuracy(model, *asked, qa, decode)
        print(f"[{i + 1}/{len(files)}] {file}: {accuracy[file]:.3f} of {len(asked[0])}", flush=True)
    path = os.path.join(args.out, f"babilong-{name_of(args.init)}.json")
    train.write_json(path, dict(accuracy=accuracy, command=" ".join(sys.argv)))
    print(f"numbers: {path}")


def sample(args, device):
    """Print what a checkpoint says after a prompt, as it says it."""
    model, encoding, corpus = load_speaker(args, device)
    torch.manual_seed(args.seed)
    tokens = np.array([[corpus.bos, *encoding.encode(args.prompt, disallowed_special=())]])
    special = {corpus.bos: "<|bos|>", corpus.sep: "<|sep|>"}
    letters = codecs.getincrementaldecoder("utf-8")("replace")  # a letter may come in several tokens
    for i, token in enumerate(lg.generate(model, tokens, args.tokens, args.temperature, args.top_k)):
        token = int(token)
        text = special.get(token, "")
        if token not in special and token < encoding.n_vocab:  # what is neither is padding of the vocabulary
            text = letters.decode(encoding.decode_single_token_bytes(token))
        print(args.prompt * (i == 0) + text, end="", flush=True)
    print()


def parse_arguments(argv):
    p = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="*", help=f"reproduce, sample, or some of {', '.join(FIGURES)} (all)")
    p.add_argument("--out", default="runs", help="folder of the runs")
    p.add_argument("--model", default="mamba2", choices=train.TINY)
    p.add_argument("--preset", default="tiny", choices=PRESETS, help="what reproduce trains and measures")
    p.add_argument("--seeds", type=int, help="how many (reproduce: 1; drawing: all there are)")
    p.add_argument("--device", help="cuda, mps or cpu (the first there is)")
    p.add_argument("--init", metavar="RUN", help="poswise, babilong, sample: of this checkpoint")
    p.add_argument("--task", choices=lg.TASKS, help="with --init: what it reads (that of the checkpoint)")
    p.add_argument("--T", type=int, help="with --init: its training length (that of the checkpoint)")
    p.add_argument(
        "--data", nargs="+", metavar="PATH", help="with --init: text (the standard library), or BABILong"
    )
    p.add_argument("--tokenizer", help="with --init: as in train.py (that of the checkpoint)")
    p.add_argument("--windows", type=int, default=64, help="with --init: length of the streams, in T")
    p.add_argument("--rows", type=int, default=64, help="with --init: how many streams")
    p.add_argument("--prompt", default="import os\n", help="sample: what comes first")
    p.add_argument("--tokens", type=int, default=400, help="sample: how many to say")
    p.add_argument("--temperature", type=float, default=0.8, help="sample: 0 says the likeliest")
    p.add_argument("--top-k", type=int, help="sample: only the k likeliest tokens")
    p.add_argument("--seed", type=int, default=0, help="sample: another seed, another text")
    args = p.parse_args(argv)
    for name in ("seeds", "T", "windows", "rows", "tokens", "top_k"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature must be finite and not negative, got {args.temperature}")
    for name in ("task", "T", "data", "tokenizer"):
        if getattr(args, name) and not args.init:
            raise ValueError(f"--{name} goes with --init RUN, figures of own runs need none")
    for name in args.what:
        if name not in (*FIGURES, "reproduce", "sample"):
            raise ValueError(
                f"unknown figure {name!r}, expected reproduce, sample or some of {', '.join(FIGURES)}"
            )
    return args


def main(argv=None):
    args = parse_arguments(argv)
    names = [name for name in args.what if name in FIGURES]
    if "sample" in args.what or args.init:
        if not args.init:
            raise ValueError("sample needs a checkpoint: give --init RUN, the folder of a run of train.py")
        single = {"sample": sample, "poswise": given_checkpoint, "babilong": given_babilong}
        if len(args.what) != 1 or args.what[0] not in single:
            raise ValueError(
                f"--init goes with one of {', '.join(single)}, got {' '.join(args.what) or 'nothing'}"
            )
        if args.what == ["babilong"] and not args.data:
            raise ValueError("babilong of a checkpoint needs --data, the published files or their folder")
        return single[args.what[0]](args, train.choose_device(args.device))
    lab = Lab(args.out, args.model, preset=args.preset)
    if "reproduce" in args.what:
        train.make_folder(args.out)
        lab.device = train.choose_device(args.device)
        lab.seeds = range(args.seeds or 1)
        summaries = reproduce(lab, names or list(FIGURES))
    else:
        lab.seeds = range(args.seeds) if args.seeds else seeds_found(args.out, args.model)
        if not lab.seeds:
            raise ValueError(
                f"no runs of {args.model} under {args.out!r}, make them with: "
                f"python eval.py reproduce --model {args.model} --out {args.out}"
            )
        lab.device = train.choose_device(args.device)
        summaries = {}
        for name in names or FIGURES:
            try:
                summaries[name] = draw(lab, name)
            except MissingRuns as error:
                if names:  # asked for by name
                    raise
                print(f"{name}: left out, {error}")
    print_summary(summaries)


def seeds_found(out, model):
    names = [os.path.basename(f) for f in glob.glob(os.path.join(glob.escape(out), f"{model}-*-s*"))]
    return sorted({int(n.rpartition("-s")[2]) for n in names if n.rpartition("-s")[2].isdigit()})


if __name__ == "__main__":
    train.run_command(main)
