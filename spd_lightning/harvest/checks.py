"""Checks of harvested graphs as rows: some edges tried by intervention, and what each prompt's graph is worth."""

import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from spd_lightning.attribution.checks import Checks, Graphs, Inflow
from spd_lightning.attribution.graph import EdgeTable, Layer, joined
from spd_lightning.attribution.pruning import MOST, bounded, no_edges
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.harvest.rows import array
from spd_lightning.store import AGREEMENT, TABLES, finite

log = logging.getLogger(__name__)

FACTOR = 0.0
"""Sources are switched off."""


class Weighed(NamedTuple):
    """The graphs of a batch of prompts: the edges that stay, how many there were, and the gap of each prompt."""

    tables: list[EdgeTable]
    total: Tensor
    gaps: Tensor


def weighed(
    model: ComponentModel, layers: list[Layer], graphs: Iterable[Iterable[EdgeTable]], at_least: float, most: int = MOST
) -> Weighed:
    """Leaves weak edges out, and counts and adds up all of them before that; `most` edges of a prompt stay at most."""
    inflow, total = Inflow(model, layers), torch.zeros(len(layers[0].nodes), dtype=torch.long)

    def seen(table: EdgeTable) -> None:
        inflow.add(table)
        total.add_(counted(table, len(total)))

    kept = list[EdgeTable]()
    for parts in graphs:
        table, share = bounded(parts, at_least, most, seen)
        kept.append(table)
        if share > at_least:
            log.warning(
                "a graph has too many edges for the memory: those below %.2g of all that enters their target are left "
                "out; choose at_least or threshold higher yourself", share,
            )  # fmt: skip
    return Weighed(kept, total, inflow.gaps())


def largest_gap(gaps: Tensor) -> float:
    """The largest gap of any prompt; a prompt without any activation has none."""
    return float(gaps.detach().nan_to_num(0.0).max())


def counted(table: EdgeTable, prompts: int) -> Tensor:
    """How many edges each prompt has."""
    return torch.bincount(table.prompt, minlength=prompts).cpu()


class Drawn(NamedTuple):
    """Edges to try, as edges of the table and as what is done about them."""

    table: EdgeTable
    checks: Checks


def drawn(layers: list[Layer], tables: list[EdgeTable], ids: list[int], count: int) -> Drawn:
    """Up to `count` edges of each prompt; which ones is a function of the prompt alone."""
    graphs, found = Graphs(layers), list[EdgeTable]()
    for table in tables:
        for prompt, part in apart(table):
            found.append(graphs.drawn(part, count, torch.Generator().manual_seed(ids[prompt] % 2**63)))
    table = joined(found) if found else no_edges()
    return Drawn(table, graphs.checks(table))


def check_rows(tried: Drawn, changes: Tensor, ids: list[int]) -> pl.DataFrame:
    """One row an edge: what its target gains without its source."""
    table = tried.table
    columns = {
        "prompt_id": np.array(ids, dtype=np.uint64)[table.prompt.cpu().numpy()],
        "source": array(table.source, np.uint32),
        "target": array(table.target, np.uint32),
        "attribution": array(table.attribution),
        "factor": np.full(len(changes), FACTOR, dtype=np.float32),
        "change": array(changes),
    }
    return pl.DataFrame(columns, schema=TABLES["checks"])


def apart(table: EdgeTable) -> Iterator[tuple[int, EdgeTable]]:
    """The edges of each prompt."""
    if not len(table.prompt):
        return
    first, last = (int(end) for end in table.prompt.aminmax())
    if first == last:
        yield first, table
        return
    order, counts = table.prompt.argsort(stable=True), counted(table, last + 1).tolist()
    for prompt, rows in enumerate(order.split(counts)):
        if len(rows):
            yield prompt, EdgeTable(*(column[rows] for column in table))


def graph_rows(layers: list[Layer], graphs: Weighed, checks: pl.DataFrame, ids: list[int]) -> pl.DataFrame:
    """One row a prompt: how large its graph is, by how much it misses what it explains, how its checks went."""
    written = sum((counted(table, len(ids)) for table in graphs.tables), torch.zeros(len(ids), dtype=torch.long))
    frame = pl.DataFrame(
        {
            "prompt_id": pl.Series(ids, dtype=pl.UInt64),
            "nodes": array(torch.stack([layer.nodes.flatten(1).sum(1) for layer in layers]).sum(0), np.uint32),
            "edges": array(written, np.uint32),
            "edges_total": array(graphs.total, np.uint32),
            "gap": array(graphs.gaps, np.float64),
        }
    ).with_columns(gap=finite(pl.col("gap")))
    tried = checks.group_by("prompt_id").agg(**AGREEMENT)
    return frame.join(tried, on="prompt_id", how="left").with_columns(pl.col("checked").fill_null(0))
