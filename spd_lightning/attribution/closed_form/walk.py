"""Attribution graphs of decoders without a backward pass (section A of docs/method.md).

Between two sites of a decoder there is little: a norm, a non-linearity, or attention. The
derivative of each is known, so an edge is a few inner products of what the source writes with what
the target reads:

    residual writer → reader    w_i U_i · Jᵀ V_j           J: the norm's Jacobian at this position
    first MLP map → down        w_i U_i ∘ φ'(h) · V_j
    q, k and v → o              see `attention`

with w = m ∘ a. One forward pass of the batch gives everything that these formulas need. The edges
then come prompt by prompt, from the rows of U and V that are nodes there. Maps that are not sites
pass on whatever reaches them; `partial` computes the edges through their blocks.

Not here: modes whose delta carries gradient (see `closed_form_obstacle`). Those take the batched
products of `autograd`, which give the same numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from spd_lightning.attribution.closed_form.attention import add_attention_edges
from spd_lightning.attribution.closed_form.jvp import norm_vjp
from spd_lightning.attribution.closed_form.partial import PartialBlocks
from spd_lightning.attribution.closed_form.prompt import (
    NodeVectors,
    TracedBatch,
    TracedPrompt,
    side_by_side,
    trace_batch,
)
from spd_lightning.attribution.closed_form.sinks import EdgeSink, TableSink
from spd_lightning.attribution.graph import EdgeTable, GraphSpec, Layer, LazyEdges
from spd_lightning.targets.decoder_layout import BlockLayout


@torch.no_grad()
def compute_edges(prompt: TracedPrompt, sink: EdgeSink) -> None:
    """Compute all edges of one prompt, from the embeddings to the outputs."""
    _Walk(prompt, sink).run()


class _Walk:
    """Follows the residual stream through a decoder: the nodes that have written to it so far."""

    def __init__(self, prompt: TracedPrompt, sink: EdgeSink):
        self.prompt = prompt
        self.sink = sink
        self.partial = PartialBlocks(prompt, sink)

    def run(self) -> None:
        layout = self.prompt.layout
        stream = self._embed()
        for block in layout.blocks:
            stream = self._attention(block, stream)
            stream = self._mlp(block, stream)
        head = layout.unembedding
        if self.prompt.all_sites(head):
            self._read_stream(stream, layout.final_norm, head)
            self._unembed()
        else:
            self._read_stream(stream, layout.final_norm, "output")

    def _embed(self) -> NodeVectors:
        """Return the nodes that write to the residual stream before the first block."""
        prompt = self.prompt
        writers = list[NodeVectors]()
        for name in prompt.layout.embeddings:
            if name in prompt.nodes or name in prompt.whole:
                writer = prompt.writer(name)
                writers.append(writer)
        return side_by_side(writers)

    def _attention(self, block: BlockLayout, stream: NodeVectors) -> NodeVectors:
        """Add the edges into and through a block's attention; return the stream behind it."""
        prompt = self.prompt
        if not prompt.all_sites(*block.attention_maps):
            return self.partial.through_attention(block, stream)
        self._read_stream(stream, block.norm_1, *block.qkv)
        add_attention_edges(prompt, block, self.sink)
        written = prompt.writer(block.o_proj)
        return side_by_side([stream, written])

    def _mlp(self, block: BlockLayout, stream: NodeVectors) -> NodeVectors:
        """Add the edges into and through a block's MLP; return the stream behind it."""
        prompt = self.prompt
        if not prompt.all_sites(*block.neuron_maps, block.down_proj):
            return self.partial.through_mlp(block, stream)
        self._read_stream(stream, block.norm_2, *block.neuron_maps)
        slopes = prompt.slopes(block)
        down = prompt.reader(block.down_proj)
        for name, slope in slopes.items():
            writer = prompt.writer(name)
            moved = writer.vectors * slope[:, None]  # [pos, K, neurons]: w_i U_i ∘ φ'(h)
            tangents = NodeVectors(writer.nodes, moved)
            self._add(tangents, down)
        written = prompt.writer(block.down_proj)
        return side_by_side([stream, written])

    def _read_stream(self, stream: NodeVectors, norm: str, *names: str) -> None:
        """Add the edges from the residual stream and the norm's bias to readers behind a norm."""
        prompt = self.prompt
        readers = side_by_side([prompt.reader(name) for name in names])
        values = torch.cat([prompt.value(name) for name in names], dim=1)  # [pos, K]
        module = prompt.target.get_submodule(norm)
        r = prompt.recorded(prompt.run.norm_inputs, module)  # [pos, d]
        # Jᵀ V_j, with J the norm's Jacobian at this position
        vectors = norm_vjp(
            norm=module, r=r, columns=readers.vectors, a=values, frozen=prompt.frozen
        )
        before_norm = NodeVectors(readers.nodes, vectors)
        self._add(stream, before_norm)
        biases = prompt.whole.get(norm, [])
        for bias in biases:
            self._add(bias, readers)

    def _unembed(self) -> None:
        """Add the edges from the components of the unembedding to the outputs: w_i U[i, token]."""
        prompt = self.prompt
        head = prompt.writer(prompt.layout.unembedding)
        every_output = prompt.run.spec.reading(head.vectors)  # [pos, K, vocab]
        outputs = prompt.nodes["output"]
        slots = every_output.shape[1]
        tokens = outputs.component[:, None].expand(-1, slots, -1)  # [pos, K, J]
        values = every_output.gather(2, tokens)
        self.sink.add_same_position(head.nodes, outputs, values)

    def _add(self, writers: NodeVectors, readers: NodeVectors) -> None:
        """Add the edges within each position: inner products of written with read vectors."""
        read = readers.vectors.transpose(1, 2)  # [pos, d, J]
        values = writers.vectors @ read  # [pos, K, J]
        self.sink.add_same_position(writers.nodes, readers.nodes, values)


@dataclass(frozen=True)
class PromptEdges:
    """The edges of one prompt of a recorded batch."""

    batch: TracedBatch
    prompt: int

    def for_each(self, visit: Callable[[EdgeTable], None]) -> None:
        """Compute all edges, and pass each piece to `visit`."""
        prompt = TracedPrompt(self.batch, self.prompt)
        sink = TableSink(self.prompt, visit)
        compute_edges(prompt, sink)


def closed_form_graphs(spec: GraphSpec) -> tuple[list[Layer], Iterator[LazyEdges]]:
    """Return the layers of the graphs of a batch of prompts, and the edges of each prompt.

    The specification must have no `closed_form_obstacle`.
    """
    batch = trace_batch(spec)
    prompts = range(len(spec.inputs))
    edges = (PromptEdges(batch, prompt) for prompt in prompts)
    return batch.layers, edges
