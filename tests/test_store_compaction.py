"""Compaction: the same rows in fewer files, whoever reads meanwhile and whenever it is killed."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_store_scale import (
    LAYERS,
    SETTINGS,
    batch,
    check_components,
    check_prompts,
    check_search,
    harvest,
)

from spd_lightning.errors import BadInput
from spd_lightning.store import TABLES, Store, Writer, compaction, schema
from spd_lightning.store.compaction import compact
from spd_lightning.store.inspection import describe
from spd_lightning.store.places import Folder
from spd_lightning.store.tables import SORTED

KEPT = ("prompts", "nodes", "nodes_by_component", "edges", "outputs")
SUMS = ("components", "dataset_nodes", "tokens")


def sums(rng: np.random.Generator, rows: int) -> dict[str, pl.DataFrame]:
    """Return rows of tables of sums. Their numbers are whole, so that sums are exact."""
    frames = {}
    for table in SUMS:
        columns = {}
        for name, dtype in schema(table, LAYERS).items():
            if isinstance(dtype, pl.Enum):
                columns[name] = rng.choice(dtype.categories.to_list(), rows)
            elif dtype == pl.String:
                columns[name] = ["a"] * rows
            elif dtype == pl.Boolean:
                columns[name] = [True] * rows
            else:
                columns[name] = rng.integers(0, 4, rows)
        frame = pl.DataFrame(columns, schema=schema(table, LAYERS), strict=False)
        if table == "components":
            frame = frame.with_columns(pl.lit(1.0, pl.Float32).alias("norm"))
        frames[table] = frame.unique(SORTED[table])
    return frames


def with_sums(path: Path, sizes: list[int], seed: int = 0) -> Store:
    """Write a harvest with tables of sums, too."""
    rng = np.random.default_rng(seed)
    writer = Writer(path, SETTINGS)
    for size in sizes:
        ids = rng.integers(0, 2**64, size, dtype=np.uint64).tolist()
        writer.write(batch(rng, ids) | sums(rng, 12), gap=1e-6 * size)
    writer.complete()
    return Store(path)


def tables(store: Store) -> dict[str, pl.DataFrame]:
    """Return all rows, in an order that does not depend on the groups, and the sums added up."""
    frames = {}
    for table in KEPT:
        frame = store.collect(store.scan(table))
        order = [name for name, dtype in frame.schema.items() if not isinstance(dtype, pl.List)]
        frames[table] = frame.sort(order)
    for table in SUMS:
        keys = list(SORTED[table])
        rows = store.scan(table).group_by(keys)
        numbers = pl.selectors.numeric().exclude(*keys, "norm").sum()
        frames[table] = store.collect(rows.agg(numbers).sort(keys))
    return frames


def same(one: dict[str, pl.DataFrame], other: dict[str, pl.DataFrame]) -> bool:
    return all(one[table].equals(other[table]) for table in one)


def check_indices(store: Store) -> None:
    check_prompts(store)
    check_components(store)
    check_search(store, [("a", 1), ("b", 2)], "all", 0.3)
    check_search(store, [("a", 1), ("output", 2), ("input", 9)], "any", 0.0)


# ---- the same rows -------------------------------------------------------------------------------


def test_a_compacted_harvest_has_the_same_rows_in_one_file_per_table(tmp_path):
    store = with_sums(tmp_path / "graphs", [3] * 8)
    before = tables(store)
    manifest = dict(store.manifest)
    prompts = store.scan("prompts").collect()
    done = compact(store.path)
    assert (done.groups_before, done.groups) == (8, 1)
    assert done.files < done.files_before
    merged = Store(store.path)
    assert same(tables(merged), before)
    assert merged.scan("prompts").collect().equals(prompts)  # in the order of the data
    check_indices(merged)
    merged.check()
    rows = manifest.pop("rows")
    assert {table: merged.manifest["rows"][table] for table in KEPT} == {
        table: rows[table] for table in KEPT
    }
    for table in SUMS:  # rows with the same keys were added up
        frame = merged.scan(table).collect()
        assert frame.select(SORTED[table]).is_unique().all()
        assert frame.equals(frame.sort(SORTED[table]))
    assert merged.manifest["gap"] == manifest["gap"]
    assert merged.manifest["complete"]


@pytest.mark.parametrize(("block", "groups"), [(1, 1), (100, 1), (100, 3)])
def test_blocks_and_groups_of_any_size_hold_the_same_rows(tmp_path, monkeypatch, block, groups):
    """Merged at once, in blocks of one prompt or layer, or into several groups."""
    store = with_sums(tmp_path / "graphs", [4] * 6)
    before = tables(store)
    monkeypatch.setattr(compaction, "BLOCK_ROWS", block)
    if groups > 1:
        monkeypatch.setattr(compaction, "MOST_PROMPTS", 8)
    assert compact(store.path).groups == groups
    merged = Store(store.path)
    assert same(tables(merged), before)
    check_indices(merged)
    for table in TABLES:
        for path in (store.path / table).glob("merged-*"):
            frame = pl.read_parquet(path)
            keys = list(SORTED[table])
            assert not keys or frame.select(keys).equals(frame.select(keys).sort(keys)), table


def test_a_compacted_harvest_resumes_and_is_compacted_again(tmp_path):
    path = tmp_path / "graphs"
    first = harvest(path, [2] * 5)
    ids = first.scan("prompts").collect()["prompt_id"].to_list()
    compact(path)
    writer = Writer(path, SETTINGS)
    assert writer.finished == set(ids)
    rng = np.random.default_rng(3)
    for start in (1, 11, 21):
        writer.write(batch(rng, list(range(start, start + 5))))
    assert not Store(path).manifest["complete"]
    writer.complete()
    grown = Store(path)
    assert grown.manifest["prompts"] == 25
    assert grown.manifest["shards"] == 4
    before = {table: grown.scan(table).collect().height for table in KEPT}
    compact(path)
    again = Store(path)
    assert again.manifest["shards"] == 1
    assert again.manifest["complete"]
    assert {table: again.scan(table).collect().height for table in KEPT} == before
    check_indices(again)
    assert compact(path).groups_before == 1  # nothing to do


def test_ranks_are_merged_and_stay_complete_or_not(tmp_path):
    path = tmp_path / "graphs"
    rng = np.random.default_rng(0)
    writers = [Writer(path, SETTINGS, rank, 2) for rank in range(2)]
    for n, writer in enumerate(writers):
        writer.write(batch(rng, [10 * n, 10 * n + 1]))
        writer.write(batch(rng, [10 * n + 2]))
    writers[0].complete()
    writers[1].close()
    compact(path)
    assert Store(path).manifest["shards"] == 1
    assert Store(path).manifest["prompts"] == 6
    assert not Store(path).manifest["complete"]
    second = Writer(path, SETTINGS, 1, 2)
    assert second.finished == {0, 1, 2, 10, 11, 12}
    second.complete()
    assert Store(path).manifest["complete"]


def test_a_damaged_merged_file_is_harvested_again(tmp_path):
    path = tmp_path / "graphs"
    harvest(path, [2] * 3)
    compact(path)
    (file,) = (path / "edges").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    writer = Writer(path, SETTINGS)
    assert writer.finished == set()
    writer.write(batch(np.random.default_rng(0), [1, 2]))
    writer.complete()
    assert Store(path).manifest["prompts"] == 2
    check_prompts(Store(path))
    assert not list(path.glob("*/merged-*"))


def test_a_lost_list_of_merged_groups_is_reported(tmp_path):
    path = tmp_path / "graphs"
    harvest(path, [2] * 3)
    compact(path)
    rows = Store(path).manifest["rows"]
    merged = path / "merged.json"
    content = merged.read_bytes()
    merged.unlink()
    for read in (lambda: Store(path), lambda: compact(path), lambda: describe(Folder(path))):
        with pytest.raises(BadInput, match=r"merged\.json is missing"):
            read()
    merged.write_bytes(content)
    assert Store(path).manifest["rows"] == rows
    merged.unlink()
    writer = Writer(path, SETTINGS)
    assert writer.finished == set()
    writer.complete()
    assert Store(path).manifest["complete"]


@pytest.mark.parametrize("file", ["manifest.json", "manifest-0.json", "merged.json"])
def test_a_ledger_of_another_harvest_is_reported(tmp_path, file):
    """Otherwise, its rows would have other settings, or would be missing."""
    harvest(tmp_path / "one", [2] * 3)
    writer = Writer(tmp_path / "other", SETTINGS | {"threshold": 0.5})
    writer.complete()
    compact(tmp_path / "one")
    swapped = (tmp_path / "one" / file).read_bytes()
    (tmp_path / "other" / file).write_bytes(swapped)
    with pytest.raises(BadInput, match=r"manifest\.json and .* are of different harvests"):
        Store(tmp_path / "other")
    if file != "manifest.json":
        Writer(tmp_path / "other", SETTINGS | {"threshold": 0.5}).complete()
        assert Store(tmp_path / "other").manifest["prompts"] == 0


# ---- readers -------------------------------------------------------------------------------------


def test_a_reader_keeps_its_files_until_it_is_done(tmp_path):
    path = tmp_path / "graphs"
    harvest(path, [2] * 4)
    reader = Store(path)
    lazy = reader.scan("edges")
    before = Store(path).scan("edges").collect()
    assert compact(path).kept_for_readers > 0
    assert lazy.collect().equals(before)
    assert reader.scan("nodes").collect().height  # not read before
    assert reader.manifest["shards"] == 4
    assert Store(path).manifest["shards"] == 1
    del reader, lazy
    assert compact(path).kept_for_readers == 0
    assert not list(path.glob("*/part-*"))
    assert [file.name for file in path.glob(".readers-*")] == [".readers-1"]


def test_a_reader_keeps_the_files_of_a_harvest_that_was_made_anew(tmp_path):
    path = tmp_path / "graphs"
    harvest(path, [2] * 3)
    Store(path)  # its lease is on a file that is deleted now
    shutil.rmtree(path)
    harvest(path, [2] * 3)
    store = Store(path)
    assert compact(path).kept_for_readers > 0
    check_prompts(store)


def test_a_reader_in_another_process_keeps_its_files(tmp_path):
    path = tmp_path / "graphs"
    harvest(path, [2] * 4)
    code = (
        "import sys; from spd_lightning.store import Store; store = Store(sys.argv[1]); "
        "print('open', flush=True); input(); print(store.scan('edges').collect().height)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    reader = subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "open\n"
    assert compact(path).kept_for_readers > 0
    said, _ = reader.communicate("\n")
    assert int(said) == Store(path).manifest["rows"]["edges"]
    assert compact(path).kept_for_readers == 0


# ---- errors --------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    """Return the files of a harvest that readers see."""
    names = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    return {str(file): file.read_bytes() for file in names}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("after", [0, 3, 9, 12])
def test_no_space_left_changes_no_row(tmp_path, monkeypatch, number, after):
    path = tmp_path / "graphs"
    rows = tables(with_sums(path, [2] * 4))
    before = contents(path)
    calls = [0]
    fsync = os.fsync

    def refuse(handle):
        calls[0] += 1
        if calls[0] > after:
            raise OSError(number, os.strerror(number))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(BadInput, match=r"cannot be compacted .*readable as before: make room"):
            compact(path)
    if not (path / "merged.json").exists():  # otherwise, the ledgers of ranks were refused
        assert contents(path) == before
    assert same(tables(Store(path)), rows)
    compact(path)
    assert Store(path).manifest["shards"] == 1
    assert same(tables(Store(path)), rows)


def test_a_damaged_file_is_named_and_nothing_changes(tmp_path):
    path = tmp_path / "graphs"
    harvest(path, [2] * 4)
    file = path / "edges/part-0-2.parquet"
    content = bytearray(file.read_bytes())
    content[40] ^= 8
    file.write_bytes(content)
    before = contents(path)
    with pytest.raises(BadInput, match=r"edges/part-0-2\.parquet is damaged"):
        compact(path)
    assert contents(path) == before


def test_a_harvest_that_is_being_written_is_not_compacted(tmp_path):
    path = tmp_path / "graphs"
    writer = Writer(path, SETTINGS)
    with pytest.raises(BadInput, match="another process is writing it"):
        compact(path)
    writer.close()
    compact(path)


# ---- death at any moment -------------------------------------------------------------------------


class Killed(BaseException):
    """Stop at once, as a killed process does."""


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Die before the step-th renaming or deletion, and touch no file from then on."""
    seen = [0]
    replace = os.replace
    unlink = Path.unlink

    def dying_replace(source, target):
        seen[0] += 1
        if seen[0] >= step:
            raise Killed
        replace(source, target)

    def dying_unlink(self, missing_ok=False):
        seen[0] += not missing_ok or self.name.startswith(("part-", "merged-"))
        if seen[0] >= step:
            raise Killed
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying_replace)
        patch.setattr(Path, "unlink", dying_unlink)
        yield seen


