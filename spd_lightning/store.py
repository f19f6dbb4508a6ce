"""The neck between the network and everything that reads about it: one folder of Parquet a harvest.

    <harvest>/manifest.json                     what was harvested, and how; never changes while rows arrive
    <harvest>/manifest-<rank>.json              which shards of this rank count, with their rows and bytes
    <harvest>/<table>/part-<rank>-<n>.parquet   rows

One `write` is one group of shards: all tables of one batch of prompts. The order of a commit is: every table's shard
under a temporary name, renamed; then the rank's ledger, renamed. A shard that no ledger names does not exist for
readers, so a process killed at any moment leaves a readable store, and the next one starts at the first group that
the ledger lacks. Rows are additive: ranks and sittings append, and readers merge with `group_by().sum()`.
"""

import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from spd_lightning.errors import BadInput, nearest

SCHEMA_VERSION = 1
KINDS = ("component", "input", "embedding", "output", "rest", "bias")
"""What a node of a graph can be; `importance` is null for all but components."""

_NODES = {
    "prompt_id": pl.UInt64,
    "node": pl.UInt32,
    "kind": pl.Enum(KINDS),
    "layer": pl.Categorical(),
    "pos": pl.UInt16,
    "component": pl.UInt32,
    "importance": pl.Float32,
    "activation": pl.Float32,
}
_OUTPUT_VALUES = ("ci_probability", "ci_logit", "target_probability", "target_logit")

TABLES: dict[str, pl.Schema] = {
    "prompts": pl.Schema(
        {
            "prompt_id": pl.UInt64,
            "token_ids": pl.List(pl.UInt32),
            "tokens": pl.List(pl.String),
            "source": pl.String,
            "split": pl.String,
        }
    ),
    "nodes": pl.Schema(_NODES),
    "nodes_by_component": pl.Schema(_NODES),
    "edges": pl.Schema({"prompt_id": pl.UInt64, "source": pl.UInt32, "target": pl.UInt32, "attribution": pl.Float32}),
    "outputs": pl.Schema(
        {"prompt_id": pl.UInt64, "pos": pl.UInt16, "token_id": pl.UInt32} | dict.fromkeys(_OUTPUT_VALUES, pl.Float32)
    ),
    "components": pl.Schema(
        {
            "layer": pl.Categorical(),
            "component": pl.UInt32,
            "firings": pl.Int64,
            "positions": pl.Int64,
            "importance_sum": pl.Float64,
            "activation_sum": pl.Float64,
            "norm": pl.Float32,
            "alive": pl.Boolean,
        }
    ),
}
"""Columns of every table. `layer` is categorical here; in a store it is an Enum over the manifest's layers, in forward
order. `components` holds additive counts, one row a component and group; `norm` and `alive` are the same in each."""

_SORTED = {
    "prompts": (),
    "nodes": ("prompt_id", "node"),
    "nodes_by_component": ("layer", "component", "prompt_id", "pos"),
    "edges": ("prompt_id", "source", "target"),
    "outputs": ("prompt_id", "pos"),
    "components": ("layer", "component"),
}
_PROMPT_GROUP, _INDEX_GROUP = 512, 8192  # fewest rows of a row group cut between prompts; rows of any other


