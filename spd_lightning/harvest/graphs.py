"""Prompt graphs: the attribution graph of every prompt, as tables.

For each batch of prompts: importances of the clean run choose the nodes, closed forms or one cut
run give all edges between them (section A of docs/method.md), and a run under the importances
themselves gives the outputs. Some edges are tried by intervention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl
import torch
from torch import Tensor

from spd_lightning.attribution.closed_form.heads import head_edges_obstacle
from spd_lightning.attribution.graph import MODES, GraphSpec, ModeName, Threshold, check_mode
from spd_lightning.attribution.outputs import OutputNodes, every_output
from spd_lightning.attribution.pruning import MAX_EDGES
from spd_lightning.data.modules import Prompts
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput, check_range
from spd_lightning.harvest.checks import (
    FACTOR,
    check_rows,
    graph_rows,
    largest_gap,
    prune_and_count,
    sample_edges,
)
from spd_lightning.harvest.module import PAIRS, Harvester
from spd_lightning.harvest.native_decoder import as_native_decoder
from spd_lightning.harvest.output_targets import OutputTargets, thresholds
from spd_lightning.harvest.rows import (
    Runs,
    component_rows,
    edge_rows,
    harvest_metadata,
    head_rows,
    layer_names,
    node_rows,
    output_rows,
    prompt_rows,
    run_clean_and_masked,
)
from spd_lightning.training.decompose import Decomposition

HEADS = 8
"""So many times fewer prompts at once where each edge through attention has a row a head too."""

TOGETHER = 1 << 27
"""Edges of all prompts that are harvested together."""


class PromptGraphs(Harvester):
    """Writes the attribution graph of every prompt: tables prompts, nodes, edges, checks, graphs,
    outputs, components.

    Args:
        mode: the graph's kind (A5): unmasked, ci_masked, frozen (in-edges add up), or reference.
        threshold: importance above which a component is a node; 0 keeps all that matter at all,
            readers may raise it.
        min_share: edges below this share of all that enters their target, sizes added up, are not
            written.
        outputs: which outputs of a language model are nodes, standing for what; likely tokens'
            logits if left out.
        nodes: only these components, `layer:component`, `layer:pos:component` or a pattern of
            layers; all if left out.
        checks: how many written edges of each prompt to try by switching their source off, drawn by
            their size; 0 for none.
        heads: whether to write the table `head_edges` too: what each head adds to each written edge
            through attention; weak heads of an edge stay, so that they add up. Only where graphs
            have a closed form and all attention is decomposed.
        name: the harvest's folder below `<run>/harvest/`; "graphs-<mode>" if omitted.
    """

    def __init__(
        self,
        mode: ModeName = "unmasked",
        threshold: float = 0.0,
        min_share: float = 0.0,
        outputs: OutputTargets | None = None,
        nodes: Sequence[str] | None = None,
        checks: int = 8,
        heads: bool = False,
        name: str | None = None,
    ):
        super().__init__(name or f"graphs-{mode}")
        check_range("PromptGraphs", least=0, below=1, min_share=min_share)
        check_range("PromptGraphs", least=0, most=1, threshold=threshold)
        check_range("PromptGraphs", least=0, whole=True, checks=checks)
        self.min_share, self.checks, self.heads = min_share, checks, heads
        self.mode: ModeName = check_mode(mode, "PromptGraphs")
        self.threshold, self.outputs, self.nodes = threshold, outputs, nodes

    def manifest(self, module: Decomposition) -> dict[str, Any]:
        """Everything that the rows depend on.

        Raises:
            BadInput: heads are asked for, and edges cannot be taken apart by them.
        """
        mode = MODES[self.mode]
        if self.heads and (
            why := head_edges_obstacle(as_native_decoder(module.model, mode).model, mode)
        ):
            raise BadInput(
                f"heads in PromptGraphs: attention needs its closed form, and {why}; leave them out"
            )
        own = {"harvest": self.name, "mode": self.mode, "choices": asdict(mode)}
        settings = {
            "mode": self.mode,
            "threshold": self.threshold,
            "min_share": self.min_share,
            "checks": self.checks,
        }
        settings |= {
            "outputs": self.outputs and asdict(self.outputs),
            "nodes": self.nodes and list(self.nodes),
        }
        settings |= {"heads": self.heads}
        own |= {"threshold": self.threshold, "min_share": self.min_share, "config": settings}
        return (
            harvest_metadata(module)
            | own
            | {"layers": layer_names(module.model, mode.linearization == "frozen")}
        )

    def refuse(self, module: Decomposition, prompts: Prompts) -> None:
        """Also what is asked for has to be there: components, tokens, positions."""
        super().refuse(module, prompts)
        inputs = prompts.inputs
        length = 1 if inputs.is_floating_point() else inputs.shape[1]
        if self.nodes is not None:
            thresholds(module.model, self.nodes, self.threshold, length)
        if self.outputs is not None:
            output = torch.zeros(1, length, int(getattr(module.network, "vocab", 0)))
            self._outputs(inputs, every_output, output)

    def at_once(self, model: ComponentModel, inputs: Tensor) -> int:
        """Edges across positions grow with the square of the length, and are all held until they
        are written.
        """
        length = 1 if inputs.is_floating_point() else inputs.shape[1]
        each = HEADS if self.heads else 1
        return min(super().at_once(model, inputs), max(1, PAIRS // (each * length**2)))

    def rows(
        self, module: Decomposition, prompts: Prompts, ids: list[int]
    ) -> Mapping[str, pl.DataFrame]:
        """One group of shards: the graphs of a batch of prompts."""
        runs = self._runs(module.model, prompts.inputs)
        mode = MODES[self.mode]
        threshold = self._threshold(module.model, runs)
        spec = GraphSpec(
            module.model, prompts.inputs, runs.importances, mode, threshold, runs.nodes
        )
        decoder = as_native_decoder(module.model, mode)
        max_edges = min(MAX_EDGES, TOGETHER // len(ids))
        layers, parts = decoder.parts(spec, max_edges)
        graphs = prune_and_count(module.model, layers, parts, self.min_share, max_edges)
        if spec.frozen:
            self.missed(largest_gap(graphs.gaps))
        tried = sample_edges(layers, graphs.tables, ids, self.checks)
        checks = check_rows(tried, decoder.changes(spec, tried.checks, FACTOR), ids)
        rows = {
            "prompts": prompt_rows(prompts, ids, self.names),
            "nodes": node_rows(layers, ids),
            "edges": edge_rows(graphs.tables, ids),
            "checks": checks,
            "graphs": graph_rows(layers, graphs, checks, ids),
            "outputs": output_rows(runs, ids, self.names),
            "components": component_rows(module, layers, self.threshold),
        }
        if self.heads:
            rows["head_edges"] = head_rows(decoder.heads(spec, graphs.tables), ids)
        return rows

    def _runs(self, model: ComponentModel, inputs: Tensor) -> Runs:
        """Both runs of a batch of prompts, with the output nodes that are asked for."""
        runs = run_clean_and_masked(model, inputs)
        return runs._replace(nodes=self._outputs(inputs, runs.nodes, runs.ci))

    def _outputs(self, inputs: Tensor, likely: OutputNodes, output: Tensor) -> OutputNodes:
        if self.outputs is None:
            return likely
        if inputs.is_floating_point():
            raise BadInput(
                "outputs in PromptGraphs: a model on vectors has no tokens, all its outputs are "
                "nodes"
            )
        return self.outputs.outputs(likely, output, self.names)

    def _threshold(self, model: ComponentModel, runs: Runs) -> Threshold:
        """Importances above which components are nodes."""
        if self.nodes is None:
            return self.threshold
        return thresholds(model, self.nodes, self.threshold, runs.ci.shape[1])
