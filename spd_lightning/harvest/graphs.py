"""Prompt graphs: the attribution graph of every prompt, as tables.

For each batch of prompts: importances of the clean run choose the nodes, one cut run gives all edges between them
(section A of docs/method.md), and a run under the importances themselves gives the outputs.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from spd_lightning.decomposition.attribution import (
    MODES,
    Edges,
    Layer,
    ModeName,
    OutputNodes,
    every_output,
    likely_tokens,
    prompt_edges,
)
from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.metrics import component_norms, sizeable
from spd_lightning.decomposition.model import Clean
from spd_lightning.harvest.module import Harvester
from spd_lightning.targets.data import Prompts
from spd_lightning.training.decompose import Decomposition


class PromptGraphs(Harvester):
    """Writes the attribution graph of every prompt: tables prompts, nodes, edges, outputs, components.

    Args:
        mode: the graph's kind (A5): unmasked, ci_masked, frozen (in-edges add up), or reference.
        threshold: importance above which a component is a node; 0 keeps all that matter at all, readers may raise it.
        name: the harvest's folder below `<run>/harvest/`; "graphs-<mode>" where left out.
    """

    def __init__(self, mode: ModeName = "unmasked", threshold: float = 0.0, name: str | None = None):
        super().__init__(name or f"graphs-{mode}")
        self.mode: ModeName = mode
        self.threshold = threshold

    def manifest(self, module: Decomposition) -> dict[str, Any]:
        """Everything that the rows depend on."""
        model = module.model
        embeddings = [n for n, m in model.target.named_modules() if isinstance(m, torch.nn.Embedding)]
        inputs = [name for name in embeddings if name not in model.sites] or ["input"]
        return {
            "harvest": self.name,
            "run": module.origin,
            "kind": "tokens" if embeddings else "vectors",
            "mode": self.mode,
            "choices": asdict(MODES[self.mode]),
            "threshold": self.threshold,
            "checkpoint_digest": module.digest,
            "layers": [*inputs, *model.sites, "output"],
            "C": model.counts,
            "config": {"mode": self.mode, "threshold": self.threshold},
        }

    def rows(self, module: Decomposition, prompts: Prompts, ids: list[int]) -> Mapping[str, pl.DataFrame]:
        """One group of shards: the graphs of a batch of prompts."""
        model, inputs = module.model, prompts.inputs
        with torch.no_grad():
            clean = model.clean(inputs)
            g = model.importances(clean).lower
            masked = model.masked(inputs, {site: Mask(v, 0.0) for site, v in g.items()}, clean)
        outputs = every_output if inputs.is_floating_point() else likely_tokens(masked.softmax(-1))
        layers, edges = prompt_edges(model, inputs, g, MODES[self.mode], self.threshold, outputs)
        numbers = node_numbers(layers)
        return {
            "prompts": _prompts(prompts, ids),
            "nodes": _nodes(layers, numbers, ids),
            "edges": _edges(edges, numbers, ids),
            "outputs": _outputs(masked, clean, outputs, ids),
            "components": _components(module, layers, self.threshold),
        }


def node_numbers(layers: list[Layer]) -> list[Tensor]:
    """The number of every node within its prompt [batch, pos, K], in order of layer, position and component."""
    start = torch.zeros(layers[0].nodes.shape[0], dtype=torch.long)
    numbers = []
    for layer in layers:
        flat = layer.nodes.cpu().flatten(1).long()
        numbers.append((start[:, None] + flat.cumsum(1) - 1).reshape(layer.nodes.shape))
        start = start + flat.sum(1)
    return numbers


def _array(tensor: Tensor, dtype: Any) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(dtype)


def _prompts(prompts: Prompts, ids: list[int]) -> pl.DataFrame:
    vectors = prompts.inputs.is_floating_point()
    token_ids = [row.nonzero().flatten().tolist() if vectors else row.tolist() for row in prompts.inputs]
    tokens = [
        [f"f{i}={row[i]:.3g}" if vectors else str(i) for i in held]
        for row, held in zip(prompts.inputs.tolist(), token_ids, strict=True)
    ]
    columns = {"prompt_id": ids, "token_ids": token_ids, "tokens": tokens}
    columns |= {"source": prompts.sources, "split": prompts.splits}
    types = {"prompt_id": pl.UInt64, "token_ids": pl.List(pl.UInt32), "tokens": pl.List(pl.String)}
    return pl.DataFrame(columns, schema_overrides=types)


def _nodes(layers: list[Layer], numbers: list[Tensor], ids: list[int]) -> pl.DataFrame:
    prompt_ids = np.array(ids, dtype=np.uint64)
    frames = []
    for layer, number in zip(layers, numbers, strict=True):
        at = layer.nodes.nonzero(as_tuple=True)
        frame = pl.DataFrame(
            {
                "prompt_id": prompt_ids[_array(at[0], np.int64)],
                "node": _array(number[tuple(i.cpu() for i in at)], np.uint32),
                "pos": _array(at[1], np.uint16),
                "component": _array(at[2], np.uint32),
                "activation": _array(layer.value[at], np.float32),
            }
        )
        importance = None if layer.importance is None else _array(layer.importance[at], np.float32)
        frames.append(
            frame.with_columns(
                kind=pl.lit(layer.kind),
                layer=pl.lit(layer.name),
                importance=pl.lit(None, pl.Float32) if importance is None else pl.Series(importance),
            )
        )
    return pl.concat(frames).sort("prompt_id", "node")


def _edges(edges: list[Edges], numbers: list[Tensor], ids: list[int]) -> pl.DataFrame:
    prompt_ids = np.array(ids, dtype=np.uint64)
    columns: dict[str, list[np.ndarray]] = {"prompt_id": [], "source": [], "target": [], "attribution": []}
    for e in edges:
        b, s, t = e.prompt.cpu(), e.source_at.cpu(), e.target_at.cpu()
        columns["prompt_id"].append(prompt_ids[b.numpy()])
        columns["source"].append(_array(numbers[e.source][b, s[:, 0], s[:, 1]], np.uint32))
        columns["target"].append(_array(numbers[e.target][b, t[:, 0], t[:, 1]], np.uint32))
        columns["attribution"].append(_array(e.attribution, np.float32))
    empty = {"prompt_id": np.uint64, "source": np.uint32, "target": np.uint32, "attribution": np.float32}
    joined = {k: np.concatenate([np.empty(0, empty[k]), *v]).astype(empty[k]) for k, v in columns.items()}
    return pl.DataFrame(joined).sort("prompt_id", "source", "target")


def _outputs(masked: Tensor, clean: Clean, nodes: OutputNodes, ids: list[int]) -> pl.DataFrame:
    """What the model gives under its importances beside what the target gives, at the output nodes."""
    shape = (masked.shape[0], -1, masked.shape[-1])
    ci, target = masked.detach().reshape(shape), clean.output.reshape(shape)
    at = nodes(ci).nonzero(as_tuple=True)
    columns: dict[str, Any] = {
        "prompt_id": np.array(ids, dtype=np.uint64)[_array(at[0], np.int64)],
        "pos": _array(at[1], np.uint16),
        "token_id": _array(at[2], np.uint32),
    }
    tokens = masked.ndim == 3
    for name, logits in (("ci", ci), ("target", target)):
        columns[f"{name}_probability"] = _array(logits.softmax(-1)[at], np.float32) if tokens else None
        columns[f"{name}_logit"] = _array(logits[at], np.float32)
    nullable = {"ci_probability": pl.Float32, "target_probability": pl.Float32}
    return pl.DataFrame(columns, schema_overrides=nullable)


def _components(module: Decomposition, layers: list[Layer], threshold: float) -> pl.DataFrame:
    """Additive counts of this batch; norms, and whether they exceed 5 % of the site's largest, are the weights' own."""
    frames = []
    for layer in layers:
        if layer.kind != "component" or layer.importance is None:
            continue
        parts = module.model[layer.name]
        norms = component_norms(parts.V, parts.U).detach().cpu()
        frames.append(
            pl.DataFrame(
                {
                    "component": np.arange(len(norms), dtype=np.uint32),
                    "firings": _array((layer.importance > threshold).sum((0, 1)), np.int64),
                    "positions": np.full(len(norms), layer.nodes[..., 0].numel(), dtype=np.int64),
                    "importance_sum": _array(layer.importance.sum((0, 1)), np.float64),
                    "activation_sum": _array(layer.value.sum((0, 1)), np.float64),
                    "norm": _array(norms, np.float32),
                    "alive": sizeable(parts.V, parts.U).cpu().numpy(),
                }
            ).with_columns(layer=pl.lit(layer.name))
        )
    return pl.concat(frames)
