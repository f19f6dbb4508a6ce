"""The index of a group of shards: where the rows of each prompt and of each component are.

A group has two files of indices, with plain arrays in safetensors:

    index/<name>.safetensors
        prompts                 the sorted ids of its prompts
        prompt_row              for each prompt, its row in the table `prompts`
        rows/<table>            for each prompt, its first row in another table; and the end
        groups/<table>          the first row of each row group of the Parquet file; and the end
        blocks/<table>          the digests of the file's blocks (`store.blocks`)
        units                   the sorted keys of its units: components, inputs, outputs, …
        unit_rows               for each unit, its first row in `nodes_by_component`; and the end
        unit_postings           for each unit, its first posting; and the end
    postings/<name>.safetensors, or in the index if they are few
        postings                [N, 2]: for each unit, the prompts in which it is a node, as places
                                in `prompts`, and the bits of its largest importance there, which
                                is NaN if it has none

A unit's key is the number of its layer times 2³² plus its component.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from spd_lightning.store.columns import INDEX
from spd_lightning.store.tables import SORTED

NO_UNITS = ("rest", "bias")
"""The kinds of nodes that stand for a whole position, and so are not units."""

BY_PROMPT = tuple(table for table, keys in SORTED.items() if keys[:1] == ("prompt_id",))
"""The tables that are sorted by prompt."""


class Rows(NamedTuple):
    """A range of rows of a file, and the row groups that contain it."""

    first_group: int
    last_group: int
    start: int
    stop: int


class Index:
    """The index of one group, for reading.

    Args:
        arrays: its arrays by name, as in the module's description.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays
        self.prompts = arrays["prompts"]
        self.bytes = sum(array.nbytes for array in arrays.values())

    def blocks(self, table: str) -> np.ndarray:
        """Return the digests of the blocks of a table's file, or of the postings."""
        return self._arrays[f"blocks/{table}"]

    def prompt_rows(self, table: str, prompt_id: int) -> Rows | None:
        """Return the rows of one prompt in a table that is sorted by prompt, or in `prompts`.

        The result is None if there are none.
        """
        place = int(np.searchsorted(self.prompts, np.uint64(prompt_id)))
        if place == len(self.prompts) or self.prompts[place] != np.uint64(prompt_id):
            return None
        if table == "prompts":
            row = int(self._arrays["prompt_row"][place])
            return self._rows(table, row, row + 1)
        starts = self._arrays[f"rows/{table}"]
        return self._rows(table, int(starts[place]), int(starts[place + 1]))

    def rows_before(self, table: str, prompts: np.ndarray) -> np.ndarray:
        """Return the number of rows before each of some sorted prompts, and of all rows."""
        starts = self._arrays[f"rows/{table}"].astype(np.int64)
        places = np.searchsorted(self.prompts, prompts)
        return np.append(starts[places], starts[-1])

    def span(self, table: str, start: int, stop: int) -> Rows | None:
        """Return a range of rows of a table, with their row groups."""
        return self._rows(table, start, stop)

    def unit_rows(self, key: int) -> Rows | None:
        """Return the rows of one unit in `nodes_by_component`, or None if it has none."""
        place = self._place(key)
        if place is None:
            return None
        starts = self._arrays["unit_rows"]
        return self._rows(INDEX, int(starts[place]), int(starts[place + 1]))

    @property
    def few_postings(self) -> np.ndarray | None:
        """The postings of all units, or None if they are in a file of their own."""
        return self._arrays.get("postings")

    def postings(self, key: int) -> tuple[int, int]:
        """Return the range of a unit's postings; it is empty if the unit never occurs."""
        place = self._place(key)
        if place is None:
            return 0, 0
        starts = self._arrays["unit_postings"]
        return int(starts[place]), int(starts[place + 1])

    def _place(self, key: int) -> int | None:
        units = self._arrays["units"]
        place = int(np.searchsorted(units, np.uint64(key)))
        if place == len(units) or units[place] != np.uint64(key):
            return None
        return place

    def _rows(self, table: str, start: int, stop: int) -> Rows | None:
        """Return a range of rows relative to the first of the row groups that contain it."""
        if start == stop:
            return None
        groups = self._arrays[f"groups/{table}"]
        first = int(np.searchsorted(groups, start, "right")) - 1
        last = int(np.searchsorted(groups, stop, "left")) - 1
        origin = int(groups[first])
        return Rows(first, last, start - origin, stop - origin)


class _UnitRows(NamedTuple):
    """The units of some rows of `nodes_by_component`.

    keys: [unit], sorted.
    row_counts: [unit], the number of rows of each.
    posting_counts: [unit], the number of postings of each.
    postings: [N, 2], as in the index.
    """

    keys: np.ndarray
    row_counts: np.ndarray
    posting_counts: np.ndarray
    postings: np.ndarray


