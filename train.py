"""Train a recurrent language model from zero states, then cure it with an intervention on the initial state.

    python train.py --intervention state_passing

is the main job: it pre-trains the tiny base model on echo if there is none, post-trains it, and ends with a
table and a picture of the loss by position, before and after. Without --intervention it makes the base alone;
`--intervention zero` is the control, the same extra steps without a cure. Every run is one folder:
checkpoint.pt, metrics.jsonl, settings.json, position_wise.json and the picture. Stopped and started again
with the same settings it goes on from the last checkpoint. Several GPUs: torchrun --nproc-per-node N train.py
..., each rank carries its own rows.
"""

import argparse
import functools
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make a shared machine ten times slower

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

import lengthgen as lg

TINY = {  # models that learn echo on a laptop in minutes
    "mamba2": dict(d_model=96, n_layer=2, d_state=64, headdim=16),
    "mamba1": dict(d_model=96, n_layer=2, d_state=16),
    "gla": dict(d_model=96, n_layer=2, num_heads=2),
}
PRETRAIN = dict(steps=1400, lr=3e-3)
POSTTRAIN = dict(steps=500, lr=1e-3, batch=64, zero_prob=0.5)
# For official sizes: steps, tokens, no zero starts as in the paper. Its learning rate is unknown; ours lies
# half-way, by ratio, between the peak of pre-training (6e-4 to 2e-4 by size) and its end, FINAL_LR.
LARGE = 50e6  # parameters
POSTTRAIN_LARGE = dict(steps=500, lr=5e-5, batch=8, zero_prob=0.0)
TOKENS_LARGE = 2**19  # a step, by accumulation
FINAL_LR, WEIGHT_DECAY, BETAS, CLIP = 1e-5, 0.01, (0.9, 0.95), 1.0  # the paper's
SAVE_EVERY = 100  # steps


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parse_arguments(argv):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--intervention", choices=lg.INTERVENTIONS, help="the cure (none: train the base alone)")
    p.add_argument("--model", choices=TINY, help="architecture of a new base (mamba2)")
    p.add_argument("--task", choices=lg.TASKS, help="what to train on (echo, or that of --init)")
    p.add_argument("--data", nargs="+", metavar="PATH", help="text, .jsonl or a .bin (the standard library)")
    p.add_argument(
        "--tokenizer", help="bytes, a tiktoken name or a tokenizer.json (bytes, or that of --init)"
    )
    p.add_argument("--T", type=int, help="training length in tokens (that of the task, or of --init)")
    p.add_argument("--init", metavar="NAME", help="start from this run, or foreign checkpoint on disk or hub")
    p.add_argument(
        "--steps", type=int, help=f"optimizer steps (base {PRETRAIN['steps']}, then {POSTTRAIN['steps']})"
    )
    peaks = [defaults["lr"] for defaults in (PRETRAIN, POSTTRAIN, POSTTRAIN_LARGE)]
    p.add_argument("--lr", type=float, help="peak (base {}, then {}, official sizes {})".format(*peaks))
    p.add_argument("--batch", type=int, help="rows of a micro-batch, on each rank (64; official sizes 8)")
    p.add_argument("--accumulate", type=int, help="micro-batches of a step (1; official sizes 0.5M tokens)")
    p.add_argument(
        "--carry", default="full", choices=["full", "scan"], help="state handed over: all, or the scan's"
    )
    p.add_argument(
        "--zero-prob", type=float, help="share of rows from zeros all the same (0.5; official sizes 0)"
    )
    p.add_argument("--noise-std", type=float, default=1.0, help="standard deviation of random_noise")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="runs", help="folder of the runs")
    p.add_argument("--compile", action="store_true", help="torch.compile: a minute to start, then faster")
    p.add_argument("--device", help="cuda, mps or cpu (the first there is)")
    args = p.parse_args(argv)
    for name in ("T", "steps", "batch", "accumulate", "lr"):  # None: main() chooses
        value = getattr(args, name)
        if value is not None and not value > 0:  # so that NaN is refused too
            raise ValueError(f"--{name} must be positive, got {value}")
    if args.init and not args.intervention:
        raise ValueError("--init needs an --intervention to go on with: zero for training as usual")
    for name in ("carry", "zero_prob", "noise_std"):
        if not args.intervention and getattr(args, name) != p.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} needs an --intervention, the base has none")
    if not 0 <= args.noise_std < math.inf:
        raise ValueError(f"--noise-std must be finite and not negative, got {args.noise_std}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must lie between 0 and 2**32, got {args.seed}")
    if args.zero_prob is not None and not 0 <= args.zero_prob <= 1:
        raise ValueError(f"--zero-prob must lie between 0 and 1, got {args.zero_prob}")
    return args


