"""A page about a harvest for the web pages of trackers, which do not show Parquet files."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import polars as pl

from spd_lightning.analysis.names import component_name
from spd_lightning.analysis.prompts import prompt_text
from spd_lightning.analysis.statistics import components
from spd_lightning.analysis.store import Store
from spd_lightning.errors import BadInput, command
from spd_lightning.runs import writable, write_whole
from spd_lightning.store.inspection import describe
from spd_lightning.store.places import Folder

NAME = "summary.html"
SHOWN = 100
"""The number of components, and of prompts, on the page."""

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em; max-width: 70em; color: #222 }
table { border-collapse: collapse; margin-bottom: 2em }
th, td { padding: 2px 12px 2px 0; text-align: left; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums }
"""


def write_summaries(run: Path, names: Sequence[str] | None = None) -> None:
    """Write the page of each harvest of a run; a harvest that cannot be read gets none.

    names: the harvests; all if omitted.
    """
    for manifest in sorted(run.glob("harvest/*/manifest.json")):
        harvest = manifest.parent
        if names is not None and harvest.name not in names:
            continue
        try:
            text = summary(harvest)
        except BadInput:  # an upload checks all files, and reports damaged ones
            continue
        with writable(harvest), write_whole(harvest / NAME) as temporary:
            temporary.write_text(text, encoding="utf-8")


def summary(harvest: Path) -> str:
    """Return the page about a harvest as HTML without scripts.

    Raises:
        BadInput: it is not a harvest, or one of its files is damaged.
    """
    store = Store(harvest)
    title = f"{store.manifest['run']} · {harvest.name}"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        *_facts(store),
        *_sizes(harvest),
    ]
    if "components" in store.tables:
        parts += _components(store)
    parts += _prompts(store)
    parts.append("</html>\n")
    return "\n".join(parts)


def _facts(store: Store) -> Iterator[str]:
    """Yield a table of the origin of the harvest, and how to open it."""
    manifest = store.manifest
    facts = {
        "run": manifest["run"],
        "digest of the weights": manifest.get("checkpoint_digest", ""),
        "mode": manifest.get("mode", ""),
        "threshold of importance": manifest.get("threshold", ""),
        "prompts": manifest["prompts"],
        "complete": "yes" if manifest["complete"] else "no: the harvest was not finished",
    }
    yield from _table(["", ""], ([name, value] for name, value in facts.items()))
    pull = command("pull mlflow:RUN")
    yield f"<p>To explore it, pull the run (<code>{escape(pull)}</code>, or wandb:…), and open it "
    yield f"in the viewer: <code>{escape(command('view'))}</code></p>"


def _sizes(harvest: Path) -> Iterator[str]:
    yield "<h2>Tables</h2>"
    sizes = describe(Folder(harvest)).sizes
    rows = ([name, size.rows, size.bytes / 1e6] for name, size in sizes.items())
    yield from _table(["table", "rows", "MB"], rows)


def _components(store: Store) -> Iterator[str]:
    """Yield the components that fire most often."""
    frame = components(store)
    count = frame.height
    alive = frame.filter(pl.col("firings") > 0).height
    yield "<h2>Components</h2>"
    yield f"<p>{alive:,} of {count:,} components fire. Those that fire most often:</p>"
    heads = ["component", "density", "firings", "mean importance where it fires", "norm"]
    rows = []
    for row in frame.head(SHOWN).iter_rows(named=True):
        name = component_name(row["layer"], row["component"])
        values = [row["density"], row["firings"], row["firing_importance"], row["norm"]]
        rows.append([name, *values])
    yield from _table(heads, rows)


def _prompts(store: Store) -> Iterator[str]:
    """Yield the first prompts."""
    rows = store.collect(store.scan("prompts").head(SHOWN))
    yield "<h2>Prompts</h2>"
    yield f"<p>The first of {store.manifest['prompts']:,} prompts:</p>"
    lines = (
        [row["source"], row["split"], len(row["token_ids"]), prompt_text(row)]
        for row in rows.iter_rows(named=True)
    )
    yield from _table(["source", "split", "positions", "text"], lines)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Yield a table; numbers are aligned at the right."""
    yield "<table>"
    if any(heads):
        yield "<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(map(_cell, row)) + "</tr>"
    yield "</table>"


def _cell(value: Any) -> str:
    match value:
        case int():
            return f'<td class="number">{value:,}</td>'
        case float():
            return f'<td class="number">{value:.4g}</td>'
        case None:
            return "<td></td>"
    return f"<td>{escape(str(value)[:300])}</td>"
