"""Checks of harvested graphs as rows: some edges tried by intervention, and what each prompt's
graph is worth.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from spd_lightning.attribution.checks import Checks, Graphs, Inflow
from spd_lightning.attribution.graph import EdgeTable, Layer, LazyEdges, joined, no_edges
from spd_lightning.attribution.pruning import MAX_EDGES, prune_edges
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.harvest.rows import array
from spd_lightning.store import AGREEMENT, TABLES, finite

log = logging.getLogger(__name__)

FACTOR = 0.0
"""Sources are switched off."""


class PrunedGraphs(NamedTuple):
    """The graphs of a batch of prompts: the edges that stay, the number before pruning, and the gap
    of each prompt.
    """

    tables: list[EdgeTable]
    total: Tensor
    gaps: Tensor


def prune_and_count(
    model: ComponentModel,
    layers: list[Layer],
    graphs: Iterable[LazyEdges],
    min_share: float,
    max_edges: int = MAX_EDGES,
) -> PrunedGraphs:
    """Prune the graphs of a batch of prompts; before that, count all edges, and add them up for the
    gap.
    """
    inflow = Inflow(model, layers)
    total = torch.zeros(len(layers[0].nodes), dtype=torch.long)

    def observe(table: EdgeTable) -> None:
        inflow.add(table)
        total.add_(edges_per_prompt(table, len(total)))

    tables = list[EdgeTable]()
    for edges in graphs:
        table, share = prune_edges(edges, min_share, max_edges, observe)
        tables.append(table)
        if share > min_share:
            log.warning(
                "a graph has too many edges to hold in memory; edges below a share of %.2g of what "
                "enters their "
                "target are left out. Raise min_share or threshold to choose this yourself.",
                share,
            )
    return PrunedGraphs(tables, total, inflow.gaps())


def largest_gap(gaps: Tensor) -> float:
    """The largest gap of any prompt; a prompt without any activation has none."""
    return float(gaps.detach().nan_to_num(0.0).max())


def edges_per_prompt(table: EdgeTable, prompts: int) -> Tensor:
    """Count the edges of each prompt."""
    return torch.bincount(table.prompt, minlength=prompts).cpu()


class SampledEdges(NamedTuple):
    """Edges to try, as edges of the table and as what is done about them."""

    table: EdgeTable
    checks: Checks


def sample_edges(
    layers: list[Layer], tables: list[EdgeTable], ids: list[int], count: int
) -> SampledEdges:
    """Up to `count` edges of each prompt; which ones is a function of the prompt alone."""
    graphs = Graphs(layers)
    found = list[EdgeTable]()
    for table in tables:
        for prompt, part in split_by_prompt(table):
            found.append(
                graphs.sample_edges(part, count, torch.Generator().manual_seed(ids[prompt] % 2**63))
            )
    table = joined(found) if found else no_edges()
    return SampledEdges(table, graphs.checks(table))


def check_rows(tried: SampledEdges, changes: Tensor, ids: list[int]) -> pl.DataFrame:
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


def split_by_prompt(table: EdgeTable) -> Iterator[tuple[int, EdgeTable]]:
    """The edges of each prompt."""
    if not len(table.prompt):
        return
    first, last = (int(end) for end in table.prompt.aminmax())
    if first == last:
        yield first, table
        return
    order = table.prompt.argsort(stable=True)
    counts = edges_per_prompt(table, last + 1).tolist()
    for prompt, rows in enumerate(order.split(counts)):
        if len(rows):
            yield prompt, EdgeTable(*(column[rows] for column in table))


def graph_rows(
    layers: list[Layer], graphs: PrunedGraphs, checks: pl.DataFrame, ids: list[int]
) -> pl.DataFrame:
    """One row a prompt: how large its graph is, by how much it misses what it explains, how its
    checks went.
    """
    written = sum(
        (edges_per_prompt(table, len(ids)) for table in graphs.tables),
        torch.zeros(len(ids), dtype=torch.long),
    )
    frame = pl.DataFrame(
        {
            "prompt_id": pl.Series(ids, dtype=pl.UInt64),
            "nodes": array(
                torch.stack([layer.nodes.flatten(1).sum(1) for layer in layers]).sum(0), np.uint32
            ),
            "edges": array(written, np.uint32),
            "edges_total": array(graphs.total, np.uint32),
            "gap": array(graphs.gaps, np.float64),
        }
    ).with_columns(gap=finite(pl.col("gap")))
    tried = checks.group_by("prompt_id").agg(**AGREEMENT)
    return frame.join(tried, on="prompt_id", how="left").with_columns(
        pl.col("checked").fill_null(0)
    )