def say(message):
    """Print on the first rank only."""
    if rank() == 0:
        print(message, flush=True)


def rank():
    return int(os.environ.get("RANK", 0))


def choose_device(name):
    """The device, with the reason printed; several ranks also start their process group here."""
    reason = "asked for"
    if name is None:
        if torch.cuda.is_available():
            name, reason = "cuda", "there is a GPU"
        elif torch.backends.mps.is_available():
            name, reason = "mps", "there is an Apple GPU"
        else:
            name, reason = "cpu", "no GPU found"
    try:
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device(name, local) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if device.type == "cpu":
        reason += f", {torch.get_num_threads()} threads"
    say(f"device: {device}, {reason}")
    say(
        "precision: bfloat16 matmuls over float32 weights and states, the GPU has them"
        if device.type == "cuda"
        else f"precision: float32, which loses nothing on {device.type}"
    )
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        say(f"ranks: {dist.get_world_size()}, each with its own rows and states")
    return device


def learning_rate(step, steps, peak):
    """Warm-up over the first tenth, then a cosine down to FINAL_LR (the paper's schedule)."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress, end = (step - warmup) / max(1, steps - warmup), min(FINAL_LR, peak)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model):
    """AdamW; no decay on norms, biases, D, dt_bias and A_log: the vectors, and Mamba-1's A_log."""

    def group(decays, weight_decay):
        named = model.named_parameters()
        params = [p for name, p in named if (p.dim() > 1 and not name.endswith("A_log")) == decays]
        return dict(params=params, weight_decay=weight_decay)

    fused = model.lm_head.weight.device.type != "mps"
    return torch.optim.AdamW([group(True, WEIGHT_DECAY), group(False, 0.0)], lr=0.0, betas=BETAS, fused=fused)


def write_atomically(path, write):
    """write(temporary path), then rename: a reader never sees half a file."""
    temporary = f"{path}.tmp"
    write(temporary)
    os.replace(temporary, path)


def write_json(path, value):
    def write(temporary):
        with open(temporary, "w") as f:
            json.dump(value, f, indent=1)

    write_atomically(path, write)


