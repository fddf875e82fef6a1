"""A name of the hub is fetched once, by the library of the hub: its cache, token, mirror and offline mode.

The hub is a small server on this machine. Programs run in processes of their own, because the library reads
its environment when it is imported.
"""

import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoint import fla_weights, needs
from test_model import make_model
from test_tokenizer import make_sentencepiece, make_tokenizer

import eval as ev
import lengthgen as lg
import train

needs("huggingface_hub"), needs("tokenizers")
save_file = needs("safetensors.torch").save_file
ROOT = Path(lg.__file__).parent
FLOAT32 = 1e-5  # relative: another process may add up in another order
PIP = "pip install huggingface_hub safetensors tokenizers"
SHA = "5" * 40  # of the only revision


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the folders root/owner/name as the hub does, and remembers (path, authorization)."""

    def __init__(self, *args, root, asked):
        self.root, self.asked = root, asked
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def reply(self, code, body, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": SHA, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        self.asked.append((path, self.headers["Authorization"]))
        parts = path.removeprefix("api/models/").split("/")
        folder = self.root / "/".join(parts[:2])
        if not folder.is_dir():
            return self.reply(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="no such repository")
        if path.startswith("api/"):
            files = [p for p in folder.rglob("*") if p.is_file()]
            if parts[2] == "revision":
                siblings = [dict(rfilename=p.relative_to(folder).as_posix()) for p in files]
                answer = dict(id="/".join(parts[:2]), sha=SHA, siblings=siblings)
            else:
                answer = []
                for p in files:
                    name = p.relative_to(folder).as_posix()
                    answer.append(dict(type="file", path=name, size=p.stat().st_size, oid="0"))
            return self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")
        file = folder.joinpath(*parts[4:])  # owner, name, "resolve", revision
        if not file.is_file():
            return self.reply(404, b"", X_Error_Code="EntryNotFound")
        self.reply(200, file.read_bytes(), ETag=f'"{hashlib.sha1(file.read_bytes()).hexdigest()}"')

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """A hub with an empty cache: its folder, what it was asked for, and the environment of its user."""
    asked = []
    handler = functools.partial(Hub, root=tmp_path / "hub", asked=asked)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment.update(PYTHONPATH=str(ROOT), HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    environment.update(HF_HOME=str(tmp_path / "home"), no_proxy="127.0.0.1", OMP_NUM_THREADS="1")
    (tmp_path / "hub").mkdir()
    yield tmp_path / "hub", asked, environment
    server.shutdown()
    server.server_close()


def run(arguments, environment, folder):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=folder
    )


def assert_one_sentence(done, *parts):
    """Exit code 2 and one short line, no traceback."""
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert len(done.stderr) < 520 and all(part in done.stderr for part in parts), done.stderr


def put_mamba2(folder, **changes):
    """A Mamba-2 as it is published for mamba_ssm: pytorch_model.bin in float16, no tokenizer. Returns it."""
    sizes = dict(vocab_size=43, d_model=8, n_layer=2, ngroups=1) | changes
    model = make_model("mamba2", pad_vocab_size_multiple=16, **sizes).half().float()
    weights = {name: x.half() for name, x in model.state_dict().items()}
    weights = {name if name == "lm_head.weight" else f"backbone.{name}": x for name, x in weights.items()}
    settings = dict(d_model=sizes["d_model"], n_layer=sizes["n_layer"], vocab_size=sizes["vocab_size"])
    settings.update(rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=16)
    settings.update(tie_embeddings=True, ssm_cfg=dict(layer="Mamba2", d_state=6, headdim=4))
    folder.mkdir(parents=True)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(settings))
    return model


def put_gla(folder):
    """A GLA as it is published for flash-linear-attention: safetensors and its own tokenizer. Returns it."""
    folder.mkdir(parents=True)
    words = lg.load_tokenizer(str(make_sentencepiece(folder))).words
    model = make_model("gla", vocab_size=words).float()
    save_file(fla_weights(model), folder / "model.safetensors")
    settings = dict(model_type="gla", hidden_size=8, num_hidden_layers=2, num_heads=2, vocab_size=words)
    (folder / "config.json").write_text(json.dumps(settings))
    return model


LOAD = """
import sys, torch, lengthgen as lg
out = {}
for name in ("someone/mamba2-tiny", "someone/gla-1.3b.v2"):
    checkpoint = lg.load_checkpoint(name)
    model = lg.model_from_checkpoint(checkpoint)
    out[name] = checkpoint["settings"]["tokenizer"], model.state_dict(), model(torch.arange(40)[None])[0]
