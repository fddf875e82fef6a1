"""The key figures of the paper (Buitrago & Gu, ICML 2025), from one command.

    python eval.py reproduce                        train what is missing, then draw the figures of --model
    python eval.py reproduce architectures          the same for the figure of all architectures
    python eval.py                                  draw every figure whose runs exist
    python eval.py poswise effrem                   draw these figures
    python eval.py poswise --init RUN --data PATH   how a given checkpoint breaks past its training length
    python eval.py passkey --init RUN               how far it finds a passkey, by length and depth
    python eval.py babilong --init RUN --data FILE  its accuracy on published BABILong files
    python eval.py sample --init RUN --prompt "import os"

Runs are the folders that train.py writes under --out. Every measurement is kept beside its checkpoint as one
JSON file. Pictures go to {out}/figures, all numbers to {out}/results.json. Positions and lengths are
multiples of the training length T.
"""

import argparse
import itertools
import json
import os
import re
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import lengthgen as lg
import train

# ---- 1. The figures ----
# A measure gets a model, the text, and the length and the task that the model was trained on. It returns the
# labels of the axes, the places x, and values, {title of a panel: a list with one for each x}. Its default
# arguments set how much it measures.

POSITION = "position (T)"


def held_out_streams(task, corpus, T, B, windows):
    """B streams of windows of a task from held-out text: tokens (B, windows*T + 1), part (B, windows*T)."""
    function = lg.TASKS[task][0]
    rows = lg.Rows(corpus, "val", B, continues=True, seed=0)
    tokens, part = lg.stream(function, rows, T, windows)
    if part.shape[1] < windows * T:
        raise ValueError(f"{len(corpus.val):,} tokens are held out, too few for a stream of {windows} T")
    return tokens, part


def far_loss(model, corpus, T, task):
    """The loss by position on fewer and longer streams than those of train.py."""
    return train.loss_by_position(model, corpus, T, task, B=64, windows=256)


def text_rise(model, corpus, T, task):
    """The loss by position on plain text from T on, minus that in the range of positions that ends at T."""
    losses = train.loss_by_position(model, corpus, T, "text", B=128)
    in_T = losses["x"].index(1)
    x = losses["x"][in_T:]
    from_T = losses["values"]["text"][in_T:]
    rise = [loss - from_T[0] for loss in from_T]
    return dict(xlabel=POSITION, ylabel="nats", x=x, values={"loss by position, minus that in T": rise})


