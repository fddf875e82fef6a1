"""Text becomes tokens without loss, splits do not depend on place or order, tasks are their pictures."""

import itertools
import json
import os
import pathlib
import shutil
import zlib

import numpy as np
import pytest
import tiktoken
import torch

import lengthgen as lg

BOS, SEP = 256, 257  # of the byte tokenizer


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def documents(tokens):
    """The texts between one <bos> and the next."""
    pieces = np.split(tokens, np.flatnonzero(tokens == BOS))
    assert len(pieces[0]) == 0
    return [bytes(piece[1:].tolist()) for piece in pieces[1:]]


def small(text="0123456789" * 10):
    tokens = np.array([BOS, *text.encode()], dtype=np.uint16)
    return lg.Corpus("small", tokens, tokens, 256)


def held_out(key):
    return zlib.crc32(key.encode()) % 20 == 0


@pytest.fixture
def many(tmp_path):
    """A folder of as many different files as it takes to hold out whole documents."""
    names = [f"{'ab'[i % 2]}/{i}.txt" for i in range(lg.MANY_DOCUMENTS)]
    return write(tmp_path / "many", {name: f"text of {name}" for name in names}), names


# --------------------------------------------------------------------------------------------------
# Corpus


def test_bytes_survive_the_tokenizer():
    text = (
        "plain, Grüße, 漢字, emoji 👩‍👩‍👧, e\u0301, \x00\x1f \r\n\t"
        + " " * 50
        + "".join(map(chr, range(300)))
    )
    tokens = lg.BYTES.encode_to_numpy(text)
    assert tokens.tolist() == list(text.encode())
    assert lg.BYTES.decode(tokens) == text
    every_byte = bytes(range(256))
    assert lg.BYTES.decode_bytes(list(every_byte)) == every_byte


def test_invalid_utf8_and_halves_of_surrogates_are_replaced(tmp_path):
    folder = write(
        tmp_path, {"a.txt": b"good \xff\xc3 bad", "b.jsonl": json.dumps({"text": "half \ud83d pair"})}
    )
    corpus = lg.load_corpus([folder])
    texts = [a + b for a, b in zip(documents(corpus.train), documents(corpus.val), strict=True)]
    assert texts == ["good \ufffd\ufffd bad".encode(), b"half ? pair"]


def test_every_document_starts_with_bos_and_two_special_tokens_follow_the_words(tmp_path):
    corpus = lg.load_corpus([write(tmp_path, {"a": "x" * 30, "b": "y" * 20})])
    assert (corpus.words, corpus.bos, corpus.sep, corpus.vocab_size) == (256, BOS, SEP, 258)
    assert documents(corpus.train) == [b"x" * 27, b"y" * 18]
    assert corpus.train.dtype == np.uint16


def test_of_few_documents_the_last_tenth_is_held_out(tmp_path):
    text = "".join(chr(ord("a") + i % 26) for i in range(105))
    corpus = lg.load_corpus([write(tmp_path, {"one.txt": text})])
    assert documents(corpus.train) == [text[:95].encode()]
    assert documents(corpus.val) == [text[95:].encode()]


def test_of_many_documents_some_are_held_out_by_their_name(many):
    folder, names = many
    corpus = lg.load_corpus([folder])
    for split, tokens in (("train", corpus.train), ("val", corpus.val)):
        wanted = [f"text of {n}".encode() for n in names if held_out(n) == (split == "val")]
        assert sorted(documents(tokens)) == sorted(wanted) and wanted


def test_the_split_does_not_depend_on_the_place_the_order_or_the_spelling_of_the_path(
    many, tmp_path, monkeypatch
):
    folder, names = many
    first = lg.load_corpus([folder])
    moved = str(tmp_path / "else[1]" / "where")
    os.makedirs(moved)
    for name in reversed(names):  # another order on the disk
        os.makedirs(os.path.dirname(f"{moved}/{name}"), exist_ok=True)
        shutil.copy(f"{folder}/{name}", f"{moved}/{name}")
    monkeypatch.chdir(tmp_path)
    for paths in ([moved], ["many"], ["./many/"], ["many/**/*.txt"], ["many/*/*"]):
        other = lg.load_corpus(paths)
        assert np.array_equal(first.train, other.train) and np.array_equal(first.val, other.val), paths
    folders = [f"{folder}/a", f"{folder}/b"]
    one_way, other_way = lg.load_corpus(folders), lg.load_corpus(folders[::-1])
    assert np.array_equal(one_way.val, other_way.val) and np.array_equal(one_way.train, other_way.train)
    # and a shell may expand the glob
    quoted, expanded = lg.load_corpus(["many/a/*", "many/b/*"]), lg.load_corpus([f"many/{n}" for n in names])
    assert np.array_equal(quoted.val, expanded.val)


