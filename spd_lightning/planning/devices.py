"""Devices to plan for: a table from data sheets, and this machine by short measurements."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spd_lightning.errors import BadInput, nearest
from spd_lightning.planning.dry_run import Work

STREAM = 0.5
"""Share of the memory bandwidth that operations other than matrix products reach (assumed)."""


@dataclass(frozen=True)
class Device:
    """The properties of a machine that determine how long a step takes.

    Attributes:
        name: name to show.
        half: peak of dense matrix products in bfloat16, in FLOP/s.
        single: peak of dense matrix products in float32, in FLOP/s.
        bandwidth: memory bandwidth, in bytes per second.
        memory: memory size, in bytes.
        launch: seconds of overhead per operation.
        share: share of the peak that matrix products of these shapes reach (assumed).
        gpu: whether it is a GPU. GPUs decompose every position; CPUs only the routed ones.
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
        """Estimate the seconds that some work takes.

        Args:
            work: the work.
            mixed: whether matrix products are in bfloat16.
        """
        peak = self.half if mixed else self.single
        products = work.flops / (self.share * peak)
        moves = work.moved / (STREAM * self.bandwidth)
        launches = work.operations * self.launch
        return products + moves + launches


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
"""Known devices: peaks from data sheets, without sparsity. The laptop is a guess."""


def measured(threads: int | None = None) -> Device:
    """Measure this machine's GPU, or its CPU if it has no GPU."""
    cuda = torch.cuda.is_available()
    place = torch.device("cuda" if cuda else "cpu")
    before = torch.get_num_threads()
    name = torch.cuda.get_device_name() if cuda else f"this CPU, {before} threads"
    torch.set_num_threads(threads or before)
    try:
        half, single = products_per_second(place)
        return Device(
            name=name,
            half=half,
            single=single,
            memory=machine_memory(place),
            launch=_launch(place),
            bandwidth=_bandwidth(place),
            share=0.7,
            gpu=cuda,
        )
    finally:
        torch.set_num_threads(before)


def place_of(trainer: Mapping[str, Any]) -> torch.device:
    """Return the device that a trainer with these settings chooses."""
    accelerator = trainer.get("accelerator", "auto")
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def machine_memory(place: torch.device) -> float:
    """Return the bytes that a process can use: a GPU's memory, or the machine's up to its limit."""
    if place.type == "cuda":
        return float(torch.cuda.mem_get_info(place)[1])
    page = os.sysconf("SC_PAGE_SIZE")
    physical = page * os.sysconf("SC_PHYS_PAGES")
    limit_file = Path("/sys/fs/cgroup/memory.max")
    limit = limit_file.read_text().strip() if limit_file.exists() else "max"
    if limit.isdigit():
        return float(min(physical, int(limit)))
    return float(physical)


def _quickest(work: Callable[[], Any], place: torch.device) -> float:
    """Repeat a task for a fifth of a second, and return the seconds of the fastest run."""
    best = float("inf")
    end = time.perf_counter() + 0.2
    while (started := time.perf_counter()) < end:
        work()
        if place.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def products_per_second(place: torch.device) -> tuple[float, float]:
    """Measure the FLOP/s of matrix products in bfloat16 and in float32."""
    return _products(place, torch.bfloat16), _products(place, torch.float32)


def _products(place: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a matrix product."""
    size = 4096 if place.type == "cuda" else 512
    a = torch.ones(size, size, device=place, dtype=dtype)
    flops = 2 * size**3
    return flops / _quickest(lambda: a @ a, place)


def _bandwidth(place: torch.device) -> float:
    """Measure the bytes per second of a copy, which reads and writes each byte."""
    a = torch.ones(2**24, device=place)
    b = torch.empty_like(a)
    moved = 2 * a.numel() * a.element_size()
    return moved / _quickest(lambda: b.copy_(a), place)


def _launch(place: torch.device) -> float:
    """Measure the seconds of an operation on a single number."""
    a = torch.ones(1, device=place)

    def many() -> None:
        for _ in range(1000):
            a.add_(1)

    return _quickest(many, place) / 1000


def device_named(name: str) -> Device:
    """Return the device with this short name; `this` measures this machine.

    Raises:
        BadInput: the table has no device of this name.
    """
    if name == "this":
        return measured()
    if name not in DEVICES:
        hint = nearest(name, [*DEVICES, "this"])
        raise BadInput(f"--device '{name}': not in the table; {hint}")
    return DEVICES[name]
