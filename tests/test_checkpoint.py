"""Checkpoints of other libraries give the same logits and text, go back to them, and are never believed."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import make_model
from test_tokenizer import make_tokenizer

import eval as evaluate
import lengthgen as lg
import train

FLOAT32 = 1e-4  # relative: the other library adds up in another order


def needs(package):
    return pytest.importorskip(package, reason=f"{package} is not installed: nothing to compare with")


def shake(model):
    torch.manual_seed(1)
    with torch.no_grad():  # no weight is left at 0 or 1, where mixing two up would not show
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


def transformers_model(name, **changes):
    transformers = needs("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=3, vocab_size=48, state_size=16)
    if name == "mamba2":
        config = transformers.Mamba2Config(
            **sizes | dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=16) | changes
        )
        return shake(transformers.Mamba2ForCausalLM(config))
    return shake(transformers.MambaForCausalLM(transformers.MambaConfig(**sizes | changes)))


@torch.no_grad()
def greedy(model, tokens, n):
    """n greedy tokens after tokens (B, T), one at a time from the carried state."""
    out, state, new = [], None, tokens
    for _ in range(n):
        logits, state = model(new, state)
        new = logits[:, -1:].argmax(-1)
        out.append(new)
    return torch.cat(out, 1)


def their_text(theirs, tokens, **options):
    """50 greedy tokens from transformers, which else stops at its end token and masks its padding token."""
    theirs.generation_config.eos_token_id = None
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=50, do_sample=False) | options
    return theirs.generate(tokens, **options)[:, tokens.shape[1] :]


@torch.no_grad()
def assert_same_model(ours, theirs):
    tokens = torch.randint(0, ours.config.vocab_size, (2, 37))
    a, b = ours(tokens)[0], theirs(tokens).logits
    assert (a - b).abs().max() < FLOAT32 * b.abs().max()
    assert torch.equal(greedy(ours, tokens, 50), their_text(theirs, tokens))


TRANSFORMERS_MODELS = [
    ("mamba2", dict(tie_word_embeddings=True)),
    ("mamba2", dict(tie_word_embeddings=False)),
    ("mamba2", dict(n_groups=2)),
    ("mamba", dict(tie_word_embeddings=True)),
    ("mamba", dict(tie_word_embeddings=False, time_step_rank=5, expand=3)),
]


@pytest.mark.parametrize("name, changes", TRANSFORMERS_MODELS)
def test_transformers_models_give_the_same_logits_and_text_here_and_after_going_back(name, changes, tmp_path):
    theirs = transformers_model(name, **changes)
    if changes.get("n_groups", 1) > 1 and not hasattr(theirs.backbone.layers[0].mixer.norm, "group_size"):
        pytest.skip("this transformers normalises over all groups at once, unlike the official code")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lg.LanguageModel.from_pretrained(str(tmp_path / "theirs"))
    assert_same_model(ours, theirs)

    # back through the layout of mamba_ssm, which differs from theirs in one name
    ours.save_pretrained(str(tmp_path / "back"))
    weights = torch.load(tmp_path / "back" / "pytorch_model.bin")
    weights = {k.replace("embedding.", "embeddings."): x for k, x in weights.items()}
    back = copy.deepcopy(theirs)
    for p in back.parameters():
        p.data.zero_()
    back.load_state_dict(weights)  # strict: every name is there, and no other
    for (a, x), (b, y) in zip(theirs.state_dict().items(), back.state_dict().items(), strict=True):
        assert a == b and torch.equal(x, y)
    assert_same_model(ours, back)
    assert_same_model(lg.LanguageModel.from_pretrained(str(tmp_path / "back")), back)


@pytest.mark.parametrize("name", ["mamba2", "mamba"])
def test_official_checkpoints_give_the_same_logits_and_text(name, tmp_path):
    """Official names, float16, a vocabulary of 43 padded to 48, which transformers takes for words."""
    theirs = transformers_model(name, tie_word_embeddings=True).half().float()
    weights = {k.replace("embeddings", "embedding"): x.half() for k, x in theirs.state_dict().items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    ssm = dict(layer="Mamba2", d_state=16, headdim=8) if name == "mamba2" else {}
    sizes = dict(d_model=32, n_layer=3, vocab_size=43, pad_vocab_size_multiple=16 if name == "mamba2" else 8)
    official = dict(rms_norm=True, residual_in_fp32=True, fused_add_norm=True, ssm_cfg=ssm)
    (tmp_path / "config.json").write_text(json.dumps(sizes | official))
    ours = lg.LanguageModel.from_pretrained(str(tmp_path))
    assert ours.lm_head.weight.dtype == torch.float32
    tokens = torch.randint(0, 43, (2, 37))
    a, b = ours(tokens)[0], theirs(tokens).logits
    assert a.shape == (2, 37, 43)
    assert (a - b[..., :43]).abs().max() < FLOAT32 * b.abs().max()
    padding = [[i] for i in range(43, 48)]
    assert torch.equal(greedy(ours, tokens, 50), their_text(theirs, tokens, bad_words_ids=padding))


def norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def naive_fla(layer, w, tokens, H):
    """A model of flash-linear-attention by definition, in float64: tokens (T,) -> logits (T, C).

    layer: naive_gla or naive_gdn; w: {its name of a weight: weight}
    """
    x = w["model.embeddings.weight"][tokens]
    for i in range(3):
        p = f"model.layers.{i}."
        attn = {name.removeprefix(p + "attn."): y for name, y in w.items()}
        x = x + layer(attn, norm(x, w[p + "attn_norm.weight"]), H) @ attn["o_proj.weight"].T
        h = norm(x, w[p + "mlp_norm.weight"])
        h = F.silu(h @ w[p + "mlp.gate_proj.weight"].T) * (h @ w[p + "mlp.up_proj.weight"].T)
        x = x + h @ w[p + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def naive_gla(w, h, H):
    q, k, v, g = (h @ w[f"{n}_proj.weight"].T for n in "qkvg")
    gate = h @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T
    a = torch.sigmoid(gate + w["gk_proj.1.bias"]) ** (1 / 16)
    q, k, v, a = (y.unflatten(1, (H, -1)) for y in (q, k, v, a))
    S, o = 0, []
    for t in range(len(h)):
        S = a[t, :, :, None] * S + k[t, :, :, None] * v[t, :, None]
        o.append(torch.einsum("hkv,hk->hv", S, q[t]) / k.shape[-1] ** 0.5)
    g_norm = w.get("g_norm.weight", w.get("g_norm_swish_gate.weight"))
    return norm(torch.stack(o), g_norm).flatten(1) * F.silu(g)


def naive_gdn(w, h, H):
    def mixed(n):
        """A projection, each channel a weighted sum of its last four values, then SiLU; split into heads."""
        x = F.pad(h @ w[f"{n}_proj.weight"].T, (0, 0, 3, 0))
        weight = w[f"{n}_conv1d.weight"][:, 0]  # (channels, 4)
        return F.silu(sum(x[i : len(h) + i] * weight[:, i] for i in range(4))).unflatten(1, (H, -1))

    q, k, v = mixed("q"), mixed("k"), mixed("v")
    q, k = (y / torch.sqrt((y * y).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    beta = torch.sigmoid(h @ w["b_proj.weight"].T)
    a = torch.exp(-w["A_log"].exp() * F.softplus(h @ w["a_proj.weight"].T + w["dt_bias"]))
    S, o = torch.zeros(H, k.shape[-1], v.shape[-1], dtype=h.dtype), []
    for t in range(len(h)):
        S = a[t, :, None, None] * S
        new = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
        S = S + k[t, :, :, None] * new[:, None]
        o.append(torch.einsum("hkv,hk->hv", S, q[t]) / k.shape[-1] ** 0.5)
    return norm(torch.stack(o), w["o_norm.weight"]).flatten(1) * F.silu(h @ w["g_proj.weight"].T)


def fla_weights(model):
    """The weights of a GLA or Gated DeltaNet of ours by the names of flash-linear-attention, in float32."""
    weights = {}
    for name, x in model.state_dict().items():
        if not name.startswith("lm_head."):
            name = "model." + name
        name = name.replace("embedding.", "embeddings.").replace(".mixer.", ".attn.")
        name = name.replace(".norm.", ".attn_norm.").replace("norm_f.", "norm.")
        weights[name] = x.detach().float()
    return weights


GLA = dict(model_type="gla", hidden_size=32, num_hidden_layers=3, num_heads=2, vocab_size=40, expand_k=0.5)
GLA |= dict(
    expand_v=1, hidden_ratio=4, norm_eps=1e-6, attn_mode="chunk", use_short_conv=False, fuse_norm=True
)
GDN = dict(model_type="gated_deltanet", hidden_size=32, num_hidden_layers=3, num_heads=2, vocab_size=40)
GDN |= dict(head_dim=4, expand_v=1.5, hidden_ratio=4, norm_eps=1e-6, attn_mode="chunk", use_short_conv=True)
GDN |= dict(use_gate=True, allow_neg_eigval=False, conv_size=4, num_v_heads=None, intermediate_size=None)


def save_shards(weights, folder, shards):
    """Write weights into one model.safetensors, or into several files with an index."""
    save_file = needs("safetensors.torch").save_file
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    where = {name: files[i % shards] for i, name in enumerate(weights)}
    for file in files:
        save_file({name: x for name, x in weights.items() if where[name] == file}, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=where)))


@pytest.mark.parametrize("shards, fuse_norm", [(1, True), (1, False), (3, True)])
def test_flash_linear_attention_checkpoints_give_its_logits_and_text(shards, fuse_norm, tmp_path):
    names = fla_weights(make_model("gla", vocab_size=40, d_model=32, n_layer=3))
    if not fuse_norm:
        names = {k.replace("g_norm_swish_gate", "g_norm"): x for k, x in names.items()}
    (tmp_path / "config.json").write_text(json.dumps(GLA | dict(fuse_norm=fuse_norm)))
    save_shards(names, tmp_path, shards)
    assert_same_as_naive(naive_gla, names, tmp_path)


def assert_same_as_naive(layer, names, folder):
    model = lg.LanguageModel.from_pretrained(str(folder))
    exact = {name: x.double() for name, x in names.items()}
    tokens = torch.randint(0, 40, (37,))
    logits = naive_fla(layer, exact, tokens, 2)
    assert (model(tokens[None])[0][0] - logits).abs().max() < FLOAT32 * logits.abs().max()
    text = tokens
    for _ in range(50):
        text = torch.cat([text, naive_fla(layer, exact, text, 2)[-1].argmax(-1, keepdim=True)])
    assert torch.equal(greedy(model, tokens[None], 50)[0], text[37:])


def test_a_gated_deltanet_of_flash_linear_attention_gives_its_logits_and_text_and_goes_back(tmp_path):
    names = fla_weights(make_model("gdn", vocab_size=40, d_model=32, n_layer=3))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(GDN))
    save_shards(names, tmp_path / "theirs", 1)
    assert_same_as_naive(naive_gdn, names, tmp_path / "theirs")
    lg.LanguageModel.from_pretrained(str(tmp_path / "theirs")).save_pretrained(str(tmp_path / "back"))
    back = torch.load(tmp_path / "back" / "pytorch_model.bin")
    assert names.keys() == back.keys() and all(torch.equal(x, back[name]) for name, x in names.items())
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings.items() <= GDN.items() | {("tie_word_embeddings", False)}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(use_gate=False), "its use_gate is False"),
        (dict(allow_neg_eigval=True), "its allow_neg_eigval is True"),
        (dict(num_v_heads=4), "its num_v_heads is 4"),
        (dict(attn=dict(layers=[0])), "its attn is"),
        (dict(expand_v=1.3), "headdim 4 . expand_v 1.3 is no integer"),
        (dict(intermediate_size=768), "size mismatch"),
    ],
)
def test_a_gated_deltanet_of_another_formula_is_refused(changes, message, tmp_path):
    sizes = dict(
        vocab_size=40, d_model=32, n_layer=3, hidden_ratio=30 if "intermediate_size" in changes else 4
    )
    save_shards(fla_weights(make_model("gdn", **sizes)), tmp_path, 1)
    (tmp_path / "config.json").write_text(json.dumps(GDN | changes))
    with pytest.raises(ValueError, match=message):
        lg.LanguageModel.from_pretrained(str(tmp_path))


def test_a_gated_deltanet_without_short_convolutions_is_refused(tmp_path):
    names = fla_weights(make_model("gdn", vocab_size=40, d_model=32, n_layer=3))
    save_shards({name: x for name, x in names.items() if "conv1d" not in name}, tmp_path, 1)
    (tmp_path / "config.json").write_text(json.dumps(GDN | dict(use_short_conv=False)))
    with pytest.raises(ValueError, match=r"Missing key\(s\).*q_conv1d"):
        lg.LanguageModel.from_pretrained(str(tmp_path))


def test_settings_and_weights_that_change_nothing_in_a_gated_deltanet_are_taken(tmp_path):
    for harmless in (dict(num_v_heads=2), dict(conv_bias=False), dict(output_gate_activation="swish")):
        assert lg.import_settings(GDN | harmless) == lg.import_settings(GDN)
    with pytest.raises(ValueError, match="its output_gate_activation is 'sigmoid'"):
        lg.import_settings(GDN | dict(output_gate_activation="sigmoid"))
    names = fla_weights(make_model("gdn", vocab_size=40, d_model=32, n_layer=3))
    old = {f"model.layers.{i}.attn.D": torch.ones(2) for i in range(3)}  # of older versions, never used
    save_shards(names | old, tmp_path, 1)
    (tmp_path / "config.json").write_text(json.dumps(GDN))
    assert_same_as_naive(naive_gdn, names, tmp_path)


def test_a_gated_deltanet_whose_sizes_flash_linear_attention_would_not_load_is_refused():
    for headdim, expand_v in ((100, 1.1), (96, 1.3333334)):  # both libraries take these
        lg.GatedDeltaNet(lg.ModelConfig(layer="gdn", d_model=8, headdim=headdim, expand_v=expand_v))
    with pytest.raises(AssertionError, match=r"headdim 100 \* expand_v 1.15 is no integer"):
        lg.GatedDeltaNet(lg.ModelConfig(layer="gdn", d_model=8, headdim=100, expand_v=1.15))


@pytest.mark.parametrize(
    "name, their_class", [("gla", "GLAForCausalLM"), ("gdn", "GatedDeltaNetForCausalLM")]
)
def test_flash_linear_attention_loads_what_is_saved_here_and_back(name, their_class, tmp_path):
    fla = needs("fla.models")
    ours = make_model(name, vocab_size=40, d_model=32, n_layer=3).float()
    ours.save_pretrained(str(tmp_path / "ours"))
    model_class = getattr(fla, their_class)
    theirs, info = model_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[x] for x in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(tmp_path / "theirs")
    back = lg.LanguageModel.from_pretrained(str(tmp_path / "theirs"))
    assert all(torch.equal(x, back.state_dict()[name]) for name, x in ours.state_dict().items())


def test_settings_that_published_checkpoints_carry_besides_change_nothing():
    besides = {
        "mamba": dict(
            d_model=8, d_inner=16, n_layer=24, ssm_cfg={}, fused_add_norm=True, pad_vocab_size_multiple=8
        ),
        "mamba2": dict(norm_before_gate=True, time_step_limit=[0.0, math.inf], intermediate_size=16),
        "gla": dict(
            share_conv_kernel=True, conv_size=4, attn_mode="fused_chunk", max_position_embeddings=2048
        ),
    }
    for kind, more in besides.items():
        settings = dict(model_type=kind, hidden_size=8, num_hidden_layers=24)
        assert lg.import_settings(settings | more) == lg.import_settings(settings), kind
    assert lg.import_settings(dict(model_type="mamba", d_model=8)).d_model == 768  # besides is not instead


def tied_once(folder, name, factor=None):
    """Rewrite a tied checkpoint so that it holds its weight under one name, or both with different values."""
    file = folder / "pytorch_model.bin"
    weights = torch.load(file)
    both = ("lm_head.weight", "backbone.embedding.weight")
    (other,) = {*both} - {name}
    weights[other] = factor * weights[name] if factor else None
    torch.save({k: x for k, x in weights.items() if x is not None}, file)


@pytest.mark.parametrize("name", ["lm_head.weight", "backbone.embedding.weight"])
def test_a_tied_checkpoint_that_holds_its_weight_once_loads(name, tmp_path):
    model = make_model("mamba2").float()
    model.save_pretrained(str(tmp_path))
    tied_once(tmp_path, name)
    back = lg.LanguageModel.from_pretrained(str(tmp_path))
    assert back.lm_head.weight is back.embedding.weight
    assert all(torch.equal(x, back.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("name", ["lm_head.weight", "backbone.embedding.weight"])
def test_a_tied_checkpoint_with_two_different_weights_is_refused(name, tmp_path):
    make_model("mamba2").save_pretrained(str(tmp_path))
    tied_once(tmp_path, name, factor=2)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        lg.LanguageModel.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embeddings.weight"])
def test_an_untied_checkpoint_that_lacks_one_of_the_two_is_refused(name, tmp_path):
    make_model("gla").save_pretrained(str(tmp_path))
    weights = torch.load(tmp_path / "pytorch_model.bin")
    weights.pop(name)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"Missing key\(s\).*(lm_head|embedding)\.weight"):
        lg.LanguageModel.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "settings, pad, tied",
    [
        (dict(d_model=8, ssm_cfg=dict(layer="Mamba2")), 8, True),
        (dict(d_model=8), 8, True),
        (dict(model_type="mamba2", hidden_size=8), 1, False),
        (dict(model_type="mamba", hidden_size=8), 1, True),
        (dict(model_type="gla", hidden_size=8), 1, False),
        (dict(model_type="gated_deltanet", hidden_size=8), 1, False),
    ],
)
def test_a_setting_left_out_means_what_it_means_in_that_library(settings, pad, tied):
    config = lg.import_settings(settings)
    assert (config.pad_vocab_size_multiple, config.tie_embeddings) == (pad, tied)


OURS = {
    "mamba2": dict(pad_vocab_size_multiple=16),
    "mamba1": dict(tie_embeddings=False),
    "gla": dict(d_model=16),
    "gdn": dict(d_conv=3),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", lg.LAYERS)
def test_saving_and_loading_changes_no_value(name, dtype, tmp_path):
    dtype = getattr(torch, dtype)
    first = make_model(name, **OURS[name]).to(dtype).float()
    first.save_pretrained(str(tmp_path / "a"), dtype)
    second = lg.LanguageModel.from_pretrained(str(tmp_path / "a"))
    second.save_pretrained(str(tmp_path / "b"), dtype)
    for file in os.listdir(tmp_path / "a"):
        if file != "pytorch_model.bin":  # a zip file, which holds its own name
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    third = lg.LanguageModel.from_pretrained(str(tmp_path / "b"))
    for x, y, z in zip(first.parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(x, y) and torch.equal(x, z) and y.dtype == torch.float32
    tokens = torch.randint(0, 11, (2, 20))
    assert (first(tokens)[0] - third(tokens)[0][..., :11]).abs().max() < 1e-5


def test_post_trained_runs_of_train_py_can_be_saved_for_other_libraries(tmp_path):
    model = make_model("mamba2").float()
    saved = dict(config=lg.asdict(model.config), model=model.state_dict(), settings={})
    torch.save(saved, tmp_path / lg.CHECKPOINT)
    for path in (tmp_path, tmp_path / lg.CHECKPOINT):
        lg.LanguageModel.from_pretrained(str(path)).save_pretrained(str(tmp_path / "out"))
        back = lg.LanguageModel.from_pretrained(str(tmp_path / "out"))
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), back.parameters(), strict=True))
        assert back.lm_head.weight is back.embedding.weight


def test_what_a_library_cannot_hold_is_refused_and_nothing_written(tmp_path):
    out = str(tmp_path / "out")
    for name, changes, message in (
        ("mamba2", dict(norm_eps=1e-6), "no setting for norm_eps 1e-06"),
        ("mamba1", dict(norm_eps=1e-6), "no setting for norm_eps 1e-06"),
        ("gla", dict(gate_low_rank_dim=3), "no setting for gate_low_rank_dim 3"),
        ("gla", dict(pad_vocab_size_multiple=16), "no setting for pad_vocab_size_multiple 16"),
    ):
        with pytest.raises(ValueError, match=message):
            make_model(name, **changes).save_pretrained(out)
    large = make_model("mamba2")
    large.norm_f.weight.data[0] = 1e6
    with pytest.raises(ValueError, match=r"norm_f.weight is not finite or too large for torch.float16"):
        large.save_pretrained(out, dtype=torch.float16)
    assert not os.path.exists(out)
    with pytest.raises(AssertionError, match=r"torch\.int8"):
        make_model("mamba2").save_pretrained(out, dtype=torch.int8)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        make_model("mamba2").save_pretrained(str(tmp_path / "file"))


def test_a_full_disk_is_said_so_and_leaves_no_file(tmp_path):
    """/dev/full is a disk without room, which every write to it finds out."""
    model = make_model("mamba2")
    before = b"the one before"
    for name in ("pytorch_model.bin", "config.json"):
        (tmp_path / name).write_bytes(before)
        (tmp_path / f"{name}.tmp").symlink_to("/dev/full")
        with pytest.raises(ValueError, match=f"{name} cannot be written: .*No space left on device"):
            model.save_pretrained(str(tmp_path))
        assert (tmp_path / name).read_bytes() == before
        assert not os.path.lexists(tmp_path / f"{name}.tmp")


def test_what_cannot_be_printed_in_a_narrow_encoding_is_replaced(tmp_path):
    """`eval.py sample > file` prints the sample all the same."""
    model = make_model("mamba2", vocab_size=258).float()
    settings = dict(task="text", T=8, tokenizer="bytes")
    saved = dict(config=lg.asdict(model.config), model=model.state_dict(), settings=settings)
    torch.save(saved, tmp_path / lg.CHECKPOINT)
    command = [sys.executable, evaluate.__file__, "sample", "--init", str(tmp_path), "--device", "cpu"]
    command += ["--prompt", "caf\u00e9 \u6771", "--tokens", "40"]
    environment = dict(os.environ, PYTHONIOENCODING="ascii")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\ncaf? ?" in done.stdout and len(done.stdout.split("caf? ?")[1]) > 10


@pytest.mark.parametrize("file", ["model.safetensors", lg.CHECKPOINT])
def test_a_folder_with_weights_that_would_be_read_instead_is_left_alone(file, tmp_path):
    first, second = make_model("mamba2"), make_model("mamba2")
    first.save_pretrained(str(tmp_path))
    (tmp_path / "pytorch_model.bin").rename(tmp_path / file)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"{file} would be read instead"):
        second.save_pretrained(str(tmp_path))
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}


@pytest.mark.parametrize("spoil", [lambda c: c.pop("config"), lambda c: c.update(model=[1])])
def test_a_run_without_its_parts_is_no_checkpoint(spoil, tmp_path):
    saved = dict(config=lg.asdict(make_model("mamba2").config), model={}, settings={})
    spoil(saved)
    torch.save(saved, tmp_path / lg.CHECKPOINT)
    with pytest.raises(ValueError, match=r"checkpoint.pt cannot be read as a checkpoint of train.py"):
        lg.LanguageModel.from_pretrained(tmp_path)


OUR_NAME = "layers.1.mixer.in_proj.weight"
NAME = f"backbone.{OUR_NAME}"


def weights(change):
    """A function that edits the weights of a folder."""

    def edit(folder):
        w = torch.load(folder / "pytorch_model.bin")
        change(w)
        torch.save(w, folder / "pytorch_model.bin")

    return edit


def settings(**changes):
    """A function that edits the config.json of a folder."""

    def edit(folder):
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | changes))

    return edit


def zip_bomb(folder):
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (weights(lambda w: w.pop(NAME)), f"cannot be read as a checkpoint: .* Missing key.*{OUR_NAME}"),
        (
            weights(lambda w: w.update(more=w[NAME])),
            "cannot be read as a checkpoint: .* Unexpected key.*more",
        ),
        (
            weights(lambda w: w.update({NAME: w[NAME].T})),
            rf"{OUR_NAME}: .*\[8, 48\].* current model is torch.Size\(\[48, 8\]\)",
        ),
        (weights(lambda w: w.update({NAME: w[NAME].int()})), f"{OUR_NAME}.*Only Tensors of floating point"),
        (weights(lambda w: w.update({NAME: 3})), f"{OUR_NAME}.*received <class .int.>"),
        (weights(lambda w: w[NAME][0].fill_(torch.nan)), f"{OUR_NAME} has numbers that are not"),
        (weights(lambda w: w.update({"lm_head.weight": 2 * w["lm_head.weight"]})), "differs"),
        (
            weights(lambda w: w.update({NAME: w[NAME].to_sparse()})),
            "cannot be read as a checkpoint: .*Sparse",
        ),
        (weights(lambda w: w.update({NAME: torch.zeros(1).expand(48, 10**9)})), "size mismatch"),
        (weights(lambda w: w.clear()), "has no checkpoint"),
        (settings(n_layer=10**9), "cannot be read as a checkpoint: .* ask for 1000000000 layers"),
        (settings(d_model=10**6), r"size mismatch.*1000000\]"),
        (settings(ssm_cfg=dict(layer="Mamba2", headdim=4, d_state=10**9)), "size mismatch"),
        (zip_bomb, "pytorch_model.bin cannot be read as weights"),
        (settings(rms_norm=False), "config.json cannot be .*: its rms_norm is False, but only True is"),
        (settings(attn_layer_idx=[3]), r"attn_layer_idx is \[3\]"),
        (settings(model_type="llama"), "unknown kind of model 'llama'"),
        (settings(model_type=["a"]), "config.json cannot be read as the settings of a model: .*list"),
        (settings(d_model="8"), "config.json cannot be read as the settings"),
        (settings(d_model=-8), "negative dimension -8"),
        (settings(d_model=9), r"current model is .*, 9\]|18 channels do not"),
        (settings(ssm_cfg=[1]), "config.json cannot be read as the settings of a model"),
        (lambda f: (f / "config.json").write_text('{"d_model": 8'), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json cannot .*RecursionError"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot .*No such file"),
        (
            lambda f: os.truncate(f / "pytorch_model.bin", 3000),
            "pytorch_model.bin cannot be read as weights: .*corrupted",
        ),
        (
            lambda f: torch.save([1, 2], f / "pytorch_model.bin"),
            "pytorch_model.bin cannot be read as weights",
        ),
        (
            lambda f: torch.save({NAME: Bomb()}, f / "pytorch_model.bin"),
            "pytorch_model.bin cannot .*executed",
        ),
        (lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb())), "pytorch_model.bin cannot"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin cannot be read as weights"),
    ],
)
def test_a_spoilt_checkpoint_is_one_clear_error_and_runs_nothing(spoil, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model("mamba2", ngroups=1, d_state=6).save_pretrained(str(tmp_path))
    lg.LanguageModel.from_pretrained(str(tmp_path))
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        lg.LanguageModel.from_pretrained(str(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 500
    assert not os.path.exists("exploded")


def test_a_library_that_panics_or_talks_at_length_is_one_short_line_and_an_interrupt_passes():
    class Panic(BaseException):  # as Rust's panics come to Python
        pass

    for error in (Panic("a\nb " * 1000), MemoryError(), RecursionError("deep"), KeyError("a")):
        with pytest.raises(
            ValueError, match=f"^file cannot be read as text: {type(error).__name__}"
        ) as caught:
            with lg.reading("file", "text"):
                raise error
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= 500
    with pytest.raises(KeyboardInterrupt), lg.reading("file", "text"):
        raise KeyboardInterrupt


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", forbidden)
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be read as a folder .*Permission denied$"):
        lg.load_corpus(tmp_path)


@pytest.mark.parametrize("option", ["--init", "--tokenizer"])
def test_an_empty_name_is_an_error_and_not_none(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text " * 100)
    command = ["--init", "model", "--data", "text.txt", "--T", "8"]
    make_model("mamba2", vocab_size=258).save_pretrained("model")
    message = {"--init": "no checkpoint at ''", "--tokenizer": "cannot be read as a tokenizer"}[option]
    with pytest.raises(ValueError, match=message):
        train.main([*command, option, "", "--intervention", "zero", "--steps", "1"])
    with pytest.raises(ValueError, match=message):
        evaluate.main(["poswise", *command, option, "", "--windows", "1"])
    with pytest.raises(ValueError, match=message):
        evaluate.main(["sample", "--init", "model", option, "", "--tokens", "1"])


def test_unknown_settings_are_named_in_one_line(tmp_path, capsys):
    make_model("mamba2").save_pretrained(str(tmp_path))
    settings(depth_gate=1, next_years_key=[2])(tmp_path)
    capsys.readouterr()
    lg.LanguageModel.from_pretrained(str(tmp_path))
    (line,) = capsys.readouterr().out.splitlines()
    assert "depth_gate, next_years_key" in line


def test_settings_that_say_nothing_mean_the_default():
    gla = dict(model_type="gla", hidden_size=8, num_heads=2)
    for more in (dict(hidden_ratio=None), dict(num_kv_heads=2), dict(num_kv_heads=None)):
        assert lg.import_settings(gla | more) == lg.import_settings(gla)
    with pytest.raises(ValueError, match="num_kv_heads is 1"):
        lg.import_settings(gla | dict(num_kv_heads=1))
    assert lg.import_settings(dict(d_model=8, ssm_cfg=None)) == lg.import_settings(dict(d_model=8))


@pytest.mark.parametrize("kind, name", [("mamba2", "Mamba2Config"), ("mamba", "MambaConfig")])
def test_missing_settings_are_those_of_transformers(kind, name):
    """All but the sizes that the shapes of the weights tell; there another default is refused."""
    theirs = getattr(needs("transformers"), name)()
    ours = lg.import_settings(dict(model_type=kind))
    names = ["layer_norm_epsilon", "tie_word_embeddings", "state_size", "conv_kernel", "expand"]
    if kind == "mamba2":
        names += ["head_dim", "n_groups"]
    for setting in names:
        assert getattr(ours, lg.OUR_FIELD.get(setting, setting)) == getattr(theirs, setting), setting


def test_settings_that_a_layer_does_not_use_are_not_in_the_way(tmp_path):
    model = make_model("mamba1", headdim=3, ngroups=5)
    model.save_pretrained(str(tmp_path))
    back = lg.LanguageModel.from_pretrained(str(tmp_path))
    assert all(torch.equal(x.float(), y) for x, y in zip(model.parameters(), back.parameters(), strict=True))


def test_half_precision_in_a_run_of_ours_is_read_as_float32(tmp_path):
    model = make_model("mamba2").half()
    saved = dict(config=lg.asdict(model.config), model=model.state_dict(), settings={})
    torch.save(saved, tmp_path / lg.CHECKPOINT)
    back = lg.LanguageModel.from_pretrained(tmp_path)
    for x, y in zip(model.parameters(), back.parameters(), strict=True):
        assert y.dtype == torch.float32 and torch.equal(x.float(), y)


def save_gla(folder, shards=1):
    """A GLA of flash-linear-attention in `shards` .safetensors files, with an index if several."""
    model = make_model("gla").float()
    model.save_pretrained(str(folder))
    (folder / "pytorch_model.bin").unlink()
    save_shards(fla_weights(model), folder, shards)
    return model


def header(change):
    """A function that edits the header's entry for NORM in a .safetensors file."""

    def edit(file):
        data = file.read_bytes()
        n = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + n])
        change(entries)
        text = json.dumps(entries).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])

    return edit