class IndexBuilder:
    """Collects the index of a group while its tables are written.

    Args:
        prompts: the ids of the group's prompts.
    """

    def __init__(self, prompts: np.ndarray):
        self.prompts = np.sort(prompts.astype(np.uint64))
        self._prompt_ids = list[np.ndarray]()
        self._counts = dict[str, np.ndarray]()
        self._arrays = dict[str, np.ndarray]()
        self._units = list[_UnitRows]()

    def add(self, table: str, frame: pl.DataFrame) -> None:
        """Add the rows of a table; those of one table can be added in several pieces, in order.

        The rows of one layer in `nodes_by_component` are added at once.
        """
        if table == INDEX:
            self._add_units(frame)
        elif table == "prompts":
            self._prompt_ids.append(frame["prompt_id"].to_numpy())
        elif table in BY_PROMPT:
            ids = frame["prompt_id"].to_numpy()
            places = np.searchsorted(self.prompts, ids)
            counts = np.bincount(places, minlength=len(self.prompts))
            self._counts[table] = self._counts.get(table, 0) + counts

    def file(self, name: str, groups: Sequence[int], blocks: np.ndarray) -> None:
        """Add the first rows of a file's row groups with their end, and the digests of its blocks.

        Args:
            name: the table, or `postings`.
            groups: empty for `postings`.
            blocks: the digests.
        """
        self._arrays[f"groups/{name}"] = np.array(groups, np.uint64)
        self._arrays[f"blocks/{name}"] = blocks

    @property
    def postings(self) -> np.ndarray:
        """The postings of all units: [N, 2]."""
        return np.concatenate(
            [np.zeros((0, 2), np.uint32), *(part.postings for part in self._units)]
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of the index, once all tables and files have been added."""
        rows = {f"rows/{table}": _starts(counts) for table, counts in self._counts.items()}
        order = np.argsort(np.concatenate(self._prompt_ids)).astype(np.uint64)
        if self._units:
            row_counts = np.concatenate([part.row_counts for part in self._units])
            posting_counts = np.concatenate([part.posting_counts for part in self._units])
            rows["units"] = np.concatenate([part.keys for part in self._units])
            rows["unit_rows"] = _starts(row_counts)
            rows["unit_postings"] = _starts(posting_counts)
        return {"prompts": self.prompts, "prompt_row": order, **rows, **self._arrays}

    def _add_units(self, frame: pl.DataFrame) -> None:
        """Add the units of `nodes_by_component`, whose rows are sorted by unit and prompt."""
        keys = unit_keys(frame["layer"].to_physical(), frame["component"])  # [row]
        units, row_counts = np.unique(keys, return_counts=True)  # [unit] each
        is_unit = ~frame["kind"].cast(pl.String).is_in(NO_UNITS)
        nodes = frame.select("prompt_id", "importance").with_columns(key=pl.Series(keys))
        by_prompt = nodes.filter(is_unit).group_by("key", "prompt_id", maintain_order=True)
        largest = by_prompt.agg(pl.col("importance").max())  # one row per posting
        places = np.searchsorted(self.prompts, largest["prompt_id"].to_numpy())
        importance = largest["importance"].fill_null(float("nan")).to_numpy()
        bits = importance.astype(np.float32).view(np.uint32)
        postings = np.stack([places.astype(np.uint32), bits], axis=1)  # [N, 2]
        ends = np.searchsorted(largest["key"].to_numpy(), units, "right")  # [unit]
        posting_counts = np.diff(ends, prepend=0)
        self._units.append(_UnitRows(units, row_counts, posting_counts, postings))


def _starts(counts: np.ndarray) -> np.ndarray:
    """Return the sum of the counts before each entry, and the sum of all counts at the end."""
    return np.append(0, np.cumsum(counts)).astype(np.uint64)


def unit_keys(layers: pl.Series, components: pl.Series) -> np.ndarray:
    """Return the keys of units, given the numbers of their layers and their components."""
    numbers = layers.to_numpy().astype(np.uint64)
    return (numbers << np.uint64(32)) | components.to_numpy().astype(np.uint64)


def unit_key(layer: int, component: int) -> int:
    """Return the key of one unit."""
    return (layer << 32) | component


def missing_array(arrays: Mapping[str, Any], tables: Sequence[str], postings: bool) -> str | None:
    """Return the name of an array that an index of these tables should have, or None."""
    wanted = {"prompts", "prompt_row"}
    if postings:
        wanted.add("blocks/postings")
    for table in tables:
        wanted |= {f"groups/{table}", f"blocks/{table}"}
        if table in BY_PROMPT:
            wanted.add(f"rows/{table}")
        if table == INDEX:
            wanted |= {"units", "unit_rows", "unit_postings"}
            if not postings:
                wanted.add("postings")
    missing = sorted(wanted - set(arrays))
    return missing[0] if missing else None
