"""Rows read the text as they say, tasks are their pictures."""

import json
import re
import zlib

import numpy as np
import pytest
import torch

import lengthgen as lg

BOS, SEP = 256, 257  # of the byte tokenizer


def small(text="0123456789" * 10):
    tokens = np.array([BOS, *text.encode()], dtype=np.uint16)
    return lg.Corpus("small", tokens, tokens, 256)


# --------------------------------------------------------------------------------------------------
# Rows


def test_rows_wrap_around_at_the_end_of_the_text():
    rows = lg.Rows(small("abcdefghi"), "train", 1, True, seed=0)  # 10 tokens with <bos>
    rows.at = torch.tensor([4])
    taken = [rows.next_batch(4, overlap=1)[0].tolist() for _ in range(4)]
    text = [BOS, *b"abcdefghi"]
    assert taken == [text[4:8], text[0:4], text[3:7], text[6:10]]


def test_rows_reach_every_place_of_the_text_and_no_other():
    rows = lg.Rows(small("abcdefghi"), "train", 500, False, seed=0)
    firsts = rows.next_batch(4)[:, 0]
    assert set(firsts.tolist()) == {BOS, *b"abcdef"}
    assert not np.array_equal(firsts, rows.next_batch(4)[:, 0])  # and draws anew each time
    assert lg.Rows(small("abc"), "train", 2, False, seed=0).next_batch(4).tolist() == [[BOS, *b"abc"]] * 2


def test_rows_of_a_text_that_is_too_short_say_so():
    with pytest.raises(ValueError, match="the text has 4 tokens, shorter than the 5 that are needed"):
        lg.Rows(small("abc"), "train", 2, False, seed=0).next_batch(5)


def test_pieces_inside_documents_cross_no_boundary_from_any_place():
    """From each place: the next n tokens without a boundary, found by trying place after place."""
    tokens = np.array([BOS, 1, 2, BOS, BOS, 3, 4, 5, 6, BOS, 7, BOS, 8, 9, 10, BOS])
    corpus = lg.Corpus("documents", tokens, tokens, 256)
    for n in (1, 2, 3, 4):
        for place in range(len(tokens)):
            rows = lg.Rows(corpus, "train", 1, True, seed=0)
            rows.at = torch.tensor([place])
            taken = rows.next_batch(n, inside_document=True)[0].tolist()
            for at in [*range(place, len(tokens)), *range(place)]:
                wanted = tokens[at : at + n].tolist()
                if len(wanted) == n and BOS not in wanted:
                    break
            assert taken == wanted and rows.at[0] == at + n
    with pytest.raises(ValueError, match="no document of the text has the 5 tokens that are needed"):
        lg.Rows(corpus, "train", 3, True, seed=0).next_batch(5, inside_document=True)


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("task", ["text", "echo", "mixed", "copy"])
def test_rows_go_on_from_their_saved_state_bit_for_bit(task, continues):
    function, T = lg.TASKS[task][0], 64
    rows = lg.Rows(small("0123456789" * 50), "train", 3, continues, seed=0)
    function(rows, T)
    saved = (rows.rng.get_state(), rows.at)
    wanted = [function(rows, T) for _ in range(3)]
    other = lg.Rows(small("0123456789" * 50), "train", 3, continues, seed=1)
    other.rng.set_state(saved[0])
    other.at = saved[1]
    for (tokens, part), (other_tokens, other_part) in zip(
        wanted, [function(other, T) for _ in range(3)], strict=True
    ):
        assert np.array_equal(tokens, other_tokens) and np.array_equal(part, other_part)


# --------------------------------------------------------------------------------------------------
# Tasks: windows are the pictures in their docstrings


def window(task, T, text, continues=True, at=1, B=1):
    rows = lg.Rows(small(text), "train", B, continues, seed=0)
    rows.at = torch.full((B,), at)
    tokens, part = task(rows, T)
    assert tokens.shape == (B, T + 1) and part.shape == (B, T) and tokens.dtype == np.int64
    names = {BOS: "<bos>", SEP: "<sep>"}
    return [names.get(t) or chr(t) for t in tokens[0]], part[0].tolist(), rows


