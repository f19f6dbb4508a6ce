"""`make bench`, third part: a store of ten thousand prompts, next to the layout of the field.

The harvest is synthetic. Each prompt has 64 tokens, about 400 nodes at 12 sites of 650 components
(a few of them frequent, most of them rare), and 5,000 edges. It is written in 1,000 groups, opened,
compacted, and read again. Times are medians over random prompts and components; the first read of a
file, which also compares it with its digests, is listed separately. Memory is the peak of a process
that only reads.

The other layout is SQLite with one row of gzipped JSON per graph, and an inverted-index table from
components to prompts. It stores the graphs of 300 prompts, since they take long to write, and the
index of all prompts.

    python benchmarks/bench_store.py [--prompts N] [--edges N] [--groups N] [--folder DIR]
"""

import argparse
import gzip
import json
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from spd_lightning.store import Store, Writer, schema
from spd_lightning.store.compaction import compact
from spd_lightning.store.inspection import describe
from spd_lightning.store.places import Folder

SITES = [f"h.{block}.{part}" for block in range(2) for part in ("q", "k", "v", "o", "up", "down")]
LAYERS = ["wte", *SITES, "output"]
C, LENGTH, NODES, VOCAB = 650, 64, 400, 1000
FIELD_PROMPTS = 300
PATTERNS = 500
"""Random sets of pairs of nodes; each prompt has one of them, with values of its own."""
SETTINGS = {"harvest": "graphs", "run": "bench", "kind": "tokens", "mode": "frozen"}
MANIFEST = SETTINGS | {"layers": LAYERS, "C": dict.fromkeys(SITES, C)}


# ---- the synthetic harvest -----------------------------------------------------------------------


class Synthetic:
    """Prompts with random graphs.

    Args:
        edges: the number of edges of a prompt.
    """

    def __init__(self, edges: int):
        self.edges = edges
        self.rng = np.random.default_rng(0)
        rank = np.arange(1, C + 1)
        self.pairs = np.triu_indices(NODES, 1)  # of an earlier and a later node
        count = len(self.pairs[0])
        self.patterns = np.stack([np.sort(self._some(count, edges)) for _ in range(PATTERNS)])
        self.frequency = rank**-1.0 / np.sum(rank**-1.0)  # a few frequent components, most rare

    def _some(self, count: int, size: int) -> np.ndarray:
        """Return `size` different numbers below `count`."""
        return self.rng.choice(count, size, replace=False).astype(np.int32)

    def batch(self, count: int) -> dict[str, pl.DataFrame]:
        """Return the tables of some new prompts."""
        ids = self.rng.integers(0, 2**64, count, dtype=np.uint64)
        tokens = self.rng.integers(0, VOCAB, (count, LENGTH))
        prompts = {
            "prompt_id": ids,
            "token_ids": tokens.tolist(),
            "tokens": [[f" w{token}" for token in row] for row in tokens.tolist()],
            "source": [f"text {i}" for i in ids],
            "split": ["validation"] * count,
        }
        nodes = self._nodes(ids)
        return {
            "prompts": _frame("prompts", prompts),
            "nodes": nodes,
            "edges": self._edges(ids),
            "components": self._components(nodes),
        }

    def _nodes(self, ids: np.ndarray) -> pl.DataFrame:
        """Return the nodes: tokens, components and outputs, in order of layer and position."""
        count = len(ids)
        layer = np.sort(self.rng.integers(0, len(LAYERS), (count, NODES)), axis=1)
        is_token = (layer == 0) | (layer == len(LAYERS) - 1)
        component = self.rng.choice(C, (count, NODES), p=self.frequency)
        importance = self.rng.random((count, NODES)).astype(np.float32)
        kinds = np.where(layer == 0, "embedding", np.where(is_token, "output", "component"))
        columns = {
            "prompt_id": ids.repeat(NODES),
            "node": np.tile(np.arange(NODES), count),
            "kind": kinds.ravel(),
            "layer": np.array(LAYERS)[layer.ravel()],
            "pos": self.rng.integers(0, LENGTH, count * NODES),
            "component": component.ravel(),
            "importance": np.where(is_token, np.nan, importance).ravel(),
            "activation": self.rng.standard_normal(count * NODES),
        }
        frame = _frame("nodes", columns)
        return frame.with_columns(pl.col("importance").fill_nan(None))

    def _edges(self, ids: np.ndarray) -> pl.DataFrame:
        """Return the edges: random pairs of nodes, from earlier to later ones."""
        count = len(ids)
        chosen = self.patterns[self.rng.integers(0, len(self.patterns), count)]
        size = np.exp(self.rng.standard_normal((count, self.edges)))
        columns = {
            "prompt_id": ids.repeat(self.edges),
            "source": self.pairs[0][chosen].ravel(),
            "target": self.pairs[1][chosen].ravel(),
            "attribution": (size * self.rng.standard_normal((count, self.edges))).ravel(),
        }
        return _frame("edges", columns)

    def _components(self, nodes: pl.DataFrame) -> pl.DataFrame:
        """Return one row per component, with sums of these prompts."""
        fired = nodes.filter(kind="component").group_by("layer", "component")
        counts = fired.agg(firings=pl.len(), importance_sum=pl.col("importance").sum())
        every = pl.DataFrame({"layer": np.repeat(SITES, C), "component": np.tile(np.arange(C), 12)})
        columns = schema("components", LAYERS)
        typed = every.with_columns(
            pl.col("layer").cast(columns["layer"]), pl.col("component").cast(pl.UInt32)
        )
        rows = typed.join(counts, on=["layer", "component"], how="left")
        for name, dtype in columns.items():
            if name not in rows.columns:
                value = True if dtype == pl.Boolean else 1
                rows = rows.with_columns(pl.lit(value).alias(name))
        return rows.select(
            pl.col(n).fill_null(0).cast(t) if t.is_numeric() else pl.col(n)
            for n, t in columns.items()
        )


