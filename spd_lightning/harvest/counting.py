"""Exact counts of the firings of units over many positions (section H of docs/method.md).

For some positions, let F [positions, units] be 1 where a unit fires and 0 elsewhere. Few entries
are 1, so F is stored as a sparse matrix, one for each layer. The counts are products of it:

    co-firings      FᵀF
    input tokens    FᵀX     X [positions, vocab] is 1 at each position's token
    output tokens   FᵀP     P [positions, vocab] has the target's probabilities of the next token,
                            in units of 2⁻³²: the likeliest 32 at each position, and in a last
                            column the remainder

All entries are integers, so the sums over positions are exact and do not depend on their order.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy import sparse
from torch import Tensor

from spd_lightning import budgets

LIKELIEST = 32
"""The number of next tokens of each position whose probabilities are kept."""

UNIT_MASS = 1 << 32
"""The integer that stands for a probability of 1."""


class Counts(NamedTuple):
    """Counts over some positions.

    cofirings: by layer, [C of the layer, units of this layer and all later ones]. A pair of units
        of the same layer has two equal entries. The entry of a unit with itself is its firings.
    inputs: by layer, [C, vocab], the firings at each token; None for vectors.
    outputs: by layer, [C, vocab + 1], probability mass; None without predictions of tokens.
    input_positions: [vocab], the positions of each token.
    output_mass: [vocab + 1], the probability mass over all positions.
    """

    cofirings: dict[str, sparse.csr_array]
    inputs: dict[str, sparse.csr_array] | None
    outputs: dict[str, sparse.csr_array] | None
    input_positions: Int64[np.ndarray, " vocab"] | None
    output_mass: Int64[np.ndarray, " vocab_and_rest"] | None

    def rows(self) -> int:
        """Return the number of entries that are not zero."""
        count = 0
        for matrices in (self.cofirings, self.inputs or {}, self.outputs or {}):
            count += sum(matrix.nnz for matrix in matrices.values())
        return count

    def plus(self, other: "Counts") -> "Counts":
        """Return the counts over the positions of both."""
        return Counts(
            cofirings=_added(self.cofirings, other.cofirings),
            inputs=None if self.inputs is None else _added(self.inputs, other.inputs),
            outputs=None if self.outputs is None else _added(self.outputs, other.outputs),
            input_positions=_sum(self.input_positions, other.input_positions),
            output_mass=_sum(self.output_mass, other.output_mass),
        )


def count(
    fires: Mapping[str, Bool[Tensor, "position C"]],
    tokens: Int64[Tensor, " position"] | None,
    logits: Float[Tensor, "position vocab"] | None,
    vocab: int = 0,
) -> Counts:
    """Count the firings of units at some positions.

    fires: by layer, in forward order.
    tokens: the input tokens; None for vectors.
    logits: the target's logits of the next token; None without predictions of tokens.
    vocab: the number of input tokens; 0 for vectors.
    """
    matrices = {layer: as_sparse(entries) for layer, entries in fires.items()}
    transposed = {layer: F.T.tocsr() for layer, F in matrices.items()}  # [C, position]
    inputs = None
    outputs = None
    input_positions = None
    output_mass = None
    if tokens is not None:
        X = one_hot(tokens, vocab)
        inputs = {layer: F_T @ X for layer, F_T in transposed.items()}
        input_positions = X.sum(axis=0)
    if logits is not None:
        P = probability_mass(logits)
        outputs = {layer: F_T @ P for layer, F_T in transposed.items()}
        output_mass = P.sum(axis=0)
    return Counts(cofirings(matrices), inputs, outputs, input_positions, output_mass)


def cofirings(matrices: Mapping[str, sparse.csr_array]) -> dict[str, sparse.csr_array]:
    """Return FᵀF: for each layer, the rows of its units and the columns of this and later layers.

    The product is computed in pieces, since the number of pairs can be large where many units fire.
    """
    layers = list(matrices)
    products = {}
    for k, layer in enumerate(layers):
        F = matrices[layer]  # [position, C]
        blocks = [matrices[name] for name in layers[k:]]
        F_later = sparse.csr_array(sparse.hstack(blocks))  # [position, units from this layer on]
        shape = (columns_of(F), columns_of(F_later))
        product = sparse.csr_array(shape, dtype=np.int64)
        for positions in _pieces(F, F_later):
            F_T = F[positions].T.tocsr()
            product = product + F_T @ F_later[positions]
        products[layer] = product
    return products


def columns_of(matrix: sparse.csr_array) -> int:
    """Return the number of columns."""
    assert matrix.shape is not None
    return matrix.shape[1]


class Entries(NamedTuple):
    """The entries of a sparse matrix that are not zero."""

    row: Int64[np.ndarray, " entry"]
    column: Int64[np.ndarray, " entry"]
    value: Int64[np.ndarray, " entry"]


def entries_of(matrix: sparse.csr_array) -> Entries:
    """Return the entries that are not zero, as arrays."""
    matrix = matrix.copy()  # eliminate_zeros works in place
    matrix.eliminate_zeros()
    coordinates = matrix.tocoo()
    row = coordinates.row.astype(np.int64)
    column = coordinates.col.astype(np.int64)
    return Entries(row, column, coordinates.data)


def _pieces(F: sparse.csr_array, F_later: sparse.csr_array) -> list[slice]:
    """Divide positions into pieces, each with a limited number of pairs of firings."""
    own_firings = np.diff(F.indptr).astype(np.int64)  # [position]
    later_firings = np.diff(F_later.indptr)  # [position]
    pairs_of_position = own_firings * later_firings
    pairs_so_far = np.cumsum(pairs_of_position)
    piece_of_position = pairs_so_far // budgets.MAX_FIRING_PAIRS
    starts = np.flatnonzero(np.diff(piece_of_position, prepend=-1))
    ends = [*starts.tolist(), len(pairs_of_position)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def as_sparse(fires: Bool[Tensor, "position C"]) -> sparse.csr_array:
    """Return F of one layer: [position, C], 1 where a unit fires."""
    positions, C = fires.shape
    columns = fires.nonzero()[:, 1].cpu().numpy()  # [firings], by position
    ends = fires.sum(1).cumsum(0).cpu().numpy()
    row_starts = np.concatenate([[0], ends])
    ones = np.ones(len(columns), dtype=np.int64)
    return sparse.csr_array((ones, columns, row_starts), shape=(positions, C))


def one_hot(tokens: Int64[Tensor, " position"], vocab: int) -> sparse.csr_array:
    """Return X: [position, vocab], 1 at each position's token."""
    columns = tokens.cpu().numpy()
    positions = len(columns)
    row_starts = np.arange(positions + 1)
    ones = np.ones(positions, dtype=np.int64)
    return sparse.csr_array((ones, columns, row_starts), shape=(positions, vocab))