out["text"] = lg.load_corpus("text.txt", out[name][0]).train.tolist()
torch.save(out, "out.pt")
"""


def test_models_and_a_tokenizer_load_from_the_hub_with_a_token_and_then_without_it(hub, tmp_path):
    folder, asked, environment = hub
    models = {
        "someone/mamba2-tiny": put_mamba2(folder / "someone" / "mamba2-tiny"),
        "someone/gla-1.3b.v2": put_gla(folder / "someone" / "gla-1.3b.v2"),
    }
    # what nobody needs: a second copy of the weights, and files beside them
    (folder / "someone" / "gla-1.3b.v2" / "pytorch_model.bin").write_bytes(b"not needed")
    (folder / "someone" / "gla-1.3b.v2" / "optimizer.pt").write_bytes(b"not needed")
    (tmp_path / "text.txt").write_text("test a. " * 20)

    def check():
        done = run(["-c", LOAD], environment, tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        out = torch.load(tmp_path / "out.pt")
        for name, model in models.items():
            tokenizer, weights, logits = out[name]
            assert tokenizer == (name if "gla" in name else None)
            assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())
            wanted = model(torch.arange(40)[None])[0]
            assert (logits - wanted).abs().max() < FLOAT32 * wanted.abs().max()
        gla = lg.load_tokenizer(str(folder / "someone" / "gla-1.3b.v2"))
        tokens = gla.encode("test a. " * 20)
        assert out["text"] == [2, *tokens[: len(tokens) - len(tokens) // 10]]
        (tmp_path / "out.pt").unlink()

    environment["HF_TOKEN"] = "hf_of_this_test"
    check()
    fetched = {path for path, _ in asked if "/resolve/" in path}
    assert {os.path.basename(path) for path in fetched} == {
        "config.json", "tokenizer.json", "pytorch_model.bin", "model.safetensors"
    }  # fmt: skip
    assert f"someone/gla-1.3b.v2/resolve/{SHA}/pytorch_model.bin" not in fetched
    tokens = {authorization for path, authorization in asked if "someone/" in path}
    assert tokens == {"Bearer hf_of_this_test"}
    cache = tmp_path / "home" / "hub" / "models--someone--mamba2-tiny" / "snapshots" / SHA
    assert (cache / "config.json").is_file()

    # offline the cache is read, and nobody is asked
    asked.clear()
    environment["HF_HUB_OFFLINE"] = "1"
    check()
    assert not asked


def test_a_name_that_leads_nowhere_is_one_sentence(hub, tmp_path):
    _, _, environment = hub
    command = [ROOT / "train.py", "--intervention", "zero", "--device", "cpu", "--init"]
    assert_one_sentence(run([*command, "someone/nothing"], environment, tmp_path), "someone/nothing")
    environment["HF_HUB_OFFLINE"] = "1"
    assert_one_sentence(run([*command, "someone/nothing"], environment, tmp_path), "someone/nothing")


@pytest.mark.parametrize("name", ["nowhere", "../someone/model", "a/b/c", "someone/..", "a b/c"])
def test_a_name_that_no_hub_has_asks_nobody(name, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: asked.append(args))
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        lg.LanguageModel.from_pretrained(name)
    assert not asked
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 500


def test_a_server_that_is_not_there_is_one_sentence(hub, tmp_path):
    _, _, environment = hub
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    command = [ROOT / "train.py", "--intervention", "zero", "--init", "someone/mamba2-tiny"]
    assert_one_sentence(run(command, environment, tmp_path), "someone/mamba2-tiny")


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("huggingface_hub", "safetensors", "tokenizers")))  # an import of them fails
import train
for line in sys.argv[1:]:
    try:
        train.main(line.split())
        print("done")
    except ValueError as error:
        print(f"error: {error}")
"""


def test_without_the_three_libraries_one_sentence_says_how_to_install_them(hub, tmp_path):
    """Files of all three kinds; and a run of our own needs none of them."""
    _, _, environment = hub
    put_gla(tmp_path / "gla")
    (tmp_path / "text.txt").write_text("test a. " * 200)
    options = "--data text.txt --steps 1 --T 16 --batch 2 --device cpu --task text"
    lines = [
        f"--init someone/model --intervention zero {options}",
        f"--init gla --intervention zero {options}",
        f"--tokenizer gla/tokenizer.json {options}",
        options,
    ]
    done = run(["-c", WITHOUT, *lines], environment, tmp_path)
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and done.stdout.count("done") == 1, done.stdout + done.stderr
    for line, name in zip(errors, ("someone/model", "model.safetensors", "tokenizer.json"), strict=True):
        assert name in line and PIP in line and len(line) < 520
    assert PIP in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("tokenizer", [None, "bytes"])
def test_a_gla_with_its_own_tokenizer_reads_tokens_of_a_bin(tokenizer, tmp_path, monkeypatch):
    """All of its words are words: the last one is in the text, and so is the border."""
    monkeypatch.chdir(tmp_path)
    model = put_gla(tmp_path / "gla")
    words = model.config.vocab_size
    (np.arange(4000) % words).astype(np.uint16).tofile("tokens.bin")
    command = (
        "--init gla --intervention state_passing --data tokens.bin --T 16 --steps 1 --batch 2 --device cpu"
    )
    train.main(command.split() + (["--tokenizer", tokenizer] if tokenizer else []))
    cured = lg.load_checkpoint("runs/gla-text-state_passing-s0")
    assert (cured["step"], cured["config"]["vocab_size"]) == (1, words)

    # and out again, for flash-linear-attention
    lg.model_from_checkpoint(cured).save_pretrained("out")
    back = lg.LanguageModel.from_pretrained("out").state_dict()
    assert all(torch.equal(x, back[name]) for name, x in cured["model"].items())


