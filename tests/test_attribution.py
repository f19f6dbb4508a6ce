"""Prompt attributions (laws A1–A8) against a cut run written out, hand formulas, interventions and
sums.
"""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import printed_weight
from torch import nn
from torch.nn import functional as F

from spd_lightning import budgets
from spd_lightning.attribution.autograd import (
    connected,
    crossing,
    cut_run,
    oracle,
    prompt_edges,
    vjp_edges,
)
from spd_lightning.attribution.graph import MODES, GraphSpec, Mode
from spd_lightning.attribution.outputs import every_output, likely_tokens
from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.targets.toy import TMS, AttentionBlock, InductionHead, ResidualMLP

THRESHOLD = 0.3
SPARSE_CI = Mode("ci", "off", "frozen")


# ---- targets, and their forward passes over leaves and constants ---------------------------------


class Decoder(nn.Module):
    """A pre-norm transformer of B blocks; its embedding stands inside a module of its own."""

    class RMSNorm(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.gain = nn.Parameter(1 + 0.3 * torch.randn(d))

        def forward(self, x):
            return self.gain * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    class Block(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.norm1 = Decoder.RMSNorm(d)
            self.norm2 = Decoder.RMSNorm(d)
            self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=name == "v") for name in "qkvo")
            self.fc = nn.Linear(d, d + 1)
            self.down = nn.Linear(d + 1, d)

    def __init__(self, vocab=6, d=4, blocks=1):
        super().__init__()
        self.start = nn.ModuleDict({"tokens": nn.Embedding(vocab, d)})
        self.blocks = nn.ModuleList(Decoder.Block(d) for _ in range(blocks))
        self.norm = Decoder.RMSNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)

    def forward(self, tokens):
        x = self.start["tokens"](tokens)
        for block in self.blocks:
            assert isinstance(block, Decoder.Block)
            n = block.norm1(x)
            x = x + block.o(attended(block.q(n), block.k(n), block.v(n), 1, torch.softmax))
            x = x + block.down(F.gelu(block.fc(block.norm2(x))))
        return self.head(self.norm(x))


