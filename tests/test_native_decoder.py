"""Graphs of HuggingFace models in closed form, under their own names (A7)."""

import pytest
import torch
from support import tiny_checkpoints
from test_closed_form import CLOSED, assert_equal, dictionary
from torch import nn

from spd_lightning.attribution.autograd import cut_run, oracle
from spd_lightning.attribution.checks import Graphs, Inflow
from spd_lightning.attribution.graph import MODES, GraphSpec
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.harvest.native_decoder import as_native_decoder
from spd_lightning.targets.conversion import decoder_from
from spd_lightning.targets.huggingface import HuggingFaceLM

MLPS = {"model.layers.*.mlp.*_proj": 6}
MAPS = MLPS | {"model.layers.*.self_attn.*": 5}
KINDS = {
    "llama": ({}, MAPS),
    "llama, grouped, tied": ({"num_key_value_heads": 2, "tie_word_embeddings": True}, MAPS),
    "mistral": ({"sliding_window": None}, MAPS),
    "qwen2": ({}, MAPS),
    "llama, MLPs alone": ({"num_key_value_heads": 2}, MLPS),
}


def decomposed(target, sites):
    """In double precision, with random components, importances at random, and half the tokens as
    outputs.
    """
    torch.manual_seed(0)
    model = ComponentModel(target, sites).double()
    tokens = tiny_checkpoints.tokens(2, 4)
    inner = model.clean(tokens).inner
    g = {name: (1.8 * torch.rand(a.shape).double() - 0.6).clamp(0, 1) for name, a in inner.items()}
    return model, tokens, g


def odd_tokens(output):
    return (torch.arange(output.shape[-1]) % 8 == 3).expand_as(output)


