"""A byte-level tokenizer.json gives the ids that Hugging Face's tokenizers gives."""

import json
import unicodedata

import numpy as np
import pytest
import torch

import lengthgen as lg

TEXT = (
    "def f(x):\n    return x  # it's a   test\n\n\t\tfoo = 'bar'  \r\n" * 3
    + "naïve café 東京 🙂 don't I'LL 123 a1b2"
)


def byte_characters():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def make_tokenizer(folder, **changes):
    """A tokenizer.json like GPT-NeoX's: 2 special tokens, 256 bytes, 5 merges, runs of 2 to 24 spaces."""
    space = byte_characters()[32]
    merges = [f"{space} {space}", "t e", "s t", "te st", f"{space} a"]
    words = [
        "<|endoftext|>",
        "<|padding|>",
        *byte_characters().values(),
        *(m.replace(" ", "") for m in merges),
    ]
    plain = dict(single_word=False, lstrip=False, rstrip=False)
    added = [dict(id=i, content=words[i], special=True, normalized=False, **plain) for i in (0, 1)]
    added += [
        dict(id=len(words) + i, content=" " * (24 - i), special=False, normalized=True, **plain)
        for i in range(23)
    ]
    parts = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
    model = dict(type="BPE", vocab={w: i for i, w in enumerate(words)}, merges=merges)
    model |= dict(dropout=None, continuing_subword_prefix=None, end_of_word_suffix=None)
    tokenizer = dict(added_tokens=added, normalizer=dict(type="NFC"), pre_tokenizer=parts, decoder=parts)
    tokenizer |= (
        dict(version="1.0", truncation=None, padding=None, post_processor=None, model=model) | changes
    )
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(tokenizer))
    return file


def test_ids_follow_from_bytes_merges_and_added_tokens(tmp_path):
    encoding = lg.HuggingFaceEncoding(str(make_tokenizer(tmp_path)))
    ids = {encoding.decode_single_token_bytes(i): i for i in range(263)}
    byte = lambda c: 2 + list(byte_characters().values()).index(c)  # noqa: E731
    assert encoding.encode("x") == [byte("x")]
    # "te" is merged before "st", so test is te + st; a space joins the a behind it
    assert encoding.encode("test a") == [ids[b"test"], ids[b" a"]]
    assert encoding.encode("tst") == [ids[b"t"], ids[b"st"]]
    # runs of spaces, the longest first: 24, then 6; a single one is a byte
    assert encoding.encode(" " * 30 + "x x") == [263, 263 + 18, byte("x"), ids[b" "], byte("x")]
    assert encoding.encode("  a") == [263 + 22, ids[b"a"]]
    assert encoding.encode("e\u0301") == encoding.encode("é") == [byte("Ã"), byte("©")]  # NFC: C3 A9
    assert encoding.encode("") == []
    assert encoding.n_vocab == 263 + 23
    assert encoding.decode(encoding.encode(TEXT)) == TEXT


def test_special_tokens_that_a_text_spells_out_are_text_unless_asked_for(tmp_path):
    encoding = lg.HuggingFaceEncoding(str(make_tokenizer(tmp_path)))
    text = "a<|endoftext|>\u0338b"  # NFC would join the mark and the ">"
    assert encoding.decode(encoding.encode(text)) == unicodedata.normalize("NFC", text)
    assert encoding.encode(text, allowed_special="all")[1] == 0
    assert np.array_equal(encoding.encode_to_numpy(text, disallowed_special=()), encoding.encode(text))


def random_text(rng, n):
    """Runs of spaces of every length, control characters, CJK, emoji, combining marks, any script."""
    ranges = [(0, 32), (32, 127), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0x300, 0x370), (0xA0, 0x250)]
    ranges += [
        (0xAC00, 0xD7A3),
        (0x1100, 0x1200),
        (0x2000, 0x2070),
        (0x3000, 0x3040),
        (0, 0xD800),
        (0xE000, 0x110000),
    ]
    words = [
        "test",
        " test",
        "'s",
        "'LL",
        "\n\n",
        "\r\n",
        "\t",
        "<|endoftext|>",
        "<|padding|>",
        "<|end",
        "\u0338",
    ]
    pieces = []
    for _ in range(n):
        kind, size = rng.integers(3), int(rng.integers(1, 60))
        low, high = ranges[rng.integers(len(ranges))]
        some = "".join(chr(x) for x in rng.integers(low, high, size % 9))
        pieces.append((" " * size, words[size % len(words)], some)[kind])
    return "".join(pieces)


