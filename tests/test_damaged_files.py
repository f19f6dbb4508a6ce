"""Every kind of file that is written, damaged in every way, under every reader: a right answer, or
one line.

The damage is drawn from a seed: truncation, flipped bits, an empty file, and for JSON and YAML
other values, other types, huge numbers, deep nesting, a key twice. A reader may give what it gave
before the damage, or raise BadInput with one line; listings go on, and say of the damaged run that
it is.
"""

import contextlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from support.tiny_run import lay_out, one_figure

from spd_lightning import cli, json_files, runs
from spd_lightning.analysis.weights import factors
from spd_lightning.commands import export
from spd_lightning.errors import BadInput
from spd_lightning.runs.trackers import MIRRORED
from spd_lightning.store import Store
from spd_lightning.training import figures
from spd_lightning.training.checkpoint import LAST, SafetensorsIO
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.open_target import open_target
from spd_lightning.viewer import component_page, run_page
from spd_lightning.viewer.library import Library

FLIPS = 12  # of one bit, in each file

pytestmark = pytest.mark.filterwarnings("ignore:.*max_epochs. was not set")

VALUES: list[Any] = [
    None,
    True,
    -1,
    3,
    10**12,
    10**40,
    1e308,
    float("nan"),
    "",
    "x",
    [],
    [[]],
    {},
    {"a": 1},
    [1, "b"],
]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Path]:
    """A working directory with a run that was fitted and harvested, and a second one that stays
    whole.
    """
    here = tmp_path_factory.mktemp("damaged")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("SPD_RUNS", str(lay_out(here, steps=25, batch=80)))
        patch.setattr(figures, "draw", one_figure)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert cli.run(["fit", "--config", "tiny"]) == 0
        assert cli.run(["predict", "--config", "tiny"]) == 0
        good = here / "runs/good"
        good.mkdir()
        (good / "summary.json").write_text(
            json_files.dumped({"verdict": "ok", "alive/a": 1, "seconds/fit": 1.0})
        )
        yield here
    torch.set_num_threads(threads)


# ---- damage --------------------------------------------------------------------------------------


def damaged(content: bytes, kind: str, seed: str) -> Iterator[tuple[str, bytes]]:
    """What may become of a file, each with a word that says how."""
    chance = random.Random(seed)
    yield "empty", b""
    for share in (0.3, 0.99):
        yield f"cut to {share}", content[: int(share * len(content))]
    for _ in range(FLIPS):
        at = chance.randrange(len(content))
        bit = chance.randrange(8)
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        yield f"bit {bit} of byte {at}", bytes(flipped)
    if kind == "json":
        yield from other_json(json_files.unsealed(json.loads(content)), chance)