def train(model, corpus, settings, folder, device):
    """Train `model` in place as `settings` say, writing to `folder`; goes on where an equal run stopped.

    A finished run is only loaded. A folder that holds another run is left alone: ValueError.
    """
    s = settings
    make_folder(folder)
    task, _, _ = lg.TASKS[s["task"]]
    function, continues = lg.INTERVENTIONS[s["intervention"]]
    if s["intervention"] == "random_noise":
        function = functools.partial(function, std=s["noise_std"])
    torch.manual_seed(s["seed"])
    rows = lg.Rows(corpus, "train", s["batch"], continues, seed=1000 * s["seed"] + rank())
    noise_rng = torch.Generator(device).manual_seed(1000 * s["seed"] + rank())
    stats, state, step, seconds = lg.StateStatistics(), None, 0, 0.0
    optimizer = make_optimizer(model)

    checkpoint_file, metrics_file = (os.path.join(folder, f) for f in (lg.CHECKPOINT, "metrics.jsonl"))
    if os.path.exists(checkpoint_file):
        saved = lg.load_checkpoint(checkpoint_file)
        for key, value in s.items():
            if saved["settings"].get(key) != value:
                raise ValueError(
                    f"{folder} holds a run with {key} {saved['settings'].get(key)!r}, not {value!r}: "
                    "choose another --out or remove it"
                )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, mine = saved["step"], saved["ranks"][rank()]
        if step == s["steps"]:
            say(f"{folder}: found, all {step} steps")
            return
        seconds = saved["seconds"]
        state = lg.map_state(lambda x: x.to(device), [lg.LayerState(*x) for x in mine["state"]])
        stats.load_state_dict(mine["stats"], device)
        rows.load_state_dict(mine["rows"])
        noise_rng.set_state(mine["noise_rng"])
        say(f"{folder}: goes on at step {step}, where the same run was stopped")
    saved_step = step

    def save():
        mine = dict(
            state=[tuple(x) for x in state],
            stats=stats.state_dict(),
            rows=rows.state_dict(),
            noise_rng=noise_rng.get_state(),
        )
        ranks = [mine]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size() if rank() == 0 else None
            dist.gather_object(mine, ranks)
        if rank() == 0:
            checkpoint = dict(
                config=asdict(model.config), settings=s, step=step, seconds=seconds, model=model.state_dict(),
                optimizer=optimizer.state_dict(), ranks=ranks,
            )  # fmt: skip
            write_atomically(checkpoint_file, functools.partial(torch.save, checkpoint))

    def finite_mean(x):
        """The mean over the ranks of a loss or a norm; they all stop together where it is no number."""
        if dist.is_initialized():
            dist.all_reduce(x)
        x = x.item() / s["ranks"]
        if not math.isfinite(x):
            kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "nothing was saved yet"
            raise FloatingPointError(
                f"the loss or its gradient became {x} in step {step + 1}, {kept} in {folder}: "
                f"try a smaller --lr than {s['lr']} or another --seed"
            )
        return x

    if rank() == 0:
        versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
        write_json(os.path.join(folder, "settings.json"), dict(s, command=sys.argv, versions=versions))
        kept = []
        if step and os.path.exists(metrics_file):
            with open(metrics_file) as f:
                kept = f.readlines()[:step]  # one line a step; the last may have been cut off
        with open(metrics_file, "w") as f:
            f.writelines(kept)
    run = torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    run = torch.compile(run) if s["compile"] else run
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    tokens_per_step = s["batch"] * s["T"] * s["accumulate"] * s["ranks"]
    started, first, earlier = time.time(), step, seconds
    while step < s["steps"]:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s["steps"], s["lr"])
        step_loss = 0.0
        for _ in range(s["accumulate"]):
            tokens, part = (torch.from_numpy(x).to(device) for x in task(rows, s["T"]))
            with autocast:
                logits, final = run(tokens[:, :-1], state)
            loss = lg.masked_loss(logits, tokens[:, 1:], part) / s["accumulate"]
            loss.backward()
            step_loss += loss.detach()
            state = lg.next_initial_state(function, final, stats, noise_rng, s["zero_prob"], s["carry"])
        step_loss = finite_mean(step_loss)
        finite_mean(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        seconds = earlier + time.time() - started
        if rank() == 0:
            with open(metrics_file, "a") as f:
                line = dict(
                    step=step, loss=step_loss, lr=group["lr"], tokens=step * tokens_per_step, seconds=seconds
                )
                f.write(json.dumps(line) + "\n")
        if step % max(1, s["steps"] // 20) == 0 or step == s["steps"]:
            rate = (step - first) / (seconds - earlier)
            say(
                f"  step {step:5}/{s['steps']}  {step / s['steps']:4.0%}  loss {step_loss:.3f}  "
                f"{rate * tokens_per_step:,.0f} tokens/s  {clock((s['steps'] - step) / rate)} left"
            )
        if step % SAVE_EVERY == 0 or step == s["steps"]:
            with torch.no_grad(), autocast:  # the loss above is of the weights before this step
                logits, _ = model(tokens[:, :-1])
            finite_mean(lg.masked_loss(logits, tokens[:, 1:], part))
            save()
            saved_step = step


class Progress:
    """Called with the share that is done: prints it, with the time left, every ten seconds."""

    def __init__(self, what):
        self.what, self.started, self.said = what, time.time(), time.time()

    def __call__(self, done):
        if time.time() - self.said > 10:
            self.said = time.time()
            left = (self.said - self.started) * (1 - done) / done
            say(f"  {self.what}  {done:4.0%}  {clock(left)} left")


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def octaves(measured):
    """Edges of the table's ranges, in units of T: 0, 1, 2, 4, 8, ... to the end of the stream."""
    windows = measured["edges"][-1] // measured["T"]
    return [0, *(2**i for i in range(windows.bit_length()) if 2**i < windows), windows]


def mean_loss(measured, part, low, high=math.inf):
    """Mean loss (nats) of the targets at low T to high T, from a result of lengthgen.position_wise."""
    loss, count = (np.array(measured["parts"][part][x]) for x in ("loss", "count"))
    edges = np.array(measured["edges"]) / measured["T"]
    # a range below T may hold no target and its loss be NaN
    chosen = (edges[:-1] >= low) & (edges[1:] <= high) & (count > 0)
    return float((loss * count)[chosen].sum() / count[chosen].sum())


def print_table(results):
    """results: {name: result of lengthgen.position_wise}. One block per part of the task, a row per model."""
    first = next(iter(results.values()))
    ranges = list(itertools.pairwise(octaves(first)))
    say(f"\nloss in nats by position, T = {first['T']} tokens; streamed from a zero state on held-out text")
    say(f"{'':22}" + "".join(f"{f'{a}-{b}T':>9}" for a, b in ranges))
    for part in first["parts"]:
        for name, measured in results.items():
            say(f"{part:6}{name:16}" + "".join(f"{mean_loss(measured, part, *x):9.2f}" for x in ranges))
    say("")
    if len(ranges) > 1:
        part, end = next(iter(first["parts"])), ranges[-1][1]
        for name, measured in results.items():
            inside, *beyond = (mean_loss(measured, part, *x) for x in ranges)
            worst = max(beyond) - inside
            verdict = "breaks past T"
            if worst < 0.5:
                verdict = "gets worse past T" if worst > 0.1 else f"holds to {end} T"
            say(f"{name}: {part} loss {inside:.2f} inside T, at worst {worst:+.2f} beyond: {verdict}")


# The look of every picture: the paper's axes, base and control solid, what was cured dashed

COLOURS = {  # told apart by colour-blind people too (Okabe & Ito)
    "base": "#D55E00", "zero": "#999999", "random_noise": "#E69F00", "fitted_noise": "#56B4E9",
    "state_passing": "#0072B2", "tbtt": "#009E73",
}  # fmt: skip
LABELS = {"zero": "control (no intervention)", "tbtt": "TBTT"}
NEW = "#CC79A7"  # an intervention that somebody added


def label(kind):
    return LABELS.get(kind, kind.replace("_", " ").replace("-scan", ", scan alone"))


def page(columns, width=4.4, height=3.6, **kwargs):
    figure = Figure(figsize=(width * columns, height))
    return figure, list(figure.subplots(1, columns, squeeze=False, **kwargs)[0])


def curve(axis, x, seeds, kind):
    """The mean over seeds (n_seeds, n) and, shaded, from the lowest to the highest."""
    y = np.array(seeds, dtype=float)
    colour = COLOURS.get(kind.removesuffix("-scan"), NEW)
    style = "-" if kind in ("base", "zero") else ":" if kind.endswith("-scan") else "--"
    axis.plot(x, y.mean(0), style, color=colour, marker="o", markersize=3, label=label(kind))
    if len(y) > 1:
        axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, linewidth=0)


def dress(axis, T, title, xlabel, ylabel="", logy=True):
    axis.axvline(T, linestyle=":", color="black", linewidth=1)
    axis.text(T, 0.93, " T", transform=axis.get_xaxis_transform(), fontsize=9)
    axis.set_xscale("log", base=2)
    if logy:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)


