"""Attribution graphs of a batch of prompts in the quickest way that the model and the mode allow.

Decoders take closed forms (`closed_form`), everything else batched vector-Jacobian products (`autograd`). The numbers
are the same.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from spd_lightning.attribution.autograd import Products
from spd_lightning.attribution.closed_form.trace import why_not
from spd_lightning.attribution.closed_form.walk import closed_form
from spd_lightning.attribution.graph import EdgeTable, Layer, Subject
from spd_lightning.attribution.pruning import MOST, bounded


def attribution_graphs(of: Subject, at_least: float = 0.0) -> tuple[list[Layer], Iterator[EdgeTable]]:
    """The graphs of a batch of prompts in the quickest way that the model and the mode allow; the numbers are the same.

    at_least: edges below this share of all that enters their target, sizes added up, are left out.
    """
    layers, graphs = graphs_in_parts(of)
    return layers, (bounded(parts, at_least).table for parts in graphs)


class Alone:
    """The edges of one prompt of a batch whose graphs are too large to be computed together.

    Args:
        of: the batch.
        nodes: its output nodes [batch, pos, K].
        prompt: which prompt of the batch.
    """

    def __init__(self, of: Subject, nodes: Tensor, prompt: int):
        self._of, self._prompt = of.alone(prompt, nodes), prompt

    def __iter__(self) -> Iterator[EdgeTable]:
        for table in Products(self._of):
            yield table._replace(prompt=table.prompt + self._prompt)


def graphs_in_parts(of: Subject, most: int | None = None) -> tuple[list[Layer], Iterator[Iterable[EdgeTable]]]:
    """Like `attribution_graphs`, but lazy: for each prompt, an iterable that recomputes its edges when iterated.

    most: prompts are computed together only if they cannot have more edges than this; `pruning.MOST` if omitted.
    """
    if why_not(of.model, of.mode) is None:
        return closed_form(of)
    most = MOST if most is None else most
    together = Products(of)
    nodes_by_layer = [layer.nodes.flatten(1).sum(1) for layer in together.layers]  # [prompt] each
    count = torch.stack(nodes_by_layer).sum(0)  # nodes of each prompt
    fits = int(count.square().sum()) <= 2 * most  # a prompt of n nodes has at most n²/2 edges
    if len(of.inputs) == 1 or fits:
        return together.layers, iter([together])
    outputs = together.layers[-1].nodes
    return together.layers, (Alone(of, outputs, prompt) for prompt in range(len(of.inputs)))