def prompt_hash(content: bytes) -> int:
    """The id of a prompt: 64 bits of its content's BLAKE2b hash, the same on every machine and in every sitting."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def schema(table: str, layers: Sequence[str]) -> pl.Schema:
    """A table's columns in a store with these layers.

    Raises:
        BadInput: there is no such table.
    """
    if table not in TABLES:
        raise BadInput(f"table '{table}': not a table of a harvest; {nearest(table, TABLES)}")
    names = pl.Enum(list(layers))
    return pl.Schema({name: names if name == "layer" else dtype for name, dtype in TABLES[table].items()})


class Store:
    """One harvest, opened for reading: `Store(path).scan("edges")` is a polars LazyFrame.

    It shows what was committed when it was opened; open it again to see more.

    Args:
        path: a harvest's folder, the one with manifest.json.
        skip_damaged: leave out every group of shards that has a damaged file, instead of refusing to read it.

    Raises:
        BadInput: the folder has no manifest, or one that cannot be read, or one of a newer schema.
    """

    def __init__(self, path: str | Path, skip_damaged: bool = False):
        self.path = Path(path)
        settings = _read_settings(self.path)
        self.layers: list[str] = settings["layers"]
        ledgers = _read_ledgers(self.path)
        shards = [shard for ledger in ledgers.values() for shard in ledger["shards"]]
        self._shards = [s for s in shards if not (skip_damaged and _damaged(self.path, s))]
        self._scans: dict[str, pl.LazyFrame] = {}
        self.manifest: dict[str, Any] = settings | _totals(settings, ledgers, self._shards)

    @property
    def tables(self) -> list[str]:
        """The tables that have rows."""
        return [table for table in TABLES if self.manifest["rows"][table]]

    def scan(self, table: str, prompt_id: int | None = None) -> pl.LazyFrame:
        """A table's rows, lazily; of one prompt alone where asked, which then opens one file.

        Raises:
            BadInput: no such table, or one of its files is damaged.
        """
        if prompt_id is not None:
            shard = self._shard_of.get(prompt_id)
            files = self._files(table, [] if shard is None else [self._shards[shard]])
            return self._frame(table, files).filter(pl.col("prompt_id") == pl.lit(prompt_id, pl.UInt64))
        if table not in self._scans:
            self._scans[table] = self._frame(table, self._files(table, self._shards))
        return self._scans[table]

    def collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        """Run a query on this store's tables, telling a damaged file from a wrong query.

        Raises:
            BadInput: a file is damaged inside, where `scan` does not look.
        """
        try:
            return frame.collect()
        except (pl.exceptions.PolarsError, OSError):
            for shard in self._shards:
                for name in shard["tables"]:
                    self._read_through(self.path / name / _part(shard))
            raise

    @cached_property
    def _shard_of(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for number, shard in enumerate(self._shards):
            ids = self.collect(self._frame("prompts", self._files("prompts", [shard])).select("prompt_id"))
            found |= dict.fromkeys(ids["prompt_id"].to_list(), number)
        return found

    def _files(self, table: str, shards: Sequence[dict[str, Any]]) -> list[Path]:
        held = [shard for shard in shards if table in shard["tables"]]
        for shard in held:
            path = self.path / table / _part(shard)
            if why := _damage(path, shard["tables"][table]["bytes"]):
                raise self._refusal(path, why)
        return [self.path / table / _part(shard) for shard in held]

    def _frame(self, table: str, files: list[Path]) -> pl.LazyFrame:
        columns = schema(table, self.layers)
        return pl.scan_parquet(files, glob=False) if files else pl.LazyFrame(schema=columns)

    def _read_through(self, path: Path) -> None:
        try:
            pl.scan_parquet(path, glob=False).collect()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise self._refusal(path, " ".join(str(error).split())[:120]) from error

    def _refusal(self, path: Path, why: str) -> BadInput:
        return BadInput(
            f"harvest '{self.path}': the file {path.relative_to(self.path)} is damaged ({why}); the others are readable"
            " with Store(path, skip_damaged=True); to mend it, delete the file and run the same predict again"
        )


class Writer:
    """Appends one rank's rows to a harvest: begins a new one, or continues one made with the same settings.

    `finished` holds the ids of the prompts that any rank had committed when this writer was opened. Ranks must divide
    the prompts first and leave out the finished ones after, since each opens at its own moment.

    Args:
        path: the harvest's folder; it is made if missing.
        manifest: what the rows depend on (harvest, run, kind, mode, threshold, layers, C, config …); JSON values.
            `layers` is required: the names of all layers in forward order.
        rank: this process's number, from 0.
        world: how many processes write; the harvest is complete when each of them has called `complete`.

    Raises:
        BadInput: the folder holds a harvest with other settings, another process is writing it, or the disk refuses.
    """

    def __init__(self, path: str | Path, manifest: Mapping[str, Any], rank: int = 0, world: int = 1):
        assert "layers" in manifest, "a harvest's manifest names its layers"
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self.path, self.rank, self.layers = Path(path), rank, list(manifest["layers"])
        self._settings = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **manifest}))
        with _disk(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._unlock = weakref.finalize(self, os.close, _lock(self.path, rank))
            self._begin(world)
            for left in _ranks(self.path) if rank == 0 else ():
                if left >= world:
                    self._mend(left)
            self._ledger: dict[str, Any] = self._mend(rank) | {"complete": False}
            self._sweep()
            self._save(self._ledger)
        self.finished: set[int] = self._committed()

    def write(self, tables: Mapping[str, pl.DataFrame]) -> None:
        """Commit all tables of one batch of prompts, or none of them.

        Args:
            tables: frames by table, `prompts` always among them; columns as in `TABLES`, `layer` and `kind` also as
                plain strings. `nodes_by_component` is made here.

        Raises:
            BadInput: the disk is full or read-only; what was committed before stays readable.
            ValueError: a frame is not what the table holds, or a prompt was written before.
        """
        frames = {table: _checked(table, frame, self.layers) for table, frame in tables.items()}
        if "nodes" in frames:
            frames["nodes_by_component"] = frames["nodes"].sort(_SORTED["nodes_by_component"])
        ids = self._new_prompts(frames)
        number = 1 + max((shard["n"] for shard in self._ledger["shards"]), default=-1)
        shard: dict[str, Any] = {"rank": self.rank, "n": number}
        with _disk(self.path):
            shard["tables"] = {t: self._put(t, f, _part(shard)) for t, f in frames.items() if f.height}
            self._save(self._ledger | {"shards": [*self._ledger["shards"], shard]})
        self.finished |= ids

    def complete(self) -> None:
        """Mark this rank's share as whole, and let go of the harvest."""
        with _disk(self.path):
            self._save(self._ledger | {"complete": True})
        self.close()

    def close(self) -> None:
        """Let another process write this rank's share; a writer that is dropped or killed does so too."""
        self._unlock()

    def _begin(self, world: int) -> None:
        path = self.path / "manifest.json"
        held = _read_settings(self.path) if path.exists() else None
        if held is not None:
            _compare(self.path, {k: v for k, v in held.items() if k != "world"}, self._settings)
        if held is None or held["world"] != world:
            _replace_json(path, self._settings | {"world": world})

    def _mend(self, rank: int) -> dict[str, Any]:
        """A rank's ledger without the groups that have a damaged file: their prompts will be harvested again."""
        ledger = _read_ledgers(self.path).get(rank, {"rank": rank, "complete": False, "shards": []})
        whole = [shard for shard in ledger["shards"] if not _damaged(self.path, shard)]
        if len(whole) < len(ledger["shards"]):
            _replace_json(self.path / f"manifest-{rank}.json", ledger | {"shards": whole})
        return ledger | {"shards": whole}

    def _sweep(self) -> None:
        """Remove what a killed process of this rank left uncommitted."""
        held = {self.path / name / _part(shard) for shard in self._ledger["shards"] for name in shard["tables"]}
        for path in self.path.glob(f"*/*part-{self.rank}-*"):
            if path not in held:
                path.unlink()

    def _committed(self) -> set[int]:
        store = Store(self.path, skip_damaged=True)
        return set(store.collect(store.scan("prompts").select("prompt_id"))["prompt_id"].to_list())

    def _new_prompts(self, frames: Mapping[str, pl.DataFrame]) -> set[int]:
        if "prompts" not in frames or not frames["prompts"].height:
            raise ValueError("a group of shards needs its prompts: they are what resuming goes by")
        ids = frames["prompts"]["prompt_id"].to_list()
        seen = self.finished.intersection(ids) or {i for i in ids if ids.count(i) > 1}
        if seen:
            raise ValueError(f"table 'prompts', column 'prompt_id': {min(seen)} is written twice")
        return set(ids)

    def _put(self, table: str, frame: pl.DataFrame, name: str) -> dict[str, int]:
        path = self.path / table / name
        path.parent.mkdir(exist_ok=True)
        with _whole(path) as temporary:
            _write_parquet(frame, table, temporary)
        return {"rows": frame.height, "bytes": path.stat().st_size}

    def _save(self, ledger: dict[str, Any]) -> None:
        _replace_json(self.path / f"manifest-{self.rank}.json", ledger)
        self._ledger = ledger


