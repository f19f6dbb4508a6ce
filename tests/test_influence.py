"""Influence beside dense matrices and naive loops, and what must hold of it whatever the graph; a
frozen harvest.
"""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.toy_run import make_harvest
from test_nodes import Ragged, decoder, harvested

from spd_lightning.analysis.graphs import prompt_graph, whole_graph
from spd_lightning.analysis.influence import (
    Graph,
    Scores,
    cumulative,
    expanded,
    influence,
    outputs_at,
    pruned,
    scores,
)
from spd_lightning.errors import BadInput
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.store import Store
from spd_lightning.viewer.graph_page import GraphSelection, page_data

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*predict returned None"
)
SHARES = st.sampled_from([0.0, 0.1, 0.33, 0.5, 0.8, 0.98, 1.0])


def random_graph(seed: int, frozen: bool = True) -> Graph:
    """Some inputs, inner nodes of every kind and outputs, each in a layer of its own, joined at
    random.
    """
    rng = np.random.default_rng(seed)
    inner = rng.choice(["component", "component", "rest", "bias"], rng.integers(1, 9)).tolist()
    kinds = ["embedding"] * rng.integers(1, 3) + inner + ["output"] * rng.integers(1, 4)
    size = len(kinds)
    leaf = np.isin(kinds, ["embedding", "rest", "bias"])
    adjacency = rng.normal(size=(size, size)) * (rng.random((size, size)) < 0.6)
    adjacency *= (
        np.tri(size, k=-1) * ~leaf[:, None] * (np.array(kinds) != "output")
    )  # [target, source]
    target, source = adjacency.nonzero()
    nodes = pl.DataFrame(
        {
            "node": np.arange(size, dtype=np.uint32),
            "kind": kinds,
            "layer": [f"layer {n}" for n in range(size)],
            "pos": np.zeros(size, dtype=np.uint16),
            "component": np.arange(size, dtype=np.uint32),
            "weight": rng.random(size) * (np.array(kinds) == "output"),
        }
    )
    edges = {"source": source.astype(np.uint32), "target": target.astype(np.uint32)}
    return Graph(
        nodes,
        pl.DataFrame(edges | {"attribution": adjacency[target, source].astype(np.float32)}),
        frozen,
    )


GRAPHS = st.integers(0, 2**32 - 1).map(random_graph)


def dense(graph: Graph) -> np.ndarray:
    """Ã, by the definition."""
    rows = {node: row for row, node in enumerate(graph.nodes["node"])}
    matrix = np.zeros((len(rows), len(rows)))
    for source, target, attribution in graph.edges.iter_rows():
        matrix[rows[target], rows[source]] = abs(attribution)
    return matrix / np.maximum(matrix.sum(1, keepdims=True), 1e-300)


def by_inverse(graph: Graph, weights: np.ndarray) -> np.ndarray:
    """p ((I − Ã)⁻¹ − I)."""
    one = np.eye(len(weights))
    return weights @ (np.linalg.inv(one - dense(graph)) - one)


def weights(graph: Graph) -> np.ndarray:
    return graph.nodes["weight"].to_numpy()


def found(graph: Graph, outputs: list[int] | None = None) -> np.ndarray:
    return influence(graph, outputs)["influence"].to_numpy()


def ends(graph: Graph) -> set[tuple[int, int]]:
    return set(zip(graph.edges["source"], graph.edges["target"], strict=True))


# ---- influence -----------------------------------------------------------------------------------


@given(GRAPHS)
def test_influence_is_that_of_the_inverse_matrix(graph):
    assert np.allclose(found(graph), by_inverse(graph, weights(graph)), rtol=1e-9, atol=1e-12)


@given(GRAPHS)
def test_what_leaves_the_outputs_arrives_at_the_leaves(graph):
    """Nothing is lost on the way: leaves have as much influence as outputs with in-edges weigh."""
    entered = dense(graph).any(1)
    assert found(graph)[~entered].sum() == pytest.approx(
        weights(graph)[entered].sum(), rel=1e-9, abs=1e-12
    )