def attended(q, k, v, heads, softmax):
    """Causal attention, [..., pos, d]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(-2, -3) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (softmax(scores.masked_fill(future, -math.inf), -1) @ v).transpose(-2, -3).flatten(-2)


def written_out(target, x, run):
    """The forward pass of one prompt where `run` answers for sites, inputs, non-linearities and
    attention patterns.
    """
    match target:
        case TMS():
            h = run.map("linear1", run.leaf("input", "input", x))
            for k in range(len(target.hidden)):
                h = run.map(f"hidden.{k}", h)
            return run.relu("relu", run.map("linear2", h))
        case ResidualMLP():
            stream = run.leaf("input", "input", x) @ target.embedding
            for k in range(len(target.layers)):
                h = run.relu(f"relu{k}", run.map(f"layers.{k}.mlp_in", stream))
                stream = stream + run.map(f"layers.{k}.mlp_out", h)
            return stream @ target.embedding.T
        case InductionHead():
            stream = run.rows("embed", x) + run.rows("pos_embed", torch.arange(len(x)))
            for k, block in enumerate(target.h):
                assert isinstance(block, AttentionBlock)
                q, v, key = (run.map(f"h.{k}.attn.{name}_proj", stream) for name in "qvk")
                mixed = attended(q, key, v, block.attn.n_heads, run.softmax(f"pattern{k}"))
                stream = stream + run.map(f"h.{k}.attn.o_proj", mixed)
            return run.map("unembed", stream)
        case Decoder():
            stream = run.rows("start.tokens", x)
            for k, block in enumerate(target.blocks):
                assert isinstance(block, Decoder.Block)
                n = block.norm1(stream)
                q, key, v = (run.map(f"blocks.{k}.{name}", n) for name in "qkv")
                stream = stream + run.map(
                    f"blocks.{k}.o", attended(q, key, v, 1, run.softmax(f"pattern{k}"))
                )
                stream = stream + run.map(
                    f"blocks.{k}.down", F.gelu(run.map(f"blocks.{k}.fc", block.norm2(stream)))
                )
            return run.map("head", target.norm(stream))


class Cut:
    """The cut run of one prompt by the text of section A: leaves are constants, and one node of one
    can be scaled.
    """

    def __init__(self, model, prompt, g, mode, threshold):
        self.model = model
        self.prompt = prompt
        self.g = g
        self.mode = mode
        self.threshold = threshold
        self.held = {}
        self.nodes = {}
        self.scaled = None
        self.factor = 1.0
        self.base = self.values(None, 1.0)

    def values(self, scaled, factor):
        """a_T [pos, C] of every site, and the output [pos, K], with one node's leaf multiplied by a
        factor.
        """
        self.read = {}
        self.scaled = scaled
        self.factor = factor
        x = self.prompt[None] if self.prompt.is_floating_point() else self.prompt
        self.read["output", "output"] = written_out(self.model.target, x, self)
        return self.read

    def constant(self, name, value):
        """What this was in the undisturbed run."""
        return self.held.setdefault(name, value.detach())

    def leaf(self, kind, name, value):
        value = self.constant((kind, name), value).clone()
        self.nodes.setdefault(
            (kind, name), value != 0 if kind == "input" else torch.ones(len(value), 1) > 0
        )
        if self.scaled is not None and self.scaled[:2] == (kind, name):
            pos, i = self.scaled[2:]
            value[pos, i if kind in ("input", "component") else slice(None)] *= self.factor
        return value

    def rows(self, name, ids):
        """The rows of an embedding: a site, or a leaf of the graph."""
        if name in self.model.sites:
            return self.map(name, ids)
        return self.leaf("embedding", name, self.model.target.get_submodule(name).weight[ids])

    def map(self, name, x):
        W, b = printed_weight(self.model.target, name)
        x = F.one_hot(x, W.shape[1]).to(W.dtype) if x.dtype == torch.long else x
        if name not in self.model.sites:
            return x @ W.T + b
        V = self.model[name].V.detach()
        U = self.model[name].U.detach()
        g = self.g[name]
        a = self.read["component", name] = x @ V
        nodes = self.nodes["component", name] = g > self.threshold
        m = g if self.mode.mask == "ci" else torch.ones_like(g)
        missed = x @ (W - (V @ U).T).T * (self.mode.delta != "off")
        missed = missed if self.mode.delta == "flow" else self.constant(("delta", name), missed)
        cut = self.leaf("component", name, a)
        if self.mode.linearization == "jacobian":
            return (m * cut) @ U + missed + b
        others = self.leaf("rest", name, (m * cut * ~nodes) @ U + missed)
        return (m * cut * nodes) @ U + others + self.leaf("bias", name, b.expand(len(x), -1))

    def relu(self, name, h):
        return (
            h * (self.constant(name, h) > 0)
            if self.mode.linearization == "frozen"
            else torch.relu(h)
        )

    def softmax(self, name):
        def pattern(scores, dim):
            weights = torch.softmax(scores, dim)
            return self.constant(name, weights) if self.mode.linearization == "frozen" else weights

        return pattern

    def differences(self, step=1e-5):
        """Every edge by moving its source: d a_T / d factor, the derivative along the source's own
        value (A1, A2).
        """
        found = {}
        targets = self.nodes | {
            ("output", "output"): torch.ones_like(self.base["output", "output"]) > 0
        }
        base = dict(self.base)
        for (kind, name), nodes in list(self.nodes.items()):
            for pos, i in nodes.nonzero().tolist():
                up = self.values((kind, name, pos, i), 1 + step)
                down = self.values((kind, name, pos, i), 1 - step)
                for reader in base:
                    slope = (up[reader] - down[reader]) / (2 * step)
                    for at, j in targets[reader].nonzero().tolist():
                        found[kind, (name, pos, i, reader[1], at, j)] = slope[at, j].item()
        return found


# ---- models --------------------------------------------------------------------------------------

TOYS = {
    "tms": (lambda: TMS(5, 3, 1), {"*": 4}),
    "residual 1": (lambda: ResidualMLP(4, 6, 3), {"*": 4}),
    "residual 2": (lambda: ResidualMLP(4, 6, [2, 3], 2), {"*": 3}),
    "residual, in part": (lambda: ResidualMLP(4, 6, [2, 3], 2), {"*out": 3}),
    "induction": (lambda: InductionHead(6, 4, 6, 2, n_heads=2), {"h.*": 3, "unembed": 4}),
    "induction 3": (lambda: InductionHead(5, 2, 6, 3), {"h.*": 2}),
    "induction, embedding too": (
        lambda: InductionHead(6, 4, 6, 1),
        {"embed": 3, "h.*": 3, "unembed": 3},
    ),
    "induction, in part": (lambda: InductionHead(6, 4, 6, 2), {"h.*.[vo]_proj": 3}),
}
NORMED = {
    "decoder": (lambda: Decoder(), {"blocks.*": 3}),
    "decoder, mlps": (lambda: Decoder(blocks=2), {"*fc": 3, "*down": 3}),
}
ALL = TOYS | NORMED
CASES = [
    (name, mode) for name in ALL for mode in MODES if not (name in NORMED and mode == "frozen")
]


def made(name, prompts=2, seed=0, length=4):
    """A model with random weights and biases, prompts, and importances with a different number
    alive everywhere.
    """
    torch.manual_seed(seed)
    target = ALL[name][0]()
    for parameter in target.parameters():
        nn.init.normal_(parameter, std=0.6)
    model = ComponentModel(target, ALL[name][1]).double()
    if name.startswith(("tms", "residual")):
        features = len(target.embedding) if isinstance(target, ResidualMLP) else 5
        inputs = torch.randn(prompts, features).double()
        inputs[0, 1] = 0
    else:
        inputs = torch.randint(0, 5, (prompts, length))
    with torch.no_grad():
        inner = model.clean(inputs).inner
    g = {site: (1.8 * torch.rand(a.shape).double() - 0.6).clamp(0, 1) for site, a in inner.items()}
    return model, inputs, g


def one(g, p):
    return {site: values[p : p + 1] for site, values in g.items()}


def alone(model, inputs, g, mode, p, threshold=THRESHOLD):
    """The oracle's edges of one prompt by itself; in mode `reference` those that it keeps (A5)."""
    found = oracle(cut_run(GraphSpec(model, inputs[p : p + 1], one(g, p), MODES[mode], threshold)))
    if mode != "reference":
        return found
    direct = hand_pairs(model)
    across = hand_crossing(model)
    kept = {}
    for key, value in found.items():
        source, s, _, reader, t, _ = key[1]
        if (source, reader) in direct and (s == t or (source, reader) in across):
            kept[key] = value
    return kept


