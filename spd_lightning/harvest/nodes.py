"""Prompt nodes: which components every token of every prompt needs, as tables; no edges, so no
backward pass.

Two forward passes a batch: a clean one gives importances and inner activations, one under the
importances the outputs. Activations are those of the clean run, as in graphs of mode `unmasked`
(A5), whose nodes are the same.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import polars as pl
import torch
from torch import Tensor

from spd_lightning.attribution.graph import Layer
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
    shape3,
)
from spd_lightning.training.decompose import Decomposition


class PromptNodes(Harvester):
    """Writes which components every prompt needs, and where: tables prompts, nodes, outputs,
    components.

    Args:
        threshold: importance above which a component is a node; 0 keeps all that matter at all,
            readers may raise it.
        name: the harvest's folder below `<run>/harvest/`.
    """

    def __init__(self, threshold: float = 0.0, name: str = "nodes"):
        super().__init__(name)
        check_range("PromptNodes", least=0, most=1, threshold=threshold)
        self.threshold = threshold

    def manifest(self, module: Decomposition) -> dict[str, Any]:
        """Everything that the rows depend on."""
        own = {"harvest": self.name, "mode": "nodes", "threshold": self.threshold}
        return harvest_metadata(module) | own | {"config": {"threshold": self.threshold}}

    def rows(
        self, module: Decomposition, prompts: Prompts, ids: list[int]
    ) -> Mapping[str, pl.DataFrame]:
        """One group of shards: the nodes of a batch of prompts."""
        with torch.no_grad(), embedded(module.model) as vectors:
            runs = run_clean_and_masked(module.model, prompts.inputs)
        layers = clean_layers(runs, prompts.inputs, vectors, self.threshold)
        return {
            "prompts": prompt_rows(prompts, ids, self.names),
            "nodes": node_rows(layers, ids),
            "outputs": output_rows(runs, ids, self.names),
            "components": component_rows(module, layers, self.threshold),
        }


@contextmanager
def embedded(model: ComponentModel) -> Iterator[dict[str, Tensor]]:
    """While open, what the target's embeddings give in the latest run, by name; those that are
    sites are left out.
    """
    given: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            given[name] = output.detach().clone()

        return hook

    handles = [
        module.register_forward_hook(keep(name)) for module, name in embeddings(model).items()
    ]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def clean_layers(
    runs: Runs, inputs: Tensor, vectors: Mapping[str, Tensor], threshold: float
) -> list[Layer]:
    """The layers of a batch of prompts with the values of the clean run, in forward order.

    inputs: [batch, features] or [batch, pos] token ids. vectors: what embeddings give, [(batch,)
    pos, d].
    """
    layers = []
    if inputs.is_floating_point():
        layers.append(Layer("input", "input", None, shape3(inputs), shape3(inputs) != 0))
    for name, given in vectors.items():
        size = full(given).norm(dim=-1, keepdim=True).expand(len(inputs), -1, 1)
        layers.append(Layer(name, "embedding", None, size, torch.ones_like(size, dtype=torch.bool)))
    for site in runs.clean.inputs:
        g, a = (full(shape3(held[site])) for held in (runs.importances, runs.clean.inner))
        layers.append(Layer(site, "component", None, a, g > threshold, g))
    return [*layers, Layer("output", "output", None, runs.target, runs.nodes(runs.ci))]
