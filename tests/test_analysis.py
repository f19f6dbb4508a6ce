"""Readings of a harvest: the same answers as naive loops over its rows."""

import shutil
from collections import defaultdict

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_run import ALIVE, FEATURES, C, W, make_harvest, make_run

from spd_lightning.analysis.components import (
    component_summary,
    identity_order,
    importance_matrix,
    sites,
)
from spd_lightning.analysis.graphs import node_edges, prompt_graph, tables
from spd_lightning.analysis.prompts import ALL_PROBES, graph_list, prompt_label, prompt_list
from spd_lightning.analysis.weights import factors
from spd_lightning.errors import BadInput
from spd_lightning.store import Store, prompt_hash


class Rows(dict[str, list[dict]]):
    """All rows of a harvest by table."""

    def __repr__(self) -> str:
        return "Rows()"  # hypothesis prints the arguments of a test


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(make_harvest(tmp_path_factory.mktemp("harvest") / "probe"))


@pytest.fixture(scope="module")
def rows(store) -> Rows:
    return Rows({table: store.scan(table).collect().to_dicts() for table in store.tables})


@settings(max_examples=30, deadline=None)
@given(
    number=st.integers(0, 68),
    top_k=st.integers(0, 12),
    threshold=st.floats(0, 1),
    importance=st.floats(0, 1),
)
def test_strongest_edges_are_those_of_a_loop(store, rows, number, top_k, threshold, importance):
    """A filter keeps an edge if and only if it is strong enough and both of its nodes are important
    enough.
    """
    prompt = rows["prompts"][number]["prompt_id"]
    nodes = [row for row in rows["nodes"] if row["prompt_id"] == prompt]
    edges = [row for row in rows["edges"] if row["prompt_id"] == prompt]
    largest = max((abs(row["attribution"]) for row in edges), default=0.0)
    kept = {
        row["node"] for row in nodes if row["importance"] is None or row["importance"] >= importance
    }
    passing = [
        e
        for e in edges
        if abs(e["attribution"]) >= threshold * largest and {e["source"], e["target"]} <= kept
    ]
    passing.sort(key=lambda e: (-abs(e["attribution"]), e["source"], e["target"]))

    graph = prompt_graph(store, prompt, top_k, threshold, importance)
    assert set(graph.nodes["node"]) == kept
    assert graph.edges.to_dicts() == [
        {k: v for k, v in e.items() if k != "prompt_id"} for e in passing[:top_k]
    ]
    assert (graph.nodes_total, graph.edges_total) == (len(nodes), len(edges))
    assert (graph.edges_passing, graph.largest) == (len(passing), largest)


def test_edges_of_a_node_are_all_that_touch_it(store, rows):
    """Sums and counts run over every edge, the lists over the strongest only."""
    for prompt in [row["prompt_id"] for row in rows["prompts"][:12]]:
        edges = [row for row in rows["edges"] if row["prompt_id"] == prompt]
        for node in {row["node"] for row in rows["nodes"] if row["prompt_id"] == prompt}:
            answer = node_edges(store, prompt, node, top_k=2)
            for end, frame, count, total in (
                ("target", answer.ins, answer.in_count, answer.in_sum),
                ("source", answer.outs, answer.out_count, answer.out_sum),
            ):
                own = [row["attribution"] for row in edges if row[end] == node]
                assert (len(own), pytest.approx(sum(own))) == (count, total)
                assert frame["attribution"].to_list() == sorted(own, key=abs, reverse=True)[:2]


def test_a_prompt_that_is_not_there_is_bad_input(store):
    with pytest.raises(BadInput, match="prompt 1 has no graph"):
        prompt_graph(store, 1)


def test_importance_matrix_is_that_of_a_loop(store, rows):
    prompts = [row["prompt_id"] for row in rows["prompts"]][::-1]
    for layer in sites(store):
        expected = np.zeros((len(prompts), C), dtype=np.float32)
        for row in rows["nodes"]:
            if row["layer"] == layer:
                expected[prompts.index(row["prompt_id"]), row["component"]] = row["importance"]
        assert np.array_equal(importance_matrix(store, prompts, layer), expected)


def test_hungarian_order_shows_the_identity(store):
    """On single features the permuted importances are a diagonal, in the order of the features."""
    probes = [prompt_hash(f"feature {f}".encode()) for f in range(FEATURES)]
    matrix = importance_matrix(store, probes, "linear1")
    order = identity_order(matrix)
    assert order[:FEATURES].tolist() == ALIVE
    assert sorted(order.tolist()) == list(range(C))
    permuted = matrix[:, order]
    assert np.count_nonzero(permuted) == FEATURES == np.count_nonzero(np.diag(permuted))


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_hungarian_order_is_the_best_permutation(n_prompts, n_components, seed):
    """No other permutation has a larger diagonal: shown by undoing a known one."""
    size = min(n_prompts, n_components)
    matrix = np.zeros((n_prompts, n_components), dtype=np.float32)
    matrix[np.arange(size), np.arange(size)] = 1.0
    shuffle = np.random.default_rng(seed).permutation(n_components)
    shuffled = matrix[:, shuffle]
    order = identity_order(shuffled)
    assert sorted(order.tolist()) == list(range(n_components))
    assert np.array_equal(shuffled[:, order], matrix)


