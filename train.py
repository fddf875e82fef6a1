"""Train a recurrent language model from zero states, then post-train it from other initial states.

    python train.py --intervention state_passing

is the main job: it pre-trains a tiny base model on the task echo, unless there is one. This base fails past
its training length T. The job then post-trains it with the intervention, and ends with a table, a verdict and
a picture of the loss by position, before and after. Without --intervention it makes the base alone.
`--intervention zero` is the control, the same extra steps without a cure. Every run is one folder with
checkpoint.pt, metrics.jsonl and what was measured of it. A run that was stopped goes on from its last
checkpoint when it is started again in the same way. Several GPUs: torchrun --nproc-per-node N train.py ...;
each rank then trains on its own rows. lengthgen.py explains the letters.
"""

import argparse
import ast
import contextlib
import datetime
import functools
import inspect
import json
import math
import os
import platform
import signal
import sys
import textwrap
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from matplotlib.figure import Figure

import kernels
import lengthgen as lg

# ---- 1. Recipes ----

TINY_MODELS = {  # they learn echo on a laptop in minutes
    "mamba2": dict(d_model=96, n_layer=2, d_state=64, headdim=16),
    "mamba1": dict(d_model=96, n_layer=2, d_state=16),
    "gla": dict(d_model=96, n_layer=2, num_heads=2),
    "gdn": dict(d_model=96, n_layer=2, num_heads=4, headdim=32, expand_v=1.5),
}
# Settings for what the command line leaves out. hold: the share of the steps after which the learning rate
# begins to fall (0 is the paper's schedule); zero_prob: the share of the rows that start from zeros
RECIPES = {
    "base": dict(steps=1400, lr=3e-3, hold=0.0, batch=64, zero_prob=0.0),
    # with the steps, lr and hold of "base" a base on mixed would hardly fail past T
    "base of mixed": dict(steps=1840, lr=5e-3, hold=0.85, batch=64, zero_prob=0.0),
    "cure": dict(steps=500, lr=1e-3, hold=0.0, batch=64, zero_prob=0.5),
    # the paper's steps; its zero_prob is our guess; for lr and accumulate see LARGE_LR and LARGE_TOKENS
    "cure of a large model": dict(steps=500, lr=None, hold=0.0, batch=8, zero_prob=0.1),
}
DEFAULTS = dict(accumulate=1, intervention="zero", carry="full", noise_std=1.0)  # of every recipe
LARGE = 50e6  # a model with more parameters is large
# {largest number of parameters: learning rate}; the rate is a tenth of the paper's in pre-training
LARGE_LR = {2e8: 6e-5, 5e8: 3e-5, 1e9: 2.5e-5, 2e9: 2e-5, math.inf: 1.6e-5}
LARGE_TOKENS = 2**19  # tokens of a step; micro-batches are accumulated until it has them
# the next four are the paper's
FINAL_LR = 1e-5
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.95)
CLIP = 1.0
SAVE_EVERY = 100  # steps

# ---- 2. Arguments ----


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, as all other errors of the command line."""

    def error(self, message):
        raise ValueError(message)


def between(kind, lowest, highest):
    """A type of arguments: an int or a float from `lowest` to `highest`."""

    def parse(text):
        value = kind(text)
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"must lie between {lowest} and {highest}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value" if kind(text) fails
    return parse


positive_type = between(int, 1, 10**8)
seed_type = between(int, 0, 2**32 - 1)
share_type = between(float, 0, 1)
rate_type = between(float, 1e-30, 1e38)  # in the range of float32
not_negative_type = between(float, 0, 1e6)


def parse_arguments(argv):
    """The arguments. The help has the defaults of bases, cures and large models in brackets."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--intervention", choices=lg.INTERVENTIONS, help="the cure (none: train the base alone)")
    p.add_argument("--model", choices=TINY_MODELS, help="architecture of a new base (mamba2)")
    p.add_argument("--task", choices=lg.TASKS, help="what to train on (echo, or the task of --init)")
    p.add_argument("--data", nargs="+", metavar="PATH", help="text, .jsonl or .bin (the standard library)")
    p.add_argument("--tokenizer", help="bytes, a tiktoken name or a tokenizer.json (bytes, or as --init)")
    p.add_argument("--T", type=positive_type, help="training length in tokens (of the task, or of --init)")
    p.add_argument("--init", metavar="NAME", help="start from this run, or a checkpoint on disk or the hub")
    p.add_argument("--steps", type=positive_type, help="optimizer steps (1400; base of mixed 1840; cure 500)")
    p.add_argument("--lr", type=rate_type, help="peak (3e-3; base of mixed 5e-3; cure 1e-3; large: by size)")
    p.add_argument("--batch", type=positive_type, help="rows of a micro-batch on each rank (64; large: 8)")
    p.add_argument("--accumulate", type=positive_type, help="micro-batches of a step (1; large: by tokens)")
    p.add_argument("--carry", choices=["full", "scan"], help="the state that is handed over (full)")
    p.add_argument("--zero-prob", type=share_type, help="share of rows from zeros (0.5; large: 0.1)")
    p.add_argument("--noise-std", type=not_negative_type, help="standard deviation of random_noise (1)")
    p.add_argument("--seed", type=seed_type, default=0, help="of weights, text and noise")
    p.add_argument("--out", default="runs", help="folder of the runs")
    p.add_argument("--compile", action="store_true", help="torch.compile: a minute to start, then faster")
    p.add_argument("--device", choices=["cuda", "mps", "cpu"], help="where to compute (GPU if there is one)")
    args = p.parse_args(argv)

    # refuse options that would have no effect
    for option in ("init", "carry", "zero_prob", "noise_std"):
        if not args.intervention and getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} needs an --intervention to go on with: zero for training as usual")
    return args


