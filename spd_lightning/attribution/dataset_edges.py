"""Sums of the edges between two components over a corpus (section A of docs/method.md).

1. *Edges* are those of the prompt graphs: between nodes (A3), over all positions, and from every
   s' ≤ s through keys and values. Two sums are kept: of `A`, and of `A·sign(a_T)`, the attribution
   to `|a_T|`.
2. *Sums.* In decoders, `EdgeSums` receives what the closed forms compute, and adds it up by
   component before any single edge exists: through keys and values first over the positions that
   read, then over those that are read. A target has two columns, one for places where its value is
   positive or 0, and one for places where it is negative. The sum and the difference of these
   columns are the two sums wanted, so the second costs nothing. For other models, the edges from
   batched products are added up.
3. *Normalizers*: firings, importances and squares of every component, for readers to divide by.

An embedding that is not a site has one source for each of its rows: a token, or a position. Rests
and biases of frozen graphs are one source each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spd_lightning.attribution.autograd import LayerEdges, prompt_edges
from spd_lightning.attribution.closed_form.prompt import TracedPrompt, trace_batch
from spd_lightning.attribution.closed_form.trace import closed_form_obstacle
from spd_lightning.attribution.closed_form.walk import compute_edges
from spd_lightning.attribution.edge_sums import EdgeSums, EmbeddingRows, Entries, PairSums
from spd_lightning.attribution.graph import GraphSpec, Layer, NodeKind
from spd_lightning.decomposition.model import ComponentModel

# ---- results -------------------------------------------------------------------------------------


class NodeSums(NamedTuple):
    """Sums over the nodes of one layer, by component, or by embedding row that occurs.

    firings: the number of positions at which it is a node.
    importance: Σ g over all positions; for layers without g, the firings.
    square: Σ a² over all positions; for rows of an embedding, the squared norm of what they write.
    size: Σ |a| over the positions at which it is a node.
    """

    kind: NodeKind
    layer: str
    component: Int64[Tensor, " entries"]
    firings: Int64[Tensor, " entries"]
    importance: Float64[Tensor, " entries"]
    square: Float64[Tensor, " entries"]
    size: Float64[Tensor, " entries"]


def dataset_edges(
    spec: GraphSpec, wanted: Callable[[str], bool] = lambda layer: True
) -> tuple[list[NodeSums], list[PairSums]]:
    """Add up the prompt graphs of a batch; closed forms make no single edge for it.

    wanted: chooses layers by name; only edges with both ends in such layers are included.
    """
    closed = closed_form_obstacle(spec.model, spec.mode) is None
    sums = _sum_closed_forms(spec, wanted) if closed else _sum_vjp_edges(spec)
    nodes = [
        node_sums(layer, entries)
        for layer, entries in zip(sums.layers, sums.entries, strict=True)
        if wanted(layer.name)
    ]
    pairs = [
        pair for pair in sums.pairs() if wanted(pair.source_layer) and wanted(pair.target_layer)
    ]
    return nodes, pairs


def _sum_closed_forms(spec: GraphSpec, wanted: Callable[[str], bool]) -> EdgeSums:
    """Add up the blocks of edges that a decoder's closed forms give."""
    batch = trace_batch(spec)
    tokens = spec.inputs
    layers = [
        layer if layer.whole or wanted(layer.name) else _without_nodes(layer)
        for layer in batch.layers
    ]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    sums = EdgeSums(layers, {"wte": tokens, "wpe": positions})
    batch = batch._replace(layers=layers, numbers=sums.slots)
    for prompt in range(len(tokens)):
        compute_edges(TracedPrompt(batch, prompt), sums)
        sums.end_prompt()
    return sums


def _without_nodes(layer: Layer) -> Layer:
    return layer._replace(nodes=torch.zeros_like(layer.nodes))