def test_text_is_a_window_of_text():
    tokens, part, _ = window(lg.text, 9, "import os and more")
    assert "".join(tokens) == "import os " and part == [1] * 9


def test_echo_is_its_picture():
    tokens, part, _ = window(lg.echo, 8, "abcdefghijkl", at=4)
    assert tokens[:-1] == "<bos> d e f <sep> d e f".split()
    assert tokens[1:] == "d e f <sep> d e f <bos>".split()
    assert part == [1, 1, 1, 0, 2, 2, 2, 0]


@pytest.mark.parametrize("T", [-2, 0, 2, 3, 51])
def test_echo_needs_an_even_length(T):
    with pytest.raises(ValueError, match=f"echo needs an even T of at least 4, got {T}"):
        window(lg.echo, T, "abcdefghijkl")


def test_half_of_the_rows_of_mixed_are_echo_and_the_others_text_that_begins_anywhere():
    text = "".join(chr(33 + i % 90) for i in range(900))
    rows = lg.Rows(small(text), "train", 2000, False, seed=0)
    tokens, part = lg.mixed(rows, 32)
    is_echo = tokens[:, 16] == SEP
    assert abs(is_echo.mean() - 0.5) < 5 * (0.25 / 2000) ** 0.5
    assert (tokens[is_echo][:, [0, -1]] == BOS).all()
    assert (tokens[is_echo, 1:16] == tokens[is_echo, 17:32]).all()
    assert (part[is_echo] == np.repeat([1, 0, 2, 0], [15, 1, 15, 1])).all()
    assert (part[~is_echo] == 1).all()
    places = [text.find("".join(map(chr, row))) for row in tokens[~is_echo] if row[0] != BOS]
    assert min(places) >= 0 and len(set(np.array(places) % 90)) == 90  # contiguous, from everywhere


def test_rows_of_mixed_that_continue_go_on_after_what_they_have_read():
    corpus = lg.Corpus("numbers", np.arange(10_000), np.arange(10_000), 20_000)
    rows = lg.Rows(corpus, "train", 8, True, seed=0)
    rows.at = torch.arange(8) * 100
    expected, kinds = np.arange(8) * 100, set()
    for _ in range(30):
        tokens, _ = lg.mixed(rows, 10)  # passages of 4
        is_echo = tokens[:, 5] == corpus.sep
        assert (np.where(is_echo, tokens[:, 1], tokens[:, 0]) == expected).all()
        expected = np.where(
            is_echo, expected + 4, expected + 10
        )  # the last token of a window is the next first
        kinds |= set(is_echo.tolist())
    assert kinds == {True, False}


def test_copy_is_its_picture_to_the_letter():
    """$, 5 to 20 uniform lower-case letters, |, the same letters, a stop; what is cut off does not count."""
    rows = lg.Rows(small(), "train", 300, False, seed=0)
    tokens, part = lg.copy(rows, 200)
    lengths, letters = [], []
    for row, row_part in zip(tokens, part, strict=True):
        line = "".join(map(chr, row))
        assert line[-1] == "$"  # opens the next window
        t = 0
        while t < 200:
            assert line[t] == "$"
            end = min(line.find("|", t) if "|" in line[t:200] else 200, 200)
            string = line[t + 1 : end]
            episode = f"${string}|{string}."
            assert line[t:200].startswith(episode) or episode.startswith(line[t:200])
            wanted = [0] * (200 - t)
            if line[t:200].startswith(episode):
                wanted = [0] * (len(string) + 1) + [1] * len(string) + [2, 0]
                lengths.append(len(string))
                letters += string
            assert row_part[t : t + len(wanted)].tolist() == wanted
            t += len(episode)
    assert set(lengths) == set(range(5, 21))
    assert set(letters) == set("abcdefghijklmnopqrstuvwxyz")
    counts = np.unique(letters, return_counts=True)[1]
    assert counts.max() < 1.2 * counts.min()  # uniform: some 1500 of each, five standard errors are 13 %


def test_copy_needs_room_for_the_longest_string():
    with pytest.raises(ValueError, match="copy needs a T of at least 43, the longest string twice, got 42"):
        window(lg.copy, 42, "abc")
    assert all(lg.copy(lg.Rows(small(), "train", 1, True, seed=s), 43)[1].any() for s in range(200))


