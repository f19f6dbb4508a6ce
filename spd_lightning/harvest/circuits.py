"""Sparse circuits: for every prompt the smallest graph that answers one objective, and how small
against how good.

For each batch of prompts: importances are optimized under every λ (section A of docs/method.md); of
each prompt one λ is taken, and its graph written as `PromptGraphs` writes one, with the optimized
importances for masks and nodes and the outputs of the asked position alone. The table `frontier`
has all λs, chosen or not.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from spd_lightning.attribution.circuit_objective import CircuitSearch, suited
from spd_lightning.attribution.circuit_search import Frontier, optimize, select_circuits
from spd_lightning.attribution.graph import MODES, GraphSpec, ModeName, check_mode
from spd_lightning.attribution.outputs import OutputNodes, every_output
from spd_lightning.data.modules import Prompts
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import check_range
from spd_lightning.harvest.checks import largest_gap, prune_and_count
from spd_lightning.harvest.module import Harvester
from spd_lightning.harvest.native_decoder import as_native_decoder
from spd_lightning.harvest.rows import (
    Names,
    Runs,
    array,
    component_rows,
    edge_rows,
    harvest_metadata,
    layer_names,
    node_rows,
    output_rows,
    prompt_rows,
    run_clean_and_masked,
    token_strings,
)
from spd_lightning.training.decompose import Decomposition

HELD = 4
"""Arrays over all components of a row that a step of the descent holds at once, at a guess."""


class SparseCircuits(Harvester):
    """Writes the optimized graph of every prompt: tables prompts, nodes, edges, outputs,
    components, frontier.

    Of the λs that are tried, the one with the fewest nodes is taken whose label probability under
    adversarial masks is at least a share of the target's; where none is, the one with the highest.
    (On vectors: the share of the outputs' mean square.)

    Args:
        search: how circuits are looked for; its adversary's steps stand in the table.
        share: of the target's answer that the adversary has to leave.
        mode: the graph's kind (A5).
        threshold: importance above which a component is a node of the graph.
        min_share: edges below this share of all that enters their target, sizes added up, are not
            written.
        name: the harvest's folder below `<run>/harvest/`.
    """

    def __init__(
        self,
        search: CircuitSearch | None = None,
        share: float = 0.8,
        mode: ModeName = "ci_masked",
        threshold: float = 0.0,
        min_share: float = 0.0,
        name: str = "circuits",
    ):
        super().__init__(name)
        check_range("SparseCircuits", least=0, below=1, share=share, min_share=min_share)
        check_range("SparseCircuits", least=0, most=1, threshold=threshold)
        self.search = search or CircuitSearch()
        self.share = share
        self.mode: ModeName = check_mode(mode, "SparseCircuits")
        self.threshold, self.min_share = threshold, min_share

    def manifest(self, module: Decomposition) -> dict[str, Any]:
        """Everything that the rows depend on."""
        own = {"harvest": self.name, "mode": self.mode, "choices": asdict(MODES[self.mode])}
        settings = {
            "mode": self.mode,
            "threshold": self.threshold,
            "min_share": self.min_share,
            "share": self.share,
        }
        own |= {"threshold": self.threshold, "min_share": self.min_share}
        own |= {"config": settings | {"search": asdict(self.search)}}
        return (
            harvest_metadata(module)
            | own
            | {"layers": layer_names(module.model, MODES[self.mode].linearization == "frozen")}
        )

    def refuse(self, module: Decomposition, prompts: Prompts) -> None:
        """Also the search has to suit the prompts."""
        super().refuse(module, prompts)
        suited(self.search, prompts.inputs, getattr(module.network, "vocab", None))

    def at_once(self, model: ComponentModel, inputs: Tensor) -> int:
        """Every λ of every prompt is a row of one batch."""
        return max(1, super().at_once(model, inputs) // (HELD * (1 + len(self.search.lambdas))))

    def rows(
        self, module: Decomposition, prompts: Prompts, ids: list[int]
    ) -> Mapping[str, pl.DataFrame]:
        """One group of shards: the circuits of a batch of prompts."""
        inputs = prompts.inputs
        (importances, frontier) = optimize(module.model, prompts.inputs, self.search)
        best = select_circuits(frontier, self.share)
        g = {site: held[best] for site, held in importances.items()}
        runs = run_clean_and_masked(module.model, inputs, g)
        label = None if frontier.label is None else frontier.label[best]
        runs = runs._replace(nodes=asked(runs, self.search.position, label))
        spec = GraphSpec(module.model, inputs, g, MODES[self.mode], self.threshold, runs.nodes)
        layers, parts = as_native_decoder(module.model, spec.mode).parts(spec)
        graphs = prune_and_count(module.model, layers, parts, self.min_share)
        if spec.frozen:
            self.missed(largest_gap(graphs.gaps))
        pos = 0 if inputs.is_floating_point() else self.search.position % inputs.shape[1]
        return {
            "prompts": prompt_rows(prompts, ids, self.names),
            "nodes": node_rows(layers, ids),
            "edges": edge_rows(graphs.tables, ids),
            "outputs": output_rows(runs, ids, self.names),
            "components": component_rows(module, layers, self.threshold),
            "frontier": frontier_rows(
                frontier, best, ids, pos, self.search.judge.steps, self.names
            ),
        }


def asked(runs: Runs, position: int, label: Tensor | None) -> OutputNodes:
    """The outputs in objective: at one position the label and what else is likely there; on vectors
    all of them.
    """
    if label is None:
        return every_output
    likely = runs.nodes(runs.ci)
    nodes = torch.zeros_like(likely)
    nodes[:, position] = likely[:, position]
    nodes[torch.arange(len(label)), position, label] = True
    return lambda output: nodes


def frontier_rows(
    frontier: Frontier,
    best: list[int],
    ids: list[int],
    pos: int,
    adversary_steps: int,
    names: Names,
) -> pl.DataFrame:
    """One row a prompt and λ; that of the importance function itself has none."""
    rows = len(frontier.prompt)
    columns: dict[str, Any] = {
        "prompt_id": np.array(ids, dtype=np.uint64)[frontier.prompt.cpu().numpy()],
        "lambda": pl.Series(array(frontier.lambdas, np.float64)).fill_nan(None),
        "chosen": np.isin(np.arange(rows), best),
        "nodes": array(frontier.nodes, np.uint32),
        "important": array(frontier.important, np.uint32),
        "pos": np.full(rows, pos, dtype=np.uint16),
        "label": None if frontier.label is None else array(frontier.label, np.uint32),
        "token": None
        if frontier.label is None
        else token_strings(frontier.label.cpu().numpy(), names),
        "kept": array(frontier.kept),
        "adversary_steps": np.full(rows, adversary_steps, dtype=np.uint32),
        "steps": array(frontier.steps, np.uint32),
    }
    columns |= {f"loss_{masks}": array(loss) for masks, loss in frontier.loss.items()}
    for masks in ("target", "ci", "stochastic", "adversarial"):
        columns[f"p_{masks}"] = (
            None if frontier.probability is None else array(frontier.probability[masks])
        )
    types = {"label": pl.UInt32, "token": pl.String} | {
        n: pl.Float32 for n in columns if n.startswith("p_")
    }
    return pl.DataFrame(columns, schema_overrides=types)
