"""The key figures of the paper (Buitrago & Gu, ICML 2025), from one command.

    python eval.py reproduce                        train what is missing, then draw every figure
    python eval.py                                  draw what the runs that are there allow
    python eval.py poswise effrem                   draw these figures
    python eval.py poswise --init RUN --data PATH   how a given checkpoint breaks past its training length
    python eval.py babilong --init RUN --data FILE  its accuracy on published BABILong files
    python eval.py sample --init RUN --prompt "import os"

Runs are the folders that train.py writes under --out. Every measurement is kept beside its checkpoint as one
JSON file. Pictures go to {out}/figures, all numbers to {out}/results.json. Letters are those of lengthgen.py;
positions and lengths are multiples of the training length T.
"""

import argparse
import functools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

import lengthgen as lg

# ---- 1. The look of a picture, the table ----


class Panel(NamedTuple):
    """One axis of a figure and one block of the table: curves of values over x, most often multiples of T."""

    title: str
    xlabel: str
    ylabel: str
    curves: dict  # label of a run: (x (n,), values (seeds, n))


COLOURS = {  # colour-blind people tell them apart (Okabe & Ito); other labels take matplotlib's next colour
    "base": "#D55E00", "zero": "#999999", "random_noise": "#E69F00", "fitted_noise": "#56B4E9",
    "tbtt": "#009E73", "state_passing": "#0072B2",
}  # fmt: skip
NAMES = {"zero": "control", "tbtt": "TBTT", "state_passing-scan": "state passing, scan alone"}


def pretty(label):
    return NAMES.get(label, label.replace("_", " "))


def panels_of(name, found):
    """The panels of a measure: one for each list of values that its measurements hold beside the places "x".

    found: {label of a run: measurements, one per seed}
    """
    _, _, xlabel, ylabel = MEASURES[name]
    panels = {}  # by title
    for label, measured in found.items():
        # the measurements come from files, which may be damaged
        with lg.reading(f"eval-{name}.json of {label}", "a measurement: remove it"):
            titles = [title for title in measured[0] if title != "x"]
            for title in titles:
                numbers = np.array([[m["x"], m[title]] for m in measured], float)  # (seeds, 2, n)
                assert numbers.ndim == 3 and not (abs(numbers) > 1e100).any(), "no rows of plain numbers"
                panel = panels.setdefault(title, Panel(title, xlabel, ylabel, {}))
                panel.curves[label] = (numbers[0, 0].tolist(), numbers[:, 1].tolist())
    return list(panels.values())


