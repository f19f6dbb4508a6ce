"""Closed forms of prompt attributions against their definition (laws A1–A8)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spd_lightning.attribution.autograd import as_tables, cut_run, oracle, prompt_edges
from spd_lightning.attribution.closed_form.trace import closed_form_obstacle
from spd_lightning.attribution.graph import MODES, GraphSpec, Mode, node_numbers
from spd_lightning.attribution.outputs import (
    LogitDifference,
    Outputs,
    at_positions,
    centered,
    every_output,
    given_tokens,
)
from spd_lightning.attribution.prompt_graphs import attribution_graphs
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.targets.toy import TMS
from spd_lightning.targets.transformer import Decoder

THRESHOLD, VOCAB, D = 0.3, 7, 8
MAPS = {"h.*.attn.*_proj": 5, "h.*.mlp.*": 6}
GPT = {
    "positions": "learned",
    "norm": "layer",
    "activation": "gelu_tanh",
    "bias": True,
    "tied_unembedding": True,
}
LLAMA = {
    "positions": "rotary",
    "norm": "rms",
    "mlp": "gated",
    "activation": "silu",
    "n_kv_heads": 2,
}
STYLES = {
    "gpt": (GPT, MAPS),
    "llama": (LLAMA, MAPS),
    "plain": ({}, MAPS),
    "without norm": ({"norm": "none", "activation": "relu", "positions": "none"}, MAPS),
    "layer norm without bias": ({"norm": "layer", "mlp": "gated", "activation": "gelu"}, MAPS),
    "one key head": ({"n_kv_heads": 1, "bias": True}, MAPS),
    "embedding and unembedding too": (LLAMA, MAPS | {"wte": 4, "lm_head": 9}),
    "mlps alone": ({}, {"h.*.mlp.*": 6}),
    "unembedding too": (GPT, MAPS | {"lm_head": 5}),
    "values pass": (LLAMA, {"h.*.attn.[qko]_proj": 5, "h.*.mlp.*": 6}),
    "gathered values pass": (GPT, {"h.*.attn.[qkv]_proj": 5, "h.*.mlp.*": 6}),
    "queries and keys alone": ({"norm": "layer", "n_kv_heads": 2}, {"h.*.attn.[qk]_proj": 5}),
    "the second block alone": (GPT, {"h.1.attn.*_proj": 5, "h.1.mlp.*": 6}),
    "down alone": (LLAMA, {"h.*.mlp.down_proj": 6, "lm_head": 5}),
    "c_fc alone": (GPT, {"h.*.mlp.c_fc": 6, "wte": 4}),
}
PARTIAL = ["mlps alone", *list(STYLES)[9:]]
CLOSED = {name: MODES[name] for name in ("unmasked", "ci_masked", "frozen")}
CLOSED["frozen, ci"] = Mode("ci", "off", "frozen")


def made(style, layers=2, prompts=2, length=4, written=True, sites=None):
    """A decoder with random weights, gains and biases; every prompt has another number of nodes at
    each position.
    """
    torch.manual_seed(0)
    switches, usual = STYLES[style]
    sites = sites or usual
    target = Decoder(VOCAB, D, layers, 4, 6, d_mlp=10, fused_attention=not written, **switches)
    for name, parameter in target.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.5)
    model = ComponentModel(target, sites).double()
    tokens = torch.randint(0, VOCAB, (prompts, length))
    inner = model.clean(tokens).inner
    g = {name: (1.8 * torch.rand(a.shape).double() - 0.6).clamp(0, 1) for name, a in inner.items()}
    return model, tokens, g


def some_outputs(output):
    return (
        (torch.arange(VOCAB) * torch.arange(1, output.shape[1] + 1)[:, None])
        .remainder(3)
        .eq(1)
        .expand_as(output)
    )


def cut_prompt(model, tokens, g, mode, p):
    """The cut run of one prompt of a batch."""
    own = {name: values[p : p + 1] for name, values in g.items()}
    return cut_run(GraphSpec(model, tokens[p : p + 1], own, mode, THRESHOLD, some_outputs))


def by_number(layers, prompt):
    """What stands behind every number of a prompt's nodes."""
    held = {}
    for layer, numbers in zip(layers, node_numbers(layers), strict=True):
        for pos, i in layer.nodes[prompt].nonzero().tolist():
            held[numbers[prompt, pos, i].item()] = (layer.kind, layer.name, pos, i)
    assert sorted(held) == list(range(len(held)))
    return held


def dictionary(layers, tables, prompt):
    """The edges of one prompt, keyed as the oracle keys them."""
    nodes = by_number(layers, prompt)
    found = {}
    for table in tables:
        mine = table.prompt == prompt
        rows = zip(*(column[mine].tolist() for column in table[1:]), strict=True)
        for source, target, value in rows:
            (kind, *start) = nodes[source]
            (_, *end) = nodes[target]
            assert (kind, (*start, *end)) not in found
            found[kind, (*start, *end)] = value
    return found


