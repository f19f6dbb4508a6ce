"""Models of transformers as they are, one of each kind of code: sites, sums, and edges against
interventions.

Every parameter is random, in double precision. Where transformers computes norms in single
precision, so is the result.
"""

import pytest
import torch
import transformers
from torch import nn

from spd_lightning import BadInput, ComponentModel, HuggingFaceLM
from spd_lightning.attribution.autograd import as_tables, cut_run, prompt_edges, vjp_edges
from spd_lightning.attribution.checks import Graphs, Inflow, changes
from spd_lightning.attribution.dataset_edges import dataset_edges, looked_up, sums_gap
from spd_lightning.attribution.graph import MODES, EdgeTable, GraphSpec, joined
from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.intervention import intervene, named_edits

NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "vocab_size": 31}
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, **NONE}
GPT2 = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4, **NONE}
OPT = WIDE | {
    "max_position_embeddings": 16,
    "ffn_dim": 20,
    "word_embed_proj_dim": 12,
    "pad_token_id": 1,
}
LLAMA = WIDE | {
    "max_position_embeddings": 16,
    "intermediate_size": 20,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
MOE = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
EXACT, SINGLE = 1e-9, 1e-4

KINDS = {
    "gelu_new": ("gpt2", GPT2, {"*c_attn": 5, "*c_fc": 5, "*c_proj": 5}, EXACT),
    "quick_gelu": ("gpt2", GPT2 | {"activation_function": "quick_gelu"}, {"*c_fc": 5}, EXACT),
    "relu2": ("gpt2", GPT2 | {"activation_function": "relu2"}, {"*c_fc": 5, "*c_proj": 5}, EXACT),
    "tanh": ("gpt2", GPT2 | {"activation_function": "tanh"}, {"*c_fc": 5, "*c_proj": 5}, EXACT),
    "flattened": ("opt", OPT, {"*fc1": 5, "*q_proj": 5, "*out_proj": 5}, EXACT),
    "flattened, norms behind": (
        "opt",
        OPT | {"do_layer_norm_before": False},
        {"*fc2": 5, "*v_proj": 5},
        EXACT,
    ),
    "in place": ("falcon", WIDE, {"*dense_4h_to_h": 5, "*query_key_value": 5}, EXACT),
    "in place, biased": (
        "falcon",
        WIDE | {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": True},
        {"*dense_4h_to_h": 5, "*.dense": 5},
        EXACT,
    ),
    "soft caps": ("gemma2", LLAMA | {"query_pre_attn_scalar": 4}, {"*_proj": 5}, SINGLE),
    "router": ("mixtral", MOE, {"*_proj": 5}, SINGLE),
    "relu2 in a norm of its own": ("nemotron", LLAMA, {"*_proj": 5}, EXACT),
}


def decomposed(kind: str, settings: dict, sites: dict) -> tuple[ComponentModel, torch.Tensor, dict]:
    """A model with random parameters, prompts, and importances at random."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings).to_dict()
    target = HuggingFaceLM(config, "float64")
    if kind in ("mixtral", "gpt_oss"):
        target.model.set_experts_implementation("eager")  # the others take single precision alone
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).double()
    tokens = torch.randint(0, 31, (3, 6), generator=generator)
    model = ComponentModel(
        target, sites, importance=Importance(kind="shared_mlp", hidden=3)
    ).double()
    inner = model.clean(tokens).inner
    g = {
        name: (1.8 * torch.rand(a.shape, generator=generator).double() - 0.6).clamp(0, 1)
        for name, a in inner.items()
    }
    return model, tokens, g


def some_tokens(output: torch.Tensor) -> torch.Tensor:
    return (torch.arange(output.shape[-1]) % 8 == 3).expand_as(output)


def drawn(layers: list, table: EdgeTable) -> EdgeTable:
    """Some strong edges of every prompt."""
    graphs = Graphs(layers)
    parts = [EdgeTable(*(column[table.prompt == p] for column in table)) for p in range(3)]
    found = [graphs.sample_edges(part, 20, torch.Generator().manual_seed(0)) for part in parts]
    return joined(found)


@pytest.mark.parametrize("name", KINDS)
def test_a6_sums_and_edges_against_interventions(name):
    """D5; frozen in-edges add up; frozen edges are what switching their source off takes away."""
    *given, precise = KINDS[name]
    model, tokens, g = decomposed(*given)
    wanted = model.target(tokens)
    ones = {site: Mask(None, 1.0) for site in model.sites}
    for clean in (model.clean(tokens), None):
        torch.testing.assert_close(model.masked(tokens, ones, clean), wanted, rtol=1e-9, atol=1e-9)
    spec = GraphSpec(model, tokens, g, MODES["frozen"], 0.0, some_tokens)
    layers, found = prompt_edges(spec)
    table = joined(list(as_tables(layers, found)))
    inflow = Inflow(model, layers)
    inflow.add(table)
    assert inflow.gaps().max() < precise
    some = drawn(layers, table)
    lost = -changes(spec, Graphs(layers).checks(some), 0.0)
    assert len(lost) > 20
    torch.testing.assert_close(
        lost, some.attribution, rtol=precise, atol=precise * some.attribution.abs().max().item()
    )


def test_what_has_no_rule_is_not_hidden():
    """GPT-OSS adds 1 and biases inside its experts: sums miss that and say so, edges are right all
    the same.
    """
    model, tokens, g = decomposed("gpt_oss", MOE | {"sliding_window": 8}, {"*_proj": 5})
    spec = GraphSpec(model, tokens, g, MODES["frozen"], 0.0, some_tokens)
    layers, found = prompt_edges(spec)
    table = joined(list(as_tables(layers, found)))
    inflow = Inflow(model, layers)
    inflow.add(table)
    assert inflow.gaps().min() > 1e-2
    nodes, pairs = dataset_edges(spec)
    assert 1e-3 < sums_gap(model, nodes, pairs) <= inflow.gaps().max()
    some = drawn(layers, table)
    lost = -changes(spec, Graphs(layers).checks(some), 0.0)
    torch.testing.assert_close(
        lost, some.attribution, rtol=SINGLE, atol=SINGLE * some.attribution.abs().max().item()
    )


# ---- batch and positions flattened ---------------------------------------------------------------


class Flattened(nn.Module):
    """An embedding and three maps, which see [batch·pos, d] or [batch, pos, d]; the same
    numbers.
    """

    def __init__(self, flat: bool):
        super().__init__()
        self.vocab, self.flat = 7, flat
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 6)
        self.out = nn.Linear(6, 7)

    def forward(self, tokens):
        if self.flat:
            x = self.embed(tokens.flatten())
            x = x.view(*tokens.shape, 4)
        else:
            x = self.embed(tokens)
        x = x + self.mix(x).cumsum(1)
        x = x.flatten(0, 1) if self.flat else x
        x = self.out(torch.nn.functional.gelu(self.fc(self.norm(x))))
        return x.view(*tokens.shape, 7)


def both(sites: dict[str, int]) -> tuple[list[ComponentModel], torch.Tensor]:
    """The same model with flattened maps and without."""
    torch.manual_seed(0)
    importance = (
        Importance(kind="mlp", hidden=3)
        if "embed" in sites
        else Importance(kind="shared_mlp", hidden=3)
    )
    models = [
        ComponentModel(Flattened(flat), sites, importance=importance).double()
        for flat in (True, False)
    ]
    models[1].load_state_dict(models[0].state_dict())
    return models, torch.randint(0, 7, (3, 5))


@pytest.mark.parametrize(
    "sites", [{"fc": 5, "out": 4}, {"embed": 5, "mix": 3, "fc.pre_identity": 4}]
)
def test_flattened_maps_are_seen_by_position(sites):
    """Importances, masked runs of every kind, interventions and all graphs are those of the
    unflattened model.
    """
    (flat, plain), tokens = both(sites)
    found = [model.importances(model.clean(tokens)).lower for model in (flat, plain)]
    for name in sites:
        assert found[0][name].shape == (3, 5, sites[name])
        assert torch.equal(found[0][name], found[1][name])
    g = {name: torch.rand(values.shape).double() for name, values in found[0].items()}
    masks = {
        name: Mask(values, torch.rand(3, 5).double(), torch.rand(3, 5) > 0.4)
        for name, values in g.items()
    }
    for clean in (False, True):
        outs = [
            model.masked(tokens, masks, model.clean(tokens) if clean else None)
            for model in (flat, plain)
        ]
        torch.testing.assert_close(*outs, rtol=0, atol=1e-12)
    site = next(iter(sites))
    edited = [intervene(m, tokens, named_edits(m, [f"{site}:2:1"])).edited for m in (flat, plain)]
    torch.testing.assert_close(*edited, rtol=0, atol=1e-12)
    assert not torch.equal(edited[0][:, 2], flat.target(tokens)[:, 2])
    torch.testing.assert_close(edited[0][:, :2], flat.target(tokens)[:, :2], rtol=0, atol=1e-12)
    for mode in MODES.values():
        tables = []
        for model in (flat, plain):
            spec = GraphSpec(model, tokens, g, mode, 0.3, some_tokens)
            layers = cut_run(spec)
            tables.append(joined(list(as_tables(layers, vjp_edges(layers)))))
            assert all(layer.value.shape[:2] == (3, 5) for layer in layers)
        for one, two in zip(*tables, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_rows_of_embeddings_are_those_that_are_looked_up():
    """OPT's positions are found by its own module, two rows further on, and it is given a mask."""
    model, tokens, _ = decomposed("opt", OPT, {"*fc1": 3})
    rows = looked_up(model, tokens)
    assert torch.equal(rows["model.decoder.embed_tokens"], tokens)
    assert torch.equal(rows["model.decoder.embed_positions"], torch.arange(2, 8).expand(3, 6))


# ---- what cannot be a site -----------------------------------------------------------------------


def refused(model: nn.Module, sites: dict[str, int], tokens: torch.Tensor | None = None) -> str:
    with pytest.raises(BadInput) as caught:
        ComponentModel(model, sites).clean(torch.zeros(2, 3) if tokens is None else tokens)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "pattern", ["*.experts.*", "*experts*", "*.mlp.experts.gate_up_proj", "*.experts.*.w1"]
)
def test_experts_in_one_tensor_are_refused_by_name(pattern):
    config = transformers.AutoConfig.for_model("mixtral", **MOE).to_dict()
    said = refused(HuggingFaceLM(config), {pattern: 4})
    assert (
        "one three-dimensional tensor, 'model.layers.0.mlp.experts.gate_up_proj' [4, 40, 16]"
        in said
    )
    assert "for example model.layers.0.self_attn.q_proj" in said


def test_an_expert_that_sees_a_selection_is_refused_by_name():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.expert = nn.Linear(4, 7)

        def forward(self, tokens):
            x = self.embed(tokens)
            out = torch.zeros(*tokens.shape, 7)
            out[tokens > 2] = self.expert(x[tokens > 2])
            return out

    said = refused(
        Mixture(), {"expert": 3}, torch.tensor([[1, 3, 3, 4], [5, 6, 6, 2], [3, 3, 3, 1]])
    )
    assert said.startswith(
        "sites: 'expert' reads 9 vectors of a batch with 12 positions: a selection"
    )


@pytest.mark.parametrize(
    ("kind", "settings", "site"),
    [("opt", OPT, "model.decoder.embed_positions"), ("gemma3_text", LLAMA, "model.embed_tokens")],
)
def test_embeddings_that_do_more_than_look_up_are_refused_by_name(kind, settings, site):
    """OPT's positions look up other rows, Gemma scales what it looks up: neither is D2's
    V[token].
    """
    config = transformers.AutoConfig.for_model(kind, **settings).to_dict()
    assert refused(HuggingFaceLM(config), {site: 3}).startswith(f"sites: '{site}' is a ")


def test_a_linear_map_of_another_class_is_a_site_where_it_is_one():
    """Falcon's own class is a linear map; one that does more is refused (D3)."""

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    config = transformers.AutoConfig.for_model("falcon", **WIDE).to_dict()
    assert ComponentModel(HuggingFaceLM(config), {"*dense_4h_to_h": 2}).sites
    said = refused(nn.Sequential(nn.Linear(3, 3), Doubled(3, 3)), {"1": 2})
    assert said == "sites: '1' is a Doubled, which does not compute x Wᵀ + b; leave it out"