def draw_panels(panels, path, title):
    """Draw panels side by side into one PNG: the mean over seeds, shaded from the lowest to the highest."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.4 * columns + 1.3, 3.1 * rows))  # legible at the width of a page
    in_legend = None
    for i, panel in enumerate(panels):
        axis = figure.add_subplot(rows, columns, i + 1)
        # base and control are solid, cures are dashed, and dotted where only half of the state is carried
        for label, (x, values) in panel.curves.items():
            style = "--"
            if label in ("base", "zero"):
                style = "-"
            if label.endswith("-scan"):
                style = ":"
            colour = COLOURS.get(label.removesuffix("-scan"))
            (line,) = axis.plot(x, np.mean(values, 0), style, color=colour, marker=".", label=pretty(label))
            lowest, highest = np.min(values, 0), np.max(values, 0)
            axis.fill_between(x, lowest, highest, color=line.get_color(), alpha=0.2, linewidth=0)

        if "(T)" in panel.xlabel:  # places in multiples of T, with a dotted line at T
            axis.axvline(1, linestyle=":", color="black", linewidth=1)
            axis.text(1, 0.93, " T", transform=axis.get_xaxis_transform(), fontsize=9)
            axis.set_xscale("log", base=4)
            axis.xaxis.set_major_formatter("{x:.3g}")
        axis.set_title(panel.title, fontsize=10)
        axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.grid(alpha=0.3)

        # one legend for all panels that show the same runs
        is_last = i + 1 in (columns, len(panels)) or panels[i + 1].curves.keys() != panel.curves.keys()
        if is_last and panel.curves.keys() != in_legend:
            axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
            in_legend = panel.curves.keys()
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    # white, which reads on light and dark pages alike
    lg.write_atomically(path, functools.partial(figure.savefig, dpi=150, format="png", facecolor="white"))


def print_panels(panels):
    """Print every number that the panels draw: the mean over seeds, and highest minus lowest."""
    for panel in panels:
        x, _ = next(iter(panel.curves.values()))
        print(f"\n{panel.title}: {panel.ylabel} by {panel.xlabel}")
        print_row("", x, ".3g")
        for label, (_, values) in panel.curves.items():
            print_row(pretty(label), np.mean(values, 0), ".3f")
            if len(values) > 1:
                print_row("  highest - lowest", np.ptp(values, 0), ".3f")


def print_row(name, values, form):
    print(f"{name:25} " + "".join(f"{value:7{form}}" for value in values), flush=True)


def print_verdict(panels):
    """Say for each curve of loss against position whether it holds past T, if it goes beyond."""
    print()
    for panel in panels:
        for label, (x, values) in panel.curves.items():
            loss = np.mean(values, 0)
            if x[-1] > 1:
                inside = loss[x.index(1)]
                worst = np.nanmax(loss[x.index(1) + 1 :]) - inside
                verdict = "breaks past T"
                if worst < 0.5:
                    verdict = "gets worse past T"
                if worst < 0.1:
                    verdict = f"holds to {x[-1]:g} T"
                line = f"{panel.title} loss {inside:.2f} in T, at worst {worst:+.2f} beyond: {verdict}"
                print(f"{pretty(label)}: {line}")


def report(measured, picture, title):
    """The table, a verdict and the picture of losses by position. measured: {label: a measurement}."""
    panels = panels_of("poswise", {label: [measurement] for label, measurement in measured.items()})
    print_panels(panels)
    print_verdict(panels)
    draw_panels(panels, picture, title)
    print(f"picture: {picture}")


# ---- 2. The figures ----
# A measure takes model and, by keyword, corpus, T and how much to measure. It returns the places "x" and
# lists of as many values, each of which becomes a panel of that title.


def measure_gap(model, corpus, T, B, windows):
    """lengthgen.paired_gap of plain text, as means over ranges of blocks that double in length."""
    tokens, _ = lg.stream(lg.text, lg.Rows(corpus, "val", B, True, 0), T, windows)
    gap = lg.paired_gap(model, tokens, T)
    ends = [2**i for i in range(1, windows.bit_length())]
    means = [float(gap[end // 2 : end].mean()) for end in ends]
    return {"x": ends, "the same text after the whole past, minus after T": means}


def measure_state(model, corpus, T, B, windows):
    """How much lengthgen.state_std grows from T on, on streams of echo."""
    at = [2**i * T // 2 for i in range(windows.bit_length() + 1)]  # T/2, T, 2T, 4T, ...
    tokens, _ = lg.stream(lg.echo, lg.Rows(corpus, "val", B, True, 0), T, windows)
    full, layers, _ = lg.state_std(model, tokens, at)
    measured = {"x": [position / T for position in at], "the full state": (full / full[1]).tolist()}
    for i, layer in enumerate(layers.T):
        measured[f"layer {i}"] = (layer / layer[1]).tolist()
    return measured


def measure_retention(model, corpus, T, B):
    """How much of its state each head keeps over T: the mean of exp(log a_1 + ... + log a_T), sorted."""
    tokens, _ = lg.echo(lg.Rows(corpus, "val", B, True, 0), T)
    kept = []
    for log_a in lg.decays(model, tokens[:, :-1]):
        share = log_a.sum(1).exp().mean(0)  # (H,), or (H, K) with one decay per key channel
        kept += share.reshape(len(share), -1).mean(1).tolist()
    return {"x": list(range(1, len(kept) + 1)), "what heads keep over T": sorted(kept)}


def measure_changed(model, corpus, T, B, windows, amounts, operation):
    """Loss beyond 4 T on echo when a model forgets faster without training: by operation(log_a, amount)."""
    tokens, part = lg.stream(lg.echo, lg.Rows(corpus, "val", B, True, 0), T, windows)
    bins = np.where(np.arange(T * windows) < 4 * T, -1, part - 1)  # 0 is text, 1 is echo
    losses = []
    for amount in amounts:
        with lg.changed_decay(model, functools.partial(operation, other=amount)):
            total, count = lg.streaming_loss(model, tokens, bins, lg.segment_for(B))
        losses.append(total / count)
    text, echo = torch.stack(losses, 1).tolist()
    return {"x": amounts, "text": text, "echo": echo}


def measure_effrem(model, corpus, T, B):
    """The mean of lengthgen.effective_remembrance over the predictions of each part of an episode of echo."""
    starts = sorted({1, *(T * i // 8 for i in (1, 2, 4, 8, 12, 16, 20, 24, 28, 32))} - {0})
    tokens, part = lg.stream(lg.echo, lg.Rows(corpus, "val", B, True, 0), T, 5)
    # a few rows at a time, because every suffix is one more row of the batch
    pieces = np.split(tokens[:, :-1], range(16, B, 16))
    distances = [lg.effective_remembrance(model, piece, starts, 4 * T) for piece in pieces]
    distance = torch.cat(distances, dim=1)  # (starts, B, T)
    part = torch.from_numpy(part[:, 4 * T :])
    text = distance[:, part == 1].mean(1).tolist()
    echo = distance[:, part == 2].mean(1).tolist()
    x = [start / T for start in starts]
    return {"x": x, "predictions of text": text, "predictions of echo": echo}


def measure_packed(model, corpus, T, B, windows):
    """The mean of lengthgen.accuracy over the copied letters in each window of a stream of packed strings."""
    tokens, part = lg.stream(lg.copy, lg.Rows(corpus, "val", B, True, 0), T, windows)
    right = lg.accuracy(model, tokens, part == 1).unflatten(1, (windows, T))
    return {"x": list(range(1, windows + 1)), "packed strings": right.nanmean((0, 2)).tolist()}


def measure_passkey(model, corpus, T, B, lengths):
    """The share of windows whose five digits come first in the greedy continuation."""
    measured = {"x": lengths}
    for distance in (1, 3, 8):
        shares = []
        for length in lengths:
            depth = max(0, 1 - distance / length)
            tokens, part = lg.passkey(lg.Rows(corpus, "val", B, False, 0), T * length, depth)
            shares.append(exact_match(model, tokens, part == 2))
        measured[f"up to {distance} T of filler after the key"] = shares
    return measured


def measure_babilong(model, corpus, T, B, lengths):
    """The share of our own stories whose question is answered in the very words."""
    shares = []
    for length in lengths:
        tokens, part = lg.babilong(lg.Rows(corpus, "val", B, False, 0), T * length)
        shares.append(exact_match(model, tokens, part))
    return {"x": lengths, "Where is Mary?": shares}


def exact_match(model, tokens, asked):
    """The share of rows where the likeliest token is the target at every place that is asked for (B, N)."""
    right = lg.accuracy(model, tokens, asked).nan_to_num(1.0)
    return float((right == 1).all(1).double().mean())


AT = "position (T)"
LOSS = "loss (nats per token)"
BEYOND = "loss beyond 4 T (nats)"
MINUS = [0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2]
TIMES = [1, 1.5, 2, 3, 5, 8, 12]
on_echo = functools.partial(lg.position_wise, task_name="echo")
on_text = functools.partial(lg.position_wise, task_name="text")
minus = functools.partial(measure_changed, operation=torch.sub)
times = functools.partial(measure_changed, operation=torch.mul)
MEASURES = {  # name: (function, how much it measures, the labels of the axes); B streams or windows
    "poswise": (on_echo, dict(B=64, windows=256), AT, LOSS),
    "interventions": (on_echo, dict(B=256, windows=64), AT, LOSS),
    "text": (on_text, dict(B=128, windows=64), AT, LOSS),
    "gap": (measure_gap, dict(B=128, windows=64), AT, "paired gap (nats)"),
    "state": (measure_state, dict(B=64, windows=64), "t (T)", "std over that at T"),
    "effrem": (measure_effrem, dict(B=64), "t: tokens left out (T)", "EffRem(t), total variation"),
    "retention": (measure_retention, dict(B=256), "head, sorted", "share of the state"),
    "minus": (minus, dict(B=32, windows=64, amounts=MINUS), "d: log_a minus d", BEYOND),
    "times": (times, dict(B=32, windows=64, amounts=TIMES), "c: log_a times c", BEYOND),
    "packed": (measure_packed, dict(B=256, windows=4), AT, "accuracy"),
    "passkey": (measure_passkey, dict(B=32, lengths=[1, 2, 4, 8, 16, 32, 64, 128]), "length (T)", "accuracy"),
    "babilong": (measure_babilong, dict(B=64, lengths=[1, 2, 4, 8, 16]), "length (T)", "accuracy"),
}
PAIR = ["base", "state_passing"]
MAIN = ["base", "zero", "tbtt", "state_passing"]
ALL = [*COLOURS, "state_passing-scan"]
STARTS = {"base": "from-base/zero", "state_passing": "from-sp/zero", "tbtt": "from-tbtt/zero"}
STEPS = {"200 steps": "steps200/base", "400 steps": "steps400/base", "1400 steps": "base"}
LENGTHS = {"T = 26": "T26/base", "T = 50": "base", "T = 98": "T98/base"}
FAST = ["retention", "minus", "times"]
FIGURES = {  # name: (title, experiment of PLAN, what is drawn: (measure, task, labels or {label: run}))
    "poswise": ("Loss by position far beyond T", "echo", [("poswise", "echo", MAIN)]),
    "interventions": ("The interventions on the initial state", "echo", [("interventions", "echo", ALL)]),
    "text": ("Streams of pure text", "mixed", [("text", "mixed", [*COLOURS]), ("gap", "mixed", [*COLOURS])]),
    "state": ("The std of the state, over that at T", "echo", [("state", "echo", PAIR)]),
    "forgetting": ("Why not simply forget faster?", "echo", [(measure, "echo", PAIR) for measure in FAST]),
    "effrem": ("Effective remembrance at 4 T", "echo", [("effrem", "echo", MAIN)]),
    "copying": ("Copying random letters", "copy", [("packed", "copy", MAIN)]),
    "passkey": ("A passkey after fine-tuning", "passkey", [("passkey", "passkey", ["zero", "fitted_noise"])]),
    "babilong": ("BABILong after fine-tuning", "babilong", [("babilong", "babilong", STARTS)]),
    "sweep": ("When does a base break?", "sweep", [("interventions", "echo", x) for x in (STEPS, LENGTHS)]),
}

# ---- 3. Keeping measurements, drawing ----


def run_folder(out, model, task, label, seed):
    """The folder of a run of train.py. label: "base", or the intervention, with "-scan" for --carry scan.

    A label "parent/base" is a run under --out {out}/parent.
    """
    parent, _, label = label.rpartition("/")
    return os.path.join(out, parent, f"{model}-{task}-{label}-s{seed}")


def finished(folder):
    """The checkpoint in a folder whose run reached its last step, else None."""
    if not os.path.exists(os.path.join(folder, lg.CHECKPOINT)):
        return None
    checkpoint = lg.load_checkpoint(folder)
    with lg.reading(folder, "a run of train.py"):
        return checkpoint if checkpoint["step"] == checkpoint["settings"]["steps"] else None


class MissingRuns(ValueError):
    """A figure has no finished runs to draw."""


def draw(name, args, device):
    """Draw one figure of the runs under --out, print its numbers, and add them to results.json."""
    title, _, blocks = FIGURES[name]
    panels = []
    for measure, task, labels in blocks:
        if isinstance(labels, list):  # an intervention that somebody added is compared with the others
            forks = [label for label in lg.INTERVENTIONS if label not in COLOURS]
            labels = {label: label for label in [*labels, *forks]}
        found = {}
        for label, run in labels.items():
            for seed in range(args.seeds):
                folder = run_folder(args.out, args.model, task, run, seed)
                checkpoint = finished(folder)
                if checkpoint:
                    measurement = measure_run(measure, folder, checkpoint, device)
                    found.setdefault(label, []).append(measurement)
        if not found:
            command = f"python eval.py reproduce {name} --model {args.model} --out {args.out}"
            raise MissingRuns(f"no finished run of {args.model} on {task}, make it with: {command}")
        panels += panels_of(measure, found)
    path = os.path.join(args.out, "figures", f"{args.model}-{name}.png")
    draw_panels(panels, path, f"{title}\n{args.model}, {args.seeds} seed{'s' * (args.seeds > 1)}")
    print(f"\n{name}: {path}")
    print_panels(panels)

    # the numbers of other figures and architectures stay
    file = os.path.join(args.out, "results.json")
    results = read_json(file)
    command = f"python eval.py {name} --out {args.out} --model {args.model} --seeds {args.seeds}"
    entry = dict(picture=path, command=command, versions=versions())
    entry["panels"] = [panel._asdict() for panel in panels]
    results.setdefault(args.model, {})[name] = entry
    write_json(file, results)


@functools.cache
def default_corpus():
    return lg.load_corpus()


def measure_run(name, folder, checkpoint, device):
    """A measurement of a run, from its file unless the checkpoint is younger or the settings are others."""
    function, settings, _, _ = MEASURES[name]
    file = os.path.join(folder, f"eval-{name}.json")
    kept = read_json(file)
    is_old = not kept or os.path.getmtime(file) < os.path.getmtime(os.path.join(folder, lg.CHECKPOINT))
    if is_old or kept.get("settings") != settings or len(kept.get("value", "")) < 2:
        print(f"  {name} of {folder} ...", flush=True)
        trained = checkpoint["settings"]
        if trained.get("data") != default_corpus().name:
            found = f"was trained on {trained.get('data')}, not on {default_corpus().name}"
            raise ValueError(f"{folder} {found}: choose another --out")
        model = lg.model_from_checkpoint(checkpoint).to(device).eval()
        value = function(model, corpus=default_corpus(), T=trained["T"], **settings)
        kept = dict(value=value, settings=settings, trained=trained, versions=versions())
        write_json(file, kept)
    return kept["value"]


def versions():
    """What made a number: the versions of Python, PyTorch and NumPy, and the date."""
    date = time.strftime("%Y-%m-%d %H:%M")
    return dict(python=sys.version.split()[0], torch=str(torch.__version__), numpy=np.__version__, date=date)


def read_json(file):
    """Dictionaries in one, from a file that eval.py wrote; {} if there is none, ValueError if damaged."""
    if not os.path.exists(file):
        return {}
    with lg.reading(file, "results of eval.py: remove it"), open(file) as f:
        return {key: dict(value) for key, value in json.load(f).items()}


def write_json(file, value):
    lg.write_text(file, json.dumps(value, indent=1))


# ---- 4. The plan: command lines of train.py, which skips what is finished ----

# not pre-trained for longer, because the base then learns by itself to drop the string before
COPY = "--task copy --T 44 --steps 1000"
AFTER_COPY = f"{COPY} --lr 2e-3 --zero-prob 0.2"
# the base of echo can repeat what it has just read
PASSKEY = "--task passkey --T 160 --batch 32 --steps 600 --lr 3e-3 --zero-prob 0.1 --init {base}"
BABILONG = "--task babilong --T 144 --batch 32 --steps 500 --lr 3e-3 --intervention zero"
PLAN = {  # experiment: command lines in the order of dependence; {each} is a line for each intervention,
    # {base}, {tbtt}, ... are the folders of the runs of echo
    "echo": ["--task echo --intervention {each}", "--task echo --intervention state_passing --carry scan"],
    "mixed": ["--task mixed", "--task mixed --intervention {each}"],
    "copy": [COPY, f"{AFTER_COPY} --intervention zero", f"{AFTER_COPY} --intervention state_passing"],
    "passkey": ["--task echo", f"{PASSKEY} --intervention zero", f"{PASSKEY} --intervention fitted_noise"],
    "babilong": [
        "--task echo --intervention state_passing",
        "--task echo --intervention tbtt",
        BABILONG + " --init {base} --out {out}/from-base",
        BABILONG + " --init {state_passing} --out {out}/from-sp",
        BABILONG + " --init {tbtt} --out {out}/from-tbtt",
    ],
    "sweep": [  # batches of as many tokens
        "--task echo",
        "--task echo --steps 200 --out {out}/steps200",
        "--task echo --steps 400 --out {out}/steps400",
        "--task echo --T 26 --batch 123 --out {out}/T26",
        "--task echo --T 98 --batch 33 --out {out}/T98",
    ],
}


def command_lines(experiment, out, model, seed):
    """The command lines of an experiment with everything filled in, as lists of words."""
    folders = {label: run_folder(out, model, "echo", label, seed) for label in COLOURS}
    lines = []
    for template in PLAN[experiment]:
        for name in lg.INTERVENTIONS if "{each}" in template else [""]:
            words = [word.format(each=name, out=out, **folders) for word in template.split()]
            lines.append(["--model", model, "--seed", str(seed), "--out", out, *words])
    return lines


def train_for(names, args):
    """Train what some figures need, one command line after the other."""
    lines = []
    for name in names:
        for seed in range(args.seeds):
            for line in command_lines(FIGURES[name][1], args.out, args.model, seed):
                if line not in lines:
                    lines.append(line)
    started = time.time()
    for i, line in enumerate(lines, 1):
        print(f"\nrun {i} of {len(lines)}, {clock(time.time() - started)} minutes gone")
        print(f"python train.py {shlex.join(line)}", flush=True)
        run_train(line)


def run_train(line):
    """Run one command line of train.py as a reader would; where it fails, this program ends as it did."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
    code = subprocess.run([sys.executable, script, *line]).returncode
    if code:
        sys.exit(code)


