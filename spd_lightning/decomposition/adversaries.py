"""Adversaries: sources that hurt most, found by ascending a loss (section M of docs/method.md)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lightning.decomposition.masks import Sources, uniform


@dataclass(frozen=True)
class Adversary:
    """A fresh adversary that ascends the loss by projected gradient ascent (PGD).

    Args:
        steps: ascents; always to be stated beside a result.
        step_size: η of `s ← clamp(s + η·sign(∇L), 0, 1)`.
        init: where the sources start.
        scope: per_position, or per_batch (one vector shared by all positions and examples).
    """

    steps: int = 20
    step_size: float = 0.1
    init: Literal["random", "ones", "zeros"] = "random"
    scope: Literal["per_position", "per_batch"] = "per_batch"


def pgd_sources(
    adversary: Adversary,
    importances: Mapping[str, Tensor],
    loss: Callable[[Sources], Tensor],
    generator: torch.Generator | None,
    start: Sources | None = None,
) -> Sources:
    """Sources an adversary finds by ascending `loss`; the delta's source is one more entry of each vector.

    loss: maps sources to the scalar to be raised; its parameters need no gradient and should carry none.
    start: sources to go on from, instead of fresh ones.
    """
    names = list(importances)
    vectors = [
        _initial(adversary, g, generator) if start is None else _joined(*start[n]) for n, g in importances.items()
    ]
    for _ in range(adversary.steps):
        leaves = [v.detach().requires_grad_() for v in vectors]
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(_split(dict(zip(names, leaves, strict=True)), importances)), leaves)
        vectors = [
            (v.detach() + adversary.step_size * _shared(g).sign()).clamp(0, 1)
            for v, g in zip(vectors, gradients, strict=True)
        ]
    return _split(dict(zip(names, vectors, strict=True)), importances)


def _initial(adversary: Adversary, g: Float[Tensor, "... C"], generator: torch.Generator | None) -> Tensor:
    shape = (g.shape[:-1] if adversary.scope == "per_position" else ()) + (g.shape[-1] + 1,)
    match adversary.init:
        case "random":
            return uniform(g, shape, generator)
        case "ones":
            return g.new_ones(shape)
        case "zeros":
            return g.new_zeros(shape)


def _joined(s: Tensor, delta: Tensor) -> Tensor:
    """The inverse of `_split`: one vector a position, or one for the batch."""
    return torch.cat([s, (delta if s.ndim > 1 else delta.flatten()[0])[..., None]], dim=-1)


def _shared(gradient: Tensor) -> Tensor:
    """Sources shared by a batch are shared by its devices too: their gradients are summed before the sign is taken."""
    if gradient.ndim == 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(gradient)
    return gradient


def _split(vectors: Mapping[str, Tensor], importances: Mapping[str, Tensor]) -> Sources:
    return {n: (v[..., :-1], v[..., -1].expand(importances[n].shape[:-1])) for n, v in vectors.items()}
