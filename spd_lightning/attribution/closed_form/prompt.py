"""The nodes of one prompt of a decoder, and the vectors that they write and read."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import embedding

from spd_lightning.attribution.closed_form.jvp import Heads
from spd_lightning.attribution.closed_form.sinks import Nodes, lay_out_nodes
from spd_lightning.attribution.closed_form.trace import Trace, layers_of, trace
from spd_lightning.attribution.graph import GraphSpec, Layer, node_numbers
from spd_lightning.attribution.linearize import gelu_secant
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.targets.decoder_layout import BlockLayout

# ---- a batch of prompts --------------------------------------------------------------------------


class TracedBatch(NamedTuple):
    """A recorded batch of prompts: its layers, their node numbers, and the readers' vectors.

    read: Vᵀ of every site; under "output" the vectors of the outputs, for an unembedding that is
    not a site [K, d].
    """

    run: Trace
    layers: list[Layer]
    numbers: list[Tensor]
    read: Mapping[str, Tensor]


def trace_batch(spec: GraphSpec) -> TracedBatch:
    """Run a batch of prompts and lay out its graphs."""
    model: ComponentModel = spec.model
    target: Any = model.target
    with torch.no_grad():
        run = trace(spec)
        layers = layers_of(run)
        read = {name: model[name].V.T.contiguous() for name in model.sites}
        unembedding = target.get_submodule(target.layout.unembedding)
        read["output"] = spec.reading(unembedding.weight.T).T
        return TracedBatch(run, layers, [n.int() for n in node_numbers(layers)], read)


# ---- one prompt ----------------------------------------------------------------------------------


class NodeVectors(NamedTuple):
    """Nodes, and for each the vector that it writes or reads, or its tangent further on."""

    nodes: Nodes
    vectors: Float[Tensor, "pos K d"]


def side_by_side(parts: list[NodeVectors]) -> NodeVectors:
    """Put the nodes of several layers next to each other."""
    nodes = Nodes(
        component=torch.cat([part.nodes.component for part in parts], dim=1),
        number=torch.cat([part.nodes.number for part in parts], dim=1),
        real=torch.cat([part.nodes.real for part in parts], dim=1),
    )
    vectors = torch.cat([part.vectors for part in parts], dim=1)
    return NodeVectors(nodes, vectors)


class TracedPrompt:
    """One prompt of a recorded batch: its nodes, and the vectors that they write and read.

    Args:
        batch: the recorded batch.
        prompt: the number of the prompt in the batch.

    Attributes:
        nodes: the nodes of sites and of the output, by layer.
        whole: the single nodes of other layers (embeddings, rests, biases), by layer.
    """

    def __init__(self, batch: TracedBatch, prompt: int):
        self.run, self.prompt, self.read = batch.run, prompt, batch.read
        self.model, self.frozen = self.run.spec.model, self.run.spec.frozen
        self.target: Any = self.model.target
        self.layout = self.target.layout
        self.length = len(self.run.output[prompt])
        self.rotary = self.target.rotary(self.length)
        nodes = {
            (layer.kind, layer.name): lay_out_nodes(layer.nodes[prompt], numbers[prompt])
            for layer, numbers in zip(batch.layers, batch.numbers, strict=True)
        }
        self.nodes = {
            name: laid for (kind, name), laid in nodes.items() if kind in ("component", "output")
        }
        self.whole: dict[str, list[NodeVectors]] = {}
        for (kind, name), vectors in self.run.whole.items():
            part = NodeVectors(nodes[kind, name], vectors[prompt][:, None])
            self.whole.setdefault(name, []).append(part)

    def at(self, values: Mapping[Any, Tensor], key: Any) -> Tensor:
        """Return the part of a trace that belongs to this prompt."""
        return values[key][self.prompt]

    def all_sites(self, *names: str) -> bool:
        """Return whether all these maps are sites."""
        return all(name in self.model.sites for name in names)

    # ---- writing and reading ---------------------------------------------------------------------

    def writes(self, name: str) -> bool:
        """Return whether any nodes write at the output of a map."""
        return name in self.model.sites or name in self.whole

    def writer(self, name: str) -> NodeVectors:
        """Return w_i U_i of every node of a site, and the nodes that stand for a whole position."""
        if name not in self.model.sites:
            return side_by_side(self.whole[name])
        nodes = self.nodes[name]
        w = nodes.pick(self.at(self.run.weight, name))  # [pos, K]
        components = NodeVectors(
            nodes, embedding(nodes.component, self.model[name].U) * w[..., None]
        )
        return side_by_side([components, *self.whole.get(name, [])])

    def reader(self, name: str) -> NodeVectors:
        """Return V_j of every node of a site, or the vector of every output."""
        return NodeVectors(self.nodes[name], embedding(self.nodes[name].component, self.read[name]))

    def value(self, name: str) -> Float[Tensor, "pos K"]:
        """Return the value of every node of a site, or of every output."""
        values = self.run.output[self.prompt] if name == "output" else self.at(self.run.inner, name)
        return self.nodes[name].pick(values)

    # ---- parts of a block ------------------------------------------------------------------------

    def heads(self, block: BlockLayout) -> Heads:
        """Return the attention of a block on this prompt."""
        attn = self.target.get_submodule(block.attn)
        maps = (self.target.get_submodule(name) for name in block.qkv)
        projected = (self.at(self.run.map_outputs, module)[None] for module in maps)
        q, k, v = attn.heads_of(*projected, self.rotary)
        return Heads(q[0], k[0], v[0], attn.pattern(q, k)[0])

    def slopes(self, block: BlockLayout) -> dict[str, Float[Tensor, "pos neurons"]]:
        """Return for each map into the neurons the derivative of the neurons' outputs by it."""
        mlp = self.target.get_submodule(block.mlp)
        inputs = [
            self.at(self.run.map_outputs, self.target.get_submodule(name))
            for name in block.neuron_maps
        ]
        if len(inputs) == 1:
            return {block.neuron_maps[0]: slope(mlp.act, inputs[0], self.frozen)}
        gate, up = inputs
        share = 0.5 if self.frozen else 1.0  # in frozen graphs two paths meet in one product
        return {
            block.neuron_maps[0]: share * slope(mlp.act, gate, self.frozen) * up,
            block.neuron_maps[1]: share * mlp.act(gate),
        }


def slope(act: nn.Module, h: Tensor, frozen: bool) -> Tensor:
    """Return φ'(h) of an activation function, or in frozen graphs its secant (A6, rule 4)."""
    match act:
        case nn.GELU() if frozen:
            return gelu_secant(h, act.approximate)
        case nn.GELU():
            ones = torch.ones_like(h)
            return torch.ops.aten.gelu_backward(ones, h, approximate=act.approximate)
        case nn.SiLU():
            return (
                torch.sigmoid(h) if frozen else torch.ops.aten.silu_backward(torch.ones_like(h), h)
            )
        case nn.ReLU():
            return (h > 0).to(h.dtype)
    raise TypeError(f"the slope of {type(act).__name__} is not known")
