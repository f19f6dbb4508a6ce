"""edges: the strongest sources and targets of a component over a corpus, as a table or as JSON."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from spd_lightning import runs
from spd_lightning.analysis.dataset_edges import Side, corpus_harvests, named, strongest
from spd_lightning.commands import options
from spd_lightning.decomposition.names import DIGITS
from spd_lightning.errors import BadInput, nearest
from spd_lightning.store import Store


def main(argv: Sequence[str]) -> None:
    """Print the strongest sources and targets of one component over the corpus of a harvest."""
    arguments = options.read("edges", argv)
    layer, component = _component(arguments.component)
    store = _store(arguments.run, arguments.harvest)
    tables = {}
    for side in _sides(arguments):
        frame = strongest(
            store,
            layer,
            component,
            side,
            arguments.scale,
            arguments.metric,
            arguments.top_k,
            arguments.min_edges,
        )
        tables[side] = _rows(named(store, frame), frame)
    if arguments.json:
        print(json.dumps(tables, indent=1))
        return
    corpus = f"{store.manifest['prompts']} prompts, {store.manifest['mode']}, {arguments.scale}"
    pairs = f"pairs with at least {arguments.min_edges} edges"
    print(f"{layer}:{component} over {corpus}; {pairs}")
    for line in _lines(tables, arguments.metric):
        print(line)


def _sides(arguments: argparse.Namespace) -> list[Side]:
    """Return the sides to print: those that an option names, or both."""
    sides: list[Side] = []
    if arguments.sources:
        sides.append("sources")
    if arguments.targets:
        sides.append("targets")
    return sides or ["sources", "targets"]


def _rows(names: list[str], frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table of edges, each with the name of its component or token."""
    rows = []
    for name, values in zip(names, frame.iter_rows(named=True), strict=True):
        row = {"name": name, **values}
        rows.append(row)
    return rows


def _lines(tables: Mapping[Side, list[dict[str, Any]]], metric: str) -> Iterator[str]:
    """Yield the lines of the tables of both sides."""
    names = [row["name"] for rows in tables.values() for row in rows]
    width = 2 + max(map(len, [*names, "sources"]))
    quantity = "activation" if metric == "activation" else "|activation|"
    interval = f"95 % of {quantity}"
    heads = f"{'edges':>10} {'to activation':>14} {'to |activation|':>16} {interval:>24}"
    for side, rows in tables.items():
        yield ""
        yield f"{side:<{width + 2}} {heads}"
        for row in rows:
            yield _line(row, width)


def _line(row: Mapping[str, Any], width: int) -> str:
    """Return the line of one pair; a pair without an interval gets a dash."""
    interval = "–"
    if row["low"] is not None:
        interval = f"{row['low']:+.4g} to {row['high']:+.4g}"
    cells = (
        f"  {row['name']:<{width}}",
        f"{row['edges']:>10,}",
        f"{row['to_activation']:>+14.4g}",
        f"{row['to_size']:>+16.4g}",
        f"{interval:>24}",
    )
    return " ".join(cells)


def _component(name: str) -> tuple[str, int]:
    """Return a component's layer and number."""
    layer, _, number = name.rpartition(":")
    is_number = number.isascii() and number.isdecimal()
    too_long = len(number) > 2 * DIGITS
    if not layer or not is_number or too_long:
        shown = name[:80]
        raise BadInput(f"component '{shown}': write layer:number; for example h.0.mlp.c_fc:5")
    return layer, int(number)


def _store(reference: str, harvest: str | None) -> Store:
    """Return a run's harvest of sums: the one of the given name, or the latest."""
    run = runs.find(reference)
    paths = corpus_harvests(run.harvests)
    harvests = {path.name: path for path in paths}
    if not harvests:
        predict = run.predict_command("dataset_edges.yaml")
        raise BadInput(f"run '{run.name}': no harvest of sums over a corpus; make one: {predict}")
    if harvest is None:
        path = paths[0]
    elif harvest in harvests:
        path = harvests[harvest]
    else:
        raise BadInput(
            f"harvest '{harvest}': not a harvest of sums in run '{run.name}'; "
            f"{nearest(harvest, harvests)}"
        )
    return Store(path).require("mode", "token_layers")