def assert_equal(found, expected, rtol=1e-9, atol=1e-14):
    """Alike as dictionaries; only an edge across positions may be zero in one and left out in the
    other.
    """
    assert {key for key in found if key[1][1] == key[1][4]} == {
        key for key in expected if key[1][1] == key[1][4]
    }
    largest = max(map(abs, expected.values()))
    assert math.isfinite(largest)
    for key in found.keys() | expected.keys():
        value = expected.get(key, 0.0)
        tolerance = max(rtol * abs(value), atol * largest)  # as pytest.approx, 50 times as fast
        assert abs(found.get(key, 0.0) - value) <= tolerance, key


@pytest.mark.parametrize(
    ("style", "layers"), [(s, n) for s in STYLES for n in ((2,) if s in PARTIAL else (1, 2, 3))]
)
@pytest.mark.parametrize("mode", CLOSED)
def test_a7_closed_form_is_the_oracle_and_the_batched_products(style, mode, layers):
    """Edge by edge in double precision, zeros included, on prompts of a batch and each alone."""
    model, tokens, g = made(style, layers)
    assert closed_form_obstacle(model, CLOSED[mode]) is None
    with torch.inference_mode():
        held, found = attribution_graphs(
            GraphSpec(model, tokens, g, CLOSED[mode], THRESHOLD, some_outputs)
        )
        found = list(found)
    products = prompt_edges(GraphSpec(model, tokens, g, CLOSED[mode], THRESHOLD, some_outputs))
    products = list(as_tables(*products))
    for p in range(len(tokens)):
        cut = cut_prompt(model, tokens, g, CLOSED[mode], p)
        expected = oracle(cut)
        assert_equal(dictionary(held, found, p), expected, atol=1e-13)
        assert_equal(dictionary(held, products, p), expected)
        for mine, other in zip(held, cut, strict=True):
            assert (mine.name, mine.kind) == (other.name, other.kind)
            assert torch.equal(mine.nodes[p], other.nodes[0])
            torch.testing.assert_close(mine.value[p], other.value[0].detach())


@pytest.mark.parametrize("mode", CLOSED)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data(), style=st.sampled_from(["gpt", "llama", "layer norm without bias"]))
def test_a7_whatever_maps_are_sites(mode, style, data):
    """Those that are not pass on what reaches them, alone and together."""
    layers = data.draw(st.integers(1, 3))
    maps = [name for name in made(style, layers)[0].sites if name.startswith("h.")]
    chosen = data.draw(st.sets(st.sampled_from([*maps, "wte", "lm_head"]), min_size=1))
    model, tokens, g = made(style, layers, prompts=1, length=3, sites=dict.fromkeys(chosen, 3))
    held, found = attribution_graphs(
        GraphSpec(model, tokens, g, CLOSED[mode], THRESHOLD, some_outputs)
    )
    expected = oracle(cut_prompt(model, tokens, g, CLOSED[mode], 0))
    assert_equal(dictionary(held, list(found), 0), expected, atol=1e-13)


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_single_precision(style):
    """A7: relative error 1e-4 in single precision, fused attention included."""
    model, tokens, g = made(style, written=False)
    exact = list(attribution_graphs(GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD))[1])
    held, rough = attribution_graphs(
        GraphSpec(
            model.float(),
            tokens,
            {n: v.float() for n, v in g.items()},
            MODES["unmasked"],
            THRESHOLD,
        )
    )
    rough = list(rough)
    for p in range(len(tokens)):
        expected = dictionary(held, exact, p)
        assert_equal(dictionary(held, rough, p), expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_attention_edges_change_nothing(monkeypatch):
    model, tokens, g = made("llama", length=6)
    held, whole = attribution_graphs(GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD))
    whole = list(whole)
    monkeypatch.setattr("spd_lightning.budgets.MAX_ATTENTION_EDGES", 1)
    _, found = attribution_graphs(GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD))
    found = list(found)
    for p in range(len(tokens)):
        assert_equal(dictionary(held, found, p), dictionary(held, whole, p), rtol=1e-12)


@pytest.mark.parametrize("style", PARTIAL)
def test_nodes_that_spread_can_be_taken_a_few_at_a_time(style, monkeypatch):
    model, tokens, g = made(style)
    held, whole = attribution_graphs(GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD))
    whole = list(whole)
    monkeypatch.setattr("spd_lightning.budgets.MAX_SPREAD_NUMBERS", 1)
    _, found = attribution_graphs(GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD))
    found = list(found)
    for p in range(len(tokens)):
        assert_equal(dictionary(held, found, p), dictionary(held, whole, p), rtol=1e-12)


