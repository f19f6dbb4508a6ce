"""Attribution graphs of a batch of prompts, in the fastest way that the model and the mode allow.

Decoders use closed forms (`closed_form`), everything else batched vector-Jacobian products
(`autograd`). The numbers are the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_lightning import budgets
from spd_lightning.attribution.autograd import VectorJacobianEdges
from spd_lightning.attribution.closed_form.trace import closed_form_obstacle
from spd_lightning.attribution.closed_form.walk import closed_form_graphs
from spd_lightning.attribution.graph import EdgeTable, GraphSpec, Layer, LazyEdges
from spd_lightning.attribution.pruning import prune_edges


def attribution_graphs(
    spec: GraphSpec, min_share: float = 0.0
) -> tuple[list[Layer], Iterator[EdgeTable]]:
    """Return the layers of some prompts' graphs, and their edges as one or several tables.

    min_share: edges that carry less than this share of all |attribution| into their target are left
    out.
    """
    layers, graphs = lazy_graphs(spec)
    pruned = (prune_edges(edges, min_share) for edges in graphs)
    tables = (edges.table for edges in pruned)
    return layers, tables


@dataclass(frozen=True)
class SinglePromptEdges:
    """The edges of one prompt of a batch whose graphs are too large to be computed together.

    spec: the batch. output_nodes: its output nodes [batch, pos, K]. prompt: the number of the
    prompt in the batch.
    """

    spec: GraphSpec
    output_nodes: Tensor
    prompt: int

    def for_each(self, visit: Callable[[EdgeTable], None]) -> None:
        """Compute all edges, and pass each piece to `visit`."""
        spec = self.spec.single_prompt(self.prompt, self.output_nodes)
        edges = VectorJacobianEdges(spec)

        def visit_renumbered(table: EdgeTable) -> None:
            """Pass on edges under the number of the prompt in its batch, not in a batch of one."""
            prompt = table.prompt + self.prompt
            renumbered = table._replace(prompt=prompt)
            visit(renumbered)

        edges.for_each(visit_renumbered)


def lazy_graphs(
    spec: GraphSpec, max_edges: int | None = None
) -> tuple[list[Layer], Iterator[LazyEdges]]:
    """Return the layers of some prompts' graphs, and edges that are computed on demand.

    max_edges: prompts are computed together only if they cannot have more edges than this;
        `budgets.MAX_EDGES` if omitted.
    """
    if closed_form_obstacle(spec.model, spec.mode) is None:
        return closed_form_graphs(spec)
    if max_edges is None:
        max_edges = budgets.MAX_EDGES
    together = VectorJacobianEdges(spec)
    layers = together.layers
    prompts = len(spec.inputs)
    if prompts == 1 or _edges_at_most(layers) <= max_edges:
        # One batched product for many targets of all prompts is the fastest way.
        return layers, iter([together])
    output_nodes = layers[-1].nodes
    graphs = (SinglePromptEdges(spec, output_nodes, prompt) for prompt in range(prompts))
    return layers, graphs


def _edges_at_most(layers: list[Layer]) -> float:
    """Return a bound on the number of edges of a batch: a prompt of n nodes has at most n²/2."""
    by_layer = [layer.nodes.flatten(1).sum(1) for layer in layers]  # [prompt] each
    n_nodes = torch.stack(by_layer).sum(0)  # [prompt]
    squares = n_nodes.square().sum()
    return int(squares) / 2