@pytest.mark.parametrize("name", ["text", "echo"])
def test_windows_join_into_one_stream(name):
    """Every window but the last loses its last token, which opens the next one; its target is still there."""
    function, T = lg.TASKS[name][0], 32
    text = "".join(chr(33 + i % 90) for i in range(700))
    tokens, part = lg.stream(function, lg.Rows(small(text), "train", 3, True, seed=0), T, 5)
    assert tokens.shape == (3, 5 * T + 1) and part.shape == (3, 5 * T)
    rows = lg.Rows(small(text), "train", 3, True, seed=0)
    for i in range(5):
        window_tokens, window_part = function(rows, T)
        assert np.array_equal(tokens[:, i * T : (i + 1) * T + 1], window_tokens)
        assert np.array_equal(part[:, i * T : (i + 1) * T], window_part)


def test_a_stream_of_text_is_the_text():
    text = "Loss by position, streamed from a zero state on held-out text."
    rows = lg.Rows(small(text), "train", 2, True, seed=0)
    rows.at = torch.tensor([1, 11])
    tokens, _ = lg.stream(lg.text, rows, 7, 6)
    assert [bytes(row.tolist()).decode() for row in tokens] == [text[:43], text[10:53]]


@pytest.mark.parametrize("name", lg.TASKS)
def test_defaults_fit_their_tasks_and_parts_are_named(name):
    function, T, parts, _ = lg.TASKS[name]
    tokens, part = function(lg.Rows(small("0123456789" * 100), "train", 4, False, seed=0), T)
    assert tokens.shape == (4, T + 1)
    assert set(np.unique(part)) - {0} == set(range(1, len(parts) + 1))
    assert torch.from_numpy(tokens).max() < 258


# --------------------------------------------------------------------------------------------------
# Streams of a text that is too short


def numbers(N):
    return lg.Corpus("numbers", np.arange(N), np.arange(N), 20_000)


@pytest.mark.parametrize("name", ["text", "echo", "mixed"])
@pytest.mark.parametrize("N", [40, 300, 1000])
def test_a_stream_ends_where_a_row_would_read_the_text_a_second_time(name, N):
    T = 16
    for seed in range(10):
        tokens, part = lg.stream(lg.TASKS[name][0], lg.Rows(numbers(N), "val", 3, True, seed), T, 200)
        windows = part.shape[1] // T
        assert tokens.shape == (3, windows * T + 1) and part.shape == (3, windows * T) and windows < 200
        for row, row_part in zip(tokens, part, strict=True):
            read = row[1:][row_part == 1]  # in order; each passage of echo is part 1 only once
            read = read[read < 20_000]  # no <bos>
            # where mixed goes from text to echo, the target that ends a window also begins the passage
            read = read[np.append(True, np.diff(read) != 0)]
            assert len(set(read.tolist())) == len(read)
        # no shorter than it must be: what the rows skip at the end of the text, and a window or two
        longest_read = max((row_part == 1).sum() for row_part in part)
        assert longest_read > N - 4 * T


@pytest.mark.parametrize("name, T", [("copy", 64), ("passkey", 160)])
def test_a_stream_of_a_task_that_reads_no_text_has_any_length(name, T):
    tokens, part = lg.stream(lg.TASKS[name][0], lg.Rows(small("abc"), "val", 2, True, 0), T, 30)
    assert tokens.shape == (2, 30 * T + 1) and part.shape == (2, 30 * T)


# --------------------------------------------------------------------------------------------------
# In bytes all tasks are what they were in the first edition

LINES = "".join(f"line {i} of the text: {i * i}\n" + "\n" * (i % 7 == 0) for i in range(400))
# Made once by these very tests in the first edition, the last commit before tasks took any tokenizer:
# of rows of 4, passkey by seed, T and depth, babilong by seed and T; of 20 windows of 3 rows, by seed
# (passkey: the same tokens, of which since then only the answer counts)
FIRST_EDITION = dict(passkey=420495177, babilong=3788606655)
FIRST_EDITION_STREAMS = {
    ("text", 16): 550096850,
    ("echo", 16): 3116289031,
    ("mixed", 16): 2951067636,  # since then without the targets of the test below
    ("copy", 64): 468798018,
    ("passkey", 160): 364899348,
    ("babilong", 144): 4207582474,
}


