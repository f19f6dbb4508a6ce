"""Sums, sums of squares and histograms of units over positions and over firings."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

IMPORTANCE_BINS = 32
"""The number of bins of importances: bin k holds those in (k/32, (k+1)/32]."""

SIZE_BINS = 96
"""The number of bins of positive activations, and of negative ones. Four cover a factor of 2."""

_BINS_PER_OCTAVE = 4
_FIRST_BIN_OF_ONE = 49
"""The bin of an activation of 1: bin k begins at 2^((k − 49)/4)."""


def moments(
    fires: Bool[Tensor, "batch pos C"],
    importance: Float[Tensor, "batch pos C"] | None,
    activation: Float[Tensor, "batch pos C"],
) -> dict[str, Float64[np.ndarray, " C"] | Int64[np.ndarray, " C"]]:
    """Return the columns of the table `components` that are sums over positions.

    importance: None for units without importances, whose sums of importances are 0.
    """
    C = fires.shape[2]
    unit = fires.flatten(0, 1).nonzero()[:, 1].cpu().numpy()  # [firing]
    sums: dict[str, Any] = {
        "firings": np.bincount(unit, minlength=C),
        "positions": np.full(C, fires[..., 0].numel()),
        "prompts": fires.any(1).sum(0).cpu().numpy(),
    }
    for name, values in (("importance", importance), ("activation", activation)):
        if values is None:
            values = torch.zeros_like(activation)
        exact = values.double()
        at_firings = exact[fires].cpu().numpy()  # [firing], in the order of `unit`
        sums[f"{name}_sum"] = exact.sum((0, 1)).cpu().numpy()
        sums[f"{name}_square_sum"] = exact.square_().sum((0, 1)).cpu().numpy()
        # Without firings, bincount would return integers.
        sums[f"firing_{name}_sum"] = np.bincount(unit, at_firings, C).astype(np.float64)
        sums[f"firing_{name}_square_sum"] = np.bincount(unit, at_firings**2, C).astype(np.float64)
    return sums


class Histograms(NamedTuple):
    """Numbers of firings by unit and bin.

    importance: [units, IMPORTANCE_BINS]; None for units without importances.
    activation: [units, 2 · SIZE_BINS + 1]; column SIZE_BINS + k is bin k, from −SIZE_BINS up.
    """

    importance: Int64[np.ndarray, "unit bin"] | None
    activation: Int64[np.ndarray, "unit signed_bin"]

    def plus(self, other: "Histograms") -> "Histograms":
        """Return the numbers of firings of both."""
        importance = self.importance
        if importance is not None and other.importance is not None:
            importance = importance + other.importance
        return Histograms(importance, self.activation + other.activation)


def histograms(
    units: int,
    unit: Int64[np.ndarray, " firing"],
    importance: Float32[np.ndarray, " firing"] | None,
    activation: Float32[np.ndarray, " firing"],
) -> Histograms:
    """Count some firings by unit and bin.

    units: the number of units of all layers.
    unit: the number of each firing's unit among those of all layers.
    """
    importances = None
    if importance is not None:
        importances = _counted(units, unit, importance_bin(importance), IMPORTANCE_BINS)
    column = activation_bin(activation) + SIZE_BINS
    activations = _counted(units, unit, column, 2 * SIZE_BINS + 1)
    return Histograms(importances, activations)


def importance_bin(importance: Float32[np.ndarray, " firing"]) -> Int64[np.ndarray, " firing"]:
    """Return the bin k of each importance, which is in (k/32, (k+1)/32]; 0 is in the first."""
    upper_end = np.ceil(importance * IMPORTANCE_BINS)
    return np.clip(upper_end - 1, 0, IMPORTANCE_BINS - 1).astype(np.int64)


def activation_bin(activation: Float32[np.ndarray, " firing"]) -> Int64[np.ndarray, " firing"]:
    """Return the bin of each activation, from 1 to `SIZE_BINS`, times the activation's sign."""
    size = np.abs(activation).astype(np.float64)
    with np.errstate(divide="ignore"):  # log 0 = −∞ is clipped
        octave = np.log2(size)
    number = np.floor(_BINS_PER_OCTAVE * octave) + _FIRST_BIN_OF_ONE
    number = np.clip(number, 1, SIZE_BINS)
    return (np.sign(activation) * number).astype(np.int64)


def _counted(
    units: int,
    unit: Int64[np.ndarray, " firing"],
    column: Int64[np.ndarray, " firing"],
    columns: int,
) -> Int64[np.ndarray, "unit bin"]:
    """Return the number of firings of each unit in each column."""
    cell = unit * columns + column  # the place in the flattened matrix
    counts = np.bincount(cell, minlength=units * columns)
    return counts.reshape(units, columns)