@pytest.mark.parametrize("mode", CLOSED)
@pytest.mark.parametrize("kind", KINDS)
def test_a7_a_model_of_transformers_has_the_oracles_graph_without_a_backward_pass(
    tmp_path, kind, mode
):
    """To single precision: transformers' norms, angles and patterns are, whatever the model's
    weights are.
    """
    settings, sites = KINDS[kind]
    tiny_checkpoints.write(tmp_path, kind.split(",")[0], **settings)
    target = HuggingFaceLM.from_pretrained(str(tmp_path))
    target.model.set_attn_implementation("eager")
    model, tokens, g = decomposed(target, sites)
    quick = as_native_decoder(model, CLOSED[mode])
    assert quick.model is not model
    spec = GraphSpec(model, tokens, g, CLOSED[mode], 0.3, odd_tokens)
    layers, found = quick.graphs(spec)
    found = list(found)
    for p in range(len(tokens)):
        cut = cut_run(spec.single_prompt(p, layers[-1].nodes))
        assert [(layer.kind, layer.name) for layer in layers] == [
            (layer.kind, layer.name) for layer in cut
        ]
        assert_equal(dictionary(layers, found, p), oracle(cut), rtol=1e-4, atol=1e-5)
    heads = list(quick.heads(spec, found))
    for p, table in enumerate(found):
        through = torch.cat(
            [t.attribution[t.prompt == p] for t in heads] or [torch.zeros(0).double()]
        ).sum()
        ends = [key[1][3] for key in dictionary(layers, found, p)]
        o = torch.tensor([name.endswith("o_proj") for name in ends])
        torch.testing.assert_close(through, table.attribution[o].sum(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("mode", CLOSED)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_a7_checkpoints_as_a_decoder(tmp_path, kind, mode):
    """GPT-2, Llama, Qwen2 on our decoder: closed form and oracle agree to 1e-9; the logits are
    transformers' own.
    """
    theirs = tiny_checkpoints.write(tmp_path, kind).double()
    model, tokens, g = decomposed(
        decoder_from(str(tmp_path)), {"h.*.attn.*_proj": 5, "h.*.mlp.*": 6}
    )
    torch.testing.assert_close(model.target(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    quick = as_native_decoder(model, CLOSED[mode])
    spec = GraphSpec(model, tokens, g, CLOSED[mode], 0.3, odd_tokens)
    layers, found = quick.graphs(spec)
    found = list(found)
    for p in range(len(tokens)):
        cut = cut_run(spec.single_prompt(p, layers[-1].nodes))
        assert_equal(dictionary(layers, found, p), oracle(cut), atol=1e-11)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_a6_a_twin_made_in_inference_mode_has_graphs(tmp_path, kind):
    """As `Trainer.predict` makes it: frozen sums, edges against interventions, and gradients
    through it.
    """
    tiny_checkpoints.write(
        tmp_path, kind, **({"sliding_window": None} if kind == "mistral" else {})
    )
    model, tokens, g = decomposed(HuggingFaceLM.from_pretrained(str(tmp_path)), MAPS)
    mode = MODES["frozen"]
    with torch.inference_mode():
        quick = as_native_decoder(model, mode)
    assert quick.model is not model
    assert not any(parameter.is_inference() for parameter in quick.model.parameters())
    spec = GraphSpec(model, tokens, g, mode, 0.3, odd_tokens)
    layers, found = quick.graphs(spec)
    found = list(found)
    inflow = Inflow(model, layers)
    graphs = Graphs(layers)
    for table in found:
        inflow.add(table)
    assert inflow.gaps().max() < 1e-4
    some = graphs.sample_edges(found[0], 10, torch.Generator().manual_seed(0))
    lost = -quick.changes(spec, graphs.checks(some), 0.0)
    torch.testing.assert_close(
        lost, some.attribution, rtol=1e-4, atol=1e-5 * some.attribution.abs().max().item()
    )


def test_what_has_no_twin_stays_itself(tmp_path):
    """GPT-2's one map for queries, keys and values goes the general way."""
    tiny_checkpoints.write(tmp_path, "gpt2")
    target = HuggingFaceLM.from_pretrained(str(tmp_path))
    model, tokens, g = decomposed(target, {"transformer.h.*.attn.*": 5, "transformer.h.*.mlp.*": 6})
    quick = as_native_decoder(model, MODES["unmasked"])
    assert quick.model is model
    layers, found = quick.graphs(GraphSpec(model, tokens, g, MODES["unmasked"], 0.3, odd_tokens))
    assert sum(len(table.source) for table in found)
    assert {layer.name for layer in layers if layer.kind == "component"} == set(model.sites)


@pytest.mark.parametrize("mode", CLOSED)
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_maps_that_are_no_sites_need_no_place_but_their_biases_do(tmp_path, kind, mode):
    """Frozen graphs have them as nodes; GPT-2's are those of one map, and the decoder has some that
    Qwen2 has not.
    """
    tiny_checkpoints.write(tmp_path, kind)
    target = HuggingFaceLM.from_pretrained(str(tmp_path))
    target.model.set_attn_implementation("eager")
    model, tokens, g = decomposed(target, {"*.mlp.*": 6} if kind == "gpt2" else MLPS)
    quick = as_native_decoder(model, CLOSED[mode])
    assert (quick.model is model) == (CLOSED[mode].linearization == "frozen")
    spec = GraphSpec(model, tokens, g, CLOSED[mode], 0.3, odd_tokens)
    layers, found = quick.graphs(spec)
    found = list(found)
    cut = cut_run(spec.single_prompt(0, layers[-1].nodes))
    assert [(layer.kind, layer.name) for layer in layers] == [
        (layer.kind, layer.name) for layer in cut
    ]
    assert_equal(dictionary(layers, found, 0), oracle(cut), rtol=1e-4, atol=1e-5)


def test_a_twin_is_made_anew_where_weights_have_changed(tmp_path):
    """In place or moved: its logits are those of the model as it is now."""
    tiny_checkpoints.write(tmp_path, "llama")
    model, tokens, _ = decomposed(HuggingFaceLM.from_pretrained(str(tmp_path)), MAPS)
    first = as_native_decoder(model, MODES["unmasked"])
    assert as_native_decoder(model, MODES["unmasked"]) is first
    head = model.target.get_submodule("model.lm_head")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.mul_(2)
    for changed in (model, model.float()):
        found = as_native_decoder(changed, MODES["unmasked"]).model.target(tokens)
        torch.testing.assert_close(found, changed.target(tokens), rtol=1e-4, atol=1e-4)
