"""Sparse circuits: the smallest graph of each prompt that preserves the output at one position.

For each batch of prompts, importances are optimized under every λ (section A of docs/method.md).
One λ is chosen for each prompt. Its graph is written like one of `PromptGraphs`, with two
differences: the optimized importances determine masks and nodes, and only outputs at the position
of the objective are nodes. The table `frontier` compares the size and accuracy of the circuits of
all λs.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from spd_lightning import budgets
from spd_lightning.attribution.graph import MODES, GraphSpec, ModeName, check_mode
from spd_lightning.attribution.outputs import OutputNodes, every_output
from spd_lightning.circuits.objective import CircuitSearch, check_search
from spd_lightning.circuits.search import Frontier, optimize, select_circuits
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
from spd_lightning.targets.protocols import vocab_of
from spd_lightning.training.decompose import Decomposition


class SparseCircuits(Harvester):
    """Write an optimized, sparse graph of every prompt.

    The tables are prompts, nodes, edges, outputs, components and frontier. For each prompt, the
    graph belongs to the λ with the fewest nodes whose label probability under adversarial masks is
    at least `share` of the target's. If no λ qualifies, it belongs to the λ with the highest
    probability. On vectors, the mean square of the outputs replaces the label probability.

    Args:
        search: the settings of the search for circuits.
        share: the share of the target's label probability that a circuit must keep under the
            adversary.
        mode: the mode of the graph (A5).
        threshold: importance above which a component is a node of the graph.
        min_share: edges below this share of the total |attribution| into their target are not
            written.
        name: the harvest's folder in `<run>/harvest/`.

    Examples:
        >>> import lightning as L
        >>> from spd_lightning import TMS, CircuitSearch, Decomposition, SparseCircuits
        >>> from spd_lightning import SparseFeatures, Store
        >>> module = Decomposition(TMS(5, 2), sites={"linear*": 20})
        >>> circuits = SparseCircuits(CircuitSearch(lambdas=(0.01, 0.1), steps=20))
        >>> trainer = L.Trainer(callbacks=[circuits], default_root_dir="mine")
        >>> _ = trainer.predict(module, SparseFeatures(5, 0.05, batch_size=1, n_prompts=0))
        >>> Store("mine/harvest/circuits").scan("frontier").filter("chosen").collect().height
        5
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
        self.mode: ModeName = check_mode(mode, "SparseCircuits")
        super().__init__(name, graph_mode=self.mode)
        check_range("SparseCircuits", least=0, below=1, share=share, min_share=min_share)
        check_range("SparseCircuits", least=0, most=1, threshold=threshold)
        self.search = search or CircuitSearch()
        self.share = share
        self.threshold = threshold
        self.min_share = min_share

    def manifest(self, module: Decomposition) -> dict[str, Any]:
        """Return the settings of the harvest, which its rows depend on."""
        mode = MODES[self.mode]
        return harvest_metadata(module) | {
            "harvest": self.name,
            "mode": self.mode,
            "choices": asdict(mode),
            "threshold": self.threshold,
            "min_share": self.min_share,
            "config": {
                "mode": self.mode,
                "threshold": self.threshold,
                "min_share": self.min_share,
                "share": self.share,
                "search": asdict(self.search),
            },
            "layers": layer_names(module.model, mode.linearization == "frozen"),
        }

    def check_prompts(self, module: Decomposition, prompts: Prompts) -> None:
        """Check prompts of one length, and that the search suits them."""
        super().check_prompts(module, prompts)
        vocab = vocab_of(module.network)
        check_search(self.search, prompts.inputs, vocab)

    def at_once(self, model: ComponentModel, inputs: Tensor) -> int:
        """Return the number of prompts that fit, when each has one row per λ and one without λ."""
        rows = super().at_once(model, inputs)
        rows = rows // budgets.CIRCUIT_ARRAYS
        lambdas = self.search.lambdas
        rows_per_prompt = 1 + len(lambdas)
        prompts = rows // rows_per_prompt
        return max(1, prompts)

    def rows(
        self, module: Decomposition, prompts: Prompts, ids: list[int]
    ) -> Mapping[str, pl.DataFrame]:
        """Return the circuits of a batch of prompts."""
        inputs = prompts.inputs
        importances, frontier = optimize(module.model, inputs, self.search)
        best = select_circuits(frontier, self.share)  # one row of the frontier for each prompt
        g = {site: values[best] for site, values in importances.items()}
        runs = run_clean_and_masked(module.model, inputs, g)
        label = None if frontier.label is None else frontier.label[best]
        nodes = objective_outputs(runs, self.search.position, label)
        runs = runs._replace(nodes=nodes)
        spec = GraphSpec(
            model=module.model,
            inputs=inputs,
            importances=g,
            mode=MODES[self.mode],
            threshold=self.threshold,
            outputs=runs.nodes,
        )
        decoder = as_native_decoder(module.model, spec.mode)
        layers, parts = decoder.parts(spec)
        graphs = prune_and_count(module.model, layers, parts, self.min_share)
        if spec.frozen:
            self.note_gap(largest_gap(graphs.gaps))
        pos = 0 if inputs.is_floating_point() else self.search.position % inputs.shape[1]
        adversary_steps = self.search.judge.steps
        return {
            "prompts": prompt_rows(prompts, ids, self.names),
            "nodes": node_rows(layers, ids),
            "edges": edge_rows(graphs.tables, ids),
            "outputs": output_rows(runs, ids, self.names),
            "components": component_rows(module, layers, self.threshold),
            "frontier": frontier_rows(frontier, best, ids, pos, adversary_steps, self.names),
        }


