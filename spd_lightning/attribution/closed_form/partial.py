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

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lightning import budgets
from spd_lightning.attribution.closed_form.jvp import Heads, norm_jvp
from spd_lightning.attribution.closed_form.prompt import NodeVectors, TracedPrompt, side_by_side
from spd_lightning.attribution.closed_form.sinks import EdgeSink, Nodes, SingleNodes
from spd_lightning.targets.decoder_layout import BlockLayout


class SpreadTangents(NamedTuple):
    """Single nodes, and a tangent of each at every position; zero before its own."""

    nodes: SingleNodes
    vectors: Float[Tensor, "pos n d"]


NodeTangents = NodeVectors | SpreadTangents
"""Tangents of some nodes: each at its own position, or at all positions."""
HeadTangents = dict[str, Tensor]
"""Tangents of queries, keys and values, by the letters q, k and v; a letter that nothing moves is
missing.
"""


class PartialBlocks:
    """Adds the edges of one prompt through blocks in which only some maps are sites.

    The methods add edges to the sink. They return the tangents that walk on, or None. Where a
    method takes both `tangents` and `vectors`, the vectors are what the tangents have become.
    """

    def __init__(self, prompt: TracedPrompt, sink: EdgeSink):
        self.prompt = prompt
        self.sink = sink
        self.target = prompt.target
        self.layout = prompt.layout
        self.frozen = prompt.frozen

    # ---- attention -------------------------------------------------------------------------------

    def through_attention(self, block: BlockLayout, stream: NodeVectors) -> NodeVectors:
        """Add the edges from the residual stream to q, k, v and o; return the stream behind them.

        The tangents that the attention spreads walk on to the outputs from here, and leave the
        stream.
        """
        prompt = self.prompt
        normed = self._behind(block.norm_1, stream)  # [pos, n, d]
        head_tangents = self._project(stream, normed, block)
        self._spread(block, stream, head_tangents, around=stream.vectors)
        self._spread_sources(block)
        o_proj = block.o_proj
        staying = stream
        if head_tangents and not prompt.all_sites(o_proj):
            # They have left the stream: `_spread` has taken them through the attention and around.
            staying = no_nodes(stream)
        if not prompt.writes(o_proj):
            return staying
        written = prompt.writer(o_proj)
        return side_by_side([staying, written])

    def _spread_sources(self, block: BlockLayout) -> None:
        """Spread what writes between the residual stream and the heads: biases, and q, k and v."""
        prompt = self.prompt
        biases = prompt.whole.get(block.norm_1, [])
        for bias in biases:
            head_tangents = self._project(bias, bias.vectors, block)
            self._spread(block, bias, head_tangents)
        names = zip("qkv", block.qkv, strict=True)
        for letter, name in names:
            if not self._passes(letter):
                continue
            if prompt.writes(name):
                # The w_i U_i of a site, or the bias and the rest of a frozen graph.
                writer = prompt.writer(name)
                head_tangents = {letter: writer.vectors}
                self._spread(block, writer, head_tangents)

    def _passes(self, letter: str) -> bool:
        """Return whether attention passes on the tangents of q, k or v."""
        if letter == "v":
            return True
        return not self.frozen  # queries and keys act on the pattern, a constant in frozen graphs

    def _project(self, tangents: NodeTangents, vectors: Tensor, block: BlockLayout) -> HeadTangents:
        """Take tangents behind a norm to the q, k and v that are sites, and through the others."""
        head_tangents = {}
        names = zip("qkv", block.qkv, strict=True)
        for letter, name in names:
            if self.prompt.all_sites(name):
                self._meet(tangents, vectors, name)
            elif self._passes(letter):
                head_tangents[letter] = self._map(vectors, name)
        return head_tangents

    def _spread(
        self,
        block: BlockLayout,
        rows: NodeVectors,
        head_tangents: HeadTangents,
        around: Float[Tensor, "pos n d"] | None = None,
    ) -> None:
        """Take tangents of q, k and v, each at its own position, to o or through it.

        around: the tangents that pass the attention by in the residual stream.
        """
        if not head_tangents:
            return
        real = rows.nodes.real  # [pos, n]
        number = rows.nodes.number[real]  # [nodes]
        pos = rows.nodes.pos  # [nodes]
        by_node = {}  # [nodes, d_heads] each
        for letter, vectors in head_tangents.items():
            by_node[letter] = vectors[real]
        passing = None
        if around is not None:
            passing = around[real]  # [nodes, d]
        heads = self.prompt.heads(block)
        every = torch.arange(len(pos), device=pos.device)
        chunks = every.split(self._nodes_at_once(block))
        for chunk in chunks:
            nodes = SingleNodes(number[chunk], pos[chunk])
            some = {letter: vectors[chunk] for letter, vectors in by_node.items()}
            tangents = self._attend(block, heads, nodes, some)
            vectors = self._through(tangents, tangents.vectors, block.o_proj)
            if vectors is None:
                continue
            # Behind o_proj [pos, nodes, d]: what went around is still at the nodes' own positions.
            if passing is not None:
                column = torch.arange(len(chunk), device=chunk.device)
                vectors[nodes.pos, column] += passing[chunk]
            behind = SpreadTangents(nodes, vectors)
            self._walk_on(block, behind)

    def _attend(
        self, block: BlockLayout, heads: Heads, nodes: SingleNodes, head_tangents: HeadTangents
    ) -> SpreadTangents:
        """Push tangents [nodes, d_heads] at the nodes' positions through the heads of a block."""
        by_head = {}  # [head, nodes, d_head] each
        for letter, vectors in head_tangents.items():
            # The nodes take the place of positions, in a batch of one: [1, nodes, d_heads].
            as_batch = vectors[None]
            turned = self._split_heads(block, letter, as_batch, nodes.pos)
            by_head[letter] = turned[0]
        vectors = heads.jvp_at(by_head, nodes.pos)  # [pos, nodes, d_heads]
        return SpreadTangents(nodes, vectors)

    def _split_heads(
        self, block: BlockLayout, letter: str, vectors: Tensor, pos: Tensor
    ) -> Float[Tensor, "n head pos d_head"]:
        """Cut tangents of q, k or v into heads, and rotate those of q and k to their positions."""
        attn = self.target.get_submodule(block.attn)
        n_heads = attn.n_kv_heads
        if letter == "q":
            n_heads = attn.n_heads
        angles = None  # values are not rotated
        rotary = self.prompt.rotary
        if rotary is not None and letter != "v":
            # [pos, d_head] each: the cosines and sines of the nodes' own positions
            angles = tuple(table[pos] for table in rotary)
        turned = attn.turned(vectors, n_heads, angles)
        shared = attn.n_heads // n_heads  # queries for each key or value
        return turned.repeat_interleave(shared, dim=1)

    # ---- neurons ---------------------------------------------------------------------------------

    def through_mlp(self, block: BlockLayout, stream: NodeVectors) -> NodeVectors:
        """Add the edges from the residual stream to the MLP; return the stream behind it."""
        prompt = self.prompt
        slopes = prompt.slopes(block)
        normed = self._behind(block.norm_2, stream)  # [pos, n, d]
        added = self._neurons(stream, normed, slopes, block)
        if added is not None:
            # A node has one tangent behind the MLP: around it, plus through it.
            vectors = stream.vectors + added
            stream = NodeVectors(stream.nodes, vectors)
        behind = [stream]
        behind += self._mlp_sources(block, slopes)
        if prompt.writes(block.down_proj):
            written = prompt.writer(block.down_proj)
            behind.append(written)
        return side_by_side(behind)

    def _mlp_sources(
        self, block: BlockLayout, slopes: Mapping[str, Tensor]
    ) -> Iterator[NodeVectors]:
        """Yield the tangents behind an MLP of what writes inside it: biases, and first maps."""
        prompt = self.prompt
        biases = prompt.whole.get(block.norm_2, [])
        for bias in biases:
            # A norm adds its bias last, so it does not pass through the norm's Jacobian.
            vectors = self._neurons(bias, bias.vectors, slopes, block)
            if vectors is not None:
                yield NodeVectors(bias.nodes, vectors)
        for name, slope in slopes.items():
            if not prompt.writes(name):
                continue
            writer = prompt.writer(name)
            moved = writer.vectors * slope[:, None]  # [pos, n, neurons]: w_i U_i ∘ φ'(h)
            vectors = self._through(writer, moved, block.down_proj)
            if vectors is not None:
                yield NodeVectors(writer.nodes, vectors)

    def _neurons(
        self,
        tangents: NodeTangents,
        vectors: Tensor,
        slopes: Mapping[str, Tensor],
        block: BlockLayout,
    ) -> Tensor | None:
        """Take tangents behind a norm to first maps that are sites, through others to the last."""
        moved: Tensor | None = None  # [pos, n, neurons]
        for name, slope in slopes.items():
            if self.prompt.all_sites(name):
                self._meet(tangents, vectors, name)
                continue
            # φ'(h) t, summed over the first maps
            outputs = self._map(vectors, name) * slope[:, None]
            if moved is None:
                moved = outputs
            else:
                moved = moved + outputs
        if moved is None:
            return None
        return self._through(tangents, moved, block.down_proj)

    # ---- from there to the outputs ---------------------------------------------------------------

    def _walk_on(self, block: BlockLayout, tangents: SpreadTangents) -> None:
        """Add the edges from tangents that attention has spread to all readers behind it."""
        layout = self.layout
        this = layout.blocks.index(block)
        later_blocks = layout.blocks[this + 1 :]
        tangents = self._walk_mlp(block, tangents)
        for later in later_blocks:
            tangents = self._walk_attention(later, tangents)
            tangents = self._walk_mlp(later, tangents)
        head = layout.unembedding
        normed = self._behind(layout.final_norm, tangents)
        if self.prompt.all_sites(head):
            self._meet(tangents, normed, head)
        else:
            # The outputs then read the stream with the rows of the unembedding.
            self._meet(tangents, normed, "output")

    def _walk_mlp(self, block: BlockLayout, tangents: SpreadTangents) -> SpreadTangents:
        """Push tangents that have spread through and around an MLP."""
        slopes = self.prompt.slopes(block)
        normed = self._behind(block.norm_2, tangents)
        added = self._neurons(tangents, normed, slopes, block)
        if added is None:
            return tangents
        vectors = tangents.vectors + added
        return SpreadTangents(tangents.nodes, vectors)

    def _walk_attention(self, block: BlockLayout, tangents: SpreadTangents) -> SpreadTangents:
        """Push tangents that have spread through and around the attention of a later block."""
        head_tangents = self._project(tangents, self._behind(block.norm_1, tangents), block)
        if not head_tangents:
            return tangents
        every_pos = torch.arange(self.prompt.length, device=tangents.vectors.device)
        by_head = {}  # [n, head, pos, d_head] each
        for letter, vectors in head_tangents.items():
            by_node = vectors.transpose(0, 1)  # [n, pos, d_heads]
            by_head[letter] = self._split_heads(block, letter, by_node, every_pos)
        heads = self.prompt.heads(block)
        attended = heads.jvp(by_head)  # [pos, n, d_heads]
        added = self._through(tangents, attended, block.o_proj)
        if added is None:
            return tangents
        vectors = tangents.vectors + added
        return SpreadTangents(tangents.nodes, vectors)

    # ---- steps -----------------------------------------------------------------------------------

    def _meet(self, tangents: NodeTangents, vectors: Tensor, name: str) -> None:
        """Add the edges to a layer, V_j · t: products of what it reads with tangents at its input.

        Each kind of tangents has the order of axes that its sink expects.
        """
        readers = self.prompt.reader(name)
        if isinstance(tangents, NodeVectors):
            read = readers.vectors.transpose(1, 2)  # [pos, d, J]
            values = vectors @ read  # [pos, n, J]
            self.sink.add_same_position(tangents.nodes, readers.nodes, values)
        else:
            moved = vectors.transpose(1, 2)  # [pos, d, n]
            values = readers.vectors @ moved  # [pos, J, n]
            self.sink.add_spread(tangents.nodes, readers.nodes, values)

    def _through(self, tangents: NodeTangents, vectors: Tensor, name: str) -> Tensor | None:
        """Add the edges to a map if it is a site; otherwise push tangents through it."""
        if self.prompt.all_sites(name):
            self._meet(tangents, vectors, name)
            return None
        return self._map(vectors, name)

    def _map(self, vectors: Float[Tensor, "pos n d_in"], name: str) -> Float[Tensor, "pos n d_out"]:
        """Push tangents through a map that is not a site: W t."""
        W = self.target.get_submodule(name).weight
        return vectors @ W.T

    def _behind(self, norm: str, tangents: NodeTangents) -> Float[Tensor, "pos n d"]:
        """Push tangents of the residual stream through a norm."""
        module = self.target.get_submodule(norm)
        norm_inputs = self.prompt.run.norm_inputs
        r = self.prompt.recorded(norm_inputs, module)  # [pos, d]
        return norm_jvp(module, r, tangents.vectors, self.frozen)

    def _nodes_at_once(self, block: BlockLayout) -> int:
        """Return the number of nodes whose tangents may spread together.

        A node takes a number for each neuron, or for each head and attended position, at every
        position.
        """
        length = self.prompt.length
        down = self.target.get_submodule(block.down_proj)
        attn = self.target.get_submodule(block.attn)
        neurons = down.in_features
        scores = attn.n_heads * length
        widest = max(neurons, scores)
        per_node = length * widest
        return max(1, budgets.MAX_SPREAD_NUMBERS // per_node)


def no_nodes(stream: NodeVectors) -> NodeVectors:
    """Return no nodes, at the same number of positions."""
    every = stream.nodes
    nodes = Nodes(
        component=every.component[:, :0], number=every.number[:, :0], real=every.real[:, :0]
    )
    return NodeVectors(nodes, stream.vectors[:, :0])
