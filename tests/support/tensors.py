"""Tensors that are there for certain: Python's `sum` can be the number 0, and a gradient None."""

from collections.abc import Iterable

from torch import Tensor


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of one or more tensors."""
    total = sum(tensors)
    assert isinstance(total, Tensor)
    return total


def gradient_of(leaf: Tensor) -> Tensor:
    """Return the gradient of a tensor that a backward pass has reached."""
    assert leaf.grad is not None
    return leaf.grad