def dictionaries(layers, found, prompts):
    """The edges of each prompt of a batch, keyed as the oracle keys them."""
    result = [{} for _ in range(prompts)]
    for e in found:
        ends = zip(
            e.prompt.tolist(),
            e.source_at.tolist(),
            e.target_at.tolist(),
            e.attribution.tolist(),
            strict=True,
        )
        source = layers[e.source]
        target = layers[e.target]
        for p, at, to, value in ends:
            key = source.kind, (source.name, *at, target.name, *to)
            assert key not in result[p]
            result[p][key] = value
    return result


def batched(model, inputs, g, mode, threshold=THRESHOLD):
    return dictionaries(
        *prompt_edges(GraphSpec(model, inputs, g, MODES[mode], threshold)), len(inputs)
    )


def assert_equal(found, expected, rtol=1e-9, atol=1e-14):
    assert found.keys() == expected.keys()
    largest = max(map(abs, expected.values()))
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=rtol, abs=atol * largest), key


def hand_pairs(model) -> set[tuple[str, str]]:
    """The pairs joined by a path without a site on it, worked out on paper for each architecture
    (A4).
    """
    target = model.target
    sites = list(model.sites)
    match target:
        case TMS():
            return {*zip(["input", *sites], [*sites, "output"], strict=True)}
        case ResidualMLP():
            ins, outs = ([s for s in sites if s.endswith(end)] for end in ("in", "out"))
            writers = [("input", -1), *((s, k) for k, s in enumerate(outs))]
            pairs = {(w, "output") for w, _ in writers}
            if not ins:
                return pairs | {(w, s) for w, k in writers for n, s in enumerate(outs) if k < n}
            pairs |= {(w, s) for w, k in writers for n, s in enumerate(ins) if k < n}
            return pairs | set(zip(ins, outs, strict=True))
        case InductionHead():
            layers = [{n: f"h.{k}.attn.{n}_proj" for n in "qkvo"} for k in range(len(target.h))]
            return stream_pairs(["embed", "pos_embed"], layers, sites)
        case Decoder():
            layers = [
                {n: f"blocks.{k}.{n}" for n in ("q", "k", "v", "o", "fc", "down")}
                for k in range(len(target.blocks))
            ]
            return stream_pairs(["start.tokens"], layers, sites)
    raise TypeError(f"no pairs are worked out for {type(target)}")


