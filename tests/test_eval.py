"""eval.py and the paper's measures: scorers by hand, closed forms, every figure end to end at toy size."""

import dataclasses
import json
import os
import re
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

    def __call__(self, tokens, state=None):
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
    tokens = torch.tensor([[5, 5, 6, 6, 6]])
    right = lg.accuracy(model, tokens, torch.tensor([[1, 2, 0, 1]]))
    assert right[0, :2].tolist() == [1, 0] and right[0, 2].isnan() and right[0, 3] == 1


def test_generation_is_greedy_at_zero_temperature_and_keeps_to_the_top_k():
    torch.manual_seed(0)
    model = lg.LanguageModel(lg.ModelConfig(vocab_size=258, d_model=16, n_layer=1, d_state=8, headdim=8))
    prompt = torch.from_numpy(letters(2, 9))
    tokens = prompt
    for token in lg.generate(model, prompt, 6):
        likeliest = model(tokens)[0][:, -1].argmax(-1)
        assert torch.equal(token, likeliest)
        tokens = torch.cat([tokens, token[:, None]], 1)
    top = model(prompt)[0][:, -1].topk(3).indices
    for seed in range(20):
        torch.manual_seed(seed)
        (token,) = lg.generate(model, prompt, 1, temperature=5.0, top_k=3)
        assert (token[:, None] == top).any(1).all()


# --------------------------------------------------------------------------------------------------
# Tasks and their scorers


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    words = np.array(["import", "def", "x", "return", "self", "0", "(", ")\n", "for", "in\n"])
    text = " ".join(rng.choice(words, 60_000)).encode()
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    return lg.Corpus("words drawn by a test", tokens[:-20_000], tokens[-20_000:], 256)


def test_the_passkey_is_asked_for_at_the_end_and_hidden_at_its_depth(corpus):
    for depth in (0, 0.5, 1):
        tokens, part = lg.passkey(lg.Rows(corpus, "val", 8, False, 0), 300, depth)
        for row, mask in zip(tokens, part, strict=True):
            assert row[0] == row[-1] == corpus.bos and len(row) == 301
            text = lg.decode(row)
            key = re.search(r"The pass key is (\d{5})\. Remember it", text)[1]
            assert text.endswith(f"What is the pass key? The pass key is {key}")
            assert lg.decode(row[1:][mask == 1]) == key + key  # second and third mention, nothing else
            assert abs(text.index("The pass key is") - depth * (300 - 1 - 59 - 43)) <= 1
    rows = lg.Rows(corpus, "val", 64, False, 0)
    keys = {lg.decode(row[-6:-1]) for row in lg.passkey(rows, 160)[0]}
    assert len(keys) > 60  # drawn anew in each row


@pytest.mark.parametrize(
    "said, score",
    [(None, 1), ("00000", 0), (" {key}", 0), ("", 0), ("{key}9", 1)],
    ids=["right", "wrong", "late", "nothing", "right and more"],
)
def test_a_passkey_counts_when_its_five_digits_come_first(corpus, monkeypatch, said, score):
    expected = lg.passkey(lg.Rows(corpus, "val", 3, False, 0), 160, 0.5)[0][:, 155:160]

    def generate(model, tokens, n):
        assert tokens.shape == (3, 155)  # the answer is not in the prompt
        rows = expected
        if said is not None:
            texts = [said.format(key=lg.decode(key)).ljust(n, "x")[:n] for key in expected]
            rows = np.array([list(t.encode()) for t in texts])
        yield from torch.tensor(rows[:, :n]).unbind(1)

    monkeypatch.setattr(lg, "generate", generate)
    assert lg.passkey_accuracy(None, corpus, 160, 0.5, 3) == score


@pytest.mark.parametrize(
    "output, answer, question, qa, right",
    [
        ("garden. And more", "garden", "Where is Mary?", 1, True),
        ("The GARDEN", "garden", "Where is Mary?", 1, True),
        ("office.", "garden", "Where is Mary?", 1, False),
        ("garden or office.", "garden", "Where is Mary?", 1, False),
        ("kitchen, before that the garden.", "garden", "Where was the milk before the kitchen?", 3, True),
        ("I see. garden", "garden", "Where is Mary?", 1, False),
        ("", "garden", "Where is Mary?", 1, False),
        ("milk", "milk", "What did Bill give to Fred?", 5, True),
        ("Bill gave it to Mary", "Mary", "Who did Bill give the milk to?", 5, True),
        ("Jeff gave it to Mary", "Mary", "Who did Bill give the milk to?", 5, False),
    ],
    ids="right capitals wrong two label-in-question after-stop nothing object person two-people".split(),
)
def test_babilong_scores_the_only_label_before_the_stop(output, answer, question, qa, right):
    assert lg.babilong_score(output, answer, question, qa) == right