def objective_outputs(runs: Runs, position: int, label: Tensor | None) -> OutputNodes:
    """Choose the outputs of the objective: the label and other likely tokens at one position.

    Without a label, for models on vectors, all outputs are chosen.
    """
    if label is None:
        return every_output
    likely = runs.nodes(runs.ci)  # [batch, pos, vocab]
    likely_there = likely[:, position]
    nodes = torch.zeros_like(likely)
    nodes[:, position] = likely_there
    batch = len(label)
    every_prompt = torch.arange(batch)
    nodes[every_prompt, position, label] = True
    return lambda output: nodes


def frontier_rows(
    frontier: Frontier,
    best: list[int],
    ids: list[int],
    pos: int,
    adversary_steps: int,
    names: Names,
) -> pl.DataFrame:
    """Return one row per prompt and λ, and one row without λ for the importance function itself."""
    rows = len(frontier.prompt)
    prompt_ids = np.array(ids, dtype=np.uint64)
    label = None
    token = None
    if frontier.label is not None:
        label = array(frontier.label, np.uint32)
        token = token_strings(frontier.label.cpu().numpy(), names)
    columns: dict[str, Any] = {
        "prompt_id": prompt_ids[frontier.prompt.cpu().numpy()],
        "lambda": pl.Series(array(frontier.lambdas, np.float64)).fill_nan(None),
        "chosen": np.isin(np.arange(rows), best),
        "nodes": array(frontier.nodes, np.uint32),
        "important": array(frontier.important, np.uint32),
        "pos": np.full(rows, pos, dtype=np.uint32),
        "label": label,
        "token": token,
        "kept": array(frontier.kept),
        "adversary_steps": np.full(rows, adversary_steps, dtype=np.uint32),
        "steps": array(frontier.steps, np.uint32),
    }
    types: dict[str, Any] = {"label": pl.UInt32, "token": pl.String}
    for masks, loss in frontier.loss.items():
        columns[f"loss_{masks}"] = array(loss)
    for masks in ("target", "ci", "stochastic", "adversarial"):
        name = f"p_{masks}"
        types[name] = pl.Float32
        columns[name] = None
        if frontier.probability is not None:
            columns[name] = array(frontier.probability[masks])
    return pl.DataFrame(columns, schema_overrides=types)