@given(GRAPHS)
def test_influence_on_all_is_the_sum_over_each(graph):
    outputs = graph.nodes.filter(pl.col("kind") == "output")["node"].to_list()
    assert np.allclose(sum(found(graph, [output]) for output in outputs), found(graph))
    assert np.allclose(found(graph, outputs), found(graph))


@given(GRAPHS, st.integers(0, 2**32 - 1))
def test_any_node_may_be_asked_about(graph, seed):
    node = int(np.random.default_rng(seed).integers(len(graph.nodes)))
    if graph.nodes["kind"][node] != "output":
        assert np.allclose(found(graph, [node]), by_inverse(graph, np.eye(len(graph.nodes))[node]))


@given(GRAPHS, st.integers(0, 2**32 - 1), SHARES, SHARES)
def test_numbers_of_nodes_do_not_matter(graph, seed, share, of_edges):
    """Numbered otherwise, the same nodes have the same influence and the same ones are kept."""
    rng = np.random.default_rng(seed)
    numbers = rng.choice(100, len(graph.nodes), replace=False).astype(np.uint32)
    columns = [pl.Series(end, numbers[graph.edges[end].to_numpy()]) for end in ("source", "target")]
    nodes = graph.nodes.with_columns(was="node", node=pl.Series(numbers)).sort("node")
    edges = graph.edges.with_columns(columns).sample(fraction=1, shuffle=True, seed=1)
    other = replace(graph, nodes=nodes, edges=edges)
    assert np.allclose(found(other), found(graph)[nodes["was"].to_numpy()])
    assert set(pruned(other, share, of_edges).nodes["was"]) == set(
        pruned(graph, share, of_edges).nodes["node"]
    )
    assert set(expanded(other, 3).nodes["was"]) == set(expanded(graph, 3).nodes["node"])


def test_what_is_not_finite_counts_as_nothing():
    graph = random_graph(4)
    attribution = pl.when(pl.int_range(pl.len()) == 0).then(np.inf).otherwise("attribution")
    spoilt = replace(graph, edges=graph.edges.with_columns(attribution=attribution))
    without = replace(graph, edges=graph.edges[1:])
    assert np.allclose(found(spoilt), found(without))


# ---- selections ----------------------------------------------------------------------------------


def largest(values: dict, share: float) -> set:
    """The largest values until they make up a share of the sum; at least one, and all that equal
    the last.
    """
    total, least = 0.0, np.inf
    for value in sorted(values.values(), reverse=True):
        if value > 1e-15 and (not total or total < share * sum(values.values())):
            total = total + value
            least = value
    return {key for key, value in values.items() if share == 1 or value > least * (1 - 1e-8)}


def naively_pruned(
    graph: Graph, share: float, of_edges: float
) -> tuple[set[int], set[tuple[int, int]]]:
    p = weights(graph)
    whole = by_inverse(graph, weights(graph))
    all_edges = ends(graph)
    always = {
        n
        for n, kind in enumerate(graph.nodes["kind"])
        if p[n] > 0 or (kind == "embedding" and whole[n] > 1e-15)
    }
    nodes = largest(dict(enumerate(whole.tolist())), share) | always
    part = replace(
        graph,
        edges=graph.edges.filter(pl.all_horizontal(pl.col("source", "target").is_in(list(nodes)))),
    )
    kept = np.isin(np.arange(len(p)), list(nodes))
    reached = by_inverse(part, p * kept) + p * kept
    values = {(s, t): dense(part)[t, s] * reached[t] for s, t in ends(part)}
    edges = largest(values, of_edges)
    while True:
        dead = {
            n for n in nodes - always
            for end in (0, 1)
            if any(e[end] == n for e in all_edges) and not any(e[end] == n for e in edges)
        }  # fmt: skip
        if not dead:
            return nodes, edges
        nodes = nodes - dead
        edges = {e for e in edges if not dead & set(e)}


@given(GRAPHS, SHARES, SHARES)
def test_pruned_is_what_loops_keep(graph, share, of_edges):
    kept = pruned(graph, share, of_edges)
    assert (set(kept.nodes["node"]), ends(kept)) == naively_pruned(graph, share, of_edges)
    assert kept.edges.rows() == [edge for edge in graph.edges.rows() if edge[:2] in ends(kept)]
    if share == of_edges == 1:
        assert kept.nodes.equals(graph.nodes)