def other_json(value: dict[str, Any], chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Other JSON, of a program that means it: without a seal."""
    for whole in (None, [], 3, "x", [value]):
        yield f"all is {whole!r:.20}", json.dumps(whole).encode()
    yield "nested deeply", b"[" * 100_000
    yield "nested as deeply as JSON can be read", b"[" * 980 + b"]" * 980
    yield "a number of 5000 digits", b'{"schema": ' + b"9" * 5000 + b"}"
    text = json.dumps(value)
    yield "a key twice", (text[:-1] + f', "{next(iter(value))}": 1}}').encode()
    places = list(spots(value))
    for place in places if len(places) < 12 else chance.sample(places, 12):
        for new in chance.sample(VALUES, 3):
            changed = json.loads(text)
            holder(changed, place)[place[-1]] = new
            yield f"{place} is {new!r}", json.dumps(changed).encode()
        changed = json.loads(text)
        del holder(changed, place)[place[-1]]
        yield f"no {place}", json.dumps(changed).encode()


def holder(value: Any, place: tuple) -> Any:
    """The list or dictionary in which a place is."""
    for key in place[:-1]:
        value = value[key]
    return value


def spots(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """The places in a JSON value."""
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in pairs:
        yield (*place, key)
        yield from spots(inner, (*place, key))


# ---- readers -------------------------------------------------------------------------------------


def rows(here: Path) -> dict[str, pl.DataFrame]:
    store = Store(here / "runs/tiny/harvest/graphs-unmasked")
    return {table: store.collect(store.scan(table)) for table in store.tables}


def weights(here: Path) -> dict[str, torch.Tensor]:
    return Decomposition.from_pretrained(here / "runs/tiny").state_dict()


def matrices(here: Path) -> Any:
    held = factors(here / "runs/tiny", "linear1")
    return None if held is None else (held.V.tobytes(), held.U.tobytes())


def target(here: Path) -> dict[str, torch.Tensor]:
    return open_target("target.yaml")[0].state_dict()


def checkpoint(here: Path) -> dict[str, Any]:
    return SafetensorsIO().load_checkpoint(here / "runs/tiny" / LAST)


def pushed(here: Path) -> str:
    """What push does before it builds anything."""
    run = runs.find("tiny")
    runs.check_whole(run.path)
    return str(run.checked_config())


def pages(here: Path) -> list[Any]:
    library = Library("runs")
    store = library.store("tiny", "graphs-unmasked")
    page = component_page.page_data(
        store, library.run("tiny").path, component_page.ComponentSelection()
    )
    return [page.sites, page.order.tolist(), page.importances.tolist(), page.summary.rows()]


def run_facts(here: Path) -> list[Any]:
    library = Library("runs")
    page = run_page.page_data(library.run("tiny"), library.store("tiny", "graphs-unmasked"))
    return [page.harvest, page.grids, page.results]


def exported(here: Path) -> bytes:
    export.main(["tiny", "--harvest", "graphs-unmasked", "--to", "graph.json"])
    return Path("graph.json").read_bytes()


def same(one: Any, other: Any) -> bool:
    """Equal in all that a reader gives."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, pl.DataFrame):
        return one.equals(other)
    return one == other or (one != one and other != other)


HARVEST = "runs/tiny/harvest/graphs-unmasked"
CASES: dict[str, tuple[str, list[Callable[[Path], Any]]]] = {
    f"{HARVEST}/edges/part-0-0.parquet": ("bytes", [rows, exported]),
    f"{HARVEST}/prompts/part-0-1.parquet": ("bytes", [rows]),
    f"{HARVEST}/nodes_by_component/part-0-0.parquet": ("bytes", [rows]),
    f"{HARVEST}/components/part-0-0.parquet": ("bytes", [rows]),
    f"{HARVEST}/manifest.json": ("json", [pages, exported]),
    f"{HARVEST}/manifest-0.json": ("json", [rows]),
    "runs/tiny/decomposition.json": ("json", [weights, matrices]),
    "runs/tiny/decomposition.safetensors": ("bytes", [weights, matrices]),
    f"runs/tiny/{LAST}": ("bytes", [checkpoint]),
    "runs/targets/*/target.json": ("json", [target]),
    "runs/targets/*/target.safetensors": ("bytes", [target]),
    "runs/tiny/run.json": ("json", [pushed]),
    "runs/tiny/config.yaml": ("bytes", [pushed]),
    "runs/tiny/summary.json": ("json", [pushed]),
}


def attempt(read: Callable[[Path], Any], here: Path) -> Any:
    """What a reader gives, or its one line."""
    try:
        return read(here)
    except BadInput as error:
        line = str(error)
        assert "\n" not in line
        assert len(line) < 700
        return error


@pytest.mark.parametrize("pattern", CASES)
def test_a_damaged_file_gives_the_right_answer_or_one_line(here, pattern):
    kind, readers = CASES[pattern]
    (path,) = here.glob(pattern)
    content = path.read_bytes()
    right = {read: read(here) for read in readers}
    told = 0
    try:
        for how, bad in damaged(content, kind, pattern):
            path.write_bytes(bad)
            for read, wanted in right.items():
                got = attempt(read, here)
                told += isinstance(got, BadInput)
                meant = kind == "json" and not how.startswith(("bit", "cut", "empty"))
                assert isinstance(got, BadInput) or meant or same(got, wanted), (
                    f"{read.__name__}: {how}"
                )
    finally:
        path.write_bytes(content)
    assert told  # else nothing was damaged that a reader looks at


@pytest.mark.parametrize(
    "name", ["summary.json", "run.json", "config.yaml", "decomposition.json", "metrics.jsonl"]
)
def test_lists_of_runs_survive_a_damaged_run(here, name, capsys):
    """The damaged run is listed with its line, the others as ever; the table of results leaves it
    out.
    """
    path = here / "runs/tiny" / name
    content = path.read_bytes()
    kind = "json" if name.endswith("json") else "bytes"
    try:
        for number, (how, bad) in enumerate(damaged(content, kind, name)):
            path.write_bytes(bad)
            for words in (["runs"], ["runs", "--table"], ["runs", "--json"])[
                : 1 if number % 4 else 3
            ]:
                assert cli.run(words) == 0, how
                out, _ = capsys.readouterr()
                assert "good" in out
                if (
                    words == ["runs"]
                    and how == "empty"
                    and name not in ("config.yaml", "metrics.jsonl")
                ):
                    (line,) = [line for line in out.splitlines() if line.startswith("damaged")]
                    assert name in line
            with contextlib.suppress(BadInput):
                run_facts(here)
            runs.Run(here / "runs/tiny").metrics()
    finally:
        path.write_bytes(content)


def test_verbs_end_with_one_line(here, capsys):
    """Through the command line: exit code 2, and no traceback."""
    verbs = {
        "decomposition.json": [
            "intervene",
            "tiny",
            "--input",
            "0.5,0,0,0,0",
            "--ablate",
            "linear1:0",
        ],
        "harvest/graphs-unmasked/manifest.json": ["export", "tiny", "--harvest", "graphs-unmasked"],
        "harvest/graphs-unmasked/manifest-0.json": [
            "export",
            "tiny",
            "--harvest",
            "graphs-unmasked",
        ],
        "config.yaml": ["push", "tiny"],
        "summary.json": ["push", "tiny"],
    }
    for name, words in verbs.items():
        path = here / "runs/tiny" / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        capsys.readouterr()
        assert cli.run(words) == 2
        path.write_bytes(content)
        assert (
            len(
                [
                    line
                    for line in capsys.readouterr().err.splitlines()
                    if line.startswith("error: ")
                ]
            )
            == 1
        )


def test_a_size_of_a_trillion_is_one_line(here):
    """Before anything is allocated: components, neurons, layers, and what a manifest says of its
    layers.
    """
    path = here / "runs/tiny/decomposition.json"
    content = path.read_bytes()
    facts = json_files.unsealed(json.loads(content))
    changes = [
        ("target", facts["target"] | {"init_args": {"n_features": 10**12, "n_hidden": 2}}),
        (
            "target",
            facts["target"] | {"init_args": {"n_features": 5, "n_hidden": 2, "n_identity": 10**9}},
        ),
        ("model", facts["model"] | {"sites": {"linear1": 10**12, "linear2": 10**12}}),
        (
            "model",
            facts["model"] | {"importance": facts["model"]["importance"] | {"hidden": 10**9}},
        ),
    ]
    try:
        for key, value in changes:
            path.write_text(json.dumps(facts | {key: value}))
            assert isinstance(attempt(weights, here), BadInput)
    finally:
        path.write_bytes(content)


def test_a_file_changed_in_place_is_checked_again(here):
    """The digest that a process remembers is that of the file's state, not of its name."""
    path = here / HARVEST / "edges/part-0-0.parquet"
    content = path.read_bytes()
    facts = path.stat()
    os.utime(path, (1, 1))
    assert rows(here)  # and remembered
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert isinstance(attempt(rows, here), BadInput)
    path.write_bytes(content)
    os.utime(path, (facts.st_atime, facts.st_mtime))
    assert not isinstance(attempt(rows, here), BadInput)


def test_what_goes_to_a_tracker_is_what_comes_back(here):
    """Every file that is sent is one that `pull` takes."""
    from spd_lightning.runs.artifacts import _KNOWN

    for name in MIRRORED:
        folder = here / "runs/tiny"
        for path in [folder / name, *(folder / name).rglob("*")]:
            if path.is_file() and not path.name.startswith("."):
                assert _KNOWN.fullmatch(path.relative_to(folder).as_posix()), path