def checksum(windows):
    number = 0
    for tokens, part in windows:
        assert tokens.dtype == np.int64 and part.dtype == np.int8
        number = zlib.crc32(part.tobytes(), zlib.crc32(tokens.tobytes(), number))
    return number


def test_nothing_in_passkey_continues_so_tbtt_is_state_passing():
    batches = []
    for continues in (False, True):
        rows = lg.Rows(small(), "train", 3, continues, seed=0)
        batches.append([lg.passkey(rows, 160) for _ in range(2)])
    for (tokens, part), (same_tokens, same_part) in zip(*batches, strict=True):
        assert np.array_equal(tokens, same_tokens) and np.array_equal(part, same_part)


def test_passkey_and_babilong_in_bytes_are_those_of_the_first_edition():
    corpus = small(LINES)
    keys, stories = [], []
    for seed in (0, 1, 2):
        for T in (103, 160, 1000):
            for depth in (None, 0, 0.7, 1):
                keys.append(lg.passkey(lg.Rows(corpus, "val", 4, False, seed), T, depth))
        for T in (128, 144, 1000):
            stories.append(lg.babilong(lg.Rows(corpus, "val", 4, False, seed), T))
    assert dict(passkey=checksum(keys), babilong=checksum(stories)) == FIRST_EDITION


@pytest.mark.parametrize("name, T", FIRST_EDITION_STREAMS)
def test_a_stream_is_that_of_the_first_edition_where_the_text_suffices(name, T):
    streams = []
    for seed in (0, 1, 2):
        rows = lg.Rows(small(LINES), "val", 3, True, seed)
        streams.append(lg.stream(lg.TASKS[name][0], rows, T, 20))
    assert checksum(streams) == FIRST_EDITION_STREAMS[name, T]


def test_a_stream_of_mixed_counts_no_target_but_those_of_its_windows():
    """After a window of text the next one may begin with a border, which the text does not go on with."""
    windows = []

    def recorded(rows, T):
        tokens, part = lg.mixed(rows, T)
        windows.append((tokens.copy(), part.copy()))
        return tokens, part

    tokens, part = lg.stream(recorded, lg.Rows(small(LINES), "val", 3, True, 0), 16, 20)
    targets = np.concatenate([window[:, 1:] for window, _ in windows], 1)
    counted = np.concatenate([window_part for _, window_part in windows], 1)
    joins = tokens[:, 1:] != targets
    assert joins.any() and not part[joins].any()
    assert (part[~joins] == counted[~joins]).all()


# --------------------------------------------------------------------------------------------------
# passkey and babilong in any tokenizer

PROSE = "".join(
    f"It was the {word} of naïve times in the garden; the key passed back again, {word} and blue.\n"
    for word in "first second third fourth fifth sixth seventh eighth ninth tenth".split()
)


def byte_level(file):
    """Like GPT-NeoX's: byte-level BPE, a space belongs to the word behind it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE, lg.FILLER, "Mary went to the garden. 12345 307"], trainer)
    tokenizer.save(str(file))


def sentencepiece_like(file):
    """Like Llama's: spaces are "▁", one is put in front; what PROSE has not, digits above all, are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.train_from_iterator([PROSE], trainers.BpeTrainer(vocab_size=150, show_progress=False))
    trained = json.loads(words.to_str())["model"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += [word for word in trained["vocab"] if word != "\n"]
    merges = [tuple(pair) for pair in trained["merges"] if "\n" not in "".join(pair)]
    vocabulary = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(file))


TOKENIZERS = {"bytes": None, "byte-level": byte_level, "sentencepiece-like": sentencepiece_like}


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_corpus(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "prose.txt").write_text(PROSE * 40, encoding="utf-8")
    name = "bytes"
    if request.param != "bytes":
        pytest.importorskip("tokenizers", reason="tokenizers is not installed, which reads these files")
        TOKENIZERS[request.param](folder / "tokenizer.json")
        name = str(folder / "tokenizer.json")
    return lg.load_corpus([folder / "prose.txt"], name)


