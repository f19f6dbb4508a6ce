"""Dataset edges: what the edges of prompt graphs add up to over a corpus, as tables that add up
further.

For each batch of prompts: importances of the clean run choose the nodes, closed forms or batched
products are summed by pairs of components (section A of docs/method.md). No graph is kept. What the
sums are divided by, readers decide.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from spd_lightning.attribution.closed_form.trace import closed_form_obstacle
from spd_lightning.attribution.dataset_edges import NodeSums, PairSums, sums_gap
from spd_lightning.attribution.graph import MODES, GraphSpec, ModeName, check_mode
from spd_lightning.data.modules import Prompts
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput, check_range, nearest
from spd_lightning.harvest.module import PAIRS, Harvester
from spd_lightning.harvest.native_decoder import as_native_decoder
from spd_lightning.harvest.rows import (
    array,
    embeddings,
    harvest_metadata,
    layer_names,
    prompt_rows,
    run_clean_and_masked,
)
from spd_lightning.store import KINDS, schema
from spd_lightning.training.decompose import Decomposition


class DatasetEdges(Harvester):
    """Writes what edges add up to over all prompts: tables prompts, dataset_edges, dataset_nodes.

    Args:
        mode: whose edges (A5): of graphs unmasked, ci_masked, frozen, or reference.
        threshold: importance above which a component is a node; readers cannot raise it.
        layers: patterns of the layers between which edges are wanted: sites, embeddings, `output`.
        group: prompts that are summed before they are written; a killed harvest loses the work of
            fewer than these.
        name: the harvest's folder below `<run>/harvest/`; "dataset-<mode>" if omitted.
    """

    def __init__(
        self,
        mode: ModeName = "unmasked",
        threshold: float = 0.0,
        layers: Sequence[str] = ("*",),
        group: int = 1000,
        name: str | None = None,
    ):
        super().__init__(name or f"dataset-{mode}", group)
        check_range("DatasetEdges", least=0, most=1, threshold=threshold)
        self.mode: ModeName = check_mode(mode, "DatasetEdges")
        self.threshold = threshold
        self.layers = list(layers)

    def manifest(self, module: Decomposition) -> dict[str, Any]:
        """Everything that the rows depend on.

        Raises:
            BadInput: a pattern matches no layer.
        """
        settings = {"mode": self.mode, "threshold": self.threshold, "layers": self.layers}
        own = {
            "harvest": self.name,
            "mode": self.mode,
            "choices": asdict(MODES[self.mode]),
            "corpus": True,
        }
        names = layer_names(module.model, MODES[self.mode].linearization == "frozen")
        for pattern in self.layers:
            if not any(fnmatch(name, pattern) for name in names):
                raise BadInput(
                    f"layers '{pattern}' in DatasetEdges: no such layer; {nearest(pattern, names)}"
                )
        own |= {"threshold": self.threshold, "config": settings, "layers": names}
        return harvest_metadata(module) | own | {"token_layers": token_layers(module.model)}

    def at_once(self, model: ComponentModel, inputs: Tensor) -> int:
        """Where edges have no closed form, those across positions are all held at once."""
        mode = MODES[self.mode]
        if (
            inputs.is_floating_point()
            or closed_form_obstacle(as_native_decoder(model, mode).model, mode) is None
        ):
            return super().at_once(model, inputs)
        return min(super().at_once(model, inputs), max(1, PAIRS // inputs.shape[1] ** 2))

    def rows(
        self, module: Decomposition, prompts: Prompts, ids: list[int]
    ) -> Mapping[str, pl.DataFrame]:
        """The sums over a batch of prompts."""
        runs = run_clean_and_masked(module.model, prompts.inputs)
        mode = MODES[self.mode]
        spec = GraphSpec(
            module.model, prompts.inputs, runs.importances, mode, self.threshold, runs.nodes
        )
        nodes, pairs = as_native_decoder(module.model, mode).sums(spec, self._wanted)
        names = layer_names(module.model, spec.frozen)
        if spec.frozen and all(self._wanted(layer) for layer in names):
            self.missed(sums_gap(module.model, nodes, pairs))
        return {
            "prompts": prompt_rows(prompts, ids, self.names),
            "dataset_edges": pair_rows(pairs, names),
            "dataset_nodes": sum_rows(nodes, names, positions=runs.target[..., 0].numel()),
        }

    def _wanted(self, layer: str) -> bool:
        return any(fnmatch(layer, pattern) for pattern in self.layers)


def token_layers(model: ComponentModel) -> list[str]:
    """The layers whose components are tokens: embeddings of the whole vocabulary that are not
    sites, and the output.
    """
    vocab = getattr(model.target, "vocab", None)
    found = [
        name
        for module, name in embeddings(model).items()
        if getattr(module, "num_embeddings", None) == vocab
    ]
    return [*found, "output"] if vocab else []


def pair_rows(pairs: Sequence[PairSums], names: list[str]) -> pl.DataFrame:
    """One row for each two components that share an edge."""
    frames = [
        pl.DataFrame(
            {
                "source_kind": pl.repeat(
                    pair.kind, len(pair.edges), dtype=pl.Enum(KINDS), eager=True
                ),
                "source_layer": pl.repeat(
                    pair.source_layer, len(pair.edges), dtype=pl.Enum(names), eager=True
                ),
                "source": array(pair.source, np.uint32),
                "target_layer": pl.repeat(
                    pair.target_layer, len(pair.edges), dtype=pl.Enum(names), eager=True
                ),
                "target": array(pair.target, np.uint32),
                "edges": array(pair.edges, np.uint64),
                "sum": array(pair.total, np.float64),
                "sum_abs_target": array(pair.size, np.float64),
                "prompt_square_sum": array(pair.total_square, np.float64),
                "prompt_square_sum_abs_target": array(pair.size_square, np.float64),
            }
        )
        for pair in pairs
    ]
    return pl.concat([pl.DataFrame(schema=schema("dataset_edges", names)), *frames])


def sum_rows(nodes: Sequence[NodeSums], names: list[str], positions: int) -> pl.DataFrame:
    """One row a component, or a row of an embedding that is looked up: what sums are divided by."""
    frames = [
        pl.DataFrame(
            {
                "kind": pl.repeat(node.kind, len(node.firings), dtype=pl.Enum(KINDS), eager=True),
                "layer": pl.repeat(node.layer, len(node.firings), dtype=pl.Enum(names), eager=True),
                "component": array(node.component, np.uint32),
                "firings": array(node.firings, np.int64),
                "positions": np.full(len(node.firings), positions, dtype=np.int64),
                "importance_sum": array(node.importance, np.float64),
                "activation_square_sum": array(node.square, np.float64),
            }
        )
        for node in nodes
    ]
    return pl.concat([pl.DataFrame(schema=schema("dataset_nodes", names)), *frames])
