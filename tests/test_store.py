"""The store: every row that went in comes out once, whatever the shards, the ranks, and the moment
of death.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from spd_lightning import json_files
from spd_lightning.errors import BadInput
from spd_lightning.store import SCHEMA_VERSION, TABLES, Store, Writer, columns, prompt_hash, schema
from spd_lightning.store.ledgers import Journal
from spd_lightning.store.tables import INDEX, SORTED

LAYERS = ["input", "z.out", "a.in", "M", "output"]  # forward order is not alphabetical order
MANIFEST = {
    "harvest": "graphs",
    "run": "tms",
    "kind": "vectors",
    "threshold": 0.1,
    "layers": LAYERS,
    "C": {"M": 5},
}
WRITTEN = [table for table in TABLES if table != INDEX]

# Frames of any content.

VALUES: dict[Any, st.SearchStrategy] = {
    pl.UInt16: st.integers(0, 2**16 - 1),
    pl.UInt32: st.integers(0, 2**32 - 1),
    pl.UInt64: st.integers(0, 2**64 - 1),
    pl.Int16: st.integers(-(2**15), 2**15 - 1),
    pl.Int64: st.integers(-(2**40), 2**40),
    pl.Float32: st.floats(width=32),
    pl.Float64: st.floats(allow_nan=False),
    pl.Boolean: st.booleans(),
    pl.String: st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
}
NEVER_NULL = ("UInt32", "UInt64", "Enum")
COLUMNS = {table: schema(table, LAYERS) for table in TABLES}


def values(dtype: Any) -> st.SearchStrategy:
    """Any values of a column; numbers that count or name something are never null."""
    if isinstance(dtype, pl.Enum):
        return st.sampled_from(dtype.categories.to_list())
    if isinstance(dtype, pl.List):
        return st.lists(VALUES[dtype.inner], max_size=3)
    strategy = VALUES[type(dtype) if isinstance(dtype, pl.DataType) else dtype]
    return strategy if str(dtype) in NEVER_NULL else st.none() | strategy


def rows_of(draw: st.DrawFn, prompt_id: int) -> dict[str, list[tuple]]:
    """Rows of one prompt in every table: one in `prompts`, and any number in the others."""
    tables = {}
    for table in WRITTEN:
        columns = []
        for name, dtype in COLUMNS[table].items():
            columns.append(st.just(prompt_id) if name == "prompt_id" else values(dtype))
        count = 1 if table == "prompts" else draw(st.integers(0, 3))
        tables[table] = [draw(st.tuples(*columns)) for _ in range(count)]
    return tables


@st.composite
def harvests(draw: st.DrawFn) -> list[tuple[int, dict[str, list[tuple]]]]:
    """Batches of rows by table, each with the rank that writes it."""
    ids = iter(draw(st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=6)))
    batches = []
    for prompt_id in ids:
        together = [
            rows_of(draw, i)
            for i in (prompt_id, *([next(ids, None)] * draw(st.booleans())))
            if i is not None
        ]
        batches.append(
            (
                draw(st.integers(0, 2)),
                {t: [row for one in together for row in one[t]] for t in WRITTEN},
            )
        )
    return batches


def frames(rows: dict[str, list[tuple]]) -> dict[str, pl.DataFrame]:
    return {t: pl.DataFrame(rows[t], schema=COLUMNS[t], orient="row") for t in rows}


def content(frame: pl.DataFrame) -> Counter:
    return Counter(
        map(repr, frame.rows())
    )  # of f32 values, repr tells every two apart and NaN is NaN


def batch(prompt_id: int, nodes: int = 3) -> dict[str, pl.DataFrame]:
    """One prompt with nodes, edges and counts that depend on its id alone."""
    value = float(prompt_id % 100)
    return frames(
        {
            "prompts": [(prompt_id, [1, 2], ["f1=0.5", "f2=1"], "feature 1", "probe")],
            "nodes": [
                (prompt_id, n, "component", LAYERS[1 + n % 3], 0, n, value, -value)
                for n in range(nodes)
            ],
            "edges": [(prompt_id, n, n + 1, value + n) for n in range(nodes)],
        }
    ) | {"components": counted(value)}


def counted(value: float) -> pl.DataFrame:
    """A row of counts of one component."""
    row: dict[str, Any] = {"layer": "M", "component": 0, "norm": 1.0, "alive": True}
    for name, dtype in schema("components", LAYERS).items():
        row.setdefault(name, value if dtype.is_float() else 1)
    return pl.DataFrame([row], schema=schema("components", LAYERS))


def opened(path: Path, rank: int = 0, world: int = 1, **changed: object) -> Writer:
    return Writer(path, MANIFEST | changed, rank, world)


def ids(path: Path, table: str = "prompts") -> list[int]:
    return sorted(Store(path).scan(table).collect()["prompt_id"].to_list())


@pytest.fixture
def harvest(tmp_path: Path) -> Path:
    """A complete harvest of four groups."""
    writer = opened(tmp_path / "graphs")
    for prompt_id in (40, 10, 30, 20):
        writer.write(batch(prompt_id))
    writer.complete()
    return writer.path


# What goes in comes out.


@given(harvests(), st.integers(1, 3))
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink a case takes minutes
)
def test_any_split_over_shards_and_ranks_holds_the_same_rows(batches, sitting):
    wanted = {table: [row for _, rows in batches for row in rows[table]] for table in WRITTEN}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graphs"
        for start in range(0, max(len(batches), 1), sitting):  # several sittings
            writers = [opened(path, rank, 3) for rank in range(3)]
            for rank, rows in batches[start : start + sitting]:
                writers[rank].write(frames(rows))
            for writer in writers:
                writer.complete()
        store = Store(path)
        for table in WRITTEN:
            frame = store.collect(store.scan(table))
            assert content(frame) == content(frames(wanted)[table])
            assert frame.schema == schema(table, LAYERS)
            assert store.manifest["rows"][table] == len(wanted[table])
        assert content(store.collect(store.scan(INDEX))) == content(frames(wanted)["nodes"])
        assert store.manifest["complete"]
        assert store.manifest["prompts"] == len(wanted["prompts"])
        for prompt_id in [row[0] for row in wanted["prompts"]]:
            one = content(store.scan("edges", prompt_id).collect())
            assert one == content(frames(wanted)["edges"].filter(pl.col("prompt_id") == prompt_id))


def test_a_harvest_without_rows_has_every_table_and_its_columns(tmp_path):
    opened(tmp_path / "graphs").complete()
    store = Store(tmp_path / "graphs")
    assert store.tables == []
    assert store.manifest["complete"]
    for table in TABLES:
        assert store.scan(table).collect().schema == schema(table, LAYERS)
        if "prompt_id" in TABLES[table]:
            assert store.scan(table, prompt_id=1).collect().is_empty()


def test_frames_may_name_layers_and_kinds_in_words_and_columns_in_any_order(tmp_path):
    writer = opened(tmp_path / "graphs")
    rows = batch(7)
    rows["nodes"] = (
        rows["nodes"]
        .with_columns(pl.col("layer", "kind").cast(pl.String))
        .select(sorted(TABLES["nodes"]))
    )
    rows["components"] = rows["components"].with_columns(
        pl.col("layer").cast(pl.String).cast(pl.Categorical)
    )
    writer.write(rows)
    store = Store(writer.path)
    assert content(store.scan("nodes").collect()) == content(batch(7)["nodes"])
    assert store.scan("components").collect().equals(batch(7)["components"])


def test_shards_are_sorted_and_long_prompts_are_read_alone(tmp_path):
    writer = opened(tmp_path / "graphs")
    many = [batch(i, nodes) for i, nodes in ((9, 600), (3, 2), (5, 2), (1, 700))]
    writer.write({table: pl.concat([one[table] for one in many]) for table in many[0]})
    for table in writer.path.iterdir():
        for path in table.glob("*.parquet"):
            frame = pl.read_parquet(path)
            keys = list(SORTED[table.name])
            assert not keys or frame.select(keys).equals(frame.select(keys).sort(keys))
    groups = pq.ParquetFile(writer.path / "nodes/part-0-0.parquet")
    held = [
        sorted(set(groups.read_row_group(n)["prompt_id"].to_pylist()))
        for n in range(groups.num_row_groups)
    ]
    assert held == [[1], [3, 5, 9]]  # cut between prompts once a group has 512 rows
    column = groups.metadata.row_group(0).column(groups.schema_arrow.names.index("activation"))
    assert "BYTE_STREAM_SPLIT" in column.encodings
    assert column.compression == "ZSTD"


def test_the_index_finds_what_a_full_scan_finds(tmp_path):
    writer = opened(tmp_path / "graphs")
    rows = batch(1, 20_000)
    rows["nodes"] = rows["nodes"].with_columns(pl.col("component") % 50)
    writer.write(rows)
    store = Store(writer.path)
    for layer in LAYERS:
        for component in (0, 1, 2, 49):
            here = (pl.col("layer") == layer) & (pl.col("component") == component)
            assert (
                store.scan(INDEX).filter(here).collect().height == rows["nodes"].filter(here).height
            )


def test_layers_sort_in_forward_order(harvest):
    nodes = Store(harvest).scan("nodes").collect()
    assert nodes["layer"].unique().sort().to_list() == ["z.out", "a.in", "M"]


@given(st.binary(), st.binary())
def test_prompt_ids_are_64_bits_of_the_content(a, b):
    assert (prompt_hash(a) == prompt_hash(b)) == (a == b)
    assert 0 <= prompt_hash(a) < 2**64


def test_prompt_ids_never_change():
    """The bytes are those of `printf 'feature 3' | b2sum -l 64`."""
    assert prompt_hash(b"feature 3").to_bytes(8, "little").hex() == "46b9498e8d59f4c0"


# Death at any moment.


class Killed(BaseException):
    """What a process that is killed does next: nothing."""


@contextmanager
def killed_at(step: int, after: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Die in or after the step-th renaming or appending, and touch no file from then on."""
    seen = [0]
    replace = os.replace
    unlink = Path.unlink
    append = Journal.append

    def dying_replace(source, target):
        seen[0] += 1
        if seen[0] == step and not after:
            Path(source).write_bytes(Path(source).read_bytes()[:7])  # not even written to its end
            raise Killed
        replace(source, target)
        if seen[0] == step:
            raise Killed

    def dying_append(self, shard):
        seen[0] += 1
        if seen[0] == step and not after:
            with open(self.path, "ab") as file:
                file.write(b'{"name": "pa')
            raise Killed
        append(self, shard)
        if seen[0] == step:
            raise Killed

    def dead_unlink(self, missing_ok=False):
        return unlink(self, missing_ok) if seen[0] < step else None

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying_replace)
        patch.setattr(Path, "unlink", dead_unlink)
        patch.setattr(Journal, "append", dying_append)
        yield seen


