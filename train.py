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


def parse_arguments(argv):
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise ValueError(message)

    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--intervention",
        choices=lg.INTERVENTIONS,
        help="where post-training starts from; none: only the base",
    )
    p.add_argument("--model", default="mamba2", choices=TINY, help="architecture of a new base")
    p.add_argument(
        "--task", choices=lg.TASKS, help="what to train on (echo; that of the checkpoint with --init)"
    )
    p.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text files, folders, .jsonl or one .bin (the standard library)",
    )
    p.add_argument(
        "--tokenizer",
        help="bytes, a tiktoken encoding or a byte-level tokenizer.json (that of the checkpoint, else bytes)",
    )
    p.add_argument("--T", type=int, help="training length in tokens (that of the task, or of the checkpoint)")
    p.add_argument(
        "--init",
        metavar="NAME",
        help="start from a run or a foreign checkpoint, on disk or on the hub, instead of the tiny base",
    )
    p.add_argument(
        "--steps",
        type=int,
        help=f"optimizer steps (base {PRETRAIN['steps']}, after that {POSTTRAIN['steps']})",
    )
    p.add_argument(
        "--lr",
        type=float,
        help=f"peak learning rate (base {PRETRAIN['lr']}, after that {POSTTRAIN['lr']}, official sizes "
        f"{POSTTRAIN_LARGE['lr']})",
    )
    p.add_argument("--batch", type=int, help="rows of a micro-batch, on each rank (64; official sizes 8)")
    p.add_argument(
        "--accumulate",
        type=int,
        help="micro-batches of a step; the state is carried through them (1; official sizes 0.5M tokens)",
    )
    p.add_argument(
        "--carry",
        default="full",
        choices=["full", "scan"],
        help="state handed over: with or without convolution",
    )
    p.add_argument(
        "--zero-prob",
        type=float,
        help="probability that a row starts from zeros all the same (0.5; official sizes 0, as in the paper)",
    )
    p.add_argument("--noise-std", type=float, default=1.0, help="standard deviation of random_noise")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="runs", help="folder of the runs")
    p.add_argument(
        "--compile", action="store_true", help="torch.compile the model: a minute to start, then faster"
    )
    p.add_argument("--device", help="cuda, mps or cpu (the first there is)")
    args = p.parse_args(argv)
    for name in ("T", "steps", "batch", "accumulate", "lr"):  # None: main() chooses
        value = getattr(args, name)
        if value is not None and not value > 0:  # so that NaN is refused too
            raise ValueError(f"--{name} must be positive, got {value}")
    if args.init and not args.intervention:
        raise ValueError("--init needs an --intervention to go on with: zero for training as usual")
    if not args.noise_std >= 0:
        raise ValueError(f"--noise-std must not be negative, got {args.noise_std}")
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
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_LR + (peak - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


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
    stats, state, step = lg.StateStatistics(), None, 0
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
                config=asdict(model.config), settings=s, step=step, model=model.state_dict(),
                optimizer=optimizer.state_dict(), ranks=ranks,
            )  # fmt: skip
            write_atomically(checkpoint_file, functools.partial(torch.save, checkpoint))

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
    started, first = time.time(), step
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
        if dist.is_initialized():  # so that all ranks report the same and stop together
            dist.all_reduce(step_loss)
        step_loss = step_loss.item() / s["ranks"]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        if not (math.isfinite(step_loss) and math.isfinite(norm)):
            kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "nothing was saved yet"
            raise FloatingPointError(
                f"the loss became {step_loss} and its gradient {norm} in step {step + 1}, {kept} in "
                f"{folder}: try a smaller --lr than {s['lr']} or another --seed"
            )
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        seconds = time.time() - started
        if rank() == 0:
            with open(metrics_file, "a") as f:
                line = dict(
                    step=step, loss=step_loss, lr=group["lr"], tokens=step * tokens_per_step, seconds=seconds
                )
                f.write(json.dumps(line) + "\n")
        if step % max(1, s["steps"] // 20) == 0 or step == s["steps"]:
            rate = (step - first) / seconds
            say(
                f"  step {step:5}/{s['steps']}  {step / s['steps']:4.0%}  loss {step_loss:.3f}  "
                f"{rate * tokens_per_step:,.0f} tokens/s  {clock((s['steps'] - step) / rate)} left"
            )
        if step % SAVE_EVERY == 0 or step == s["steps"]:
            save()
            saved_step = step


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


OCTAVES = [0, 1, 2, 4, 8, 16, 32, 64]  # ranges of the table, in units of T


def by_octave(measured, part):
    """Mean loss (nats) per range of OCTAVES, from a result of lengthgen.position_wise."""
    T, edges = measured["T"], measured["edges"]
    loss, count = (np.array(measured["parts"][part][x]) for x in ("loss", "count"))
    loss = np.where(count > 0, loss, 0)  # a range below T may hold no target: that is no reason for NaN
    where = np.searchsorted(np.array(OCTAVES[1:]) * T, edges[:-1], side="right")
    return [
        float((loss * count)[where == i].sum() / count[where == i].sum()) for i in range(len(OCTAVES) - 1)
    ]


def print_table(results):
    """results: {name: result of lengthgen.position_wise}. One block per part of the task, a row per model."""
    T = next(iter(results.values()))["T"]
    parts = next(iter(results.values()))["parts"]
    ranges = "".join(f"{f'{a}-{b}T':>9}" for a, b in itertools.pairwise(OCTAVES))
    say(f"\nloss in nats by position, T = {T} tokens; streamed from a zero state on held-out text")
    say(f"{'':22}{ranges}")
    for part in parts:
        for name, measured in results.items():
            say(f"{part:6}{name:16}" + "".join(f"{x:9.2f}" for x in by_octave(measured, part)))
    say("")
    for name, measured in results.items():
        part = next(iter(parts))
        inside, *beyond = by_octave(measured, part)
        worst = max(beyond) - inside
        verdict = "breaks past T" if worst > 0.5 else "gets worse past T" if worst > 0.1 else "holds to 64 T"
        say(f"{name}: {part} loss {inside:.2f} inside T, at worst {worst:+.2f} beyond: {verdict}")


COLOURS = {  # told apart by colour-blind people too (Okabe & Ito)
    "base": "#D55E00", "zero": "#999999", "random_noise": "#E69F00", "fitted_noise": "#56B4E9",
    "state_passing": "#0072B2", "tbtt": "#009E73",
}  # fmt: skip


def draw_position_wise(results, path, title):
    """The paper's figure: loss against position, a dotted line at T. results as for print_table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = next(iter(results.values()))["parts"]
    figure, axes = plt.subplots(1, len(parts), figsize=(4.5 * len(parts), 3.6), sharey=True, squeeze=False)
    for axis, part in zip(axes[0], parts, strict=True):
        for name, measured in results.items():
            edges = np.array(measured["edges"], dtype=float)
            middle = np.sqrt(np.maximum(edges[:-1], edges[1] / 2) * edges[1:])
            style = dict(color=COLOURS.get(name.split()[0]), marker="o", markersize=3)
            axis.plot(middle, measured["parts"][part]["loss"], label=name.replace("_", " "), **style)
        axis.axvline(measured["T"], linestyle=":", color="black", linewidth=1)
        axis.text(
            measured["T"],
            0.98,
            " training length T",
            transform=axis.get_xaxis_transform(),
            va="top",
            fontsize=8,
        )
        axis.set_xscale("log", base=2)
        axis.set_xlabel("position in the stream (tokens)")
        axis.set_title(f"{part}: {PART_MEANING[part]}", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss (nats per token)")
    axes[0][-1].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    write_atomically(path, functools.partial(figure.savefig, dpi=150, format="png"))
    plt.close(figure)


PART_MEANING = {
    "text": "held-out text never seen before", "echo": "the same passage again", "copy": "letters to repeat",
    "key": "the digits to repeat", "answer": "the answer and its stop",
}  # fmt: skip


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
    measured = lg.position_wise(model, task, corpus, T, rows=max(16, min(256, 12800 // T)))
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
    task = args.task or (init["settings"]["task"] if init else "echo")
    T = args.T or (init["settings"]["T"] if init else lg.TASKS[task][1])
    args.tokenizer = args.tokenizer or (init and init["settings"].get("tokenizer")) or "bytes"
    corpus = corpus or lg.load_corpus(args.data, args.tokenizer)
    for split in ("train", "val"):  # a text that is too short or a T that does not fit is found out here
        lg.TASKS[task][0](lg.Rows(corpus, split, 1, True, 0), T)
    make_folder(args.out)
    device = choose_device(args.device)
    say(f"corpus: {corpus.name}, {len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out")

    model_name = init["settings"].get("name", init["config"]["layer"]) if init else args.model
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


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)
