"""eval.py and the paper's measures: scorers by hand, closed forms, every figure end to end at toy size."""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import eval as ev
import lengthgen as lg
import train

ROUNDING = 1e-6  # float32 softmax and cross-entropy of a few tokens
HERE = os.path.dirname(os.path.abspath(__file__))

# --------------------------------------------------------------------------------------------------
# Models made by hand: their state is one number per row, kept where a real one keeps S


class HandMade:
    """logits, state = model(tokens, state) from step(seen, token) -> (logits (B, C), seen)."""

    C = 258

    def __init__(self, step):
        self.step = step
        self.lm_head = torch.nn.Linear(1, 1)  # the measures look here for the device

    def zero_state(self, B):
        return [lg.LayerState(None, torch.zeros(B, 1, 1, 1))]

    def __call__(self, tokens, state=None, last_only=False):
        seen = (state or self.zero_state(len(tokens)))[0].scan[:, 0, 0, 0]
        logits = []
        for token in tokens.unbind(1):
            out, seen = self.step(seen, token)
            logits.append(out)
        return torch.stack(logits, 1), [lg.LayerState(None, seen.view(-1, 1, 1, 1))]


def sure_of(token, p):
    """Logits (B, C) that give probability p to one token and share the rest evenly."""
    logits = torch.full((len(token), HandMade.C), float(np.log((1 - p) / (HandMade.C - 1))))
    return logits.scatter(1, token.long()[:, None], float(np.log(p)))


def decode(tokens):
    """Text of byte tokens; the special tokens are left out."""
    return bytes(int(x) for x in tokens if x < 256).decode()


def letters(B, N, seed=0):
    return torch.randint(97, 123, (B, N), generator=torch.Generator().manual_seed(seed)).numpy()


def test_effective_remembrance_of_a_model_without_memory_is_zero_up_to_its_window():
    # the prediction is a function of this token and the one before (kept as seen - 1; 0 is none)
    model = HandMade(lambda seen, token: (sure_of((token + seen) % 258, 0.9), token + 1.0))
    distance = lg.effective_remembrance(model, letters(4, 30), [1, 5, 19, 20], 20)
    assert distance.shape == (4, 4, 10)
    assert (distance[:3] == 0).all()  # the window reaches back to 19
    assert (distance[3, :, 0] > 0.5).all() and (distance[3, :, 1:] == 0).all()


def test_effective_remembrance_of_a_model_that_copies_the_first_token_is_its_closed_form():
    p = 0.7

    def step(seen, token):
        first = torch.where(seen == 0, token + 1.0, seen)
        return sure_of(first - 1, p), first

    tokens, starts = letters(8, 40), [1, 2, 7, 30]
    distance = lg.effective_remembrance(HandMade(step), tokens, starts, 30)
    for i, t in enumerate(starts):  # the suffix x[t:] believes in x[t]: TV is p minus what the others get
        expected = np.where(tokens[:, 0] == tokens[:, t], 0, p - (1 - p) / (HandMade.C - 1))
        np.testing.assert_allclose(distance[i], np.broadcast_to(expected[:, None], (8, 10)), atol=ROUNDING)


