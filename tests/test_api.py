"""The web endpoints: the same values as in Python and as commands print, and one line for every
bad request.
"""

import asyncio
import inspect
import json
import math
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import polars as pl
import pytest
from support.fuzzer import Fuzzer
from support.tiny_harvests import HARVESTS, NAME, OTHER, make_harvests
from support.web import Response, request, send

from spd_lightning import cli, json_files
from spd_lightning.analysis import responses
from spd_lightning.analysis.harvests import open_harvest
from spd_lightning.analysis.store import Store
from spd_lightning.runs import Run
from spd_lightning.viewer import api, api_types
from spd_lightning.viewer.gate import Gate, KnownRequests
from spd_lightning.viewer.library import Library

REQUESTS = int(os.environ.get("SPD_FUZZ_REQUESTS", "1500"))
"""Requests of the fuzzer. Set SPD_FUZZ_REQUESTS=10000 for a long run."""

SECONDS = 60.0
"""The longest time of one request; on a busy machine, too."""


@pytest.fixture(scope="module", autouse=True)
def loop() -> Iterator[None]:
    """One event loop for all requests."""
    made = asyncio.new_event_loop()
    asyncio.set_event_loop(made)
    yield
    made.run_until_complete(made.shutdown_default_executor())
    asyncio.set_event_loop(None)
    made.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder of runs: `tiny` has one harvest of each kind."""
    root = tmp_path_factory.mktemp("runs")
    make_harvests(root / "tiny")
    return root


@pytest.fixture(scope="module")
def stores(root) -> dict[str, Store]:
    return {name: Store(root / "tiny" / "harvest" / name) for name in HARVESTS}


@pytest.fixture(scope="module")
def prompt_id(stores) -> int:
    return stores["graphs"].prompts()["prompt_id"][3]


def endpoints(folder: Path) -> Gate:
    """The endpoints for a folder of runs, behind the viewer's gate."""
    no_pages = KnownRequests({"dependencies": [], "components": []})
    return Gate(api.build(Library(str(folder))), no_pages, "127.0.0.1")


@pytest.fixture(scope="module")
def app(root) -> Gate:
    return endpoints(root)


def get(app: Any, address: str) -> Response:
    parts = urlsplit(address)
    return send(app, "GET", unquote(parts.path), query=parts.query.encode())


# ---- the same values over HTTP, as a command and in Python ---------------------------------------

Stores = Mapping[str, Store]


class Case(NamedTuple):
    """One question in all forms.

    Attributes:
        address: over HTTP; `{id}` is a prompt.
        json: as JSON in Python; takes the stores by name, and the prompt.
        words: of the command line, without the run and `--json`; empty if there is no such command.
        frame: as a frame in Python, whose first rows are the items of the answer; takes the stores.
    """

    address: str
    json: Callable[[Stores, int], Any]
    words: str = ""
    frame: Callable[[Stores], pl.DataFrame] | None = None