@given(GRAPHS, SHARES, SHARES, SHARES)
def test_a_larger_share_keeps_no_less(graph, one, other, of_edges):
    less, more = sorted((one, other))
    assert set(pruned(graph, less, 1.0).nodes["node"]) <= set(
        pruned(graph, more, 1.0).nodes["node"]
    )
    assert ends(pruned(graph, less, 1.0)) <= ends(pruned(graph, more, 1.0))
    assert ends(pruned(graph, of_edges, less)) <= ends(pruned(graph, of_edges, more))
    assert ends(expanded(graph, 3, less)) <= ends(expanded(graph, 3, more))


def naively_expanded(graph: Graph, budget: int) -> set[int]:
    """Each time anew: influence where only what is kept has in-edges; the node that has most of it
    is added.
    """
    shares = dense(graph)
    p = weights(graph)
    kept = p > 0
    for _ in range(budget):
        reach = p @ np.linalg.inv(np.eye(len(p)) - shares * kept[:, None]) * ~kept
        if reach.max() < 1e-12:
            break
        kept[reach.argmax()] = True
    return set(np.flatnonzero(kept).tolist())


@given(GRAPHS, st.integers(0, 12))
def test_expanded_adds_the_best_node_each_time(graph, budget):
    kept = expanded(graph, budget)
    assert set(kept.nodes["node"]) == naively_expanded(graph, budget)
    assert set(kept.nodes["node"]) <= set(expanded(graph, budget + 1).nodes["node"])
    inside = graph.edges.filter(
        pl.all_horizontal(pl.col("source", "target").is_in(kept.nodes["node"].to_list()))
    )
    assert kept.edges.equals(inside)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=8))
def test_cumulative_shares_are_sums_over_what_is_larger(values):
    total = sum(values) or 1.0
    for value, share in zip(values, cumulative(np.array(values)), strict=True):
        above = sum(v for v in values if v > value)
        within = sum(v for v in values if v >= value)
        assert above / total - 1e-9 <= share <= within / total + 1e-9


# ---- scores --------------------------------------------------------------------------------------


@given(GRAPHS)
def test_scores_are_those_of_the_definition(graph):
    p = weights(graph)
    shares = dense(graph)
    kinds = graph.nodes["kind"].to_list()
    rest = np.isin(kinds, ["rest", "bias"])
    tokens = np.array(
        [
            k == "embedding" or (k == "component" and not shares[n].any())
            for n, k in enumerate(kinds)
        ]
    )
    reached = by_inverse(graph, p)
    answer = scores(graph)
    total = reached[tokens].sum() + reached[rest].sum()
    assert answer.replacement == (
        pytest.approx(reached[tokens].sum() / total) if total > 1e-12 else None
    )
    mean = (
        sum((1 - shares[n][rest].sum()) * (reached[n] + p[n]) for n in range(len(p)))
        / (reached + p).sum()
    )
    assert answer.completeness == pytest.approx(mean)
    assert scores(replace(graph, frozen=False)) == Scores(None, None)


def test_a_chain_by_hand():
    """token → component ← rest, all of it → output: the component has a quarter of rest, the output
    none.
    """
    nodes = {
        "node": [0, 1, 2, 3],
        "kind": ["embedding", "rest", "component", "output"],
        "layer": ["e", "s", "t", "output"],
    }
    nodes |= {"pos": [0] * 4, "component": [0] * 4, "weight": [0.0, 0.0, 0.0, 0.5]}
    edges = {"source": [0, 1, 2], "target": [2, 2, 3], "attribution": [-3.0, 1.0, 7.0]}
    graph = Graph(pl.DataFrame(nodes), pl.DataFrame(edges), frozen=True)
    assert found(graph).tolist() == [0.375, 0.125, 0.5, 0.0]
    answer = scores(graph)
    assert answer.replacement == 0.75
    assert answer.completeness == pytest.approx((0.375 + 0.125 + 0.75 * 0.5 + 0.5) / 1.5)
    assert pruned(graph, 0.8, 1.0).nodes["kind"].to_list() == ["embedding", "component", "output"]


