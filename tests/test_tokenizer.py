"""Any tokenizer.json is read, byte-level or sentencepiece-like, and text comes back whole."""

import json
import unicodedata

import numpy as np
import pytest
import tiktoken
import torch

import lengthgen as lg

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed, which reads these files")

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


def make_sentencepiece(folder):
    """A tokenizer.json like Llama's: spaces become "▁", one is put in front, unknown characters are bytes."""
    from tokenizers import decoders, models, normalizers, processors

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *"aest.", "▁a", "te", "st", "test", "▁test"]
    merges = [("▁", "a"), ("t", "e"), ("s", "t"), ("te", "st"), ("▁", "test")]
    model = models.BPE(
        {w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    return file


KINDS = {"byte-level": make_tokenizer, "sentencepiece-like": make_sentencepiece}


def test_ids_follow_from_bytes_merges_and_added_tokens(tmp_path):
    tokenizer = lg.load_tokenizer(str(make_tokenizer(tmp_path)))
    byte = lambda c: 2 + list(byte_characters().values()).index(c)  # noqa: E731
    ids = {text: 258 + i for i, text in enumerate(("  ", "te", "st", "test", " a"))}  # those of the merges
    space = byte(byte_characters()[32])
    assert tokenizer.encode("x") == [byte("x")]
    # "te" is merged before "st", and then both; a space joins the a behind it
    assert tokenizer.encode("test a") == [ids["test"], ids[" a"]]
    assert tokenizer.encode("tst") == [byte("t"), ids["st"]]
    # runs of spaces, the longest first: 24, then 6; a single one is a byte
    assert tokenizer.encode(" " * 30 + "x x") == [263, 263 + 18, byte("x"), space, byte("x")]
    assert tokenizer.encode("  a") == [263 + 22, byte("a")]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é") == [byte("Ã"), byte("©")]  # NFC: C3 A9
    assert tokenizer.encode("") == []
    assert (tokenizer.words, tokenizer.special) == (263 + 23, (0, 1))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_ids_of_a_sentencepiece_like_file_follow_from_its_words_and_the_bytes_of_others(tmp_path):
    tokenizer = lg.load_tokenizer(str(make_sentencepiece(tmp_path)))
    byte = lambda b: 3 + b  # noqa: E731
    ids = {word: 259 + i for i, word in enumerate(["▁", *"aest.", "▁a", "te", "st", "test", "▁test"])}
    # one space is put in front, and no <s>
    assert tokenizer.encode("test a") == [ids["▁test"], ids["▁a"]]
    assert tokenizer.encode("tst.") == [ids["▁"], ids["t"], ids["st"], ids["."]]
    assert tokenizer.encode("aü") == [ids["▁a"], byte(0xC3), byte(0xBC)]
    # the end of a text is </s>, and there is another special token
    assert (tokenizer.words, tokenizer.special) == (270, (2, 0))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_a_text_spells_out_are_text(kind, tmp_path):
    tokenizer = lg.load_tokenizer(str(KINDS[kind](tmp_path)))
    for text in ("a<|endoftext|>\u0338b", "<s>a</s><unk> </s>", "<|padding|>"):  # NFC would join ">" and mark
        ids = tokenizer.encode(text)
        assert not {*ids} & ({0, 1} if kind == "byte-level" else {0, 1, 2})
        normal = unicodedata.normalize("NFC", text) if kind == "byte-level" else text
        assert tokenizer.decode(ids) == normal


@pytest.mark.parametrize("kind", KINDS)
def test_special_and_unknown_ids_are_skipped_in_decoding(kind, tmp_path):
    tokenizer = lg.load_tokenizer(str(KINDS[kind](tmp_path)))
    ids = list(tokenizer.encode("test a"))
    padding = [tokenizer.words, tokenizer.words + 7, 10**6]  # as a model with a padded embedding may write
    assert tokenizer.decode([tokenizer.special[0], *ids[:1], *padding, *ids[1:]]) == "test a"


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


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back_whole(kind, tmp_path):
    tokenizer = lg.load_tokenizer(str(KINDS[kind](tmp_path)))
    rng = np.random.default_rng(0)
    for text in [TEXT, *(random_text(rng, 200) for _ in range(50))]:
        wanted = unicodedata.normalize("NFC", text) if kind == "byte-level" else text.replace("▁", " ")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == wanted
        assert max(ids, default=0) < tokenizer.words


@pytest.mark.parametrize("kind", KINDS)
def test_a_million_spaces_are_tokens(kind, tmp_path):
    """Without the added tokens for runs of spaces, which would cut them short."""
    file = KINDS[kind](tmp_path)
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["special"]]
    file.write_text(json.dumps(tokenizer))
    (tmp_path / "text.txt").write_text(" " * 10**6)
    corpus = lg.load_corpus([str(tmp_path / "text.txt")], str(file))
    assert len(corpus.decode(corpus.train[1:].tolist())) == pytest.approx(9 * 10**5, abs=2)


def test_a_tokenizer_that_panics_is_one_sentence(tmp_path, monkeypatch):
    """tiktoken's regular expressions overflow its stack at a million spaces."""
    ranks = {bytes([i]): i for i in range(256)}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    small = tiktoken.Encoding(
        "small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)
    monkeypatch.setattr(lg, "load_tokenizer", lg.load_tokenizer.__wrapped__)  # without the cache
    (tmp_path / "text.txt").write_text(" " * 10**6 + "x")
    with pytest.raises(ValueError, match=r"text.txt cannot be read as text for the tokenizer gpt2") as caught:
        lg.load_corpus([str(tmp_path / "text.txt")], "gpt2")
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 500


def test_a_cut_off_file_is_named(tmp_path):
    file = make_tokenizer(tmp_path)
    file.write_text(file.read_text()[:-5])
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read as a tokenizer"):
        lg.load_corpus([__file__], str(file))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t["model"]["vocab"].update(x=-1),
        lambda t: t["model"]["vocab"].update(x=2**40),
        lambda t: t["model"].update(type="Other"),
        lambda t: t["model"]["merges"].append("t x"),
        lambda t: t["model"]["merges"].append("t"),
        lambda t: t["added_tokens"][-1].update(id=-1),
        lambda t: t.update(normalizer=dict(type="Other")),
        lambda t: t.update(pre_tokenizer=dict(type="Split", pattern=dict(Regex="("), behavior="Isolated")),
        lambda t: t.pop("model"),
    ],
)
def test_a_damaged_file_is_one_clear_error(spoil, tmp_path):
    file = make_tokenizer(tmp_path)
    tokenizer = json.loads(file.read_text())
    spoil(tokenizer)
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer") as caught:
        lg.load_tokenizer(str(file))
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 500


