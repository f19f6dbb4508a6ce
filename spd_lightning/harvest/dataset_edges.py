"""Dataset edges: sums over a corpus of the edges of prompt graphs, as additive tables.

For each batch of prompts, the importances of the clean run determine the nodes, and the edges are
summed by pairs of components (section A of docs/method.md). The edges come from closed forms,
otherwise from batched products. No graph is kept. Readers choose how to normalize the sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from spd_lightning import budgets
from spd_lightning.attribution.closed_form.trace import closed_form_obstacle
from spd_lightning.attribution.dataset_edges import NodeSums, PairSums, sums_gap
from spd_lightning.attribution.graph import MODES, GraphSpec, ModeName, check_mode
from spd_lightning.data.modules import Prompts
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput, check_range, nearest
from spd_lightning.harvest.module import Harvester
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
from spd_lightning.targets.protocols import vocab_of
from spd_lightning.training.decompose import Decomposition


class DatasetEdges(Harvester):
    """Write the sums of edges over all prompts, by pairs of components.

    The tables are prompts, dataset_edges and dataset_nodes.

    Args:
        mode: the mode of the graphs (A5): unmasked, ci_masked, frozen, or reference.
        threshold: importance above which a component is a node; it cannot be raised afterwards.
        layers: patterns of layers (sites, embeddings, `output`); only edges between them are added.
        group: the number of prompts that are summed before they are written; a killed harvest loses
            fewer prompts than that.
        name: the harvest's folder in `<run>/harvest/`; "dataset-<mode>" if omitted.

    Examples:
        >>> import lightning as L
        >>> from spd_lightning import TMS, DatasetEdges, Decomposition, SparseFeatures, Store
        >>> module = Decomposition(TMS(5, 2), sites={"linear*": 20})
        >>> trainer = L.Trainer(callbacks=[DatasetEdges()], default_root_dir="mine")
        >>> _ = trainer.predict(module, SparseFeatures(5, 0.05, batch_size=1))
        >>> edges = Store("mine/harvest/dataset-unmasked").scan("dataset_edges").collect()
        >>> sorted(set(edges.select("source_layer", "target_layer").iter_rows()))
        [('input', 'linear1'), ('linear1', 'linear2'), ('linear2', 'output')]
    """

    def __init__(
        self,
        mode: ModeName = "unmasked",
        threshold: float = 0.0,
        layers: Sequence[str] = ("*",),
        group: int = 1000,
        name: str | None = None,
    ):
        self.mode: ModeName = check_mode(mode, "DatasetEdges")
        super().__init__(name or f"dataset-{mode}", group, self.mode)
        check_range("DatasetEdges", least=0, most=1, threshold=threshold)
        self.threshold = threshold
        self.layers = list(layers)

    def manifest(self, module: Decomposition) -> dict[str, Any]:
        """Return the settings of the harvest, which its rows depend on.

        Raises:
            BadInput: a pattern matches no layer.
        """
        mode = MODES[self.mode]
        names = layer_names(module.model, mode.linearization == "frozen")
        for pattern in self.layers:
            if not any(fnmatch(name, pattern) for name in names):
                raise BadInput(
                    f"layers '{pattern}' in DatasetEdges: no such layer; {nearest(pattern, names)}"
                )
        return harvest_metadata(module) | {
            "harvest": self.name,
            "mode": self.mode,
            "choices": asdict(mode),
            "corpus": True,
            "threshold": self.threshold,
            "config": {"mode": self.mode, "threshold": self.threshold, "layers": self.layers},
            "layers": names,
            "token_layers": token_layers(module.model),
        }

    def at_once(self, model: ComponentModel, inputs: Tensor) -> int:
        """Return the number of prompts that fit in memory, with their edges across positions.

        All of these edges are in memory at once, unless they have a closed form.
        """
        count = super().at_once(model, inputs)
        if inputs.is_floating_point():
            return count
        mode = MODES[self.mode]
        decoder = as_native_decoder(model, mode)
        if closed_form_obstacle(decoder.model, mode) is None:
            return count
        length = inputs.shape[1]
        pairs_per_prompt = length**2  # of positions
        prompts = max(1, budgets.MAX_POSITION_PAIRS // pairs_per_prompt)
        return min(count, prompts)

    def memory(self, model: ComponentModel, inputs: Tensor) -> Mapping[str, int]:
        """Return the bytes of the sums over a group of prompts if every component is a node."""
        outputs = vocab_of(model.target) or inputs.shape[1]
        components = sum(model.counts.values()) + 2 * outputs  # also as inputs
        rows = min(components**2 // 2, budgets.MAX_SUM_ROWS)
        return {"sums": rows * budgets.SUM_ROW_BYTES}

    def rows(
        self, module: Decomposition, prompts: Prompts, ids: list[int]
    ) -> Mapping[str, pl.DataFrame]:
        """Return the sums over a batch of prompts."""
        runs = run_clean_and_masked(module.model, prompts.inputs)
        mode = MODES[self.mode]
        spec = GraphSpec(
            model=module.model,
            inputs=prompts.inputs,
            importances=runs.importances,
            mode=mode,
            threshold=self.threshold,
            outputs=runs.nodes,
        )
        decoder = as_native_decoder(module.model, mode)
        nodes, pairs = decoder.sums(spec, self._includes)
        names = layer_names(module.model, spec.frozen)
        if spec.frozen and all(self._includes(layer) for layer in names):
            self.note_gap(sums_gap(module.model, nodes, pairs))
        positions = runs.target[..., 0].numel()  # of all prompts together
        return {
            "prompts": prompt_rows(prompts, ids, self.names),
            "dataset_edges": pair_rows(pairs, names),
            "dataset_nodes": sum_rows(nodes, names, positions),
        }

    def _includes(self, layer: str) -> bool:
        """Return whether a layer matches one of the patterns."""
        return any(fnmatch(layer, pattern) for pattern in self.layers)


def token_layers(model: ComponentModel) -> list[str]:
    """Return the layers whose components are tokens.

    These are the output, and the embeddings of the whole vocabulary that are not sites.
    """
    vocab = vocab_of(model.target)
    if not vocab:
        return []
    layers = []
    for module, name in embeddings(model).items():
        if module.num_embeddings == vocab:
            layers.append(name)
    layers.append("output")
    return layers


def pair_rows(pairs: Sequence[PairSums], names: list[str]) -> pl.DataFrame:
    """Return one row for each pair of components with an edge between them."""
    kinds = pl.Enum(KINDS)
    layers = pl.Enum(names)
    empty = pl.DataFrame(schema=schema("dataset_edges", names))
    frames = [empty]
    for pair in pairs:
        rows = len(pair.edges)
        columns = {
            "source_kind": _constant(pair.kind, rows, kinds),
            "source_layer": _constant(pair.source_layer, rows, layers),
            "source": array(pair.source, np.uint32),
            "target_layer": _constant(pair.target_layer, rows, layers),
            "target": array(pair.target, np.uint32),
            "edges": array(pair.edges, np.uint64),
            "sum": array(pair.total, np.float64),
            "sum_abs_target": array(pair.size, np.float64),
            "prompt_square_sum": array(pair.total_square, np.float64),
            "prompt_square_sum_abs_target": array(pair.size_square, np.float64),
        }
        frames.append(pl.DataFrame(columns))
    return pl.concat(frames)


def sum_rows(nodes: Sequence[NodeSums], names: list[str], positions: int) -> pl.DataFrame:
    """Return one row for each component or embedding row that occurs, used to normalize edges."""
    kinds = pl.Enum(KINDS)
    layers = pl.Enum(names)
    types = schema("dataset_nodes", names)
    empty = pl.DataFrame(schema=types)
    frames = [empty]
    for node in nodes:
        rows = len(node.firings)
        columns = {
            "kind": _constant(node.kind, rows, kinds),
            "layer": _constant(node.layer, rows, layers),
            "component": array(node.component, np.uint32),
            "firings": array(node.firings, np.int64),
            "positions": np.full(rows, positions, dtype=np.int64),
            "importance_sum": array(node.importance, np.float64),
            "activation_square_sum": array(node.square, np.float64),
        }
        frames.append(pl.DataFrame(columns))
    return pl.concat(frames)


def _constant(value: str, rows: int, dtype: Any) -> pl.Series:
    """Return a column with the same value in every row."""
    return pl.repeat(value, rows, dtype=dtype, eager=True)