def harvest_all(path: Path, wanted: list[int]) -> None:
    writer = opened(path)
    for prompt_id in wanted:
        if prompt_id not in writer.finished:
            writer.write(batch(prompt_id))
    writer.complete()


STEPS = 2 + 3 * 7 + 1
"""Manifest, ledger, three groups of five tables, an index and a line each, the last ledger."""


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_step_nothing_is_lost_or_repeated(tmp_path, monkeypatch, after):
    wanted = [5, 3, 8]
    step = 0
    died = True
    while died:
        step, path = step + 1, tmp_path / f"graphs-{step}"
        with killed_at(step, after, monkeypatch) as seen:
            with suppress(Killed):
                harvest_all(path, wanted)
            died = seen[0] >= step
        if (path / "manifest.json").exists():
            store = Store(path)
            done = wanted[: store.manifest["prompts"]]
            assert store.manifest["complete"] == (not died or (after and seen[0] == STEPS))
            for table in ("prompts", "nodes", INDEX, "edges"):
                assert set(ids(path, table)) == set(done), f"died at step {step}"
        harvest_all(path, wanted)
        assert Store(path).manifest["complete"]
        assert ids(path) == sorted(wanted)
        assert ids(path, "nodes") == sorted(wanted * 3)
        leftovers = [p for p in path.glob("*/*") if p.stem not in {f"part-0-{n}" for n in range(3)}]
        assert leftovers == []
        assert not list(path.glob("*.jsonl"))
    assert step == STEPS + 1


