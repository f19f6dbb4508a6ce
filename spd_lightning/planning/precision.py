"""Advice for processors that compute bfloat16 slowly: train in float32.

CPUs without instructions for bfloat16 emulate it. A product can then take fifty times as long as in
float32.
"""

from collections.abc import Mapping
from typing import Any

from spd_lightning.planning.devices import place_of, products_per_second

SLOW = 0.5
"""bfloat16 is slow if it reaches less than this share of the speed of float32."""

FLOAT32 = "--trainer.precision 32-true"


def is_mixed(trainer: Mapping[str, Any]) -> bool:
    """Return whether a trainer computes matrix products in bfloat16."""
    precision = trainer.get("precision")
    return str(precision or "").startswith("bf16")


def slow_bfloat16(half: float, single: float) -> str:
    """Return a clause that compares both speeds, in FLOP/s; empty unless bfloat16 is slow."""
    if half >= SLOW * single:
        return ""
    return f"bfloat16 runs at {per_second(half)}, and float32 at {per_second(single)}"


def slow_here(trainer: Mapping[str, Any]) -> str:
    """Return the same clause for a trainer's settings on this machine; empty if it does not apply.

    Only CPUs are measured, in less than a second.
    """
    place = place_of(trainer)
    if not is_mixed(trainer) or place.type != "cpu":
        return ""
    half, single = products_per_second(place)
    return slow_bfloat16(half, single)


def per_second(flops: float) -> str:
    """Return a rate of computation in a readable unit."""
    if flops >= 1e11:
        rate = flops / 1e12
        return f"{rate:,.3g} TFLOP/s"
    rate = flops / 1e9
    return f"{rate:,.3g} GFLOP/s"
