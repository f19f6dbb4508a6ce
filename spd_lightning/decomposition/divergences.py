"""Divergences: how the outputs of the masked model are compared with the target's (law L5).

- `mse`: the mean squared difference of all entries.
- `kl`: KL(softmax target ‖ softmax output), averaged over positions.

Each exists for every row of a batch (`mse_rows`, `kl_rows`) and as a mean over the batch, in which
rows can have weights.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import log_softmax


def position_mean(
    values: Float[Tensor, "..."], weights: Float[Tensor, " batch"] | None
) -> Float[Tensor, "..."]:
    """Return the mean over the batch, the first axis.

    Args:
        values: [batch, ...].
        weights: number of equal rows that each row represents; one each if None.
    """
    if weights is None:
        return values.mean(0)
    total = torch.tensordot(weights, values, dims=1)
    return total / weights.sum()


def mse_rows(
    output: Float[Tensor, " batch *rest"], target: Float[Tensor, " batch *rest"]
) -> Float[Tensor, " batch"]:
    """Return the mean squared difference of each row of a batch."""
    difference = output - target  # [batch, ...]
    squares = difference.square().flatten(1)  # [batch, entries]
    return squares.mean(1)


def kl_rows(
    output: Float[Tensor, " batch *rest"], target: Float[Tensor, " batch *rest"]
) -> Float[Tensor, " batch"]:
    """Return KL(softmax target ‖ softmax output) of each row, averaged over its positions.

    It is computed in float32, or in the precision of the output if that is higher.
    """
    dtype = torch.promote_types(output.dtype, torch.float32)
    log_p = log_softmax(target.to(dtype), -1)  # [batch, ..., K]
    log_q = log_softmax(output.to(dtype), -1)
    by_position = _kl_of_logs(log_p, log_q)  # [batch, ...]
    if by_position.ndim == 1:
        return by_position
    return by_position.flatten(1).mean(1)


def _kl_of_logs(
    log_p: Float[Tensor, "*rest K"], log_q: Float[Tensor, "*rest K"]
) -> Float[Tensor, "*rest"]:
    """Return KL(p ‖ q) of two distributions, given the logarithms of their probabilities."""
    p = log_p.exp()
    terms = p * (log_p - log_q)
    return terms.sum(-1)


def mse(
    output: Float[Tensor, " batch *rest"],
    target: Float[Tensor, " batch *rest"],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean squared difference over all output entries."""
    by_row = mse_rows(output, target)
    return position_mean(by_row, weights)


def kl(
    output: Float[Tensor, " batch *rest"],
    target: Float[Tensor, " batch *rest"],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Return KL(softmax target ‖ softmax output), averaged over batch and positions."""
    by_row = kl_rows(output, target)
    return position_mean(by_row, weights)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {"mse": mse, "kl": kl}
ROW_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse_rows, "kl": kl_rows}
