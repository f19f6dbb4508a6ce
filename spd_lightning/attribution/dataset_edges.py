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
    if closed_form_obstacle(spec.model, spec.mode) is None:
        sums = _sum_closed_forms(spec, wanted)
    else:
        sums = _sum_vjp_edges(spec)

    nodes = list[NodeSums]()
    for layer, entries in zip(sums.layers, sums.entries, strict=True):
        if wanted(layer.name):
            nodes.append(node_sums(layer, entries))

    pairs = list[PairSums]()
    for pair in sums.pairs():
        if wanted(pair.source_layer) and wanted(pair.target_layer):
            pairs.append(pair)
    return nodes, pairs


def _sum_closed_forms(spec: GraphSpec, wanted: Callable[[str], bool]) -> EdgeSums:
    """Add up the blocks of edges that a decoder's closed forms give."""
    batch = trace_batch(spec)
    layers = []
    for layer in batch.layers:
        if not layer.whole and not wanted(layer.name):
            layer = _without_nodes(layer)
        layers.append(layer)
    tokens = spec.inputs  # [batch, pos]
    prompts, length = tokens.shape
    positions = torch.arange(length, device=tokens.device)
    rows = {"wte": tokens, "wpe": positions.expand_as(tokens)}
    sums = EdgeSums(layers, rows)
    batch = batch._replace(layers=layers, numbers=sums.slots)
    for number in range(prompts):
        prompt = TracedPrompt(batch, number)
        compute_edges(prompt, sums)
        sums.end_prompt()
    return sums


def _without_nodes(layer: Layer) -> Layer:
    nodes = torch.zeros_like(layer.nodes)
    return layer._replace(nodes=nodes)


def _sum_vjp_edges(spec: GraphSpec) -> EdgeSums:
    """Add up edges one by one."""
    prompts = len(spec.inputs)
    layers, edges = prompt_edges(spec)
    rows = looked_up(spec.model, spec.inputs)
    sums = EdgeSums(layers, rows)
    by_prompt = [split_by_prompt(piece, prompts) for piece in edges]
    for prompt in range(prompts):
        for pieces in by_prompt:
            sums.add_listed(pieces[prompt])
        sums.end_prompt()
    return sums


def split_by_prompt(edges: LayerEdges, prompts: int) -> list[LayerEdges]:
    """Split the edges of a batch of prompts into those of each prompt."""
    order = edges.prompt.argsort(stable=True)
    count = torch.bincount(edges.prompt, minlength=prompts)
    sizes = count.tolist()
    _, _, *columns = edges  # all but the numbers of the layers
    parts_of_columns = [column[order].split(sizes) for column in columns]
    by_prompt = zip(*parts_of_columns, strict=True)
    return [LayerEdges(edges.source, edges.target, *parts) for parts in by_prompt]


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
        if func is nn.functional.embedding:
            rows, table, *_ = args
            name = self.names.get(id(table))
            if name is not None:
                self.rows[name] = rows
        if kwargs is None:
            kwargs = {}
        return func(*args, **kwargs)


def looked_up(model: ComponentModel, inputs: Tensor) -> EmbeddingRows:
    """Return the rows that the target's embeddings look up, by the embeddings' names."""
    names = {}
    for name, module in model.target.named_modules():
        if isinstance(module, nn.Embedding):
            names[id(module.weight)] = name
    if not names:
        return {}
    with torch.no_grad(), _LookUps(names) as seen:
        model.target(inputs)
    rows = {}
    for name, ids in seen.rows.items():
        if len(ids) == inputs.numel():
            # The model flattens batch and positions.
            ids = ids.view(inputs.shape)
        # Positions are looked up once for all prompts.
        rows[name] = ids.expand(len(inputs), -1)
    return rows


# ---- nodes ---------------------------------------------------------------------------------------


def node_sums(layer: Layer, entries: Entries) -> NodeSums:
    """Add up one layer's nodes."""
    if layer.whole:
        return _whole_sums(layer, entries)
    value = layer.value.detach()  # [batch, pos, C]
    firings = layer.nodes.sum((0, 1))  # [C]
    size = value.abs() * layer.nodes
    g = layer.importance
    importance = firings.double()
    if g is not None:
        importance = g.sum((0, 1), dtype=torch.float64)
    return NodeSums(
        kind=layer.kind,
        layer=layer.name,
        component=torch.arange(len(firings), device=firings.device),
        firings=firings,
        importance=importance,
        square=value.square().sum((0, 1), dtype=torch.float64),
        size=size.sum((0, 1), dtype=torch.float64),
    )


def _whole_sums(layer: Layer, entries: Entries) -> NodeSums:
    """Add up the nodes of a layer with a single one at each position, by the row that it is."""
    rank = entries.rank.flatten().long()  # [batch * pos]
    count = len(entries.known)
    square = layer.value.detach().square().flatten()
    size = square.sqrt()
    firings = torch.bincount(rank, minlength=count)
    return NodeSums(
        kind=layer.kind,
        layer=layer.name,
        component=entries.known,
        firings=firings,
        importance=firings.double(),
        square=torch.bincount(rank, square.double(), minlength=count),
        size=torch.bincount(rank, size.double(), minlength=count),
    )


def sums_gap(model: ComponentModel, nodes: Sequence[NodeSums], pairs: Sequence[PairSums]) -> float:
    """Return how far the sums of in-edges miss the sizes of their targets; 0 if frozen (A6).

    It is Σ_j |Σ |a_j| − Σ in-edges·sign(a_j)| / Σ_j Σ |a_j| over components j (except those of
    embeddings) and outputs; each inner sum is over all places where j is a node.
    """
    has_in_edges = {name for name, site in model.sites.items() if site.kind != "embedding"}
    has_in_edges.add("output")
    missed = 0.0
    size = 0.0
    for node in nodes:
        if node.kind not in ("component", "output"):
            continue
        if node.layer not in has_in_edges:
            continue
        # Σ in-edges·sign(a_j), by component j
        inflow = torch.zeros_like(node.size)
        for pair in pairs:
            if pair.target_layer == node.layer:
                inflow.index_add_(0, pair.target, pair.size)
        gap = node.size - inflow
        missed += float(gap.abs().sum())
        size += float(node.size.sum())
    return missed / size if size else 0.0