# ---- 5. One given checkpoint, `sample` ----


def load_model(args):
    """The model of --init on the device, the settings of its run, and the name of its tokenizer."""
    checkpoint = lg.load_checkpoint(args.init)
    model = lg.model_from_checkpoint(checkpoint).to(choose_device(args.device)).eval()
    settings = checkpoint["settings"]
    return model, settings, args.tokenizer or settings.get("tokenizer") or "bytes"


def check_vocabulary(model, corpus, name):
    """Raise ValueError if the model was trained with another tokenizer than the corpus was read with."""
    known = model.config.vocab_size
    if not 0 <= known - corpus.vocab_size < 128:  # transformers counts the padding of a vocabulary as words
        counts = f"{name} knows {known} tokens, the corpus has {corpus.vocab_size}"
        raise ValueError(f"{counts}: choose the --tokenizer that it was trained with")


def given_poswise(args):
    """How one checkpoint, ours or another library's, breaks past its training length."""
    model, settings, tokenizer = load_model(args)
    T = args.T or settings["T"]
    task = args.task or settings["task"]
    corpus = lg.load_corpus(args.data, tokenizer, model.config.vocab_size)
    check_vocabulary(model, corpus, args.init)
    measured = lg.position_wise(model, task, corpus, T, args.rows, args.windows, progress=Progress())
    name = base_name(args.init)
    path = os.path.join(args.out, f"poswise-{name}")
    report({name: measured}, f"{path}.png", f"{args.init} on {task}, trained on T = {T} tokens")
    write_json(f"{path}.json", dict(measured, T=T, command=shlex.join(sys.argv)))


