"""Interventions (laws D1, D3, D5, G1), and graphs checked by them (A1, A6)."""

import copy
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl
import pytest
import test_native_decoder
import torch
from support import tiny_checkpoints
from support.networks import NETWORKS, Branches, Tokens, decomposed, naive, printed_weight
from test_closed_form import CLOSED, STYLES, THRESHOLD, by_number, made, some_outputs
from torch import nn

from spd_lightning import cli
from spd_lightning.analysis.checks import fidelity
from spd_lightning.attribution.checks import Checks, Graphs, Inflow, changes
from spd_lightning.attribution.graph import MODES, EdgeTable, GraphSpec, joined
from spd_lightning.attribution.outputs import LogitDifference, Outputs, centered
from spd_lightning.attribution.prompt_graphs import attribution_graphs
from spd_lightning.data.modules import Prompts
from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.intervention import Edit, Place, intervene, named_edits, place
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.harvest.module import prompt_id
from spd_lightning.harvest.native_decoder import as_native_decoder
from spd_lightning.store import Store, Writer
from spd_lightning.targets.huggingface import HuggingFaceLM
from spd_lightning.targets.toy import TMS
from spd_lightning.targets.transformer import Decoder
from spd_lightning.training.decompose import Decomposition
from spd_lightning.viewer.graph_page import GraphSelection, page_data

# ---- edits ---------------------------------------------------------------------------------------


def edited_by_hand(model, batch, edits, g=None, keep=None):
    """Every component its own matrix, its share of the output changed as the edits say."""

    def at(name, x):
        if name not in model.sites:
            return x
        W, b = printed_weight(model.target, name)
        x = nn.functional.one_hot(x, W.shape[1]).to(W.dtype) if x.dtype == torch.long else x
        y = (x @ (W - (model[name].V @ model[name].U).T).T if g is None and keep is None else 0) + b
        for c in range(model.counts[name]):
            w = x @ model[name].V[:, c] * (1 if g is None else g[name][..., c])
            for pos in range(w.shape[1]) if w.ndim > 1 else [0]:
                here = (slice(None), pos) if w.ndim > 1 else slice(None)

                def means(at, name=name, c=c, pos=pos):
                    return at.site == name and at.component == c and pos in (at.positions or (pos,))

                w[here] = w[here] if keep is None or any(map(means, keep)) else 0 * w[here]
                for edit in edits:
                    w[here] = edit.factor * w[here] + edit.value if means(edit.place) else w[here]
            y = y + w[..., None] * model[name].U[c]
        return y

    return model.target.explicit(batch, at)


@pytest.mark.parametrize("network", NETWORKS)
def test_d5_without_edits_the_target_speaks(network):
    """Exactly; and to rounding where every component is scaled by one."""
    model = decomposed(network)
    batch = model.target.batch()
    run = intervene(model, batch)
    assert torch.equal(run.target, model.target(batch))
    assert torch.equal(run.edited, run.target)
    ones = [
        Edit(Place(name, c), factor=1.0) for name in model.sites for c in range(model.counts[name])
    ]
    torch.testing.assert_close(
        intervene(model, batch, ones).edited, run.target, rtol=1e-10, atol=1e-10
    )


def places(model):
    """One component of every site: at a position in the middle where there are several, at some,
    and at all.
    """
    several = isinstance(model.target, Tokens | Branches)
    return [
        Place(name, k % 3, ((1,), (0, 2), None)[k % 3] if several else None)
        for k, name in enumerate(model.sites)
    ]