FOREVER = """
import sys, os
sys.path.insert(0, sys.argv[2])
from test_store import batch, opened
from pathlib import Path
writer = opened(Path(sys.argv[1]))
for n in range(10_000):
    writer.write(batch(n))
"""


def test_a_real_kill_leaves_what_was_committed(tmp_path):
    path = tmp_path / "graphs"
    process = subprocess.Popen(
        [sys.executable, "-c", FOREVER, str(path), str(Path(__file__).parent)]
    )
    try:
        while not list(path.glob("prompts/part-0-[5-9].parquet")):
            assert process.poll() is None, "the writing process ended by itself"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    store = Store(path)
    done = store.manifest["prompts"]
    assert done >= 5
    assert ids(path) == list(range(done))
    writer = opened(path)  # the lock died with the process
    assert writer.finished == set(range(done))
    writer.write(batch(done))
    assert ids(path, "edges") == sorted([*range(done + 1)] * 3)


KILLS = int(os.environ.get("SPD_KILLS", "30"))
"""Kills of a writing process. Set SPD_KILLS=100 for a long run."""

WRITERS = """
import os, sys
sys.path.insert(0, sys.argv[2])
from test_store import write_prompts
for _ in sys.stdin:
    writer = os.fork()
    if not writer:
        write_prompts(sys.argv[1])
    print(writer, flush=True)
    os.waitpid(writer, 0)
    print("ended", flush=True)
"""


