"""The specification of attribution graphs, and their parts (section A of docs/method.md).

A `Subject` says what is asked: a decomposed model on some prompts, in which kind of graph (`Mode`), and what its nodes
are. The answer is a list of `Layer`s, whose nodes are numbered within each prompt, and `EdgeTable`s between them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd_lightning.attribution.outputs import OutputNodes, Outputs, Reading, every_output, reading_of
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput, nearest

# ---- the question ---------------------------------------------------------------------------------------------------

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


def known_mode(name: str, place: str) -> ModeName:
    """A kind of graph by its name, given to something.

    Raises:
        BadInput: there is none.
    """
    if name not in MODES:
        raise BadInput(f"mode '{name}' in {place}: no such kind of graph; {nearest(name, MODES)}")
    return name


Threshold = float | Mapping[str, Tensor]
"""Importance above which a component is a node: one for all, or of every site a tensor that broadcasts with its g."""


class Subject(NamedTuple):
    """The specification of graphs: a decomposed model, a batch of prompts, a mode, and which nodes to include.

    inputs: [batch, features] floating point, or [batch, pos] token ids. importances: g of their clean run, by site.
    threshold: above which importance a component is a node. outputs: which outputs are nodes, and what they stand for.
    """

    model: ComponentModel
    inputs: Tensor
    importances: Mapping[str, Tensor]
    mode: Mode
    threshold: Threshold = 0.0
    outputs: OutputNodes = every_output

    @property
    def frozen(self) -> bool:
        """Whether maps are made to add up (A6)."""
        return self.mode.linearization == "frozen"

    @property
    def reading(self) -> Reading:
        """Return the quantity that output nodes stand for."""
        return reading_of(self.outputs)

    def held(self, site: str, g: Tensor) -> Tensor:
        """Mark the components of a site that are nodes, by their importance g (A3)."""
        return g > (self.threshold[site] if isinstance(self.threshold, Mapping) else self.threshold)

    def alone(self, prompt: int, outputs: Bool[Tensor, "batch pos K"]) -> "Subject":
        """One prompt of the batch, whose output nodes are given."""
        one, threshold = slice(prompt, prompt + 1), self.threshold
        if isinstance(threshold, Mapping):
            threshold = {site: t.expand_as(self.importances[site])[one] for site, t in threshold.items()}
        return self._replace(
            inputs=self.inputs[one],
            importances={site: g[one] for site, g in self.importances.items()},
            threshold=threshold,
            outputs=Outputs(lambda output: outputs[one], self.reading),
        )


# ---- the answer -----------------------------------------------------------------------------------------------------

NodeKind = Literal["component", "input", "embedding", "output", "rest", "bias"]


def shape3(x: Tensor) -> tuple[int, int, int]:
    """[batch, K] and [batch, pos, K] alike as (batch, pos, K)."""
    return x.shape[0], x.shape[1] if x.ndim == 3 else 1, x.shape[-1]


class Layer(NamedTuple):
    """One row of the graph on a batch of prompts, as a source, a target, or both.

    leaf: what gradients are taken to, or None for a pure target. value [batch, pos, K]: what gradients are taken of.
    nodes [batch, pos, K]: which entries are nodes. importance: of components. whole: the leaf is one node a position,
    whatever its width.
    """

    name: str
    kind: NodeKind
    leaf: Tensor | None
    value: Float[Tensor, "batch pos K"]
    nodes: Bool[Tensor, "batch pos K"]
    importance: Float[Tensor, "batch pos K"] | None = None
    whole: bool = False

    def contributions(self, gradient: Tensor) -> Float[Tensor, "targets batch pos K"]:
        """gradient × value of every node: the edges from this layer to some targets (A1, A2)."""
        assert self.leaf is not None
        product = (gradient * self.leaf.detach()).reshape(len(gradient), *shape3(self.leaf))
        return product.sum(-1, keepdim=True) if self.whole else product


class EdgeTable(NamedTuple):
    """Edges as a flat table: per edge its prompt in the batch, the numbers of both nodes there, and its attribution."""

    prompt: Tensor
    source: Tensor
    target: Tensor
    attribution: Tensor


def node_numbers(layers: list[Layer]) -> list[Int[Tensor, "batch pos K"]]:
    """The number of every node within its prompt, in order of layer, position and component; elsewhere nonsense."""
    start, found = 0, []
    for layer in layers:
        counted = layer.nodes.flatten(1).cumsum(1)
        found.append((counted - 1 + start).view(layer.nodes.shape))
        start = counted[:, -1:] + start
    return found


def joined(tables: Sequence[EdgeTable]) -> EdgeTable:
    """Several tables as one."""
    return tables[0] if len(tables) == 1 else EdgeTable(*(torch.cat(column) for column in zip(*tables, strict=True)))