def hand_crossing(model) -> set[tuple[str, str]]:
    """The pairs whose path moves between positions, worked out on paper for each architecture
    (A4).
    """
    if isinstance(model.target, TMS | ResidualMLP):
        return set()

    def kind(site):
        return site.rpartition(".")[2].removesuffix("_proj")

    pairs = hand_pairs(model)
    if not {"q", "k", "v", "o"} & {kind(site) for site in model.sites}:
        # MLPs alone: an attention block lies on every path but these
        last = [site for site in model.sites if kind(site) == "down"][-1]
        return {
            (s, t)
            for s, t in pairs
            if (kind(s), kind(t)) != ("fc", "down") and (s, t) != (last, "output")
        }
    # keys and values are read elsewhere, queries where they stand
    return {(s, t) for s, t in pairs if kind(t) == "o" and kind(s) != "q"}


def stream_pairs(writers, layers, sites):
    """Pairs along a residual stream; what is no site passes on what it reads."""
    pairs = set()
    for layer in layers:
        for readers, end in ((("q", "k", "v"), "o"), (("fc",), "down")):
            here = [layer[n] for n in readers if layer.get(n) in sites]
            pairs |= {(w, r) for w in writers for r in here}
            through = [*here, *(writers if len(here) < len(readers) else [])]
            if layer.get(end) in sites:
                pairs |= {(w, layer[end]) for w in through}
                writers = [*writers, layer[end]]
    last = "unembed" if "unembed" in sites else "output"
    return (
        pairs | {(w, last) for w in writers} | ({(last, "output")} if last != "output" else set())
    )


# ---- the oracle, and all that is faster ----------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a1_and_a2_the_oracle_is_the_slope_along_every_node(name, mode):
    model, inputs, g = made(name, prompts=1, length=3)
    found = oracle(cut_run(GraphSpec(model, inputs, g, MODES[mode], THRESHOLD)))
    with torch.no_grad():
        moved = Cut(
            model,
            inputs[0],
            {site: v[0] if v.ndim == 3 else v for site, v in g.items()},
            MODES[mode],
            THRESHOLD,
        )
        expected = moved.differences()
    assert found.keys() <= expected.keys()
    for key, slope in expected.items():
        assert found.get(key, 0.0) == pytest.approx(slope, rel=1e-6, abs=1e-8), key


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a7_and_a8_batches_of_ragged_prompts_agree_with_the_oracle_of_each_alone(name, mode):
    model, inputs, g = made(name, prompts=3)
    for p, found in enumerate(batched(model, inputs, g, mode)):
        assert_equal(found, alone(model, inputs, g, mode, p))


@pytest.mark.parametrize("name", ALL)
def test_a4_the_pairs_are_found_by_asking(name):
    model, inputs, g = made(name)
    layers = cut_run(GraphSpec(model, inputs, g, MODES["unmasked"], THRESHOLD))
    assert {(layers[s].name, layers[t].name) for s, t in connected(layers)} == hand_pairs(model)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a4_a_decoder_of_b_blocks_has_the_stated_number_of_pairs(blocks):
    torch.manual_seed(0)
    model = ComponentModel(Decoder(blocks=blocks), {"blocks.*": 2}).double()
    tokens = torch.randint(0, 6, (1, 4))
    g = {name: torch.ones(1, 4, 2).double() for name in model.sites}
    layers = cut_run(GraphSpec(model, tokens, g, MODES["unmasked"]))
    assert len(connected(layers)) == 4 * blocks**2 + 7 * blocks + 1
    moving = {(k[0], k[3]) for _, k in oracle(layers) if k[1] != k[4]}
    kinds = {
        (s.split(".")[-1], t.split(".")[-1], s.split(".")[1] == t.split(".")[1]) for s, t in moving
    }
    assert kinds == {("k", "o", True), ("v", "o", True)}