def probability_mass(logits: Float[Tensor, "position vocab"]) -> sparse.csr_array:
    """Return P: [position, vocab + 1], the likeliest next tokens, and in the last column the rest.

    Each row adds up to `UNIT_MASS`, the mass of probability 1.
    """
    positions, vocab = logits.shape
    kept = min(LIKELIEST, vocab)
    largest = logits.topk(kept, dim=-1)
    log_sum = logits.logsumexp(-1, keepdim=True)
    log_probability = largest.values - log_sum
    probability = log_probability.double().exp()  # [position, kept]
    mass = (probability * UNIT_MASS).round().long()
    rest = UNIT_MASS - mass.sum(-1, keepdim=True)  # rounding can make it slightly negative
    excess = rest.clamp(max=0)  # if so, the likeliest token gives it back
    mass[:, :1] += excess
    rest_column = torch.full_like(rest, vocab)
    columns = torch.cat([largest.indices, rest_column], dim=1)  # [position, kept + 1]
    masses = torch.cat([mass, rest - excess], dim=1)
    row_starts = np.arange(positions + 1) * (kept + 1)
    entries = (masses.flatten().cpu().numpy(), columns.flatten().cpu().numpy(), row_starts)
    return sparse.csr_array(entries, shape=(positions, vocab + 1))


def _added(
    first: Mapping[str, sparse.csr_array], second: Mapping[str, sparse.csr_array] | None
) -> dict[str, sparse.csr_array]:
    assert second is not None
    return {layer: matrix + second[layer] for layer, matrix in first.items()}


def _sum(
    first: Int64[np.ndarray, " n"] | None, second: Int64[np.ndarray, " n"] | None
) -> Int64[np.ndarray, " n"] | None:
    if first is None or second is None:
        return None
    return first + second