def base_name(checkpoint):
    """The last part of a path or of a hub name."""
    return os.path.basename(os.path.abspath(checkpoint))


def given_babilong(args):
    """Accuracy of one checkpoint on published BABILong files: --data with qa1 to qa5 in their paths."""
    if not args.data:
        raise ValueError("babilong needs --data, published files with qa1 to qa5 in their paths")
    model, encoding, corpus = load_with_encoding(args)
    accuracy = {}
    for file in args.data:
        task = re.search(r"qa([1-5])(?!\d)", file)
        if not task:
            raise ValueError(f"{file} has none of qa1 to qa5 in its path: give published BABILong files")
        right = 0
        entries = lg.read_babilong(file, args.rows)
        for text, question, answer in entries:
            # vocabularies of more than bytes have the space in front of the word that follows
            prompt = text + " " if encoding.n_vocab == 256 else text
            tokens = np.array([[corpus.bos, *encoding.encode(prompt, disallowed_special=())]])
            output = [int(token) for token in lg.generate(model, tokens, 16)]
            output = encoding.decode([token for token in output if token < encoding.n_vocab])
            right += lg.babilong_score(output, answer, question, int(task[1]))
        accuracy[file] = right / len(entries)
        print(f"{file}: {accuracy[file]:.3f} of {len(entries)}", flush=True)
    path = os.path.join(args.out, f"babilong-{base_name(args.init)}.json")
    write_json(path, dict(accuracy=accuracy, command=shlex.join(sys.argv)))
    print(f"numbers: {path}")