def solve(facts, question):
    """Read a story as a child would: an independent answer to check the generator's."""
    place, holder, trail, gift = {}, {}, {}, ()
    beside = {}
    for fact in facts:
        words = fact.rstrip(".").removesuffix(" there").split()
        if match := re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact):
            a, direction, b = match.groups()
            back = dict(north="south", south="north", east="west", west="east")[direction]
            beside[direction, b], beside[back, a] = a, b
        elif words[-1] in lg.ROOMS:
            place[words[0]] = words[-1]
            for o, x in holder.items():
                if x == words[0]:
                    trail[o].append(words[-1])
        elif words[-2] == "to":
            gift = words[0], words[-3], words[-1]
            holder[words[-3]] = words[-1]
        else:
            took = any(f" {verb} " in fact for verb in lg.WORDS["take"])
            holder[words[-1]] = words[0] if took else None
            trail.setdefault(words[-1], [place[words[0]]])
    words = question.rstrip("?").split()
    if question.startswith("Where is the"):
        return trail[words[3]][-1]
    if question.startswith("Where is"):
        return place[words[2]]
    if question.startswith("Where was"):
        assert trail[words[3]][-1] == words[-1]
        return trail[words[3]][-2]
    if beside:  # "What is north of the L?" or "What is the L north of?"
        d = next(w for w in words if w in lg.OPPOSITE)
        return beside[d, words[-1]] if words[-1] in lg.ROOMS else beside[lg.OPPOSITE[d], words[3]]
    giver, thing, taker = gift
    return thing if words[0] == "What" else giver if words[1] == "gave" else taker


@pytest.mark.parametrize("qa", range(1, 6))
def test_babi_stories_have_the_answer_that_a_reader_finds(qa):
    rng = torch.Generator().manual_seed(qa)
    answers = set()
    for _ in range(200):
        facts, question, answer = lg.babi(qa, rng)
        assert solve(facts, question) == answer, (facts, question)
        answers.add(answer)
    assert answers <= set(lg.ROOMS if qa < 5 else lg.ACTORS[5] + lg.OBJECTS) and len(answers) >= 6


def test_babilong_keeps_the_facts_in_order_and_ends_with_the_answer(corpus):
    tokens, part = lg.babilong(lg.Rows(corpus, "val", 32, False, 0), 1000, qa=1)
    for row, mask in zip(tokens, part, strict=True):
        assert row[0] == row[-1] == corpus.bos and len(row) == 1001
        text = lg.decode(row)
        facts = [m[0] for m in re.finditer(r"(Daniel|John|Mary|Sandra) [a-z ]+ to the \w+\.", text)]
        question, answer = re.search(r"(Where is \w+\?) (\w+)\.$", text).groups()
        assert len(facts) == lg.EVENTS[1] and solve(facts, question) == answer
        assert lg.decode(row[1:][mask == 1]) == f"{answer}."


def test_babilong_accuracy_is_one_for_the_right_answer_and_zero_for_silence(corpus, monkeypatch):
    windows = lg.babilong(lg.Rows(corpus, "val", 6, False, 0), 256, 1)[0]
    texts = [lg.decode(row) for row in windows]

    def generate(model, tokens, n, say=True):
        answers = [
            next(t for t in texts if t.startswith(lg.decode(row)))[len(lg.decode(row)) :] for row in tokens
        ]
        rows = [list((a if say else "").ljust(n, "x")[:n].encode()) for a in answers]
        yield from torch.tensor(rows).unbind(1)

    monkeypatch.setattr(lg, "generate", generate)
    asked = lg.babilong_prompts(corpus, 256, 1, 6)
    assert lg.babilong_accuracy(None, *asked, 1) == 1
    monkeypatch.setattr(lg, "generate", lambda *args: generate(*args, say=False))
    assert lg.babilong_accuracy(None, *asked, 1) == 0


