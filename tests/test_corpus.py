"""Text becomes tokens without loss, splits do not depend on place or order."""

import json
import os
import pathlib
import shutil
import zlib

import numpy as np
import pytest
import tiktoken

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


def held_out(key):
    return zlib.crc32(key.encode()) % 20 == 0


@pytest.fixture
def many(tmp_path):
    """A folder of as many different files as it takes to hold out whole documents."""
    names = [f"{'ab'[i % 2]}/{i}.txt" for i in range(lg.MANY_DOCUMENTS)]
    return write(tmp_path / "many", {name: f"text of {name}" for name in names}), names


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


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"body": "x"}', '{"text": 5}', '{"text": null}', "", "7", "[" * 10**5]
)
def test_a_bad_line_of_a_jsonl_is_named(tmp_path, line):
    path = write(tmp_path, {"a.jsonl": '{"text": "good"}\n' + line + "\n"}) + "/a.jsonl"
    with pytest.raises(
        ValueError, match=r'a\.jsonl line 2 cannot be read as a JSON object with a "text": .+$'
    ):
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
    assert lg.load_corpus(path, "gpt2", vocab_size=502).bos == 401
    with pytest.raises(ValueError, match="has a token 299, which is outside the vocabulary of 200 words"):
        lg.load_corpus(path, vocab_size=202)


def test_a_special_token_spelled_in_the_text_is_text(tmp_path, monkeypatch):
    encoding = tiktoken.Encoding(
        "small", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )  # fmt: skip
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    corpus = lg.load_corpus([write(tmp_path, {"a": "<|endoftext|> is a token"})], "gpt2")
    assert bytes(corpus.train[1:].tolist()).startswith(b"<|endoftext|> is")
    assert corpus.bos == 257


@pytest.mark.parametrize(
    "files, paths, message",
    [
        ({}, ["nowhere.txt"], "no text at '.*nowhere.txt', give an existing file, folder or glob"),
        ({"a.txt": "x"}, ["*.md"], "no text at '.*"),
        ({"a/b": "x"}, ["a", "c"], "no text at '.*c'"),
        ({"a.txt": b"\x7fELF\x00\x01"}, ["a.txt"], "a.txt cannot be read as text: it has NUL bytes"),
        ({"a/b.txt": b"\x00"}, ["a"], "b.txt cannot be read as text: it has NUL bytes"),
        ({"a.txt": ""}, ["a.txt"], "the corpus is empty: no text in"),
        ({"a.bin": "", "b.bin": ""}, ["a.bin", "b.bin"], "a .bin of tokens stands alone, got 2 paths"),
        ({"a.bin": "1234", "b.txt": "x"}, ["a.bin", "b.txt"], "a .bin of tokens stands alone, got 2 paths"),
        ({}, ["a.bin"], "a.bin cannot be read as a .bin of uint16 tokens: FileNotFound"),
        ({"a.bin": ""}, ["a.bin"], "a.bin cannot be read as a .bin of uint16 tokens: .* empty file"),
        ({"a.bin": "123"}, ["a.bin"], "a.bin cannot be read as a .bin of uint16 tokens: .*not a multiple"),
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
    with pytest.raises(
        ValueError,
        match=r"^gpt2 cannot be read as a tokenizer.*: ConnectionError: a long story in two lines$",
    ):
        lg.load_corpus([write(tmp_path, {"a": "x"})], "gpt2")