def load_with_encoding(args):
    """The model of --init, its tiktoken.Encoding, and a corpus without text for its special tokens."""
    model, _, tokenizer = load_model(args)
    encoding = lg.load_encoding(tokenizer)
    corpus = lg.Corpus("no text", None, None, encoding.n_vocab, encoding.special)
    check_vocabulary(model, corpus, args.init)
    return model, encoding, corpus


def sample(args):
    """Print what a checkpoint writes after a prompt."""
    model, encoding, corpus = load_with_encoding(args)
    torch.manual_seed(args.seed)
    prompt = np.array([[corpus.bos, *encoding.encode(args.prompt, disallowed_special=())]])
    tokens = [int(token) for token in lg.generate(model, prompt, args.tokens, args.temperature)]
    print(args.prompt + encoding.decode([token for token in tokens if token < encoding.n_vocab]))


# ---- 6. The command line ----


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, as all other errors of the command line."""

    def error(self, message):
        raise ValueError(message)


def run_command(main):
    """main(), with one sentence for what goes wrong: exit code 2 for bad input, 1 for a diverging loss."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)


def choose_device(name):
    """The torch.device of --device, or the best there is; prints which one and why."""
    reason = "asked for"
    if name is None:
        name, reason = "cpu", "no GPU found"
        if torch.cuda.is_available():
            name, reason = "cuda", "there is a GPU"
        elif torch.backends.mps.is_available():
            name, reason = "mps", "there is an Apple GPU"
    if name == "cuda":  # several ranks have a GPU each
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    print_once(f"device: {device}, {reason}, {torch.get_num_threads()} CPU threads")
    return device


