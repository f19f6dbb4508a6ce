"""The store at scale: indices find what full scans find, and numbers do not overflow."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spd_lightning.errors import BadInput
from spd_lightning.store import Store, Writer, schema, shards
from spd_lightning.store.columns import INDEX
from spd_lightning.store.index import BY_PROMPT

LAYERS = ["input", "b", "a", "output"]  # forward order is not alphabetical order
MANIFEST = {"harvest": "graphs", "run": "tms", "kind": "tokens", "mode": "frozen"}
SETTINGS = MANIFEST | {"layers": LAYERS, "C": {"b": 9, "a": 9}}
COLUMNS = {table: schema(table, LAYERS) for table in ("prompts", "nodes", "edges", "outputs")}


def batch(rng: np.random.Generator, ids: list[int], most: int = 40) -> dict[str, pl.DataFrame]:
    """Return random rows of some prompts; some have no nodes, and some no edges."""
    tables = [_prompt(rng, prompt_id, int(rng.integers(0, most))) for prompt_id in ids]
    return {table: pl.concat([one[table] for one in tables]) for table in COLUMNS}


def _prompt(rng: np.random.Generator, prompt_id: int, nodes: int) -> dict[str, pl.DataFrame]:
    kinds = rng.choice(["component", "input", "output", "rest"], nodes)
    importance = [
        float(x) if kind == "component" else None
        for kind, x in zip(kinds, rng.random(nodes), strict=True)
    ]
    edges = int(rng.integers(0, 4 * nodes + 1))
    rows: dict[str, dict] = {
        "prompts": {
            "prompt_id": [prompt_id],
            "token_ids": [[1, 2]],
            "tokens": [["a", "b"]],
            "source": [f"text {prompt_id}"],
            "split": ["validation"],
        },
        "nodes": {
            "prompt_id": [prompt_id] * nodes,
            "node": range(nodes),
            "kind": kinds,
            "layer": rng.choice(LAYERS, nodes),
            "pos": rng.integers(0, 70_000, nodes),
            "component": rng.integers(0, 5, nodes),
            "importance": importance,
            "activation": rng.standard_normal(nodes),
        },
        "edges": {
            "prompt_id": [prompt_id] * edges,
            "source": rng.integers(0, max(nodes, 1), edges),
            "target": rng.integers(0, max(nodes, 1), edges),
            "attribution": rng.standard_normal(edges),
        },
        "outputs": {name: [] for name in COLUMNS["outputs"]},
    }
    frames = {}
    for table, columns in rows.items():
        frames[table] = pl.DataFrame(columns, schema=COLUMNS[table], strict=False)
    return frames


def harvest(path: Path, sizes: list[int], seed: int = 0, most: int = 40) -> Store:
    """Write a complete harvest whose groups have the given numbers of prompts, and open it."""
    rng = np.random.default_rng(seed)
    writer = Writer(path, SETTINGS)
    for size in sizes:
        ids = rng.integers(0, 2**64, size, dtype=np.uint64)
        writer.write(batch(rng, ids.tolist(), most))
    writer.complete()
    return Store(path)


# ---- indices find what full scans find -----------------------------------------------------------


def check_prompts(store: Store) -> None:
    """Compare the rows of every prompt, in every table, with a filter of the whole table."""
    ids = store.scan("prompts").collect()["prompt_id"]
    for table in COLUMNS:
        everything = store.collect(store.scan(table))
        for prompt_id in [*ids, 5]:
            wanted = everything.filter(pl.col("prompt_id") == prompt_id)
            found = store.collect(store.scan(table, prompt_id))
            assert found.equals(wanted), (table, prompt_id)
            assert found.schema == wanted.schema


def check_components(store: Store) -> None:
    """Compare the rows of every component with a filter of the whole table."""
    everything = store.collect(store.scan(INDEX))
    for layer in LAYERS:
        for component in range(6):
            wanted = everything.filter(layer=layer, component=component)
            found = store.collect(store.scan(INDEX, component=(layer, component)))
            assert found.equals(wanted)
            assert found.schema == wanted.schema


def naive_search(
    store: Store, units: list[tuple[str, int]], mode: str, least: float
) -> dict[int, list[float | None]]:
    """Return the prompts with units and the units' largest importances, by a loop over nodes."""
    largest: dict[int, dict[tuple[str, int], float | None]] = {}
    nodes = store.scan("nodes").filter(pl.col("kind") != "rest").collect()
    for row in nodes.iter_rows(named=True):
        unit = (row["layer"], row["component"])
        if unit in units:
            found = largest.setdefault(row["prompt_id"], {})
            values = [v for v in (found.get(unit), row["importance"]) if v is not None]
            found[unit] = max(values, default=None)
    enough = {}
    for prompt, values in largest.items():
        kept = {unit: value for unit, value in values.items() if value is None or value >= least}
        if kept and (mode == "any" or len(kept) == len(units)):
            enough[prompt] = [kept.get(unit) for unit in units]
    return enough


