"""The nodes of one prompt of a decoder, with what each writes or reads: vectors at positions."""

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import embedding

from spd_lightning.attribution.closed_form.sinks import Nodes, T, Taker, nodes_of
from spd_lightning.attribution.closed_form.trace import Trace, layers_of, trace
from spd_lightning.attribution.graph import Layer, Subject, node_numbers
from spd_lightning.attribution.linearize import gelu_secant


class Batch(NamedTuple):
    """A traced batch of prompts, with its layers, the numbers of their nodes, and what readers read.

    read: Vᵀ of every site, and what the outputs read where the unembedding is not a site [K, d].
    """

    run: Trace
    layers: list[Layer]
    numbers: list[Tensor]
    read: Mapping[str, Tensor]


def batch_of(of: Subject) -> Batch:
    """Runs a batch of prompts and lays its graphs out."""
    target: Any = of.model.target
    with torch.no_grad():
        run = trace(of)
        layers = layers_of(run)
        read = {name: of.model[name].V.T.contiguous() for name in of.model.sites}
        read["output"] = of.reading(target.lm_head.weight.T).T
        return Batch(run, layers, [number.int() for number in node_numbers(layers)], read)


class Rows(NamedTuple):
    """Nodes and a vector of each: what it writes, or what it reads."""

    nodes: Nodes
    vectors: Float[Tensor, "pos K d"]


def beside(parts: list[Rows]) -> Rows:
    """The nodes of several layers side by side."""
    columns = (torch.cat(column, dim=1) for column in zip(*(part.nodes for part in parts), strict=True))
    return Rows(Nodes(*columns), torch.cat([part.vectors for part in parts], dim=1))


class PromptRows(Generic[T]):
    """One prompt of a traced batch: its nodes, what they write, what they read.

    Args:
        batch: of a decoder.
        prompt: which prompt of the batch.
        taken: what becomes of the edges.
    """

    def __init__(self, batch: Batch, prompt: int, taken: Taker[T]):
        self.run, self.prompt, self.read, self.taken = batch.run, prompt, batch.read, taken
        self.model, self.frozen = self.run.of.model, self.run.of.frozen
        self.target: Any = self.model.target
        self.rotary = self.target.rotary(len(self.run.output[prompt]))
        laid = {
            (layer.kind, layer.name): nodes_of(layer.nodes[prompt], held[prompt])
            for layer, held in zip(batch.layers, batch.numbers, strict=True)
        }
        self.nodes = {name: nodes for (kind, name), nodes in laid.items() if kind in ("component", "output")}
        self.whole: dict[str, list[Rows]] = {}
        for (kind, name), vectors in self.run.whole.items():
            self.whole.setdefault(name, []).append(Rows(laid[kind, name], vectors[prompt][:, None]))

    # ---- what nodes write and read ------------------------------------------------------------------------------

    def at(self, values: Mapping[Any, Tensor], key: Any) -> Tensor:
        """Return the part of a trace that belongs to this prompt."""
        return values[key][self.prompt]

    def writer(self, name: str) -> Rows:
        """w_i U_i of every node of a site, and what the nodes write that stand for a position's whole."""
        if name not in self.model.sites:
            return beside(self.whole[name])
        nodes = self.nodes[name]
        w = nodes.pick(self.at(self.run.weight, name))
        return beside(
            [Rows(nodes, embedding(nodes.component, self.model[name].U) * w[..., None]), *self.whole.get(name, [])]
        )

    def writes(self, name: str) -> bool:
        """Whether nodes write where a map does."""
        return name in self.model.sites or name in self.whole

    def reader(self, name: str) -> Rows:
        """V_j of every node of a site."""
        return Rows(self.nodes[name], embedding(self.nodes[name].component, self.read[name]))

    def slopes(self, mlp: Any, name: str) -> dict[str, Tensor]:
        """The maps that feed an MLP's neurons, and how a neuron's output moves with each [pos, neurons]."""
        if hasattr(mlp, "c_fc"):
            return {f"{name}.c_fc": slope(mlp.act, self.at(self.run.out, mlp.c_fc), self.frozen)}
        g, u = (self.at(self.run.out, m) for m in (mlp.gate_proj, mlp.up_proj))
        share = 0.5 if self.frozen else 1.0  # two paths meet
        return {f"{name}.gate_proj": share * slope(mlp.act, g, self.frozen) * u, f"{name}.up_proj": share * mlp.act(g)}

    def same(self, writers: Rows, readers: Rows) -> T:
        """Edges at each position: inner products of what is written with what is read."""
        return self.taken.same(writers.nodes, readers.nodes, writers.vectors @ readers.vectors.transpose(1, 2))


def slope(act: nn.Module, h: Tensor, frozen: bool) -> Tensor:
    """How an activation function moves with its input: φ'(h), or in frozen graphs the secant (A6, rule 4)."""
    match act:
        case nn.GELU() if frozen:
            return gelu_secant(h, act.approximate)
        case nn.GELU():
            return torch.ops.aten.gelu_backward(torch.ones_like(h), h, approximate=act.approximate)
        case nn.SiLU():
            return torch.sigmoid(h) if frozen else torch.ops.aten.silu_backward(torch.ones_like(h), h)
        case nn.ReLU():
            return (h > 0).to(h.dtype)
    raise TypeError(f"the slope of {type(act).__name__} is not known")