def keep(figure, path, title):
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    write_atomically(path, functools.partial(figure.savefig, dpi=150, format="png", facecolor="white"))


def middles(edges):
    """Where a range of positions is drawn: its geometric middle; the first begins at half its end."""
    edges = np.array(edges, dtype=float)
    return np.sqrt(np.maximum(edges[:-1], edges[1] / 2) * edges[1:])


PART_MEANING = {
    "text": "held-out text never seen before", "echo": "the same passage again", "copy": "letters to repeat",
    "key": "the digits to repeat", "answer": "the answer and its stop",
}  # fmt: skip


def draw_position_wise(results, path, title):
    """The paper's figure: loss against position, a dotted line at T. results as for print_table."""
    parts = next(iter(results.values()))["parts"]
    figure, axes = page(len(parts), sharey=True)
    for axis, part in zip(axes, parts, strict=True):
        for name, measured in results.items():
            curve(axis, middles(measured["edges"]), [measured["parts"][part]["loss"]], name)
        meaning = f"{part}: {PART_MEANING[part]}"
        dress(axis, measured["T"], meaning, "position in the stream (tokens)", logy=False)
    axes[0].set_ylim(bottom=0)  # not before all is drawn: it also fixes the top, of all panels
    axes[0].set_ylabel("loss (nats per token)")
    axes[-1].legend(frameon=False, fontsize=9)
    keep(figure, path, f"{title}, trained on T = {measured['T']} tokens")