def test_copy_makes_one_string_of_any_length(corpus):
    tokens, part = lg.copy(lg.Rows(corpus, "val", 4, False, 0), 2 * 33 + 3, 33, 33)
    for row, mask in zip(tokens, part, strict=True):
        string = lg.decode(row[1:34])
        assert lg.decode(row) == f"${string}|{string}.$" and lg.decode(row[1:][mask == 1]) == f"{string}."


def test_tasks_of_bytes_refuse_other_vocabularies(corpus):
    rows = lg.Rows(dataclasses.replace(corpus, words=50257), "val", 2, False, 0)
    for task in (lg.passkey, lg.babilong):
        with pytest.raises(ValueError, match="--tokenizer bytes"):
            task(rows, 256)
    with pytest.raises(ValueError, match="at least 103"):
        lg.passkey(lg.Rows(corpus, "val", 2, False, 0), 90)


# --------------------------------------------------------------------------------------------------
# eval.py end to end, at sizes that take seconds

TOY_MODEL = dict(
    mamba2=dict(d_model=16, n_layer=1, d_state=8, headdim=8), gla=dict(d_model=16, n_layer=1, num_heads=2)
)
TOY = {
    name: dataclasses.replace(e, both=f"{e.both} --batch 2", base="--steps 2", after="--steps 2")
    for name, e in ev.TINY.items()
}
TOY_MEASURES = {
    "poswise": dict(rows=2, windows=80),
    "gap": dict(rows=2, windows=4),
    "interventions": dict(rows=2, windows=8),
    "sweep": dict(rows=2, windows=8),
    "state": dict(rows=2, windows=4),
    "effrem": dict(rows=16),
    "passkey": dict(rows=2, lengths=(1, 2), depths=(0.1, 0.9)),
    "copying": dict(rows=4, windows=2, letters=(10, 30)),
    "babilong": dict(rows=2, lengths=(1, 2), examples=0),
    "fewshot": dict(rows=2, lengths=(1, 2), examples=2),
}


def make_toys(set_attribute, corpus):
    """Replace the sizes, the text and what train.py ends with; through monkeypatch or setattr."""
    set_attribute(ev, "PRESETS", {"tiny": (TOY, TOY_MEASURES)})
    set_attribute(train, "TINY", TOY_MODEL)
    set_attribute(lg, "load_corpus", lambda *args: corpus)
    # train.py's own table and picture are tested with train.py
    set_attribute(train, "measure", lambda *args: None)
    set_attribute(train, "print_table", lambda results: None)
    set_attribute(train, "draw_position_wise", lambda *args: None)


def modified(out):
    """{file: when it was written} of what must not be made twice."""
    files = [os.path.join(d, f) for d, _, fs in os.walk(out) for f in fs]
    return {f: os.stat(f).st_mtime_ns for f in files if re.search(r"checkpoint\.pt$|eval-.*\.json$", f)}


@pytest.fixture(scope="module")
def reproduced(corpus, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("reproduced") / "runs")
    with pytest.MonkeyPatch.context() as patch:
        make_toys(patch.setattr, corpus)
        ev.main(["reproduce", "--out", out, "--device", "cpu"])
    return out


@pytest.fixture
def toys(monkeypatch, corpus):
    make_toys(monkeypatch.setattr, corpus)


def test_reproduce_draws_every_figure_and_keeps_every_number(reproduced):
    with open(os.path.join(reproduced, "results.json")) as f:
        results = json.load(f)["mamba2"]
    assert list(results) == list(ev.FIGURES)
    for name, result in results.items():
        with open(os.path.join(reproduced, "figures", f"mamba2-{name}.png"), "rb") as f:
            assert f.read(8) == b"\x89PNG\r\n\x1a\n"
        assert result["summary"] and all(isinstance(x, float) for x in result["summary"].values())
        assert result["command"].startswith(f"python eval.py {name}")
        for measurement in result["measurements"].values():
            assert {
                "value",
                "settings",
                "seed",
                "trained",
                "command",
                "versions",
                "made",
            } <= measurement.keys()


def test_a_second_reproduce_and_a_redraw_make_nothing_again(reproduced, toys, capsys):
    before = modified(reproduced)
    ev.main(["reproduce", "--out", reproduced, "--device", "cpu"])
    ev.main(["--out", reproduced, "--device", "cpu"])
    assert modified(reproduced) == before
    assert "left out" not in capsys.readouterr().out