def test_a4_where_attention_is_no_site_whatever_feeds_a_later_fc_moves():
    model, inputs, g = made("decoder, mlps")
    found = alone(model, inputs, g, "unmasked", 0, -1.0)
    moving = {(k[0], k[3]) for _, k in found if k[1] != k[4]}
    start, down = "start.tokens", "blocks.0.down"
    assert moving == {
        (start, "blocks.0.fc"),
        (start, "blocks.1.fc"),
        (down, "blocks.1.fc"),
        (start, "output"),
        (down, "output"),
    }


def test_a5_and_a1_tms_by_hand():
    torch.manual_seed(0)
    target = TMS(5, 3)
    nn.init.normal_(target.linear2.bias)
    model = ComponentModel(target, {"linear*": 4}).double()
    x = torch.randn(5).double()
    x[2] = 0
    g = {site: torch.rand(1, 4).double() for site in model.sites}
    g["linear1"][0, 1] = g["linear2"][0, 3] = 0
    first = model["linear1"]
    second = model["linear2"]
    for mode in ("unmasked", "ci_masked", "frozen"):
        ci = mode == "ci_masked"
        m1, m2 = (g[s][0] if ci else torch.ones(4).double() for s in model.sites)
        a1 = x @ first.V
        h = (m1 * a1) @ first.U if ci else target.linear1(x)
        a2 = h @ second.V
        y = (m2 * a2) @ second.U + target.linear2.bias if ci else target.linear2(h)
        expected = {}
        for i in (0, 2, 3):
            for f in (0, 1, 3, 4):
                expected["input", ("input", 0, f, "linear1", 0, i)] = x[f] * first.V[f, i]
            for j in (0, 1, 2):
                expected["component", ("linear1", 0, i, "linear2", 0, j)] = (
                    m1[i] * a1[i] * (first.U[i] @ second.V[:, j])
                )
        for j in (0, 1, 2):
            for k in range(5):
                expected["component", ("linear2", 0, j, "output", 0, k)] = (
                    m2[j] * a2[j] * second.U[j, k] * (y[k] > 0)
                )
        expected = {key: value.item() for key, value in expected.items()}
        (found,) = batched(model, x[None], g, mode, 0.0)
        assert_equal({k: v for k, v in found.items() if k[0] in ("input", "component")}, expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", MODES)
def test_a5_the_forward_pass_of_each_mode(name, mode):
    model, inputs, g = made(name)
    output = cut_run(GraphSpec(model, inputs, g, MODES[mode], THRESHOLD))[-1].value
    masks = {site: Mask(value, 0.0) for site, value in g.items()}
    expected = model.masked(inputs, masks) if mode == "ci_masked" else model.target(inputs)
    torch.testing.assert_close(output, expected.reshape(output.shape), rtol=1e-10, atol=1e-10)


def test_a7_chunks_of_any_size_give_the_same(monkeypatch):
    model, inputs, g = made("induction")
    expected = batched(model, inputs, g, "unmasked")
    for size in (1, 500):
        monkeypatch.setattr(budgets, "MAX_VJP_NUMBERS", size)
        for found, right in zip(batched(model, inputs, g, "unmasked"), expected, strict=True):
            assert_equal(found, right)


@pytest.mark.parametrize("name", ["residual 2", "induction"])
def test_a7_in_float32(name):
    model, inputs, g = made(name)
    exact = alone(model, inputs, g, "unmasked", 0)
    layers = cut_run(GraphSpec(model, inputs[:1], one(g, 0), MODES["unmasked"], THRESHOLD))
    value = {
        layer.name: layer.value[0] for layer in layers if layer.kind in ("component", "output")
    }
    single = inputs.float() if inputs.is_floating_point() else inputs
    found = batched(model.float(), single, {site: v.float() for site, v in g.items()}, "unmasked")[
        0
    ]
    assert found.keys() == exact.keys()
    for (kind, key), edge in exact.items():
        scale = max(abs(edge), abs(value[key[3]][key[4], key[5]].item()))
        assert found[kind, key] == pytest.approx(edge, rel=1e-4, abs=1e-6 * scale)


# ---- frozen sums ---------------------------------------------------------------------------------


def sums(found, kinds=("component", "input", "embedding", "rest", "bias")):
    """What arrives at every target (T, s, j)."""
    total = defaultdict(float)
    for (kind, key), value in found.items():
        total[key[3:]] += value * (kind in kinds)
    return total


@pytest.mark.parametrize("threshold", [0.0, THRESHOLD, 1.0])
@pytest.mark.parametrize("name", TOYS)
def test_a6_frozen_in_edges_add_up_to_what_they_feed(name, threshold):
    model, inputs, g = made(name)
    layers, found = prompt_edges(GraphSpec(model, inputs, g, MODES["frozen"], threshold))
    prompts = dictionaries(layers, found, len(inputs))
    arriving = [sums(prompt) for prompt in prompts]
    checked = 0
    for layer in layers:
        read = layer.kind in ("component", "output") and layer.value.requires_grad
        for p, pos, j in layer.nodes.nonzero().tolist() if read else []:
            expected = layer.value[p, pos, j].item()
            assert arriving[p][layer.name, pos, j] == pytest.approx(expected, rel=1e-9, abs=1e-9)
            checked += 1
    assert checked >= layers[-1].nodes.sum()
    assert (
        max(
            abs(value)
            for prompt in prompts
            for (kind, _), value in prompt.items()
            if kind == "rest"
        )
        > 0.01
    )


@pytest.mark.parametrize("name", TOYS)
def test_a6_under_ci_masks_without_delta_the_alive_edges_reach_the_sum_without_a_rest(name):
    model, inputs, g = made(name, prompts=1)
    layers = cut_run(GraphSpec(model, inputs, g, SPARSE_CI))
    found = oracle(layers)
    arriving = sums(found, ("component", "input", "embedding", "bias"))
    for layer in layers:
        if layer.kind in ("component", "output") and layer.value.requires_grad:
            for _, pos, j in layer.nodes.nonzero().tolist():
                assert arriving[layer.name, pos, j] == pytest.approx(
                    layer.value[0, pos, j].item(), rel=1e-9, abs=1e-9
                )


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU(inplace=True)], ids=str
)
def test_a6_every_non_linearity_has_its_secant(activation):
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3), activation)
    model = ComponentModel(target, {"*": 4}).double()
    x = 2 * torch.randn(3, 4).double()
    g = {site: torch.rand(3, 4).double() for site in model.sites}
    layers, found = prompt_edges(GraphSpec(model, x, g, MODES["frozen"], THRESHOLD))
    torch.testing.assert_close(layers[-1].value[:, 0], target(x.clone()), rtol=1e-12, atol=1e-12)
    for p, arriving in enumerate(map(sums, dictionaries(layers, found, 3))):
        for (name, pos, j), value in arriving.items():
            reader = next(
                layer
                for layer in layers
                if layer.name == name and layer.kind in ("component", "output")
            )
            assert value == pytest.approx(reader.value[p, pos, j].item(), rel=1e-9, abs=1e-9)