def test_ids_are_those_of_hugging_face(tmp_path):
    tokenizers = pytest.importorskip(
        "tokenizers", reason="tokenizers is not installed: nothing to compare with"
    )
    file = str(make_tokenizer(tmp_path))
    ours, theirs = lg.HuggingFaceEncoding(file), tokenizers.Tokenizer.from_file(file)
    rng = np.random.default_rng(0)
    for text in [TEXT, *(random_text(rng, 200) for _ in range(100))]:
        assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids


@pytest.mark.parametrize(
    "changes",
    [
        dict(model=dict(type="Unigram", vocab=[["a", 0.0]])),
        dict(pre_tokenizer=dict(type="Metaspace", replacement="_")),
        dict(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=True)),
        dict(pre_tokenizer=None),
        dict(normalizer=dict(type="NFKC")),
        dict(model=dict(type="BPE", vocab={"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4}, merges=["a b", "b c"])),
        dict(model=dict(type="BPE", vocab={"a": 0, "b": 1, "ab": 2}, merges=[])),
        dict(model=dict(type="BPE", vocab={"東": 7}, merges=[])),
        dict(added_tokens=None),
    ],
)
def test_other_kinds_of_tokenizer_are_refused(changes, tmp_path):
    file = make_tokenizer(tmp_path, **changes)
    with pytest.raises(
        ValueError, match=r"tokenizer.json cannot be read as a byte-level BPE tokenizer like GPT-NeoX's"
    ):
        lg.load_corpus([__file__], str(file))


def test_a_cut_off_file_is_named(tmp_path):
    file = make_tokenizer(tmp_path)
    file.write_text(file.read_text()[:-5])
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read as a byte-level BPE .*: Expecting"):
        lg.load_corpus([__file__], str(file))


def duplicate_id(t):
    t["model"]["vocab"]["st"] = t["model"]["vocab"]["te"]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (duplicate_id, "PanicException"),
        (lambda t: t["model"]["vocab"].pop("x"), "the byte 120 has no token"),  # would panic at the first x
        (lambda t: t["added_tokens"][0].update(content=""), "an added token is empty"),
        (lambda t: t["added_tokens"][-1].update(id=2**32 - 2), "its vocabulary of 4294967295 tokens"),
        (lambda t: t["added_tokens"][-1].update(id=-1), "OverflowError"),
        (lambda t: t["added_tokens"][0].update(lstrip=True), "lstrip of an added token is True"),
        (lambda t: t["model"]["merges"].append("t x"), "KeyError"),
    ],
)
def test_a_damaged_file_is_one_clear_error(spoil, message, tmp_path):
    file = make_tokenizer(tmp_path)
    tokenizer = json.loads(file.read_text())
    spoil(tokenizer)
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=f"tokenizer.json cannot be read .*{message}") as caught:
        lg.load_encoding(str(file))
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 500


def test_an_empty_folder_or_name_is_no_tokenizer_and_asks_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(lg, "download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "folder").mkdir(parents=True)
    for name in ("some/folder", ""):
        with pytest.raises(ValueError, match=f"unknown tokenizer '{name}', expected bytes or"):
            lg.load_encoding(name)


@pytest.mark.parametrize("given", ["file", "folder"])
def test_the_boundary_of_documents_is_the_token_the_tokenizer_has_for_it(given, tmp_path):
    file = make_tokenizer(tmp_path)
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text(TEXT * 10 + str(i))
    corpus = lg.load_corpus([str(tmp_path / "text")], str(file if given == "file" else tmp_path))
    assert (corpus.bos, corpus.sep, corpus.vocab_size, corpus.words) == (0, 1, 286, 286)
    assert corpus.train[0] == 0 and (corpus.train == 0).sum() == 3 and corpus.train.max() < 286
    encoding = lg.HuggingFaceEncoding(str(file))
    assert (
        encoding.decode(corpus.train[1 : np.flatnonzero(corpus.train == 0)[1]].tolist())
        in TEXT.replace("\r", "") * 10
    )


def test_tokens_of_a_bin_take_the_special_tokens_of_a_tokenizer(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "a.bin")
    corpus = lg.load_corpus([str(tmp_path / "a.bin")], str(make_tokenizer(tmp_path)))
    assert (corpus.bos, corpus.sep, corpus.vocab_size) == (0, 1, 286)
    torch.from_numpy(lg.echo(lg.Rows(corpus, "train", 2, False, 0), 10)[0])