def write_prompts(path: str) -> None:
    """Write prompts 0, 1, 2, … that are not in the store yet, until killed."""
    writer = opened(Path(path))
    for number in range(len(writer.finished), 10_000):
        assert number not in writer.finished
        writer.write(batch(number))


def polled(path: Path) -> int:
    """Check that a store has all rows of its newest prompt; return the number of prompts."""
    if not (path / "manifest.json").exists():
        return 0
    store = Store(path)
    count = store.manifest["prompts"]
    for table in ("nodes", "edges") if count else ():
        assert store.collect(store.scan(table, count - 1)).height == 3, table
    return count


def whole_prompts(path: Path) -> int:
    """Check that a store has all rows of prompts 0 to n − 1, and no others; return n."""
    store = Store(path)
    count = store.manifest["prompts"]
    for table, rows in (("prompts", 1), ("nodes", 3), ("edges", 3)):
        found = store.collect(store.scan(table).select("prompt_id")).to_series()
        assert sorted(found) == sorted([*range(count)] * rows), table
    return count


def test_a_harvest_that_is_killed_again_and_again(tmp_path):
    """At random moments. A reader polls meanwhile, and never sees half a group of shards."""
    path = tmp_path / "graphs"
    words = [sys.executable, "-c", WRITERS, str(path), str(Path(__file__).parent)]
    moments = random.Random(0)
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for _ in range(KILLS):
            before = polled(path)
            print(file=parent.stdin, flush=True)
            writer = int(parent.stdout.readline())
            deadline = time.monotonic() + 60
            while polled(path) == before:
                assert time.monotonic() < deadline, "the writer writes nothing"
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.03))
            os.kill(writer, signal.SIGKILL)
            assert parent.stdout.readline() == "ended\n"
            assert whole_prompts(path) > before
        parent.stdin.close()
    writer = opened(path)
    count = len(writer.finished)
    writer.write(batch(count))
    writer.complete()
    assert whole_prompts(path) == count + 1 > KILLS
    assert Store(path).manifest["complete"]
    names = {f"part-0-{number}" for number in range(count + 1)}
    assert {file.stem for file in path.glob("*/*")} == names