def test_a6_attention_patterns_are_held_queries_and_keys_are_read_and_do_not_write():
    model, inputs, g = made("induction")
    found = alone(model, inputs, g, "frozen", 0)
    writers = {key[0] for kind, key in found if kind == "component"}
    readers = {key[3] for _, key in found}
    ends = {f"h.{k}.attn.{n}_proj" for k in (0, 1) for n in "qk"}
    assert not ends & writers
    assert ends <= readers


# ---- nodes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
def test_a3_nodes_are_the_components_above_the_threshold_and_all_inputs_and_outputs(threshold):
    for name in ("tms", "induction"):
        model, inputs, g = made(name)
        g["unembed" if name == "induction" else "linear2"][0, ..., 0] = threshold  # exclusive
        for layer in cut_run(GraphSpec(model, inputs, g, MODES["unmasked"], threshold)):
            match layer.kind:
                case "component":
                    assert layer.importance is not None
                    assert torch.equal(
                        layer.nodes, (g[layer.name] > threshold).reshape(layer.nodes.shape)
                    )
                    assert torch.equal(layer.importance, g[layer.name].reshape(layer.nodes.shape))
                case "input":
                    assert torch.equal(layer.nodes[:, 0], inputs != 0)
                case _:
                    assert layer.nodes.all()
                    assert layer.nodes.shape[1] == (4 if name == "induction" else 1)
    assert every_output(torch.rand(2, 3, 4)).all()


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(1, 25), st.floats(0.001, 0.3), st.integers(1, 20))
def test_a3_output_tokens_are_the_likely_ones_and_not_too_many(seed, vocab, floor, most):
    torch.manual_seed(seed)
    probability = torch.softmax(3 * torch.randn(2, 3, vocab), -1)
    chosen = likely_tokens(probability, floor, most)(torch.zeros(2, 3, vocab))
    for p, pos in ((p, pos) for p in range(2) for pos in range(3)):
        row = probability[p, pos].tolist()
        ranked = sorted(range(vocab), key=row.__getitem__, reverse=True)[:most]
        assert chosen[p, pos].nonzero().flatten().tolist() == sorted(
            t for t in ranked if row[t] > floor
        )


