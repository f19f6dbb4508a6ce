"""The specification of attribution graphs, and their parts (section A of docs/method.md).

A `GraphSpec` says which graphs to compute: a decomposed model on some prompts, the kind of graph
(`Mode`), and which entries are nodes. The result is a list of `Layer`s, whose nodes are numbered
within each prompt, and `EdgeTable`s between them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd_lightning.attribution.outputs import (
    OutputNodes,
    Outputs,
    Reading,
    every_output,
    reading_of,
)
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput, nearest

# ---- which graphs to compute ---------------------------------------------------------------------

ModeName = Literal["unmasked", "ci_masked", "frozen", "reference"]


@dataclass(frozen=True)
class Mode:
    """A graph's kind: three choices (A5)."""

    mask: Literal["ci", "ones"]
    delta: Literal["off", "cut", "flow"]
    linearization: Literal["jacobian", "frozen"]


MODES: dict[ModeName, Mode] = {
    "unmasked": Mode("ones", "cut", "jacobian"),
    "ci_masked": Mode("ci", "off", "jacobian"),
    "frozen": Mode("ones", "cut", "frozen"),
    "reference": Mode("ones", "flow", "jacobian"),
}


def check_mode(name: str, place: str) -> ModeName:
    """Return the name of a mode, once it is known to exist.

    Raises:
        BadInput: there is no such mode; the message names the place where it was given.
    """
    if name not in MODES:
        raise BadInput(f"mode '{name}' in {place}: no such kind of graph; {nearest(name, MODES)}")
    return name


Threshold = float | Mapping[str, Tensor]
"""The importance above which a component is a node.

Either one number, or for each site a tensor that broadcasts with its g.
"""


class GraphSpec(NamedTuple):
    """The specification of graphs: model, prompts, mode, and which nodes to include.

    inputs: [batch, features] floating point, or [batch, pos] token ids.
    importances: g of the clean run on these prompts, by site.
    threshold: the importance above which a component is a node.
    outputs: which outputs are nodes, and which quantity each stands for.
    """

    model: ComponentModel
    inputs: Tensor
    importances: Mapping[str, Tensor]
    mode: Mode
    threshold: Threshold = 0.0
    outputs: OutputNodes = every_output

    @property
    def frozen(self) -> bool:
        """Whether non-linear maps are replaced by linear ones, so that edges add up (A6)."""
        return self.mode.linearization == "frozen"

    @property
    def reading(self) -> Reading:
        """Return the quantity that output nodes stand for."""
        return reading_of(self.outputs)

    def is_node(self, site: str, g: Tensor) -> Tensor:
        """Mark the components of a site that are nodes, by their importance g (A3)."""
        threshold = self.threshold
        if isinstance(threshold, Mapping):
            return g > threshold[site]
        return g > threshold

    def single_prompt(self, prompt: int, outputs: Bool[Tensor, "batch pos K"]) -> "GraphSpec":
        """Return the specification for one prompt of the batch, with the given output nodes."""
        one = slice(prompt, prompt + 1)
        threshold = self.threshold
        if isinstance(threshold, Mapping):
            thresholds = {}
            for site, above in threshold.items():
                by_prompt = above.expand_as(self.importances[site])
                thresholds[site] = by_prompt[one]
            threshold = thresholds
        importances = {site: g[one] for site, g in self.importances.items()}
        return self._replace(
            inputs=self.inputs[one],
            importances=importances,
            threshold=threshold,
            outputs=Outputs(lambda output: outputs[one], self.reading),
        )


# ---- layers and edges ----------------------------------------------------------------------------

NodeKind = Literal["component", "input", "embedding", "output", "rest", "bias"]
LayerKey = tuple[NodeKind, str]
"""A layer of a graph: the kind of its nodes, and its name."""


def shape3(x: Tensor) -> tuple[int, int, int]:
    """Return the shape of [batch, K] or [batch, pos, K] as (batch, pos, K)."""
    if x.ndim == 3:
        batch, positions, width = x.shape
    else:
        batch, width = x.shape
        positions = 1
    return batch, positions, width


def with_positions(x: Tensor) -> Float[Tensor, "batch pos K"]:
    """Return [batch, K] as [batch, 1, K], and [batch, pos, K] unchanged."""
    if x.ndim == 2:
        return x[:, None]
    return x


class Layer(NamedTuple):
    """One layer of the graphs of a batch of prompts: a source of edges, a target, or both.

    leaf: the tensor with respect to which gradients are taken; None if the layer is only a target.
    value: the tensor whose gradients are taken.
    nodes: which entries are nodes.
    importance: g of components; None in other layers.
    whole: whether the leaf is a single node at each position, whatever its width.
    """

    name: str
    kind: NodeKind
    leaf: Tensor | None
    value: Float[Tensor, "batch pos K"]
    nodes: Bool[Tensor, "batch pos K"]
    importance: Float[Tensor, "batch pos K"] | None = None
    whole: bool = False

    def contributions(self, gradient: Tensor) -> Float[Tensor, "targets batch pos K"]:
        """Return gradient × value of every node: the edges from this layer to targets (A1, A2)."""
        leaf = self.leaf
        assert leaf is not None
        products = gradient * leaf.detach()
        batch, positions, width = shape3(leaf)
        products = products.reshape(len(gradient), batch, positions, width)
        if not self.whole:
            return products
        return products.sum(-1, keepdim=True)


def whole_layer(
    name: str, kind: NodeKind, vectors: Float[Tensor, "batch pos d"], leaf: Tensor | None = None
) -> Layer:
    """Return a layer whose single node at each position stands for the whole vector."""
    size = vectors.norm(dim=-1, keepdim=True)  # [batch, pos, 1]
    return Layer(
        name=name,
        kind=kind,
        leaf=leaf,
        value=size,
        nodes=torch.ones_like(size, dtype=torch.bool),
        whole=True,
    )


class EdgeTable(NamedTuple):
    """Edges as a flat table: prompt in the batch, numbers of both nodes, and attribution."""

    prompt: Tensor
    source: Tensor
    target: Tensor
    attribution: Tensor

    def select(self, rows: Tensor) -> "EdgeTable":
        """Return some of the edges, by their row numbers."""
        columns = [column.index_select(0, rows) for column in self]
        return EdgeTable(*columns)


@runtime_checkable
class LazyEdges(Protocol):
    """The edges of some prompts, computed piece by piece each time they are asked for."""

    def for_each(self, visit: Callable[[EdgeTable], None]) -> None:
        """Compute all edges, and pass each piece to `visit`."""
        ...


def node_numbers(layers: list[Layer]) -> list[Int[Tensor, "batch pos K"]]:
    """Number the nodes within each prompt, in order of layer, position and component.

    Entries that are not nodes get meaningless numbers.
    """
    start: int | Tensor = 0
    numbers = []
    for layer in layers:
        nodes = layer.nodes
        counted = nodes.flatten(1).cumsum(1)  # [batch, pos * K]: nodes up to each entry
        number = counted - 1 + start
        numbers.append(number.view(nodes.shape))
        total = counted[:, -1:]  # [batch, 1]
        start = total + start
    return numbers


def joined(tables: Sequence[EdgeTable]) -> EdgeTable:
    """Join several tables into one."""
    if len(tables) == 1:
        return tables[0]
    parts_of_columns = zip(*tables, strict=True)
    columns = [torch.cat(parts) for parts in parts_of_columns]
    return EdgeTable(*columns)


def no_edges() -> EdgeTable:
    """Return an empty table."""
    none = torch.zeros(0, dtype=torch.int32)
    attribution = torch.zeros(0)
    return EdgeTable(none, none, none, attribution)
