"""The statistics of a group of prompts as rows of tables."""

from collections.abc import Mapping

import numpy as np
import polars as pl
from scipy import sparse

from spd_lightning.harvest.counting import Counts, columns_of, entries_of
from spd_lightning.harvest.moments import SIZE_BINS, Histograms
from spd_lightning.harvest.rows import Names
from spd_lightning.store.columns import QUANTITIES
from spd_lightning.store.tables import added


class UnitNames:
    """The layer and component of each unit, where units of all layers are numbered together.

    Attributes:
        first: by layer, the number of its first unit.
    """

    def __init__(self, units: Mapping[str, int], layers: list[str]):
        sizes = np.array(list(units.values()))
        first_units = np.cumsum(sizes) - sizes
        self.first = dict(zip(units, first_units.tolist(), strict=True))
        names = pl.Series(list(units), dtype=pl.Enum(layers))
        self._layer_of_unit = names.gather(np.repeat(np.arange(len(sizes)), sizes))
        components = np.concatenate([np.arange(C, dtype=np.uint32) for C in sizes])
        self._component_of_unit = pl.Series(components)

    def columns(self, unit: np.ndarray, prefix: str = "") -> dict[str, pl.Series]:
        """Return the columns `layer` and `component` of the units with these numbers."""
        layer = self._layer_of_unit.gather(unit)
        component = self._component_of_unit.gather(unit)
        return {f"{prefix}layer": layer, f"{prefix}component": component}

    def named(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Replace the column `unit` by `layer` and `component`."""
        columns = self.columns(rows["unit"].to_numpy())
        return rows.drop("unit").with_columns(**columns)


def histogram_rows(counted: Histograms, names: UnitNames) -> pl.DataFrame:
    """Return one row per component, quantity and bin with a firing."""
    quantities = pl.Enum(QUANTITIES)
    frames = []
    for quantity, table, first_bin in (
        ("importance", counted.importance, 0),
        ("activation", counted.activation, -SIZE_BINS),
    ):
        if table is None:
            continue
        unit, column = table.nonzero()
        columns = {
            **names.columns(unit),
            "bin": (column + first_bin).astype(np.int16),
            "firings": table[unit, column],
        }
        frame = pl.DataFrame(columns)
        frames.append(frame.with_columns(quantity=pl.lit(quantity, quantities)))
    return pl.concat(frames)


def cofiring_rows(counts: Counts, names: UnitNames) -> pl.DataFrame:
    """Return one row per pair of components that fire together, the earlier component first."""
    frames = []
    for layer, matrix in counts.cofirings.items():
        component, later, firings = entries_of(matrix)
        is_pair = later > component  # columns begin with the layer's own units
        first = names.first[layer]
        columns = {
            **names.columns(first + component[is_pair]),
            **names.columns(first + later[is_pair], "other_"),
            "firings": firings[is_pair],
        }
        frames.append(pl.DataFrame(columns))
    return pl.concat(frames)


def token_count_rows(counts: Counts, names: UnitNames) -> pl.DataFrame:
    """Return one row per component and token, and one per component for the remainder."""
    assert counts.inputs is not None
    frames = []
    for layer, matrix in counts.inputs.items():
        first = names.first[layer]
        frames.append(_token_cells(matrix, first, names, "input_firings", None))
    for layer, matrix in (counts.outputs or {}).items():
        first = names.first[layer]
        rest = columns_of(matrix) - 1  # the last column is the remainder
        frames.append(_token_cells(matrix, first, names, "output_mass", rest))
    return added("token_counts", frames)


def _token_cells(
    matrix: sparse.csr_array, first: int, names: UnitNames, column: str, rest: int | None
) -> pl.DataFrame:
    """Return the nonzero entries of one layer's counts by token.

    Args:
        matrix: [C, vocab], or [C, vocab + 1] with the remainder.
        first: the number of the layer's first unit.
        names: the names of the units.
        column: the column of these counts. The other one is 0: the caller adds both up.
        rest: the column of the matrix that holds the remainder, whose token is null.
    """
    dtype = {"input_firings": pl.Int64, "output_mass": pl.UInt64}
    component, token, value = entries_of(matrix)
    columns = {
        **names.columns(first + component),
        "token_id": pl.Series(token.astype(np.uint32)),
        column: pl.Series(value).cast(dtype[column]),
    }
    others = {name: pl.lit(0, kind) for name, kind in dtype.items() if name != column}
    frame = pl.DataFrame(columns).with_columns(**others)
    order = ["layer", "component", "token_id", *dtype]
    is_token = pl.lit(True) if rest is None else pl.col("token_id") != rest
    return frame.with_columns(token_id=pl.when(is_token).then("token_id")).select(order)


def token_rows(counts: Counts, names: Names) -> pl.DataFrame:
    """Return one row per token that occurs or is predicted, and one for the remainder."""
    positions = counts.input_positions
    mass = counts.output_mass
    assert positions is not None
    if mass is None:
        mass = np.zeros(len(positions) + 1, dtype=np.int64)
    rest = len(mass) - 1  # the last entry is the remainder
    # The vocabularies of inputs and of outputs can differ in size.
    length = max(len(positions), rest)
    all_positions = np.zeros(length, dtype=np.int64)
    all_positions[: len(positions)] = positions
    all_mass = np.zeros(length, dtype=np.int64)
    all_mass[:rest] = mass[:rest]
    ids = np.flatnonzero((all_positions > 0) | (all_mass > 0))
    return pl.DataFrame(
        {
            "token_id": [*ids.tolist(), None],
            "token": [*names(ids.tolist()), None],
            "positions": [*all_positions[ids].tolist(), 0],
            "output_mass": [*all_mass[ids].tolist(), int(mass[rest])],
        },
        schema={
            "token_id": pl.UInt32,
            "token": pl.String,
            "positions": pl.Int64,
            "output_mass": pl.UInt64,
        },
    )