def test_killed_at_any_step_the_rows_are_the_same(tmp_path, monkeypatch):
    step = 0
    died = True
    while died:
        step += 1
        path = tmp_path / f"graphs-{step}"
        before = tables(with_sums(path, [2] * 3))
        with killed_at(step, monkeypatch) as seen:
            with suppress(Killed):
                compact(path)
            died = seen[0] >= step
        assert same(tables(Store(path)), before), step
        writer = Writer(path, SETTINGS)  # it can also be resumed
        assert len(writer.finished) == 6
        writer.complete()
        compact(path)
        assert Store(path).manifest["shards"] == 1
        assert same(tables(Store(path)), before), step
        compact(path)
        stems = {file.stem for file in path.glob("*/[!.]*")}  # the temporary ones are not of a
        assert len(stems) == 1, stems  # process that has ended; nothing else is left behind
    assert step > 10


FOREVER = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from test_store_scale import SETTINGS, batch
from spd_lightning.store import Writer
from spd_lightning.store.compaction import compact
while True:
    writer = Writer(sys.argv[1], SETTINGS)
    for _ in range(4):
        n = len(writer.finished)
        writer.write(batch(np.random.default_rng(n), [n]))
    writer.close()
    compact(writer.path)
"""


def check_snapshot(path: Path) -> int:
    """Check that each prompt of a snapshot has all of its rows; return the number of prompts."""
    store = Store(path)
    ids = store.scan("prompts").collect()["prompt_id"].sort().to_list()
    assert ids == list(range(len(ids)))
    edges = store.scan("edges").collect()
    for n in ids[-6:]:
        wanted = batch(np.random.default_rng(n), [n])["edges"].sort("source", "target")
        assert edges.filter(pl.col("prompt_id") == n).sort("source", "target").height == len(wanted)
        found = store.scan("edges", n).collect()
        assert found.sort("source", "target", "attribution").equals(
            wanted.sort("source", "target", "attribution")
        )
    return len(ids)


def test_readers_are_undisturbed_while_compactions_are_killed(tmp_path):
    """A process writes and compacts without end, and is killed at random; another one reads."""
    path = tmp_path / "graphs"
    chance = random.Random(0)
    prompts = 0
    polls = 0
    for _ in range(4):
        words = [sys.executable, "-c", FOREVER, str(path), str(Path(__file__).parent)]
        process = subprocess.Popen(words)
        try:
            start = prompts
            deadline = time.monotonic() + 60
            while prompts < start + 8:
                assert process.poll() is None, "the writing process ended by itself"
                assert time.monotonic() < deadline
                if (path / "manifest.json").exists():
                    now = check_snapshot(path)
                    assert now >= prompts  # what was committed stays
                    prompts = now
                    polls += 1
            time.sleep(chance.random() * 0.2)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        prompts = check_snapshot(path)
    assert polls > 4
    compact(path)
    compact(path)
    assert check_snapshot(path) == prompts
    assert len({file.stem for file in path.glob("*/*")}) == 1