# ---- 3. Device, schedule, optimizer ----

RANK = int(os.environ.get("RANK", 0))  # of this process among those that torchrun started
RANKS = int(os.environ.get("WORLD_SIZE", 1))


def print_rank0(message):
    """Print on the first rank of a distributed run only."""
    if RANK == 0:
        print(message, flush=True)


print_once = functools.cache(print_rank0)  # a second call with the same message does nothing


def choose_device(wanted):
    """The torch.device of --device, or the best there is; prints which one and why."""
    device = torch.device(wanted or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if device.type == "cuda":  # several ranks have a GPU each
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device} cannot be used here: {error}".splitlines()[0]) from None
    reason = "asked for" if wanted else "the best there is"
    print_rank0(f"device: {device}, {reason}, {torch.get_num_threads()} CPU threads, {RANKS} ranks")
    return device


def join_ranks(device):
    """Connect to the other processes if torchrun has started this one."""
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "gloo"
        if device.type == "cuda":  # gloo gathers checkpoints on the CPU, nccl averages gradients on the GPU
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        # the other ranks wait while the first one measures, or waits for another program
        dist.init_process_group(backend, timeout=datetime.timedelta(days=7))


def tell_scan(model):
    """Print which scan of kernels.py the model uses, and why."""
    layer, device = model.layers[0].mixer, model.lm_head.weight.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # in training
    backend, reason = kernels.choose_backend(device, dtype, layer.K, layer.V, layer.HAS_BETA)
    if model.config.backend:
        backend, reason = model.config.backend, "asked for"
    print_once(f"scan: {backend}, {reason}")


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
    for weight_name, weight in model.named_parameters():
        is_matrix = weight.dim() > 1 and not weight_name.endswith("A_log")
        group = decayed if is_matrix else not_decayed
        group["params"].append(weight)
    fused = model.lm_head.weight.device.type != "mps"
    return torch.optim.AdamW([decayed, not_decayed], lr=0.0, betas=BETAS, fused=fused)


# ---- 4. Training ----


class Carried:
    """What one rank hands from step to step besides the weights: texts, states, statistics, random generator.

    Each micro-batch of a step is a slot with rows and a state of its own, which starts from the final state
    of the same slot in the step before, not from the micro-batch before. So with accumulation, too, "the
    previous batch" is a whole batch, as in the paper.
    """

    def __init__(self, model, corpus, settings):
        _, rows_continue = lg.INTERVENTIONS[settings.intervention]
        seed = 1000 * settings.seed + RANK  # other numbers for each seed, rank and slot, and for the rng
        self.rows = []
        self.states = []  # the initial states of the next step
        for slot in range(settings.accumulate):
            self.rows.append(lg.Rows(corpus, "train", settings.batch, rows_continue, seed + 10**6 * slot))
            self.states.append(model.zero_state(settings.batch))
        self.stats = lg.StateStatistics()
        self.rng = torch.Generator(model.lm_head.weight.device).manual_seed(seed + 10**9)  # of interventions

    def state_dict(self):
        """All of it as plain dictionaries, lists, tuples and tensors on the CPU."""
        rows = [dict(rng=x.rng.get_state(), at=x.at) for x in self.rows]
        states = [to_plain(state) for state in self.states]
        mean, mean_square = to_plain(self.stats.mean), to_plain(self.stats.mean_square)
        stats = dict(count=self.stats.count, mean=mean, mean_square=mean_square)
        return dict(rows=rows, states=states, stats=stats, noise_rng=self.rng.get_state())

    def load_state_dict(self, saved, device):
        for rows, saved_rows in zip(self.rows, saved["rows"], strict=True):
            rows.rng.set_state(saved_rows["rng"])
            rows.at = saved_rows["at"]
        self.states = [from_plain(state, device) for state in saved["states"]]
        self.stats.count = saved["stats"]["count"]
        self.stats.mean = from_plain(saved["stats"]["mean"], device)
        self.stats.mean_square = from_plain(saved["stats"]["mean_square"], device)
        self.rng.set_state(saved["noise_rng"])