CASES = [
    Case("/api/meta?harvest=graphs", lambda s, i: responses.meta(s["graphs"])),
    Case(
        "/api/components",
        lambda s, i: responses.components(s["statistics"]),
        "components --size 100",
        lambda s: s["statistics"].components(),
    ),
    Case(
        "/api/components?layer=h.1.mlp.c_fc&sort=norm&page=1&size=3",
        lambda s, i: responses.components(s["statistics"], "h.1.mlp.c_fc", "norm", 1, 3),
        "components --layer h.1.mlp.c_fc --sort norm --page 1 --size 3",
        lambda s: s["statistics"].components("h.1.mlp.c_fc", "norm").slice(3),
    ),
    Case(f"/api/components/{NAME}", lambda s, i: responses.component(s["statistics"], NAME)),
    Case(f"/api/stats/{NAME}", lambda s, i: responses.component(s["statistics"], NAME)),
    Case(
        f"/api/activation_contexts?name={NAME}",
        lambda s, i: responses.activation_contexts(s["statistics"], NAME),
        frame=lambda s: s["statistics"].contexts(NAME),
    ),
    Case(
        f"/api/activation_contexts?name={NAME}&kind=positive&window=2&top=3",
        lambda s, i: responses.activation_contexts(s["statistics"], NAME, "positive", 2, 3),
        frame=lambda s: s["statistics"].contexts(NAME, "positive", 2),
    ),
    Case(
        f"/api/correlations/{NAME}",
        lambda s, i: responses.correlations(s["statistics"], NAME),
        f"correlations {NAME} --size 100",
        lambda s: s["statistics"].correlations(NAME),
    ),
    Case(
        f"/api/correlations/{NAME}?sort=jaccard&size=5&page=2",
        lambda s, i: responses.correlations(s["statistics"], NAME, "jaccard", 2, 5),
        f"correlations {NAME} --sort jaccard --size 5 --page 2",
        lambda s: s["statistics"].correlations(NAME, "jaccard").slice(10),
    ),
    Case(
        f"/api/tokens/{NAME}",
        lambda s, i: responses.tokens(s["statistics"], NAME),
        f"tokens {NAME}",
    ),
    Case(
        f"/api/tokens/{NAME}?of=output&sort=recall&top=4",
        lambda s, i: responses.tokens(s["statistics"], NAME, "output", "recall", 4),
        f"tokens {NAME} --of output --sort recall --top 4",
    ),
    Case(
        f"/api/search?components={NAME},{OTHER}&mode=any&harvest=graphs&size=2",
        lambda s, i: responses.search(s["graphs"], [NAME, OTHER], "any", size=2),
        f"search {NAME},{OTHER} --mode any --harvest graphs --size 2",
        lambda s: s["graphs"].search([NAME, OTHER], "any"),
    ),
    Case(
        f"/api/search?components={NAME}&min_importance=0.5&harvest=nodes",
        lambda s, i: responses.search(s["nodes"], [NAME], "all", 0.5),
        f"search {NAME} --min_importance 0.5 --harvest nodes --size 100",
        lambda s: s["nodes"].search([NAME], "all", 0.5),
    ),
    Case(
        "/api/prompts?harvest=nodes",
        lambda s, i: responses.prompts(s["nodes"]),
        "prompts --harvest nodes --size 100",
        lambda s: s["nodes"].prompts(),
    ),
    Case(
        "/api/prompts?harvest=graphs&text=3+2&size=2",
        lambda s, i: responses.prompts(s["graphs"], "3 2", size=2),
        "prompts --harvest graphs --text '3 2' --size 2",
        lambda s: s["graphs"].prompts("3 2"),
    ),
    Case(
        "/api/prompts?harvest=graphs&regex=%5E0%20%5B1-5%5D",
        lambda s, i: responses.prompts(s["graphs"], regex="^0 [1-5]"),
        "prompts --harvest graphs --regex '^0 [1-5]' --size 100",
        lambda s: s["graphs"].prompts(regex="^0 [1-5]"),
    ),
    Case(
        "/api/prompt/{id}", lambda s, i: responses.prompt(s["graphs"], i), "prompt {id} --top_k 200"
    ),
    Case(
        "/api/prompt/{id}?top_k=7&ci_threshold=0.2&max_mean_ci=0.9&output_prob_threshold=0.05"
        "&normalize=target",
        lambda s, i: responses.prompt(s["graphs"], i, 7, 0.2, 0.9, 0.05, "target"),
        "prompt {id} --top_k 7 --ci_threshold 0.2 --max_mean_ci 0.9 --output_prob_threshold 0.05 "
        "--normalize target",
    ),
    Case(
        "/api/prompt/{id}?harvest=nodes",
        lambda s, i: responses.prompt(s["nodes"], i),
        "prompt {id} --harvest nodes --top_k 200",
    ),
    Case(
        f"/api/neighbors/{NAME}",
        lambda s, i: responses.neighbors(s["sums"], NAME),
        f"neighbors {NAME}",
    ),
    Case(
        f"/api/neighbors/{NAME}?side=targets&top=3&harvest=graphs",
        lambda s, i: responses.neighbors(s["graphs"], NAME, "targets", 3),
        f"neighbors {NAME} --side targets --top 3 --harvest graphs",
    ),
]
FORMS = {
    "meta": api_types.Meta,
    "components": api_types.Page,
    "activation_contexts": api_types.Contexts,
    "correlations": api_types.Page,
    "tokens": api_types.Tokens,
    "search": api_types.Page,
    "prompts": api_types.Page,
    "prompt": api_types.Prompt,
    "neighbors": api_types.Neighbors,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.address)
