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
# labels of the axes, the places x, and panels, {title: values}. Its defaults say how much it measures.

AT = "position (T)"


def streams(task, corpus, T, B, windows):
    """B streams of held-out episodes of a task: tokens (B, windows*T + 1), part (B, windows*T)."""
    function = lg.TASKS[task][0]
    rows = lg.Rows(corpus, "val", B, continues=True, seed=0)
    tokens, part = lg.stream(function, rows, T, windows)
    if part.shape[1] < windows * T:
        raise ValueError(f"{len(corpus.val):,} tokens are held out, too few for a stream of {windows} T")
    return tokens, part


def far_loss(model, corpus, T, task):
    """The loss by position on fewer and longer streams than those of train.py."""
    return train.loss_by_position(model, corpus, T, task, B=64, windows=256)


def text_loss(model, corpus, T, task):
    """The loss by position on plain text."""
    return train.loss_by_position(model, corpus, T, "text", B=128)


def gap(model, corpus, T, task, B=128, windows=64):
    """lengthgen.paired_gap of plain text, as means over ranges of blocks that double in length."""
    tokens, _ = streams("text", corpus, T, B, windows)
    gaps = lg.paired_gap(model, tokens, T)
    ends = [2, 4, 8, 16, 32, 64]
    means = [float(gaps[end // 2 : end].mean()) for end in ends]
    title = "the same text after the whole past, minus after T"
    return dict(xlabel=AT, ylabel="paired gap (nats)", x=ends, panels={title: means})


def state(model, corpus, T, task, B=64, windows=64):
    """How much lengthgen.state_std grows from T on."""
    tokens, _ = streams(task, corpus, T, B, windows)
    x = [0.5, 1, 2, 4, 8, 16, 32, 64]
    full, layers, _ = lg.state_std(model, tokens, [int(T * multiple) for multiple in x])
    panels = {"the full state": (full / full[1]).tolist()}
    for i, layer in enumerate(layers.T):
        panels[f"layer {i}"] = (layer / layer[1]).tolist()
    return dict(xlabel="t (T)", ylabel="std over that at T", x=x, panels=panels)


def retention(model, corpus, T, task, B=256):
    """How much of its state each head keeps over T: the mean of exp(log a_1 + ... + log a_T), sorted."""
    tokens, _ = streams(task, corpus, T, B, 1)
    kept = []
    for log_a in lg.decays(model, tokens[:, :-1]):
        share = log_a.sum(1).exp().mean(0)  # (H,), or (H, K) with one decay per key channel
        kept += share.reshape(len(share), -1).mean(1).tolist()
    x = list(range(1, len(kept) + 1))
    panels = {"what heads keep over T": sorted(kept)}
    return dict(xlabel="head, sorted", ylabel="share of the state", x=x, panels=panels)


def minus(model, corpus, T, task):
    """The loss far beyond T when every log_a is made smaller by d, without training."""
    amounts = [0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2]
    changes = [lambda log_a, d=d: log_a - d for d in amounts]
    panels = changed_losses(model, corpus, T, task, changes)
    return dict(xlabel="d: log_a minus d", ylabel="loss beyond 4 T (nats)", x=amounts, panels=panels)


def times(model, corpus, T, task):
    """The loss far beyond T when every log_a is multiplied by c, without training."""
    amounts = [1, 1.5, 2, 3, 5, 8, 12]
    changes = [lambda log_a, c=c: log_a * c for c in amounts]
    panels = changed_losses(model, corpus, T, task, changes)
    return dict(xlabel="c: log_a times c", ylabel="loss beyond 4 T (nats)", x=amounts, panels=panels)


def changed_losses(model, corpus, T, task, changes, B=32, windows=64):
    """{part of the task: the loss from 4 T on with each change of log_a}."""
    tokens, part = streams(task, corpus, T, B, windows)
    _, _, names = lg.TASKS[task]
    bins = part.astype(int) - 1  # one for each part of the task
    bins[:, : 4 * T] = -1
    losses = []
    for change in changes:
        with lg.changed_decay(change):
            total, count = lg.streaming_loss(model, tokens, bins, lg.segment_for(B))
        losses.append(total / count)
    return dict(zip(names, torch.stack(losses, 1).tolist(), strict=True))


def effrem(model, corpus, T, task, B=64):
    """The mean of lengthgen.effective_remembrance after 4 T over the predictions of each part of a task."""
    tokens, part = streams(task, corpus, T, B, 5)
    _, _, names = lg.TASKS[task]
    starts = [1]
    for eighths in (1, 2, 4, 8, 12, 16, 20, 24, 28, 32):
        if T * eighths // 8 > starts[-1]:
            starts.append(T * eighths // 8)

    # a few rows at a time, because every suffix is one more row of the batch
    distances = []
    for first in range(0, B, 16):
        rows = tokens[first : first + 16, :-1]
        distances.append(lg.effective_remembrance(model, rows, starts, 4 * T))
    distance = torch.cat(distances, dim=1)  # (starts, B, T)
    part = torch.from_numpy(part[:, 4 * T :])
    panels = {}
    for i, name in enumerate(names, 1):
        panels[f"predictions of {name}"] = distance[:, part == i].mean(1).tolist()
    x = [start / T for start in starts]
    return dict(xlabel="t: tokens left out (T)", ylabel="EffRem(t), total variation", x=x, panels=panels)


def packed(model, corpus, T, task, B=256, windows=4):
    """The mean of lengthgen.accuracy over the copied letters in each window of a stream of packed strings."""
    tokens, part = streams(task, corpus, T, B, windows)
    right = lg.accuracy(model, tokens, part == 1).unflatten(1, (windows, T))
    panels = {"packed strings": right.nanmean((0, 2)).tolist()}
    return dict(xlabel=AT, ylabel="accuracy", x=list(range(1, windows + 1)), panels=panels)


def passkey(model, corpus, T, task, B=32, lengths=(1, 2, 4, 8, 16, 32, 64, 128)):
    """The share of windows whose five digits come first in the greedy continuation."""
    panels = {}
    for distance in (1, 3, 8):
        shares = []
        for length in lengths:
            depth = max(0, 1 - distance / length)
            tokens, part = lg.passkey(lg.Rows(corpus, "val", B, continues=False, seed=0), T * length, depth)
            shares.append(exact_match(model, tokens, part == 2))
        panels[f"up to {distance} T of filler after the key"] = shares
    return dict(xlabel="length (T)", ylabel="accuracy", x=list(lengths), panels=panels)


def babilong(model, corpus, T, task, B=64, lengths=(1, 2, 4, 8, 16)):
    """The share of our own stories whose question is answered in the very words."""
    shares = []
    for length in lengths:
        tokens, part = lg.babilong(lg.Rows(corpus, "val", B, False, 0), T * length)
        shares.append(exact_match(model, tokens, part))
    panels = {"Where is Mary?": shares}
    return dict(xlabel="length (T)", ylabel="accuracy", x=list(lengths), panels=panels)


def exact_match(model, tokens, asked):
    """The share of rows where the likeliest token is the target at every place that is asked for (B, N)."""
    wrong = lg.accuracy(model, tokens, asked) == 0  # NaN, where nothing is asked, is not 0
    return float((~wrong.any(1)).double().mean())


# Which runs a figure compares: {label: run}, the run being the label where it needs no other name. Every new
# intervention is compared with the others.
FORKS = [name for name in lg.INTERVENTIONS if name not in train.STYLES]
PAIR = {run: run for run in ["base", "state_passing", *FORKS]}
MAIN = {run: run for run in ["base", "zero", "tbtt", "state_passing", *FORKS]}
ALL = {run: run for run in [*train.STYLES, *FORKS]}
FULL = {run: run for run in ALL if run != "state_passing-scan"}
NO_NOISE = {run: run for run in ["zero", "fitted_noise"]}
STARTS = {"base": "from-base/zero", "state_passing": "from-sp/zero", "tbtt": "from-tbtt/zero"}
STEPS = {"200 steps": "steps200/base", "400 steps": "steps400/base", "1400 steps": "base"}
LENGTHS = {"T = 26": "T26/base", "T = 50": "base", "T = 98": "T98/base"}
by_position = train.loss_by_position
FIGURES = {  # name: (title, experiment of PLAN, what is drawn: (measure, task of the runs, the runs))
    "poswise": ("Loss by position far beyond T", "echo", [(far_loss, "echo", MAIN)]),
    "interventions": ("The interventions on the initial state", "echo", [(by_position, "echo", ALL)]),
    "text": ("Streams of pure text", "mixed", [(text_loss, "mixed", FULL), (gap, "mixed", FULL)]),
    "state": ("The std of the state, over that at T", "echo", [(state, "echo", PAIR)]),
    "forgetting": (
        "Why not simply forget faster?",
        "echo",
        [(retention, "echo", PAIR), (minus, "echo", PAIR), (times, "echo", PAIR)],
    ),
    "effrem": ("Effective remembrance at 4 T", "echo", [(effrem, "echo", MAIN)]),
    "copying": ("Copying random letters", "copy", [(packed, "copy", MAIN)]),
    "passkey": ("A passkey after fine-tuning", "passkey", [(passkey, "passkey", NO_NOISE)]),
    "babilong": ("BABILong after fine-tuning", "babilong", [(babilong, "babilong", STARTS)]),
    "sweep": (
        "When does a base break?",
        "sweep",
        [(by_position, "echo", STEPS), (by_position, "echo", LENGTHS)],
    ),
}

# ---- 2. Drawing the runs that are there ----


class MissingRuns(ValueError):
    """A figure has no finished runs to draw."""


def draw(name, args, corpus, device):
    """Draw one figure of the runs under --out, print its numbers, and add them to results.json.

    Raises MissingRuns if there is no run for it.
    """
    title, _, blocks = FIGURES[name]
    panels = []
    for measure, task, runs in blocks:
        # {label: measurements, one for each seed that is there}
        found = {}
        for label, run in runs.items():
            for seed in range(args.seeds):
                folder = folder_of(args.out, args.model, task, run, seed)
                measurement = measure_run(folder, measure, corpus, device)
                if measurement:
                    found.setdefault(label, []).append(measurement)
        if not found:
            command = f"python eval.py reproduce {name} --model {args.model} --out {args.out}"
            raise MissingRuns(f"no finished run of {args.model} on {task}, make it with: {command}")
        panels += train.panels_of(found, args.seeds)
    path = os.path.join(args.out, "figures", f"{args.model}-{name}.png")
    train.draw(panels, path, f"{title}\n{args.model}, {args.seeds} seed{'s' * (args.seeds > 1)}")
    print(f"\n{name}: {path}")
    train.print_table(panels)

    # the numbers of other figures and architectures stay
    file = Path(args.out, "results.json")
    results = {}
    if file.exists():
        with lg.reading(file, "results of eval.py, remove it"):
            results = json.loads(file.read_text())
    command = f"python eval.py {name} --out {args.out} --model {args.model} --seeds {args.seeds}"
    entry = dict(picture=path, command=command, versions=train.VERSIONS, panels=panels)
    results.setdefault(args.model, {})[name] = entry
    lg.write_text(file, json.dumps(results, indent=1))


def folder_of(out, model, task, run, seed):
    """The folder of a run; "T26/base" is the base under --out {out}/T26."""
    parent, _, label = run.rpartition("/")
    return train.run_folder(os.path.join(out, parent), model, task, label, seed)


def measure_run(folder, measure, corpus, device):
    """The measurement of a finished run, None if there is none; ValueError if other code made the run."""
    if not os.path.exists(os.path.join(folder, lg.CHECKPOINT)):
        return None
    checkpoint = lg.load_checkpoint(folder)
    s = argparse.Namespace(**checkpoint["settings"])
    if checkpoint["step"] < s.steps:
        return None

    # what the same command would make today, but for the weights that it would start from
    model = lg.model_from_checkpoint(checkpoint).to(device).eval()
    run = train.describe_run(s, model, corpus)
    del run["made_from"][train.BASE]
    if s.init is None:
        config = lg.ModelConfig(layer=s.model, vocab_size=corpus.vocab_size, **train.TINY_MODELS[s.model])
        run["config"] = asdict(config)
    train.check_same_run(checkpoint, run, folder)
    train.tell_scan(model)
    return train.measured(folder, measure, model, corpus, s.T, s.task)


# ---- 3. The plan: command lines of train.py, which skips what is finished ----

# not pre-trained for longer, because the base then learns by itself to forget the string before this one
COPY_BASE = "--task copy --T 44 --steps 1000"
COPY = "--init {out}/{model}-copy-base-s{seed} --steps 1000 --lr 2e-3 --zero-prob 0.2"
# the base of echo can repeat what it has just read
PASSKEY = "--task passkey --T 160 --batch 32 --steps 600 --lr 3e-3 --zero-prob 0.1 --init {echo}-base-s{seed}"
BABILONG = "--task babilong --T 144 --batch 32 --steps 500 --lr 3e-3 --intervention zero"
PLAN = {  # {echo}-base-s{seed} is the folder of a run of echo
    "echo": [f"--task echo --intervention {name}" for name in lg.INTERVENTIONS],
    "mixed": [f"--task mixed --intervention {name}" for name in lg.INTERVENTIONS],
    "copy": [COPY_BASE, f"{COPY} --intervention zero", f"{COPY} --intervention state_passing"],
    "passkey": ["--task echo", f"{PASSKEY} --intervention zero", f"{PASSKEY} --intervention fitted_noise"],
    "babilong": [
        "--task echo --intervention state_passing",
        "--task echo --intervention tbtt",
        BABILONG + " --init {echo}-base-s{seed} --out {out}/from-base",
        BABILONG + " --init {echo}-state_passing-s{seed} --out {out}/from-sp",
        BABILONG + " --init {echo}-tbtt-s{seed} --out {out}/from-tbtt",
    ],
    "sweep": [  # batches of as many tokens
        "--task echo",
        "--task echo --steps 200 --out {out}/steps200",
        "--task echo --steps 400 --out {out}/steps400",
        "--task echo --T 26 --batch 123 --out {out}/T26",
        "--task echo --T 98 --batch 33 --out {out}/T98",
    ],
}
PLAN["echo"].append("--task echo --intervention state_passing --carry scan")


def reproduce(figures, args):
    """Train what some figures need, one command line of train.py after the other."""
    lines = []
    for name in figures:
        for seed in range(args.seeds):
            lines += command_lines(FIGURES[name][1], args, seed)
    lines = list(dict.fromkeys(lines))  # each once
    started = time.time()
    for i, line in enumerate(lines, 1):
        print(f"\nrun {i} of {len(lines)}, {(time.time() - started) / 60:.1f} minutes gone")
        print(f"python train.py {line}", flush=True)
        train.main(shlex.split(line))


def command_lines(experiment, args, seed):
    """The command lines of an experiment with everything filled in."""
    out = shlex.quote(args.out)
    lines = []
    for line in PLAN[experiment]:
        line = line.format(out=out, model=args.model, seed=seed, echo=f"{out}/{args.model}-echo")
        if "--init" not in line:
            line += f" --model {args.model}"
        if "--out" not in line:
            line += f" --out {out}"
        if args.device:
            line += f" --device {args.device}"
        lines.append(f"{line} --seed {seed}")
    return lines


# ---- 4. One given checkpoint, `sample` ----


def given_poswise(args, model, settings, tokenizer):
    """How one checkpoint, ours or another library's, breaks past its training length."""
    T = args.T or settings["T"]
    task = args.task or settings["task"]
    corpus = lg.load_corpus(args.data, tokenizer, model.config.vocab_size)
    train.check_vocabulary(model, corpus, args.init)
    losses = train.loss_by_position(model, corpus, T, task, args.rows, args.windows)
    name = os.path.basename(os.path.abspath(args.init))
    path = os.path.join(args.out, f"poswise-{name}")
    train.report({name: losses}, f"{path}.png", f"{args.init} on {task}, trained on T = {T} tokens")
    lg.write_text(f"{path}.json", json.dumps(dict(losses, T=T, command=shlex.join(sys.argv)), indent=1))


def given_babilong(args, model, settings, tokenizer):
    """Accuracy of one checkpoint on published BABILong files: --data with qa1 to qa5 in their names."""
    if not args.data:
        raise ValueError("babilong needs --data, published files with qa1 to qa5 in their names")
    accuracy = {}
    for file in args.data:
        qa = re.search(r"qa([1-5])(?!\d)", os.path.basename(file))
        if not qa:
            raise ValueError(f"{file} has none of qa1 to qa5 in its name: give published BABILong files")
        right = 0
        entries = lg.read_babilong(file, args.rows or 64)
        for text, question, answer in entries:
            # bytes are asked to go on after a space; other vocabularies have it in front of the next word
            prompt = text + " " if model.config.vocab_size == 258 else text
            output = continuation(args, model, tokenizer, prompt, 16, 0.0)
            right += lg.babilong_score(output, answer, question, int(qa[1]))
        accuracy[file] = right / len(entries)
        print(f"{file}: {accuracy[file]:.3f} of {len(entries)}", flush=True)
    path = os.path.join(args.out, f"babilong-{os.path.basename(os.path.abspath(args.init))}.json")
    lg.write_text(path, json.dumps(dict(accuracy=accuracy, command=shlex.join(sys.argv)), indent=1))
    print(f"numbers: {path}")


def sample(args, model, settings, tokenizer):
    """Print what a checkpoint writes after a prompt."""
    torch.manual_seed(args.seed)
    print(args.prompt + continuation(args, model, tokenizer, args.prompt, args.tokens, args.temperature))


def continuation(args, model, tokenizer, prompt, n, temperature):
    """The text of the next n tokens after a prompt, without special tokens."""
    corpus = lg.Corpus("no text", None, None, *lg.load_tokenizer(tokenizer))
    train.check_vocabulary(model, corpus, args.init)
    tokens = np.array([[corpus.bos, *corpus.encode(prompt)]], dtype=np.int64)
    output = [int(token) for token in lg.generate(model, tokens, n, temperature)]
    return corpus.decode([token for token in output if token < corpus.words])


GIVEN = {"poswise": given_poswise, "babilong": given_babilong, "sample": sample}

# ---- 5. The command line ----


def parse_arguments(argv):
    p = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="*", help=f"reproduce, sample, or some of {', '.join(FIGURES)} (all)")
    p.add_argument("--out", default="runs", help="folder of the runs")
    p.add_argument("--model", default="mamba2", choices=train.TINY_MODELS, help="architecture of the runs")
    p.add_argument("--seeds", type=train.positive, default=1, help="how many: 3 stands for 0, 1 and 2")
    p.add_argument("--device", choices=["cuda", "mps", "cpu"], help="where to compute (the first there is)")
    p.add_argument("--init", metavar="RUN", help="poswise, babilong, sample: of this checkpoint")
    p.add_argument("--task", choices=lg.TASKS, help="with --init: what it reads (the task of its run)")
    p.add_argument("--T", type=train.positive, help="with --init: its training length (that of its run)")
    p.add_argument("--data", nargs="+", metavar="PATH", help="with --init: text, or published BABILong files")
    p.add_argument("--tokenizer", help="with --init: as in train.py (that of its run)")
    p.add_argument("--windows", type=train.positive, default=64, help="with --init: length of streams, in T")
    p.add_argument("--rows", type=train.positive, help="with --init: how many streams, questions")
    p.add_argument("--prompt", default="import os\n", help="sample: what comes first")
    p.add_argument("--tokens", type=train.positive, default=400, help="sample: how many to write")
    p.add_argument(
        "--temperature", type=train.not_negative, default=0.8, help="sample: 0 takes the likeliest"
    )
    p.add_argument("--seed", type=train.seed, default=0, help="sample: another seed, another text")
    args = p.parse_args(argv)
    for name in args.what:
        if name not in (*FIGURES, "reproduce", "sample"):
            raise ValueError(f"unknown figure {name!r}, expected reproduce, sample or {', '.join(FIGURES)}")
    for name in ("task", "T", "data", "tokenizer"):
        if getattr(args, name) and args.init is None:
            raise ValueError(f"--{name} goes with --init RUN, figures of own runs need none")
    if args.init is not None or "sample" in args.what:
        if args.init is None or len(args.what) != 1 or args.what[0] not in GIVEN:
            raise ValueError(f"--init RUN goes with one of {', '.join(GIVEN)}, got {' '.join(args.what)!r}")
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
        tokenizer = args.tokenizer
        if tokenizer is None:
            tokenizer = settings["tokenizer"] or "bytes"
        GIVEN[args.what[0]](args, model, settings, tokenizer)
        return

    # figures of the runs under --out
    asked = [name for name in args.what if name in FIGURES]
    if "reproduce" in args.what:
        reproduce(asked or FIGURES, args)
    corpus = lg.load_corpus()
    for name in asked or FIGURES:
        try:
            draw(name, args, corpus, device)
        except MissingRuns as error:
            if asked:
                raise
            print(f"{name}: left out, {error}")
    print(f"\n{(time.time() - started) / 60:.1f} minutes in all")


# the sources of the measures are read now, as those in train.py
for _, _, blocks in FIGURES.values():
    for measure, _, _ in blocks:
        train.sources(measure, modules=("kernels", "lengthgen", measure.__module__))

if __name__ == "__main__":
    train.run_command(main)
