"""Output nodes of a graph: which outputs they are, and the quantity that each stands for (A2, A3).

A node of a token model is a token at a position. It stands for the token's logit, for the logit
minus the mean over the vocabulary, or for the logit minus that of another token. All of these are
linear in the logits, so graphs of all of them add up. Models on vectors have one node for each
output entry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

OutputNodes = Callable[[Tensor], Tensor]
"""Chooses which output entries [batch, pos, K] are nodes."""
Reading = Callable[[Tensor], Tensor]
"""The quantity that nodes stand for: a linear map of logits [..., vocab], one number a token."""


def logits(x: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
    """Let every node stand for its token's logit."""
    return x


def centered(x: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
    """Let every node stand for its token's logit minus the mean, which no softmax depends on."""
    return x - x.mean(-1, keepdim=True)


@dataclass(frozen=True)
class LogitDifference:
    """Lets every node stand for its token's logit minus another token's."""

    token: int

    def __call__(self, x: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        return x - x[..., self.token, None]


@dataclass(frozen=True)
class Outputs:
    """Output nodes, and the quantity that they stand for."""

    nodes: OutputNodes
    reading: Reading = logits

    def __call__(self, output: Float[Tensor, "batch pos K"]) -> Bool[Tensor, "batch pos K"]:
        return self.nodes(output)


def reading_of(nodes: OutputNodes) -> Reading:
    """Return the quantity that output nodes stand for; by default, the logits."""
    return nodes.reading if isinstance(nodes, Outputs) else logits


def every_output(output: Float[Tensor, "batch pos K"]) -> Bool[Tensor, "batch pos K"]:
    """Every output entry is a node: for models on vectors."""
    return torch.ones_like(output, dtype=torch.bool)


def likely_tokens(
    probability: Float[Tensor, "batch pos vocab"], floor: float = 0.01, top_k: int = 15
) -> OutputNodes:
    """Choose at most 15 tokens a position, with CI-masked probability above 0.01 (A3)."""
    top = probability.topk(min(top_k, probability.shape[-1]), dim=-1)
    chosen = torch.zeros_like(probability, dtype=torch.bool).scatter(
        -1, top.indices, top.values > floor
    )
    return lambda output: chosen


def given_tokens(tokens: Sequence[int]) -> OutputNodes:
    """Choose the same tokens at every position."""

    def nodes(output: Float[Tensor, "batch pos vocab"]) -> Bool[Tensor, "batch pos vocab"]:
        chosen = torch.zeros(output.shape[-1], dtype=torch.bool, device=output.device)
        chosen[list(tokens)] = True
        return chosen.expand_as(output)

    return nodes


def at_positions(nodes: OutputNodes, positions: Sequence[int]) -> OutputNodes:
    """Restrict a choice of output nodes to some positions; negative ones count from the end."""

    def some(output: Float[Tensor, "batch pos K"]) -> Bool[Tensor, "batch pos K"]:
        here = torch.zeros(output.shape[1], 1, dtype=torch.bool, device=output.device)
        here[list(positions)] = True
        return nodes(output) & here

    return some