def test_adding_a_document_moves_no_other_one(many):
    folder, _ = many
    before = set(documents(lg.load_corpus([folder]).val))
    write(pathlib.Path(folder), {"a/0000.txt": "new"})
    after = lg.load_corpus([folder])
    assert before - set(documents(after.val)) == set()
    assert {*documents(after.train), *documents(after.val)} >= {b"new"}


def test_equal_documents_are_read_once(many):
    folder, _ = many
    once = lg.load_corpus([folder])
    shutil.copytree(f"{folder}/a", f"{folder}/copy_of_a")
    twice = lg.load_corpus([folder, folder])
    assert sorted(documents(np.concatenate([twice.train, twice.val]))) == sorted(
        documents(np.concatenate([once.train, once.val]))
    )
    assert not set(documents(twice.train)) & set(documents(twice.val))


def test_files_of_the_same_name_in_several_folders_are_all_read(tmp_path):
    write(tmp_path, {"a/x.txt": "first " * 10, "b/x.txt": "second " * 10})
    corpus = lg.load_corpus([str(tmp_path / "a/x.txt"), str(tmp_path / "b/x.txt")])
    assert [text[:5] for text in documents(corpus.train)] == [b"first", b"secon"]


def test_the_standard_library_is_read_without_installed_packages(tmp_path, monkeypatch):
    write(
        tmp_path, {"os.py": "import os", "sub/re.py": "import re", "x.txt": "no", "site-packages/a.py": "no"}
    )
    monkeypatch.setattr(lg.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = lg.load_corpus()
    assert corpus.name == "2 documents of the Python standard library"
    assert documents(corpus.train) == [b"import os", b"import re"]


def test_each_line_of_a_jsonl_is_a_document(tmp_path):
    lines = [json.dumps({"text": f"line {i} \u00fc", "id": i}) for i in range(3)]
    corpus = lg.load_corpus([write(tmp_path, {"a.jsonl": "\n".join(lines)}) + "/a.jsonl"])
    assert documents(corpus.train) == [f"line {i} \u00fc".encode() for i in range(3)]


@pytest.mark.parametrize("line", ["{", "[1]", '{"body": "x"}', '{"text": 5}', '{"text": null}', "", "7"])
def test_a_bad_line_of_a_jsonl_is_named(tmp_path, line):
    path = write(tmp_path, {"a.jsonl": '{"text": "good"}\n' + line + "\n"}) + "/a.jsonl"
    with pytest.raises(ValueError, match=r'a\.jsonl line 2 is no JSON object with a "text"$'):
        lg.load_corpus([path])


def test_a_bin_holds_uint16_tokens_and_its_last_tenth_is_held_out(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16) % 300
    tokens.tofile(tmp_path / "a.bin")
    corpus = lg.load_corpus([str(tmp_path / "a.bin")])
    assert np.array_equal(corpus.train, tokens[:900]) and np.array_equal(corpus.val, tokens[900:])
    assert (corpus.words, corpus.bos, corpus.vocab_size) == (300, 300, 302)
    assert isinstance(corpus.train, np.memmap)  # read when needed, whatever its size


def test_the_vocabulary_of_a_bin_is_that_of_its_tokenizer_or_of_the_model_that_reads_it(
    tmp_path, monkeypatch
):
    (np.arange(1000, dtype=np.uint16) % 300).tofile(tmp_path / "a.bin")
    path = tmp_path / "a.bin"  # alone, and no string: both are taken
    assert lg.load_corpus(path, vocab_size=502).bos == 500
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 400}
    encoding = tiktoken.Encoding("small", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    assert lg.load_corpus(path, "small", vocab_size=502).bos == 401
    with pytest.raises(ValueError, match="has a token 299, which is outside the vocabulary of 200 words"):
        lg.load_corpus(path, vocab_size=202)


def test_a_special_token_spelled_in_the_text_is_text(tmp_path, monkeypatch):
    encoding = tiktoken.Encoding(
        "small", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )  # fmt: skip
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    corpus = lg.load_corpus([write(tmp_path, {"a": "<|endoftext|> is a token"})], "small")
    assert bytes(corpus.train[1:].tolist()).startswith(b"<|endoftext|> is")
    assert corpus.bos == 257


@pytest.mark.parametrize(
    "files, paths, message",
    [
        ({}, ["nowhere.txt"], "no text at '.*nowhere.txt', give an existing file, folder or glob"),
        ({"a.txt": "x"}, ["*.md"], "no text at '.*"),
        ({"a/b": "x"}, ["a", "c"], "no text at '.*c'"),
        ({"a.txt": ""}, ["a.txt"], "the corpus is empty: no text in"),
        ({"a.bin": "", "b.bin": ""}, ["a.bin", "b.bin"], "a .bin of tokens stands alone, got 2 paths"),
        ({"a.bin": "1234", "b.txt": "x"}, ["a.bin", "b.txt"], "a .bin of tokens stands alone, got 2 paths"),
        ({}, ["a.bin"], "no tokens at '.*a.bin', give an existing .bin of uint16"),
        ({"a.bin": ""}, ["a.bin"], "the corpus is empty: no tokens in .*a.bin"),
        ({"a.bin": "123"}, ["a.bin"], "a.bin has 3 bytes, an odd number"),
    ],
)
def test_bad_paths_are_named(tmp_path, files, paths, message):
    write(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        lg.load_corpus([str(tmp_path / p) for p in paths])


def test_an_unknown_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown tokenizer 'gpt9', expected bytes or one of .*gpt2"):
        lg.load_corpus([write(tmp_path, {"a": "x"})], "gpt9")


def test_a_tokenizer_that_cannot_be_fetched_is_one_sentence(tmp_path, monkeypatch):
    def offline(name):
        raise ConnectionError("a long story\nin two lines")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match=r"^the tokenizer 'gpt2' cannot be fetched: ConnectionError$"):
        lg.load_corpus([write(tmp_path, {"a": "x"})], "gpt2")


# --------------------------------------------------------------------------------------------------
# Rows


def test_rows_wrap_around_at_the_end_of_the_text():
    rows = lg.Rows(small("abcdefghi"), "train", 1, True, seed=0)  # 10 tokens with <bos>
    rows.at = np.array([4])
    taken = [rows.take(4, overlap=1)[0].tolist() for _ in range(4)]
    text = [BOS, *b"abcdefghi"]
    assert taken == [text[4:8], text[0:4], text[3:7], text[6:10]]


def test_rows_reach_every_place_of_the_text_and_no_other():
    rows = lg.Rows(small("abcdefghi"), "train", 500, False, seed=0)
    firsts = rows.take(4)[:, 0]
    assert set(firsts.tolist()) == {BOS, *b"abcdef"}
    assert not np.array_equal(firsts, rows.take(4)[:, 0])  # and draws anew each time
    assert lg.Rows(small("abc"), "train", 2, False, seed=0).take(4).tolist() == [[BOS, *b"abc"]] * 2


def test_rows_of_a_text_that_is_too_short_say_so():
    with pytest.raises(ValueError, match="the text has 4 tokens, shorter than the 5 that are needed"):
        lg.Rows(small("abc"), "train", 2, False, seed=0).take(5)


def test_pieces_inside_documents_cross_no_boundary_from_any_place():
    """From each place: the next n tokens without a boundary, found by trying place after place."""
    tokens = np.array([BOS, 1, 2, BOS, BOS, 3, 4, 5, 6, BOS, 7, BOS, 8, 9, 10, BOS])
    corpus = lg.Corpus("documents", tokens, tokens, 256)
    for n in (1, 2, 3, 4):
        for place in range(len(tokens)):
            rows = lg.Rows(corpus, "train", 1, True, seed=0)
            rows.at = np.array([place])
            taken = rows.take(n, inside_document=True)[0].tolist()
            for at in [*range(place, len(tokens)), *range(place)]:
                wanted = tokens[at : at + n].tolist()
                if len(wanted) == n and BOS not in wanted:
                    break
            assert taken == wanted and rows.at[0] == at + n
    with pytest.raises(ValueError, match="no document of the text has the 5 tokens that are needed"):
        lg.Rows(corpus, "train", 3, True, seed=0).take(5, inside_document=True)


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("task", ["text", "echo", "echo_windows", "copy"])
def test_rows_go_on_from_their_saved_state_bit_for_bit(task, continues):
    function, T = lg.TASKS[task][0], 64
    rows = lg.Rows(small("0123456789" * 50), "train", 3, continues, seed=0)
    function(rows, T)
    saved = rows.state_dict()
    wanted = [function(rows, T) for _ in range(3)]
    other = lg.Rows(small("0123456789" * 50), "train", 3, continues, seed=1)
    other.load_state_dict(saved)
    for (tokens, part), (other_tokens, other_part) in zip(
        wanted, [function(other, T) for _ in range(3)], strict=True
    ):
        assert np.array_equal(tokens, other_tokens) and np.array_equal(part, other_part)


def test_rows_that_have_not_started_can_be_saved():
    rows, other = (lg.Rows(small(), "train", 3, True, seed=seed) for seed in (0, 1))
    other.load_state_dict(rows.state_dict())
    assert np.array_equal(rows.take(5), other.take(5))


# --------------------------------------------------------------------------------------------------
# Tasks: windows are the pictures in their docstrings


def window(task, T, text, continues=True, at=1, B=1):
    rows = lg.Rows(small(text), "train", B, continues, seed=0)
    rows.at = np.full(B, at)
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


def test_windows_of_echo_are_four_episodes_of_the_stream_cut_anywhere():
    episodes = [
        f"<bos> {a} {b} {c} <sep> {a} {b} {c}".split() for a, b, c in ("abc", "def", "ghi", "jkl", "mno")
    ]
    parts = [1, 1, 1, 0, 2, 2, 2, 0] * 5
    tokens, part, _ = window(lg.echo_windows, 32, "abcdefghijklmno")
    assert (tokens, part) == (
        [*itertools.chain(*episodes[:4]), "<bos>"],
        parts[:32],
    )  # streams: at whole episodes

    rows = lg.Rows(small("0123456789" * 10), "train", 400, False, seed=0)
    tokens, part = lg.echo_windows(rows, 32)
    offsets = (-np.argmax(tokens == BOS, axis=1)) % 8  # where in an episode each window begins
    assert set(offsets.tolist()) == set(range(8))
    for row, row_part, offset in zip(tokens, part, offsets, strict=True):
        where = (np.arange(33) + offset) % 8
        assert ((row == BOS) == (where == 0)).all() and ((row == SEP) == (where == 4)).all()
        assert row_part.tolist() == (parts * 2)[offset : offset + 32]
        echoed = np.flatnonzero((where > 4) & (np.arange(33) >= 4))
        assert (row[echoed] == row[echoed - 4]).all()


@pytest.mark.parametrize("T", [0, 8, 12, 20, 33])
def test_windows_of_echo_need_a_length_of_four_episodes(T):
    with pytest.raises(ValueError, match=f"echo_windows needs a T of at least 16 that 8 divides, got {T}"):
        window(lg.echo_windows, T, "abcdefghijkl")


def test_copy_is_its_picture_to_the_letter():
    """$, 5 to 20 uniform lower-case letters, |, the same letters, a stop; the loss is on copy and stop."""
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
            wanted = [0] * (len(string) + 1) + [1] * (len(string) + 1) + [0]
            stop = min(t + len(wanted), 199)
            assert row_part[t:stop].tolist() == wanted[: stop - t]
            if line[t:200].startswith(episode):
                lengths.append(len(string))
                letters += string
            t += len(episode)
        assert row_part[199] == 0
    assert set(lengths) == set(range(5, 21))
    assert set(letters) == set("abcdefghijklmnopqrstuvwxyz")
    counts = np.unique(letters, return_counts=True)[1]
    assert counts.max() < 1.2 * counts.min()  # uniform: some 1500 of each, five standard errors are 13 %


def test_copy_needs_room_for_the_longest_string():
    with pytest.raises(
        ValueError, match="copy needs a T of at least 43, the longest string and its copy, got 42"
    ):
        window(lg.copy, 42, "abc")
    assert all(lg.copy(lg.Rows(small(), "train", 1, True, seed=s), 43)[1].any() for s in range(200))


@pytest.mark.parametrize("name", ["text", "echo", "echo_windows"])
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
    rows.at = np.array([1, 11])
    tokens, _ = lg.stream(lg.text, rows, 7, 6)
    assert [bytes(row.tolist()).decode() for row in tokens] == [text[:43], text[10:53]]


@pytest.mark.parametrize("name", lg.TASKS)
def test_defaults_fit_their_tasks_and_parts_are_named(name):
    function, T, parts = lg.TASKS[name]
    tokens, part = function(lg.Rows(small("0123456789" * 100), "train", 4, False, seed=0), T)
    assert tokens.shape == (4, T + 1)
    assert set(np.unique(part)) - {0} == set(range(1, len(parts) + 1))
    assert torch.from_numpy(tokens).max() < 258