def test_paired_gap_is_that_of_the_same_targets_each_counted_once():
    def loss(n, token):  # in nats, of the target after `token`, when n tokens are behind it
        return 0.1 + 1e-3 * n**2 + 0.01 * token

    def step(seen, token):
        p = torch.exp(-loss(seen + 1, token))
        return torch.cat(
            [sure_of((t[None] + 1) % 7, q.item()) for t, q in zip(token, p, strict=True)]
        ), seen + 1

    T, windows = 8, 4
    tokens = np.arange(T * windows + 1)[None] % 7
    gap = lg.paired_gap(HandMade(step), tokens, T)
    second_half = np.arange(T // 2, T)
    for i in range(windows):
        token = tokens[0, i * T + second_half]
        expected = loss(i * T + second_half + 1, token) - loss(second_half + 1, token)
        assert abs(gap[i] - expected.mean()) < 10 * ROUNDING  # losses of up to 1 nat in float32


def test_state_std_is_that_of_the_state_after_t_tokens():
    model = HandMade(lambda seen, token: (sure_of(token, 0.5), seen + torch.tensor([1.0, 3.0])))
    full, layers, heads = lg.state_std(model, letters(2, 64), [1, 10, 64])
    assert full.tolist() == [1, 10, 64]  # the two rows hold t and 3t
    assert layers.tolist() == [[1], [10], [64]] and heads.tolist() == [[[1]], [[10]], [[64]]]


def test_accuracy_counts_each_target_of_the_mask_once_and_nothing_else():
    model = HandMade(lambda seen, token: (sure_of(token, 0.9), seen))  # says every token again
    tokens = np.array([[5, 5, 6, 6, 6]])
    right = lg.accuracy(model, tokens, np.array([[1, 2, 0, 1]]))
    assert right[0, :2].tolist() == [1, 0] and right[0, 2].isnan() and right[0, 3] == 1


@pytest.mark.parametrize("N, n", [(1, 20), (20000, 1), (30001, 7)])
def test_accuracy_of_a_long_stream_is_that_of_its_segments_joined(N, n):
    model = HandMade(lambda seen, token: (sure_of(token, 0.9), seen + 1))
    tokens = letters(1, N + 1)
    right = lg.accuracy(model, tokens, np.arange(N)[None] % n == 0)
    for t in range(0, N, n):
        assert right[0, t] == (tokens[0, t] == tokens[0, t + 1])
    assert right.isnan().sum() == N - len(range(0, N, n))


def test_generation_is_greedy_at_zero_temperature():
    torch.manual_seed(0)
    model = lg.LanguageModel(lg.ModelConfig(vocab_size=258, d_model=16, n_layer=1, d_state=8, headdim=8))
    prompt = torch.from_numpy(letters(2, 9))
    tokens = prompt
    for token in lg.generate(model, prompt, 6):
        likeliest = model(tokens)[0][:, -1].argmax(-1)
        assert torch.equal(token, likeliest)
        tokens = torch.cat([tokens, token[:, None]], 1)
    torch.manual_seed(0)
    drawn = {int(token[0]) for _ in range(20) for token in lg.generate(model, prompt, 1, temperature=5.0)}
    assert len(drawn) > 10
    coldest = [int(token[0]) for token in lg.generate(model, prompt, 5, temperature=1e-45)]
    assert coldest == [int(token[0]) for token in lg.generate(model, prompt, 5)]


def test_the_greedy_answer_is_exact_where_every_target_of_the_answer_is_the_likeliest():
    """So that one teacher-forced pass scores what a free-running model says."""
    torch.manual_seed(0)
    model = lg.LanguageModel(lg.ModelConfig(vocab_size=4, d_model=16, n_layer=1, d_state=8, headdim=8))
    tokens = torch.randint(0, 4, (200, 12), generator=torch.Generator().manual_seed(0))
    asked = np.zeros((200, 11), dtype=bool)
    asked[:, 8:] = True  # the last three tokens are the answer
    answers = torch.stack(list(lg.generate(model, tokens[:, :9], 3)), 1)
    same = (answers == tokens[:, 9:]).all(1).double().mean()
    assert 0 < same < 1 and ev.exact_match(model, tokens.numpy(), asked) == same


# --------------------------------------------------------------------------------------------------
# Tasks and their scorers


def make_corpus():
    rng = np.random.default_rng(0)
    words = np.array(["import", "def", "x", "return", "self", "0", "(", ")\n", "for", "in\n"])
    text = " ".join(rng.choice(words, 60_000)).encode()
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    return lg.Corpus("words drawn by a test", tokens[:-20_000], tokens[-20_000:], 256)


@pytest.fixture(scope="module")
def corpus():
    return make_corpus()


def test_the_passkey_is_asked_for_at_the_end_and_hidden_at_its_depth(corpus):
    for depth in (0, 0.5, 1):
        tokens, part = lg.passkey(lg.Rows(corpus, "val", 8, False, 0), 300, depth)
        for row, mask in zip(tokens, part, strict=True):
            assert row[0] == row[-1] == corpus.bos and len(row) == 301
            text = decode(row)
            key = re.search(r"The pass key is (\d{5})\. Remember it", text)[1]
            assert text.endswith(f"What is the pass key? The pass key is {key}")
            assert decode(row[1:][mask == 1]) == key and (np.flatnonzero(mask) >= 300 - 6).all()
            assert abs(text.index("The pass key is") - depth * (300 - 1 - 59 - 43)) <= 1
    rows = lg.Rows(corpus, "val", 64, False, 0)
    keys = {decode(row[-6:-1]) for row in lg.passkey(rows, 160)[0]}
    assert len(keys) > 60  # drawn anew in each row


@pytest.mark.parametrize(
    "output, answer, question, qa, right",
    [
        ("garden. And more", "garden", "Where is Mary?", 1, True),
        ("The GARDEN", "garden", "Where is Mary?", 1, True),
        ("office.", "garden", "Where is Mary?", 1, False),
        ("garden or office.", "garden", "Where is Mary?", 1, False),
        ("kitchen, before that the garden.", "garden", "Where was the milk before the kitchen?", 3, True),
        ("I see. garden", "garden", "Where is Mary?", 1, False),
        ("garden <example> office", "garden", "Where is Mary?", 1, True),
        ("garden\n<Context>office", "garden", "Where is Mary?", 1, True),
        ("", "garden", "Where is Mary?", 1, False),
        ("milk", "milk", "What did Bill give to Fred?", 5, True),
        ("Bill gave it to Mary", "Mary", "Who did Bill give the milk to?", 5, True),
        ("Jeff gave it to Mary", "Mary", "Who did Bill give the milk to?", 5, False),
    ],
    ids="right capitals wrong two in-question after-stop example tag nothing object person people".split(),
)
def test_babilong_scores_the_only_label_before_the_stop(output, answer, question, qa, right):
    assert lg.babilong_score(output, answer, question, qa) == right


def solve(facts, question):
    """Read a story as a child would: an independent answer to check the generator's."""
    room_of = {}
    for fact in facts:
        words = fact.rstrip(".").split()
        assert room_of.get(words[0]) != words[-1]  # nobody goes where he is
        room_of[words[0]] = words[-1]
    return room_of[question.rstrip("?").split()[-1]]


def test_babi_stories_have_the_answer_that_a_reader_finds():
    rng = torch.Generator().manual_seed(1)
    answers, verbs = set(), set()
    for _ in range(300):
        facts, question, answer = lg.babi(rng)
        assert len(facts) == 3 and solve(facts, question) == answer, (facts, question)
        answers.add(answer)
        verbs.update(verb for fact in facts for verb in lg.MOVE if f" {verb} to " in fact)
    assert answers == set(lg.ROOMS) and verbs == {*lg.MOVE}


def test_babilong_keeps_the_facts_in_order_and_ends_with_the_answer(corpus):
    tokens, part = lg.babilong(lg.Rows(corpus, "val", 32, False, 0), 1000)
    verbs = "|".join(lg.MOVE)
    for row, mask in zip(tokens, part, strict=True):
        assert row[0] == row[-1] == corpus.bos and len(row) == 1001
        text = decode(row)
        facts = [m[0] for m in re.finditer(rf"(Daniel|John|Mary|Sandra) ({verbs}) to the [a-z]+\.", text)]
        question, answer = re.search(r"(Where is [\w ]+\?) (\w+)\.$", text).groups()
        assert len(facts) == 3 and solve(facts, question) == answer
        assert decode(row[1:][mask == 1]) == f"{answer}."
        background = text
        for sentence in (*facts, f"{question} {answer}."):
            before, background = background.split(sentence, 1)[0], background.split(sentence, 1)[1]
            # between lines: after the end of one, or with nothing but facts up to the question
            only_facts = re.fullmatch(
                rf"( (\w+ ({verbs}) to the [a-z]+\.))* ?", background.split(question)[0]
            )
            assert (
                not before.strip(" ") or before.endswith("\n") or only_facts or sentence.startswith("Where")
            )


def test_boundaries_of_documents_stay_tokens_in_the_background_of_babilong():
    tokens = np.where(np.arange(5000) % 40 == 0, 256, 97)
    rows = lg.Rows(lg.Corpus("boundaries", tokens, tokens, 256), "val", 4, False, 0)
    windows, _ = lg.babilong(rows, 400)
    assert not (windows == 0).any() and ((windows[:, 1:-1] == 256).sum(1) >= 5).all()


def test_copy_makes_one_string_of_any_length(corpus):
    tokens, part = lg.copy(lg.Rows(corpus, "val", 4, False, 0), 2 * 33 + 3, 33, 33)
    for row, mask in zip(tokens, part, strict=True):
        string = decode(row[1:34])
        assert decode(row) == f"${string}|{string}.$"
        assert decode(row[1:][mask == 1]) == string and decode(row[1:][mask == 2]) == "."


def test_the_accuracy_of_copying_is_that_of_the_letters_alone(corpus):
    model = HandMade(lambda seen, token: (sure_of(torch.full_like(token, ord(".")), 0.9), seen))
    measured = ev.copy_accuracy(model, corpus, 64, "copy", B=4, windows=2)
    assert measured["values"]["packed strings"] == [0, 0]


def test_the_passkey_is_measured_by_length_and_depth(corpus, monkeypatch):
    drawn = []

    def recorded(rows, T, depth):
        drawn.append((T, depth))
        tokens, part = lg.copy(rows, T, 5, 20)
        return tokens, part == 2  # the answer is "."

    monkeypatch.setattr(lg, "passkey", recorded)
    model = HandMade(lambda seen, token: (sure_of(torch.full_like(token, ord(".")), 0.9), seen))
    measured = ev.passkey_accuracy(model, corpus, 64, "passkey", B=2, lengths=[2, 16])
    assert drawn == [(128, 0.1), (128, 0.5), (128, 0.9), (1024, 0.1), (1024, 0.5), (1024, 0.9)]
    assert measured["values"]["the key at depth 0.5"] == [1, 1]  # "." is right


def test_copy_refuses_other_vocabularies_than_bytes_and_passkey_a_window_without_room(corpus):
    rows = lg.Rows(dataclasses.replace(corpus, words=50257), "val", 2, False, 0)
    with pytest.raises(ValueError, match="--tokenizer bytes"):
        lg.copy(rows, 256)
    with pytest.raises(ValueError, match="at least 103"):
        lg.passkey(lg.Rows(corpus, "val", 2, False, 0), 90)


# --------------------------------------------------------------------------------------------------
# eval.py end to end, at sizes that take seconds

TOY_MODELS = dict(
    mamba2=dict(d_model=16, n_layer=2, d_state=8, headdim=8),
    gla=dict(d_model=16, n_layer=2, num_heads=2),
    mamba1=dict(d_model=16, n_layer=2, d_state=4),
    gdn=dict(d_model=16, n_layer=2, num_heads=2, headdim=8, expand_v=1),
)
TOY_SIZES = dict(B=2, lengths=(1, 2))


def measures():
    return {measure for *_, measures in ev.FIGURES.values() for measure in measures}


def shrink(set_attribute, function, sizes):
    """Give some arguments of a function other defaults."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    names = names[len(names) - len(defaults) :]
    smaller = [sizes.get(name, size) for name, size in zip(names, defaults, strict=True)]
    set_attribute(function, "__defaults__", tuple(smaller))


def make_toys(set_attribute, corpus):
    """Replace the sizes and the text; set_attribute is that of monkeypatch, or setattr."""
    for measure in measures():
        if measure is not train.loss_by_position:
            shrink(set_attribute, measure, dict(B=16) if measure is ev.effrem else TOY_SIZES)
    shrink(set_attribute, ev.gap, dict(B=1))
    shrink(set_attribute, ev.changed_losses, dict(B=2, windows=8))
    set_attribute(train, "report", lambda *args: None)  # what train.py ends with is tested with train.py
    position_wise = lg.position_wise

    def one_row(model, task_name, corpus, T, B, windows, **options):
        return position_wise(model, task_name, corpus, T, 1, min(windows, 4), **options)

    set_attribute(lg, "position_wise", one_row)
    toy_plan = {}
    for name, lines in ev.PLAN.items():
        shorter = [re.sub(r" --(steps|batch) \d+", "", line) for line in lines]
        toy_plan[name] = [f"{line} --steps 2 --batch 2" for line in shorter]
    set_attribute(ev, "PLAN", toy_plan)
    set_attribute(train, "TINY_MODELS", TOY_MODELS)
    toy_recipe = dict(steps=2, lr=1e-3, hold=0.0, batch=2, zero_prob=0.0)
    set_attribute(train, "RECIPES", dict.fromkeys(train.RECIPES, toy_recipe))
    set_attribute(lg, "load_corpus", lambda *args: corpus)


def modified(out):
    """{file: when it was written} of what must not be made twice."""
    files = [os.path.join(d, f) for d, _, fs in os.walk(out) for f in fs]
    kept = [f for f in files if re.search(r"checkpoint\.pt$|-s\d+/\w+\.json$", f)]
    return {f: os.stat(f).st_mtime_ns for f in kept}


@pytest.fixture(scope="module")
def reproduced(corpus, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("reproduced") / "runs")
    with pytest.MonkeyPatch.context() as patch:
        make_toys(patch.setattr, corpus)
        ev.main(["reproduce", "--out", out, "--device", "cpu"])
        ev.main(["reproduce", ev.ARCHITECTURES, "--out", out, "--device", "cpu"])
    return out


@pytest.fixture
def toys(monkeypatch, corpus):
    make_toys(monkeypatch.setattr, corpus)


def test_reproduce_draws_every_figure_and_keeps_every_number(reproduced):
    with open(os.path.join(reproduced, "results.json")) as f:
        results = json.load(f)
    assert list(results) == ["mamba2", "all"] and list(results["all"]) == [ev.ARCHITECTURES]
    results = results["mamba2"] | results["all"]
    assert list(results) == list(ev.FIGURES)
    for name, result in results.items():
        model = "all" if name == ev.ARCHITECTURES else "mamba2"
        with open(os.path.join(reproduced, "figures", f"{model}-{name}.png"), "rb") as f:
            assert f.read(8) == b"\x89PNG\r\n\x1a\n"
        assert result["command"].startswith(f"python eval.py {name}") and "torch" in result["versions"]
        for panel in result["panels"]:
            assert panel["curves"]
            for x, values in panel["curves"].values():
                assert (
                    len(values) == 1
                    and len(values[0]) == len(x)
                    and all(isinstance(y, float) for y in values[0])
                )


def test_every_label_of_a_figure_is_trained_by_its_plan(reproduced):
    with open(os.path.join(reproduced, "results.json")) as f:
        results = json.load(f)
    titles = [panel["title"] for panel in results["all"][ev.ARCHITECTURES]["panels"]]
    assert titles == [f"{model}: {part}, seeds: 1" for model in TOY_MODELS for part in ("text", "echo")]
    results = results["mamba2"] | results["all"]
    for name, (_, _, groups, _) in ev.FIGURES.items():
        drawn = {label for panel in results[name]["panels"] for label in panel["curves"]}
        wanted = {label for labels in groups for label in labels}
        assert drawn == wanted, name


def test_forgetting_faster_is_the_loss_with_the_changed_decay_beyond_4_T(corpus, monkeypatch):
    torch.manual_seed(0)
    model = lg.LanguageModel(lg.ModelConfig(vocab_size=258, **TOY_MODELS["mamba2"]))
    tokens, part = lg.stream(lg.echo, lg.Rows(corpus, "val", 2, True, 0), 50, 8)
    bins = np.where(np.arange(400) < 200, -1, part - 1)

    def losses(change):
        with lg.changed_decay(change):
            total, count = lg.streaming_loss(model, tokens, bins)
        return (total / count).tolist()

    monkeypatch.setattr(ev.changed_losses, "__defaults__", (2, 8))
    for measure, changes, unchanged in (
        (ev.decay_minus, lambda amount: lambda log_a: log_a - amount, 0),
        (ev.decay_times, lambda amount: lambda log_a: amount * log_a, 1),
    ):
        measured = measure(model, corpus, 50, "echo")
        text, echo = measured["values"]["text"], measured["values"]["echo"]
        for amount, *got in zip(measured["x"], text, echo, strict=True):
            assert got == pytest.approx(losses(changes(amount)), abs=ROUNDING)
        assert measured["x"][0] == unchanged and len({*text}) == len(text) == 7  # every change tells


def test_a_second_reproduce_and_a_redraw_make_nothing_again(reproduced, toys, monkeypatch, capsys):
    monkeypatch.setattr(train, "draw", lambda *args: None)
    before = modified(reproduced)
    ev.main(["reproduce", "--out", reproduced, "--device", "cpu"])
    ev.main(["--out", reproduced, "--device", "cpu"])
    assert modified(reproduced) == before
    assert "left out, no" not in capsys.readouterr().out


def test_a_retrained_run_is_measured_again(reproduced, toys):
    folder = pathlib.Path(reproduced, "mamba2-echo-base-s0")
    file, measurement = folder / "checkpoint.pt", folder / "effrem.json"
    kept = {path: path.read_bytes() for path in (file, measurement)}
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["model"]["norm_f.weight"] += 0.5
    torch.save(checkpoint, file)
    before = modified(reproduced)
    try:
        ev.main(["effrem", "--out", reproduced, "--device", "cpu"])
        changed = {f for f, when in modified(reproduced).items() if when != before[f]}
        assert changed == {str(measurement)}
        assert (
            json.loads(measurement.read_text())["measurement"] != json.loads(kept[measurement])["measurement"]
        )
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


def test_a_run_that_other_code_has_made_is_not_drawn(reproduced, toys, monkeypatch):
    monkeypatch.setitem(train.TINY_MODELS, "mamba2", TOY_MODELS["mamba2"] | dict(d_state=16))
    with pytest.raises(ValueError, match="base-s0 holds a run with d_state 8, not 16: remove the folder"):
        ev.main(["state", "--out", reproduced, "--device", "cpu"])


def test_a_figure_is_drawn_from_the_runs_that_are_there(toys, tmp_path, capsys):
    out = str(tmp_path / "runs")
    train.main(f"--intervention state_passing --steps 2 --batch 2 --out {out} --device cpu".split())
    ev.main(["--out", out, "--device", "cpu"])
    printed = capsys.readouterr().out
    assert os.path.exists(os.path.join(out, "figures", "mamba2-poswise.png"))
    assert "passkey: left out, no finished run" in printed and "python eval.py reproduce" in printed


def test_a_plan_is_command_lines_that_train_py_understands(toys):
    for experiment in ev.PLAN:
        asked = argparse.Namespace(out="a folder", device=None)
        for line in ev.command_lines(experiment, "gla", 3, asked):
            args = train.parse_arguments(shlex.split(line))
            assert (args.seed, args.out.startswith("a folder")) == (3, True)
            assert args.model == "gla" and (args.init is None or args.init.startswith("a folder/gla-"))


CHILD = """
import sys; sys.path[:0] = sys.argv[1:3]
import lengthgen as lg
if sys.argv[3] == "with another intervention":
    lg.INTERVENTIONS["shuffled"] = (lg.state_passing, False)
import test_eval as t
t.make_toys(setattr, t.make_corpus())
t.ev.main(["reproduce", *sys.argv[5:], "--out", sys.argv[4], "--device", "cpu"])
"""


def child(*words):
    command = [sys.executable, "-c", CHILD, os.path.dirname(HERE), HERE, *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_killed_and_started_again_reproduce_redoes_nothing_that_was_done(toys, tmp_path):
    out = str(tmp_path / "runs")
    process = child("", out, "effrem")
    while len(modified(out)) < 5 and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = modified(out)  # runs of two steps have a checkpoint when they are finished
    assert len(done) >= 5
    ev.main(["reproduce", "effrem", "--out", out, "--device", "cpu"])
    after = modified(out)
    assert len(after) > len(done) and {f: after[f] for f in done} == done


def test_a_command_line_that_fails_ends_reproduce_with_its_exit_code(toys, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ev.PLAN, "echo", ["--task magic"])
    monkeypatch.setattr(sys, "argv", ["eval.py", "reproduce", "state", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        train.run_command(ev.main)
    assert exit.value.code == 2 and "invalid choice: 'magic'" in capsys.readouterr().err


def test_samples_are_words_after_the_prompt(reproduced, capsys):
    run = os.path.join(reproduced, "mamba2-echo-base-s0")
    arguments = [
        "sample",
        "--init",
        run,
        "--prompt",
        "def f(",
        "--tokens",
        "20",
        "--device",
        "cpu",
        "--out",
        reproduced,
    ]
    ev.main(arguments)
    said = capsys.readouterr().out
    ev.main(arguments)
    assert "def f(" in said and capsys.readouterr().out == said  # the same seed says the same


def test_any_checkpoint_shows_how_it_breaks(reproduced, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(lg, "load_corpus", lambda *args: corpus)
    run, out = os.path.join(reproduced, "mamba2-echo-base-s0"), str(tmp_path / "figure")
    for windows in ("1", "5", "80"):
        options = ["--rows", "2", "--windows", windows, "--out", out, "--device", "cpu"]
        ev.main(["poswise", "--init", run, *options])
        with open(os.path.join(out, "poswise-mamba2-echo-base-s0.json")) as f:
            assert json.load(f)["x"][-1] == int(windows)


def test_an_intervention_that_somebody_adds_is_trained_and_drawn(tmp_path):
    out = str(tmp_path / "runs")
    figures = ["interventions", "poswise", "state", "effrem"]
    process = child("with another intervention", out, *figures)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    with open(os.path.join(out, "results.json")) as f:
        results = json.load(f)["mamba2"]
    assert all("shuffled" in panel["curves"] for name in figures for panel in results[name]["panels"])


def test_a_figure_of_more_seeds_than_a_curve_has_says_how_many_it_has(reproduced, toys, tmp_path, capsys):
    out = str(tmp_path / "runs")
    shutil.copytree(reproduced, out)
    line = f"--intervention state_passing --steps 2 --batch 2 --out {out} --device cpu --seed 1"
    train.main(line.split())
    capsys.readouterr()
    ev.main(["interventions", "--seeds", "2", "--out", out, "--device", "cpu"])
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.strip()]
    for name in ("control (1 of 2 seeds)", "TBTT (1 of 2 seeds)", "base", "state passing"):
        assert sum(line.startswith(f"{name:25} ") for line in table) == 2, name  # text and echo


def panel_of(**curves):
    return dict(title="text", xlabel="position (T)", ylabel="loss", seeds=2, curves=curves)


def test_a_curve_is_the_mean_of_the_seeds_in_their_range():
    figures = []
    values = [[1.0, 2.0, 5.0], [3.0, 2.0, 6.0]]
    panel = panel_of(base=([1, 2, 4], values), forked=([1, 2, 4], values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lg, "write_atomically", lambda path, write: figures.append(write.func.__self__))
        train.draw([panel, panel], "a.png", "a")
    for axis in figures[0].axes:
        assert axis.lines[0].get_ydata().tolist() == [2.0, 2.0, 5.5]
        low, high = axis.get_ylim()
        assert low == 0 and high > 6  # all of every curve is seen
        assert axis.lines[0].get_color() != axis.lines[1].get_color()


@pytest.mark.parametrize(
    "loss, verdict", [(1.0, "holds to 4 T"), (1.3, "gets worse past T"), (2, "breaks past T")]
)
def test_the_verdict_is_about_the_worst_range_past_T(loss, verdict, capsys):
    losses = [9.0, 1.0, loss, 1.0]
    train.print_verdict([panel_of(base=([0.5, 1, 2, 4], [losses, losses]))])
    assert (
        capsys.readouterr().out.strip()
        == f"base: text loss 1.00 in T, at worst {loss - 1:+.2f} beyond: {verdict}"
    )


def test_published_babilong_is_read_as_a_list_or_by_line_and_scored(reproduced, tmp_path, monkeypatch):
    entry = dict(input="Ann met Bob. Mary went to the garden. ", question="Where is Mary? ", target="garden")
    entries = [entry, entry | dict(target="office")]
    files = []
    for name, content in (
        ("qa1.json", json.dumps(entries)),
        ("qa2.json", "\n".join(map(json.dumps, entries))),
    ):
        (tmp_path / name).write_text(content)
        files.append(str(tmp_path / name))
    heard = []

    def generate(model, tokens, n, temperature):
        heard.extend(map(decode, tokens))
        yield from torch.tensor([[*b"garden.", 256]] * len(tokens)).unbind(1)

    monkeypatch.setattr(lg, "generate", generate)
    run, out = os.path.join(reproduced, "mamba2-echo-base-s0"), str(tmp_path / "out")
    options = ["--out", out, "--device", "cpu", "--data"]
    ev.main(["babilong", "--init", run, *options, *files])
    asked = "Ann met Bob. Mary went to the garden. Where is Mary? "
    assert heard == [asked] * 4

    # few shot: solved examples come before each of them
    heard.clear()
    (tmp_path / "examples.txt").write_text("Bob is in the hall. Where is Bob? hall.\n\n")
    ev.main(["babilong", "--init", run, "--prompt", str(tmp_path / "examples.txt"), *options, files[0]])
    assert heard == ["Bob is in the hall. Where is Bob? hall.\n\n" + asked] * 2
    ev.main(["babilong", "--init", run, *options, *files])
    with open(os.path.join(out, "babilong-files-mamba2-echo-base-s0.json")) as f:
        assert list(json.load(f)["accuracy"].values()) == [0.5, 0.5]
    not_babilong = "qa3.json line 1 cannot be read as a JSON object with input, question, target"
    for bad, sentence in (
        ('[{"input": "x"}]', not_babilong),
        ("7", not_babilong),
        ("[]", "qa3.json is empty"),
        ("", "qa3.json is empty"),
    ):
        (tmp_path / "qa3.json").write_text(bad)
        with pytest.raises(ValueError, match=sentence):
            ev.main(["babilong", "--init", run, *options, str(tmp_path / "qa3.json")])
    with pytest.raises(ValueError, match=r"qa12.json has none of qa1 to qa5 in its name"):
        ev.main(["babilong", "--init", run, *options, "qa12.json"])


@pytest.mark.parametrize("what, titles", [("passkey", 3), ("babilong", 1)])
def test_a_given_checkpoint_is_scored_by_length_on_our_own_passkeys_and_stories(
    what, titles, reproduced, tmp_path, monkeypatch, capsys
):
    run = os.path.join(reproduced, "mamba2-echo-base-s0")
    (tmp_path / "text.txt").write_text("a line of background text\n" * 400)
    monkeypatch.chdir(tmp_path)
    asked = []
    accuracy = lg.accuracy

    def all_right_in_T(model, tokens, part):
        asked.append(tokens.shape)
        right = accuracy(model, tokens, part)
        return torch.where(right.isnan(), right, float(tokens.shape[1] == 161))

    monkeypatch.setattr(lg, "accuracy", all_right_in_T)
    sizes = "--T 160 --windows 5 --rows 3 --data text.txt --device cpu"
    ev.main([what, "--init", run, *sizes.split()])
    assert [shape for shape in asked] == [
        (3, 160 * length + 1) for length in (1, 2, 4) for _ in range(titles)
    ]
    with open(f"runs/{what}-mamba2-echo-base-s0.json") as f:
        measured = json.load(f)
    assert measured["x"] == [1, 2, 4] and measured["T"] == 160
    assert list(measured["values"].values()) == [[1, 0, 0]] * titles
    assert os.path.exists(f"runs/{what}-mamba2-echo-base-s0.png")
    assert "1.000  0.000  0.000" in capsys.readouterr().out


def test_the_name_of_a_published_babilong_file_tells_its_task_whatever_its_folder_is_called(
    reproduced, tmp_path, monkeypatch
):
    folder = tmp_path / "data" / "qa5-run"
    os.makedirs(folder)
    # a room is an answer of qa1; in qa5 it is none of the labels
    entry = dict(input="Mary went to the garden.", question="Where is Mary?", target="garden")
    (folder / "qa1_0k.json").write_text(json.dumps([entry]))
    (folder / "qa12.json").write_text(json.dumps([entry]))
    scored = []
    score = lg.babilong_score
    monkeypatch.setattr(lg, "babilong_score", lambda *args: scored.append(args) or score(*args))
    monkeypatch.setattr(lg, "generate", lambda *args: torch.tensor([*b"garden."])[:, None])
    run, out = os.path.join(reproduced, "mamba2-echo-base-s0"), str(tmp_path / "out")
    options = ["--init", run, "--out", out, "--device", "cpu", "--data"]
    ev.main(["babilong", *options, str(folder / "qa1_0k.json")])
    assert [qa for *_, qa in scored] == [1]
    with open(os.path.join(out, "babilong-files-mamba2-echo-base-s0.json")) as f:
        assert list(json.load(f)["accuracy"].values()) == [1]
    with pytest.raises(ValueError, match=r"qa12\.json has none of qa1 to qa5 in its name"):
        ev.main(["babilong", *options, str(folder / "qa12.json")])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["babilong", "--init", "RUN"], "babilong needs a T of at least 128, got 50"),
        (
            ["text", "--model", "gla"],
            r"no finished run of gla on mixed, make it with: python eval.py reproduce",
        ),
        (["nonsense"], "unknown figure 'nonsense', expected reproduce, sample or poswise"),
        (["effrem", "--data", "x"], "--data needs --init RUN"),
        (["--temperature", "nan"], "--temperature: must lie between 0 and 1000000.0, got nan"),
        (["sample"], "sample needs --init RUN"),
        (["effrem", "--rows", "3"], "--rows needs --init RUN"),
        (["passkey", "--init", "RUN", "--task", "text"], "--task goes with poswise, got 'passkey'"),
        (["effrem", "--init", "x"], "--init RUN goes with one of poswise, .* got 'effrem'"),
        (["--seeds", "0"], "--seeds: must lie between 1 and 100000000, got 0"),
        (["poswise", "--init", "nowhere"], "no checkpoint at 'nowhere'"),
    ],
)
def test_bad_input_is_one_sentence_with_the_remedy(reproduced, toys, arguments, sentence):
    run = os.path.join(reproduced, "mamba2-echo-base-s0")
    arguments = [run if word == "RUN" else word for word in arguments]
    with pytest.raises((ValueError, OSError), match=sentence) as error:  # run_command prints either
        ev.main([*arguments, "--out", reproduced, "--device", "cpu"])
    assert "\n" not in str(error.value)


DEEP = "[" * 10**5


@pytest.mark.parametrize(
    "name, spoil",
    [
        ("results.json", lambda whole: whole[: len(whole) // 2]),
        ("results.json", lambda whole: DEEP),
        ("state_growth.json", lambda whole: whole[: len(whole) // 2]),
        ("state_growth.json", lambda whole: DEEP),
        ("state_growth.json", lambda whole: whole.replace("made_from", "made_by")),
        ("state_growth.json", lambda whole: "[1]"),
    ],
)
def test_a_damaged_file_of_results_is_named_in_one_sentence_and_kept(reproduced, toys, name, spoil):
    file = next(iter(pathlib.Path(reproduced).rglob(name)))
    whole = file.read_text()
    file.write_text(spoil(whole))
    try:
        with pytest.raises(ValueError, match=f"{name} cannot be read as .*; remove the file to ") as caught:
            ev.main(["state", "--out", reproduced, "--device", "cpu"])
        assert "\n" not in str(caught.value)
        assert file.read_text() == spoil(whole)
    finally:
        file.write_text(whole)


def test_a_figure_without_its_runs_ends_with_exit_code_2_and_the_command(tmp_path):
    script = os.path.join(os.path.dirname(HERE), "eval.py")
    command = [sys.executable, script, "passkey", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no finished run of mamba2") and "eval.py reproduce" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