# Sittings, ranks, settings.


def test_complete_means_that_every_rank_said_so(tmp_path):
    path = tmp_path / "graphs"
    first = opened(path, 0, 2)
    first.write(batch(1))
    first.complete()
    assert not Store(path).manifest["complete"]
    second = opened(path, 1, 2)
    assert second.finished == {1}
    second.write(batch(2))
    assert not Store(path).manifest["complete"]
    second.complete()
    assert Store(path).manifest["complete"]
    assert ids(path) == [1, 2]
    again = opened(path, 0, 2)  # who opens it means to write
    assert not Store(path).manifest["complete"]
    again.complete()
    assert Store(path).manifest["complete"]


def test_fewer_ranks_finish_what_more_began(tmp_path):
    path = tmp_path / "graphs"
    for rank in range(2):
        opened(path, rank, 2).write(batch(rank))
    os.truncate(path / "nodes/part-1-0.parquet", 20)
    alone = opened(path)
    assert alone.finished == {0}
    alone.write(batch(1))
    alone.complete()
    assert ids(path) == [0, 1]
    assert ids(path, "nodes") == [0, 0, 0, 1, 1, 1]
    assert Store(path).manifest["complete"]


@pytest.mark.parametrize(
    ("changed", "named"), [({"threshold": 0.2}, "threshold 0.1, not 0.2"), ({"seed": 1}, "seed")]
)
def test_other_settings_do_not_mix(harvest, changed, named):
    with pytest.raises(BadInput, match=f"made with {named}"):
        opened(harvest, **changed)
    assert ids(harvest) == [10, 20, 30, 40]


def test_two_processes_do_not_write_one_share(harvest):
    writer = opened(harvest)
    with pytest.raises(BadInput, match="another process is writing it"):
        opened(harvest)
    writer.close()
    opened(harvest)


# Errors.


def test_a_folder_without_manifest(tmp_path):
    with pytest.raises(BadInput, match=r"manifest\.json not found; name a folder"):
        Store(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "manifest-0.json"])
@pytest.mark.parametrize("text", ["{", "", "[]", "3", "{}", "\ufffe", b"\xff\xfe"])
def test_a_manifest_that_is_none(harvest, name, text):
    (harvest / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    reason = "(not JSON|'[a-z]+' is missing|expected an object)"
    line = rf"harvest manifest '.*{name}': {reason}.*; delete it and run"
    with pytest.raises(BadInput, match=line) as error:
        Store(harvest)
    assert "\n" not in str(error.value)
    (harvest / name).unlink()
    writer = opened(harvest)  # the remedy works
    for prompt_id in {10, 20, 30, 40} - writer.finished:
        writer.write(batch(prompt_id))
    assert ids(harvest) == [10, 20, 30, 40]


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, "new", None])
def test_a_store_of_a_newer_program(harvest, version):
    manifest = json.loads((harvest / "manifest.json").read_text())
    (harvest / "manifest.json").write_text(json.dumps(manifest | {"schema_version": version}))
    with pytest.raises(BadInput, match="update spd_lightning"):
        Store(harvest)


def test_a_store_of_an_older_program(harvest):
    manifest = json.loads((harvest / "manifest.json").read_text())
    (harvest / "manifest.json").write_text(
        json.dumps(manifest | {"schema_version": SCHEMA_VERSION - 1})
    )
    for open_it in (Store, opened):
        with pytest.raises(
            BadInput,
            match=r"is older than .*; delete the folder and run the same predict command again",
        ):
            open_it(harvest)


def test_an_unknown_table(harvest):
    with pytest.raises(BadInput, match=r"table 'node'.*did you mean 'nodes'"):
        Store(harvest).scan("node")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