def test_a_retrained_run_is_measured_again(reproduced, toys):
    checkpoint = os.path.join(reproduced, "mamba2-echo-base-s0", "checkpoint.pt")
    measured = os.path.join(reproduced, "mamba2-echo-base-s0", "eval-effrem.json")
    os.utime(checkpoint)
    before = modified(reproduced)
    ev.main(["effrem", "--out", reproduced, "--device", "cpu"])
    changed = {f for f, when in modified(reproduced).items() if when != before[f]}
    assert changed == {measured}


def test_a_figure_is_drawn_from_the_runs_that_are_there(toys, tmp_path, capsys):
    out = str(tmp_path / "runs")
    train.main(
        ["--intervention", "state_passing", "--steps", "2", "--batch", "2", "--out", out, "--device", "cpu"]
    )
    ev.main(["--out", out, "--device", "cpu"])
    printed = capsys.readouterr().out
    assert os.path.exists(os.path.join(out, "figures", "mamba2-poswise.png"))
    assert "passkey: left out, no finished run" in printed and "python eval.py reproduce" in printed


CHILD = """
import sys; sys.path[:0] = sys.argv[1:3]
import numpy as np, test_eval as t
t.make_toys(setattr, t.corpus.__wrapped__())
t.ev.main(["reproduce", "effrem", "--out", sys.argv[3], "--device", "cpu"])
"""


def test_killed_and_started_again_reproduce_redoes_nothing_that_was_done(toys, tmp_path):
    out = str(tmp_path / "runs")
    command = [sys.executable, "-c", CHILD, os.path.dirname(HERE), HERE, out]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while len(modified(out)) < 3 and child.poll() is None:
        time.sleep(0.01)
    assert child.poll() is None, child.stderr.read()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    done = {f: when for f, when in modified(out).items() if train.finished(os.path.dirname(f))}
    assert len(done) >= 2
    ev.main(["reproduce", "effrem", "--out", out, "--device", "cpu"])
    after = modified(out)
    assert len(after) > len(done) and {f: after[f] for f in done} == done


def test_the_budget_of_the_tiny_preset_is_under_an_hour():
    runs = [run for group in ev.Lab("runs").planned(ev.TINY).values() for run in group]
    measured = sum(minutes for _, _, minutes in ev.FIGURES.values())
    assert 20 < sum(run.minutes for run in runs) + measured < 60


def test_samples_are_words_after_the_prompt(reproduced, capsys):
    run = os.path.join(reproduced, "mamba2-echo-base-s0")
    options = "--tokens 20 --device cpu --top-k 1000".split()
    arguments = ["sample", "--init", run, "--prompt", "def f(", *options]
    ev.main(arguments)
    said = capsys.readouterr().out
    ev.main(arguments)
    assert "def f(" in said and capsys.readouterr().out == said  # the same seed says the same


def test_any_checkpoint_shows_how_it_breaks(reproduced, toys, tmp_path):
    run, out = os.path.join(reproduced, "mamba2-echo-base-s0"), str(tmp_path / "figure")
    for windows in ("1", "5", "80"):
        options = ["--rows", "2", "--windows", windows, "--out", out, "--device", "cpu"]
        ev.main(["poswise", "--init", run, *options])
        with open(os.path.join(out, "poswise-mamba2-echo-base-s0.json")) as f:
            assert train.octaves(json.load(f))[-1] == int(windows)


def test_an_intervention_that_somebody_adds_is_trained_and_drawn(tmp_path, toys, monkeypatch):
    assert set(lg.INTERVENTIONS) < set(ev.TINY["echo"].kinds)
    monkeypatch.setitem(lg.INTERVENTIONS, "shuffled", (lg.state_passing, False))
    monkeypatch.setitem(TOY, "echo", dataclasses.replace(TOY["echo"], kinds=("base", "shuffled")))
    out = str(tmp_path / "runs")
    ev.main(["reproduce", "interventions", "--out", out, "--device", "cpu"])
    with open(os.path.join(out, "results.json")) as f:
        summary = json.load(f)["mamba2"]["interventions"]["summary"]
    assert "text part, shuffled: loss beyond 4 T" in summary