def test_an_empty_folder_or_name_is_no_tokenizer_and_asks_no_hub(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "folder").mkdir(parents=True)
    for name in ("some/folder", ""):
        with pytest.raises(ValueError, match=f"^{name} cannot be read as a tokenizer, expected bytes, "):
            lg.load_tokenizer(name)


@pytest.mark.parametrize("given", ["file", "folder"])
def test_the_boundary_of_documents_is_the_token_the_tokenizer_has_for_it(given, tmp_path):
    file = make_tokenizer(tmp_path)
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text(TEXT * 10 + str(i))
    corpus = lg.load_corpus([str(tmp_path / "text")], str(file if given == "file" else tmp_path))
    assert (corpus.bos, corpus.sep, corpus.vocab_size, corpus.words) == (0, 1, 286, 286)
    assert corpus.train[0] == 0 and (corpus.train == 0).sum() == 3 and corpus.train.max() < 286
    assert (
        corpus.decode(corpus.train[1 : np.flatnonzero(corpus.train == 0)[1]].tolist())
        in TEXT.replace("\r", "") * 10
    )


def test_tokens_of_a_bin_take_the_special_tokens_of_a_tokenizer(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "a.bin")
    corpus = lg.load_corpus([str(tmp_path / "a.bin")], str(make_tokenizer(tmp_path)))
    assert (corpus.bos, corpus.sep, corpus.vocab_size) == (0, 1, 286)
    torch.from_numpy(lg.echo(lg.Rows(corpus, "train", 2, False, 0), 10)[0])