def test_a3_only_chosen_outputs_are_targets():
    model, inputs, g = made("induction", prompts=1)
    chosen = torch.zeros(1, 4, 6, dtype=torch.bool)
    chosen[0, 2, 5] = chosen[0, 3, 1] = True
    layers = cut_run(
        GraphSpec(model, inputs, g, MODES["unmasked"], THRESHOLD, lambda output: chosen)
    )
    (found,) = dictionaries(layers, vjp_edges(layers), 1)
    assert {key[4:] for _, key in found if key[3] == "output"} == {(2, 5), (3, 1)}
    everything = alone(model, inputs, g, "unmasked", 0)
    assert found == {
        k: v for k, v in everything.items() if k[1][3] != "output" or k[1][4:] in {(2, 5), (3, 1)}
    }


# ---- changes that must not matter ----------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["induction", "induction, in part", "induction, embedding too"])
def test_a8_no_edge_runs_back_in_time_and_some_run_forward(name, mode):
    model, inputs, g = made(name)
    moves = {key[4] - key[1] for found in batched(model, inputs, g, mode, -1.0) for _, key in found}
    assert moves == {0, 1, 2, 3}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tms", "residual 2", "induction"])
def test_a8_renaming_components_permutes_edges(name, mode):
    model, inputs, g = made(name)
    before = batched(model, inputs, g, mode)
    orders = {
        site: torch.randperm(C, generator=torch.Generator().manual_seed(C))
        for site, C in model.counts.items()
    }
    with torch.no_grad():
        for site, order in orders.items():
            model[site].V.copy_(model[site].V[:, order])
            model[site].U.copy_(model[site].U[order])
    after = batched(model, inputs, {site: v[..., orders[site]] for site, v in g.items()}, mode)

    def renamed(key):
        kind, (S, s, i, T, t, j) = key
        i = orders[S][i].item() if kind == "component" else i
        return kind, (S, s, i, T, t, orders[T][j].item() if T in orders else j)

    for found, expected in zip(after, before, strict=True):
        assert_equal({renamed(key): value for key, value in found.items()}, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "site"),
    [("tms", "hidden.0"), ("residual 2", "layers.0.mlp_out"), ("induction", "h.0.attn.v_proj")],
)
def test_a8_scaling_a_component_divides_its_in_edges_and_keeps_its_out_edges(name, site, mode):
    model, inputs, g = made(name)
    g[site][..., 1] = 0.8
    before = batched(model, inputs, g, mode, 0.0)
    k = -2.5
    with torch.no_grad():
        model[site].U[1] *= k
        model[site].V[:, 1] /= k
    for found, original in zip(batched(model, inputs, g, mode, 0.0), before, strict=True):
        expected = {
            key: v / k if key[1][3] == site and key[1][5] == 1 else v for key, v in original.items()
        }
        assert any(key[1][3] == site and key[1][5] == 1 for key in expected)
        assert any(
            key[1][0] == site and key[1][2] == 1 and key[0] == "component" for key in expected
        )
        assert_equal(found, expected, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a8_padding_a_prompt_changes_nothing_before_it(mode):
    model, inputs, g = made("induction", length=6)
    short = {site: value[:, :4] for site, value in g.items()}
    padded = batched(model, inputs, g, mode)
    cut = batched(model, inputs[:, :4], short, mode)
    for long, expected in zip(padded, cut, strict=True):
        assert_equal({key: value for key, value in long.items() if key[1][4] < 4}, expected)


# ---- interventions -------------------------------------------------------------------------------

STRETCHES = [
    ("tms", "linear1", ["hidden.0"]),
    ("tms", "hidden.0", ["linear2"]),
    ("residual 2", "layers.0.mlp_out", ["layers.1.mlp_in"]),
    ("induction", "h.0.attn.v_proj", ["h.0.attn.o_proj"]),
    ("induction", "h.0.attn.o_proj", [f"h.1.attn.{n}_proj" for n in "qkv"]),
    ("induction 3", "h.1.attn.o_proj", [f"h.2.attn.{n}_proj" for n in "qkv"]),
]


@pytest.mark.parametrize("mode", ["unmasked", "frozen"])
@pytest.mark.parametrize(("name", "source", "readers"), STRETCHES)
def test_a1_switching_a_component_off_takes_its_edges_away(name, source, readers, mode):
    model, inputs, g = made(name, prompts=1)
    (found,) = batched(model, inputs, g, mode, -1.0)
    positions = g[source][0, ..., 0].numel()
    clean = model.clean(inputs)
    with torch.no_grad():
        for i in range(model.counts[source]):
            for s in range(positions):
                mask = torch.ones_like(g[source])
                mask.reshape(positions, -1)[s, i] = 0
                seen = {}
                model.masked(inputs, {source: Mask(mask, 1.0)}, clean, seen=seen)
                for reader in readers:
                    change = (seen[reader] - clean.inputs[reader]) @ model[reader].V
                    for t, j in torch.ones(positions, model.counts[reader]).nonzero().tolist():
                        edge = found.get(("component", (source, s, i, reader, t, j)), 0.0)
                        assert -change.reshape(positions, -1)[t, j].item() == pytest.approx(
                            edge, rel=1e-9, abs=1e-11
                        )


@pytest.mark.parametrize("name", list(ALL))
def test_a4_pairs_that_cross_positions_are_those_worked_out_by_hand(name):
    model, inputs, g = made(name)
    layers = cut_run(GraphSpec(model, inputs, g, MODES["unmasked"], THRESHOLD))
    found = {(layers[s].name, layers[t].name) for s, t in crossing(layers)}
    assert found == hand_crossing(model)


def test_a5_reference_keeps_keys_and_values_read_at_later_positions():
    """The published graphs have k → o and v → o from every earlier position, and these are no small
    part.
    """
    model, inputs, g = made("decoder")
    (found, _) = batched(model, inputs, g, "reference")
    across = [key for _, key in found if key[1] != key[4]]
    assert {(source[-1], reader[-1]) for source, _, _, reader, _, _ in across} == {
        ("k", "o"),
        ("v", "o"),
    }
    assert all(s < t for _, s, _, _, t, _ in across)
    kept = {key: value for (_, key), value in found.items() if key[1] != key[4]}
    exact = oracle(cut_run(GraphSpec(model, inputs[:1], one(g, 0), MODES["reference"], THRESHOLD)))
    assert all(
        value == pytest.approx(exact["component", key], rel=1e-9, abs=1e-14)
        for key, value in kept.items()
    )
