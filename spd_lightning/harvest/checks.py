"""Checks of harvested graphs as rows: interventions on some edges, and a summary of each prompt."""

import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from spd_lightning import budgets
from spd_lightning.attribution.checks import Checks, Graphs, Inflow
from spd_lightning.attribution.graph import EdgeTable, Layer, LazyEdges, joined, no_edges
from spd_lightning.attribution.pruning import prune_edges
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.harvest.rows import array
from spd_lightning.store import AGREEMENT, TABLES, finite

log = logging.getLogger(__name__)

FACTOR = 0.0
"""The factor of the interventions, which multiply the source of an edge: 0 ablates it."""


class PrunedGraphs(NamedTuple):
    """The pruned graphs of a batch of prompts.

    tables: the edges that remain.
    total: the number of edges of each prompt before pruning.
    gaps: the gap of each prompt (A6).
    """

    tables: list[EdgeTable]
    total: Tensor
    gaps: Tensor


def prune_and_count(
    model: ComponentModel,
    layers: list[Layer],
    graphs: Iterable[LazyEdges],
    min_share: float,
    max_edges: int = budgets.MAX_EDGES,
) -> PrunedGraphs:
    """Prune the graphs of a batch of prompts, and measure them before pruning.

    All edges are counted, and added up to compute the gap of each prompt.
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
                "a graph has too many edges to fit in memory; edges below a share of %.2g of all "
                "that enters their target are dropped. Raise min_share or threshold to choose "
                "this yourself.",
                share,
            )
    return PrunedGraphs(tables, total, inflow.gaps())


def largest_gap(gaps: Tensor) -> float:
    """Return the largest gap of any prompt; a prompt without activations (NaN) counts as 0."""
    detached = gaps.detach()
    known_gaps = detached.nan_to_num(0.0)
    largest = known_gaps.max()
    return float(largest)


def edges_per_prompt(table: EdgeTable, prompts: int) -> Tensor:
    """Count the edges of each prompt."""
    counts = torch.bincount(table.prompt, minlength=prompts)
    return counts.cpu()


class SampledEdges(NamedTuple):
    """Edges to test, once as rows of an edge table and once as interventions."""

    table: EdgeTable
    checks: Checks


def sample_edges(
    layers: list[Layer], tables: list[EdgeTable], ids: list[int], count: int
) -> SampledEdges:
    """Draw up to `count` edges of each prompt; the draw depends only on the prompt's id."""
    graphs = Graphs(layers)
    samples = list[EdgeTable]()
    for table in tables:
        for prompt, edges in split_by_prompt(table):
            seed = ids[prompt] % 2**63  # the largest seed that torch accepts is 2**63 - 1
            generator = torch.Generator().manual_seed(seed)
            sample = graphs.sample_edges(edges, count, generator)
            samples.append(sample)
    sampled = no_edges()
    if samples:
        sampled = joined(samples)
    checks = graphs.checks(sampled)
    return SampledEdges(sampled, checks)


def check_rows(tried: SampledEdges, changes: Tensor, ids: list[int]) -> pl.DataFrame:
    """Return one row per edge: the change of its target when its source is ablated."""
    table = tried.table
    prompt_ids = np.array(ids, dtype=np.uint64)
    prompt = table.prompt.cpu().numpy()
    columns = {
        "prompt_id": prompt_ids[prompt],
        "source": array(table.source, np.uint32),
        "target": array(table.target, np.uint32),
        "attribution": array(table.attribution),
        "factor": np.full(len(changes), FACTOR, dtype=np.float32),
        "change": array(changes),
    }
    return pl.DataFrame(columns, schema=TABLES["checks"])


def split_by_prompt(table: EdgeTable) -> Iterator[tuple[int, EdgeTable]]:
    """Yield the edges of each prompt that has edges, with the prompt's number in the batch."""
    if not len(table.prompt):
        return
    extremes = table.prompt.aminmax()
    first = int(extremes.min)
    last = int(extremes.max)
    if first == last:
        yield first, table
        return
    order = table.prompt.argsort(stable=True)
    counts = edges_per_prompt(table, last + 1)
    rows_by_prompt = order.split(counts.tolist())
    for prompt, rows in enumerate(rows_by_prompt):
        if not len(rows):
            continue
        columns = [column[rows] for column in table]
        yield prompt, EdgeTable(*columns)


def graph_rows(
    layers: list[Layer], graphs: PrunedGraphs, checks: pl.DataFrame, ids: list[int]
) -> pl.DataFrame:
    """Return one row per prompt: the size of its graph, its gap, and the result of its checks."""
    prompts = len(ids)
    written = torch.zeros(prompts, dtype=torch.long)
    for table in graphs.tables:
        written += edges_per_prompt(table, prompts)
    nodes_by_layer = [layer.nodes.flatten(1).sum(1) for layer in layers]
    nodes = torch.stack(nodes_by_layer).sum(0)  # [prompts]
    columns = {
        "prompt_id": pl.Series(ids, dtype=pl.UInt64),
        "nodes": array(nodes, np.uint32),
        "edges": array(written, np.uint64),
        "edges_total": array(graphs.total, np.uint64),
        "gap": array(graphs.gaps, np.float64),
    }
    frame = pl.DataFrame(columns)
    gap = finite(pl.col("gap"))
    frame = frame.with_columns(gap=gap)
    checks_by_prompt = checks.group_by("prompt_id")
    agreement = checks_by_prompt.agg(**AGREEMENT)
    rows = frame.join(agreement, on="prompt_id", how="left")
    checked = pl.col("checked").fill_null(0)
    return rows.with_columns(checked)