def test_a_gla_with_its_own_tokenizer_runs_on_text_and_passkey_and_out_again(tmp_path, monkeypatch):
    """From its folder to text, to passkeys of its own words, to their accuracy, and back for fla."""
    monkeypatch.chdir(tmp_path)
    model = put_gla(tmp_path / "gla")
    (tmp_path / "text.txt").write_text("a test of text. " * 600)
    monkeypatch.setattr(train, "TINY_MODELS", {})  # nothing but the checkpoint says what the model is
    sizes = "--data text.txt --T 128 --batch 2 --steps 2 --device cpu"
    train.main(f"--init gla --intervention state_passing {sizes}".split())
    cured = "runs/gla-text-state_passing-s0"
    train.main(f"--init {cured} --task passkey --intervention fitted_noise {sizes}".split())
    found = "runs/gla-passkey-fitted_noise-s0"
    ev.main(f"passkey --init {found} --rows 2 --windows 2 --data text.txt --device cpu".split())
    measured = json.loads((tmp_path / "runs" / "passkey-gla-passkey-fitted_noise-s0.json").read_text())
    assert measured["x"] == [1, 2] and measured["T"] == 128 and len(measured["values"]) == 3

    # the words of the passkey are those of the model's own tokenizer
    checkpoint = lg.load_checkpoint(found)
    assert checkpoint["settings"]["tokenizer"] == "gla"
    corpus = lg.load_corpus("text.txt", "gla")
    tokens, _ = lg.passkey(lg.Rows(corpus, "val", 1, False, 0), 128, 0.5)
    assert tokens.max() < corpus.words == model.config.vocab_size
    assert "What is the pass key? The pass key is" in corpus.decode(tokens[0].tolist())

    lg.LanguageModel.from_pretrained(found).save_pretrained("out")
    shutil.copy("gla/tokenizer.json", "out")
    back = lg.load_checkpoint("out")
    assert back["config"] == checkpoint["config"] and back["settings"]["tokenizer"] == "out"
    assert all(torch.equal(x, back["model"][name]) for name, x in checkpoint["model"].items())


def test_from_the_hub_to_the_cured_file_that_transformers_loads(hub, tmp_path):
    """A Mamba-2 of 50277 words in float16 and the tokenizer of GPT-NeoX: the README's command, and back."""
    transformers = needs("transformers")
    folder, _, environment = hub
    put_mamba2(folder / "someone" / "mamba2-130m", vocab_size=50277, n_layer=1)
    neox = folder / lg.NEOX
    neox.mkdir(parents=True)
    file = make_tokenizer(neox)
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words.update({f"unused {i}": i for i in range(len(words), 50277 - 23)})
    for i, token in enumerate(
        tokenizer["added_tokens"][2:]
    ):  # 23 runs of spaces, the last words as in GPT-NeoX
        token["id"] = 50277 - 23 + i
    file.write_text(json.dumps(tokenizer))
    (tmp_path / "text.txt").write_text("a test of text. " * 12)  # so few that the streams are one T long
    sizes = "--data text.txt --T 8 --device cpu"
    command = f"--init someone/mamba2-130m --intervention state_passing --steps 2 --batch 2 {sizes}"
    done = run([ROOT / "train.py", *command.split()], environment, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "base: someone/mamba2-130m" in done.stdout and "picture: " in done.stdout
    cured = "runs/mamba2-130m-text-state_passing-s0"
    command = f"poswise --init {cured} --rows 2 --windows 2 {sizes}"
    done = run([ROOT / "eval.py", *command.split()], environment, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]

    # out through the layout of mamba_ssm, which differs from that of transformers in one name
    model = lg.LanguageModel.from_pretrained(tmp_path / cured)
    model.save_pretrained(tmp_path / "out", torch.float16)
    weights = torch.load(tmp_path / "out" / "pytorch_model.bin")
    weights = {name.replace("embedding.", "embeddings."): x.float() for name, x in weights.items()}
    sizes = dict(hidden_size=8, num_hidden_layers=1, vocab_size=50288, state_size=6, chunk_size=16)
    config = transformers.Mamba2Config(**sizes, num_heads=4, head_dim=4, n_groups=1, tie_word_embeddings=True)
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    theirs.load_state_dict(weights)
    tokens = torch.randint(0, 50277, (2, 37))
    with torch.no_grad():
        wanted = theirs(tokens).logits[..., :50277]
        ours = lg.LanguageModel.from_pretrained(tmp_path / "out")(tokens)[0]
    assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max()  # another library adds up differently