def read(corpus, tokens):
    """The text of tokens, with single spaces."""
    return re.sub(" +", " ", corpus.decode(tokens.tolist())).strip()


@pytest.mark.parametrize("T", [160, 161, 700])
@pytest.mark.parametrize("depth", [None, 0, 0.4, 1])
def test_passkey_fills_the_window_in_any_tokenizer(any_corpus, T, depth):
    corpus = any_corpus
    tokens, part = lg.passkey(lg.Rows(corpus, "val", 6, False, seed=T), T, depth)
    assert tokens.shape == (6, T + 1) and part.shape == (6, T)
    filler = lg.FILLER * (T // 20)
    for row, row_part in zip(tokens, part, strict=True):
        assert np.flatnonzero(row == corpus.bos).tolist() == [0, T]
        text = read(corpus, row[1:T])
        before, key, after = re.fullmatch(
            r"(.*?) ?The pass key is (\d{5})\. Remember it\. \2 is the pass key\. ?"
            r"(.*?) ?What is the pass key\? The pass key is \2",
            text,
        ).groups()
        assert filler.startswith(before) and filler.startswith(after)
        if depth is not None:
            assert bool(before) == (depth != 0) and bool(after) == (depth != 1)
        assert read(corpus, row[1:][row_part == 1]) == key
        places = np.flatnonzero(row_part)
        assert places.tolist() == list(range(places[0], T - 1))  # the answer, then <bos>


def test_passkey_says_which_T_it_needs_in_any_tokenizer(any_corpus):
    rows = lg.Rows(any_corpus, "val", 1, False, seed=0)
    with pytest.raises(ValueError, match="passkey needs a T of at least") as caught:
        lg.passkey(rows, 4)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    assert lg.passkey(lg.Rows(any_corpus, "val", 1, False, seed=0), least)[1].any()
    with pytest.raises(ValueError, match=f"passkey needs a T of at least {least}, got {least - 1}"):
        lg.passkey(lg.Rows(any_corpus, "val", 1, False, seed=0), least - 1)


@pytest.mark.parametrize("T", [144, 145, 1000])
def test_babilong_fills_the_window_in_any_tokenizer(any_corpus, T):
    corpus = any_corpus
    tokens, part = lg.babilong(lg.Rows(corpus, "train", 12, False, seed=T), T)
    assert tokens.shape == (12, T + 1) and part.shape == (12, T)
    fact = rf"(?:{'|'.join(lg.ACTORS)}) (?:{'|'.join(lg.MOVE)}) to the \w+\."
    prose = "".join((PROSE * 40).split())
    between_lines = 0
    for row, row_part in zip(tokens, part, strict=True):
        assert np.flatnonzero(row == corpus.bos).tolist() == [0, T]
        text = read(corpus, row[1:T])
        background, asked, answer = re.fullmatch(r"(.*) ?(Where is (?:\w+)\?) (\w+)\.", text, re.S).groups()

        # three facts, of which the last one about the person answers the question
        facts = re.findall(fact, background)
        told = [f for f in facts if f.startswith(asked[len("Where is ") : -1])]
        assert len(facts) == 3 and told[-1].endswith(f" to the {answer}.")
        assert read(corpus, row[1:][row_part == 1]) == f"{answer}."
        places = np.flatnonzero(row_part)
        assert places[-1] == T - 2 and places[-1] - places[0] == len(places) - 1

        # facts stand after the end of a line, after each other, or after all of the background
        pieces = re.split(fact, background)
        for i in range(3):
            ends_here = not "".join(pieces[i + 1 :]).strip(" ")
            begins_here = not "".join(pieces[: i + 1]).strip(" ")
            after_fact = not pieces[i].strip(" ")
            assert pieces[i].rstrip(" ").endswith("\n") or ends_here or begins_here or after_fact
            between_lines += pieces[i].rstrip(" ").endswith("\n") and not ends_here
        # the rest is contiguous text
        rest = "".join("".join(pieces).split())
        assert rest.strip("\ufffd") in prose  # the cut may go through a character
    assert between_lines > 0