def test_component_summary_divides_summed_counts(store, rows):
    """H1: two groups of shards give what one pass over all prompts gives."""
    for layer in sites(store):
        summary = component_summary(store, layer).to_dicts()
        assert [row["component"] for row in summary] == list(range(C))
        for row in summary:
            own = [
                r
                for r in rows["components"]
                if (r["layer"], r["component"]) == (layer, row["component"])
            ]
            positions = sum(r["positions"] for r in own)
            assert positions == 69
            assert row["density"] == sum(r["firings"] for r in own) / positions
            assert row["mean_importance"] == pytest.approx(
                sum(r["importance_sum"] for r in own) / positions
            )
            assert row["alive"] == (row["component"] in ALIVE)


def test_an_unknown_site_gets_a_suggestion(store):
    for reading in (
        lambda: component_summary(store, "liner1"),
        lambda: importance_matrix(store, [], "liner1"),
    ):
        with pytest.raises(BadInput, match="did you mean 'linear1'"):
            reading()


def test_prompts_are_listed_probes_first_with_readable_names(store):
    listed = prompt_list(store)
    assert listed["label"].head(FEATURES).to_list() == [
        f"feature {f} = 0.75" for f in range(FEATURES)
    ]
    assert listed["split"].to_list() == ["probe"] * 5 + ["random"] * 64
    numbers = [int(label.split()[1]) for label in listed["label"][5:]]
    assert numbers == list(range(64))


def test_all_probes_together_are_the_sum_of_their_graphs(store, rows):
    """The same place is one node, its edges and activations summed, its largest importance kept."""
    listed = graph_list(store)
    assert listed.row(0) == (ALL_PROBES, "all 5 probes together", "probe")
    assert listed[1:].equals(prompt_list(store))
    probes = {row["prompt_id"] for row in rows["prompts"] if row["split"] == "probe"}
    place = {}
    sums = defaultdict(float)
    activations = defaultdict(float)
    importances = defaultdict(list)
    for row in rows["nodes"]:
        if row["prompt_id"] in probes:
            key = (row["layer"], row["kind"], row["pos"], row["component"])
            place[row["prompt_id"], row["node"]] = key
            activations[key] += row["activation"]
            importances[key].append(row["importance"])
    for row in rows["edges"]:
        if row["prompt_id"] in probes:
            sums[
                place[row["prompt_id"], row["source"]], place[row["prompt_id"], row["target"]]
            ] += row["attribution"]
    nodes, edges = tables(store, ALL_PROBES)
    assert nodes["node"].to_list() == list(range(len(activations)))
    names = [(r["layer"], r["kind"], r["pos"], r["component"]) for r in nodes.iter_rows(named=True)]
    assert dict(zip(names, nodes["activation"], strict=True)) == pytest.approx(
        activations, rel=1e-5
    )
    assert {n: i for n, i in zip(names, nodes["importance"], strict=True) if i is not None} == {
        name: max(values) for name, values in importances.items() if None not in values
    }
    found = {(names[s], names[t]): a for s, t, a in edges.iter_rows()}
    assert found == pytest.approx(sums, rel=1e-5)
    whole = prompt_graph(store, ALL_PROBES)
    assert (whole.nodes_total, whole.edges_total) == (len(activations), len(sums))


def test_texts_are_joined_as_they_were_written():
    words = {"source": "text 1", "tokens": ["Once", " upon", " a", " time"]}
    numbers = {"source": "token 3", "tokens": ["0", "12", "3"]}
    assert prompt_label(words) == "text 1 · Once upon a time"
    assert prompt_label(words, most=4) == "text 1 · Once…"
    assert prompt_label(numbers) == "token 3 · 0 12 3"


def test_tied_factors_are_transposes(tmp_path):
    """D9: V_B = U_Aᵀ and U_B = V_Aᵀ; D1: the components add up to the weight."""
    run = make_run(tmp_path / "run", harvests=())
    first = factors(run, "linear1")
    second = factors(run, "linear2")
    assert first is not None
    assert second is not None
    assert np.array_equal(second.V, first.U.T)
    assert np.array_equal(second.U, first.V.T)
    assert np.allclose((first.V[:, ALIVE] @ first.U[ALIVE]).T, W, atol=1e-6)


def test_missing_or_broken_weights(tmp_path):
    assert factors(tmp_path, "linear1") is None
    run = make_run(tmp_path / "run", harvests=())
    with pytest.raises(BadInput, match="did you mean 'linear1'"):
        factors(run, "linear3")
    (run / "decomposition.safetensors").write_bytes(b"not tensors")
    with pytest.raises(BadInput, match=r"not the weights that decomposition\.json describes"):
        factors(run, "linear1")


def test_damage_inside_a_file_is_bad_input(tmp_path, store):
    """A shard that is broken where its length does not show it gets one line, not a reader's
    traceback.
    """
    harvest = shutil.copytree(store.path, tmp_path / "broken")
    for shard in (harvest / "edges").glob("*.parquet"):
        content = bytearray(shard.read_bytes())
        content[4:-200] = bytes(len(content) - 204)
        shard.write_bytes(bytes(content))
    broken = Store(harvest)
    prompt = pl.scan_parquet(store.path / "prompts" / "*.parquet").collect()["prompt_id"][0]
    with pytest.raises(BadInput, match="damaged"):
        prompt_graph(broken, prompt)