def gap(model, corpus, T, task, B=128):
    """lengthgen.paired_gap of plain text, as means over ranges of blocks that double in length."""
    ends = [2, 4, 8, 16, 32, 64]
    tokens, _ = held_out_streams("text", corpus, T, B, ends[-1])
    gaps = lg.paired_gap(model, tokens, T)
    means = [float(gaps[end // 2 : end].mean()) for end in ends]
    return dict(xlabel=POSITION, ylabel="nats", x=ends, values={"the paired gap": means})


def state_growth(model, corpus, T, task, B=64):
    """lengthgen.state_std after t tokens, divided by that after T."""
    x = [0.5, 1, 2, 4, 8, 16, 32, 64]
    tokens, _ = held_out_streams(task, corpus, T, B, x[-1])
    full, layers, _ = lg.state_std(model, tokens, [int(T * multiple) for multiple in x])
    at_T = x.index(1)
    values = {"the full state": (full / full[at_T]).tolist()}
    for i, layer in enumerate(layers.unbind(1)):
        values[f"layer {i}"] = (layer / layer[at_T]).tolist()
    return dict(xlabel="t (T)", ylabel="std / std at T", x=x, values=values)


def retention(model, corpus, T, task, B=256):
    """The share of its state that a head keeps over T: the mean of exp(log a_1 + ... + log a_T), sorted.

    In Gated DeltaNet this is an upper bound, because the delta rule also overwrites.
    """
    tokens, _ = held_out_streams(task, corpus, T, B, 1)
    kept = []
    for log_a in lg.decays(model, tokens[:, :-1]):
        share = log_a.sum(1).exp().mean(0)  # (H,), or (H, K) with one decay per key channel
        kept += share.reshape(len(share), -1).mean(1).tolist()
    x = list(range(1, len(kept) + 1))
    values = {"what heads keep over T": sorted(kept)}
    return dict(xlabel="head, sorted", ylabel="share of the state", x=x, values=values)


def decay_minus(model, corpus, T, task):
    """The loss far beyond T when every log_a is made smaller by d, without training."""
    amounts = [0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2]
    return changed_losses(model, corpus, T, task, "d: log_a minus d", torch.sub, amounts)


def decay_times(model, corpus, T, task):
    """The loss far beyond T when every log_a is multiplied by c, without training."""
    amounts = [1, 1.5, 2, 3, 5, 8, 12]
    return changed_losses(model, corpus, T, task, "c: log_a times c", torch.mul, amounts)


def changed_losses(model, corpus, T, task, xlabel, change, amounts, B=32, windows=64):
    """The loss of each part of the task from 4 T on, with change(log_a, amount) in place of log_a."""
    tokens, part = held_out_streams(task, corpus, T, B, windows)
    _, _, names, _ = lg.TASKS[task]
    bins = part.astype(int) - 1  # part 1, 2, ... into bin 0, 1, ...; -1 leaves a target out
    bins[:, : 4 * T] = -1
    losses = []
    for amount in amounts:
        # amount=amount: the function keeps the amount of this round
        with lg.changed_decay(lambda log_a, amount=amount: change(log_a, amount)):
            total, count = lg.streaming_loss(model, tokens, bins, lg.segment_for(B))
        losses.append(total / count)
    values = dict(zip(names, torch.stack(losses, 1).tolist(), strict=True))
    return dict(xlabel=xlabel, ylabel="loss beyond 4 T (nats)", x=amounts, values=values)


def effrem(model, corpus, T, task, B=64):
    """How much predictions after 4 T change without the first t tokens (lengthgen.effective_remembrance).

    The mean over the predictions of each part of the task.
    """
    tokens, part = held_out_streams(task, corpus, T, B, 5)
    _, _, names, _ = lg.TASKS[task]
    starts = sorted({max(1, T * eighths // 8) for eighths in (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32)})

    # a few rows at a time, because every suffix is one more row of the batch
    distances = []
    for first in range(0, B, 16):
        rows = tokens[first : first + 16, :-1]
        distances.append(lg.effective_remembrance(model, rows, starts, 4 * T))
    distance = torch.cat(distances, dim=1)  # (starts, B, T)
    part = torch.from_numpy(part[:, 4 * T :])
    values = {}
    for i, name in enumerate(names, 1):
        values[f"predictions of {name}"] = distance[:, part == i].mean(1).tolist()
    x = [start / T for start in starts]
    return dict(xlabel="t: tokens left out (T)", ylabel="EffRem(t), total variation", x=x, values=values)


def copy_accuracy(model, corpus, T, task, B=256, windows=4):
    """The mean of lengthgen.accuracy over the copied letters in each window of a stream of packed strings."""
    tokens, part = held_out_streams(task, corpus, T, B, windows)
    right = lg.accuracy(model, tokens, part == 1).unflatten(1, (windows, T))
    values = {"packed strings": right.nanmean((0, 2)).tolist()}
    return dict(xlabel=POSITION, ylabel="accuracy", x=list(range(1, windows + 1)), values=values)


def passkey_accuracy(model, corpus, T, task, B=32, lengths=(1, 2, 4, 8, 16, 32, 64, 128)):
    """The share of windows where greedy decoding gives the five digits, by depth of the key in the filler."""
    progress = train.Progress()
    values = {}
    for i, length in enumerate(lengths):
        for depth in (0.1, 0.5, 0.9):
            rows = lg.Rows(corpus, "val", B, continues=False, seed=0)
            tokens, part = lg.passkey(rows, T * length, depth)
            shares = values.setdefault(f"the key at depth {depth}", [])
            shares.append(exact_match(model, tokens, part == 1))
        progress(sum(lengths[: i + 1]) / sum(lengths))
    return dict(xlabel="length (T)", ylabel="share of right keys", x=list(lengths), values=values)


def babilong_accuracy(model, corpus, T, task, B=64, lengths=(1, 2, 4, 8, 16)):
    """The share of our own stories whose answer greedy decoding gives exactly."""
    progress = train.Progress()
    shares = []
    for i, length in enumerate(lengths):
        rows = lg.Rows(corpus, "val", B, continues=False, seed=0)
        tokens, part = lg.babilong(rows, T * length)
        shares.append(exact_match(model, tokens, part == 1))
        progress(sum(lengths[: i + 1]) / sum(lengths))
    values = {"our own stories": shares}
    return dict(xlabel="length (T)", ylabel="share of right answers", x=list(lengths), values=values)


def exact_match(model, tokens, asked):
    """The share of rows where the likeliest token is the target at every place that is asked for (B, N)."""
    wrong = lg.accuracy(model, tokens, asked) == 0  # NaN (nothing asked) counts as not wrong
    return float((~wrong.any(1)).double().mean())


# The runs that a figure compares: a list of their names, or {label: names of runs} where a curve has another
# label than its run, or is drawn from several. "T26/base" is the base under {out}/T26.
# Interventions that are added to lengthgen.py are compared with the others on echo, plain text and passkey.
# train.STYLES has those that we ship.
ADDED = [name for name in lg.INTERVENTIONS if name not in train.STYLES]
PAIR = ["base", "state_passing", *ADDED]
CONTROLLED = ["base", "zero", "state_passing"]
MAIN = ["base", "zero", "tbtt", "state_passing", *ADDED]
ALL = [*train.STYLES, *ADDED]
ALL_BUT_SCAN = [run for run in ALL if run != "state_passing-scan"]
# nothing in passkey continues, so tbtt would be the very run of state_passing
ON_PASSKEY = [run for run in ALL_BUT_SCAN if run != "tbtt"]
# the runs on BABILong, by the run on echo that they start from
STARTS = {"base": ["from-base/zero"], "state_passing": ["from-sp/zero"], "tbtt": ["from-tbtt/zero"]}
STEPS = {"200 steps": ["steps200/base"], "400 steps": ["steps400/base"], "1400 steps": ["base"]}
LENGTHS = {"T = 26": ["T26/base"], "T = 50": ["base"], "T = 98": ["T98/base"]}
# each curve of "budget" is drawn from six runs, which have these shares of the base's 1400 steps
SHARES = [0, 14 / 1400, 28 / 1400, 70 / 1400, 140 / 1400, 500 / 1400]
BUDGET = {}
for run in ALL_BUT_SCAN[1:]:  # without the base
    BUDGET[run] = ["base", f"steps14/{run}", f"steps28/{run}", f"steps70/{run}", f"steps140/{run}", run]

ARCHITECTURES = "architectures"  # the figure that draws all of TINY_MODELS, not only --model
FIGURES = {  # name: (title, task of the runs, groups of runs, measures); each measure of each group is drawn
    "poswise": ("Loss by position far beyond T", "echo", [MAIN], [far_loss]),
    "interventions": ("The interventions on the initial state", "echo", [ALL], [train.loss_by_position]),
    "budget": ("How little it takes: the loss at 64 T", "echo", [BUDGET], [train.loss_by_position]),
    "text": ("Streams of pure text", "mixed", [ALL_BUT_SCAN], [text_rise, gap]),
    "state": ("The std of the state, divided by that at T", "echo", [PAIR], [state_growth]),
    "forgetting": ("Why not simply forget faster?", "echo", [PAIR], [retention, decay_minus, decay_times]),
    "effrem": ("Effective remembrance at 4 T", "echo", [MAIN], [effrem]),
    "copying": ("Copying random letters", "copy", [CONTROLLED], [copy_accuracy]),
    "passkey": ("A passkey after fine-tuning", "passkey", [ON_PASSKEY], [passkey_accuracy]),
    "babilong": ("BABILong after fine-tuning", "babilong", [STARTS], [babilong_accuracy]),
    "sweep": ("When does a base break?", "echo", [STEPS, LENGTHS], [train.loss_by_position]),
    ARCHITECTURES: ("Loss by position of every architecture", "echo", [CONTROLLED], [train.loss_by_position]),
}

# ---- 2. Drawing the runs that are there ----


class MissingRuns(ValueError):
    """A figure has no finished runs to draw."""


def draw_figure(name, args, corpus, device):
    """Draw one figure of the runs under --out, print its numbers, and add them to results.json.

    Raises MissingRuns if one of its architectures or groups has no run.
    """
    title, task, groups, measures = FIGURES[name]
    options = f"{name} --out {shlex.quote(args.out)}"
    if name == ARCHITECTURES:
        drawn, models = "all", train.TINY_MODELS
    else:
        drawn, models = args.model, [args.model]
        options += f" --model {args.model}"
        title += f"\n{args.model}, seeds: {args.seeds}"
    options += f" --seeds {args.seeds}"

    panels = []
    for model, measure, runs in itertools.product(models, measures, groups):
        found = measure_runs(model, measure, task, runs, args, corpus, device)
        if not found:
            command = f"python eval.py reproduce {options}"
            raise MissingRuns(f"no finished run of {model} on {task}, make it with: {command}")
        for panel in train.panels_of(found, args.seeds):
            if name == ARCHITECTURES:  # the architectures may have different numbers of seeds
                panel["seeds"] = max(map(len, found.values()))
                panel["title"] = f"{model}: {panel['title']}, seeds: {panel['seeds']}"
            panels.append(panel)
    path = os.path.join(args.out, "figures", f"{drawn}-{name}.png")
    train.draw(panels, path, title)
    print(f"\n{name}: {path}")
    train.print_table(panels)

    # the numbers of other figures and architectures stay
    file = Path(args.out, "results.json")
    results = {}
    if file.exists():
        with lg.reading(file, "results of eval.py; remove the file to start anew"):
            results = json.loads(file.read_text())
    entry = dict(picture=path, command=f"python eval.py {options}", versions=train.VERSIONS, panels=panels)
    results.setdefault(drawn, {})[name] = entry
    lg.write_text(file, json.dumps(results, indent=1))


def measure_runs(model, measure, task, runs, args, corpus, device):
    """Measure a group of runs, for one architecture: {label: one measurement per seed that is there}."""
    found = {}
    for label in runs:
        names = runs[label] if isinstance(runs, dict) else [label]
        for seed in range(args.seeds):
            measurements = []
            for name in names:
                parent, _, run = name.rpartition("/")
                folder = train.run_folder(os.path.join(args.out, parent), model, task, run, seed)
                measurements.append(measure_run(folder, measure, corpus, device))
            if None not in measurements:
                found.setdefault(label, []).append(one_curve(measurements))
    return found


def one_curve(measurements):
    """The measurement for one curve: its run's own or, in "budget", the last value of each of its runs."""
    first = measurements[0]
    if len(measurements) == 1:
        return first
    values = {}
    for title in first["values"]:
        values[title] = [measurement["values"][title][-1] for measurement in measurements]
    return dict(first, xlabel="steps / steps of pre-training", x=SHARES, values=values)


def measure_run(folder, measure, corpus, device):
    """The measurement of a finished run, None if there is none; ValueError if other code made the run."""
    if not os.path.exists(os.path.join(folder, lg.CHECKPOINT)):
        return None
    checkpoint = lg.load_checkpoint(folder)
    settings = argparse.Namespace(**checkpoint["settings"])
    if checkpoint["step"] < settings.steps:
        return None

    # refuse a run that today's code and text would not make; the weights it started from are not known here
    model = lg.model_from_checkpoint(checkpoint).to(device).eval()
    expected = train.describe_run(settings, model, corpus)
    del expected["made_from"][train.INITIAL_WEIGHTS]
    if settings.init is None:  # today's TINY_MODELS must have these sizes
        sizes = train.TINY_MODELS[settings.model]
        config = lg.ModelConfig(layer=settings.model, vocab_size=corpus.vocab_size, **sizes)
        expected["config"] = asdict(config)
    train.check_same_run(checkpoint, expected, folder)
    train.tell_scan(model)
    return train.load_or_measure(folder, measure, model, corpus, settings.T, settings.task)


# ---- 3. The plan: command lines of train.py, which skips what is finished ----
# The runs of a figure are those of PLAN[its name], or else of PLAN[its task]. command_lines fills in {out},
# {seed}, each intervention for {name}, and {runs}, which is {out}/{model}. For example,
# {runs}-echo-base-s{seed} is the folder of a base on echo.

SHORT = "--init {runs}-echo-base-s{seed} --intervention {name} --out {out}/"  # the folder's name follows
COPY = "--init {runs}-copy-base-s{seed} --steps 1000 --lr 2e-3 --zero-prob 0.2 --intervention "
PASSKEY = "--init {runs}-passkey-base-s{seed} --batch 32 --steps 800 --zero-prob 0 --intervention "
BABILONG = "--task babilong --T 144 --batch 32 --steps 500 --lr 3e-3 --intervention zero "
PLAN = {
    "echo": ["--task echo --intervention {name}", "--task echo --intervention state_passing --carry scan"],
    "mixed": ["--task mixed --intervention {name}"],
    # only 1000 steps, because a base with more of them learns by itself to forget the previous string
    "copy": ["--task copy --T 44 --steps 1000", COPY + "zero", COPY + "state_passing"],
    "passkey": ["--task passkey --batch 32 --steps 2500", *(PASSKEY + run for run in ON_PASSKEY[1:])],
    "babilong": [
        "--task echo --intervention state_passing",
        "--task echo --intervention tbtt",
        BABILONG + "--init {runs}-echo-base-s{seed} --out {out}/from-base",
        BABILONG + "--init {runs}-echo-state_passing-s{seed} --out {out}/from-sp",
        BABILONG + "--init {runs}-echo-tbtt-s{seed} --out {out}/from-tbtt",
    ],
    "budget": [
        "--task echo --intervention {name}",
        SHORT + "steps14 --steps 14",
        SHORT + "steps28 --steps 28",
        SHORT + "steps70 --steps 70",
        SHORT + "steps140 --steps 140",
    ],
    "sweep": [  # in every run batch * T is about 3200 tokens
        "--task echo",
        "--task echo --steps 200 --out {out}/steps200",
        "--task echo --steps 400 --out {out}/steps400",
        "--task echo --T 26 --batch 123 --out {out}/T26",
        "--task echo --T 98 --batch 33 --out {out}/T98",
    ],
    ARCHITECTURES: ["--task echo --intervention zero", "--task echo --intervention state_passing"],
}


def reproduce(figures, args):
    """Train what some figures need, one command line of train.py after the other."""
    lines = []
    for name in figures:
        _, task, _, _ = FIGURES[name]
        experiment = name if name in PLAN else task
        models = train.TINY_MODELS if name == ARCHITECTURES else [args.model]
        for seed, model in itertools.product(range(args.seeds), models):
            lines += command_lines(experiment, model, seed, args)
    lines = list(dict.fromkeys(lines))  # each once
    started = time.time()
    for i, line in enumerate(lines, 1):
        print(f"\nrun {i} of {len(lines)}, {(time.time() - started) / 60:.1f} minutes gone")
        print(f"python train.py {line}", flush=True)
        train.main(shlex.split(line))


def command_lines(experiment, model, seed, args):
    """The command lines of an experiment, with everything filled in."""
    out = shlex.quote(args.out)
    lines = []
    for template in PLAN[experiment]:
        names = lg.INTERVENTIONS if "{name}" in template else [None]
        for name in names:
            line = template.format(out=out, runs=f"{out}/{model}", seed=seed, name=name)
            line += f" --model {model} --seed {seed}"
            if "--out" not in template:
                line += f" --out {out}"
            if args.device:
                line += f" --device {args.device}"
            lines.append(line)
    return lines


# ---- 4. One checkpoint, given by --init ----


def measure_given(args, model):
    """How far one checkpoint, ours or another library's, holds: loss by position, or accuracy by length."""
    corpus = lg.load_corpus(args.data, args.tokenizer, model.config.vocab_size)
    train.check_vocabulary(model, corpus, args.init)
    what = args.what[0]
    windows = args.windows or 64
    sizes = dict(B=args.rows) if args.rows else {}
    if what == "poswise":
        task, measure = args.task, train.loss_by_position
        sizes["windows"] = windows
    else:
        task, measure = what, {"passkey": passkey_accuracy, "babilong": babilong_accuracy}[what]
        sizes["lengths"] = [2**i for i in range(windows.bit_length())]  # 1, 2, 4, ... up to windows
    measurement = measure(model, corpus, args.T, task, **sizes)

    # the table, the verdict on losses and the picture, and the numbers
    name = os.path.basename(os.path.abspath(args.init))
    path = os.path.join(args.out, f"{what}-{name}")
    train.report({name: measurement}, f"{path}.png", f"{args.init} on {task}, T = {args.T} tokens")
    numbers = dict(measurement, T=args.T, command=shlex.join(sys.argv))
    lg.write_text(f"{path}.json", json.dumps(numbers, indent=1))


def given_babilong(args, model):
    """Accuracy of one checkpoint on published files, with qa1 to qa5 in their names, else on our own stories.

    --data: the published files, or the background of our stories
    --prompt: a file of solved examples that comes before each published text (few shot)
    """
    if not any(re.search(r"qa\d", os.path.basename(file)) for file in args.data or []):
        return measure_given(args, model)
    examples = ""
    if args.prompt is not None:
        with lg.reading(args.prompt, "text"):
            examples = Path(args.prompt).read_text("utf-8")
    accuracy = {}
    for file in args.data:
        qa = re.search(r"qa([1-5])(?!\d)", os.path.basename(file))
        if not qa:
            raise ValueError(f"{file} has none of qa1 to qa5 in its name: give published BABILong files")
        right = 0
        entries = lg.read_babilong(file, args.rows or 64)
        for text, question, answer in entries:
            # the space before the answer is a token of its own in bytes, else part of the answer's first one
            prompt = f"{examples}{text} " if args.tokenizer == "bytes" else examples + text
            output = continuation(args, model, prompt, 16, 0.0)
            right += lg.babilong_score(output, answer, question, int(qa[1]))
        accuracy[file] = right / len(entries)
        print(f"{file}: {accuracy[file]:.3f} of {len(entries)}", flush=True)
    path = os.path.join(args.out, f"babilong-files-{os.path.basename(os.path.abspath(args.init))}.json")
    lg.write_text(path, json.dumps(dict(accuracy=accuracy, command=shlex.join(sys.argv)), indent=1))
    print(f"numbers: {path}")


def sample(args, model):
    """Print what a checkpoint writes after a prompt."""
    torch.manual_seed(args.seed)
    prompt = "import os\n" if args.prompt is None else args.prompt
    print(prompt + continuation(args, model, prompt, args.tokens, args.temperature))


def continuation(args, model, prompt, n, temperature):
    """The text of the next n tokens after a prompt, without special tokens."""
    corpus = lg.Corpus("no text", None, None, **lg.load_tokenizer(args.tokenizer)._asdict())
    train.check_vocabulary(model, corpus, args.init)
    tokens = np.array([[corpus.bos, *corpus.encode(prompt)]], dtype=np.int64)
    output = [int(token) for token in lg.generate(model, tokens, n, temperature)]
    return corpus.decode([token for token in output if token < corpus.words and token not in corpus.special])


GIVEN = {"poswise": measure_given, "passkey": measure_given, "babilong": given_babilong, "sample": sample}

# ---- 5. The command line ----


def parse_arguments(argv):
    p = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="*", help=f"reproduce, sample, or some of {', '.join(FIGURES)} (all)")
    p.add_argument("--out", default="runs", help="folder of the runs")
    p.add_argument("--model", default="mamba2", choices=train.TINY_MODELS, help="architecture (mamba2)")
    p.add_argument("--seeds", type=train.positive_type, default=1, help="how many: 3 stands for 0, 1 and 2")
    p.add_argument("--device", choices=["cuda", "mps", "cpu"], help="where to compute (GPU if there is one)")
    p.add_argument("--init", metavar="RUN", help="poswise, passkey, babilong, sample: this checkpoint")
    p.add_argument("--task", choices=lg.TASKS, help="with --init: what it reads (the task of its run)")
    p.add_argument("--T", type=train.positive_type, help="with --init: its training length (that of its run)")
    p.add_argument("--data", nargs="+", metavar="PATH", help="with --init: text, or published BABILong files")
    p.add_argument("--tokenizer", help="with --init: as in train.py (that of its run)")
    p.add_argument("--windows", type=train.positive_type, help="with --init: longest stream, in T (64)")
    p.add_argument("--rows", type=train.positive_type, help="with --init: how many streams, texts or stories")
    p.add_argument("--prompt", help="sample: what comes first; babilong: a file of solved examples")
    p.add_argument("--tokens", type=train.positive_type, default=400, help="sample: how many to write")
    p.add_argument("--temperature", type=train.not_negative_type, default=0.8, help="sample: 0 is greedy")
    p.add_argument("--seed", type=train.seed_type, default=0, help="sample: random seed")
    args = p.parse_args(argv)
    for name in args.what:
        if name not in (*FIGURES, "reproduce", "sample"):
            raise ValueError(f"unknown figure {name!r}, expected reproduce, sample or {', '.join(FIGURES)}")
    if "sample" in args.what and args.init is None:
        raise ValueError("sample needs --init RUN")
    for name in ("task", "T", "data", "tokenizer", "windows", "rows", "prompt"):
        if getattr(args, name) is not None and args.init is None:
            raise ValueError(f"--{name} needs --init RUN")
    if args.init is not None and (len(args.what) != 1 or args.what[0] not in GIVEN):
        raise ValueError(f"--init RUN goes with one of {', '.join(GIVEN)}, got {' '.join(args.what)!r}")
    for name, takers in (("task", ["poswise"]), ("prompt", ["babilong", "sample"])):
        if getattr(args, name) is not None and args.what[0] not in takers:
            raise ValueError(f"--{name} goes with {' or '.join(takers)}, got {args.what[0]!r}")
    return args


def main(argv=None):
    """Run one command line of eval.py; ValueError if it is wrong."""
    args = parse_arguments(argv)
    started = time.time()
    device = train.choose_device(args.device)

    # one given checkpoint
    if args.init is not None:
        checkpoint = lg.load_checkpoint(args.init)
        model = lg.model_from_checkpoint(checkpoint).to(device).eval()
        train.tell_scan(model)
        settings = checkpoint["settings"]
        args.task = args.task or settings["task"]
        args.T = args.T or settings["T"]
        if args.tokenizer is None:
            args.tokenizer = settings["tokenizer"] or "bytes"
        GIVEN[args.what[0]](args, model)
        return

    # figures of the runs under --out
    asked = [name for name in args.what if name in FIGURES]
    if "reproduce" in args.what:
        # "architectures" trains every model, which takes long, so it runs only if it is asked for
        reproduce(asked or [name for name in FIGURES if name != ARCHITECTURES], args)
    corpus = lg.load_corpus()
    for name in asked or FIGURES:
        try:
            draw_figure(name, args, corpus, device)
        except MissingRuns as error:
            if asked:
                raise
            print(f"{name}: left out, {error}")
    print(f"\n{(time.time() - started) / 60:.1f} minutes in all")


# fill the cache of train.read_source before the file can change
for _, _, _, measures in FIGURES.values():
    for measure in measures:
        train.sources(measure, modules=("kernels", "lengthgen", "train", measure.__module__))

if __name__ == "__main__":
    train.run_command(main)
