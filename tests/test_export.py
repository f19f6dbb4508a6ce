"""Exports: what circuit-tracer's viewer needs of a file, GraphML read back, and the verb with good
and bad words.
"""

import json
import math
import os
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import networkx
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.toy_run import make_run
from test_influence import frozen as frozen  # a fixture
from test_token_page import make_text_run

from spd_lightning import cli
from spd_lightning.analysis.export import Export, circuit_tracer, digraph, local_scan, write_graphml
from spd_lightning.analysis.export import _xml as xml
from spd_lightning.analysis.graphs import node_name, whole_graph
from spd_lightning.analysis.influence import expanded, influence, outputs_at, pruned
from spd_lightning.analysis.prompts import ALL_PROBES, find_prompt, graph_list
from spd_lightning.commands.export import harvest
from spd_lightning.errors import BadInput
from spd_lightning.store import Store, prompt_hash
from spd_lightning.viewer.library import Library

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*predict returned None"
)
NUMBER = (int, float)
NULL = type(None)
METADATA = {
    "slug": str,
    "scan": str,
    "transcoder_list": list,
    "prompt_tokens": list,
    "prompt": str,
    "node_threshold": NUMBER,
    "schema_version": int,
}
NODE = {
    "node_id": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "token_prob": NUMBER,
    "is_target_logit": bool,
    "run_idx": int,
    "reverse_ctx_idx": int,
    "jsNodeId": str,
    "clerp": str,
    "influence": (*NUMBER, NULL),
    "activation": (*NUMBER, NULL),
}
LINK = {"source": str, "target": str, "weight": NUMBER}
Q_PARAMS = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}
TYPES = {"cross layer transcoder", "embedding", "logit", "mlp reconstruction error"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Runs on vectors and on texts full of what markup and XML choke on."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "tms_5-2")
    make_text_run(root / "texts", mode="unmasked")
    make_text_run(root / "bare")
    return root


def exported(store: Store, prompt: int, nodes: float = 0.8, edges: float = 0.98) -> Export:
    whole = whole_graph(store, prompt)
    return Export(store, prompt, whole, pruned(whole, nodes, edges))


def stores(root: Path, frozen: Store) -> list[tuple[Store, int]]:
    """One prompt of every kind, and all probes together."""
    harvests = [
        Store(root / "tms_5-2/harvest/probe"),
        Store(root / "texts/harvest/unmasked"),
        frozen,
    ]
    prompts = [
        (store, prompt) for store in harvests for prompt in graph_list(store)["prompt_id"][:6]
    ]
    assert any(prompt == ALL_PROBES for _, prompt in prompts)
    return prompts


# ---- circuit-tracer ------------------------------------------------------------------------------


def fits(value: dict, fields: dict) -> bool:
    return set(value) == set(fields) and all(
        isinstance(value[name], kind) and (kind is bool or not isinstance(value[name], bool))
        for name, kind in fields.items()
    )


def unpaired(number: int) -> tuple[int, int]:
    """The viewer's way from `feature` to layer and component."""
    w = (math.isqrt(8 * number + 1) - 1) // 2
    y = number - w * (w + 1) // 2
    return w - y, y


def readable(made: dict) -> None:
    """What the viewer's code takes for granted, beyond the types of fields."""
    made = json.loads(json.dumps(made, allow_nan=False))
    assert fits(made["metadata"], METADATA)
    assert fits(made["qParams"], Q_PARAMS)
    assert all(fits(node, NODE) for node in made["nodes"])
    assert all(fits(link, LINK) for link in made["links"])
    nodes = {node["node_id"]: node for node in made["nodes"]}
    assert len(nodes) == len(made["nodes"]) == len({node["jsNodeId"] for node in made["nodes"]})
    tokens = made["metadata"]["prompt_tokens"]
    assert all(0 <= node["ctx_idx"] < len(tokens) for node in nodes.values())
    assert max(node["ctx_idx"] for node in nodes.values()) > 0  # it cannot lay out a single column
    same = Counter((node["layer"], node["feature"], node["ctx_idx"]) for node in nodes.values())
    assert max(same.values()) <= len(tokens) * 2 / 3  # else it takes them for noise
    rows = {
        name: -1 if node["layer"] == "E" else int(node["layer"]) for name, node in nodes.items()
    }
    assert all(rows[link["source"]] < rows[link["target"]] for link in made["links"])
    for name, node in nodes.items():
        kind = node["feature_type"]
        assert kind in TYPES
        if kind == "logit":
            assert rows[name] == max(rows.values())
            assert float(node["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(
                node["token_prob"], abs=6e-4
            )
            assert node["clerp"].split('"')[2].startswith(" (p=")
        else:
            assert (node["layer"] == "E") == (kind == "embedding")
            shown = kind == "embedding" or node["influence"] <= made["metadata"]["node_threshold"]
            assert shown  # where the slider stands at first
            assert 0 <= node["influence"] <= 1
        if kind == "cross layer transcoder":
            assert (*unpaired(node["feature"]), node["ctx_idx"]) == tuple(map(int, name.split("_")))


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.8, 0.98), (0.3, 0.5)])
def test_what_is_written_fits_the_viewer(root, frozen, shares):
    for store, prompt in stores(root, frozen):
        export = exported(store, prompt, *shares)
        made = circuit_tracer(export, "slug")
        readable(made)
        assert [len(made["nodes"]), len(made["links"])] == [
            len(export.graph.nodes),
            len(export.graph.edges),
        ]
        ids = dict(
            zip(
                export.graph.nodes["node"], [node["node_id"] for node in made["nodes"]], strict=True
            )
        )
        links = {(link["source"], link["target"]): link["weight"] for link in made["links"]}
        assert links == {
            (ids[s], ids[t]): weight for s, t, weight in export.graph.edges.iter_rows()
        }


