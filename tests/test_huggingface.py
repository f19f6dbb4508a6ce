"""Any causal language model of HuggingFace as a target, by path, under its own names."""

import json
import re
import shutil
import socket

import pytest
import torch
import transformers
from support import tiny_checkpoints

from spd_lightning import BadInput, ComponentModel, Decomposition, HuggingFaceLM
from spd_lightning.decomposition.components import Mask
from spd_lightning.targets import conversion
from spd_lightning.targets.conversion import decoder_from


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A checkpoint's folder, and its model."""
    folder = tmp_path_factory.mktemp("gpt2")
    return folder, tiny_checkpoints.write(folder, "gpt2")


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_logits_and_names_are_the_models_own(tmp_path, kind):
    model = tiny_checkpoints.write(tmp_path, kind)
    wrapped = HuggingFaceLM.from_pretrained(str(tmp_path), "float32")
    tokens = tiny_checkpoints.tokens()
    assert torch.equal(wrapped(tokens), model(tokens).logits)
    torch.testing.assert_close(wrapped.loss(tokens), model(tokens, labels=tokens).loss)
    assert [name for name, _ in wrapped.named_modules()] == [
        name for name, _ in model.named_modules()
    ]
    assert set(wrapped.state_dict()) == set(model.state_dict())
    assert (wrapped.vocab, wrapped.context) == (tiny_checkpoints.VOCAB, tiny_checkpoints.CONTEXT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rebuilt_from_plain_values(gpt2, dtype):
    wrapped = HuggingFaceLM.from_pretrained(str(gpt2[0]), dtype)
    tokens = tiny_checkpoints.tokens()
    assert wrapped.transformer.h[0].mlp.c_fc.weight.dtype == getattr(torch, dtype)
    again = HuggingFaceLM(**json.loads(json.dumps(wrapped.init_args)))
    assert not torch.equal(again(tokens), wrapped(tokens))
    again.load_state_dict(wrapped.state_dict())
    assert torch.equal(again(tokens), wrapped(tokens))
    assert str(gpt2[0]) not in json.dumps(wrapped.init_args)


def test_precision_follows_the_device(gpt2, monkeypatch):
    """bfloat16 by default where there is a GPU."""
    assert HuggingFaceLM.from_pretrained(str(gpt2[0])).init_args["dtype"] == (
        "bfloat16" if torch.cuda.is_available() else "float32"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert HuggingFaceLM.from_pretrained(str(gpt2[0])).init_args["dtype"] == "bfloat16"


def test_its_parts_move_with_it(gpt2):
    """What happens to the wrapper happens to the model inside."""
    wrapped = HuggingFaceLM.from_pretrained(str(gpt2[0]), "float32").double()
    assert wrapped(tiny_checkpoints.tokens()).dtype == torch.float64
    wrapped.train()
    assert wrapped.transformer.drop.training
    wrapped.eval()
    assert torch.equal(wrapped(tiny_checkpoints.tokens()), wrapped(tiny_checkpoints.tokens()))


def test_nothing_is_said(gpt2, capfd):
    """No progress bars and no advice; transformers is afterwards as talkative as before."""
    talk = transformers.utils.logging
    talk.set_verbosity_info()
    talk.enable_progress_bar()
    try:
        wrapped = HuggingFaceLM.from_pretrained(str(gpt2[0]))
        HuggingFaceLM(**wrapped.init_args)(tiny_checkpoints.tokens())
        assert talk.get_verbosity() == talk.INFO
        assert talk.is_progress_bar_enabled()
    finally:
        talk.set_verbosity_error()
        talk.disable_progress_bar()
    assert capfd.readouterr() == ("", "")


# ---- decomposing ---------------------------------------------------------------------------------

SITES = {
    "gpt2": {
        "transformer.h.*.mlp.c_fc": 5,
        "transformer.h.*.attn.c_attn": 4,
        "transformer.wte": 6,
        "lm_head": 3,
    },
    "llama": {
        "model.layers.*.mlp.*_proj": 5,
        "model.layers.*.self_attn.[qo]_proj": 4,
        "model.embed_tokens": 3,
    },
}


@pytest.mark.parametrize("kind", SITES)
def test_all_masks_one_reproduce_the_model(tmp_path, kind):
    """D5, with Linear, Conv1D (fused q, k, v) and Embedding sites, biases non-zero; fp64, replayed
    and in full.
    """
    tiny_checkpoints.write(tmp_path, kind)
    tokens = tiny_checkpoints.tokens()
    target = HuggingFaceLM.from_pretrained(str(tmp_path), "float64")
    wanted = target(tokens)
    model = ComponentModel(target, SITES[kind]).double()
    clean = model.clean(tokens)
    ones = {name: Mask(None, 1.0) for name in model.sites}
    assert torch.equal(clean.output, wanted)
    for record in (clean, None):
        out = model.masked(tokens, ones, record)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10 * wanted.abs().max().item())
    zeros = {name: Mask(torch.zeros(()), 0.0) for name in model.sites}
    assert (model.masked(tokens, zeros, clean) - wanted).abs().max() > 0.1


def test_one_masked_site_is_the_model_with_another_weight(gpt2):
    """A Conv1D site with half its components, against the model with that weight edited."""
    target = HuggingFaceLM.from_pretrained(str(gpt2[0]), "float64")
    tokens = tiny_checkpoints.tokens()
    site = "transformer.h.1.attn.c_attn"
    model = ComponentModel(target, {site: 6}).double()
    kept = (torch.arange(6) < 3).double()
    found = model.masked(tokens, {site: Mask(kept, 1.0)}, model.clean(tokens))
    edited = HuggingFaceLM.from_pretrained(str(gpt2[0]), "float64")
    weight = edited.transformer.h[1].attn.c_attn.weight  # Conv1D: [d_in, d_out]
    weight.data -= (model[site].V * (1 - kept)) @ model[site].U
    torch.testing.assert_close(found, edited(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("prefix", ["hf", "decoder"])
def test_a_checkpoint_is_decomposed_by_path(tmp_path, prefix):
    """What is saved of the decomposition opens where the checkpoint is not."""
    model = tiny_checkpoints.write(tmp_path / "gpt2", "gpt2")
    tokens = tiny_checkpoints.tokens()
    sites = {"hf": "transformer.h.*.mlp.c_fc", "decoder": "h.*.mlp.c_fc"}
    module = Decomposition(f"{prefix}:{tmp_path / 'gpt2'}", {sites[prefix]: 4})
    wanted = model(tokens).logits
    precise = prefix == "decoder" or not torch.cuda.is_available()
    tolerance = (1e-5 if precise else 0.05) * wanted.abs().max().item()
    torch.testing.assert_close(module.network(tokens).float(), wanted, rtol=0, atol=tolerance)
    module.save(tmp_path)
    shutil.rmtree(tmp_path / "gpt2")
    opened = Decomposition.from_pretrained(tmp_path)
    assert torch.equal(opened.network(tokens), module.network(tokens))
    masks = {name: Mask(None, 1.0) for name in opened.model.sites}
    torch.testing.assert_close(
        opened.model.masked(tokens, masks).float(), wanted, rtol=0, atol=10 * tolerance
    )


# ---- bad input -----------------------------------------------------------------------------------


def said(reference: str) -> str:
    with pytest.raises(BadInput) as caught:
        HuggingFaceLM.from_pretrained(reference)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_hub_name_without_network(monkeypatch):
    """One line, at once, naming configs that need none."""

    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert said("nobody/has-this") == (
        "model 'nobody/has-this': not on this machine, and no network to fetch it; "
        "stories-2L.yaml and code-2L.yaml need no network"
    )


def test_folders_that_hold_no_model(tmp_path, gpt2):
    assert "no such folder" in said(str(tmp_path / "nothing"))
    assert "no such folder" in said("./nothing")
    assert "cannot be loaded" in said(str(tmp_path))
    transformers.BertConfig(hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    assert "cannot be loaded" in said(str(tmp_path))


def test_a_checkpoint_without_all_weights(tmp_path, gpt2):
    """transformers would draw what is missing at random."""
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2[0])
    weights = {k: v for k, v in model.state_dict().items() if k != "transformer.h.1.mlp.c_fc.bias"}
    model.save_pretrained(tmp_path, state_dict=weights)
    assert "no fitting 'transformer.h.1.mlp.c_fc.bias'" in said(str(tmp_path))


def config_says(folder, **settings):
    """Rewrites a checkpoint's configuration, whatever its weights are."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_decide_whether_the_unembedding_is_tied(tmp_path, kind):
    """The configuration says tied, the checkpoint holds a head of its own: its logits, rebuilt ones
    too.
    """
    theirs = tiny_checkpoints.write(tmp_path, kind, tie_word_embeddings=False)
    tokens = tiny_checkpoints.tokens()
    config_says(tmp_path, tie_word_embeddings=True)
    wanted = theirs(tokens).logits
    wrapped = HuggingFaceLM.from_pretrained(str(tmp_path), "float32")
    decoder = decoder_from(str(tmp_path))
    assert torch.equal(wrapped(tokens), wanted)
    torch.testing.assert_close(
        decoder(tokens), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item()
    )
    for model in (wrapped, decoder):
        again = type(model)(**json.loads(json.dumps(model.init_args)))
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(tokens), model(tokens))


CONTRADICTIONS = {
    "attention_bias": (
        {"attention_bias": True},
        {"attention_bias": False},
        "self_attn.k_proj.bias",
    ),
    "mlp_bias": ({"mlp_bias": True}, {"mlp_bias": False}, "mlp.down_proj.bias"),
    "no bias": ({}, {"attention_bias": True}, "no fitting 'model.layers.0.self_attn.k_proj.bias'"),
    "untied": (
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        "no fitting 'lm_head.weight'",
    ),
    "layers": ({}, {"num_hidden_layers": 1}, "holds 'model.layers.1.input_layernorm.weight'"),
    "head_dim": ({}, {"head_dim": 8}, "model '"),
    "model_type": (
        {},
        {"model_type": "qwen3"},
        "no fitting 'model.layers.0.self_attn.k_norm.weight'",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_weights_that_are_not_used_or_are_missing_are_an_error(tmp_path, name):
    """One line, for hf: and decoder: alike, where transformers would leave weights out or draw
    them.
    """
    real, claimed, told = CONTRADICTIONS[name]
    tiny_checkpoints.write(tmp_path, "llama", **real)
    config_says(tmp_path, **claimed)
    assert told in said(str(tmp_path))
    with pytest.raises(BadInput, match=re.escape(told)):
        decoder_from(str(tmp_path))


def test_constants_of_old_checkpoints_are_no_weights(tmp_path):
    """GPT-2's used to hold its causal masks."""
    model = tiny_checkpoints.write(tmp_path, "gpt2")
    masks = {
        f"transformer.h.0.attn.{name}": torch.ones(1, 1, 4, 4) for name in ("bias", "masked_bias")
    }
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | masks)
    tokens = tiny_checkpoints.tokens()
    assert torch.equal(
        HuggingFaceLM.from_pretrained(str(tmp_path), "float32")(tokens), model(tokens).logits
    )


def test_norms_of_queries_that_the_config_does_not_know(tmp_path):
    """A Qwen3 checkpoint as a Llama."""
    tiny_checkpoints.write(tmp_path, "qwen3", head_dim=4)
    config_says(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"])
    assert (
        "holds 'model.layers.0.self_attn.k_norm.weight', which the model that its config.json"
        in said(str(tmp_path))
    )


def test_a_decoder_has_to_give_the_checkpoints_logits(tmp_path, monkeypatch):
    """Whatever else may differ: here, an activation of the wrong name."""
    tiny_checkpoints.write(tmp_path, "gpt2", activation_function="relu")
    monkeypatch.setitem(conversion.ACTIVATIONS, "relu", "silu")
    with pytest.raises(
        BadInput, match=r"gives other logits than the checkpoint, by .*; load it as it is: hf:"
    ):
        decoder_from(str(tmp_path))


def test_an_adapter_is_to_be_merged_first(tmp_path):
    """LoRA's folders name their base."""
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "gpt2", "peft_type": "LORA"})
    )
    line = said(str(tmp_path))
    assert line.startswith(
        f"model '{tmp_path}': it is an adapter of gpt2, and not a model; merge the adapter first"
    )
    with pytest.raises(BadInput, match="it is an adapter of gpt2"):
        decoder_from(str(tmp_path))


def test_a_config_of_no_language_model():
    with pytest.raises(BadInput, match="config in HuggingFaceLM"):
        HuggingFaceLM({"model_type": "no-such-thing"})


def test_a_sequence_longer_than_the_context(gpt2):
    with pytest.raises(
        BadInput, match="a sequence of 25 tokens in HuggingFaceLM: its context holds 24"
    ):
        HuggingFaceLM.from_pretrained(str(gpt2[0]))(torch.zeros(1, 25, dtype=torch.long))


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    remedy = "pip install 'spd_lightning[lm]' (in a checkout: pip install -e '.[lm]')"
    assert said("any/name") == f"'any/name': needs transformers; {remedy}"
