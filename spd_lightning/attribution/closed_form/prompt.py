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
        # Tables of edges hold node numbers as 32-bit integers.
        numbers = [number.int() for number in node_numbers(layers)]
        # Lookups of single columns of V are fast if they are rows of a contiguous matrix.
        read = {name: model[name].V.T.contiguous() for name in model.sites}
        # The outputs read the rows of the unembedding; a reading is a linear map of logits.
        unembedding = target.get_submodule(target.layout.unembedding)
        columns = unembedding.weight.T  # [d, vocab]
        read["output"] = spec.reading(columns).T
    return TracedBatch(run, layers, numbers, read)


# ---- one prompt ----------------------------------------------------------------------------------


class NodeVectors(NamedTuple):
    """Nodes, and for each the vector that it writes or reads, or its tangent further on."""

    nodes: Nodes
    vectors: Float[Tensor, "pos K d"]


def side_by_side(parts: list[NodeVectors]) -> NodeVectors:
    """Put the nodes of several layers next to each other."""
    nodes = [part.nodes for part in parts]
    every = Nodes(
        component=torch.cat([some.component for some in nodes], dim=1),
        number=torch.cat([some.number for some in nodes], dim=1),
        real=torch.cat([some.real for some in nodes], dim=1),
    )
    vectors = torch.cat([part.vectors for part in parts], dim=1)
    return NodeVectors(every, vectors)


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
        self.prompt = prompt
        self.read = batch.read
        run = batch.run
        self.run = run
        self.output = run.output[prompt]  # [pos, K]
        self.length = len(self.output)

        spec = run.spec
        self.frozen = spec.frozen
        self.model = spec.model
        self.target: Any = spec.model.target
        self.layout = self.target.layout
        self.rotary = self.target.rotary(self.length)

        self.nodes: dict[str, Nodes] = {}
        self.whole: dict[str, list[NodeVectors]] = {}
        for layer, numbers in zip(batch.layers, batch.numbers, strict=True):
            name = layer.name
            nodes = lay_out_nodes(layer.nodes[prompt], numbers[prompt])
            if layer.kind in ("component", "output"):
                self.nodes[name] = nodes
                continue
            written = run.whole[layer.kind, name][prompt]  # [pos, d]
            single = NodeVectors(nodes, written[:, None])
            self.whole.setdefault(name, []).append(single)

    def recorded(self, values: Mapping[Any, Tensor], key: Any) -> Tensor:
        """Return the part of a recorded quantity that belongs to this prompt."""
        return values[key][self.prompt]

    def all_sites(self, *names: str) -> bool:
        """Return whether all these maps are sites."""
        return self.model.sites.keys() >= set(names)

    # ---- writing and reading ---------------------------------------------------------------------

    def writes(self, name: str) -> bool:
        """Return whether any nodes write at the output of a map."""
        if name in self.whole:
            return True
        return name in self.model.sites

    def writer(self, name: str) -> NodeVectors:
        """Return w_i U_i of every node of a site, and the nodes that stand for a whole position."""
        single = self.whole.get(name, [])
        if name not in self.model.sites:
            return side_by_side(single)
        nodes = self.nodes[name]
        U = self.model[name].U  # [C, d]
        U_of_nodes = embedding(nodes.component, U)  # [pos, K, d]
        w = self.recorded(self.run.weight, name)  # [pos, C]
        w_of_nodes = nodes.pick(w)  # [pos, K]
        written = U_of_nodes * w_of_nodes[..., None]  # w_i U_i
        components = NodeVectors(nodes, written)
        return side_by_side([components, *single])

    def reader(self, name: str) -> NodeVectors:
        """Return V_j of every node of a site, or the vector of every output."""
        nodes = self.nodes[name]
        read = self.read[name]  # [C, d]
        vectors = embedding(nodes.component, read)  # [pos, K, d]
        return NodeVectors(nodes, vectors)

    def value(self, name: str) -> Float[Tensor, "pos K"]:
        """Return the value of every node of a site, or of every output."""
        nodes = self.nodes[name]
        if name == "output":
            return nodes.pick(self.output)
        a = self.recorded(self.run.inner, name)  # [pos, C]
        return nodes.pick(a)

    # ---- parts of a block ------------------------------------------------------------------------

    def map_output(self, name: str) -> Float[Tensor, "pos d_out"]:
        """Return the output of a map on this prompt."""
        module = self.target.get_submodule(name)
        return self.recorded(self.run.map_outputs, module)

    def heads(self, block: BlockLayout) -> Heads:
        """Return the attention of a block on this prompt."""
        attn = self.target.get_submodule(block.attn)
        projected = [self.map_output(name) for name in block.qkv]
        as_batch = [vectors[None] for vectors in projected]  # [1, pos, d_heads] each
        q, k, v = attn.heads_of(*as_batch, self.rotary)  # [1, head, pos, d_head] each
        pattern = attn.pattern(q, k)  # [1, head, pos, pos]
        return Heads(q[0], k[0], v[0], pattern[0])

    def slopes(self, block: BlockLayout) -> dict[str, Float[Tensor, "pos neurons"]]:
        """Return for each map into the neurons the derivative of the neurons' outputs by it.

        With one map, the neurons are φ(h): the slope is φ'(h). With a gate h and another factor u,
        they are φ(h) u: the slopes are φ'(h) u and φ(h). In frozen graphs φ' is the secant, and
        both slopes are halved, because two paths meet in one product (A6, rule 5).
        """
        act = self.target.get_submodule(block.mlp).act
        inputs = [self.map_output(name) for name in block.neuron_maps]
        if len(inputs) == 1:
            (c_fc,) = block.neuron_maps
            (h,) = inputs
            return {c_fc: slope(act, h, self.frozen)}
        gate_proj, up_proj = block.neuron_maps
        gate, up = inputs
        share = 1.0
        if self.frozen:
            share = 0.5
        by_gate = share * slope(act, gate, self.frozen) * up
        by_up = share * act(gate)
        return {gate_proj: by_gate, up_proj: by_up}


def slope(act: nn.Module, h: Tensor, frozen: bool) -> Tensor:
    """Return φ'(h) of an activation function, or in frozen graphs its secant (A6, rule 4)."""
    match act:
        case nn.GELU() if frozen:
            return gelu_secant(h, act.approximate)
        case nn.GELU():
            ones = torch.ones_like(h)
            return torch.ops.aten.gelu_backward(ones, h, approximate=act.approximate)
        case nn.SiLU() if frozen:
            return torch.sigmoid(h)
        case nn.SiLU():
            ones = torch.ones_like(h)
            return torch.ops.aten.silu_backward(ones, h)
        case nn.ReLU():
            is_open = h > 0
            return is_open.to(h.dtype)
    raise TypeError(f"the slope of {type(act).__name__} is not known")
