"""Train a recurrent language model from zero states, then cure it with an intervention on the initial state.

    python train.py --intervention state_passing

is the main job: it pre-trains the tiny base model on echo if there is none, post-trains it, and ends with a
table and a picture of the loss by position, before and after. Without --intervention it makes the base alone;
`--intervention zero` is the control, the same extra steps without a cure. Every run is one folder with
checkpoint.pt and metrics.jsonl; the last run of a command has the picture. A run that was stopped goes on
from its last checkpoint when it is started again in the same way. Several GPUs: torchrun --nproc-per-node N
train.py ..., each rank carries its own rows. Letters are those of lengthgen.py.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist

import eval as ev
import lengthgen as lg
from eval import print_once, rank

# ---- 1. Recipes ----

TINY_MODELS = {  # they learn echo on a laptop in minutes
    "mamba2": dict(d_model=96, n_layer=2, d_state=64, headdim=16),
    "mamba1": dict(d_model=96, n_layer=2, d_state=16),
    "gla": dict(d_model=96, n_layer=2, num_heads=2),
}
# hold: the share of the steps after which the learning rate begins to fall; 0 is the paper's schedule
PRETRAIN = dict(steps=1400, lr=3e-3, hold=0.0)
PRETRAIN_MIXED = dict(steps=1840, lr=5e-3, hold=0.85)  # with less, plain text hardly breaks
POSTTRAIN = dict(steps=500, lr=1e-3, hold=0.0, batch=64, zero_prob=0.5)
# Models above LARGE parameters take the paper's steps and tokens, and no zero starts. The paper does not give
# its learning rate; ours is the geometric mean of the peak of pre-training (6e-4 to 2e-4) and FINAL_LR.
LARGE = 50e6
POSTTRAIN_LARGE = dict(steps=500, lr=5e-5, hold=0.0, batch=8, zero_prob=0.0)
TOKENS_LARGE = 2**19  # tokens of a step, by accumulation
# the paper's
FINAL_LR = 1e-5
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.95)
CLIP = 1.0
SAVE_EVERY = 100  # steps

SETTINGS = (  # with data, ranks and init, what a run is: it goes on only where all of this is the same
    "model", "task", "T", "tokenizer", "batch", "accumulate", "seed", "compile", "intervention", "carry",
    "zero_prob", "noise_std", "steps", "lr", "hold",
)  # fmt: skip

# ---- 2. Arguments ----


def parse_arguments(argv):
    p = ev.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--intervention", choices=lg.INTERVENTIONS, help="the cure (none: train the base alone)")
    p.add_argument("--model", choices=TINY_MODELS, help="architecture of a new base (mamba2)")
    p.add_argument("--task", choices=lg.TASKS, help="what to train on (echo, or the task of --init)")
    p.add_argument("--data", nargs="+", metavar="PATH", help="text, .jsonl or a .bin (the standard library)")
    p.add_argument("--tokenizer", help="bytes, a tiktoken name or a tokenizer.json (bytes, or as --init)")
    p.add_argument("--T", type=int, help="training length in tokens (that of the task, or of --init)")
    p.add_argument("--init", metavar="NAME", help="start from this run, or a checkpoint on disk or the hub")
    p.add_argument("--steps", type=int, help="optimizer steps (base 1400, of mixed 1840; then 500)")
    p.add_argument("--lr", type=float, help="peak (base 3e-3, of mixed 5e-3; then 1e-3; official 5e-5)")
    p.add_argument("--batch", type=int, help="rows of a micro-batch on each rank (64; official sizes 8)")
    p.add_argument("--accumulate", type=int, help="micro-batches of a step (1; official sizes: 0.5M tokens)")
    p.add_argument("--carry", default="full", choices=["full", "scan"], help="the state that is handed over")
    p.add_argument("--zero-prob", type=float, help="share of rows from zeros (0.5; official sizes 0)")
    p.add_argument("--noise-std", type=float, default=1.0, help="standard deviation of random_noise")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="runs", help="folder of the runs")
    p.add_argument("--compile", action="store_true", help="torch.compile: a minute to start, then faster")
    p.add_argument("--device", choices=["cuda", "mps", "cpu"], help="where to compute (the first there is)")
    args = p.parse_args(argv)
    ev.check_arguments(args)
    if args.init is not None and not args.intervention:
        raise ValueError("--init needs an --intervention to go on with: zero for training as usual")
    for name in ("carry", "zero_prob", "noise_std"):
        if not args.intervention and getattr(args, name) != p.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} needs an --intervention, the base has none")
    return args


# ---- 3. Ranks, schedule, optimizer ----


def start_ranks(device):
    """Join the other ranks where torchrun started this program. Returns the number of ranks."""
    if "WORLD_SIZE" not in os.environ:
        return 1
    if not dist.is_initialized():
        backend = "gloo"  # for tensors on the CPU, and for checkpoints, which are gathered there
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend)
        print_once(f"ranks: {dist.get_world_size()}, each with its own rows and states")
    return dist.get_world_size()


def learning_rate(step, steps, peak, hold=0.0):
    """Warm-up over the first tenth of the steps, then a cosine down to FINAL_LR (the paper's schedule).

    hold: the share of the steps after which the cosine begins; until then the rate stays at its peak
    """
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    fall = max(warmup, int(hold * steps))  # the step from which the rate falls
    progress = max(0, step - fall) / max(1, steps - fall)
    final = min(FINAL_LR, peak)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model):
    """AdamW without weight decay on norms, biases, D, dt_bias and A_log."""
    decayed = dict(params=[], weight_decay=WEIGHT_DECAY)
    not_decayed = dict(params=[], weight_decay=0.0)
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1 and not name.endswith("A_log")
        group = decayed if is_matrix else not_decayed
        group["params"].append(parameter)
    fused = model.lm_head.weight.device.type != "mps"
    return torch.optim.AdamW([decayed, not_decayed], lr=0.0, betas=BETAS, fused=fused)


# ---- 4. Training ----


class Carried:
    """What one rank hands from step to step besides the weights: rows of text, states, statistics and noise.

    Each micro-batch of a step is a slot with rows and a state of its own, which starts from the final state
    of the same slot in the step before. So "the previous batch" means the whole batch, as in the paper.
    """

    def __init__(self, model, corpus, settings):
        _, rows_continue = lg.INTERVENTIONS[settings["intervention"]]
        seed = 1000 * settings["seed"] + rank()
        self.rows = []
        self.states = []  # the initial states of the next step
        for slot in range(settings["accumulate"]):
            self.rows.append(lg.Rows(corpus, "train", settings["batch"], rows_continue, seed + 10**6 * slot))
            self.states.append(model.zero_state(settings["batch"]))
        self.stats = lg.StateStatistics()
        self.noise_rng = torch.Generator(model.lm_head.weight.device).manual_seed(seed + 10**9)

    def state_dict(self):
        # on the CPU, because other ranks have no use of this rank's GPU
        rows = [slot.state_dict() for slot in self.rows]
        states = [lg.map_state(torch.Tensor.cpu, state) for state in self.states]
        stats = dict(vars(self.stats))
        for name in ("mean", "mean_square"):
            stats[name] = lg.map_state(torch.Tensor.cpu, stats[name])
        return dict(rows=rows, states=states, stats=stats, noise_rng=self.noise_rng.get_state())

    def load_state_dict(self, saved, step):
        for slot, saved_rows in zip(self.rows, saved["rows"], strict=True):
            slot.load_state_dict(saved_rows)
        self.noise_rng.set_state(saved["noise_rng"])
        self.stats.update(self.states[0])  # of zeros: statistics with the right layout
        self.stats.count = step * len(self.rows)
        fill(self.states, saved["states"], "states")
        fill(vars(self.stats), saved["stats"], "statistics")


def fill(fresh, saved, name):
    """Copy the tensors of a file into fresh ones, in nests of dictionaries and lists that must be alike."""
    if isinstance(fresh, torch.Tensor):
        assert saved.shape == fresh.shape, f"{name} has shape {list(saved.shape)}, not {list(fresh.shape)}"
        fresh.copy_(saved)
        assert fresh.isfinite().all(), f"{name} is not finite"
    elif isinstance(fresh, (dict, list, tuple)):
        assert len(saved) == len(fresh), f"{name} has {len(saved)} entries, not {len(fresh)}"
        for key in fresh if isinstance(fresh, dict) else range(len(fresh)):
            fill(fresh[key], saved[key], f"{name} {key}")


def train(model, corpus, settings, folder, device, signals):
    """Train the model in place as the settings say, writing to the folder; go on where an equal run stopped.

    A finished run is only loaded. A folder that holds another run is left alone: ValueError.
    signals: a list; a signal in it ends the program after the step in work, with a checkpoint
    """
    s = settings
    torch.manual_seed(s["seed"])
    task, _, _ = lg.TASKS[s["task"]]
    intervention, _ = lg.INTERVENTIONS[s["intervention"]]
    if s["intervention"] == "random_noise":
        intervention = functools.partial(intervention, std=s["noise_std"])
    optimizer = make_optimizer(model)
    carried = Carried(model, corpus, s)

    # go on from the last checkpoint of this run
    first_step, seconds_before = 0, 0.0
    if os.path.exists(os.path.join(folder, lg.CHECKPOINT)):
        first_step, seconds_before = load_run(folder, s, model, optimizer, carried)
        if first_step == s["steps"]:
            print_once(f"{folder}: found, all {first_step} steps")
            return
        print_once(f"{folder}: goes on at step {first_step}, where the same run was stopped")
    saved_step = first_step
    metrics_file = start_metrics(folder, first_step)
    started = time.time()

    forward = torch.compile(model) if s["compile"] else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    tokens_per_step = s["batch"] * s["T"] * s["accumulate"] * s["ranks"]
    for step in range(first_step + 1, s["steps"] + 1):
        # the gradient of the mean loss of all micro-batches, each from the state that its slot carries
        step_loss = torch.zeros((), device=device)
        for slot in range(s["accumulate"]):
            tokens, part = task(carried.rows[slot], s["T"])
            tokens = torch.from_numpy(tokens).to(device)
            part = torch.from_numpy(part).to(device)
            with autocast:
                logits, final_state = forward(tokens[:, :-1], carried.states[slot])
            loss = lg.masked_loss(logits, tokens[:, 1:], part) / s["accumulate"]
            loss.backward()
            step_loss += loss.detach()

            # the intervention: the state from which the next micro-batch of this slot starts
            carried.states[slot] = lg.next_initial_state(
                intervention, final_state, carried.stats, carried.noise_rng, s["zero_prob"], s["carry"]
            )

        # one optimizer step, with the mean of the gradients of all ranks
        for parameter in model.parameters():
            lg.mean_over_ranks(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        step_loss = lg.mean_over_ranks(step_loss).item()
        check_finite(step_loss + norm.item(), step, saved_step, folder, s)
        lr = learning_rate(step - 1, s["steps"], s["lr"], s["hold"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        # a line of metrics for every step, twenty lines on the screen
        seconds = seconds_before + time.time() - started
        metrics = dict(step=step, loss=step_loss, lr=lr, tokens=step * tokens_per_step, seconds=seconds)
        if rank() == 0:
            with open(metrics_file, "a") as f:
                f.write(json.dumps(metrics) + "\n")
        if step % max(1, s["steps"] // 20) == 0 or step == s["steps"]:
            speed = (step - first_step) / (seconds - seconds_before)  # steps a second
            left = ev.clock((s["steps"] - step) / speed)
            done = f"step {step:5}/{s['steps']}  {step / s['steps']:4.0%}  loss {step_loss:.3f}"
            print_once(f"  {done}  {speed * tokens_per_step:,.0f} tokens/s  {left} left")

        # a checkpoint, unless this step has ruined the weights: the loss above is of the weights before it
        stopped = lg.mean_over_ranks(torch.tensor(float(len(signals)), device=device)).item() > 0
        if step % SAVE_EVERY == 0 or step == s["steps"] or stopped:
            with torch.no_grad(), autocast:
                logits, _ = model(tokens[:, :-1])
            loss = lg.mean_over_ranks(lg.masked_loss(logits, tokens[:, 1:], part))
            check_finite(loss.item(), step, saved_step, folder, s)
            save_run(folder, s, model, optimizer, carried, step, seconds)
            saved_step = step
        if stopped:
            print_once(f"stopped after step {step}: the same command goes on from there")
            sys.exit(128 + max(signals, default=signal.SIGTERM))


@contextlib.contextmanager
def alone_in(folder):
    """Wait until no other process trains in the folder, and keep others out. Yields a list for the signals
    that ask to stop, which are collected there instead of ending the program."""
    ev.make_folder(folder)
    with contextlib.ExitStack() as at_the_end:
        if rank() == 0 and os.name == "posix":  # Windows has no such locks
            import fcntl

            lock = os.open(folder, os.O_RDONLY)
            at_the_end.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder}: another process trains here, waiting until it has finished", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        if dist.is_initialized():
            dist.barrier()  # the other ranks wait for the first one
        signals = []
        for number in (signal.SIGINT, signal.SIGTERM):
            former = signal.signal(number, lambda number, _: signals.append(number))
            at_the_end.callback(signal.signal, number, former)
        yield signals


def check_finite(value, step, saved_step, folder, settings):
    """Stop a run whose loss or gradient is no number any more. All ranks see the same value."""
    if not math.isfinite(value):
        kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "nothing was saved yet"
        raise FloatingPointError(
            f"the loss or its gradient became {value} in step {step}, {kept} in {folder}: "
            f"try a smaller --lr than {settings['lr']} or another --seed"
        )


def start_metrics(folder, first_step):
    """The path of metrics.jsonl, which keeps its lines up to first_step, unless a power cut has torn them."""
    file = os.path.join(folder, "metrics.jsonl")
    kept = []
    if os.path.exists(file):
        with open(file, errors="replace") as f:
            for line in f:
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    if json.loads(line)["step"] <= first_step:
                        kept.append(line)
    if rank() == 0:
        lg.write_text(file, "".join(kept))
    return file


def save_run(folder, settings, model, optimizer, carried, step, seconds):
    """Write, in one step, everything that a run of one or several ranks needs to go on."""
    this_rank = carried.state_dict()
    ranks = [this_rank]
    if dist.is_initialized():
        ranks = [None] * settings["ranks"]
        dist.all_gather_object(ranks, this_rank)
    checkpoint = dict(config=asdict(model.config), settings=settings, step=step, seconds=seconds, ranks=ranks)
    checkpoint.update(model=model.state_dict(), optimizer=optimizer.state_dict(), versions=ev.versions())
    if rank() == 0:
        lg.write_atomically(os.path.join(folder, lg.CHECKPOINT), functools.partial(torch.save, checkpoint))


@torch.no_grad()
def load_run(folder, settings, model, optimizer, carried):
    """Load what save_run wrote into model, optimizer and carried. Returns its step and its seconds."""
    saved = lg.load_checkpoint(folder)
    check_settings(saved, settings, folder)
    with lg.reading(folder, "a run of train.py"):
        step, seconds = saved["step"], saved["seconds"]
        is_step = type(step) is int and 0 < step <= settings["steps"]
        assert is_step and 0 <= seconds < 1e9, f"it claims to be at step {step} after {seconds} seconds"
        model.load_state_dict(saved["model"])
        if step < settings["steps"]:  # a finished run, perhaps of another device, needs its weights alone
            # a step of length 0 makes the moments of the optimizer, which are then filled
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            fill(optimizer.state_dict()["state"], saved["optimizer"]["state"], "moments")
            carried.load_state_dict(saved["ranks"][rank()], step)
    return step, float(seconds)


# ---- 5. The base, post-training, main ----


def set_missing(args, **values):
    """Give these values to the arguments that the command line leaves open."""
    for name, value in values.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def fill_in(args, init):
    """Fill in what the command line leaves open, from the checkpoint of --init, then from the recipes."""
    args.large = False
    if init:
        layer = init["config"]["layer"]
        if args.model not in (None, layer):
            raise ValueError(f"{args.init} is a {layer}, no {args.model}: leave --model out")
        settings = init["settings"]
        args.model = settings.get("model", layer)  # its name in the folders of runs
        set_missing(args, task=settings["task"], T=settings["T"], tokenizer=settings.get("tokenizer"))
        sizes = {x.data_ptr(): x.numel() for x in init["model"].values()}  # tied weights are in one place
        args.large = sum(sizes.values()) > LARGE
    set_missing(args, model="mamba2", task="echo", tokenizer="bytes")
    set_missing(args, T=lg.TASKS[args.task][1])

    args.pretrain = PRETRAIN_MIXED if args.task == "mixed" else PRETRAIN
    if not args.intervention:  # the command line is about the base alone
        set_missing(args, **args.pretrain)
    set_missing(args, **(POSTTRAIN_LARGE if args.large else POSTTRAIN))  # of the base: the batch alone
    step_of_one = args.batch * args.T * int(os.environ.get("WORLD_SIZE", 1))  # tokens without accumulation
    set_missing(args, accumulate=math.ceil(TOKENS_LARGE / step_of_one) if args.large else 1)


def get_base(args, init, folder, corpus, settings, device):
    """The base model: of --init, or of a finished run in the folder, or trained there from zero states."""
    settings = settings | dict(intervention="zero", carry="full", zero_prob=0.0, noise_std=0.0)
    keys = ["task", "T", "data"]  # settings that a finished base must share
    if args.intervention:  # then steps, lr and hold of the arguments are those of post-training
        settings |= args.pretrain
    else:
        keys += ["steps", "lr", "batch", "accumulate"]
    checkpoint = init or ev.finished(folder)
    if checkpoint is None:
        print_once(f"base: none in {folder}, so it is trained first, from zero states")
        torch.manual_seed(args.seed)
        config = lg.ModelConfig(layer=args.model, vocab_size=corpus.vocab_size, **TINY_MODELS[args.model])
        model = lg.LanguageModel(config).to(device)
        with alone_in(folder) as signals:
            train(model, corpus, settings, folder, device, signals)
        return model

    name = args.init or folder
    if not init:
        check_settings(checkpoint, {key: settings[key] for key in keys}, folder)
    model = lg.model_from_checkpoint(checkpoint).to(device)
    ev.check_vocabulary(model, corpus, name)
    print_once(f"base: {name}")
    if args.large:
        model.config.recompute = True
        print_once("memory: each layer is computed again in the backward pass, its activations would not fit")
    return model


def check_settings(checkpoint, settings, folder):
    """Raise ValueError unless a checkpoint has these settings: its folder is not written over."""
    for key, value in settings.items():
        found = checkpoint["settings"].get(key)
        if found != value:
            held = f"{folder} holds a run with {key} {found!r}, not {value!r}"
            raise ValueError(f"{held}: choose another --out or remove it")


def measure(model, args, corpus):
    """The loss by position of a model, on fewer streams where they are longer."""
    B = max(16, min(256, 12800 // args.T))
    return lg.position_wise(model, args.task, corpus, args.T, B, progress=ev.Progress())


def main(argv=None):
    """Run one command line of train.py; ValueError if it is wrong."""
    started = time.time()
    args = parse_arguments(argv)
    init = lg.load_checkpoint(args.init) if args.init else None
    fill_in(args, init)
    vocab_size = init["config"]["vocab_size"] if init else None
    corpus = lg.load_corpus(args.data, args.tokenizer, vocab_size)
    for split in ("train", "val"):  # a text that is too short, or a T that does not fit, is found out here
        lg.TASKS[args.task][0](lg.Rows(corpus, split, 1, True, 0), args.T)
    ev.make_folder(args.out)
    device = ev.choose_device(args.device)
    counts = f"{len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out"
    print_once(f"corpus: {corpus.name}, {counts}")
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings.update(data=corpus.name, ranks=start_ranks(device))

    # the base, from zero states
    folder = ev.run_folder(args.out, args.model, args.task, "base", args.seed)
    model = get_base(args, init, folder, corpus, settings, device)
    results = {"base": measure(model, args, corpus)}

    # the intervention
    if args.intervention:
        settings["init"] = args.init or folder
        label = f"{args.intervention}-scan" if args.carry == "scan" else args.intervention
        folder = ev.run_folder(args.out, args.model, args.task, label, args.seed)
        print_once(f"post-training: {', '.join(f'{name} {value}' for name, value in settings.items())}")
        with alone_in(folder) as signals:
            train(model, corpus, settings, folder, device, signals)
        results[label] = measure(model, args, corpus)

    # the table, a verdict, the picture, and what to try next
    if rank() == 0:
        title = f"{args.model} on {args.task}, trained on T = {args.T} tokens"
        ev.report(results, os.path.join(folder, "position_wise.png"), title)
        print(f"{ev.clock(time.time() - started)} minutes in all")
        if not args.intervention:
            print("next: the same command with --intervention state_passing")
        elif args.init is None and args.task == "echo" and not args.data:
            options = f"--model {args.model} --out {shlex.quote(args.out)}"
            print(f"next, all interventions: python eval.py reproduce interventions {options}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    ev.run_command(main)