def _frame(table: str, columns: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(columns, schema=schema(table, LAYERS), strict=False)


def write(folder: Path, prompts: int, edges: int, groups: int) -> None:
    """Write a harvest, and print how long the commits took."""
    synthetic = Synthetic(edges)
    writer = Writer(folder, MANIFEST)
    spent = list[float]()
    for group in range(groups):
        size = (group + 1) * prompts // groups - group * prompts // groups
        if not size:
            continue
        batch = synthetic.batch(size)
        started = time.perf_counter()
        writer.write(batch)
        spent.append(time.perf_counter() - started)
    writer.complete()
    tenth = max(1, len(spent) // 10)
    first = statistics.median(spent[:tenth]) * 1e3
    last = statistics.median(spent[-tenth:]) * 1e3
    _line("write", f"{sum(spent):,.0f} s", f"a commit {first:.0f} ms at first, {last:.0f} ms last")


# ---- reading -------------------------------------------------------------------------------------


def _line(name: str, value: str, remark: str = "") -> None:
    print(f"  {name:<46}{value:>14}   {remark}", flush=True)


def _milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def top_edges(store: Store, prompt_id: int) -> pl.DataFrame:
    """Return the 200 strongest edges of a prompt."""
    strength = pl.col("attribution").abs()
    return store.scan("edges", prompt_id).sort(strength, descending=True).head(200).collect()


def page_of_components(store: Store) -> pl.DataFrame:
    """Return the 50 most frequent components, with their sums over all groups."""
    sums = (
        store.scan("components")
        .group_by("layer", "component")
        .agg(pl.col("firings", "importance_sum").sum(), pl.col("norm", "alive").first())
    )
    return sums.sort("firings", descending=True).head(50).collect()


def searches(count: int) -> list[list[tuple[str, int]]]:
    """Return sets of three components that are neither the rarest nor the most frequent."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(count):
        sites = rng.choice(SITES, 3, replace=False)
        found.append([(str(site), int(rng.integers(0, 20))) for site in sites])
    return found


def read(folder: Path) -> None:
    """Print the times and the memory of a reader."""
    opening = [_milliseconds(lambda: Store(folder)) for _ in range(5)]
    store = Store(folder)
    _line("open", f"{statistics.median(opening):,.0f} ms", "(at most 1000)")
    rng = np.random.default_rng(2)
    everyone = store.scan("prompts").select("prompt_id").collect()["prompt_id"].to_numpy()
    ids = [int(i) for i in rng.choice(everyone, 200)]
    fresh = Store(folder)
    first = [_milliseconds(lambda i=i: top_edges(fresh, i)) for i in ids]
    again = [_milliseconds(lambda i=i: top_edges(fresh, i)) for i in ids]
    _line("a prompt's top 200 edges", f"{statistics.median(again):.1f} ms", "(at most 10)")
    _line("  first time", f"{statistics.median(first):.1f} ms", f"longest {max(first):.1f} ms")
    queries = searches(20)
    cold = _milliseconds(lambda: fresh.prompts_with(queries[0]))
    warm = [_milliseconds(lambda q=q: fresh.prompts_with(q)) for q in queries]
    hits = statistics.median(fresh.prompts_with(q).height for q in queries)
    _line(
        "prompts in which A, B and C are nodes",
        f"{statistics.median(warm):.1f} ms",
        f"(at most 20) median of {hits:,.0f} prompts",
    )
    _line("  first time", f"{cold:.1f} ms", f"longest later {max(warm):.1f} ms")
    rows = [
        _milliseconds(lambda q=q: fresh.scan("nodes_by_component", component=q[0]).collect())
        for q in queries
    ]
    _line("all nodes of a component", f"{statistics.median(rows):.1f} ms")
    cold = _milliseconds(lambda: page_of_components(fresh))
    warm = [_milliseconds(lambda: page_of_components(fresh)) for _ in range(5)]
    _line(
        "a page of components",
        f"{statistics.median(warm):.1f} ms",
        f"(at most 50) first time {cold:.1f} ms",
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    _line("memory of the reader", f"{peak:,.0f} MB", "(at most 1000)")


def merge(folder: Path) -> None:
    """Compact the harvest, and print the time, the memory and the bytes per edge."""
    started = time.perf_counter()
    done = compact(folder)
    spent = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    _line(
        "compact",
        f"{spent:,.0f} s",
        f"{done.files_before:,} files to {done.files:,}, {peak:,.0f} MB of memory",
    )


def sizes(folder: Path) -> None:
    """Print the bytes per edge."""
    description = describe(Folder(folder))
    edges = description.sizes["edges"]
    _line(
        "bytes per edge",
        f"{edges.bytes / edges.rows:.2f}",
        f"(at most 6) {description.bytes / edges.rows:.2f} with all tables and indices, "
        f"{description.bytes / 1e9:.2f} GB",
    )


# ---- the field's layout --------------------------------------------------------------------------


def field(folder: Path, path: Path) -> None:
    """Write the same graphs to SQLite, and print its sizes and times."""
    store = Store(folder)
    base = sqlite3.connect(path)
    base.execute("create table graphs (prompt integer primary key, graph blob)")
    base.execute("create table firings (unit text, prompt integer)")
    units = store.scan("nodes_by_component").select("layer", "component", "prompt_id").unique()
    pairs = units.select(
        pl.concat_str(pl.col("layer").cast(pl.String), pl.lit(":"), "component"),
        pl.col("prompt_id").reinterpret(signed=True),
    )
    for some in pairs.collect().iter_slices(100_000):
        base.executemany("insert into firings values (?, ?)", some.iter_rows())
    base.execute("create index by_unit on firings (unit, prompt)")
    ids = store.scan("prompts").select("prompt_id").head(FIELD_PROMPTS).collect()["prompt_id"]
    edges = 0
    blobs = 0
    started = time.perf_counter()
    for prompt_id in ids:
        links = store.scan("edges", prompt_id).collect()
        nodes = store.scan("nodes", prompt_id).collect()
        graph = {"nodes": nodes.drop("prompt_id").to_dicts(), "links": links.to_dicts()}
        blob = gzip.compress(json.dumps(graph).encode())
        base.execute("insert into graphs values (?, ?)", (_signed(prompt_id), blob))
        edges += links.height
        blobs += len(blob)
    base.commit()
    per_graph = (time.perf_counter() - started) / len(ids) * 1e3
    _line(
        "bytes per edge", f"{blobs / edges:.2f}", f"graphs alone; {per_graph:.0f} ms to write one"
    )
    tops = [_milliseconds(lambda i=i: _field_top(base, i)) for i in ids[:50]]
    _line("a prompt's top 200 edges", f"{statistics.median(tops):.1f} ms")
    found = [_milliseconds(lambda q=q: _field_search(base, q)) for q in searches(20)]
    _line("prompts in which A, B and C are nodes", f"{statistics.median(found):.1f} ms")
    for query in searches(3):
        ours = store.prompts_with(query)["prompt_id"].to_list()
        assert sorted(_field_search(base, query)) == sorted(map(_signed, ours))
    base.close()


def _signed(prompt_id: int) -> int:
    """Return an id as SQLite can hold it."""
    return prompt_id - (1 << 64) if prompt_id >= 1 << 63 else prompt_id


def _field_top(base: sqlite3.Connection, prompt_id: int) -> list[Any]:
    (blob,) = base.execute(
        "select graph from graphs where prompt = ?", (_signed(prompt_id),)
    ).fetchone()
    links = json.loads(gzip.decompress(blob))["links"]
    return sorted(links, key=lambda link: -abs(link["attribution"]))[:200]


def _field_search(base: sqlite3.Connection, query: list[tuple[str, int]]) -> list[int]:
    names = [f"{layer}:{number}" for layer, number in query]
    rows = base.execute(
        "select prompt from firings where unit in (?, ?, ?) group by prompt having count(*) = 3",
        names,
    )
    return [prompt for (prompt,) in rows]


# ---- all together --------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--edges", type=int, default=5_000)
    parser.add_argument("--groups", type=int, default=1_000)
    parser.add_argument("--folder", default=None, help="where to write; a temporary folder")
    parser.add_argument("--part", choices=("write", "read", "merge", "sizes", "field"))
    given = parser.parse_args()
    if given.part is not None:
        folder = Path(given.folder)
        if given.part == "write":
            write(folder, given.prompts, given.edges, given.groups)
        elif given.part == "field":
            field(folder, folder.with_name("field.sqlite"))
        else:
            {"read": read, "merge": merge, "sizes": sizes}[given.part](folder)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary) / "harvest"
        print(f"\n{given.prompts:,} prompts with {given.edges:,} edges in {given.groups:,} groups")
        _in_processes(folder, ["write", "sizes", "read"])
        print("\nthe same, compacted")
        _in_processes(folder, ["merge", "sizes", "read"])
        print("\nSQLite, gzipped JSON per graph, inverted-index table")
        _in_processes(folder, ["field"])


def _in_processes(folder: Path, parts: list[str]) -> None:
    """Run each part in a process of its own, whose memory is then that of the part."""
    for part in parts:
        words = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--part", part]
        subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
