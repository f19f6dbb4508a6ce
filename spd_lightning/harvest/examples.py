"""Examples of a unit's firings: a uniform sample, and the strongest (law H1).

Each firing has a key that depends only on the seed, the unit, the prompt and the position. A sample
is the k firings with the smallest keys, so it does not depend on the order of the prompts, on the
number of processes, or on interruptions. Samples of two sets of prompts merge into the sample of
both: join them, and keep the k smallest keys again. There are four kinds of examples:

    uniform     the key is a hash of the firing: every firing is equally likely to be kept
    importance  the upper half of the key is smaller for larger importances, the lower is the hash
    positive    the same for activations above 0
    negative    the same for activations below 0, by size
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float32, Int64, UInt32, UInt64

from spd_lightning.store.columns import EXAMPLE_KINDS
from spd_lightning.store.tables import smallest

_ROWS_BETWEEN_SORTS = 1 << 21
"""New candidates that are collected before the samples are sorted again."""


class Firings(NamedTuple):
    """Firings as arrays, one entry each.

    unit: the number of the unit among those of all layers.
    importance: None for units without importances.
    """

    unit: Int64[np.ndarray, " firing"]
    prompt_id: UInt64[np.ndarray, " firing"]
    pos: UInt32[np.ndarray, " firing"]
    importance: Float32[np.ndarray, " firing"] | None
    activation: Float32[np.ndarray, " firing"]


class Examples:
    """The firings with the smallest keys, of each unit and kind.

    Args:
        counts: the number of units of each layer.
        kept: the number of examples of each kind.
        seed: determines the hashes.
    """

    def __init__(self, counts: Mapping[str, int], kept: Mapping[str, int], seed: int):
        self._unit_hashes = unit_hashes(counts, seed)
        self._kept = dict(kept)
        self._samples = {
            kind: _Sample(number, sum(counts.values())) for kind, number in kept.items()
        }

    def add(self, firings: Firings) -> None:
        """Keep those of some firings whose keys are small enough."""
        hashes = firing_hashes(self._unit_hashes[firings.unit], firings.prompt_id, firings.pos)
        positive = firings.activation > 0
        negative = firings.activation < 0
        self._samples["uniform"].add(firings, hashes)
        if firings.importance is not None:
            keys = descending(firings.importance, hashes)
            self._samples["importance"].add(firings, keys)
        keys = descending(np.abs(firings.activation), hashes)
        self._samples["positive"].add(firings, keys, positive)
        self._samples["negative"].add(firings, keys, negative)

    def rows(self) -> pl.DataFrame:
        """Return the examples: unit, kind, key, prompt_id, pos, importance, activation."""
        kinds = pl.Enum(EXAMPLE_KINDS)
        frames = []
        for kind, sample in self._samples.items():
            frame = sample.rows()
            frames.append(frame.with_columns(kind=pl.lit(kind, kinds)))
        return pl.concat(frames)


class _Sample:
    """The k firings of each unit with the smallest keys."""

    def __init__(self, k: int, units: int):
        self._k = k
        # A firing with a larger key than this cannot be kept.
        self._largest_key = np.full(units, np.iinfo(np.uint64).max, dtype=np.uint64)
        self._frames: list[pl.DataFrame] = []
        self._new_rows = 0

    def add(
        self,
        firings: Firings,
        keys: UInt64[np.ndarray, " firing"],
        eligible: np.ndarray | None = None,
    ) -> None:
        """Keep those of some firings whose keys are small enough.

        eligible: only these firings; all if omitted.
        """
        chosen = keys <= self._largest_key[firings.unit]
        if eligible is not None:
            chosen &= eligible
        importance = None
        if firings.importance is not None:
            importance = firings.importance[chosen]
        columns = {
            "unit": firings.unit[chosen],
            "key": keys[chosen],
            "prompt_id": firings.prompt_id[chosen],
            "pos": firings.pos[chosen],
            "importance": importance,
            "activation": firings.activation[chosen],
        }
        frame = pl.DataFrame(columns, schema_overrides={"importance": pl.Float32})
        self._frames.append(frame)
        self._new_rows += frame.height
        if self._new_rows > _ROWS_BETWEEN_SORTS:
            self._trim()

    def rows(self) -> pl.DataFrame:
        """Return the kept firings."""
        self._trim()
        return self._frames[0]

    def _trim(self) -> None:
        """Drop all but the k smallest keys of each unit, and note the largest key that is kept."""
        candidates = pl.concat(self._frames)
        kept = smallest(candidates, ["unit"], self._k)
        self._frames = [kept]
        self._new_rows = 0
        full = (
            kept.group_by("unit")
            .agg(pl.len(), pl.col("key").max())
            .filter(pl.col("len") == self._k)
        )
        self._largest_key[full["unit"].to_numpy()] = full["key"].to_numpy()


def unit_hashes(counts: Mapping[str, int], seed: int) -> UInt64[np.ndarray, " unit"]:
    """Return a hash of the seed and the name of each unit, equal on all machines."""
    hashes = []
    for layer, count in counts.items():
        for unit in range(count):
            name = f"{seed} {layer}:{unit}"
            digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
            hashes.append(int.from_bytes(digest, "little"))
    return np.array(hashes, dtype=np.uint64)


def firing_hashes(
    unit_hash: UInt64[np.ndarray, " firing"],
    prompt_id: UInt64[np.ndarray, " firing"],
    pos: UInt32[np.ndarray, " firing"],
) -> UInt64[np.ndarray, " firing"]:
    """Return a hash of each firing: its unit, prompt and position."""
    mixed = _mix(unit_hash ^ _mix(prompt_id))
    return _mix(mixed + pos.astype(np.uint64))


def _mix(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Return a one-to-one hash of 64-bit numbers.

    This is the step of the generator SplitMix64 (Steele, Lea and Flood, 2014). Products are taken
    modulo 2⁶⁴.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def descending(
    values: Float32[np.ndarray, " firing"], hashes: UInt64[np.ndarray, " firing"]
) -> UInt64[np.ndarray, " firing"]:
    """Return keys that are smaller for larger values; equal values are ordered by their hashes.

    values: at least 0. The bits of such floats, read as integers, are in the order of the floats.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    upper = np.uint32(0xFFFFFFFF) - bits
    half = np.uint64(32)
    upper_half = upper.astype(np.uint64) << half
    lower_half = hashes >> half
    return upper_half | lower_half