def _part(shard: Mapping[str, Any]) -> str:
    return f"part-{shard['rank']}-{shard['n']}.parquet"


# Reading manifests.


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"harvest manifest '{path}': not JSON ({error}); delete the folder and harvest again") from error
    except OSError as error:
        raise BadInput(f"harvest manifest '{path}': cannot be read ({error.strerror}); check the path") from error
    if not isinstance(value, dict):
        raise BadInput(f"harvest manifest '{path}': expected an object, found {type(value).__name__}; harvest again")
    return value


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.exists():
        raise BadInput(f"harvest '{folder}': no manifest.json there; name a folder that `predict` wrote")
    settings = _read_json(path)
    version = settings.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise BadInput(
            f"harvest '{folder}': schema_version {version!r}, this program reads up to {SCHEMA_VERSION}; "
            "update spd_lightning"
        )
    if missing := [key for key in ("layers", "world") if key not in settings]:
        raise BadInput(f"harvest manifest '{path}': no '{missing[0]}' in it; delete the folder and harvest again")
    return settings


def _ranks(folder: Path) -> list[int]:
    names = (path.stem.removeprefix("manifest-") for path in folder.glob("manifest-*.json"))
    return sorted(int(name) for name in names if name.isdecimal())


def _read_ledgers(folder: Path) -> dict[int, dict[str, Any]]:
    return {rank: _read_json(folder / f"manifest-{rank}.json") for rank in _ranks(folder)}


def _totals(settings: Mapping[str, Any], ledgers: Mapping[int, Any], shards: Sequence[Any]) -> dict[str, Any]:
    rows = {table: sum(s["tables"].get(table, {"rows": 0})["rows"] for s in shards) for table in TABLES}
    held = sum(len(ledger["shards"]) for ledger in ledgers.values())
    done = all(rank in ledgers and ledgers[rank]["complete"] for rank in range(settings["world"]))
    return {"rows": rows, "prompts": rows["prompts"], "complete": done and held == len(shards), "shards": len(shards)}


