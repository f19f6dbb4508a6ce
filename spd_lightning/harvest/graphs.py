"""Prompt graphs: the attribution graph of every prompt, as tables.

For each batch of prompts, the importances of the clean run determine the nodes. Closed forms, or
one cut run, give all edges between them (section A of docs/method.md). A run under the importances
as masks gives the outputs. Some edges are tested by intervention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl
import torch
from torch import Tensor

from spd_lightning import budgets
from spd_lightning.attribution.closed_form.heads import head_edges_obstacle
from spd_lightning.attribution.graph import MODES, GraphSpec, ModeName, Threshold, check_mode
from spd_lightning.attribution.outputs import OutputNodes, every_output
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
from spd_lightning.harvest.module import Harvester, positions_of
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
from spd_lightning.targets.protocols import vocab_of
from spd_lightning.training.decompose import Decomposition


class PromptGraphs(Harvester):
    """Write the attribution graph of every prompt.

    The tables are prompts, nodes, edges, checks, graphs, outputs and components; with `heads` also
    head_edges.

    Args:
        mode: the mode of the graphs (A5): unmasked, ci_masked, frozen (in-edges add up), or
            reference.
        threshold: importance above which a component is a node; 0 keeps every component with
            positive importance. Readers can raise it.
        min_share: edges below this share of the total |attribution| into their target are not
            written.
        outputs: which outputs of a language model are nodes, and the quantity that they stand for;
            the logits of likely tokens if omitted.
        nodes: the components that can be nodes, as `layer:component`, `layer:pos:component`, or a
            pattern of layers; all components if omitted.
        checks: the number of edges of each prompt to test by ablating their source, 0 for none.
            They are drawn from the written edges in proportion to their size.
        heads: whether to write the table head_edges too: the part of each written edge that goes
            through each attention head. All heads of an edge are written, so that they add up to
            it. This requires graphs with a closed form and an attention whose maps are all sites.
        name: the harvest's folder in `<run>/harvest/`; "graphs-<mode>" if omitted.

    Examples:
        >>> import lightning as L
        >>> from spd_lightning import TMS, Decomposition, PromptGraphs, SparseFeatures, Store
        >>> module = Decomposition(TMS(5, 2), sites={"linear*": 20})
        >>> trainer = L.Trainer(callbacks=[PromptGraphs("frozen")], default_root_dir="mine")
        >>> _ = trainer.predict(module, SparseFeatures(5, 0.05, batch_size=1))
        >>> store = Store("mine/harvest/graphs-frozen")
        >>> store.scan("edges").collect().columns
        ['prompt_id', 'source', 'target', 'attribution']
        >>> store.manifest["gap"] < 1e-4  # the in-edges of every node add up to its activation
        True
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
        self.mode: ModeName = check_mode(mode, "PromptGraphs")
        super().__init__(name or f"graphs-{mode}", graph_mode=self.mode)
        check_range("PromptGraphs", least=0, below=1, min_share=min_share)
        check_range("PromptGraphs", least=0, most=1, threshold=threshold)
        check_range("PromptGraphs", least=0, whole=True, checks=checks)
        self.threshold = threshold
        self.min_share = min_share
        self.outputs = outputs
        self.nodes = nodes
        self.checks = checks
        self.heads = heads

    def manifest(self, module: Decomposition) -> dict[str, Any]:
        """Return the settings of the harvest, which its rows depend on.

        Raises:
            BadInput: `heads` is set, but edges cannot be split by attention heads.
        """
        mode = MODES[self.mode]
        if self.heads:
            decoder = as_native_decoder(module.model, mode)
            obstacle = head_edges_obstacle(decoder.model, mode)
            if obstacle:
                raise BadInput(
                    f"heads in PromptGraphs: attention needs its closed form, and {obstacle}; "
                    "leave them out"
                )
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
                "checks": self.checks,
                "outputs": self.outputs and asdict(self.outputs),
                "nodes": self.nodes and list(self.nodes),
                "heads": self.heads,
            },
            "layers": layer_names(module.model, mode.linearization == "frozen"),
        }

    def check_prompts(self, module: Decomposition, prompts: Prompts) -> None:
        """Check prompts of one length, and that the chosen nodes and outputs exist."""
        super().check_prompts(module, prompts)
        inputs = prompts.inputs
        length = positions_of(inputs)
        if self.nodes is not None:
            thresholds(module.model, self.nodes, self.threshold, length)
        if self.outputs is not None:
            vocab = vocab_of(module.network) or 0
            output = torch.zeros(1, length, vocab)
            self._outputs(inputs, every_output, output)

    def at_once(self, model: ComponentModel, inputs: Tensor) -> int:
        """Return the number of prompts that fit in memory, with their edges across positions.

        The number of these edges grows with the square of the length, and all of them are in memory
        until they are written.
        """
        count = super().at_once(model, inputs)
        length = positions_of(inputs)
        rows_per_prompt = length**2  # pairs of positions
        if self.heads:
            rows_per_prompt *= budgets.HEAD_ROWS
        prompts = max(1, budgets.MAX_POSITION_PAIRS // rows_per_prompt)
        return min(count, prompts)

    def memory(self, model: ComponentModel, inputs: Tensor) -> Mapping[str, int]:
        """Return the bytes of the graphs of a batch if every component is a node (`budgets`)."""
        prompts = min(len(inputs), self.at_once(model, inputs))
        outputs = vocab_of(model.target) or inputs.shape[1]
        nodes = positions_of(inputs) * (sum(model.counts.values()) + outputs)
        edges_of_prompt = min(nodes**2 // 2, budgets.MAX_EDGES)
        edges = min(prompts * edges_of_prompt, budgets.MAX_TOTAL_EDGES)
        return {"edges": edges * budgets.GRAPH_EDGE_BYTES}

    def rows(
        self, module: Decomposition, prompts: Prompts, ids: list[int]
    ) -> Mapping[str, pl.DataFrame]:
        """Return the graphs of a batch of prompts."""
        runs = self._runs(module.model, prompts.inputs)
        mode = MODES[self.mode]
        threshold = self._threshold(module.model, runs)
        spec = GraphSpec(
            model=module.model,
            inputs=prompts.inputs,
            importances=runs.importances,
            mode=mode,
            threshold=threshold,
            outputs=runs.nodes,
        )
        decoder = as_native_decoder(module.model, mode)
        max_edges = min(budgets.MAX_EDGES, budgets.MAX_TOTAL_EDGES // len(ids))
        layers, parts = decoder.parts(spec, max_edges)
        graphs = prune_and_count(module.model, layers, parts, self.min_share, max_edges)
        if spec.frozen:
            self.note_gap(largest_gap(graphs.gaps))
        tried = sample_edges(layers, graphs.tables, ids, self.checks)
        changes = decoder.changes(spec, tried.checks, FACTOR)
        checks = check_rows(tried, changes, ids)
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
        """Run a batch of prompts clean and under importances, and choose the output nodes."""
        runs = run_clean_and_masked(model, inputs)
        likely = runs.nodes
        nodes = self._outputs(inputs, likely, runs.ci)
        return runs._replace(nodes=nodes)

    def _outputs(self, inputs: Tensor, likely: OutputNodes, output: Tensor) -> OutputNodes:
        """Return the chosen output nodes, or the likely tokens by default."""
        if self.outputs is None:
            return likely
        if inputs.is_floating_point():
            raise BadInput(
                "outputs in PromptGraphs: a model on vectors has no tokens; remove this option, "
                "since all its outputs are nodes"
            )
        return self.outputs.outputs(likely, output, self.names)

    def _threshold(self, model: ComponentModel, runs: Runs) -> Threshold:
        """Return the importances above which components are nodes."""
        if self.nodes is None:
            return self.threshold
        length = runs.ci.shape[1]
        return thresholds(model, self.nodes, self.threshold, length)