def offsets(start, stop):
    return header(lambda h: h[NORM].update(data_offsets=[start, stop]))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (offsets(10**12, 10**12 + 32), "cannot be read as weights"),
        (offsets(-32, 0), "cannot be read as weights"),
        (offsets(0, 10**9), "cannot be read as weights"),
        (offsets("a", None), "cannot be read as weights"),
        (offsets(0, 32), "cannot be read as weights"),
        (
            header(
                lambda h: h.update({"model.layers.0.attn_norm.weight": h["model.layers.1.attn_norm.weight"]})
            ),
            "invalid offset",
        ),
        (header(lambda h: h[NORM].update(shape=[-8])), "cannot be read as weights"),
        (header(lambda h: h[NORM].update(shape=[2, -2, -2])), "cannot be read as weights"),
        (header(lambda h: h[NORM].update(shape=[4, 2])), "size mismatch for norm_f.weight"),
        (header(lambda h: h[NORM].update(dtype="I64")), "cannot be read as weights"),
        (header(lambda h: h.update({NORM: 1})), "cannot be read as weights"),
        (header(lambda h: h.pop(NORM)), "cannot be read as weights"),
        (lambda f: os.truncate(f, os.path.getsize(f) - 1), "cannot be read as weights"),
        (lambda f: os.truncate(f, 20), "invalid header length"),
        (lambda f: os.truncate(f, 5), "header too small"),
        (lambda f: f.write_bytes((10**10).to_bytes(8, "little") + b"{}"), "header too large"),
        (lambda f: f.write_bytes((8).to_bytes(8, "little") + b"{'a': 1}"), "invalid JSON"),
        (lambda f: f.write_bytes(f.read_bytes() + b"more"), "cannot be read as weights"),
    ],
)
def test_a_safetensors_file_that_lies_is_one_clear_error(spoil, message, tmp_path):
    save_gla(tmp_path)
    lg.LanguageModel.from_pretrained(str(tmp_path))
    spoil(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        lg.LanguageModel.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files_of_every_kind_are_refused_or_read():
    """In a process of their own, because a crash would end this one."""
    script = os.path.join(os.path.dirname(__file__), "fuzz_files.py")
    needs("safetensors")
    done = subprocess.run([sys.executable, "-W", "ignore", script, "150"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_missing_shard_is_noticed(tmp_path):
    save_gla(tmp_path, shards=2)
    lg.LanguageModel.from_pretrained(str(tmp_path))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint: .*Missing key"):
        lg.LanguageModel.from_pretrained(str(tmp_path))


def test_official_sizes_are_post_trained_as_in_the_paper(tmp_path, monkeypatch):
    """One zero start in ten, 0.5M tokens a step by accumulation, T, task and tokenizer of the checkpoint."""
    monkeypatch.chdir(tmp_path)
    position_wise = lg.position_wise
    monkeypatch.setattr(lg, "position_wise", lambda *args, **options: position_wise(*args[:4], 2, **options))
    monkeypatch.setattr(train, "LARGE", 0)
    monkeypatch.setattr(train, "LARGE_TOKENS", 256)
    make_model("mamba2", vocab_size=286, ngroups=1).float().save_pretrained(
        "mamba2-130m", dtype=torch.float16
    )
    make_tokenizer(tmp_path / "mamba2-130m")
    (tmp_path / "text.txt").write_text("a test of text " * 200)
    options = "--init mamba2-130m --intervention state_passing --data text.txt --T 16 --steps 2 --device cpu"
    train.main(options.split())
    saved = lg.load_checkpoint("runs/mamba2-130m-text-state_passing-s0")
    wanted = dict(batch=8, accumulate=2, zero_prob=0.1, lr=6e-5, task="text", steps=2, T=16)
    assert {key: saved["settings"][key] for key in wanted} == wanted
    assert os.path.samefile(saved["settings"]["tokenizer"], "mamba2-130m")
    assert saved["config"]["recompute"]
    lg.model_from_checkpoint(saved).save_pretrained("out")
    back = lg.load_checkpoint("out")["model"]
    assert back.keys() == saved["model"].keys()
    assert all(torch.equal(x, saved["model"][name]) for name, x in back.items())

    # its runs go on as it did
    train.main(
        "--init runs/mamba2-130m-text-state_passing-s0 --intervention tbtt --data text.txt --steps 1".split()
    )
    again = lg.load_checkpoint("runs/mamba2-130m-text-tbtt-s0")
    for key in wanted.keys() - {"steps"} | {"tokenizer", "model"}:
        assert again["settings"][key] == saved["settings"][key]
    assert lg.load_checkpoint("mamba2-130m")["settings"]["T"] == 2048


def test_the_learning_rate_of_official_sizes_is_a_tenth_of_the_peak_of_their_pre_training():
    parameters = (129e6, 368e6, 780e6, 1.34e9, 2.7e9)  # 130m to 2.7b
    rates = [next(lr for up_to, lr in train.LARGE_LR.items() if size <= up_to) for size in parameters]
    assert rates == [6e-5, 3e-5, 2.5e-5, 2e-5, 1.6e-5]


def test_what_is_read_is_a_copy(tmp_path):
    """Training what was loaded, or replacing the file, leaves the other untouched."""
    save_gla(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = lg.LanguageModel.from_pretrained(str(tmp_path))
    values = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    again = lg.LanguageModel.from_pretrained(str(tmp_path))
    np.memmap(tmp_path / "model.safetensors", np.uint8, "r+")[-1000:] = 0
    assert all(torch.equal(x, values[name]) for name, x in again.state_dict().items())
