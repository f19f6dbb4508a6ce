"""Graphs that are too large to be held at once: computed twice, and cut where they must be."""

import logging

import pytest
import torch
from support.edges import EdgeList, tables_of
from test_closed_form import THRESHOLD, assert_equal, dictionary, made, some_outputs
from test_nodes import harvested, shaken

from spd_lightning import budgets
from spd_lightning.attribution.graph import MODES, GraphSpec
from spd_lightning.attribution.prompt_graphs import attribution_graphs, lazy_graphs
from spd_lightning.attribution.pruning import prune_edges
from spd_lightning.data.modules import SparseFeatures
from spd_lightning.harvest.checks import prune_and_count
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.targets.toy import TMS

KINDS = [("llama", "unmasked"), ("llama", "reference"), ("mlps alone", "frozen")]


def subject(style, mode, length=6):
    model, tokens, g = made(style, length=length)
    return GraphSpec(
        model, tokens, {name: g[name] for name in model.sites}, MODES[mode], THRESHOLD, some_outputs
    )


@pytest.mark.parametrize(("style", "mode"), KINDS)
def test_two_passes_keep_what_one_keeps(style, mode, monkeypatch):
    """However few edges are held together, the same ones are at least a share; each is shown once
    (A1).
    """
    spec = subject(style, mode)
    layers, whole = attribution_graphs(spec, 0.05)
    whole = list(whole)
    monkeypatch.setattr(budgets, "MAX_EDGES", 1)  # prompt by prompt
    monkeypatch.setattr(budgets, "MAX_VJP_NUMBERS", 500)
    _, graphs = lazy_graphs(spec)
    few = []
    seen = []
    for p, parts in enumerate(graphs):
        count = sum(len(table.source) for table in tables_of(parts))
        most = len(dictionary(layers, whole, p))
        table, share = prune_edges(parts, 0.05, most, seen.append)
        assert share == 0.05
        assert 0 < len(table.source) <= most < count
        few.append(table)
    _, every = attribution_graphs(spec)
    every = list(every)
    for p in range(len(spec.inputs)):
        assert_equal(dictionary(layers, few, p), dictionary(layers, whole, p))
        assert_equal(dictionary(layers, seen, p), dictionary(layers, every, p))


@pytest.mark.parametrize("most", [1, 40, 200])
@pytest.mark.parametrize(("style", "mode"), KINDS)
def test_no_more_than_what_fits_is_ever_kept(style, mode, most, monkeypatch, caplog):
    """The strongest in-edges of every node stay; how many there were, and gaps, are those of the
    whole; it is said.
    """
    spec = subject(style, mode)
    layers, every = attribution_graphs(spec)
    monkeypatch.setattr(budgets, "MAX_EDGES", 1)
    whole = prune_and_count(spec.model, layers, [EdgeList(list(every))], 0.0)
    layers, parts = lazy_graphs(spec)
    with caplog.at_level(logging.WARNING, "spd_lightning.harvest.checks"):
        cut = prune_and_count(spec.model, layers, parts, 0.0, most)
    assert torch.equal(cut.total, whole.total)
    torch.testing.assert_close(cut.gaps, whole.gaps)
    for p in range(len(spec.inputs)):
        found = sum(int((table.prompt == p).sum()) for table in cut.tables)
        assert found <= most < int(whole.total[p])
        kept = dictionary(layers, cut.tables, p)
        held = dictionary(layers, whole.tables, p)
        assert_equal(kept, {key: held[key] for key in kept}) if kept else None
    assert caplog.text.count("Raise min_share or threshold to choose this yourself") == len(
        spec.inputs
    )


def test_no_edges_are_a_table_too():
    assert len(prune_edges(EdgeList([])).table.source) == 0


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*predict returned None")
def test_a_harvest_of_many_small_graphs_keeps_all_of_each(tmp_path):
    """Vectors go by the thousand through one cut run; a graph's own edges are counted against the
    memory, once.
    """
    module = shaken(TMS(40, 10), {"linear1": 40, "linear2": 40})
    data = SparseFeatures(40, 0.1, 8, n_prompts=60, predict_batch_size=100)
    (store,) = harvested(tmp_path, module, data, PromptGraphs())
    graphs = store.scan("graphs").collect()
    assert graphs["edges"].to_list() == graphs["edges_total"].to_list()
    assert graphs.height == 100
    assert graphs["edges"].sum() == store.manifest["rows"]["edges"] > 20000
