"""Damaged files of every kind are refused or read, in 5 s each and 1.5 GB: python tests/fuzz_files.py 4000"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_checkpoint import save_gla
from test_tokenizer import make_sentencepiece, make_tokenizer

import eval as ev
import lengthgen as lg
import train

BAD = [None, True, -1, 0, 2, 1.5, 10**30, 1e308, float("nan"), "", "x" * 2000, "\ud800", [], {}, [[1], 2]]
BAD_TENSORS = [torch.zeros(3), torch.ones(1).expand(8, 8), -torch.ones(2).long(), torch.eye(2).to_sparse()]
CORPUS = lg.load_corpus([__file__, lg.__file__])
CPU = torch.device("cpu")
DRAW = train.draw


def few_states(model, corpus, T, task):
    return ev.state_growth(model, corpus, T, task, B=2)


ev.FIGURES["state"] = ("", "echo", [ev.PAIR], [few_states])
train.sources = lambda *parts, **modules: {}  # the source stays as it is, and takes most of the time


def run(folder, steps):
    """Train a tiny model, or go on with it."""
    s = argparse.Namespace(**train.DEFAULTS, **train.RECIPES["cure"], model="tiny", task="text", T=8, seed=0)
    vars(s).update(steps=steps, batch=2, accumulate=2, intervention="fitted_noise", tokenizer="bytes")
    vars(s).update(ranks=1, init="a base", data=CORPUS.name)
    torch.manual_seed(0)
    config = lg.ModelConfig(vocab_size=258, d_model=8, n_layer=1, d_state=4, headdim=8)
    train.train(lg.LanguageModel(config), CORPUS, s, str(folder), CPU, signals=[])


def replace_one_part(nest, rng, bad):
    key = rng.choice(list(nest) if isinstance(nest, dict) else range(len(nest)))
    if isinstance(nest[key], (dict, list)) and nest[key] and rng.random() < 0.9:
        replace_one_part(nest[key], rng, bad)
    elif rng.random() < 0.1:
        del nest[key]
    else:
        nest[key] = rng.choice(bad)


def damage(file, data, rng):
    """Change what a file of others means, or the bytes of any file."""
    own = "figure" in file.parts or "run" in file.parts  # these are read, not examined
    if file.name == "pytorch_model.bin" and rng.random() < 0.5:
        value = torch.load(file)
        replace_one_part(value, rng, BAD + BAD_TENSORS)
        torch.save(value, file)
    elif file.suffix == ".json" and not own and rng.random() < 0.5:
        value = json.loads(data)
        replace_one_part(value, rng, [*BAD, "DEEP"])
        file.write_text(json.dumps(value).replace('"DEEP"', rng.choice([10**5, 600]) * "[" + "]" * 600))
    else:
        a, b, c = sorted(rng.randrange(rng.choice([len(data), min(len(data), 1500)])) for _ in range(3))
        flipped = data[:a] + bytes([data[a] ^ 1 << rng.randrange(8)]) + data[a + 1 :]
        swapped = data[:a] + data[b:c] + data[a:b] + data[c:]
        file.write_bytes(rng.choice([data[:c], swapped, flipped, flipped]))


def read(folder, file, i):
    train.draw = DRAW if i % 10 == 0 else lambda *_: None  # which is slow
    if folder.name == "figure":
        ev.draw_figure("state", ev.parse_arguments(["--out", str(folder)]), CORPUS, CPU)
    elif folder.name in ("tokenizer", "sentencepiece"):
        lg.load_tokenizer.cache_clear()
        corpus = lg.load_corpus(__file__, str(folder))
        corpus.decode(corpus.train[:100].tolist())
    elif folder.name == "text":
        lg.text(lg.Rows(lg.load_corpus(file), "train", 2, False, 0), 4)
    elif folder.name == "babilong":
        lg.BYTES.encode(lg.read_babilong(file, 64)[0][0])
    else:
        lg.LanguageModel.from_pretrained(folder)(torch.zeros(1, 3, dtype=torch.long))
        if folder.name == "run":
            run(folder, steps=3)


n, refused = int(sys.argv[1]), 0
with tempfile.TemporaryDirectory() as root, open("/dev/null", "w") as sys.stdout:
    root = Path(root)
    base = root / "figure" / "mamba2-echo-base-s0"
    for folder in (
        base,
        *(root / kind for kind in "run safetensors tokenizer sentencepiece text babilong".split()),
    ):
        folder.mkdir(parents=True)
    run(base, steps=2)
    read(root / "figure", None, 1)
    checkpoint = torch.load(base / lg.CHECKPOINT)
    checkpoint["settings"]["steps"] = 3  # one is left
    torch.save(checkpoint, root / "run" / lg.CHECKPOINT)
    lg.LanguageModel.from_pretrained(base).save_pretrained(root / "bin")
    save_gla(root / "safetensors", shards=2)
    make_tokenizer(root / "tokenizer")
    make_sentencepiece(root / "sentencepiece")
    (root / "text" / "a.jsonl").write_text('{"text": "some text, é"}\n' * 9)
    (root / "text" / "a.bin").write_bytes(bytes(range(200)))
    (root / "babilong" / "qa1.json").write_text('[{"input": "x", "question": "y", "target": "z"}]')
    files = {path: path.read_bytes() for path in sorted(root.rglob("*.*")) if path.suffix != ".png"}

    # each damaged file is made from its number alone
    for i in range(n):
        rng, started = random.Random(i), time.process_time()
        file = rng.choice(list(files))
        damage(file, files[file], rng)
        try:
            read(root / file.relative_to(root).parts[0], file, i)
        except (ValueError, FloatingPointError):  # the latter where a run with other numbers diverges
            refused += 1
        except BaseException as error:
            raise AssertionError(f"file {i}, {file}") from error
        assert time.process_time() < started + 5 and getrusage(RUSAGE_SELF).ru_maxrss < 1.5 * 2**20, (
            f"file {i}"
        )
        for path, data in files.items():
            path.write_bytes(data)
print(f"{n} damaged files: {refused} refused, the others read", file=sys.stderr)