def test_published_babilong_is_read_as_a_list_or_by_line_and_scored(
    reproduced, tmp_path, monkeypatch, capsys
):
    entry = dict(input="Ann met Bob. Mary went to the garden. ", question="Where is Mary? ", target="garden")
    entries = [entry, entry | dict(target="office")]
    for folder, content in (
        ("qa1", json.dumps(entries)),
        ("qa2", "\n".join(map(json.dumps, entries))),
        ("qa12", "{}"),
    ):
        os.makedirs(tmp_path / "published" / folder)
        (tmp_path / "published" / folder / "0k.json").write_text(content)
    heard = []

    def generate(model, tokens, n):
        heard.extend(map(lg.decode, tokens))
        yield from torch.tensor([[*b"garden.", 256]] * len(tokens)).unbind(1)

    monkeypatch.setattr(lg, "generate", generate)
    run, out = os.path.join(reproduced, "mamba2-echo-base-s0"), str(tmp_path / "out")
    options = ["--out", out, "--device", "cpu", "--data"]
    ev.main(["babilong", "--init", run, *options, str(tmp_path / "published")])
    assert heard == ["Ann met Bob. Mary went to the garden. Where is Mary? "] * 4
    with open(os.path.join(out, "babilong-mamba2-echo-base-s0.json")) as f:
        assert list(json.load(f)["accuracy"].values()) == [0.5, 0.5]
    for bad in ('[{"input": "x"}]', "[]", ""):
        (tmp_path / "qa3.json").write_text(bad)
        with pytest.raises(ValueError, match=r"qa3.json is no list of JSON objects with input"):
            ev.main(["babilong", "--init", run, *options, str(tmp_path / "qa3.json")])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["babilong", "--init", "x"], "babilong of a checkpoint needs --data"),
        (["babilong", "--init", "x", "--data", "nowhere"], "no file with qa1 to qa5 in its path in nowhere"),
        (["effrem", "--model", "gla"], r"no runs of gla under .*: python eval.py reproduce --model gla"),
        (["nonsense"], "unknown figure 'nonsense', expected reproduce, sample or some of poswise"),
        (["effrem", "--data", "x"], "--data goes with --init RUN"),
        (["--temperature", "nan"], "--temperature must be finite and not negative, got nan"),
        (["sample"], "sample needs a checkpoint: give --init"),
        (["effrem", "--init", "x"], "--init goes with one of sample, poswise, babilong, got effrem"),
        (["--seeds", "0"], "--seeds must be positive, got 0"),
        (["poswise", "--init", "nowhere"], "no checkpoint at 'nowhere'"),
    ],
)
def test_bad_input_is_one_sentence_with_the_remedy(reproduced, toys, arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        ev.main([*arguments, "--out", reproduced, "--device", "cpu"])
    assert "\n" not in str(error.value)


def test_a_run_of_another_model_is_refused(reproduced, toys, tmp_path):
    os.makedirs(tmp_path / "runs")
    os.symlink(os.path.join(reproduced, "mamba2-echo-base-s0"), tmp_path / "runs" / "gla-echo-base-s0")
    with pytest.raises(ValueError, match="holds a mamba2, not a gla"):
        os.utime(os.path.join(reproduced, "mamba2-echo-base-s0", "checkpoint.pt"))
        ev.main(["effrem", "--model", "gla", "--out", str(tmp_path / "runs"), "--device", "cpu"])


@pytest.mark.parametrize("name", ["results.json", "mamba2-echo-base-s0/eval-state.json"])
def test_a_cut_off_results_file_is_named_and_kept(reproduced, toys, name):
    file = os.path.join(reproduced, name)
    with open(file) as f:
        whole = f.read()
    with open(file, "w") as f:
        f.write(whole[: len(whole) // 2])
    try:
        with pytest.raises(
            ValueError, match=f"{re.escape(name)} is cut off .* remove it and run python eval.py"
        ):
            ev.main(["state", "--out", reproduced, "--device", "cpu"])
        with open(file) as f:
            assert f.read() == whole[: len(whole) // 2]
    finally:
        with open(file, "w") as f:
            f.write(whole)


def test_a_figure_without_its_runs_ends_with_exit_code_2_and_the_command(tmp_path):
    command = [
        sys.executable,
        os.path.join(os.path.dirname(HERE), "eval.py"),
        "passkey",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no runs of mamba2") and "python eval.py reproduce" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
