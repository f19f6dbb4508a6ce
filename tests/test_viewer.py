"""The viewer: what each page holds, beside naive loops over the tables; and one walk through it
with a browser.
"""

import base64
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_run import ALIVE, FEATURES, C, make_harvest, make_run

from spd_lightning import json_files
from spd_lightning.analysis.graphs import whole_graph
from spd_lightning.analysis.influence import pruned
from spd_lightning.analysis.weights import Factors
from spd_lightning.errors import BadInput
from spd_lightning.runs import Run
from spd_lightning.store import Store, Writer, prompt_hash
from spd_lightning.viewer import component_page, graph_page, panel, run_page
from spd_lightning.viewer.component_page import ComponentSelection
from spd_lightning.viewer.graph_page import GraphSelection, graph_response, node_response
from spd_lightning.viewer.library import Library

REPO = Path(__file__).parent.parent
CHROMIUM = Path("/usr/bin/chromium")
PROBE = str(prompt_hash(b"feature 3"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A root of three runs: a whole one, one without a harvest, one whose harvest is damaged."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "bare", harvests=(), finished=False)
    broken = make_run(root / "broken")
    (broken / "harvest" / "probe" / "manifest.json").write_text("{")
    make_run(root / "tms_5-2", harvests=("probe", "second"))
    return root


@pytest.fixture(scope="module")
def store(root) -> Store:
    return Store(root / "tms_5-2" / "harvest" / "probe")


def rows(store: Store, table: str, prompt: int) -> list[dict]:
    return [row for row in store.scan(table).collect().to_dicts() if row["prompt_id"] == prompt]


# What the pages hold.


def test_graph_page_holds_the_rows_of_the_tables(store):
    for source in ("feature 3", "random 4", "random 9"):
        prompt = prompt_hash(source.encode())
        page = graph_page.page_data(store, GraphSelection(prompt, top_k=1000))
        json.dumps(page.__dict__, allow_nan=False)
        nodes = rows(store, "nodes", prompt)
        edges = rows(store, "edges", prompt)
        outputs = {row["token_id"]: row for row in rows(store, "outputs", prompt)}
        assert len(page.nodes) == len(nodes)
        for shown, row in zip(page.nodes, nodes, strict=True):
            assert page.layers[shown["layer"]] == row["layer"]
            assert all(
                shown[name] == row[name]
                for name in ("node", "kind", "pos", "component", "activation")
            )
            if row["kind"] == "output":
                values = outputs[row["component"]]
                assert list(shown["outputs"].values()) == [
                    values["ci_logit"],
                    values["target_logit"],
                ]
        assert {tuple(edge.values()) for edge in page.edges} == {
            (row["source"], row["target"], row["attribution"]) for row in edges
        }
        assert (page.edges_total, page.mode, page.tokens) == (len(edges), "unmasked", [])
    assert graph_page.page_data(store, GraphSelection(int(PROBE))).label == "feature 3 = 0.75"


def test_node_page_names_both_ends_of_every_edge(store):
    """Everything that meets in a node is listed by name, whatever the graph's filters hide."""
    prompt = prompt_hash(b"random 4")
    nodes = {
        row["node"]: f"{row['layer']}:{row['pos']}:{row['component']}"
        for row in rows(store, "nodes", prompt)
    }
    edges = rows(store, "edges", prompt)
    for node in nodes:
        page = graph_page.node_data(store, prompt, node)
        ins = {(nodes[e["source"]], e["attribution"]) for e in edges if e["target"] == node}
        outs = {(nodes[e["target"]], e["attribution"]) for e in edges if e["source"] == node}
        assert {(end["name"], end["attribution"]) for end in page.ins} == ins
        assert {(end["name"], end["attribution"]) for end in page.outs} == outs
        assert page.in_sum == pytest.approx(sum(value for _, value in ins))
    with pytest.raises(BadInput, match="node 99 is not in the graph"):
        graph_page.node_data(store, prompt, 99)


def test_values_that_are_not_finite_reach_the_browser_as_nothing(store, tmp_path):
    """JSON knows no infinity: such an attribution is shown as missing, and the others keep their
    scale.
    """
    prompt = prompt_hash(b"one")
    path = tmp_path / "odd"
    keep = ("harvest", "run", "kind", "mode", "threshold", "layers", "C")
    tables = {
        t: store.scan(t, int(PROBE)).collect() for t in ("prompts", "nodes", "edges", "outputs")
    }
    tables = {
        t: frame.with_columns(prompt_id=pl.lit(prompt, pl.UInt64)) for t, frame in tables.items()
    }
    values = pl.Series("attribution", [np.inf, np.nan, 0.5, -2.0, 0.0, 0.0, 0.0], pl.Float32)
    tables["edges"] = tables["edges"].with_columns(values)
    Writer(path, {key: store.manifest[key] for key in keep}).write(tables)
    odd = Store(path)
    page = graph_page.page_data(odd, GraphSelection(prompt))
    assert page.largest == 2.0
    assert sum(edge["attribution"] is None for edge in page.edges) == 2
    nodes = [graph_page.node_data(odd, prompt, node["node"]) for node in page.nodes]
    json.dumps([page.__dict__, *(node.__dict__ for node in nodes)], allow_nan=False)


def test_what_is_no_component_has_a_name_of_its_own():
    """In frozen graphs (A6) a site has a rest and a bias beside its components, all numbered from
    0.
    """
    kinds = ["component", "rest", "bias"]
    nodes = [{"layer": "linear1", "pos": 2, "component": 0, "kind": kind} for kind in kinds]
    assert [graph_page.node_name(node) for node in nodes] == [
        "linear1:2:0",
        "linear1:2:rest",
        "linear1:2:bias",
    ]


def test_component_page_shows_one_component_a_feature(root, store):
    """The permuted importances of single features are diagonal, and V has the same columns."""
    page = component_page.page_data(
        store, root / "tms_5-2", ComponentSelection("linear1", permuted=True)
    )
    assert page.order[:FEATURES].tolist() == ALIVE
    assert np.array_equal(page.importances, np.eye(FEATURES, C, dtype=np.float32))
    assert page.weights is not None
    assert np.allclose(page.weights.V[:, :FEATURES], np.eye(FEATURES))
    assert page.prompts == [f"feature {f} = 0.75" for f in range(FEATURES)]
    plain = component_page.page_data(
        store, root / "tms_5-2", ComponentSelection("linear1", permuted=False)
    )
    assert np.array_equal(plain.importances[:, page.order], page.importances)
    assert [drawn is not None for drawn in component_page.figures(page)] == [True] * 4


def test_component_page_of_a_bare_harvest_says_what_is_missing(tmp_path):
    harvest = make_harvest(tmp_path / "alone")
    page = component_page.page_data(Store(harvest), harvest, ComponentSelection())
    assert page.site == "linear1"
    assert page.weights is None
    assert "V and U are missing" in page.note
    assert [drawn is None for drawn in component_page.figures(page)] == [False, True, True, False]


def test_a_tall_matrix_is_cut_to_its_strongest_rows(root, store):
    page = component_page.page_data(store, root / "tms_5-2", ComponentSelection("linear1"))
    V = np.zeros((2000, C), dtype=np.float32)
    V[::4, 3] = np.arange(500) + 1
    assert page.weights is not None
    tall = replace(page, weights=Factors(V, page.weights.U))
    drawn = component_page.figures(tall)[1].data[0]
    assert np.array_equal(drawn.z[drawn.z.any(axis=1)], V[V.any(axis=1)])
    assert len(drawn.z) == component_page.MOST_ROWS


def test_run_page_tells_what_the_files_hold(root, store):
    page = run_page.page_data(Run(root / "tms_5-2"), store)
    assert dict(page.facts)["state"] == "finished"
    assert page.results == [("seed", "0")]
    assert [grid.things for grid in page.grids] == [["linear1", "linear2"]]
    assert page.grids[0].measures == {"mmcs": ["0.9998", "0.9997"], "alive": ["5", "5"]}
    assert dict(page.harvest) | {"prompts": "69", "complete": "yes", "mode": "unmasked"} == dict(
        page.harvest
    )
    logged = [
        json.loads(line) for line in (root / "tms_5-2" / "metrics.jsonl").read_text().splitlines()
    ]
    assert set(page.losses) == {"train/loss", "train/faithfulness"}
    losses = {line["step"]: line["train/loss"] for line in logged if "train/loss" in line}
    assert dict(page.losses["train/loss"].rows()) == losses
    l0 = {line["step"]: line["l0/linear2"] for line in logged if "l0/linear2" in line}
    assert dict(page.measures["l0"]["linear2"].rows()) == l0
    assert None not in run_page.figures(page)
    assert page.config == (root / "tms_5-2" / "config.yaml").read_text()
    picture = (root / "tms_5-2" / "figures" / "importance.png").read_bytes()
    assert base64.b64decode(page.figures["importance"].partition(",")[2]) == picture


def test_a_run_that_diverged_is_drawn_too(tmp_path):
    """Infinite and missing losses leave a gap, no error."""
    run = make_run(tmp_path / "run", harvests=())
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 3000, "train/loss": Infinity, "l0/linear1": NaN}\n{"step": 3001, '
            '"train/loss": NaN}\n'
        )
    page = run_page.page_data(Run(run), None)
    assert page.losses["train/loss"]["value"].is_infinite().any()
    for figure in run_page.figures(page):
        assert "Infinity" not in figure.to_json()


def test_run_page_of_an_unfinished_run(root):
    page = run_page.page_data(Run(root / "bare"), None)
    assert dict(page.facts)["state"] == "interrupted"
    assert page.results == page.harvest == page.grids == []
    assert page.losses


# Long names.


def test_long_names_lose_their_middle_and_keep_both_ends():
    name = "model.layers.11.block_sparse_moe.experts.3.down_proj"
    short = panel.shortened(name)
    assert len(short) == panel.NAME
    assert short.startswith("model.layers.11.")
    assert short.endswith("down_proj")
    assert panel.shortened("h.0.mlp.c_fc") == "h.0.mlp.c_fc"
    assert panel.name_element("td", name) == f'<td title="{name}">{short}</td>'
    assert panel.name_element("td", "<b>") == "<td>&lt;b&gt;</td>"


# What may be opened.


def test_a_library_opens_a_root_a_run_or_a_harvest(root, tmp_path):
    assert {run.name for run in Library(str(root)).runs()} == {"bare", "broken", "tms_5-2"}
    only = Library(str(root / "tms_5-2"))
    assert [run.name for run in only.runs()] == ["tms_5-2"]
    harvest = make_harvest(tmp_path / "alone")
    assert Library(str(harvest)).store("alone", "alone").manifest["prompts"] == 69
    with pytest.raises(BadInput, match="nowhere"):
        Library(str(tmp_path / "nowhere"))


def test_a_library_opens_names_and_never_paths(root):
    library = Library(str(root / "tms_5-2"))
    for run in ("bare", "../bare", str(root / "bare"), ".", "", None, 3, ["tms_5-2"]):
        with pytest.raises(BadInput, match="not in"):
            library.store(run, "probe")
    for harvest in ("../probe", "../../../broken/harvest/probe", str(root), None, {}):
        with pytest.raises(BadInput, match="harvest"):
            library.store("tms_5-2", harvest)


def test_what_is_wished_for_is_chosen_if_it_is_there(root, tmp_path):
    library = Library(str(root))
    chosen = {}
    for wish in [("tms_5-2", "probe"), ("broken", "second"), ("bare", "probe")]:
        found = library.choose(*wish)
        assert found is not None
        run, harvest = found
        chosen[wish] = (run.name, harvest)
    assert chosen == {
        ("tms_5-2", "probe"): ("tms_5-2", "probe"),
        ("broken", "second"): ("broken", "probe"),
        ("bare", "probe"): ("bare", None),
    }
    for nonsense in (None, "", 3, ["tms_5-2"], {"a": 1}):
        found = library.choose(nonsense, nonsense)
        assert found is not None
        run, harvest = found
        assert run.harvests
        assert harvest in [path.name for path in run.harvests]
    assert Library(str(tmp_path)).choose("tms_5-2", "probe") is None


def test_a_store_is_read_anew_when_it_grows(tmp_path):
    run = make_run(tmp_path / "runs" / "tms")
    library = Library(str(tmp_path / "runs"))
    first = library.store("tms", "probe")
    assert library.store("tms", "probe") is first
    ledger = run / "harvest" / "probe" / "manifest-0.json"
    held = json_files.unsealed(json.loads(ledger.read_text()))
    ledger.write_text(json.dumps(held | {"shards": held["shards"][:1]}))
    os.utime(ledger, ns=(1, 1))
    assert library.store("tms", "probe").manifest["prompts"] == 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=4,
)
FIELDS = ["run", "harvest", "prompt", "top_k", "threshold", "min_importance", "influence", "node"]


