"""Text becomes tokens without loss, splits do not depend on place or order."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

import lengthgen as lg
import train

BOS, SEP = 256, 257  # of the byte tokenizer


@pytest.fixture(autouse=True)
def no_tokenizer_of_another_test():
    lg.load_tokenizer.cache_clear()


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
    tokens = lg.BYTES.encode(text)
    assert tokens.tolist() == list(text.encode())
    assert lg.BYTES.decode(tokens) == text
    assert lg.BYTES.decode([BOS, *tokens, SEP]) == text  # special tokens are no text


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
    "line", ["{", "[1]", '{"body": "x"}', '{"text": 5}', '{"text": null}', "7", "[" * 10**5]
)
def test_a_bad_line_of_a_jsonl_is_named(tmp_path, line):
    path = write(tmp_path, {"a.jsonl": '{"text": "good"}\n' + line + "\n"}) + "/a.jsonl"
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 cannot be read as a JSON object with text: .+$"):
        lg.load_corpus([path])


def test_blank_lines_of_a_jsonl_are_skipped(tmp_path):
    lines = ['{"text": "one"}', "", '{"text": "two"}', "  ", ""]
    path = write(tmp_path, {"a.jsonl": "\n".join(lines)}) + "/a.jsonl"
    assert documents(lg.load_corpus([path]).train) == [b"one", b"two"]


def test_a_bin_holds_uint16_tokens_and_its_last_tenth_is_held_out(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16) % 300
    tokens.tofile(tmp_path / "a.bin")
    corpus = lg.load_corpus([str(tmp_path / "a.bin")])
    assert np.array_equal(corpus.train, tokens[:900]) and np.array_equal(corpus.val, tokens[900:])
    assert (corpus.words, corpus.bos, corpus.vocab_size) == (300, 299, 300)  # no word is added
    assert isinstance(corpus.train, np.memmap)  # read when needed, whatever its size


def test_the_vocabulary_of_a_bin_is_that_of_its_tokenizer_or_of_the_model_that_reads_it(
    tmp_path, monkeypatch
):
    (np.arange(1000, dtype=np.uint16) % 300).tofile(tmp_path / "a.bin")
    path = tmp_path / "a.bin"  # alone, and no string: both are taken
    assert lg.load_corpus(path, vocab_size=502).words == 502
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 400}
    special = {"<|endoftext|>": 401}
    encoding = tiktoken.Encoding("small", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    corpus = lg.load_corpus(path, "cl100k_base", vocab_size=502)
    assert (corpus.words, corpus.bos) == (402, 401)
    with pytest.raises(ValueError, match="has a token 299, outside the vocabulary of 200 words"):
        lg.load_corpus(path, vocab_size=200)


def write_tokens(file, tokens, dtype=np.uint16):
    np.asarray(tokens, dtype).tofile(file)
    return str(file)


@pytest.mark.parametrize("words", [50257, 50304])  # of GPT-2, and padded as in nanoGPT
@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_a_bin_of_nanogpt_ends_its_documents_with_50256(tmp_path, monkeypatch, words, tokenizer):
    def no_network(name):
        raise ConnectionError("nothing is downloaded where only the border is needed")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    tokens = [50256, 5, 6, 7, 8, 9, 10, 11, 12, 13] * 30
    corpus = lg.load_corpus(write_tokens(tmp_path / "a.bin", tokens), tokenizer, words)
    assert corpus.bos == 50256
    assert corpus.vocab_size == (words if tokenizer == "bytes" else 50257)
    assert len(lg.Rows(corpus, "train", 1, False, 0).begins) == 28  # 27 documents, and the empty one before
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=words))
    train.check_vocabulary(model, corpus, "nanoGPT's model")  # no error


@pytest.mark.parametrize("paths", [["train.bin", "val.bin"], ["."], ["*.bin"], ["val.bin", "train.bin"]])
def test_train_bin_and_val_bin_are_read_as_nanogpt_reads_them(tmp_path, paths):
    write_tokens(tmp_path / "train.bin", range(100))
    write_tokens(tmp_path / "val.bin", range(50, 80))
    if paths == ["."]:
        write(tmp_path, {"input.txt": "text", "prepare.py": "x = 1", "meta.pkl": b"\x80\0"})
    corpus = lg.load_corpus([str(tmp_path / path) for path in paths])
    assert corpus.train.tolist() == list(range(100)) and corpus.val.tolist() == list(range(50, 80))
    assert corpus.words == 100
    if paths == ["."]:  # where else its text would be read
        (tmp_path / "train.bin").unlink()
        with pytest.raises(ValueError, match=r"stands alone, or is train\.bin beside val\.bin"):
            lg.load_corpus(str(tmp_path))


def npy(file, tokens):
    with open(file, "wb") as f:
        np.save(f, np.array(tokens, np.uint16))


def llm_c(file, tokens):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    file.write_bytes(header.tobytes() + np.array(tokens, np.uint16).tobytes())


def of_torch(file, tokens):
    torch.save(torch.tensor(tokens), file)


@pytest.mark.parametrize(
    "make",
    [
        lambda file, tokens: write_tokens(file, tokens, np.uint32),
        lambda file, tokens: write_tokens(file, tokens, np.int64),
        lambda file, tokens: write_tokens(file, np.array(tokens) + 10**5, np.int32),  # a vocabulary of 200k
        lambda file, tokens: write_tokens(file, tokens, ">u4"),
        npy, llm_c, of_torch,
    ],
)  # fmt: skip
def test_a_bin_of_other_numbers_is_refused(tmp_path, make):
    make(tmp_path / "a.bin", [50256, *range(300, 600)])
    with pytest.raises(
        ValueError, match=r"a\.bin cannot be read as a \.bin of uint16 tokens: (it has a header|Size)"
    ):
        lg.load_corpus(str(tmp_path / "a.bin"))


def test_tasks_in_words_ask_for_the_tokenizer_of_a_bin(tmp_path):
    corpus = lg.load_corpus(write_tokens(tmp_path / "a.bin", range(400)))
    with pytest.raises(ValueError, match="name the tokenizer of the"):
        lg.passkey(lg.Rows(corpus, "train", 1, False, 0), 160)


def test_a_special_token_spelled_in_the_text_is_text(tmp_path, monkeypatch):
    encoding = tiktoken.Encoding(
        "small", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )  # fmt: skip
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    corpus = lg.load_corpus([write(tmp_path, {"a": "<|endoftext|> is a token"})], "gpt2")
    assert bytes(corpus.train[1:].tolist()).startswith(b"<|endoftext|> is")
    assert corpus.bos == 256


@pytest.mark.parametrize(
    "files, paths, message",
    [
        ({}, ["nowhere.txt"], "no text at '.*nowhere.txt', give an existing file, folder or glob"),
        ({"a.txt": "x"}, ["*.md"], "no text at '.*"),
        ({"a/b": "x"}, ["a", "c"], "no text at '.*c'"),
        ({"a.txt": b"\x7fELF\x00\x01"}, ["a.txt"], "a.txt cannot be read as text: it has NUL bytes"),
        ({"a/b.txt": b"\x00"}, ["a"], "b.txt cannot be read as text: it has NUL bytes"),
        ({"a.txt": ""}, ["a.txt"], "the corpus is empty: no text in"),
        (
            {"a.bin": "", "b.bin": ""},
            ["a.bin", "b.bin"],
            "a .bin stands alone, or is train.bin beside val.bin",
        ),
        (
            {"a.bin": "1234", "b.txt": "x"},
            ["a.bin", "b.txt"],
            "a .bin stands alone, or is train.bin beside val.bin",
        ),
        ({}, ["a.bin"], "no text at .*a.bin"),
        ({"a.bin": ""}, ["a.bin"], "a.bin cannot be read as a .bin of uint16 tokens: .* empty file"),
        ({"a.bin": "123"}, ["a.bin"], "a.bin cannot be read as a .bin of uint16 tokens: .*not a multiple"),
    ],
)
def test_bad_paths_are_named(tmp_path, files, paths, message):
    write(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        lg.load_corpus([str(tmp_path / p) for p in paths])


def test_an_unknown_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gpt9 cannot be read as a tokenizer, expected bytes, .*gpt2"):
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


STRANGE = "before\u2028between\u0085after \u00fc"  # raw, they end a line for str.splitlines


def test_babilong_files_are_utf8_and_only_a_newline_ends_a_line(tmp_path):
    """In a process of its own, whose own encoding is ASCII; with a mark of the byte order in front."""
    entry = dict(input=f" {STRANGE} ", question=" Where? ", target=" office ")
    entry = json.dumps(entry, ensure_ascii=False)
    forms = [
        f"[{entry}, {entry}]",
        f"{entry}\n{entry}\n",
        f"{entry}\n\n \t\n{entry}",
        f"{entry}\r\n{entry}\r\n",
    ]
    files = []
    for i, form in enumerate(forms):
        files.append(str(tmp_path / f"qa{i}.json"))
        pathlib.Path(files[i]).write_bytes(b"\xef\xbb\xbf" + form.encode())
    code = "import sys, lengthgen as lg; print(ascii([lg.read_babilong(file, 9) for file in sys.argv[1:]]))"
    environment = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    root = pathlib.Path(lg.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = [(f"{STRANGE} Where?", "Where?", "office")] * 2
    assert done.stdout.strip() == ascii([wanted] * len(forms))


def test_lines_of_a_jsonl_may_hold_other_ends_of_lines_and_a_mark_of_the_byte_order(tmp_path):
    line = json.dumps({"text": STRANGE}, ensure_ascii=False)
    path = write(tmp_path, {"a.jsonl": b"\xef\xbb\xbf" + f"{line}\r\n\r\n".encode() + line.encode()})
    corpus = lg.load_corpus([path])
    assert (b"".join(documents(corpus.train)) + b"".join(documents(corpus.val))).decode() == STRANGE


def test_a_foreign_vocabulary_gains_and_loses_no_word(tmp_path):
    """A model of 300 words reads all of them, and its border is one of them."""
    path = write_tokens(tmp_path / "a.bin", np.arange(3000) % 300)
    for vocab_size in (None, 300):
        corpus = lg.load_corpus(path, "bytes", vocab_size)
        assert (corpus.words, corpus.vocab_size) == (300, 300)
        assert max(corpus.bos, corpus.sep) < 300
    tokens, _ = lg.echo(lg.Rows(corpus, "train", 64, False, 0), 50)
    assert tokens.max() == 299
