"""Edges through decoder blocks in which only some maps are sites (section A of docs/method.md).

Maps that are not sites pass on whatever reaches them. So the vector that each node wrote continues
as a *tangent* (`jvp`), and the edge to a reader is `V_j · tangent`.

1. Before attention, a tangent stays at its node's position: many nodes next to each other
   (`NodeVectors`).
2. Attention whose maps pass it on spreads it to all later positions (`SpreadTangents`). From there
   it walks on to the outputs, a limited number of nodes at a time.
3. A node that reaches a reader in several ways, for example through queries and values, or through
   a map and around it, has one tangent: their sum.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lightning.attribution.closed_form.jvp import norm_jvp
from spd_lightning.attribution.closed_form.prompt import NodeVectors, TracedPrompt, side_by_side
from spd_lightning.attribution.closed_form.sinks import EdgeSink, SingleNodes
from spd_lightning.targets.decoder_layout import BlockLayout

MAX_SPREAD_NUMBERS = 1 << 22
"""The count of numbers that are held at once for nodes whose tangents have spread."""


class SpreadTangents(NamedTuple):
    """Single nodes, and a tangent of each at every position; zero before its own."""

    nodes: SingleNodes
    vectors: Float[Tensor, "pos n d"]

    def plus(self, vectors: Tensor | None) -> "SpreadTangents":
        """Add more tangents of the same nodes; None adds nothing."""
        return self if vectors is None else self._replace(vectors=self.vectors + vectors)


Part = TypeVar("Part", NodeVectors, SpreadTangents)
HeadTangents = dict[str, Tensor]
"""Tangents of queries, keys and values, by the letters q, k and v; a letter that nothing moves is
missing.
"""


class PartialBlocks:
    """Adds the edges of one prompt through blocks in which only some maps are sites.

    The methods add edges to the sink. They return the tangents that walk on, or None.
    """

    def __init__(self, prompt: TracedPrompt, sink: EdgeSink):
        self.prompt, self.sink = prompt, sink
        self.target, self.layout, self.frozen = prompt.target, prompt.layout, prompt.frozen

    # ---- attention -------------------------------------------------------------------------------

    def through_attention(self, block: BlockLayout, stream: NodeVectors) -> NodeVectors:
        """Add the edges from the residual stream to q, k, v and o; return the stream behind them.

        The tangents that the attention spreads walk on to the outputs from here, and leave the
        stream.
        """
        prompt = self.prompt
        tangents = self._project(stream, self._behind(block.norm_1, stream), block)
        self._spread(block, stream, tangents, around=stream.vectors)
        for bias in prompt.whole.get(block.norm_1, []):
            self._spread(block, bias, self._project(bias, bias.vectors, block))
        for letter, name in zip("qkv", block.qkv, strict=True):
            if self._passes(letter) and prompt.writes(name):
                writer = prompt.writer(name)
                self._spread(block, writer, {letter: writer.vectors})
        has_left = tangents and not prompt.all_sites(block.o_proj)
        staying = no_nodes(stream) if has_left else stream
        if not prompt.writes(block.o_proj):
            return staying
        return side_by_side([staying, prompt.writer(block.o_proj)])

    def _passes(self, letter: str) -> bool:
        """Return whether attention passes tangents on; a frozen graph's pattern is a constant."""
        return letter == "v" or not self.frozen

    def _project(self, part: Part, vectors: Tensor, block: BlockLayout) -> HeadTangents:
        """Take tangents behind a norm to the q, k and v that are sites, and through the others."""
        tangents = {}
        for letter, name in zip("qkv", block.qkv, strict=True):
            if self.prompt.all_sites(name):
                self._meet(part, vectors, name)
            elif self._passes(letter):
                tangents[letter] = self._map(vectors, name)
        return tangents

    def _spread(
        self,
        block: BlockLayout,
        rows: NodeVectors,
        tangents: HeadTangents,
        around: Tensor | None = None,
    ) -> None:
        """Take tangents of q, k and v, each at its own position, to o or through it.

        around: the tangents that pass the attention by in the residual stream.
        """
        if not tangents:
            return
        real, pos = rows.nodes.real, rows.nodes.pos
        number = rows.nodes.number[real]
        by_node = {letter: vectors[real] for letter, vectors in tangents.items()}  # [nodes, d]
        heads = self.prompt.heads(block)
        for some in torch.arange(len(pos), device=pos.device).split(self._nodes_at_once(block)):
            at = pos[some]
            turned = {
                letter: self._split_heads(block, letter, vectors[some][None], at)[0]
                for letter, vectors in by_node.items()
            }
            part = SpreadTangents(SingleNodes(number[some], at), heads.jvp_at(turned, at))
            out = self._through(part, part.vectors, block.o_proj)
            if out is None:
                continue
            if around is not None:
                out[at, torch.arange(len(at), device=at.device)] += around[real][some]
            self._walk_on(block, part._replace(vectors=out))

    def _split_heads(
        self, block: BlockLayout, letter: str, vectors: Tensor, pos: Tensor
    ) -> Float[Tensor, "n head pos d_head"]:
        """Cut tangents of q, k or v into heads, and rotate those of q and k to their positions."""
        attn = self.target.get_submodule(block.attn)
        rotary = self.prompt.rotary
        n_heads = attn.n_heads if letter == "q" else attn.n_kv_heads
        angles = None
        if letter != "v" and rotary is not None:
            angles = tuple(table[pos] for table in rotary)
        turned = attn.turned(vectors, n_heads, angles)
        return turned.repeat_interleave(attn.n_heads // n_heads, dim=1)

    # ---- neurons ---------------------------------------------------------------------------------

    def through_mlp(self, block: BlockLayout, stream: NodeVectors) -> NodeVectors:
        """Add the edges from the residual stream to the MLP; return the stream behind it."""
        prompt = self.prompt
        slopes = self.prompt.slopes(block)
        out = self._neurons(stream, self._behind(block.norm_2, stream), slopes, block)
        behind = [stream if out is None else stream._replace(vectors=stream.vectors + out)]
        for bias in prompt.whole.get(block.norm_2, []):
            out = self._neurons(bias, bias.vectors, slopes, block)
            if out is not None:
                behind.append(bias._replace(vectors=out))
        for name in filter(prompt.writes, slopes):
            writer = prompt.writer(name)
            out = self._through(writer, writer.vectors * slopes[name][:, None], block.down_proj)
            if out is not None:
                behind.append(writer._replace(vectors=out))
        if prompt.writes(block.down_proj):
            behind.append(prompt.writer(block.down_proj))
        return side_by_side(behind)

    def _neurons(
        self, part: Part, vectors: Tensor, slopes: Mapping[str, Tensor], block: BlockLayout
    ) -> Tensor | None:
        """Take tangents behind a norm to first maps that are sites, through others to the last."""
        moved: Tensor | None = None  # [pos, n, neurons]
        for name, slope in slopes.items():
            if self.prompt.all_sites(name):
                self._meet(part, vectors, name)
                continue
            through = self._map(vectors, name) * slope[:, None]
            moved = through if moved is None else moved + through
        return None if moved is None else self._through(part, moved, block.down_proj)

    # ---- from there to the outputs ---------------------------------------------------------------

    def _walk_on(self, block: BlockLayout, part: SpreadTangents) -> None:
        """Add the edges from tangents that attention has spread to all readers behind it."""
        first = self.layout.blocks.index(block)
        for later in self.layout.blocks[first:]:
            if later is not block:
                part = part.plus(self._attention(later, part))
            vectors = self._behind(later.norm_2, part)
            part = part.plus(self._neurons(part, vectors, self.prompt.slopes(later), later))
        head = self.layout.unembedding
        vectors = self._behind(self.layout.final_norm, part)
        self._meet(part, vectors, head if self.prompt.all_sites(head) else "output")

    def _attention(self, block: BlockLayout, part: SpreadTangents) -> Tensor | None:
        """Push tangents that have spread through the attention of a later block."""
        tangents = self._project(part, self._behind(block.norm_1, part), block)
        if not tangents:
            return None
        every = torch.arange(len(part.vectors), device=part.vectors.device)
        turned = {
            letter: self._split_heads(block, letter, vectors.transpose(0, 1), every)
            for letter, vectors in tangents.items()
        }
        return self._through(part, self.prompt.heads(block).jvp(turned), block.o_proj)

    # ---- steps -----------------------------------------------------------------------------------

    def _meet(self, part: Part, vectors: Tensor, name: str) -> None:
        """Add the edges to a layer: inner products of what it reads with tangents at its input."""
        readers = self.prompt.reader(name)
        if isinstance(part, NodeVectors):
            values = vectors @ readers.vectors.transpose(1, 2)
            self.sink.add_same_position(part.nodes, readers.nodes, values)
        else:
            values = readers.vectors @ vectors.transpose(1, 2)
            self.sink.add_spread(part.nodes, readers.nodes, values)

    def _through(self, part: Part, vectors: Tensor, name: str) -> Tensor | None:
        """Add the edges to a map if it is a site; otherwise push tangents through it."""
        if self.prompt.all_sites(name):
            self._meet(part, vectors, name)
            return None
        return self._map(vectors, name)

    def _map(self, vectors: Tensor, name: str) -> Tensor:
        """Push tangents through a map that is not a site."""
        return vectors @ self.target.get_submodule(name).weight.T

    def _behind(self, norm: str, part: Part) -> Tensor:
        """Push tangents of the residual stream through a norm."""
        module = self.target.get_submodule(norm)
        r = self.prompt.at(self.prompt.run.norm_inputs, module)
        return norm_jvp(module, r, part.vectors, self.frozen)

    def _nodes_at_once(self, block: BlockLayout) -> int:
        """Return the number of nodes whose tangents may spread together."""
        length = self.prompt.length
        neurons = self.target.get_submodule(block.down_proj).in_features
        scores = self.target.get_submodule(block.attn).n_heads * length
        return max(1, MAX_SPREAD_NUMBERS // (length * max(neurons, scores)))


def no_nodes(part: NodeVectors) -> NodeVectors:
    """Return no nodes, at the same number of positions."""
    nodes, vectors = part
    return NodeVectors(type(nodes)(*(column[:, :0] for column in nodes)), vectors[:, :0])