@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), other=JSON)
def test_whatever_a_browser_asks_gets_an_answer_or_one_line(root, changes, other):
    """Server functions can be called by any client: wrong types, unknown names and numbers out of
    range are refused.
    """
    library = Library(str(root))
    sane = {
        "run": "tms_5-2",
        "harvest": "probe",
        "prompt": PROBE,
        "top_k": 50,
        "threshold": 0,
        "min_importance": 0,
    }
    sane["influence"] = 0.8
    for question in (sane | {"node": 0} | changes, other):
        for answer in (graph_response(library, question), node_response(library, question)):
            json.dumps(answer, allow_nan=False)
            assert "problem" in answer or {"edges", "ins"} & set(answer)
            assert "\n" not in answer.get("problem", "")
    assert "problem" not in graph_response(library, sane)


def test_broken_harvests_are_told_in_one_line(root):
    question = {"run": "broken", "harvest": "probe", "prompt": PROBE}
    assert "not JSON" in graph_response(Library(str(root)), question)["problem"]
    question = {"run": "bare", "harvest": None, "prompt": PROBE}
    problem = graph_response(Library(str(root)), question)["problem"]
    assert "spd_lightning predict --config " in problem
    assert problem.endswith(" --run bare")


def test_app_needs_neither_torch_nor_lightning(root):
    program = (
        "import app, sys; print(type(app.demo).__name__, sorted({'torch', 'lightning'} & "
        "set(sys.modules)))"
    )
    environment = os.environ | {"SPD_RUNS": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[0] == "Blocks []"


# A walk through it.


class Served(str):
    """The address of a viewer, and the process that serves it."""

    def __new__(cls, address: str, process: int) -> "Served":
        made = super().__new__(cls, address)
        made.process = process
        return made

    process: int


@contextmanager
def served(root: Path, log: Path) -> Iterator["Served"]:
    """`python app.py` on a free port, for as long as the block lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"SPD_RUNS": str(root), "GRADIO_SERVER_PORT": str(port)}
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=REPO, env=environment, stdout=out, stderr=out
        )
    try:
        yield Served(f"http://127.0.0.1:{port}", process.pid)
    finally:
        process.terminate()
        process.wait(10)


def test_a_walk_through_the_viewer(root, tmp_path):
    if not CHROMIUM.exists():
        pytest.skip("no chromium here")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)  # a machine may be busy
    flags = ["--no-sandbox", "--disable-quic", "--disable-background-networking"]
    runs = tmp_path / "runs"
    with served(runs, tmp_path / "log") as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        complaints: list[str] = []
        page.on(
            "console", lambda said: complaints.append(said.text) if said.type == "error" else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda asked: None if _local(asked.url, address) else complaints.append(asked.url),
        )
        _arrive(page, address)
        expect(page.locator(".spd-empty")).to_contain_text(
            "python -m spd_lightning predict --config"
        )
        shutil.copytree(root, runs)
        page.get_by_role("button", name="Refresh").click()
        _walk(page, expect, root)
        _try_an_endpoint(browser, address, complaints)
        before = _processor_seconds(address.process)
        page.wait_for_timeout(5000)
        idle = (_processor_seconds(address.process) - before) / 5
        _refuse(address, runs)
        browser.close()
    assert complaints == []  # of the content security policy, too
    assert idle < 0.01
    assert (tmp_path / "log").read_text().startswith(f"viewer: {address} ")
    assert "Traceback" not in (tmp_path / "log").read_text()


def _try_an_endpoint(browser, address: str, complaints: list[str]) -> None:
    """The page of endpoints sends a request from its form, and loads only local files."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda asked: None if _local(asked.url, address) else complaints.append(asked.url),
    )
    page.goto(f"{address}/docs")
    page.get_by_role("button", name="GET /api/meta").first.click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_placeholder("run", exact=True).fill("tms_5-2")
    page.get_by_role("button", name="Execute").click()
    response = page.locator(".live-responses-table .response")
    response.filter(has_text="spd-complete: true").filter(has_text="tms_5-2").wait_for()
    page.close()