def test_nodes_stand_where_they_belong(frozen):
    """Rows are sites in forward order, columns positions; rests and biases are errors, likeliest
    outputs targets.
    """
    prompt = frozen.scan("prompts").collect()["prompt_id"][0]
    export = exported(frozen, prompt, 1.0, 1.0)
    sites = [layer for layer in frozen.layers if layer not in ("input", "output")]
    targets = set()
    for row, node in zip(export.nodes(), circuit_tracer(export, "x")["nodes"], strict=True):
        assert node["ctx_idx"] == row["pos"]
        if row["kind"] == "output":
            assert node["feature"] == row["component"]
            targets |= {(row["pos"], row["weight"])} if node["is_target_logit"] else set()
            continue
        assert node["layer"] == str(sites.index(row["layer"]))
        assert (node["feature_type"] == "mlp reconstruction error") == (
            row["kind"] in ("rest", "bias")
        )
        assert row["layer"] in node["clerp"]
    outputs = export.whole.nodes.filter(pl.col("kind") == "output")
    assert targets == set(outputs.group_by("pos").agg(pl.col("weight").max()).rows())


def test_influence_is_counted_in_the_whole_graph_on_what_was_asked(frozen):
    prompt = frozen.scan("prompts").collect()["prompt_id"][1]
    whole = whole_graph(frozen, prompt)
    outputs = outputs_at(whole, pos=4)
    graph = expanded(whole, 5, outputs=outputs)
    made = Export(frozen, prompt, whole, graph, outputs)
    readable(circuit_tracer(made, "x"))
    values = dict(influence(whole, outputs).iter_rows())
    total = sum(values.values())
    for row in made.nodes():
        assert row["influence"] == values[row["node"]]
        larger = sum(value for value in values.values() if value > row["influence"])
        assert row["cumulative"] >= larger / total - 1e-9


# ---- NetworkX and GraphML ------------------------------------------------------------------------