def test_an_endpoint_returns_what_python_returns(app, stores, prompt_id, case):
    response = get(app, case.address.format(id=prompt_id))
    value = case.json(stores, prompt_id)
    assert response.status == 200, response.body
    assert response.json() == json.loads(json.dumps(value, allow_nan=False))
    assert response.headers["spd-run"] == "tiny"
    assert response.headers["spd-complete"] == "true"
    arguments = dict(parse_qsl(urlsplit(case.address).query))
    if harvest := arguments.get("harvest"):
        assert response.headers["spd-harvest"] == harvest


COMMANDS = [case for case in CASES if case.words]


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case.words)
def test_a_command_prints_what_an_endpoint_returns(app, root, prompt_id, case, capsys):
    """As JSON; and without --json it prints something."""
    verb, *words = shlex.split(case.words.format(id=prompt_id))
    assert cli.run([verb, str(root / "tiny"), *words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == get(app, case.address.format(id=prompt_id)).json()
    assert cli.run([verb, str(root / "tiny"), *words]) == 0
    assert capsys.readouterr().out.strip()


FRAMES = [case for case in CASES if case.frame is not None]


@pytest.mark.parametrize("case", FRAMES, ids=lambda case: case.address)
def test_items_are_the_rows_of_a_frame(app, stores, case):
    """The public `Store` returns frames; an item has all columns of its row, and may have more."""
    items = get(app, case.address).json()["items"]
    rows = case.frame(stores).head(len(items))
    assert len(items) == rows.height > 0
    for item, row in zip(items, rows.iter_rows(named=True), strict=True):
        if "prompt_id" in row:
            row["prompt_id"] = str(row["prompt_id"])
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        assert item.items() >= json.loads(json.dumps(finite)).items()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.address)
def test_results_have_the_form_that_is_described(app, prompt_id, case):
    """The description is written by hand; results do not pass through it."""
    value = get(app, case.address.format(id=prompt_id)).json()
    name, _, rest = urlsplit(case.address).path.removeprefix("/api/").partition("/")
    if name == "stats" or (name == "components" and rest):
        assert value["name"] == NAME
        return
    form = FORMS[name]
    form.model_validate(value)
    assert set(value) <= set(form.model_fields)


def test_results_are_not_empty(app, prompt_id):
    """A comparison of empty results would say nothing."""
    for case in CASES:
        value = get(app, case.address.format(id=prompt_id)).json()
        keys = {"items", "edges", "nodes", "histogram", "sources", "targets"}
        if "harvest=nodes" in case.address:
            keys.remove("edges")  # it has no graphs
        for key in keys:
            assert value.get(key) != [], case.address


def test_edges_name_nodes_of_the_graph(app, prompt_id):
    graph = get(app, f"/api/prompt/{prompt_id}?top_k=1000").json()
    names = {node["name"] for node in graph["nodes"]}
    assert graph["prompt_id"] == str(prompt_id)
    assert len(graph["edges"]) == min(1000, graph["edges_total"])
    for edge in graph["edges"]:
        assert set(edge) == {"src", "tgt", "val"}
        assert {edge["src"], edge["tgt"]} <= names


def test_pages_add_up_to_the_whole(app):
    whole = get(app, "/api/components?size=1000").json()
    assert (len(whole["items"]), whole["next"]) == (whole["total"], None)
    items, page = [], 0
    while page is not None:
        part = get(app, f"/api/components?size=32&page={page}").json()
        items += part["items"]
        page = part["next"]
    assert items == whole["items"]


QUESTIONS = {
    "/api/meta": "prompts",
    "/api/components": "statistics",
    f"/api/neighbors/{NAME}": "edges",
    f"/api/search?components={NAME}": "nodes",
    "/api/prompts": "prompts",
    "/api/prompt/{id}": "graph",
}


def test_without_names_the_harvest_is_the_one_that_python_opens(root, app, prompt_id):
    run = Run(root / "tiny")
    for address, question in QUESTIONS.items():
        response = get(app, address.format(id=prompt_id))
        expected = open_harvest(run, question).path.name
        assert response.headers["spd-harvest"] == expected, address


def test_defaults_are_those_of_python(app):
    description = get(app, "/openapi.json").json()
    for path, methods in description["paths"].items():
        name = path.split("/")[2]
        if path in ("/api/stats/{name}", "/api/components/{name}"):
            name = "component"
        arguments = inspect.signature(getattr(responses, name)).parameters
        for parameter in methods["get"]["parameters"]:
            if parameter["in"] != "query" or parameter["name"] in ("run", "harvest"):
                continue
            if parameter["required"]:
                continue
            default = arguments[parameter["name"]].default
            assert parameter["schema"].get("default") == default, (path, parameter["name"])


def test_every_parameter_has_a_help_text(app):
    description = get(app, "/openapi.json").json()
    for path, methods in description["paths"].items():
        assert list(methods) == ["get"]
        assert methods["get"]["summary"].endswith("."), path
        for parameter in methods["get"]["parameters"]:
            assert parameter["description"].endswith("."), (path, parameter["name"])
            assert parameter["schema"].get("type") in ("string", "integer", "number")


# ---- bad requests --------------------------------------------------------------------------------

MEGABYTE = "x" * 2**20
BAD = [
    ("/api/nothing", 404, "/docs"),
    ("/api/", 404, "/docs"),
    ("/api/components/../../../etc/passwd", 404, "not an endpoint"),
    ("/api/components/..%2F..%2Fetc%2Fpasswd", 404, "not an endpoint"),
    ("/api/components/h.0.attn.q_proj:10", 404, "10"),
    ("/api/components/h.0.attn.q_prj:1", 404, "did you mean 'h.0.attn.q_proj'"),
    ("/api/components/h.0.attn.q_proj:1:2", 404, "without a position"),
    ("/api/components/h.0%0Aattn%00:1", 404, "on one line"),
    (f"/api/components/{'x' * 301}", 422, "at most 300"),
    (f"/api/components/{MEGABYTE}", 414, "more than"),
    (f"/api/prompts?text={MEGABYTE}", 414, "more than"),
    (f"/api/prompts?text={'x' * 10_001}", 422, "at most 10000"),
    ("/api/prompts?regex=%28%28%28", 422, "unclosed group"),
    ("/api/prompts?regex=a%7B1000%7D%7B1000%7D%7B1000%7D", 422, "size limit"),
    ("/api/prompts?page=1.5", 422, "page '1.5'"),
    ("/api/prompts?page=one", 422, "integer"),
    ("/api/prompts?page=-1", 422, "greater than or equal to 0"),
    (f"/api/prompts?page=1{'0' * 400}", 422, "page"),
    (f"/api/prompts?page={'9' * 5000}", 422, "page"),
    ("/api/prompts?page=1000", 422, "the last page of 100 items is 0"),
    ("/api/prompts?size=0", 422, "greater than or equal to 1"),
    ("/api/prompts?size=1001", 422, "less than or equal to 1000"),
    ("/api/prompts?sise=3", 422, "unknown parameter 'sise'"),
    ("/api/prompts?run=..%2Ftiny", 404, "did you mean 'tiny'?"),
    ("/api/prompts?run=%2Fetc%2Fpasswd", 404, "run '/etc/passwd'"),
    ("/api/prompts?run=other", 404, "run 'other'"),
    ("/api/prompts?run=", 404, "run ''"),
    ("/api/prompts?harvest=..%2F..%2Ftiny", 404, "not in run 'tiny'"),
    ("/api/prompts?harvest=graph", 404, "did you mean 'graphs'?"),
    ("/api/prompt/none", 422, "pattern"),
    ("/api/prompt/-1", 422, "pattern"),
    ("/api/prompt/5", 404, "not in harvest 'graphs'"),
    ("/api/prompt/18446744073709551616", 404, "not in harvest"),
    ("/api/prompt/{id}?ci_threshold=nan", 422, "finite"),
    ("/api/prompt/{id}?ci_threshold=inf", 422, "finite"),
    ("/api/prompt/{id}?ci_threshold=1e999", 422, "finite"),
    ("/api/prompt/{id}?max_mean_ci=1.01", 422, "less than or equal to 1"),
    ("/api/prompt/{id}?output_prob_threshold=-1e-300", 422, "greater than or equal to 0"),
    ("/api/prompt/{id}?top_k=18446744073709551616", 422, "less than or equal to 100000"),
    ("/api/prompt/{id}?normalize=l3", 422, "normalize 'l3': it should be 'none', "),
    ("/api/search", 422, "components"),
    ("/api/search?components=", 422, "no component is given"),
    ("/api/search?components=,,", 422, "no component is given"),
    (f"/api/search?components={'a:1,' * 101}", 422, "at most 100"),
    (f"/api/search?components={NAME},h.9:1", 422, "h.9"),
    (f"/api/search?components={NAME}&mode=some", 422, "'all' or 'any'"),
    (f"/api/search?components={NAME}&min_importance=NaN", 422, "finite"),
    (f"/api/search?components={NAME}&harvest=sums", 422, "no table 'nodes'"),
    (f"/api/stats/{NAME}?harvest=sums", 422, "no table 'components'"),
    (f"/api/neighbors/{NAME}?side=left", 422, "'sources' or 'targets'"),
    (f"/api/tokens/{NAME}?sort=name", 422, "sort 'name'"),
    ("/api/activation_contexts", 422, "name"),
    (f"/api/activation_contexts?name={NAME}&kind=best", 422, "kind 'best'"),
    (f"/api/activation_contexts?name={NAME}&window=10001", 422, "10000"),
    ("/api/components?layer=h.7", 422, "h.7"),
    (f"/api/components?layer={'x' * 301}", 422, "at most 300"),
    ("/api/components?sort=dens", 422, "did you mean 'density'?"),
]


def check_problem(response: Response, address: str) -> str:
    """Check that a response is one readable line, and return it."""
    assert 400 <= response.status < 500, (address[:300], response.body)
    assert response.headers["content-type"] == "application/json"
    value = response.json()
    assert set(value) == {"detail"}
    line = value["detail"]
    assert line.isprintable(), line
    assert 0 < len(line) < 1000, line
    assert "Traceback" not in line
    return line


@pytest.mark.parametrize(("address", "status", "words"), BAD, ids=[bad[0][:60] for bad in BAD])
def test_a_bad_request_gets_one_line(app, prompt_id, address, status, words):
    response = get(app, address.replace("{id}", str(prompt_id)))
    line = check_problem(response, address)
    assert response.status == status, line
    assert words in line


# ---- the state of files --------------------------------------------------------------------------


def copied(root: Path, folder: Path) -> Path:
    """Copy the run to another folder of runs."""
    shutil.copytree(root, folder)
    return folder / "tiny"


def set_complete(harvest: Path, complete: bool) -> None:
    """Rewrite a harvest's ledger as if its process were still at work, or had ended."""
    path = harvest / "manifest-0.json"
    ledger = json_files.unsealed(json.loads(path.read_text()))
    path.write_text(json.dumps(ledger | {"complete": complete}))


def test_a_harvest_in_progress_answers_and_says_so(root, tmp_path):
    run = copied(root, tmp_path / "runs")
    for name in HARVESTS:
        set_complete(run / "harvest" / name, False)
    app = endpoints(tmp_path / "runs")
    assert get(app, "/api/meta").json()["complete"] is False
    for address in ("/api/components", "/api/prompts", f"/api/neighbors/{NAME}"):
        response = get(app, address)
        assert response.status == 200
        assert response.headers["spd-complete"] == "false"
    for name in HARVESTS:
        set_complete(run / "harvest" / name, True)
    assert get(app, "/api/meta").json()["complete"] is True
    assert get(app, "/api/components").headers["spd-complete"] == "true"


def test_a_store_is_opened_once_until_it_changes(root, tmp_path):
    run = copied(root, tmp_path / "runs")
    library = Library(str(tmp_path / "runs"))
    folder = library.find(None, "statistics")[1]
    first = library.open(folder)
    assert library.open(library.find("tiny", "statistics")[1]) is first
    assert library.store("tiny", "statistics") is first
    set_complete(run / "harvest" / "statistics", False)
    assert library.open(folder) is not first


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_a_damaged_file_is_reported_in_one_line(root, tmp_path):
    run = copied(root, tmp_path / "runs")
    harvest = run / "harvest" / "statistics"
    for table in ("components", "prompts"):
        (shard,) = (harvest / table).glob("*.parquet")
        flip_a_byte(shard)
    app = endpoints(tmp_path / "runs")
    for address in ("/api/components", "/api/prompts?harvest=statistics", f"/api/stats/{NAME}"):
        response = get(app, address)
        line = check_problem(response, address)
        assert response.status == 422
        assert ".parquet" in line
    assert get(app, "/api/prompts?harvest=nodes").status == 200  # the others still answer
    (harvest / "manifest-0.json").write_text("{")
    named = get(app, "/api/components?harvest=statistics")
    assert (named.status, "manifest-0.json" in check_problem(named, "")) == (422, True)
    (harvest / "manifest.json").unlink()
    assert get(app, "/api/components?harvest=statistics").status == 404


def test_a_file_that_cannot_be_read_is_reported_in_one_line(root, monkeypatch):
    def fail(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "manifest.json")

    app = endpoints(root)
    monkeypatch.setattr(Library, "find", fail)
    response = get(app, "/api/meta")
    assert response.status == 409
    assert "Permission denied" in check_problem(response, "")


def test_a_folder_without_runs_answers_404(tmp_path):
    (tmp_path / "runs").mkdir()
    response = get(endpoints(tmp_path / "runs"), "/api/meta")
    assert response.status == 404
    assert "no run in" in check_problem(response, "/api/meta")


# ---- a fuzzer ------------------------------------------------------------------------------------


def test_made_up_requests_never_get_a_5xx_and_never_hang(app, prompt_id):
    """Eight requests at a time. Exceptions in the application would end this test."""
    names = [NAME, OTHER, "h.1.attn.v_proj:0", "h.0.mlp.down_proj:9", "wte:3"]
    known = {
        "run": ["tiny"],
        "harvest": list(HARVESTS),
        "id": [str(prompt_id)],
        "name": names,
        "components": [*names, ",".join(names[:2])],
        "layer": ["h.0.attn.q_proj"],
    }
    fuzzer = Fuzzer(get(app, "/openapi.json").json(), known, seed=REQUESTS)
    statuses = Counter[int]()

    async def check() -> None:
        path, query = fuzzer.request()
        sending = request(app, "GET", path, query=query.encode())
        response = await asyncio.wait_for(sending, SECONDS)
        statuses[response.status] += 1
        address = f"{quote(path)}?{query}"
        if response.status == 200:
            response.json()
        else:
            check_problem(response, address)

    async def check_eight() -> None:
        await asyncio.gather(*[check() for _ in range(8)])

    for _ in range(REQUESTS // 8):
        asyncio.get_event_loop().run_until_complete(check_eight())
    print(dict(sorted(statuses.items())))
    assert set(statuses) <= {200, 404, 414, 422}
    assert statuses[200] > REQUESTS / 10
