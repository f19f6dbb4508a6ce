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
"""The quantity that nodes stand for: a linear map of logits [..., vocab], one number per token."""


def logits(x: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
    """Let every node stand for its token's logit."""
    return x


def centered(x: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
    """Let every node stand for its token's logit minus the mean, which no softmax depends on."""
    mean = x.mean(-1, keepdim=True)
    return x - mean


@dataclass(frozen=True)
class LogitDifference:
    """Lets every node stand for its token's logit minus another token's."""

    token: int

    def __call__(self, x: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        other = x[..., self.token, None]  # [..., 1]
        return x - other


@dataclass(frozen=True)
class Outputs:
    """Output nodes, and the quantity that they stand for."""

    nodes: OutputNodes
    reading: Reading = logits

    def __call__(self, output: Float[Tensor, "batch pos K"]) -> Bool[Tensor, "batch pos K"]:
        return self.nodes(output)


def reading_of(nodes: OutputNodes) -> Reading:
    """Return the quantity that output nodes stand for; by default, the logits."""
    if isinstance(nodes, Outputs):
        return nodes.reading
    return logits


def every_output(output: Float[Tensor, "batch pos K"]) -> Bool[Tensor, "batch pos K"]:
    """Every output entry is a node: for models on vectors."""
    return torch.ones_like(output, dtype=torch.bool)


def likely_tokens(
    probability: Float[Tensor, "batch pos vocab"], floor: float = 0.01, top_k: int = 15
) -> OutputNodes:
    """Choose the `top_k` likeliest tokens per position whose probability is above `floor` (A3)."""
    vocab = probability.shape[-1]
    k = min(top_k, vocab)
    top = probability.topk(k, dim=-1)
    above_floor = top.values > floor  # [batch, pos, k]
    none = torch.zeros_like(probability, dtype=torch.bool)
    chosen = none.scatter(-1, top.indices, above_floor)  # [batch, pos, vocab]
    return lambda output: chosen


def given_tokens(tokens: Sequence[int]) -> OutputNodes:
    """Choose the same tokens at every position."""

    def nodes(output: Float[Tensor, "batch pos vocab"]) -> Bool[Tensor, "batch pos vocab"]:
        vocab = output.shape[-1]
        chosen = output.new_zeros(vocab, dtype=torch.bool)
        chosen[list(tokens)] = True
        return chosen.expand_as(output)

    return nodes


def at_positions(nodes: OutputNodes, positions: Sequence[int]) -> OutputNodes:
    """Restrict a choice of output nodes to some positions; negative ones count from the end."""

    def some(output: Float[Tensor, "batch pos K"]) -> Bool[Tensor, "batch pos K"]:
        length = output.shape[1]
        chosen = output.new_zeros(length, 1, dtype=torch.bool)
        chosen[list(positions)] = True
        return nodes(output) & chosen

    return some
