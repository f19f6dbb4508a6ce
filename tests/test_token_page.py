"""The tokens page and what it reads: beside naive loops over the tables, with hostile tokens, and
in a browser.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_run import make_run
from test_viewer import CHROMIUM, JSON, _arrive, served

from spd_lightning.analysis.components import importance_matrix
from spd_lightning.analysis.prompts import prompt_label
from spd_lightning.analysis.tokens import (
    component_places,
    component_spread,
    token_components,
    token_outputs,
)
from spd_lightning.errors import BadInput
from spd_lightning.store import TABLES, Store, Writer, prompt_hash
from spd_lightning.viewer import component_page, graph_page, plots, token_page
from spd_lightning.viewer.component_page import ComponentSelection
from spd_lightning.viewer.graph_page import GraphSelection
from spd_lightning.viewer.library import Library
from spd_lightning.viewer.token_page import TokenSelection, component_response, place_response

LAYERS = ["wte", "h.0.fc", "h.0.down", "output"]
COUNTS = {"h.0.fc": 6, "h.0.down": 4}
EVIL = "<img src=x onerror=alert(1)>"
VOCAB = [
    "Once",
    " upon",
    " a",
    "\n",
    "\t",
    " ",
    EVIL,
    "<b>bold</b>",
    "&amp;",
    "\u202e",
    "é",
    "",
    "\x00",
    "'\"`${x}",
]
TEXTS = [(0, 1, 2, 3, 6), (5, 7, 8, 9, 10, 11, 3, 12), (13, 4, 0), (0,)]
WIDEST = ("h.0.down", 2)


def make_text_run(folder: Path, mode: str = "nodes") -> Path:
    """A run with a harvest of four texts of different lengths, made of tokens that browsers take
    for something else.
    """
    (folder / "harvest").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    manifest = {
        "harvest": mode,
        "run": folder.name,
        "kind": "tokens",
        "mode": mode,
        "threshold": 0.1,
    }
    writer = Writer(
        folder / "harvest" / mode,
        manifest | {"layers": LAYERS, "C": COUNTS, "checkpoint_digest": "0"},
    )
    rng = np.random.default_rng(0)
    for group in (TEXTS[:2], TEXTS[2:]):
        writer.write(_tables(group, rng, edges=mode != "nodes"))
    writer.complete()
    return folder


def _tables(texts, rng: np.random.Generator, edges: bool) -> dict[str, pl.DataFrame]:
    rows: dict[str, list[dict]] = {"prompts": [], "nodes": [], "outputs": [], "edges": []}
    for ids in texts:
        prompt = {"prompt_id": prompt_hash(bytes(ids))}
        own = {"token_ids": list(ids), "tokens": [VOCAB[i] for i in ids]}
        rows["prompts"].append(
            prompt | own | {"source": f"text {TEXTS.index(ids)} {EVIL}", "split": "given"}
        )
        places: list[tuple[str, str, int, int, float | None]]
        places = [("embedding", "wte", p, 0, None) for p in range(len(ids))]
        for layer, count in COUNTS.items():
            for p, c in np.ndindex(len(ids), count):
                g = (
                    float((ids[p] + p) % 2)
                    if (layer, c) == WIDEST
                    else round(rng.random() * 0.6, 3)
                )
                if g > 0.1 and (layer, c) != ("h.0.fc", 5):  # a component that is a node nowhere
                    places.append(("component", layer, p, c, g))
        likely = [
            (p, t)
            for p in range(len(ids))
            for t in rng.choice(len(VOCAB), 3, replace=False).tolist()
        ]
        places += [("output", "output", p, t, None) for p, t in likely]
        names = ("kind", "layer", "pos", "component", "importance")
        nodes = [
            prompt
            | {"node": n, **dict(zip(names, place, strict=True)), "activation": float(rng.normal())}
            for n, place in enumerate(places)
        ]
        rows["nodes"] += nodes
        for p, t in likely:
            values = dict(
                zip(("ci_probability", "target_probability"), rng.random(2) / 4, strict=True)
            )
            rows["outputs"].append(prompt | {"pos": p, "token_id": t, "token": VOCAB[t], **values})
        if edges:
            end = len(nodes) - 1
            rows["edges"] += [
                prompt | {"source": n, "target": end, "attribution": 1.0 + n} for n in range(3)
            ]
    rows["outputs"] = [row | {"ci_logit": 1.0, "target_logit": 2.0} for row in rows["outputs"]]
    words = {"layer": pl.String, "kind": pl.String}
    return {
        table: pl.DataFrame(held, schema={c: words.get(c, d) for c, d in TABLES[table].items()})
        for table, held in rows.items()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    make_text_run(root / "lm")
    make_text_run(root / "graphs", mode="unmasked")
    make_run(root / "tms_5-2")
    return root


@pytest.fixture(scope="module")
def store(root) -> Store:
    return Store(root / "lm/harvest/nodes")


@pytest.fixture(scope="module")
def nodes(store) -> list[dict]:
    return store.scan("nodes").filter(pl.col("kind") == "component").collect().to_dicts()


def prompt_of(ids: tuple[int, ...]) -> int:
    return prompt_hash(bytes(ids))


# ---- readings ------------------------------------------------------------------------------------


def test_spread_is_the_standard_deviation_over_all_positions(store, nodes):
    positions = sum(map(len, TEXTS))
    expected = {}
    for row in nodes:
        expected.setdefault((row["layer"], row["component"]), []).append(row["importance"])
    found = component_spread(store)
    assert found.select(pl.col("layer").cast(pl.String), "component").row(0) == WIDEST
    assert found["spread"].is_sorted(descending=True)
    assert {(row["layer"], row["component"]) for row in found.to_dicts()} == expected.keys()
    for row in found.to_dicts():
        values = np.zeros(positions)
        own = expected[row["layer"], row["component"]]
        values[: len(own)] = own
        assert row["spread"] == pytest.approx(values.std(), rel=1e-6)
        assert row["mean"] == pytest.approx(values.mean())
        assert row["share"] == len(own) / positions


def test_places_of_a_component_and_components_of_a_place(store, nodes):
    """Both directions are the same rows: all of a component, all of a token; the most important
    first.
    """
    for layer, count in COUNTS.items():
        for c in range(count):
            own = [row for row in nodes if (row["layer"], row["component"]) == (layer, c)]
            places = component_places(store, layer, c)
            keys = ("prompt_id", "pos", "importance", "activation")
            assert sorted(places.rows()) == sorted(tuple(row[k] for k in keys) for row in own)
            assert places["importance"].is_sorted(descending=True)
    for ids in TEXTS:
        for pos in range(len(ids)):
            own = [row for row in nodes if (row["prompt_id"], row["pos"]) == (prompt_of(ids), pos)]
            here = token_components(store, prompt_of(ids), pos)
            keys = ("layer", "component", "importance", "activation")
            assert sorted(here.rows()) == sorted(tuple(row[k] for k in keys) for row in own)
            assert here["importance"].is_sorted(descending=True)
            likely = token_outputs(store, prompt_of(ids), pos)
            assert likely.height == 3
            assert likely["token"].to_list() == [VOCAB[t] for t in likely["token_id"]]
            assert likely["ci_probability"].is_sorted(descending=True)
    with pytest.raises(BadInput, match=r"component 4 of site 'h\.0\.down': it has 4"):
        component_places(store, "h.0.down", 4)


def test_importance_of_a_text_is_its_largest_or_its_mean(store, nodes):
    prompts = [prompt_of(ids) for ids in TEXTS]
    for layer, count in COUNTS.items():
        dense = {ids: np.zeros((len(ids), count)) for ids in TEXTS}
        for ids in TEXTS:
            for row in nodes:
                if (row["prompt_id"], row["layer"]) == (prompt_of(ids), layer):
                    dense[ids][row["pos"], row["component"]] = row["importance"]
        ways: dict[Literal["largest", "mean"], Any] = {"largest": np.max, "mean": np.mean}
        for over, reduce in ways.items():
            expected = np.stack([reduce(dense[ids], axis=0) for ids in TEXTS])
            assert np.allclose(importance_matrix(store, prompts, layer, over), expected)


def test_labels_of_texts_are_one_line():
    assert prompt_label({"source": "text 1", "tokens": ["a", "\n\n", "  b"]}) == "text 1 · a b"
    assert prompt_label({"source": "text 1", "tokens": ["\n", " "]}) == "text 1 · (blank)"
    assert prompt_label({"source": "random 1", "tokens": []}) == "random 1 · no active feature"


# ---- pages ---------------------------------------------------------------------------------------


def test_the_page_arrives_at_the_widest_component(store, nodes):
    page = token_page.page_data(store, TokenSelection())
    assert (page.layer, page.component) == WIDEST
    own = [row for row in nodes if (row["layer"], row["component"]) == WIDEST]
    assert (page.total, page.positions) == (len(own), sum(map(len, TEXTS)))
    places = zip(page.places["prompt"], page.places["pos"], page.places["importance"], strict=True)
    expected = {(k, p) for k, ids in enumerate(TEXTS) for p in range(len(ids)) if (ids[p] + p) % 2}
    assert {(k, p) for k, p, g in places if g == 1.0} == expected
    for place in page.top:
        (ids,) = (ids for ids in TEXTS if str(prompt_of(ids)) == place["prompt"])
        words = [VOCAB[i] for i in ids]
        assert [*place["before"], place["token"], *place["after"]] == words
        assert len(place["before"]) == place["pos"]
    first = token_page.page_data(store, TokenSelection("h.0.fc"))
    assert first.layer == "h.0.fc"
    assert first.component == first.components[0]["component"]
    nowhere = token_page.page_data(store, TokenSelection("h.0.fc", 5))
    assert (nowhere.total, nowhere.top, nowhere.places["pos"]) == (0, [], [])


def test_a_place_tells_what_is_in_use_and_what_follows(store):
    ids = TEXTS[1]
    page = token_page.place_data(store, prompt_of(ids), 3)
    assert (page.token, page.follows, page.pos) == (VOCAB[ids[3]], VOCAB[ids[4]], 3)
    likely = token_outputs(store, prompt_of(ids), 3)
    assert [(row["token"], row["ci"], row["target"]) for row in page.outputs] == likely.drop(
        "token_id"
    ).rows()
    assert [row["next"] for row in page.outputs] == [t == ids[4] for t in likely["token_id"]]
    assert page.rest[0] == pytest.approx(1 - likely["ci_probability"].sum())
    assert page.count == len(page.components) == token_components(store, prompt_of(ids), 3).height
    last = token_page.place_data(store, prompt_of(ids), len(ids) - 1)
    assert last.follows is None
    assert not any(row["next"] for row in last.outputs)
    with pytest.raises(BadInput, match="position 8 of prompt"):
        token_page.place_data(store, prompt_of(ids), len(ids))


def test_component_page_of_texts_is_a_mean_and_its_labels_are_no_markup(root, store):
    page = component_page.page_data(store, root / "lm", ComponentSelection("h.0.down"))
    assert page.over == "mean"
    means = importance_matrix(store, [prompt_of(ids) for ids in TEXTS], "h.0.down", "mean")
    assert np.allclose(page.importances, means[:, page.order])
    assert np.all(np.diff(page.importances.sum(axis=0)) <= 1e-6)
    drawn = component_page.figures(page)[0]
    assert "mean over each text" in drawn.layout.title.text
    assert not any("<" in label for label in drawn.layout.yaxis.ticktext)
    quoted: Any = plots.heat_map(np.zeros((1, 1)), ['"<b>'], ["0"], title="", entry="", left=0)
    assert quoted.layout.yaxis.ticktext == ('"&lt;b&gt;',)
    vectors = Store(root / "tms_5-2/harvest/probe")
    assert component_page.page_data(vectors, root / "tms_5-2", ComponentSelection()).over is None


def test_graph_page_names_tokens(root):
    graphs = Store(root / "graphs/harvest/unmasked")
    ids = TEXTS[0]
    page = graph_page.page_data(graphs, GraphSelection(prompt_of(ids)))
    assert page.tokens == [VOCAB[i] for i in ids]
    for node in page.nodes:
        match node["kind"]:
            case "embedding":
                assert node["label"] == VOCAB[ids[node["pos"]]]
            case "output":
                assert node["label"] == VOCAB[node["component"]]
                assert all(math.isfinite(value) for value in node["outputs"].values())
            case "component":
                assert node["label"] == ""
    ends = graph_page.node_data(graphs, prompt_of(ids), page.edges[0]["target"]).ins
    assert [end["label"] for end in ends] == [VOCAB[ids[p]] for p in (2, 1, 0)]


def test_harvests_of_another_kind_are_told_in_one_line(root):
    library = Library(str(root))
    with pytest.raises(
        BadInput, match=r"it has no graphs\. Choose another harvest above, or harvest graphs"
    ):
        graph_page.contents(library, "lm", "nodes")
    with pytest.raises(BadInput, match="vectors; see the pages Graph and Components"):
        token_page.contents(library, "tms_5-2", "probe")
    held = token_page.contents(library, "graphs", "unmasked")
    assert [prompt["tokens"] for prompt in held["prompts"]] == [
        [VOCAB[i] for i in ids] for ids in TEXTS
    ]


FIELDS = ["run", "harvest", "layer", "component", "prompt", "pos"]


@settings(max_examples=60, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), other=JSON)
def test_whatever_a_browser_asks_gets_an_answer_or_one_line(root, changes, other):
    library = Library(str(root))
    sane = {"run": "lm", "harvest": "nodes", "layer": "h.0.fc", "component": 1}
    sane |= {"prompt": str(prompt_of(TEXTS[0])), "pos": 2}
    for question in (sane | changes, other):
        for answer in (component_response(library, question), place_response(library, question)):
            json.dumps(answer, allow_nan=False)
            assert "problem" in answer or {"places", "outputs"} & set(answer)
            assert "\n" not in answer.get("problem", "")
    assert "problem" not in component_response(library, sane)
    assert "problem" not in place_response(library, sane)


# ---- in a browser --------------------------------------------------------------------------------


def test_tokens_in_a_browser(root, tmp_path):
    if not CHROMIUM.exists():
        pytest.skip("no chromium here")
    from playwright.sync_api import Dialog, expect, sync_playwright

    flags = ["--no-sandbox", "--disable-quic", "--disable-background-networking"]
    shutil.copytree(root / "lm", tmp_path / "runs" / "lm")
    with served(tmp_path / "runs", tmp_path / "log") as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        complaints: list[str] = []

        def dismiss(dialog: Dialog) -> None:
            complaints.append(dialog.message)
            dialog.dismiss()

        page.on(
            "console", lambda said: complaints.append(said.text) if said.type == "error" else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", dismiss)
        _arrive(page, address)
        _look(page, expect)
        browser.close()
    assert complaints == []
    assert "Traceback" not in (tmp_path / "log").read_text()


def _look(page, expect) -> None:
    tokens = page.locator(".spd-tokens .text .token")
    panel = page.locator(".spd-tokens .panel")
    expect(page.locator(".spd-tokens .summary")).to_contain_text(
        "h.0.down:2"
    )  # in front, at the widest component
    assert page.locator(".spd-tokens img, .spd-tokens .text b b").count() == 0
    expect(tokens).to_have_count(sum(map(len, TEXTS)))
    whole = [
        "".join(VOCAB[i] for i in ids if VOCAB[i] not in ("\t", "\u202e", "\x00", ""))
        for ids in TEXTS
    ]
    shown = page.locator(".spd-tokens .text > div").evaluate_all(
        "rows => rows.map((row) => row.textContent)"
    )
    assert [text.replace("∅", "") for text in shown] == whole
    glyphs = page.locator(".spd-tokens .text .blank").evaluate_all(
        "all => all.map((one) => one.dataset.glyph)"
    )
    assert {"·", "↵", "→", "\\u202e", "\\u0000"} <= set(glyphs)

    dark = tokens.evaluate_all(
        "all => all.map((one) => Number(one.style.getPropertyValue('--g') || 0))"
    )
    assert dark == [float((i + p) % 2) for ids in TEXTS for p, i in enumerate(ids)]
    tokens.nth(1).hover()
    expect(page.locator(".spd-tokens .tip")).to_contain_text("importance≤ 0.1")
    tokens.nth(4).click()
    expect(panel).to_contain_text("position 4 of text 0")
    expect(panel.locator(".name")).to_have_text(EVIL)
    expect(panel.locator("tbody tr")).to_have_count(4)  # three likely tokens and the others
    page.locator(".spd-tokens .texts").focus()
    page.keyboard.press("ArrowLeft")
    expect(panel).to_contain_text("position 3 of text 0")

    other = panel.locator(".end:not(.chosen)").first
    name = other.locator("span").first.text_content()
    other.click()
    expect(page.locator(".spd-tokens .summary b")).to_have_text(name)
    page.locator(".spd-tokens select.layer").select_option("h.0.fc")
    expect(page.locator(".spd-tokens .summary b")).to_contain_text("h.0.fc:")
    page.locator(".spd-tokens .strongest tbody tr").nth(2).click()
    expect(page.locator(".spd-tokens .token.pinned")).to_have_count(1)
    page.locator(".spd-tokens .find").fill("bold")
    expect(page.locator(".spd-tokens .text:visible")).to_have_count(1)
    page.get_by_role("tab", name="Graph").click()
    expect(page.locator(".spd-graph .problem")).to_contain_text(
        "The page Tokens shows this harvest"
    )