def to_plain(state):
    """A state, or None, as tuples of tensors on the CPU, which torch.load opens without this program."""
    if state is None:
        return None
    return [tuple(layer) for layer in lg.map_state(torch.Tensor.cpu, state)]


def from_plain(saved, device):
    """Undo to_plain: the state, or None, on a device."""
    if saved is None:
        return None
    return lg.map_state(lambda x: x.to(device), [lg.LayerState(*layer) for layer in saved])


def train(model, corpus, settings, folder, device, signals, compile=False):
    """Train the model in place by the settings, writing to the folder; go on where an equal run stopped.

    A finished run is only loaded. A folder that holds another run is left alone: ValueError.
    signals: a list; once it is not empty, training saves a checkpoint after the current step and exits
    """
    torch.manual_seed(settings.seed)
    task_function, _, _, share = lg.TASKS[settings.task]
    intervention, _ = lg.INTERVENTIONS[settings.intervention]
    if settings.intervention == "random_noise":
        intervention = functools.partial(intervention, std=settings.noise_std)
    run = describe_run(settings, model, corpus)
    optimizer = make_optimizer(model)
    carried = Carried(model, corpus, settings)

    # go on from the last checkpoint of this run, with the metrics of its steps
    steps_done, seconds_before = 0, 0.0
    if os.path.exists(os.path.join(folder, lg.CHECKPOINT)):
        steps_done, seconds_before = load_run(folder, run, model, optimizer, carried)
        if steps_done == settings.steps:
            print_rank0(f"{folder}: found, all {settings.steps} steps")
            return
        print_rank0(f"{folder}: goes on after step {steps_done}, where the same run was stopped")
    saved_step = steps_done
    metrics_file = Path(folder, "metrics.jsonl")
    if RANK == 0:  # one line for each step; drop the lines of steps after the checkpoint
        metrics_file.touch()
        lines = metrics_file.read_text(errors="replace").splitlines(keepends=True)
        lg.write_text(metrics_file, "".join(lines[:steps_done]))
    started = time.time()

    forward = torch.compile(model) if compile else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    tokens_per_step = settings.batch * settings.T * settings.accumulate * settings.ranks
    for step in range(steps_done + 1, settings.steps + 1):
        # the gradient of the mean loss of all micro-batches, each from the state that its slot carries
        step_loss = torch.zeros((), device=device)
        for slot in range(settings.accumulate):
            # (B, T+1) and (B, T); a target whose part is 0 is not trained on
            tokens, part = task_function(carried.rows[slot], settings.T)
            tokens = torch.from_numpy(tokens).to(device)
            part = torch.from_numpy(part).to(device)
            with autocast:
                logits, final_state = forward(tokens[:, :-1], carried.states[slot])
            loss = lg.masked_loss(logits, tokens[:, 1:], part, share) / settings.accumulate
            loss.backward()
            step_loss += loss.detach()

            # the intervention: the state from which the next micro-batch of this slot starts
            carried.states[slot] = lg.next_initial_state(
                intervention, final_state, carried.stats, carried.rng, settings.zero_prob, settings.carry
            )

        # one optimizer step, with the mean of the gradients of all ranks
        for parameter in model.parameters():
            lg.mean_over_ranks(parameter.grad)  # in place
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        step_loss = lg.mean_over_ranks(step_loss).item()
        if not math.isfinite(step_loss + norm.item()):
            kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "nothing was saved yet"
            problem = f"loss {step_loss}, gradient {norm.item()} in step {step}, {kept} in {folder}"
            raise FloatingPointError(f"{problem}: try a smaller --lr than {settings.lr} or another --seed")
        lr = learning_rate(step - 1, settings.steps, settings.lr, settings.hold)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        # a line of metrics for every step, twenty lines on the screen
        seconds = seconds_before + time.time() - started
        line = dict(step=step, loss=step_loss, lr=lr, tokens=step * tokens_per_step, seconds=seconds)
        if RANK == 0:
            with open(metrics_file, "a") as f:
                f.write(json.dumps(line) + "\n")
        if step % max(1, settings.steps // 20) == 0 or step == settings.steps:
            speed = (step - steps_done) / (seconds - seconds_before)  # steps a second
            left = clock((settings.steps - step) / speed)
            done = f"step {step:5}/{settings.steps}  {step / settings.steps:4.0%}  loss {step_loss:.3f}"
            print_rank0(f"  {done}  {speed * tokens_per_step:,.0f} tokens/s  {left} left")

        # a checkpoint; all ranks stop after the same step, even if the signal reached one of them only
        stopped = lg.mean_over_ranks(torch.tensor(float(len(signals)), device=device)).item() > 0
        if step % SAVE_EVERY == 0 or step == settings.steps or stopped:
            save_run(folder, run, model, optimizer, carried, step, seconds)
            saved_step = step
        if stopped:
            print_rank0(f"stopped after step {step}: the same command goes on from there")
            # 128 + signal, as shells report it; SIGTERM if only another rank got a signal
            sys.exit(128 + max(signals, default=signal.SIGTERM))


def alone_in(folder):
    """Wait until no other process trains in the folder. Returns a context that keeps others out."""
    os.makedirs(folder, exist_ok=True)
    alone = contextlib.nullcontext()
    # the first rank waits here for other programs, the other ranks at the barrier for the first one
    if RANK == 0:
        lock = FileLock(os.path.join(folder, "lock"))
        try:
            alone = lock.acquire(timeout=0)
        except Timeout:
            print(f"{folder}: another process trains here, waiting until it has finished", flush=True)
            alone = lock.acquire()
    if dist.is_initialized():
        dist.barrier()
    return alone


@contextlib.contextmanager
def catch_signals():
    """Yield a list that collects SIGINT and SIGTERM, instead of ending the program at the first one."""
    signals = []

    def remember(number, _):
        if signals:
            sys.exit(128 + number)
        signals.append(number)

    # signal.signal returns the former handler
    former = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def save_run(folder, run, model, optimizer, carried, step, seconds):
    """Write everything that a run of one or several ranks needs to go on."""
    # what every rank carries; at first each rank knows only its own
    all_ranks = [None] * RANKS
    all_ranks[RANK] = carried.state_dict()
    if dist.is_initialized():
        dist.all_gather_object(all_ranks, all_ranks[RANK])
    checkpoint = dict(run, step=step, seconds=seconds, carried=all_ranks, versions=VERSIONS)
    checkpoint.update(model=model.state_dict(), optimizer=optimizer.state_dict())
    if RANK == 0:
        lg.write_atomically(os.path.join(folder, lg.CHECKPOINT), functools.partial(torch.save, checkpoint))
    if dist.is_initialized():
        dist.barrier()  # so that no rank looks for the file before it is there


def load_run(folder, run, model, optimizer, carried):
    """Load what save_run wrote into model, optimizer and carried. Returns its step and its seconds."""
    saved = lg.load_checkpoint(folder)
    check_same_run(saved, run, folder)
    with lg.reading(folder, "a run of train.py"):  # any error in here becomes a ValueError of one sentence
        step, seconds = saved["step"], saved["seconds"]
        assert 0 < step <= run["settings"]["steps"], f"it claims to be at step {step}"
        model.load_state_dict(saved["model"])
        if step == run["settings"]["steps"]:  # a finished run, of which only the weights are needed
            return step, seconds
        # only the moments; the settings of the optimizer are those of make_optimizer
        optimizer.load_state_dict(dict(optimizer.state_dict(), state=saved["optimizer"]["state"]))
        for weight_name, weight in model.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                x = optimizer.state[weight][moment]
                assert x.shape == weight.shape and x.isfinite().all(), f"{moment} of {weight_name} is damaged"
        carried.load_state_dict(saved["carried"][RANK], model.lm_head.weight.device)
    return step, seconds


# ---- 5. What a run is ----
# A run is its settings, the sizes of its model, its text, the weights that it starts from, and the source of
# what it runs. Training goes on in a folder, or takes it as finished, only if all of these are the same.

# not compared: what has a checksum of its own, and settings and constants that change no result
NOT_COMPARED = ("tokenizer", "data", "init", "backend", "recompute", "RANK", "INTERPRETED", "SAVE_EVERY")
INITIAL_WEIGHTS = "set of initial weights"  # the key of their checksum; messages say "made by another ..."
VERSIONS = dict(python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__)

# the code of all runs, and of all models; a run also has that of its task, intervention and layer
TRAINING = (train, Carried, learning_rate, make_optimizer)
MODEL = (lg.LanguageModel.__init__, lg.LanguageModel.forward, *kernels.BACKENDS.values())


def describe_run(settings, model, corpus):
    """What identifies a run, before its first step: settings, config, and checksums of the rest."""
    task_function, _, _, share = lg.TASKS[settings.task]
    intervention, _ = lg.INTERVENTIONS[settings.intervention]
    made_from = sources(*TRAINING, *MODEL, lg.LAYERS[model.config.layer], task_function, intervention)
    made_from["share of the loss on all targets"] = share
    made_from["text"] = corpus.checksum
    made_from[INITIAL_WEIGHTS] = checksum(model)
    return dict(settings=vars(settings), config=asdict(model.config), made_from=made_from)


def check_same_run(saved, run, folder):
    """Raise ValueError, naming what differs, unless a checkpoint is of this very run."""
    differs = []
    for kind in ("settings", "config"):
        for key, value in run[kind].items():
            found = saved[kind].get(key)
            if found != value and key not in NOT_COMPARED:
                differs.append(f"with {key} {found!r}, not {value!r}")
    for key, value in run["made_from"].items():
        if saved["made_from"].get(key) != value and key not in NOT_COMPARED:
            differs.append(f"made by another {key}")
    if differs:
        advice = "remove the folder, choose another --out, or start from it with --init"
        raise ValueError(f"{folder} holds a run {', '.join(differs)}: {advice}")


def checksum(model):
    """A number that tells the weights of a model from others."""
    crc = 0
    for weight in model.parameters():
        crc = zlib.crc32(weight.detach().cpu().contiguous().numpy(), crc)
    return crc


def sources(*roots, modules=("kernels", "lengthgen")):
    """{name: checksum} of functions and classes, and of all that their sources name, followed recursively.

    Only functions and classes of the given modules are followed; numbers, texts and tuples are only summed.
    """
    found = {}
    waiting = list(roots)
    while waiting:
        item = waiting.pop()
        if isinstance(item, functools.partial):  # an intervention that you add may be one
            found["arguments"] = zlib.crc32(repr((item.args, item.keywords)).encode())
            item = item.func
        if item.__qualname__ in found:
            continue
        found[item.__qualname__], names = read_source(item)

        # what the names in it stand for: functions and classes, which are read in turn, and constants
        namespace = vars(sys.modules[item.__module__])
        for name in names:
            first, _, attribute = name.partition(".")
            value = namespace.get(first)
            if attribute:
                value = getattr(value, attribute, None)
            value = getattr(value, "fn", value)  # the function of a Triton kernel
            is_code = inspect.isfunction(value) or inspect.isclass(value)
            is_namedtuple = hasattr(value, "_fields")  # a Tokenizer, whose repr has addresses in it
            if is_code and value.__module__ in modules:
                waiting.append(value)
            elif isinstance(value, (int, float, str, tuple)) and not is_namedtuple:
                found[name] = zlib.crc32(repr(value).encode())
    return found


@functools.cache
def read_source(item):
    """The checksum of the source of a function or class, and the names in it, like "scan" or "lg.Rows".

    Names like "self.K", which stand for nothing in the module, are among them. Cached, because the file may
    be edited while this process still runs the old code.
    """
    source = inspect.getsource(item)
    names = set()
    with contextlib.suppress(SyntaxError):  # of a lambda, whose source is a piece of a statement
        for node in ast.walk(ast.parse(textwrap.dedent(source))):
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names.add(f"{node.value.id}.{node.attr}")
    return zlib.crc32(source.encode()), sorted(names)


# ---- 6. Measuring, the table and the picture ----


def load_or_measure(folder, measure, model, corpus, T, task):
    """measure(model, corpus, T, task), or what the folder keeps of it if model, text and code are the same.

    A measurement is a dictionary: xlabel, ylabel, the places x, and values, {title: a list, one for each x}.
    Only the first rank measures; the others get None.
    """
    if RANK > 0:
        return None
    task_function = lg.TASKS[task][0]
    modules = ("kernels", "lengthgen", "train", measure.__module__)  # a measurement depends on all of them
    made_from = sources(measure, task_function, *MODEL, lg.LAYERS[model.config.layer], modules=modules)
    made_from.update(weights=checksum(model), text=corpus.checksum, T=T, task=task)
    file = Path(folder, f"{measure.__name__}.json")
    if file.exists():
        with lg.reading(file, "a measurement; remove the file to measure again"):
            saved = json.loads(file.read_text())
            measurement = saved["measurement"]
            assert {"xlabel", "ylabel", "x", "values"} == measurement.keys(), "it is damaged"
            if saved["made_from"] == made_from:
                return measurement
    print(f"  measuring {measure.__name__} of {folder} ...", flush=True)
    measurement = measure(model, corpus, T, task)
    saved = dict(measurement=measurement, made_from=made_from, versions=VERSIONS)
    lg.write_text(file, json.dumps(saved, indent=1))
    return measurement


def loss_by_position(model, corpus, T, task, B=None, windows=64):
    """The loss by position of B streams, each at most windows * T tokens long.

    B None: 12800 / T of them, but at least 16 and at most 256
    """
    if B is None:
        B = max(16, min(256, 12800 // T))
    values = lg.position_wise(model, task, corpus, T, B, windows=windows, progress=Progress())
    x = values.pop("x")
    if x[-1] < windows:
        print(f"the streams end at {x[-1]} T, not {windows} T: {len(corpus.val):,} tokens are held out")
    return dict(xlabel="position (T)", ylabel="loss (nats per token)", x=x, values=values)


class Progress:
    """progress(share) prints the share that is done and the time left, every ten seconds.

    The first time it prints at once if more than a minute is left.
    """

    def __init__(self):
        self.started = time.time()
        self.printed = self.started  # when it printed last; until the first time, the same as started

    def __call__(self, done):
        now = time.time()
        left = (now - self.started) * (1 - done) / done
        is_first = self.printed == self.started
        if now - self.printed > 10 or (is_first and left > 60):
            self.printed = now
            print(f"  {done:4.0%}  {clock(left)} left", flush=True)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


STYLES = {  # label of a run: its name, a colour that colour-blind people tell apart (Okabe & Ito), its line
    "base": ("base", "#D55E00", "-"),
    "zero": ("control", "#999999", "-"),
    "random_noise": ("random noise", "#E69F00", "--"),
    "fitted_noise": ("fitted noise", "#56B4E9", "--"),
    "tbtt": ("TBTT", "#009E73", "--"),
    "state_passing": ("state passing", "#0072B2", "--"),
    "state_passing-scan": ("state passing, scan alone", "#0072B2", ":"),
}


def style_of(label):
    """The name of a run in tables and legends, its colour (None: matplotlib's next one) and its line."""
    return STYLES.get(label, (label.replace("_", " "), None, "--"))


def panels_of(found, seeds=1):
    """The panels of a picture and of the table. found: {label of a run: its measurements, one per seed}

    A panel has a title, labels of the axes, how many seeds were asked for, and curves: {label: (places x,
    values (seeds, n))}.
    """
    panels = {}  # by title
    for label, measurements in found.items():
        first = measurements[0]
        for title in first["values"]:
            values = [measurement["values"][title] for measurement in measurements]
            if title not in panels:
                axes = dict(xlabel=first["xlabel"], ylabel=first["ylabel"])
                panels[title] = dict(title=title, **axes, seeds=seeds, curves={})
            panels[title]["curves"][label] = (first["x"], values)
    return list(panels.values())


def name_of(label, panel):
    """The name of a curve in tables and legends, with the number of its seeds if some are missing."""
    name, _, _ = style_of(label)
    _, values = panel["curves"][label]
    if len(values) < panel["seeds"]:
        name += f" ({len(values)} of {panel['seeds']} seeds)"
    return name


def print_table(panels):
    """Print every number that the panels draw: the mean over seeds, and highest minus lowest."""
    for panel in panels:
        print(f"\n{panel['title']}: {panel['ylabel']} by {panel['xlabel']}")
        printed_x = None
        for label, (x, values) in panel["curves"].items():
            if x != printed_x:
                print_row("", x, ".3g")
                printed_x = x
            print_row(name_of(label, panel), np.mean(values, 0), ".3f")
            if len(values) > 1:
                print_row("  highest - lowest", np.ptp(values, 0), ".3f")


def print_row(first, values, form):
    print(f"{first:25} " + "".join(f"{value:7{form}}" for value in values), flush=True)


def print_verdict(panels):
    """Say whether each curve of losses that goes past T stays as low there as before T."""
    print()
    losses = [panel for panel in panels if "loss" in panel["ylabel"]]
    for panel in losses:
        for label, (x, values) in panel["curves"].items():
            loss = np.mean(values, 0)
            in_T = x.index(1)  # the range of positions that ends at T
            beyond = [value for value in loss[in_T + 1 :] if not math.isnan(value)]
            worst = max(beyond, default=math.nan) - loss[in_T]
            if math.isnan(worst):
                continue
            if worst < 0.1:
                verdict = f"holds to {x[-1]:g} T"
            elif worst < 0.5:
                verdict = "gets worse past T"
            else:
                verdict = "breaks past T"
            summary = f"{panel['title']} loss {loss[in_T]:.2f} in T, at worst {worst:+.2f} beyond"
            print(f"{name_of(label, panel)}: {summary}: {verdict}")


def draw(panels, path, title):
    """Draw panels side by side into one PNG: the mean over seeds, shaded from the lowest to the highest.

    The legend at the right names every curve of the picture once.
    """
    # 3 and 5 panels stand three in a row, others in pairs, as text and echo of one architecture do
    columns = 3 if len(panels) in (3, 5) else min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.4 * columns + 1.6, 3.1 * rows), layout="constrained")
    lines = {}  # the curves by name
    colours = {}  # by label
    first_axis = {}  # by ylabel; later panels with the same ylabel share its range
    for i, panel in enumerate(panels):
        axis = figure.add_subplot(rows, columns, i + 1, sharey=first_axis.get(panel["ylabel"]))
        first_axis.setdefault(panel["ylabel"], axis)
        for label, (x, values) in panel["curves"].items():
            # a run has the same colour in all panels; without a style it takes matplotlib's next colour
            _, colour, style = style_of(label)
            colour = colours.setdefault(label, colour or f"C{len(colours)}")
            line = axis.plot(x, np.mean(values, 0), style, color=colour, marker=".")[0]
            lines[name_of(label, panel)] = line
            axis.fill_between(x, np.min(values, 0), np.max(values, 0), color=colour, alpha=0.2, linewidth=0)

        # where the label says that places are multiples of T: a logarithmic axis, with a dotted line at T
        if "(T)" in panel["xlabel"]:
            axis.axvline(1, linestyle=":", color="black", linewidth=1)
            axis.text(1, 0.93, " T", transform=axis.get_xaxis_transform(), fontsize=9)
            axis.set_xscale("log", base=4)
            axis.xaxis.set_major_formatter("{x:.3g}")
        elif "steps / steps" in panel["xlabel"]:  # of the figure "budget": the base is at 0
            axis.set_xscale("symlog", linthresh=0.01)
            axis.set_xticks([0, 0.01, 0.1, 0.36])
            axis.xaxis.set_major_formatter("{x:.0%}")
        axis.set_title(panel["title"], fontsize=10)
        axis.set(xlabel=panel["xlabel"], ylabel=panel["ylabel"])
        axis.grid(alpha=0.3)
    # all begin at 0 or below; only now, because it ends the search for a range that fits
    for axis in figure.axes:
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    lg.write_atomically(path, functools.partial(figure.savefig, dpi=150, format="png"))


def report(found, path, title):
    """The table, the verdict on losses, and the picture. found: {label: a measurement}"""
    panels = panels_of({label: [measurement] for label, measurement in found.items()})
    print_table(panels)
    print_verdict(panels)
    draw(panels, path, title)
    print(f"picture: {path}")


# ---- 7. The base, the cure, main ----


def run_folder(out, model, task, label, seed):
    """The folder of a run. label: "base", or the intervention, with "-scan" for --carry scan."""
    return os.path.join(out, f"{model}-{task}-{label}-s{seed}")


def fill_in(args, init):
    """Fill in model, task, T and tokenizer if the command line does not. init: a checkpoint, or None"""
    known = {}
    if init:
        layer, known = init["config"]["layer"], init["settings"]
        if args.model not in (None, layer):
            raise ValueError(f"{args.init} is a {layer}, no {args.model}: leave --model out")
        args.model = known["model"]  # from here on this only names folders; it may be any name
    args.model = args.model or "mamba2"
    args.task = args.task or known.get("task", "echo")
    args.T = args.T or known.get("T", lg.TASKS[args.task][1])
    if args.tokenizer is None:
        args.tokenizer = known.get("tokenizer") or "bytes"


def settings_of(args, corpus, recipe, asked):
    """The settings of a run: DEFAULTS and a recipe; an option in `asked`, {name: value}, replaces theirs."""
    settings = DEFAULTS | RECIPES[recipe]
    for name in settings:
        if asked.get(name) is not None:
            settings[name] = asked[name]
    shared = dict(model=args.model, task=args.task, T=args.T, tokenizer=args.tokenizer, seed=args.seed)
    return argparse.Namespace(**settings, ranks=RANKS, init=args.init, data=corpus.name, **shared)


def check_vocabulary(model, corpus, name):
    """Raise ValueError if the model was trained with another tokenizer than the corpus was read with."""
    known = model.config.vocab_size
    if not 0 <= known - corpus.vocab_size < 128:  # transformers counts padding, less than 128, as words
        counts = f"{name} knows {known} tokens, the corpus has {corpus.vocab_size}"
        raise ValueError(f"{counts}: choose the --tokenizer that it was trained with")


def main(argv=None):
    """Run one command line of train.py; ValueError if it is wrong."""
    started = time.time()
    args = parse_arguments(argv)
    init = None if args.init is None else lg.load_checkpoint(args.init)
    fill_in(args, init)
    vocab_size = init["config"]["vocab_size"] if init else None
    corpus = lg.load_corpus(args.data, args.tokenizer, vocab_size)
    for split in ("train", "val"):  # a text that is too short, or a T that does not fit, is found out here
        lg.TASKS[args.task][0](lg.Rows(corpus, split, B=1, continues=True, seed=0), args.T)
    counts = f"{len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out"
    print_rank0(f"corpus: {corpus.name}, {counts}")
    device = choose_device(args.device)
    join_ranks(device)

    label = args.intervention or "base"
    if args.carry == "scan":
        label += "-scan"
    folder = run_folder(args.out, args.model, args.task, label, args.seed)

    # the base: of --init, or a new one
    if init:
        model = lg.model_from_checkpoint(init).to(device)
        check_vocabulary(model, corpus, args.init)
        print_rank0(f"base: {args.init}")
        tell_scan(model)
        # the losses of the base are kept in its own folder if it is a run on this task, T and text, else in
        # the folder of the cure
        trained_on = (init["settings"]["task"], init["settings"]["T"], init.get("made_from", {}).get("text"))
        is_run_on_this = os.path.isdir(args.init) and trained_on == (args.task, args.T, corpus.checksum)
        measured_in = args.init if is_run_on_this else os.path.join(folder, "init")
        losses = load_or_measure(measured_in, loss_by_position, model, corpus, args.T, args.task)
    else:
        torch.manual_seed(args.seed)
        config = lg.ModelConfig(layer=args.model, vocab_size=corpus.vocab_size, **TINY_MODELS[args.model])
        model = lg.LanguageModel(config).to(device)
        base_folder = run_folder(args.out, args.model, args.task, "base", args.seed)
        print_rank0(f"base: {base_folder}, trained from zero states where it is not finished")
        tell_scan(model)
        recipe = "base of mixed" if args.task == "mixed" else "base"
        # if there is an --intervention, then --steps, --lr and the like belong to the cure
        asked = {} if args.intervention else vars(args)
        settings = settings_of(args, corpus, recipe, asked)
        losses = train_and_measure(args, settings, model, corpus, base_folder, device)
    found = {"base": losses}

    # the cure
    if args.intervention:
        size = sum(weight.numel() for weight in model.parameters())
        recipe = "cure of a large model" if size > LARGE else "cure"
        settings = settings_of(args, corpus, recipe, vars(args))
        if size > LARGE:
            model.config.recompute = True
            print_rank0("memory: each layer is computed again in the backward pass, or it would not fit")
            settings.lr = args.lr or next(lr for up_to, lr in LARGE_LR.items() if size <= up_to)
            tokens = settings.batch * args.T * RANKS  # of a step without accumulation
            settings.accumulate = args.accumulate or math.ceil(LARGE_TOKENS / tokens)
        listed = ", ".join(f"{name} {value}" for name, value in vars(settings).items())
        print_rank0(f"post-training: {listed}")
        found[label] = train_and_measure(args, settings, model, corpus, folder, device)

    # the table, a verdict and the picture
    if RANK == 0:
        title = f"{args.model} on {args.task}, trained on T = {args.T} tokens"
        report(found, os.path.join(folder, "position_wise.png"), title)
        print(f"{clock(time.time() - started)} minutes in all")
    if dist.is_initialized():
        dist.destroy_process_group()


def train_and_measure(args, settings, model, corpus, folder, device):
    """Train the model unless the folder holds the finished run. Returns its losses by position."""
    with alone_in(folder):
        with catch_signals() as signals:
            train(model, corpus, settings, folder, device, signals, args.compile)
        return load_or_measure(folder, loss_by_position, model, corpus, args.T, args.task)


def run_command(command):
    """Call command(). What goes wrong is one sentence: exit code 2 for bad input, 1 for a diverging loss."""
    sys.stdout.reconfigure(errors="replace")  # a terminal or file may not have every character
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)


# Read all sources now, before an edit during the run can change them
sources(loss_by_position, *TRAINING, *MODEL, *lg.LAYERS.values(), modules=("kernels", "lengthgen", __name__))
for function, *_ in (*lg.TASKS.values(), *lg.INTERVENTIONS.values()):
    sources(function)

if __name__ == "__main__":
    run_command(main)