def make_folder(path):
    """Create a folder and prove that it can be written to, before anything long starts."""
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".probe{rank()}")
        open(probe, "w").close()
        os.remove(probe)
    except OSError as error:
        raise ValueError(f"the folder {path!r} cannot be written to: {error.strerror}") from None


def finished(folder):
    """The checkpoint in `folder` if its run reached the last step, else None."""
    if not os.path.exists(os.path.join(folder, lg.CHECKPOINT)):
        return None
    checkpoint = lg.load_checkpoint(folder)
    return checkpoint if checkpoint["step"] == checkpoint["settings"]["steps"] else None


def measure(model, folder, task, T, corpus):
    """Position-wise loss, kept beside the checkpoint in `folder` (None: not kept)."""
    rows = max(16, min(256, 12800 // T))
    measured = lg.position_wise(model, task, corpus, T, rows=rows, progress=Progress("loss by position"))
    if folder and rank() == 0:
        write_json(os.path.join(folder, "position_wise.json"), measured)
    return measured


def check_vocabulary(model, corpus, name):
    """ValueError if the model `name` was trained with another tokenizer than the corpus was read with."""
    # the padding of a vocabulary counts as words in transformers
    if not 0 <= model.config.vocab_size - corpus.vocab_size < 128:
        raise ValueError(
            f"{name} knows {model.config.vocab_size} tokens, the corpus has {corpus.vocab_size}: "
            "choose the --tokenizer that it was trained with"
        )


def main(argv=None, corpus=None):
    """Run one command line; ValueError if it is wrong. corpus: the one it names, if it is loaded already."""
    started = time.time()
    args = parse_arguments(argv)
    init = lg.load_checkpoint(args.init) if args.init else None
    if init and args.model not in (None, init["config"]["layer"]):
        raise ValueError(f"{args.init} is a {init['config']['layer']}, no {args.model}: leave --model out")
    task = args.task or (init["settings"]["task"] if init else "echo")
    T = args.T or (init["settings"]["T"] if init else lg.TASKS[task][1])
    args.tokenizer = args.tokenizer or (init and init["settings"].get("tokenizer")) or "bytes"
    corpus = corpus or lg.load_corpus(args.data, args.tokenizer, init and init["config"]["vocab_size"])
    for split in ("train", "val"):  # a text that is too short or a T that does not fit is found out here
        lg.TASKS[task][0](lg.Rows(corpus, split, 1, True, 0), T)
    make_folder(args.out)
    device = choose_device(args.device)
    say(f"corpus: {corpus.name}, {len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out")

    model_name = init["settings"].get("name", init["config"]["layer"]) if init else args.model or "mamba2"
    large = bool(init) and sum(x.numel() for x in init["model"].values()) > LARGE
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    defaults = POSTTRAIN_LARGE if large else POSTTRAIN
    args.batch = args.batch or defaults["batch"]
    args.accumulate = args.accumulate or (math.ceil(TOKENS_LARGE / (args.batch * T * ranks)) if large else 1)
    args.zero_prob = defaults["zero_prob"] if args.zero_prob is None else args.zero_prob
    name = args.intervention and args.intervention + ("-scan" if args.carry == "scan" else "")
    base_folder, folder = (
        os.path.join(args.out, f"{model_name}-{task}-{kind}-s{args.seed}") for kind in ("base", name)
    )
    common = dict(
        task=task, T=T, data=corpus.name, batch=args.batch, accumulate=args.accumulate, seed=args.seed,
        ranks=ranks, compile=args.compile, name=model_name, tokenizer=args.tokenizer,
    )  # fmt: skip

    # the base: given, found, or trained from zero states
    base = init or finished(base_folder)
    if base:
        base_folder = args.init or base_folder
        for key, value in dict(task=task, T=T, data=corpus.name).items():
            if not init and base["settings"][key] != value:
                raise ValueError(
                    f"the base in {base_folder} was made with {key} {base['settings'][key]!r}, not "
                    f"{value!r}: choose another --out or remove it"
                )
        model = lg.LanguageModel.from_checkpoint(base).to(device)
        check_vocabulary(model, corpus, base_folder)
        say(f"base: {base_folder}, {'asked for' if init else 'found'}")
        if large:
            model.config.recompute = True
            say("memory: each layer is computed again in the backward pass, as its activations would not fit")
    else:
        say(f"base: none in {base_folder}, so it is trained first, from zero states")
        torch.manual_seed(args.seed)
        config = lg.ModelConfig(layer=model_name, vocab_size=corpus.vocab_size, **TINY[model_name])
        model = lg.LanguageModel(config).to(device)
        plain = dict(intervention="zero", carry="full", zero_prob=0.0, noise_std=0.0, init=None)
        own = PRETRAIN if args.intervention else recipe(PRETRAIN, args)
        train(model, corpus, common | plain | own, base_folder, device)
    results = {}
    results["base"] = measure(model, None if init else base_folder, task, T, corpus)

    if args.intervention:
        chosen = dict(
            intervention=args.intervention, carry=args.carry, zero_prob=args.zero_prob,
            noise_std=args.noise_std, init=base_folder,
        )  # fmt: skip
        settings = common | chosen | recipe(defaults, args)
        kept = f"{args.zero_prob:.0%} of the rows from zeros, carrying the {args.carry} state"
        tokens = f"{args.batch} x {args.accumulate} x {ranks} rows of {T} tokens a step"
        say(f"post-training with {name}, {kept}, {tokens}, learning rate {settings['lr']}")
        train(model, corpus, settings, folder, device)
        results[name] = measure(model, folder, task, T, corpus)

    print_table(results)
    if rank() == 0:
        picture = os.path.join(folder if args.intervention else base_folder, "position_wise.png")
        draw_position_wise(results, picture, f"{model_name} on {task}")
        say(f"picture: {picture}   ({clock(time.time() - started)} in all)")
    if dist.is_initialized():
        dist.destroy_process_group()


def recipe(defaults, args):
    return dict(steps=args.steps or defaults["steps"], lr=args.lr or defaults["lr"])


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


if __name__ == "__main__":
    run_command(main)