# ---- a harvest -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> Store:
    """Frozen graphs of a decoder whose embedding is a site too."""
    folder = tmp_path_factory.mktemp("frozen")
    return harvested(folder, decoder(), Ragged(lengths=(5,), rows=3), PromptGraphs(mode="frozen"))[
        0
    ]


def test_a_frozen_harvest_has_scores_and_others_have_none(frozen, tmp_path):
    """Where the embedding is a site, its components are the tokens (A2)."""
    for prompt in frozen.scan("prompts").collect()["prompt_id"]:
        graph = whole_graph(frozen, prompt)
        p = frozen.scan("outputs", prompt).collect()["ci_probability"].to_numpy().astype(float)
        assert weights(graph)[-len(p) :] == pytest.approx(p)
        assert weights(graph)[: -len(p)].sum() == 0
        reached = by_inverse(graph, weights(graph))
        assert np.allclose(found(graph), reached, rtol=1e-9)
        kind, layer = (graph.nodes[name].cast(pl.String).to_numpy() for name in ("kind", "layer"))
        tokens = reached[(kind == "component") & (layer == "wte")].sum()
        rest = reached[np.isin(kind, ["rest", "bias"])].sum()
        assert scores(graph).replacement == pytest.approx(tokens / (tokens + rest))
        completeness = scores(graph).completeness
        assert completeness is not None
        assert 0 < completeness < 1
        page = page_data(frozen, GraphSelection(prompt))
        assert Scores(page.replacement, page.completeness) == scores(graph)
    vectors = Store(make_harvest(tmp_path / "probe"))
    prompt = vectors.scan("prompts").collect()["prompt_id"][0]
    assert set(whole_graph(vectors, prompt).nodes.filter(pl.col("kind") == "output")["weight"]) == {
        1.0
    }
    assert prompt_graph(vectors, prompt).scores == Scores(None, None)


def test_the_page_filters_what_pruning_leaves(frozen):
    prompt = frozen.scan("prompts").collect()["prompt_id"][0]
    whole = whole_graph(frozen, prompt)
    kept = pruned(whole_graph(frozen, prompt), 0.5, 1.0)
    graph = prompt_graph(frozen, prompt, top_k=10**6, influence=0.5)
    assert set(graph.nodes["node"]) == set(kept.nodes["node"]) < set(whole.nodes["node"])
    assert set(zip(graph.edges["source"], graph.edges["target"], strict=True)) == ends(kept)
    assert (graph.nodes_total, graph.edges_total) == (len(whole.nodes), len(whole.edges))
    assert prompt_graph(frozen, prompt, top_k=10**6).edges_passing == len(whole.edges)


def test_outputs_are_chosen_by_position_and_token(frozen):
    graph = whole_graph(frozen, frozen.scan("prompts").collect()["prompt_id"][0])
    outputs = graph.nodes.filter(pl.col("kind") == "output")
    at_last = outputs.filter(pl.col("pos") == 4)
    assert outputs_at(graph, pos=4) == at_last["node"].to_list()
    token = at_last["component"][0]
    assert outputs_at(graph, 4, token) == at_last["node"].to_list()[:1]
    assert (
        outputs_at(graph, token=token)
        == outputs.filter(pl.col("component") == token)["node"].to_list()
    )
    kept = pruned(graph, 0.8, 0.98, outputs_at(graph, pos=4))
    assert kept.nodes.filter(pl.col("kind") == "output").equals(at_last)
    for wrong, why in (
        (lambda: outputs_at(graph, pos=5), "pos 5: the graph has no such output"),
        (lambda: influence(graph, [10**6]), "node 1000000: not in the graph"),
        (lambda: pruned(graph, nodes=1.5), "nodes 1.5: expected a share"),
        (lambda: pruned(graph, edges=-0.1), "edges -0.1: expected a share"),
        (lambda: expanded(graph, -1), "budget -1"),
    ):
        with pytest.raises(BadInput, match=why):
            wrong()