def _compare(folder: Path, held: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for key in sorted({*held, *asked}):
        if held.get(key) != asked.get(key):
            was, now = (json.dumps(side.get(key))[:60] for side in (held, asked))
            raise BadInput(
                f"harvest '{folder}': made with {key} {was}, not {now}; give this one another name or delete the folder"
            )


# Damage.


def _damage(path: Path, size: int) -> str | None:
    """What is wrong with a shard as far as its length and its last bytes tell."""
    try:
        with open(path, "rb") as file:
            if (there := file.seek(0, os.SEEK_END)) != size:
                return f"{there} of {size} bytes"
            file.seek(-4, os.SEEK_END)
            return None if file.read() == b"PAR1" else "its footer is not Parquet"
    except OSError as error:
        return error.strerror or str(error)


def _damaged(folder: Path, shard: Mapping[str, Any]) -> bool:
    return any(_damage(folder / table / _part(shard), held["bytes"]) for table, held in shard["tables"].items())


# Writing.


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise BadInput(
            f"harvest '{folder}': cannot be written ({why}); what was committed stays readable: make room or choose "
            "another folder, then run the same command again"
        ) from error


def _lock(folder: Path, rank: int) -> int:
    handle = os.open(folder / f".lock-{rank}", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BadInput(
            f"harvest '{folder}': another process is writing it; wait for it or name another harvest"
        ) from error
    return handle


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` at the end, or nothing does."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace_json(path: Path, value: Any) -> None:
    with _whole(path) as temporary:
        temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _checked(table: str, frame: pl.DataFrame, layers: Sequence[str]) -> pl.DataFrame:
    """The frame in the table's types and order of rows."""
    if table not in TABLES or table == "nodes_by_component":
        raise ValueError(f"table '{table}' is not one that a harvest writes")
    wanted = schema(table, layers)
    if wrong := sorted(set(wanted) ^ set(frame.columns)):
        raise ValueError(f"table '{table}', column '{wrong[0]}': {'missing' if wrong[0] in wanted else 'unknown'}")
    words = [name for name, dtype in wanted.items() if isinstance(dtype, pl.Enum)]
    for name, dtype in wanted.items():
        if name in words:
            _check_words(table, frame[name], dtype)
        elif frame.schema[name] != dtype:
            raise ValueError(f"table '{table}', column '{name}': {frame.schema[name]}, where the store has {dtype}")
    cast = [pl.col(name).cast(pl.String).cast(wanted[name]) for name in words]
    ordered = frame.with_columns(cast).select(list(wanted))
    return ordered.sort(_SORTED[table], maintain_order=True) if _SORTED[table] else ordered


def _check_words(table: str, column: pl.Series, names: pl.DataType) -> None:
    assert isinstance(names, pl.Enum)
    if column.dtype not in (pl.String, pl.Categorical, pl.Enum):
        raise ValueError(f"table '{table}', column '{column.name}': {column.dtype}, where the store has names")
    unknown = set(column.cast(pl.String).unique()) - set(names.categories)
    if unknown:
        raise ValueError(
            f"table '{table}', column '{column.name}': {sorted(map(str, unknown))[0]!r} is not one of them"
        )


def _write_parquet(frame: pl.DataFrame, table: str, path: Path) -> None:
    import pyarrow.parquet as pq

    floats = [name for name, dtype in frame.schema.items() if dtype.is_float()]
    others = [name for name in frame.columns if name not in floats]
    # The order of an Enum's names is not the order of their bytes, so a reader must not skip by their extremes.
    extremes = [name for name, dtype in frame.schema.items() if not isinstance(dtype, pl.Enum)]
    arrow = frame.to_arrow()
    with open(path, "wb") as file:  # pyarrow's own files hide the system's error numbers
        options: dict[str, Any] = {"compression": "zstd", "compression_level": 3, "write_statistics": extremes}
        options |= {"use_dictionary": others, "use_byte_stream_split": floats}
        with pq.ParquetWriter(file, arrow.schema, **options) as out:
            for start, stop in pairwise(_cuts(frame, table)):
                out.write_table(arrow.slice(start, stop - start))


def _cuts(frame: pl.DataFrame, table: str) -> list[int]:
    """Where row groups begin and end: between prompts where a table is sorted by prompt, so that one is read alone."""
    if _SORTED[table][:1] != ("prompt_id",):
        return [*range(0, frame.height, _INDEX_GROUP), frame.height]
    cuts, numbers = [0], pl.int_range(frame.height, eager=True)
    for start in numbers.filter(frame["prompt_id"].ne_missing(frame["prompt_id"].shift())).to_list():
        if start - cuts[-1] >= _PROMPT_GROUP:
            cuts.append(start)
    return [*cuts, frame.height]