def _sum_vjp_edges(spec: GraphSpec) -> EdgeSums:
    """Add up edges one by one."""
    prompts = len(spec.inputs)
    layers, edges = prompt_edges(spec)
    sums = EdgeSums(layers, looked_up(spec.model, spec.inputs))
    by_prompt = [split_by_prompt(each, prompts) for each in edges]
    for prompt in range(prompts):
        for pieces in by_prompt:
            sums.add_listed(pieces[prompt])
        sums.end_prompt()
    return sums


def split_by_prompt(edges: LayerEdges, prompts: int) -> list[LayerEdges]:
    """Split the edges of a batch of prompts into those of each prompt."""
    order = edges.prompt.argsort(stable=True)
    sizes = torch.bincount(edges.prompt, minlength=prompts).tolist()
    columns = [column[order].split(sizes) for column in edges[2:]]
    return [LayerEdges(edges.source, edges.target, *parts) for parts in zip(*columns, strict=True)]


# ---- rows of embeddings --------------------------------------------------------------------------


class _LookUps(TorchFunctionMode):
    """While open, records the rows that embeddings look up.

    Args:
        names: the names of the embeddings, by the `id` of their weights.
    """

    def __init__(self, names: Mapping[int, str]):
        super().__init__()
        self.names = names
        self.rows = dict[str, Tensor]()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.embedding and (name := self.names.get(id(args[1]))):
            self.rows[name] = args[0]
        return func(*args, **(kwargs or {}))


def looked_up(model: ComponentModel, inputs: Tensor) -> EmbeddingRows:
    """Return the rows that the target's embeddings look up, by the embeddings' names."""
    tables = {
        name: module
        for name, module in model.target.named_modules()
        if isinstance(module, nn.Embedding)
    }
    if not tables:
        return {}
    names = {id(module.weight): name for name, module in tables.items()}
    with torch.no_grad(), _LookUps(names) as seen:
        model.target(inputs)
    rows = {}
    for name, ids in seen.rows.items():
        by_prompt = ids.view(inputs.shape) if len(ids) == inputs.numel() else ids
        rows[name] = by_prompt.expand(len(inputs), by_prompt.shape[-1])
    return rows


# ---- nodes ---------------------------------------------------------------------------------------


def node_sums(layer: Layer, entries: Entries) -> NodeSums:
    """Add up one layer's nodes."""
    value = layer.value.detach()
    square = value.square()
    if layer.whole:
        rank = entries.rank.flatten().long()
        count = len(entries.known)
        firings = torch.bincount(rank, minlength=count)
        total = torch.bincount(rank, square.flatten().double(), minlength=count)
        size = torch.bincount(rank, square.sqrt().flatten().double(), minlength=count)
        return NodeSums(
            layer.kind, layer.name, entries.known, firings, firings.double(), total, size
        )
    firings = layer.nodes.sum((0, 1))
    g = layer.importance
    importance = firings.double() if g is None else g.sum((0, 1), dtype=torch.float64)
    every = torch.arange(len(firings), device=firings.device)
    total = square.sum((0, 1), dtype=torch.float64)
    size = (value.abs() * layer.nodes).sum((0, 1), dtype=torch.float64)
    return NodeSums(layer.kind, layer.name, every, firings, importance, total, size)


def sums_gap(model: ComponentModel, nodes: Sequence[NodeSums], pairs: Sequence[PairSums]) -> float:
    """Return how far the sums of in-edges miss the sizes of their targets; 0 if frozen (A6).

    It is Σ_j |Σ |a_j| − Σ in-edges·sign(a_j)| / Σ_j Σ |a_j| over components j (except those of
    embeddings) and outputs; each inner sum is over all places where j is a node.
    """
    fed = {name for name, site in model.sites.items() if site.kind != "embedding"} | {"output"}
    missed, size = 0.0, 0.0
    for node in nodes:
        if node.layer not in fed or node.kind not in ("component", "output"):
            continue
        entered = torch.zeros_like(node.size)
        for pair in pairs:
            if pair.target_layer == node.layer:
                entered.index_add_(0, pair.target, pair.size)
        missed += float((node.size - entered).abs().sum())
        size += float(node.size.sum())
    return missed / size if size else 0.0