def print_once(message):
    """Print on the first rank of a distributed run only."""
    if rank() == 0:
        print(message, flush=True)


def rank():
    return int(os.environ.get("RANK", 0))


class Progress:
    """Called with the share of position_wise that is done: prints it and the time left every ten seconds."""

    def __init__(self):
        self.started = self.printed = time.time()

    def __call__(self, done):
        if time.time() - self.printed > 10:
            self.printed = time.time()
            left = (self.printed - self.started) * (1 - done) / done
            print_once(f"  loss by position  {done:4.0%}  {clock(left)} left")


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def make_folder(path):
    """Create a folder and prove that it can be written to, before anything long starts."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(f"the folder {path!r} cannot be written to: {reason}") from None


RANGES = {  # of the arguments of eval.py and train.py
    "T": (1, 10**7), "windows": (1, 10**6), "rows": (1, 10**6), "batch": (1, 10**6), "steps": (1, 10**8),
    "accumulate": (1, 10**6), "tokens": (1, 10**7), "seeds": (1, 1000), "seed": (0, 2**32 - 1),
    "lr": (1e-30, 1e38), "zero_prob": (0, 1), "noise_std": (0, 1e6), "temperature": (0, 1e6),
}  # fmt: skip


def check_arguments(args):
    """Raise ValueError if an argument is empty, outside of its range, or no number."""
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if value == "":
            raise ValueError(f"{option} is empty: give a name, or leave it out")
        lowest, highest = RANGES.get(name, (None, None))
        if lowest is not None and value is not None and not lowest <= value <= highest:
            raise ValueError(f"{option} must lie between {lowest} and {highest}, got {value}")


def parse_arguments(argv):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="*", help=f"reproduce, sample, or some of {', '.join(FIGURES)} (all)")
    p.add_argument("--out", default="runs", help="folder of the runs")
    p.add_argument("--model", default="mamba2", choices=lg.LAYERS, help="architecture of the runs")
    p.add_argument("--seeds", type=int, default=1, help="how many: 3 stands for the seeds 0, 1 and 2")
    p.add_argument("--device", choices=["cuda", "mps", "cpu"], help="where to compute (the first there is)")
    p.add_argument("--init", metavar="RUN", help="poswise, babilong, sample: of this checkpoint")
    p.add_argument("--task", choices=lg.TASKS, help="with --init: what it reads (the task of its run)")
    p.add_argument("--T", type=int, help="with --init: its training length (that of its run)")
    p.add_argument("--data", nargs="+", metavar="PATH", help="with --init: text, or published BABILong files")
    p.add_argument("--tokenizer", help="with --init: as in train.py (that of its run)")
    p.add_argument("--windows", type=int, default=64, help="with --init: length of the streams, in T")
    p.add_argument("--rows", type=int, default=64, help="with --init: how many streams or questions")
    p.add_argument("--prompt", default="import os\n", help="sample: what comes first")
    p.add_argument("--tokens", type=int, default=400, help="sample: how many to write")
    p.add_argument("--temperature", type=float, default=0.8, help="sample: 0 takes the likeliest token")
    p.add_argument("--seed", type=int, default=0, help="sample: another seed, another text")
    args = p.parse_args(argv)
    check_arguments(args)
    for name in args.what:
        if name not in (*FIGURES, "reproduce", "sample"):
            raise ValueError(f"unknown figure {name!r}, expected reproduce, sample or {', '.join(FIGURES)}")
    for name in ("task", "T", "data", "tokenizer"):
        if getattr(args, name) and args.init is None:
            raise ValueError(f"--{name} goes with --init RUN, figures of own runs need none")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    # one given checkpoint
    given = {"sample": sample, "poswise": given_poswise, "babilong": given_babilong}
    if args.init is not None or "sample" in args.what:
        if args.init is None or len(args.what) != 1 or args.what[0] not in given:
            raise ValueError(f"--init RUN goes with one of {', '.join(given)}, got {' '.join(args.what)!r}")
        make_folder(args.out)
        given[args.what[0]](args)
        return

    # figures of the runs under --out
    started = time.time()
    device = choose_device(args.device)
    asked = [name for name in args.what if name in FIGURES]
    if "reproduce" in args.what:
        make_folder(args.out)
        train_for(asked or FIGURES, args)
    for name in asked or FIGURES:
        try:
            draw(name, args, device)
        except MissingRuns as error:
            if asked:
                raise
            print(f"{name}: left out, {error}")
    print(f"\n{clock(time.time() - started)} minutes in all")


if __name__ == "__main__":
    run_command(main)