def _local(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def _arrive(page, address: str) -> None:
    for _ in range(600):  # a machine may be busy
        try:
            urllib.request.urlopen(address, timeout=1).close()
            break
        except OSError:
            page.wait_for_timeout(200)
    page.goto(address)


def _walk(page, expect, root: Path) -> None:
    summary = page.locator(".spd-graph .summary")
    panel = page.locator(".spd-graph .panel")
    _choose_run(page, "tms_5-2")
    page.locator(".spd-graph select.prompt").select_option(label="feature 3 = 0.75")
    expect(summary).to_contain_text("7 of 7 edges, 10 of 10 nodes")

    node = page.locator('.node[aria-label="linear1:0:11"]')
    node.hover()
    expect(page.locator(".spd-graph .tip")).to_contain_text("linear1:0:11")
    expect(page.locator(".spd-graph .tip")).to_contain_text("activation0.75")
    expect(page.locator(".node:not(.off)")).to_have_count(5)  # itself, one input, three readers
    node.click()
    expect(panel).to_contain_text("In-edges1, sum 0.75")
    expect(panel.get_by_role("button", name="linear2:0:11")).to_contain_text("0.75")
    panel.get_by_role("button", name="linear2:0:11").click()
    expect(panel.locator(".name")).to_have_text("linear2:0:11")

    page.locator("[data-setting=influence]").focus()
    page.keyboard.press("Home")
    kept = pruned(whole_graph(Store(root / "tms_5-2/harvest/probe"), int(PROBE)), 0.1, 1.0)
    expect(summary).to_contain_text(f"{len(kept.edges)} of 7 edges, {len(kept.nodes)} of 10 nodes")
    assert 0 < len(kept.edges) < 7
    expect(summary).not_to_contain_text("replacement")
    page.keyboard.press("End")
    page.locator("[data-setting=top_k]").focus()
    page.keyboard.press("Home")
    expect(summary).to_contain_text("5 of 7 edges")
    expect(page.locator(".strongest tbody tr")).to_have_count(5)
    page.locator("[data-setting=threshold]").focus()
    page.keyboard.press("End")
    expect(summary).to_contain_text("3 of 7 edges")

    page.get_by_role("tab", name="Components").click()
    expect(page.locator(".js-plotly-plot:visible")).to_have_count(4)
    expect(page.locator(".js-plotly-plot:visible").first).to_contain_text("feature 3 = 0.75")
    page.get_by_role("tab", name="Run").click()
    expect(page.get_by_text("checkpoint_digest")).to_be_visible()
    expect(page.locator(".spd-gallery img")).to_have_count(1)

    page.get_by_role("tab", name="Graph").click()
    _choose_run(page, "broken")
    expect(page.locator(".spd-graph .problem")).to_contain_text("not JSON")
    expect(page.locator(".node")).to_have_count(0)
    _choose_run(page, "tms_5-2")
    expect(summary).to_contain_text("all 5 probes together")
    expect(summary).to_contain_text("of 25 edges")


def _choose_run(page, name: str) -> None:
    page.locator("#top input").first.click()
    page.get_by_role("option", name=f"{name} ·").click()


def _refuse(address: str, root: Path) -> None:
    """Files are not served, not even those of the runs that are shown; nor is anything to other
    names and sites.
    """
    for path in (root / "tms_5-2" / "config.yaml", REPO / "app.py", Path("/etc/hostname")):
        assert _status(f"{address}/gradio_api/file={path}") == 404
    assert _status(f"{address}/gradio_api/upload", b"x") == 404
    assert _status_of_length(address, 2 * 10**6) == 413
    assert _status(f"{address}/api/prompts?text={'x' * 10**6}") == 414
    assert (
        _status(address, Host="evil.example")
        == _status(address, Origin="http://evil.example")
        == 403
    )


def _status_of_length(address: str, length: int) -> int:
    """The status that a body of this length gets; the gate answers before a byte of it is sent."""
    with contextlib.closing(
        http.client.HTTPConnection(address.removeprefix("http://"))
    ) as connection:
        connection.putrequest("POST", "/gradio_api/component_server/")
        connection.putheader("Content-Length", str(length))
        connection.endheaders()
        return connection.getresponse().status


def _status(url: str, body: bytes | None = None, **headers: str) -> int:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, body, headers)).status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def _processor_seconds(process: int) -> float:
    """How long a process has computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
