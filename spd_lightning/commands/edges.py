"""edges: what drives a component over a corpus, and what it drives, as a table or as JSON."""

import json
from collections.abc import Sequence
from typing import Any

import polars as pl

from spd_lightning import runs
from spd_lightning.analysis.dataset_edges import Side, corpus_harvests, named, strongest
from spd_lightning.commands import options
from spd_lightning.decomposition.names import DIGITS
from spd_lightning.errors import BadInput, nearest
from spd_lightning.store import Store


def main(argv: Sequence[str]) -> None:
    """Prints the strongest sources and targets of one component over the corpus that a run's
    harvest summed.
    """
    asked = options.read("edges", argv)
    layer, component = _component(asked.component)
    store = _store(asked.run, asked.harvest)
    sides: list[Side] = [side for side in ("sources", "targets") if getattr(asked, side)] or [
        "sources",
        "targets",
    ]
    found = {
        side: strongest(
            store, layer, component, side, asked.scale, asked.metric, asked.top_k, asked.min_edges
        )
        for side in sides
    }
    names = {side: named(store, frame) for side, frame in found.items()}
    if asked.json:
        print(
            json.dumps({side: _rows(names[side], frame) for side, frame in found.items()}, indent=1)
        )
        return
    corpus = f"{store.manifest['prompts']} prompts, {store.manifest['mode']}, {asked.scale}"
    print(f"{layer}:{component} over {corpus}; pairs with at least {asked.min_edges} edges")
    width = max(map(len, [*names.get("sources", []), *names.get("targets", []), "sources"])) + 2
    interval = f"95 % of {'activation' if asked.metric == 'activation' else '|activation|'}"
    for side, frame in found.items():
        print(
            f"\n{side:<{width + 2}} {'edges':>10} {'to activation':>14} {'to |activation|':>16} "
            f"{interval:>24}"
        )
        for row in _rows(names[side], frame):
            values = f"{row['edges']:>10,} {row['to_activation']:>+14.4g} {row['to_size']:>+16.4g}"
            ends = "–" if row["low"] is None else f"{row['low']:+.4g} to {row['high']:+.4g}"
            print(f"  {row['name']:<{width}} {values} {ends:>24}")


def _rows(names: list[str], frame: pl.DataFrame) -> list[dict[str, Any]]:
    return [
        {"name": name, **row} for name, row in zip(names, frame.iter_rows(named=True), strict=True)
    ]


def _component(name: str) -> tuple[str, int]:
    """A component's layer and number."""
    layer, _, number = name.rpartition(":")
    if not layer or not (number.isascii() and number.isdecimal()) or len(number) > 2 * DIGITS:
        raise BadInput(f"component '{name[:80]}': write layer:number; for example h.0.mlp.c_fc:5")
    return layer, int(number)


def _store(run: str, harvest: str | None) -> Store:
    """The run's harvest of sums: the one of this name, or the latest."""
    found = runs.find(run)
    held = {path.name: path for path in corpus_harvests(found.harvests)}
    if not held:
        family = found.record.get("family", found.name)
        command = f"predict --config {family}.yaml --config dataset_edges.yaml"
        raise BadInput(f"run '{found.name}': no harvest of sums over a corpus; make one: {command}")
    if harvest is not None and harvest not in held:
        raise BadInput(
            f"harvest '{harvest}': run '{found.name}' has no sums of this name; "
            f"{nearest(harvest, held)}"
        )
    return Store(held[harvest] if harvest else next(iter(held.values()))).require(
        "mode", "token_layers"
    )