@pytest.mark.parametrize("style", ["llama", "mlps alone"])
def test_weak_edges_can_be_left_out(style):
    """Of every target's in-edges those stay that are at least a share of their sizes, however
    graphs are computed.
    """
    model, tokens, g = made(style)
    g = {name: g[name] for name in model.sites}
    held, every = attribution_graphs(
        GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD, some_outputs)
    )
    every = list(every)
    _, few = attribution_graphs(
        GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD, some_outputs), 0.05
    )
    few = list(few)
    for p in range(len(tokens)):
        whole = dictionary(held, every, p)
        total = {}
        for (_, key), value in whole.items():
            total[key[3:]] = total.get(key[3:], 0.0) + abs(value)
        expected = {
            key: value for key, value in whole.items() if abs(value) >= 0.05 * total[key[1][3:]]
        }
        assert dictionary(held, few, p) == expected
        assert 0 < len(expected) < len(whole)


@pytest.mark.parametrize("style", ["llama", *PARTIAL])
def test_positions_and_layers_without_nodes(style):
    """A prompt in which little matters has few edges, and no trouble."""
    model, tokens, g = made(style)
    g = {name: values * (torch.arange(values.shape[1]) == 2)[:, None] for name, values in g.items()}
    for name in g.keys() & {
        "h.1.attn.v_proj",
        "h.0.mlp.gate_proj",
        "h.0.mlp.c_fc",
        "h.1.attn.q_proj",
    }:
        g[name] = torch.zeros_like(g[name])
    held, found = attribution_graphs(
        GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD, some_outputs)
    )
    found = list(found)
    for p in range(len(tokens)):
        expected = oracle(cut_prompt(model, tokens, g, MODES["unmasked"], p))
        assert_equal(dictionary(held, found, p), expected, atol=1e-13)


def test_what_has_no_closed_form_says_why():
    decoder = Decoder(VOCAB, D, 1, 2, 6)
    mode = MODES["unmasked"]
    assert (
        closed_form_obstacle(ComponentModel(TMS(5, 2), {"*": 3}), mode)
        == "TMS is not a supported decoder"
    )
    odd = ComponentModel(decoder, MAPS | {"h.0.mlp.c_fc.pre_identity": 3})
    assert closed_form_obstacle(odd, mode) == "'h.0.mlp.c_fc.pre_identity' is decomposed"
    assert (
        closed_form_obstacle(ComponentModel(decoder, MAPS), MODES["reference"])
        == "this mode lets delta carry gradient"
    )


# ---- frozen graphs -------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [True, False], ids=["written out", "fused"])
@pytest.mark.parametrize("style", STYLES)
def test_a6_frozen_in_edges_of_decoders_add_up(style, written):
    """Norms, biases, attention and products of two paths: what arrives at a node is what it holds,
    to 1e-9.
    """
    model, tokens, g = made(style, written=written)
    layers, found = attribution_graphs(
        GraphSpec(model, tokens, g, MODES["frozen"], THRESHOLD, some_outputs)
    )
    found = list(found)
    checked = 0
    torch.testing.assert_close(layers[-1].value.detach(), model.target(tokens))
    for p in range(len(tokens)):
        arriving: dict = {}
        for (_, key), value in dictionary(layers, found, p).items():
            arriving[key[3:]] = arriving.get(key[3:], 0.0) + value
        for layer in layers:
            for pos, j in (
                layer.nodes[p].nonzero().tolist() if layer.kind in ("component", "output") else []
            ):
                if layer.name == "wte":  # reads token ids
                    continue
                value = layer.value[p, pos, j].item()
                assert arriving[layer.name, pos, j] == pytest.approx(value, rel=1e-9, abs=1e-9)
                checked += 1
    assert checked > 60


READINGS = {"centered": centered, "against": LogitDifference(2)}


@pytest.mark.parametrize("mode", CLOSED)
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("style", ["gpt", "llama", "unembedding too", "mlps alone"])
def test_a2_outputs_may_stand_for_differences_of_logits(style, reading, mode):
    """Their edges are the oracle's, and the same differences of the edges to logits; frozen, they
    add up too.
    """
    model, tokens, g = made(style, prompts=1)
    last = at_positions(given_tokens([1, 4]), [-1])
    spec = GraphSpec(model, tokens, g, CLOSED[mode], THRESHOLD, Outputs(last, READINGS[reading]))
    layers, found = attribution_graphs(spec)
    found = dictionary(layers, found, 0)
    assert_equal(found, oracle(cut_run(spec)), atol=1e-12)
    whole = oracle(cut_run(spec._replace(outputs=at_positions(every_output, [-1]))))
    to = {}
    for (kind, (*source, target, pos, token)), value in whole.items():
        if target == "output":
            to.setdefault((kind, *source, pos), torch.zeros(VOCAB).double())[token] = value
    expected = {
        (kind, (name, s, i, "output", pos, token)): READINGS[reading](values)[token].item()
        for (kind, name, s, i, pos), values in to.items()
        for token in (1, 4)
    }
    assert expected
    assert_equal(
        {key: v for key, v in found.items() if key[1][3] == "output"}, expected, atol=1e-12
    )