def test_graphml_read_back_is_the_same_graph(root, frozen, tmp_path):
    for store, prompt in stores(root, frozen):
        export = exported(store, prompt)
        made = digraph(export)
        write_graphml(export, tmp_path / "graph.graphml")
        back = networkx.read_graphml(tmp_path / "graph.graphml", node_type=int)
        assert dict(back.nodes(data=True)) == dict(made.nodes(data=True))
        assert list(back.edges(data=True)) == list(made.edges(data=True))
        assert {name: back.graph[name] for name in made.graph} == made.graph
        rows = {row["node"]: row for row in export.graph.nodes.to_dicts()}
        assert set(made) == set(rows)
        for number, held in made.nodes(data=True):
            assert held["name"] == node_name(rows[number])
            assert {
                name: held.get(name)
                for name in rows[number]
                if name in held or name == "importance"
            } == {
                name: value
                for name, value in rows[number].items()
                if name in held or name == "importance"
            }
        weights = {(s, t): weight for s, t, weight in export.graph.edges.iter_rows()}
        assert {(s, t): held["weight"] for s, t, held in made.edges(data=True)} == weights
        assert networkx.is_directed_acyclic_graph(made)


@given(st.text(st.sampled_from("a é<&>'\"\t\n\r\x00\x0b\x1b\x85\u202e\ud800\ufffe\U0001f600")))
def test_any_token_survives_xml(text):
    """What XML cannot hold is written out; the rest is untouched."""
    element = ElementTree.Element("a")
    element.text = kept = xml(text)
    assert (ElementTree.fromstring(ElementTree.tostring(element, "utf-8")).text or "") == kept
    assert kept == text or not text.isprintable()


# ---- prompts by what a person calls them ---------------------------------------------------------


def test_prompts_are_found_by_id_number_source_and_a_part_of_their_text(root):
    store = Store(root / "tms_5-2/harvest/probe")
    ids = graph_list(store)["prompt_id"].to_list()
    assert [find_prompt(store, str(number)) for number in range(len(ids))] == ids
    assert [find_prompt(store, str(one)) for one in ids] == ids
    assert find_prompt(store, "feature 3") == find_prompt(store, "feature 3 = 0.75") == ids[4]
    assert find_prompt(store, "random 63") == ids[-1]
    texts = Store(root / "texts/harvest/unmasked")
    listed = texts.scan("prompts").collect()
    text = " ".join("".join(listed["tokens"][0]).split())
    assert find_prompt(texts, text[:9]) == find_prompt(texts, text[2:9]) == listed["prompt_id"][0]
    assert find_prompt(texts, "Once upon") == prompt_hash(bytes((0, 1, 2, 3, 6)))
    with pytest.raises(
        BadInput,
        match=r"3 prompts contain it, 0 'text 0 .*; 2 'text 2 .*; 3 'text 3 .*; give more of the",
    ):
        find_prompt(texts, "Onc")
    for asked, why in (
        ("feature", "7 prompts contain it, 1 'feature 0 = 0.75'; 2 'feature 1 = 0.75'"),
        ("feture 3 = 0.75", "the nearest are 4 'feature 3 = 0.75'; 1 'feature 0 = 0.75'"),
        ("70", "numbers 0 to 69"),
        ("", "not in"),
    ):
        with pytest.raises(BadInput, match=why):
            find_prompt(store, asked)


def test_the_harvest_is_the_one_that_the_viewer_shows(tmp_path, monkeypatch):
    """The newest harvest with graphs, whatever the order of names; one without graphs is passed
    over.
    """
    run = make_run(tmp_path / "tms_5-2", harvests=("b", "a", "c"))
    monkeypatch.setenv("SPD_RUNS", str(tmp_path))
    for age, name in enumerate(("b", "c", "a")):
        os.utime(run / "harvest" / name / "manifest.json", (10**9 - age, 10**9 - age))
    shown = Library(str(tmp_path)).choose("tms_5-2", None)
    assert shown is not None
    assert harvest("tms_5-2", None).path.name == shown[1] == "b"
    assert harvest("tms_5-2", "c").path.name == "c"


