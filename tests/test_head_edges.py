"""What heads add to edges (laws A1, A6, A7): against runs in which no other head carries
gradient.
"""

import polars as pl
import pytest
import torch
from test_closed_form import (
    CLOSED,
    MAPS,
    STYLES,
    THRESHOLD,
    by_number,
    dictionary,
    made,
    some_outputs,
)
from test_dataset_edges import decoder
from test_nodes import Ragged, harvested
from test_nodes import decoder as without_attention

from spd_lightning.attribution.autograd import cut_run, oracle
from spd_lightning.attribution.closed_form.heads import head_edges
from spd_lightning.attribution.graph import GraphSpec
from spd_lightning.attribution.prompt_graphs import attribution_graphs
from spd_lightning.errors import BadInput
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.targets import transformer
from spd_lightning.viewer.graph_page import node_data

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*predict returned None"
)
WHOLE = [style for style, (_, sites) in STYLES.items() if sites.items() >= MAPS.items()]


def both(style, mode, min_share=0.0):
    """Of what graphs are; their layers, edges and heads' terms."""
    model, tokens, g = made(style, length=3)
    spec = GraphSpec(model, tokens, g, CLOSED[mode], THRESHOLD, some_outputs)
    layers, found = attribution_graphs(spec, min_share)
    found = list(found)
    return spec, layers, found, list(head_edges(spec, found))


def terms(layers, tables, prompt):
    """{head: {edge: term}} of one prompt, keyed as the oracle keys edges."""
    nodes = by_number(layers, prompt)
    found = {}
    for table in tables:
        mine = table.prompt == prompt
        for source, target, head, value in zip(
            *(column[mine].tolist() for column in table[1:]), strict=True
        ):
            (kind, *start) = nodes[source]
            (_, *end) = nodes[target]
            assert (kind, (*start, *end)) not in found.setdefault(head, {})
            found[head][kind, (*start, *end)] = value
    return found


@pytest.mark.parametrize("mode", CLOSED)
@pytest.mark.parametrize("style", WHOLE)
def test_a7_a_heads_terms_are_the_graph_of_that_head_alone(style, mode, monkeypatch):
    """The oracle of a model in which all other heads are constants, edge by edge; together they are
    the edges.
    """
    spec, layers, _, heads = both(style, mode)
    alone = spec.single_prompt(0, layers[-1].nodes)
    mine = terms(layers, heads, 0)
    attend = transformer.attend
    assert sorted(mine) == [0, 1, 2, 3]
    for head, held in mine.items():
        through = (torch.arange(4) == head)[:, None, None]

        def one(*given, through=through):
            out = attend(*given)
            return torch.where(through, out, out.detach())

        with monkeypatch.context() as patched:
            patched.setattr(transformer, "attend", one)
            truth = oracle(cut_run(alone))
        truth = {key: value for key, value in truth.items() if key[1][3].endswith("o_proj")}
        assert truth
        largest = max(map(abs, truth.values()))
        for key in truth.keys() | held.keys():
            assert held.get(key, 0.0) == pytest.approx(
                truth.get(key, 0.0), rel=1e-9, abs=1e-13 * largest
            ), key


@pytest.mark.parametrize(
    ("mode", "min_share"), [("unmasked", 0.0), ("ci_masked", 0.05), ("frozen", 0.05)]
)
@pytest.mark.parametrize("style", WHOLE)
def test_terms_of_heads_add_up_to_the_edges_that_stay(style, mode, min_share):
    _, layers, found, heads = both(style, mode, min_share)
    for prompt in range(2):
        edges = dictionary(layers, found, prompt)
        through = {key: value for key, value in edges.items() if key[1][3].endswith("o_proj")}
        total = dict.fromkeys(through, 0.0)
        for held in terms(layers, heads, prompt).values():
            assert held.keys() <= through.keys()
            for key, value in held.items():
                total[key] += value
        largest = max(map(abs, through.values()))
        for key, value in through.items():
            assert total[key] == pytest.approx(value, rel=1e-9, abs=1e-13 * largest), key


def test_no_edges_no_terms():
    """Where nothing stayed there is nothing to take apart."""
    spec, _, found, _ = both("llama", "unmasked")
    none = [type(table)(*(column[:0] for column in table)) for table in found]
    assert not sum(len(table.source) for table in head_edges(spec, none))


def test_a_harvest_writes_them_where_asked(tmp_path):
    """Rows of an edge add up to it; without being asked there are none."""
    for name, asked in (("without", {}), ("with", {"heads": True, "min_share": 0.01})):
        (store,) = harvested(tmp_path / name, decoder(), Ragged((6, 4)), PromptGraphs(**asked))
        rows = store.collect(store.scan("head_edges"))
        assert rows.is_empty() != bool(asked)
    ends = ["prompt_id", "source", "target"]
    added = rows.group_by(ends).agg(pl.col("attribution").sum().alias("total"))
    nodes = store.collect(store.scan("nodes")).select(
        "prompt_id", target="node", layer=pl.col("layer").cast(pl.String)
    )
    edges = store.collect(store.scan("edges")).join(nodes, on=["prompt_id", "target"])
    edges = edges.filter(pl.col("layer").str.ends_with("o_proj")).join(added, on=ends, how="left")
    assert len(edges) == len(added)
    prompt, node = edges.select("prompt_id", "target").row(0)
    for end in node_data(store, prompt, node).ins:
        assert sum(term["attribution"] for term in end["heads"]) == pytest.approx(
            end["attribution"], rel=1e-4, abs=1e-6
        )
    torch.testing.assert_close(
        edges["total"].to_torch(), edges["attribution"].to_torch(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("made", "mode", "why"),
    [
        (decoder, "reference", "this mode lets delta carry gradient"),
        (without_attention, "unmasked", "'h.0.attn.[kq]_proj' is not decomposed"),
    ],
)
def test_heads_need_the_closed_form(tmp_path, made, mode, why):
    said = rf"^heads in PromptGraphs: attention needs its closed form, and {why}; leave them out$"
    with pytest.raises(BadInput, match=said):
        harvested(tmp_path, made(), Ragged((6,)), PromptGraphs(mode, heads=True))