def blank(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def scramble(path: Path) -> None:
    path.write_bytes(
        b"PAR1" + bytes(range(256)) + path.read_bytes()[260:]
    )  # length and footer look right


@pytest.mark.parametrize("harm", [cut, blank, Path.unlink, scramble])
def test_a_damaged_shard_is_named_and_the_others_are_readable(harvest, harm):
    harm(harvest / "edges/part-0-2.parquet")  # the group of prompt 30
    store = Store(harvest)
    assert content(store.collect(store.scan("nodes"))) == content(
        pl.concat(batch(i)["nodes"] for i in (40, 10, 30, 20))
    )
    message = r"edges/part-0-2\.parquet is damaged .*; the other files are readable.*; to repair"
    if harm is not scramble:
        with pytest.raises(BadInput, match=message):
            store.scan("edges")
    with pytest.raises(BadInput, match=message):
        store.collect(store.scan("edges"))
    assert store.scan("edges", 20).collect().height == 3
    (harvest / "edges/part-0-2.parquet").unlink(missing_ok=True)  # the remedy
    left = Store(harvest, skip_damaged=True)
    assert not left.manifest["complete"]
    for table in ("prompts", "edges", "nodes"):
        assert sorted(set(left.scan(table).collect()["prompt_id"])) == [10, 20, 40]
    writer = opened(harvest)
    assert writer.finished == {10, 20, 40}
    writer.write(batch(30))
    writer.complete()
    assert ids(harvest, "edges") == sorted([10, 20, 30, 40] * 3)
    assert Store(harvest).manifest["complete"]
    for table in Store(harvest).tables:  # no file is left that no ledger names
        assert {path.name for path in (harvest / table).iterdir()} == {
            f"part-0-{n}.parquet" for n in (0, 1, 3, 4)
        }


def test_damage_is_noticed_while_a_store_is_open(harvest, monkeypatch):
    """A store compares a file again, and explains it if polars panics about a missing part."""
    store = Store(harvest)
    path = harvest / "edges/part-0-2.parquet"
    intact = path.read_bytes()
    before = content(store.scan("edges").collect())
    query = store.scan("edges")
    scramble(path)
    with pytest.raises(BadInput, match=r"edges/part-0-2\.parquet is damaged"):
        store.scan("edges")
    path.write_bytes(intact[:9])
    with pytest.raises(BadInput, match=r"edges/part-0-2\.parquet is damaged"):
        store.collect(query)
    path.write_bytes(intact)
    assert content(store.scan("edges").collect()) == before


def test_any_name_of_a_folder(harvest, tmp_path):
    """Brackets and stars are not patterns."""
    for name in ("a b", "100%", "[x]*", "{a}", "😀"):
        copy = shutil.copytree(harvest, tmp_path / name)
        assert ids(copy, "edges") == sorted([10, 20, 30, 40] * 3)


def test_a_lost_ledger_is_reported_and_its_groups_are_harvested_again(harvest):
    """Otherwise, the harvest would seem to have fewer rows."""
    ledger = harvest / "manifest-0.json"
    ledger.unlink()
    for left in (lambda: None, ledger.mkdir, lambda: ledger.symlink_to("nowhere")):
        left()
        with pytest.raises(BadInput, match=r"manifest-0\.json"):
            Store(harvest)
        ledger.rmdir() if ledger.is_dir() else ledger.unlink(missing_ok=True)
    assert Store(harvest, skip_damaged=True).manifest["prompts"] == 0
    writer = opened(harvest)
    assert writer.finished == set()
    for number in (10, 20, 30, 40):
        writer.write(batch(number))
    writer.complete()
    assert ids(harvest, "edges") == sorted([10, 20, 30, 40] * 3)


def test_a_manifest_that_leads_nowhere_is_one_line(harvest):
    manifest = harvest / "manifest.json"
    manifest.unlink()
    manifest.symlink_to(manifest.name)
    with pytest.raises(BadInput, match=r"cannot be read \(Too many levels of symbolic links\)"):
        Store(harvest)


@pytest.mark.parametrize("world", [0, -1, 10**12])
def test_a_manifest_of_no_number_of_processes(harvest, world):
    settings = json_files.unsealed(json.loads((harvest / "manifest.json").read_text()))
    (harvest / "manifest.json").write_text(json.dumps(settings | {"world": world}))
    with pytest.raises(BadInput, match=f"world: {world} is not a number of processes"):
        Store(harvest)


def test_a_wrong_query_is_not_called_damage(harvest):
    store = Store(harvest)
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        store.collect(store.scan("edges").select("no such column"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_refuses(harvest, monkeypatch, number):
    writer = opened(harvest)

    def refuse(_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(
            BadInput, match=f"cannot be written .{os.strerror(number)}.; what was committed stays"
        ):
            writer.write(batch(50))
    assert ids(harvest) == [10, 20, 30, 40]
    writer.write(batch(50))  # room was made
    assert ids(harvest, "nodes") == sorted([10, 20, 30, 40, 50] * 3)


def test_a_disk_that_is_full_halfway_through_a_file(harvest):
    writer = opened(harvest)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (5000, limits[1])
    )  # as on a full disk, write() itself fails
    try:
        with pytest.raises(BadInput, match=r"cannot be written .File too large"):
            writer.write(batch(50, nodes=5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ids(harvest, "nodes") == sorted([10, 20, 30, 40] * 3)
    assert not list(harvest.glob("*/.*"))


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot be written .Not a directory"):
        opened(tmp_path / "file" / "graphs")


def changed(table: str, *columns: pl.Expr) -> dict[str, pl.DataFrame]:
    rows = batch(7)
    return rows | {table: rows[table].with_columns(*columns)}


WRONG = {
    "table 'nodez': not one": lambda: batch(7) | {"nodez": batch(7)["nodes"]},
    "table 'nodes_by_component': not one": lambda: batch(7) | {INDEX: batch(7)["nodes"]},
    "table 'edges', column 'target': missing": lambda: (
        batch(7) | {"edges": batch(7)["edges"].drop("target")}
    ),
    "table 'edges', column 'extra': unknown": lambda: changed("edges", pl.lit(1).alias("extra")),
    "column 'attribution': Float64, where the store has Float32": lambda: changed(
        "edges", pl.col("attribution").cast(pl.Float64)
    ),
    "column 'layer': 'h.9' is not one of its names": lambda: changed(
        "components", pl.lit("h.9").alias("layer")
    ),
    "column 'kind': Int32, where": lambda: changed("nodes", pl.lit(1).alias("kind")),
    "table 'prompts': every batch needs its prompts": lambda: {"edges": batch(7)["edges"]},
    "column 'prompt_id': a prompt appears twice": lambda: (
        batch(7) | {"prompts": pl.concat([batch(7)["prompts"]] * 2)}
    ),
    "table 'edges', column 'prompt_id': a prompt that is not in this batch": lambda: (
        batch(7) | {"edges": batch(8)["edges"]}
    ),
    "column 'prompt_id': 10 was committed before": lambda: batch(10),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_frame_that_is_not_its_table(harvest, message):
    writer = opened(harvest)
    with pytest.raises(ValueError, match=message):
        writer.write(WRONG[message]())
    assert ids(harvest) == [10, 20, 30, 40]


# ---- the columns' meanings -----------------------------------------------------------------------


def test_every_table_and_column_is_explained():
    """The page docs/tables.md is generated from these texts, and is up to date."""
    for name, table in columns.TABLES.items():
        assert table.help.endswith("."), name
        assert set(table.sorted_by) <= set(table.columns)
        for column, (_, meaning) in table.columns.items():
            assert meaning.endswith("."), (name, column)
    page = Path(__file__).parent.parent / "docs" / "tables.md"
    assert page.read_text(encoding="utf-8") == columns.markdown()