def test_the_viewer_of_circuit_tracer_asks_no_hub():
    """What it asks for begins with "./" and is not among the folders that it fetches from
    elsewhere.
    """
    for name in ("tms_5-2", "features", "google/gemma-2-2b", "a?b#c", "custom-x"):
        scan = local_scan(name)
        assert scan.startswith("./")
        assert not scan.startswith(("./features/", "./data/", "./graph_data/"))
        assert set(scan[2:]) & set("?#@") == set()
        assert scan.count("/") == 2


# ---- the verb ------------------------------------------------------------------------------------


@pytest.fixture
def here(root, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPD_RUNS", str(root))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_verb_writes_what_its_ending_says(here, capsys):
    assert cli.run(["export", "tms_5-2", "--prompt", "feature 1"]) == 0
    assert "circuit-tracer start-server --graph_file_dir" in capsys.readouterr().out
    assert (
        cli.run(["export", "texts", "--prompt=1", "--to=second.json", "--nodes=1", "--edges", "1"])
        == 0
    )
    assert (
        cli.run(
            [
                "export",
                "tms_5-2",
                "--prompt",
                "0",
                "--to",
                "all.graphml",
                "--budget",
                "3",
                "--position",
                "0",
            ]
        )
        == 0
    )
    for slug in ("graph", "second"):
        made = json.loads((here / f"{slug}.json").read_text())
        readable(made)
        assert made["metadata"]["slug"] == slug
    listed = json.loads((here / "graph-metadata.json").read_text())["graphs"]
    assert [one["slug"] for one in listed] == ["graph", "second"]
    assert len(networkx.read_graphml("all.graphml")) == 5 + 3
    assert cli.run(["export", "tms_5-2", "--prompt", "feature 2"]) == 0
    again = json.loads((here / "graph-metadata.json").read_text())["graphs"]
    assert [one["slug"] for one in again] == ["second", "graph"]
    assert sorted(path.name for path in here.iterdir()) == [
        "all.graphml",
        "graph-metadata.json",
        "graph.json",
        "second.json",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "export: RUN is missing"),
        ("tms_5_2", "did you mean 'tms_5-2'"),
        ("bare", "run 'bare': it has no graphs"),
        ("bare --harvest nodes", "harvest 'nodes' of run 'bare': it has no graphs"),
        ("tms_5-2 --harvest prob", "did you mean 'probe'"),
        ("tms_5-2 more", "unexpected argument 'more'"),
        ("tms_5-2 --promt 3", "did you mean '--prompt'"),
        ("tms_5-2 --prompt", "'--prompt' needs a value"),
        ("tms_5-2 --prompt feture_3", "the nearest are 4 'feature 3 = 0.75'"),
        ("tms_5-2 --to graph.csv", "end it in .json or .graphml"),
        ("tms_5-2 --to nowhere/graph.json", "folder 'nowhere' does not exist"),
        ("tms_5-2 --to graph-metadata.json", "choose another"),
        ("tms_5-2 --nodes 1.2", "--nodes '1.2': not a number from 0 to 1"),
        ("tms_5-2 --edges nan", "--edges 'nan': not a number from 0 to 1"),
        ("tms_5-2 --edges=-1", "--edges '-1': not a number from 0 to 1"),
        ("tms_5-2 --nodes half", "--nodes 'half': not a number from 0 to 1"),
        ("tms_5-2 --budget 2.5", "--budget '2.5': not a whole number"),
        ("tms_5-2 --budget 5 --nodes 0.5", "use only one of them"),
        ("tms_5-2 --position 3", "pos 3: the graph has no such output"),
    ],
)
def test_bad_words_get_one_line_and_write_nothing(here, capsys, words, line):
    assert cli.run(["export", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert line in said
    assert list(here.iterdir()) == []


def test_a_list_that_is_none_is_left_alone(here, capsys):
    listing = here / "graph-metadata.json"
    listing.write_text("[1, 2]")
    assert cli.run(["export", "tms_5-2"]) == 2
    assert "not a list of graphs" in capsys.readouterr().err
    assert listing.read_text() == "[1, 2]"