@pytest.mark.parametrize("base", ["unmasked", "ci"])
@pytest.mark.parametrize("network", NETWORKS)
def test_edits_are_what_they_say(network, base):
    """Against every component written out as its own matrix (D1): scaled, set, ablated, one after
    the other; kept.
    """
    model = decomposed(network)
    batch = model.target.batch()
    at = places(model)
    clean = model.clean(batch)
    with torch.no_grad():
        g = None if base == "unmasked" else model.importances(clean).lower
        edits = [
            Edit(place, (0.0, 2.0, 0.0)[k % 3], (1.5, 0.0, 0.0)[k % 3])
            for k, place in enumerate(at)
        ]
        edits += [Edit(at[0], factor=-3.0)]
        run = intervene(model, batch, edits, base=base)
        torch.testing.assert_close(run.edited, edited_by_hand(model, batch, edits, g))
        torch.testing.assert_close(run.base, edited_by_hand(model, batch, [], g))
        assert not torch.allclose(run.edited, run.base)
        kept = intervene(model, batch, edits[:1], at, base)
        torch.testing.assert_close(kept.edited, edited_by_hand(model, batch, edits[:1], g, at))


@pytest.mark.parametrize("network", NETWORKS)
def test_ablated_everywhere_a_component_is_gone_from_the_weight(network):
    """D1: the target with W − U_c V_cᵀ in the place of W; and with importances as masks and nothing
    else, M's `ci`.
    """
    model = decomposed(network)
    batch = model.target.batch()
    for name, site in model.sites.items():
        if site.kind == "identity":
            continue
        other = copy.deepcopy(model.target)
        module: Any = other.get_submodule(name)
        weight = module.weight
        with torch.no_grad():
            part = torch.outer(model[name].U[2], model[name].V[:, 2])
            weight -= part if site.kind == "linear" else part.T
        run = intervene(model, batch, [Edit(Place(name, 2))])
        torch.testing.assert_close(run.edited, other(batch), rtol=1e-10, atol=1e-10)
    g = model.importances(model.clean(batch)).lower
    masks = {name: Mask(values, 0.0) for name, values in g.items()}
    torch.testing.assert_close(
        intervene(model, batch, base="ci").edited, naive(model, batch, masks)
    )