def check_search(store: Store, units: list[tuple[str, int]], mode: str, least: float) -> None:
    """Compare a search with the loop over all nodes."""
    found = store.prompts_with(units, mode, least)  # pyright: ignore[reportArgumentType]
    assert found.columns == ["prompt_id", *(f"{layer}:{number}" for layer, number in units)]
    values = {row[0]: list(row[1:]) for row in found.rows()}
    assert len(values) == found.height
    assert found["prompt_id"].is_sorted()
    assert values == naive_search(store, units, mode, least)


@pytest.fixture(scope="module", params=[0, 1 << 13])
def store(tmp_path_factory, request) -> Store:
    """A harvest of several groups; the largest prompts have row groups of their own.

    The postings are in files of their own, or in the indices.
    """
    path = tmp_path_factory.mktemp("scale") / "graphs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "FEW_POSTINGS", request.param)
        return harvest(path, [1, 5, 30, 2], most=400)


def test_the_rows_of_a_prompt_are_those_of_a_full_scan(store):
    check_prompts(store)


def test_the_rows_of_a_component_are_those_of_a_full_scan(store):
    check_components(store)


def test_every_table_is_sorted_by_prompt_or_not_indexed_by_it():
    assert {"nodes", "edges", "head_edges", "checks", "graphs", "outputs", "frontier"} == set(
        BY_PROMPT
    )


UNITS = st.tuples(st.sampled_from(LAYERS), st.integers(0, 5))


