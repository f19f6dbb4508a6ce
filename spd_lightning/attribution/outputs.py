"""Output nodes of a graph: which logits they are, or which function of the logits (A2, A3).

A node of a token model is a token at a position. It stands for the token's logit, for how far that
lies above the mean over the vocabulary, or for how far it lies above another token's: all of them
linear in the logits, so that graphs add up alike. Models on vectors have one node an output entry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

OutputNodes = Callable[[Tensor], Tensor]
"""Chooses which output entries [batch, pos, K] are nodes."""
Reading = Callable[[Tensor], Tensor]
"""What nodes stand for: a linear map of logits [..., vocab], one number a token."""


def logits(x: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
    """Every node is its token's logit."""
    return x


def centered(x: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
    """Every node is its token's logit above the mean of all: what a softmax makes of it does not
    see the mean.
    """
    return x - x.mean(-1, keepdim=True)


@dataclass(frozen=True)
class LogitAbove:
    """Every node is its token's logit above another token's: what decides between the two."""

    token: int

    def __call__(self, x: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        return x - x[..., self.token, None]


@dataclass(frozen=True)
class Outputs:
    """Output nodes, and what they stand for."""

    nodes: OutputNodes
    reading: Reading = logits

    def __call__(self, output: Float[Tensor, "batch pos K"]) -> Bool[Tensor, "batch pos K"]:
        return self.nodes(output)


def reading_of(nodes: OutputNodes) -> Reading:
    """Return the function of the logits that output nodes stand for; the logits themselves by
    default.
    """
    return nodes.reading if isinstance(nodes, Outputs) else logits


def every_output(output: Float[Tensor, "batch pos K"]) -> Bool[Tensor, "batch pos K"]:
    """Every output entry is a node: for models on vectors."""
    return torch.ones_like(output, dtype=torch.bool)


def likely_tokens(
    probability: Float[Tensor, "batch pos vocab"], floor: float = 0.01, top_k: int = 15
) -> OutputNodes:
    """Output nodes of token models: at most 15 tokens a position with CI-masked probability above
    0.01 (A3).
    """
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