def test_names_are_those_of_nodes():
    model = decomposed(Tokens)
    assert place(model, "conv:3") == Place("conv", 3, None)
    assert place(model, " readout.pre_identity:2:6 ") == Place("readout.pre_identity", 6, (2,))
    assert place(model, "embed:1-3:0") == Place("embed", 0, (1, 2, 3))
    edits = named_edits(model, ["conv:1"], {"conv:2:1": 2.0}, {"conv:1": 1.5})
    assert [(edit.factor, edit.value) for edit in edits] == [(0.0, 0.0), (2.0, 0.0), (0.0, 1.5)]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("conf:3", "site 'conf': not a site of the decomposition; did you mean 'conv'?"),
        ("conv:4", "component 4 of 'conv': it has 4; take one from 0 to 3"),
        (
            "conv",
            "component 'conv': write layer:pos:component, or layer:component for all positions",
        ),
        (
            "conv:a:1",
            "component 'conv:a:1': position 'a' is not a number; write 3, or 3-5 for several",
        ),
        (
            "conv:4-2:1",
            (
                "component 'conv:4-2:1': positions '4-2' end before they begin; write the smaller "
                "one first"
            ),
        ),
        ("conv:5:1", "position 5 of 'conv': the prompt has 5; take one from 0 to 4"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(name, told):
    model = decomposed(Tokens)
    with pytest.raises(BadInput, match="^" + told.replace("?", r"\?") + "$"):
        intervene(model, model.target.batch(), named_edits(model, [name]))


# ---- checks --------------------------------------------------------------------------------------


def all_checks(layers, tables):
    """Every edge whose source is a component, with its attribution."""
    table = joined(list(tables))
    nodes = [by_number(layers, p) for p in range(len(layers[0].nodes))]
    ends = zip(table.prompt.tolist(), table.source.tolist(), strict=True)
    chosen = torch.tensor([nodes[p][source][0] == "component" for p, source in ends])
    table = EdgeTable(*(column[chosen] for column in table))
    checks = Graphs(layers).checks(table)
    rows = zip(*(x.tolist() for x in (table.prompt, table.target, checks.target)), strict=True)
    assert all(
        nodes[p][number] == (*checks.layers[layer], pos, i) for p, number, (layer, pos, i) in rows
    )
    return checks, table.attribution


@pytest.mark.parametrize("mode", ["frozen", "frozen, ci"])
@pytest.mark.parametrize(
    "style", sorted(STYLES.keys() - {"queries and keys alone"})
)  # frozen, these drive nothing
def test_a6_frozen_edges_are_interventions(style, mode):
    """A component switched off or made larger takes from its target, or adds, what its edge says:
    to 1e-9.
    """
    model, tokens, g = made(style)
    g = {name: g[name] for name in model.sites}
    spec = GraphSpec(model, tokens, g, CLOSED[mode], THRESHOLD, some_outputs)
    checks, edges = all_checks(*attribution_graphs(spec))
    for factor in (0.0, 3.0):
        found = changes(spec, checks, factor) / (factor - 1)
        torch.testing.assert_close(found, edges, rtol=1e-9, atol=1e-9 * float(edges.abs().max()))
    assert len(edges) > 100


@pytest.mark.parametrize("reading", [centered, LogitDifference(2)])
def test_a6_what_outputs_stand_for_is_what_is_read(reading):
    """Of logits above the mean or above another token's, checks see the same."""
    model, tokens, g = made("gpt", prompts=1)
    spec = GraphSpec(model, tokens, g, MODES["frozen"], THRESHOLD, Outputs(some_outputs, reading))
    checks, edges = all_checks(*attribution_graphs(spec))
    torch.testing.assert_close(
        -changes(spec, checks), edges, rtol=1e-9, atol=1e-9 * float(edges.abs().max())
    )


@pytest.mark.parametrize("mode", ["unmasked", "ci_masked", "reference"])
@pytest.mark.parametrize("style", ["gpt", "llama", "mlps alone"])
def test_a1_small_interventions_are_derivatives(style, mode):
    """Central differences: both ways by a thousandth, the change is the edge to about 1e-6."""
    model, tokens, g = made(style, prompts=1)
    g = {name: g[name] for name in model.sites}
    spec = GraphSpec(model, tokens, g, MODES[mode], THRESHOLD, some_outputs)
    checks, edges = all_checks(*attribution_graphs(spec))
    up, down = (changes(spec, checks, 1 + eps) for eps in (1e-3, -1e-3))
    torch.testing.assert_close(
        (up - down) / 2e-3, edges, rtol=1e-5, atol=1e-6 * float(edges.abs().max())
    )
    assert not torch.allclose(-changes(spec, checks), edges, rtol=1e-3)  # the model is not linear


def test_a6_checks_of_a_model_of_transformers_go_by_its_own_names(tmp_path):
    """A Llama's frozen edges are interventions on the decoder that stands for it."""
    tiny_checkpoints.write(tmp_path, "llama")
    model, tokens, g = test_native_decoder.decomposed(
        HuggingFaceLM.from_pretrained(str(tmp_path)), test_native_decoder.MAPS
    )
    spec = GraphSpec(model, tokens, g, MODES["frozen"], THRESHOLD, test_native_decoder.odd_tokens)
    quick = as_native_decoder(model, spec.mode)
    checks, edges = all_checks(*quick.graphs(spec))
    torch.testing.assert_close(
        -quick.changes(spec, checks, 0.0), edges, rtol=1e-9, atol=1e-9 * float(edges.abs().max())
    )


def test_a1_checks_of_models_on_vectors():
    """TMS by hand: x_f W's way through two components, and through the ReLU that stays open or
    shut.
    """
    torch.manual_seed(0)
    model = ComponentModel(TMS(5, 2), {"linear*": 6}).double()
    x = torch.rand(3, 5).double()
    g = {name: torch.rand(3, 6).double() for name in model.sites}
    prompt, i, j = torch.cartesian_prod(torch.tensor([2, 0]), torch.arange(6), torch.arange(6)).T
    ends = [
        torch.stack([torch.full_like(i, layer), 0 * i, at], dim=1) for layer, at in ((0, i), (1, j))
    ]
    checks = Checks([("component", "linear1"), ("component", "linear2")], prompt, *ends)
    found = changes(GraphSpec(model, x, g, MODES["ci_masked"]), checks, 2.0)
    w = g["linear1"] * (x @ model["linear1"].V)
    edges = w[..., None] * (model["linear1"].U @ model["linear2"].V)
    torch.testing.assert_close(found, edges[[2, 0]].flatten().detach())


@pytest.mark.parametrize("mode", ["unmasked", "ci_masked", "frozen", "reference"])
@pytest.mark.parametrize("style", ["gpt", "embedding and unembedding too", "mlps alone"])
def test_a6_the_gap_is_what_in_edges_miss(style, mode):
    """Σ_T |a_T − Σ in-edges| / Σ_T |a_T| of every prompt, node by node; nothing in frozen graphs
    (1e-9).
    """
    model, tokens, g = made(style)
    g = {name: g[name] for name in model.sites}
    layers, tables = attribution_graphs(
        GraphSpec(model, tokens, g, MODES[mode], THRESHOLD, some_outputs)
    )
    tables = list(tables)
    inflow = Inflow(model, layers)
    for table in tables:
        inflow.add(table)
    for p, gap in enumerate(inflow.gaps().tolist()):
        nodes = by_number(layers, p)
        missed = 0.0
        size = 0.0
        entered = dict.fromkeys(nodes, 0.0)
        for table in tables:
            mine = table.prompt == p
            for target, value in zip(
                table.target[mine].tolist(), table.attribution[mine].tolist(), strict=True
            ):
                entered[target] += value
        values = {(layer.kind, layer.name): layer.value[p].tolist() for layer in layers}
        for node, (kind, name, pos, i) in nodes.items():
            if kind in ("component", "output") and name != "wte":
                a = values[kind, name][pos][i]
                missed = missed + abs(a - entered[node])
                size = size + abs(a)
        assert gap == pytest.approx(missed / size, abs=1e-12)
        assert (gap < 1e-9) == (mode == "frozen")


# ---- as tables -----------------------------------------------------------------------------------


def harvested(folder, model, inputs, mode, **settings):
    """The graphs of some prompts, written and opened."""
    module = Decomposition(model.target, {"*": 1})
    module.model = model
    harvester = PromptGraphs(mode, **settings)
    manifest = harvester.manifest(module)
    ids = [prompt_id(row) for row in inputs]
    writer = Writer(folder, manifest)
    rows = len(inputs)
    writer.write(harvester.rows(module, Prompts(inputs, ["x"] * rows, ["given"] * rows), ids))
    writer.complete()
    return Store(folder), ids


@pytest.mark.parametrize(("style", "mode"), [("llama", "unmasked"), ("mlps alone", "frozen")])
def test_a_harvest_says_what_its_graphs_are_worth(tmp_path, style, mode):
    """Tables checks and graphs: drawn among what was written, the same again, in agreement with
    each other.
    """
    model, tokens, _ = made(style)
    store, ids = harvested(tmp_path / "one", model, tokens, mode, min_share=0.01, checks=20)
    checks, graphs, edges = (store.scan(name).collect() for name in ("checks", "graphs", "edges"))
    assert checks.select("prompt_id", "source", "target", "attribution").join(
        edges, on=edges.columns
    ).height == len(checks)
    again, _ = harvested(tmp_path / "two", model, tokens, mode, min_share=0.01, checks=20)
    assert again.scan("checks").collect().equals(checks)
    whole = harvested(tmp_path / "all", model, tokens, mode, checks=0)[0]
    assert whole.scan("checks").collect().is_empty()
    for row in graphs.to_dicts():
        mine = pl.col("prompt_id") == row["prompt_id"]
        assert row["edges"] == edges.filter(mine).height < row["edges_total"]
        assert row["edges_total"] == whole.scan("edges").filter(mine).collect().height
        assert row["nodes"] == store.scan("nodes").filter(mine).collect().height
        assert (row["gap"] < 1e-9) == (mode == "frozen")
        a = checks.filter(mine)["attribution"].to_numpy()
        change = checks.filter(mine)["change"].to_numpy()
        assert 10 < row["checked"] == len(a) <= 20
        assert row["correlation"] == pytest.approx(np.corrcoef(a, -change)[0, 1], abs=1e-6)
        assert row["relative_error"] == pytest.approx(
            np.linalg.norm(-change - a) / np.linalg.norm(a), abs=1e-6
        )
        assert (row["relative_error"] < 1e-6) == (mode == "frozen")
    assert set(graphs["prompt_id"]) == set(ids)
    found = fidelity(store)
    a = checks["attribution"].to_numpy()
    change = checks["change"].to_numpy()
    assert found.checked == len(checks)
    assert page_data(store, GraphSelection(ids[0])).checks == asdict(fidelity(store, ids[0]))
    assert found.gap == pytest.approx(graphs["gap"].mean())
    assert found.correlation == pytest.approx(np.corrcoef(a, -change)[0, 1], abs=1e-6)


def test_draws_go_by_size():
    """Among 1000 edges of one prompt, one that is half of all is always drawn, and nothing of size
    zero ever.
    """
    model, tokens, g = made("llama", prompts=1)
    layers, tables = attribution_graphs(
        GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD, some_outputs)
    )
    table = next(iter(tables))
    first = next(
        k
        for k, source in enumerate(table.source.tolist())
        if by_number(layers, 0)[source][0] == "component"
    )
    sizes = torch.zeros(len(table.source)).double()
    sizes[first], sizes[-5:] = -5.0, 1.0
    for seed in range(20):
        edges = table._replace(attribution=sizes, target=torch.arange(len(sizes)))
        drawn = (
            Graphs(layers)
            .sample_edges(edges, 4, torch.Generator().manual_seed(seed))
            .target.tolist()
        )
        assert first in drawn
        assert set(drawn) <= {first, *range(len(sizes) - 5, len(sizes))}
        assert len(drawn) == 3


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs_there(tmp_path_factory):
    """Two runs that were never trained: `text`, a decoder of 16 positions, and `toy`, TMS 5-2."""
    root = tmp_path_factory.mktemp("runs")
    (root / "corpus.txt").write_text(
        "\n\n".join(f"Mia went to the park {k} times ." for k in range(400))
    )
    text = (
        "base: stories-1L-tiny.yaml\ndata: "
        f"{{init_args: {{corpus: {root}/corpus.txt, vocab: 300}}}}"
    )
    decoder = {"vocab": 300, "d_model": 8, "n_layers": 1, "n_heads": 2, "context": 16}
    networks = {
        "text": (Decoder, decoder, "h.*proj", text),
        "toy": (TMS, {"n_features": 5, "n_hidden": 2}, "linear*", "base: tms_5-2.yaml"),
    }
    torch.manual_seed(0)
    for name, (network, settings, sites, config) in networks.items():
        module = Decomposition(network(**settings), {sites: 4})
        module.target_spec = {
            "class_path": f"spd_lightning.{network.__name__}",
            "init_args": settings,
        }
        (root / name).mkdir()
        (root / name / "config.yaml").write_text(config)
        module.save(root / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPD_RUNS", str(root))
        yield root


def told(capsys, *words):
    assert cli.run(["intervene", *words]) == 0
    return capsys.readouterr().out


def test_the_command_shows_predictions_beside_the_targets(capsys, runs_there):
    """A line a position; the same figures in JSON; what a set of names keeps, from the command line
    or a file.
    """
    text = ["text", "--text", "Mia went to the park"]
    answer = json.loads(
        told(capsys, *text, "--json", "--ablate", "h.0.mlp.down_proj:1", "--top", "2")
    )
    ids = [row["token_id"] for row in answer["positions"]]
    module = Decomposition.from_pretrained("text")
    run = module.intervene(torch.tensor([ids]), ["h.0.mlp.down_proj:1"])
    p, q = (side[0].double().softmax(-1) for side in (run.target, run.edited))
    for pos, row in enumerate(answer["positions"]):
        assert [held["token_id"] for held in row["edited"]] == q[pos].topk(2).indices.tolist()
        assert row["target"][0]["probability"] == pytest.approx(float(p[pos].max()), rel=1e-5)
        assert row["kl_edited"] == pytest.approx(
            float((p[pos] * (p[pos] / q[pos]).log()).sum()), rel=1e-4, abs=1e-9
        )
        assert row["kl_base"] == 0
    table = told(capsys, *text).splitlines()
    assert len(table) == 1 + len(ids)
    assert all(line.endswith("0.0000") for line in table[1:])
    names = ["h.0.mlp.down_proj:0-2:1", "h.0.attn.v_proj:3"]
    (runs_there / "nodes.json").write_text(json.dumps({"nodes": [*names, "wte:0:0", "output:1:7"]}))
    kept = [
        told(capsys, *text, "--base", "ci", "--keep", by)
        for by in (",".join(names), f"{runs_there}/nodes.json")
    ]
    assert kept[0] == kept[1]
    assert "KL base" in kept[0]


def test_the_command_takes_vectors_too(capsys, runs_there):
    words = [
        "toy",
        "--input",
        "0,0.75,0,0,0.5",
        "--scale",
        "linear1:2=3",
        "--set",
        "linear2:0:1=-1.5",
    ]
    answer = json.loads(told(capsys, *words, "--json"))["outputs"]
    run = Decomposition.from_pretrained("toy").intervene(
        torch.tensor([[0, 0.75, 0, 0, 0.5]]), scale={"linear1:2": 3.0}, set={"linear2:0:1": -1.5}
    )
    assert [row["edited"] for row in answer] == pytest.approx(run.edited[0].tolist())
    assert len(told(capsys, *words).splitlines()) == 6


ROWS = """\
{"text": "Mia went to the park", "ablate": ["h.0.mlp.down_proj:1"], "name": "down"}

{"text": "Mia", "scale": {"h.0.attn.o_proj:0:1": 2}, "base": "ci"}
{"input": [3, 4, 5], "set": {"h.0.attn.q_proj:1": 0.5}}
{"input": "3,4", "keep": ["h.0.mlp.down_proj:0-1:1"]}
"""
IN_YAML = """\
- {text: Mia went to the park, ablate: [h.0.mlp.down_proj:1], name: down}

- text: Mia
  scale: {h.0.attn.o_proj:0:1: 2}
  base: ci
- {input: [3, 4, 5], set: {h.0.attn.q_proj:1: 0.5}}
- {input: "3,4", keep: [h.0.mlp.down_proj:0-1:1]}
"""


def test_a_file_of_interventions_gives_what_each_gives_alone(capsys, runs_there, tmp_path):
    """Every row's answer is that of a command of its own, after the model has been loaded once."""
    (tmp_path / "rows.jsonl").write_text("\ufeff" + ROWS, encoding="utf-8")
    (tmp_path / "rows.yaml").write_text(IN_YAML)
    answers = [
        json.loads(line)
        for line in told(capsys, "text", "--file", f"{tmp_path}/rows.jsonl", "--json").splitlines()
    ]
    assert [answer.pop("line") for answer in answers] == [1, 3, 4, 5]
    assert [answer.pop("name") for answer in answers] == ["down", "", "", ""]
    alone = [
        ["--text", "Mia went to the park", "--ablate", "h.0.mlp.down_proj:1"],
        ["--text", "Mia", "--scale", "h.0.attn.o_proj:0:1=2", "--base", "ci"],
        ["--input", "3,4,5", "--set", "h.0.attn.q_proj:1=0.5"],
        ["--input", "3,4", "--keep", "h.0.mlp.down_proj:0-1:1"],
    ]
    assert answers == [json.loads(told(capsys, "text", *words, "--json")) for words in alone]
    again = told(capsys, "text", "--file", f"{tmp_path}/rows.yaml", "--json").splitlines()
    assert [json.loads(line)["line"] for line in again] == [1, 3, 6, 7]
    assert [json.loads(line)["positions"] for line in again] == [
        answer["positions"] for answer in answers
    ]
    table = told(capsys, "text", "--file", f"{tmp_path}/rows.jsonl").splitlines()
    assert len(table) == 5
    assert table[0].split() == [
        "line",
        "name",
        "base",
        "after",
        "target",
        "edited",
        "KL",
        "largest",
        "KL",
    ]
    assert table[1].split()[:3] == ["1", "down", "unmasked"]
    assert float(table[1].split()[-2]) == pytest.approx(
        answers[0]["positions"][-1]["kl_edited"], abs=1e-4
    )
    (tmp_path / "edits.jsonl").write_text('{"ablate": "linear1:1"}\n{"ablate": []}\n')
    table = told(
        capsys, "toy", "--file", f"{tmp_path}/edits.jsonl", "--input", "0,0.75,0,0,0"
    ).splitlines()
    assert [line.split()[0] for line in table] == ["line", "1", "2"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [
                '{"text": "Mia", "ablate": ["h.0.attn.p_proj:1"]}',
                '{"text": "Mia"}',
                '{"input": [1], "ablate": "x"}',
                "{",
            ],
            ["line 4: not JSON"],
        ),
        (
            [
                '{"text": "Mia", "ablate": ["h.0.attn.p_proj:1"]}',
                '{"text": "Mia"}',
                '{"input": [1], "ablate": "x"}',
            ],
            [
                "line 1: site 'h.0.attn.p_proj': not a site",
                "line 3: component 'x': write layer:pos:component",
            ],
        ),
        (
            ['{"text": "Mia"}', '{"text": ""}', '{"input": [999]}'],
            ["line 2: prompt: it is empty", "line 3: prompt: token 999"],
        ),
        (
            ['{"input": [1, 2], "ablate": ["h.0.mlp.c_fc_proj:1"]}'],
            ["line 1: site 'h.0.mlp.c_fc_proj'"],
        ),
        (
            ['{"input": [1, 2], "set": {"h.0.attn.q_proj:2:1": 1}}'],
            ["line 1: position 2 of 'h.0.attn.q_proj'"],
        ),
        (['{"txt": "Mia"}'], ["line 1: 'txt': no such key; did you mean 'text'?"]),
        (
            ['{"text": 3}', "[]", "3"],
            ["line 1: 'text': 3 is not text", "line 2: expected keys", "line 3: expected keys"],
        ),
        (['{"text": "Mia", "scale": {"h.0.attn.q_proj:1": "2"}}'], ["line 1: 'scale': not a map"]),
        (['{"text": "Mia", "scale": {"h.0.attn.q_proj:1": 1e39}}'], ["line 1: 'scale': not a map"]),
        (['{"text": "Mia", "keep": {"a": 1}}'], ["line 1: 'keep': not a list"]),
        (['{"text": "Mia", "input": [1]}'], ["line 1: 'text' and 'input' both give a prompt"]),
        (['{"ablate": []}'], ["line 1: no prompt"]),
        (['{"text": "Mia", "base": "cl"}'], ["line 1: 'base': 'cl' is unknown"]),
        (['{"input": ["a"]}'], ["line 1: 'input': not a list of numbers"]),
        (
            ['{"text": "Mia", "ablate": [], "ablate": []}'],
            ["line 1: the key 'ablate' appears twice"],
        ),
        ([], ["it has no rows"]),
    ],
)
def test_wrong_rows_are_all_named_in_one_line(capsys, runs_there, tmp_path, rows, said):
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    assert cli.run(["intervene", "text", "--file", f"{tmp_path}/rows.jsonl"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: --file")
    assert err.count("\n") == 1
    assert all(part in err for part in said), err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["text", "--file", "no.jsonl"], "file 'no.jsonl': cannot be read (No such file"),
        (["text", "--file", "rows.csv"], "end it in .jsonl or .yaml"),
        (["text", "--file", "no.yaml", "--ablate", "x:1"], "--ablate and --file"),
        (["text", "--text", "Mia", "--input", "1"], "use only one of them"),
        (["--text", "Mia"], "intervene: RUN is missing: a run's name"),
        (["text"], "intervene: the prompt is missing; for example"),
        (["txt", "--text", "Mia"], "did you mean 'text'?"),
        (["text", "--text", "Mia", "--abblate", "x:1"], "did you mean '--ablate'?"),
        (["text", "--text", ""], "prompt: it is empty"),
        (["text", "--text", "Mia went " * 20], "the target's context holds 16; shorten it"),
        (
            ["text", "--input", "3,999"],
            "token 999 is outside the target's vocabulary, which ends at 299",
        ),
        (["text", "--input", "3,x"], "this run takes token ids"),
        (["toy", "--input", "1e39,0,0,0,0"], "its numbers must be finite"),
        (["toy", "--input", "0,0,0,0,0", "--ablate", "linear1:٣"], "write layer:pos:component"),
        (
            ["text", "--text", "Mia", "--ablate", "h.0.attn.p_proj:1"],
            "did you mean 'h.0.attn.v_proj'?",
        ),
        (
            ["text", "--text", "Mia", "--ablate", "h.0.attn.q_proj:4"],
            "it has 4; take one from 0 to 3",
        ),
        (
            ["text", "--text", "Mia", "--set", "h.0.attn.q_proj:15:1=1"],
            "position 15 of 'h.0.attn.q_proj': the prompt has",
        ),
        (
            ["text", "--text", "Mia", "--scale", "h.0.attn.q_proj:1"],
            "write a component and a number",
        ),
        (
            ["text", "--text", "Mia", "--scale", "h.0.attn.q_proj:1=inf"],
            "write a component and a number",
        ),
        (
            ["text", "--text", "Mia", "--scale", "h.0.attn.q_proj:1=1e39"],
            "write a component and a number",
        ),
        (
            [
                "text",
                "--text",
                "Mia",
                "--scale",
                "h.0.attn.o_proj:1=3e38",
                "h.0.attn.o_proj:0:1=3e38",
            ],
            "they make the outputs infinite or NaN",
        ),
        (
            ["text", "--text", "Mia", "--ablate", "h.0.attn.q_proj:0-9999999999:1"],
            "beyond the end of any prompt",
        ),
        (["text", "--text", "Mia", "--keep", "no.json"], "cannot be read (No such file"),
        (["text", "--text", "Mia", "--base", "cl"], "unknown value; choose from: ci, unmasked"),
        (["text", "--text", "Mia", "--top", "0"], "--top '0': not a whole number of at least 1"),
        (["toy", "--text", "Mia"], "run 'toy' takes no texts"),
        (["toy", "--input", "1,2"], "does not go through the target"),
        (["toy", "--input", "1,2,nan,4,5"], "its numbers must be finite"),
    ],
)
def test_the_command_refuses_in_one_line(capsys, runs_there, words, said):
    assert cli.run(["intervene", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
