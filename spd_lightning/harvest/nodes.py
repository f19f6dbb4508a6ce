"""Prompt nodes: the components that each token of each prompt needs, as tables without edges.

Each batch takes two forward passes and no backward pass. The clean pass gives the importances and
the inner activations; the pass under the importances as masks gives the outputs. Graphs of mode
`unmasked` (A5) have the same nodes with the same activations.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import polars as pl
import torch
from torch import Tensor

from spd_lightning.attribution.graph import Layer, with_positions
from spd_lightning.data.modules import Prompts
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import check_range
from spd_lightning.harvest.module import Harvester
from spd_lightning.harvest.rows import (
    Runs,
    component_rows,
    embeddings,
    full,
    harvest_metadata,
    node_rows,
    output_rows,
    prompt_rows,
    run_clean_and_masked,
)
from spd_lightning.training.decompose import Decomposition


class PromptNodes(Harvester):
    """Write the components that each prompt needs, by position, without edges.

    The tables are prompts, nodes, outputs and components.

    Args:
        threshold: importance above which a component is a node; 0 keeps every component with
            positive importance. Readers can raise it.
        name: the harvest's folder in `<run>/harvest/`.

    Examples:
        >>> import lightning as L
        >>> from spd_lightning import TMS, Decomposition, PromptNodes, SparseFeatures, Store
        >>> module = Decomposition(TMS(5, 2), sites={"linear*": 20})
        >>> trainer = L.Trainer(callbacks=[PromptNodes()], default_root_dir="mine")
        >>> _ = trainer.predict(module, SparseFeatures(5, 0.05, batch_size=1))
        >>> Store("mine/harvest/nodes").scan("nodes").collect().columns
        ['prompt_id', 'node', 'kind', 'layer', 'pos', 'component', 'importance', 'activation']
    """

    def __init__(self, threshold: float = 0.0, name: str = "nodes"):
        super().__init__(name)
        check_range("PromptNodes", least=0, most=1, threshold=threshold)
        self.threshold = threshold

    def manifest(self, module: Decomposition) -> dict[str, Any]:
        """Return the settings of the harvest, which its rows depend on."""
        return harvest_metadata(module) | {
            "harvest": self.name,
            "mode": "nodes",
            "threshold": self.threshold,
            "config": {"threshold": self.threshold},
        }

    def rows(
        self, module: Decomposition, prompts: Prompts, ids: list[int]
    ) -> Mapping[str, pl.DataFrame]:
        """Return the nodes of a batch of prompts."""
        inputs = prompts.inputs
        with torch.no_grad(), embedded(module.model) as vectors:
            runs = run_clean_and_masked(module.model, inputs)
        layers = clean_layers(runs, inputs, vectors, self.threshold)
        return {
            "prompts": prompt_rows(prompts, ids, self.names),
            "nodes": node_rows(layers, ids),
            "outputs": output_rows(runs, ids, self.names),
            "components": component_rows(module, layers, self.threshold),
        }


@contextmanager
def embedded(model: ComponentModel) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of the target's embeddings that are not sites, by name.

    The dictionary holds the outputs of the latest run inside the context.
    """
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = output.detach().clone()

        return hook

    handles = []
    for module, name in embeddings(model).items():
        handles.append(module.register_forward_hook(recorder(name)))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def clean_layers(
    runs: Runs, inputs: Tensor, vectors: Mapping[str, Tensor], threshold: float
) -> list[Layer]:
    """Return the layers of a batch of prompts with the values of the clean run, in forward order.

    inputs: [batch, features] floating point, or [batch, pos] token ids.
    vectors: the outputs of embeddings, [batch, pos, d] or [pos, d].
    """
    layers = []
    if inputs.is_floating_point():
        features = with_positions(inputs)  # [batch, 1, features]
        layers.append(Layer("input", "input", None, features, features != 0))
    for name, vector in vectors.items():
        norms = full(vector).norm(dim=-1, keepdim=True)  # [batch, pos, 1] or [pos, 1]
        value = norms.expand(len(inputs), -1, 1)
        every_position = torch.ones_like(value, dtype=torch.bool)
        layers.append(Layer(name, "embedding", None, value, every_position))
    for site in runs.clean.inputs:
        g = full(with_positions(runs.importances[site]))  # [batch, pos, C]
        a = full(with_positions(runs.clean.inner[site]))  # [batch, pos, C]
        is_node = g > threshold
        layers.append(Layer(site, "component", None, a, is_node, g))
    chosen_outputs = runs.nodes(runs.ci)
    output = Layer("output", "output", None, runs.target, chosen_outputs)
    layers.append(output)
    return layers