@given(
    st.lists(UNITS, min_size=1, max_size=4, unique=True),
    st.sampled_from(["all", "any"]),
    st.sampled_from([0.0, 0.5, 0.9]),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_search_by_components_finds_what_a_loop_over_nodes_finds(store, units, mode, least):
    check_search(store, units, mode, least)


def test_a_search_in_an_unknown_layer(store):
    with pytest.raises(BadInput, match=r"layer 'outputs': not in harvest .*did you mean 'output'"):
        store.prompts_with([("outputs", 3)])


# ---- what is read --------------------------------------------------------------------------------


class Reads:
    """Counts the files that are opened or looked at below a folder, by their folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from spd_lightning.store.places import Folder

        self.files = list[str]()
        for name in ("size", "read", "read_range", "digest", "local"):
            self._watch(monkeypatch, Folder, name)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> None:
        method = getattr(kind, name)

        def watched(place, file, *rest):
            self.files.append(file)
            return method(place, file, *rest)

        monkeypatch.setattr(kind, name, watched)

    @property
    def shards(self) -> set[str]:
        """The files of groups; ledgers lie above their folders."""
        return {file for file in self.files if "/" in file}


def test_opening_reads_no_shard_and_a_prompt_reads_one(store, monkeypatch):
    prompt_id = int(store.scan("prompts").collect()["prompt_id"][3])
    reads = Reads(monkeypatch)
    opened = Store(store.path)
    assert reads.shards == set()
    assert opened.manifest["prompts"] == 38
    assert opened.scan("edges", prompt_id).collect().height
    assert {Path(file).parent.name for file in reads.shards} == {"index", "edges"}
    assert len({Path(file).stem for file in reads.shards}) == 1  # of one group
    assert len(reads.shards) == 2


# ---- no number overflows -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2**32, -1, 2**40])
def test_a_number_that_does_not_fit_is_reported(number):
    import torch

    from spd_lightning.harvest.rows import array

    with pytest.raises(BadInput, match=f"number {number} of a node"):
        array(torch.tensor([3, number]), np.uint32)


def test_numbers_up_to_the_limit_stay_themselves():
    import torch

    from spd_lightning.harvest.rows import array

    numbers = torch.tensor([0, 2**32 - 1])
    assert array(numbers, np.uint32).tolist() == [0, 2**32 - 1]
    assert array(numbers, np.uint64).tolist() == [0, 2**32 - 1]


def test_positions_above_65535_and_edge_counts_above_2_to_the_32_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    rows = batch(rng, [7], most=2)
    rows["nodes"] = pl.DataFrame(
        {
            "prompt_id": [7],
            "node": [2**32 - 1],
            "kind": ["component"],
            "layer": ["a"],
            "pos": [70_000],
            "component": [1],
            "importance": [0.5],
            "activation": [1.0],
        },
        schema=COLUMNS["nodes"],
    )
    graph = {"prompt_id": 7, "nodes": 1, "edges": 2**33, "edges_total": 2**40, "checked": 0}
    rows["graphs"] = pl.DataFrame([graph], schema=schema("graphs", LAYERS))
    writer = Writer(tmp_path / "graphs", SETTINGS)
    writer.write(rows)
    store = Store(writer.path)
    assert store.scan("nodes").collect()["pos"].to_list() == [70_000]
    assert store.scan("nodes", 7).collect()["node"].to_list() == [2**32 - 1]
    assert store.scan("graphs", 7).collect()["edges"].to_list() == [2**33]
    assert store.scan("graphs", 7).collect()["edges_total"].to_list() == [2**40]


# ---- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["edges", "nodes", INDEX, "index", "postings"])
def test_parts_of_a_damaged_file_are_right_or_reported(tmp_path, monkeypatch, folder):
    """One flipped bit anywhere: a reader gets what it got before, or an error that names it."""
    monkeypatch.setattr(shards, "FEW_POSTINGS", 0)
    whole = harvest(tmp_path / "graphs", [4], most=300)
    prompts = whole.scan("prompts").collect()["prompt_id"].to_list()

    def read(store: Store) -> list[pl.DataFrame]:
        parts = [store.scan(table, i).collect() for table in ("edges", "nodes") for i in prompts]
        parts.append(store.scan(INDEX, component=("a", 1)).collect())
        parts.append(store.prompts_with([("a", 1), ("b", 2)]))
        return parts

    wanted = read(whole)
    (path,) = (whole.path / folder).iterdir()
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    reported = list[str]()
    for place in [*rng.integers(0, len(content), 30), len(content) - 1]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            for one, other in zip(read(Store(whole.path)), wanted, strict=True):
                assert one.equals(other)
        except BadInput as error:
            reported.append(str(error))
    assert reported
    assert all(f"{folder}/part-0-0" in line and "\n" not in line for line in reported)


@pytest.mark.parametrize("folder", ["edges", "index"])
@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_a_missing_or_truncated_file_is_named_and_the_rest_is_shown(tmp_path, folder, harm):
    whole = harvest(tmp_path / "graphs", [2, 2])
    prompts = whole.scan("prompts").collect()["prompt_id"].to_list()
    wanted = whole.scan("edges", prompts[3]).collect()
    (path,) = (whole.path / folder).glob("part-0-0.*")
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    store = Store(whole.path)
    with pytest.raises(BadInput, match=rf"{folder}/part-0-0\.[a-z]+ is damaged .*to repair"):
        store.scan("edges", prompts[0])
    assert store.scan("edges", prompts[3]).collect().equals(wanted)
