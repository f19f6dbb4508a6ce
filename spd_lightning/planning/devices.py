"""Devices to plan for: those of a table by their makers' data sheets, and the one at hand by short
measurements.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spd_lightning.errors import BadInput, nearest
from spd_lightning.planning.dry_run import Work

STREAM = 0.5
"""The share of a memory's bandwidth that operations other than matrix products are assumed to
reach.
"""


@dataclass(frozen=True)
class Device:
    """A machine as far as hours depend on it.

    Attributes:
        name: as people know it.
        half: peak of dense matrix products in bfloat16, in FLOP/s.
        single: the same in float32.
        bandwidth: of its memory, in byte/s.
        memory: in bytes.
        launch: seconds that one operation costs, however small.
        share: of the peak that matrix products of these shapes are assumed to reach.
        gpu: whether it is one: they decompose whole batches, where a processor picks the routed
            positions.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    memory: float
    launch: float = 1e-5
    share: float = 0.4
    gpu: bool = True

    def seconds(self, work: Work, mixed: bool) -> float:
        """How long some work takes; mixed: whether matrix products are in bfloat16."""
        products = work.flops / (self.share * (self.half if mixed else self.single))
        return products + work.moved / (STREAM * self.bandwidth) + work.operations * self.launch


DEVICES = {
    "h200": Device("NVIDIA H200", 989e12, 67e12, 4.8e12, 141e9),
    "h100": Device("NVIDIA H100", 989e12, 67e12, 3.35e12, 80e9),
    "a100": Device("NVIDIA A100 80 GB", 312e12, 19.5e12, 2.0e12, 80e9),
    "rtx4090": Device("NVIDIA RTX 4090", 165e12, 82.6e12, 1.0e12, 24e9),
    "t4": Device("NVIDIA T4 (no bfloat16)", 8.1e12, 8.1e12, 0.32e12, 16e9),
    "laptop": Device(
        "laptop CPU, 8 cores", 0.4e12, 0.4e12, 40e9, 16e9, launch=5e-6, share=0.6, gpu=False
    ),
}
"""Peaks from the makers' data sheets, without sparsity; the laptop is a guess."""


def measured(threads: int | None = None) -> Device:
    """This machine's GPU, or its processor where it has none, by short measurements."""
    cuda = torch.cuda.is_available()
    place = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else f"this CPU, {torch.get_num_threads()} threads"
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        half, single = (_products(place, dtype) for dtype in (torch.bfloat16, torch.float32))
        memory = machine_memory(place)
        launch = _launch(place)
        return Device(name, half, single, _bandwidth(place), memory, launch, share=0.7, gpu=cuda)
    finally:
        torch.set_num_threads(before)


def machine_memory(place: torch.device) -> float:
    """Bytes that a process can have there: a GPU's, or the machine's up to the limit set for it."""
    if place.type == "cuda":
        return float(torch.cuda.mem_get_info(place)[1])
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    words = limit.read_text().strip() if limit.exists() else "max"
    return float(min(physical, int(words))) if words.isdigit() else float(physical)


def _quickest(work: Callable[[], Any], place: torch.device) -> float:
    """Seconds of the quickest of many runs, within a fifth of a second."""
    best = float("inf")
    begun = time.perf_counter()
    while (started := time.perf_counter()) < begun + 0.2:
        work()
        if place.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def _products(place: torch.device, dtype: torch.dtype) -> float:
    size = 4096 if place.type == "cuda" else 512
    a = torch.ones(size, size, device=place, dtype=dtype)
    return 2 * size**3 / _quickest(lambda: a @ a, place)


def _bandwidth(place: torch.device) -> float:
    a = torch.ones(2**24, device=place)
    b = torch.empty_like(a)
    return 2 * a.numel() * a.element_size() / _quickest(lambda: b.copy_(a), place)


def _launch(place: torch.device) -> float:
    a = torch.ones(1, device=place)

    def many() -> None:
        for _ in range(1000):
            a.add_(1)

    return _quickest(many, place) / 1000


def device_named(name: str) -> Device:
    """Return a device of the table by its short name; `this` is measured.

    Raises:
        BadInput: the table has no device of this name.
    """
    if name == "this":
        return measured()
    if name not in DEVICES:
        raise BadInput(f"--device '{name}': not in the table; {nearest(name, [*DEVICES, 'this'])}")
    return DEVICES[name]
