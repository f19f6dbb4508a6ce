"""plan: estimate the memory, work and time of a fit, and the memory of a predict, beforehand."""

from __future__ import annotations  # some types are of modules that load torch

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spd_lightning.commands import loading, options
from spd_lightning.commands.arguments import RunArguments

if TYPE_CHECKING:
    from spd_lightning.planning.devices import Device
    from spd_lightning.planning.estimate import Size

GiB = 2**30


def main(argv: Sequence[str]) -> None:
    """Print the parameters, memory, FLOPs and hours that the fit of a config will take."""
    arguments, _ = options.read_some("plan", argv)
    request = RunArguments.parse("plan", argv)
    config = request.config
    with loading.trainer():
        overrides = request.overrides
        device = arguments.device
        lines = _lines(config, overrides, device)
        text = "\n".join(lines)
        print(text)


def _lines(config: Mapping[str, Any], overrides: Sequence[str], name: str | None) -> Iterator[str]:
    """Yield the lines of a config's plan for the device of this name, or for all devices."""
    from spd_lightning.planning.devices import DEVICES, device_named, measured
    from spd_lightning.planning.estimate import size_of
    from spd_lightning.planning.harvests import harvest_memory
    from spd_lightning.training.session import Settings

    settings = Settings(config, overrides)
    size = size_of(settings)
    if name is None:
        devices = [measured(), *DEVICES.values()]
    else:
        devices = [device_named(name)]
    gpu_size = size
    if size.step.gathered and any(device.gpu for device in devices):
        gpu_size = size_of(settings, gpu=True)
    sizes = [(device, gpu_size if device.gpu else size) for device in devices]
    yield from table(sizes, harvest_memory(settings))


def table(
    sizes: Sequence[tuple[Device, Size]], predict: Mapping[str, int] | None = None
) -> Iterator[str]:
    """Yield the lines of a plan: memory and work on the first device, hours on all of them.

    predict: the bytes that the harvesters need, by purpose; none if omitted.
    """
    _, size = sizes[0]
    predict = predict or {}
    names = [site.name for site in size.sites]
    names += [*size.memory, *size.step.parts, *predict]
    names += [device.name for device, _ in sizes]
    width = max([LEAST_WIDTH, *map(len, names)])
    yield from _parameters(size, width)
    yield ""
    yield from _memory("memory", size.memory, width)
    yield ""
    yield from _work(size, width)
    yield ""
    yield from _hours(sizes, width)
    if predict:
        yield ""
        yield from _memory("memory of predict, at most", predict, width)


LEAST_WIDTH = 32
"""The smallest width of the column of names.

Longer names widen it in all parts of a plan, so that numbers line up.
"""


def _parameters(size: Size, width: int) -> Iterator[str]:
    """Yield the number of parameters of the target, the sites and the importance functions."""
    rows = [
        ("target", "", size.target),
        *((site.name, f"{site.C:,}", site.parameters) for site in size.sites),
        ("importance functions", "", size.importance),
    ]
    yield f"{'parameters':<{width + 2}} {'C':>8} {'number':>16}"
    for name, components, parameters in rows:
        yield f"  {name:<{width}} {components:>8} {parameters:>16,}"


def _memory(title: str, memory: Mapping[str, int], width: int) -> Iterator[str]:
    """Yield the memory of every part, and the total."""
    total = sum(memory.values())
    rows = {**memory, "total": total}
    yield f"{title:<{width + 2}} {'GiB':>25}"
    for name, count in rows.items():
        gib = count / GiB
        yield f"  {name:<{width}} {gib:>25.3f}"


def _work(size: Size, width: int) -> Iterator[str]:
    """Yield the work of every part of a step, and the total."""
    total = size.step.total
    rows = {**size.step.parts, "total": total}
    unit = "GFLOP"
    flops_per_unit = 1e9
    if total.flops >= 1e11:
        unit = "TFLOP"
        flops_per_unit = 1e12
    title = f"a step of {size.tokens:,}"
    forward_head = f"forward {unit}"
    backward_head = f"backward {unit}"
    heads = f"{forward_head:>15} {backward_head:>16} {'moved GB':>9} {'share':>6}"
    yield f"{title:<{width + 2}} {heads}"
    for name, work in rows.items():
        forward = work.forward / flops_per_unit
        backward = work.backward / flops_per_unit
        moved = work.moved / 1e9
        share = work.flops / max(1, total.flops)
        values = f"{forward:>15,.3f} {backward:>16,.3f} {moved:>9,.2f} {share:>6.1%}"
        yield f"  {name:<{width}} {values}"


def _hours(sizes: Sequence[tuple[Device, Size]], width: int) -> Iterator[str]:
    """Yield the time on every device, whether memory suffices, and the assumed properties."""
    from spd_lightning.planning.precision import FLOAT32, slow_bfloat16

    _, size = sizes[0]
    precision = "bfloat16" if size.mixed else "float32"
    title = f"{size.steps:,} steps in {precision}"
    heads = f"{'ms a step':>10} {'total':>9} {'memory':>9}   assumed"
    yield f"{title:<{width + 2}} {heads}"
    for device, size in sizes:
        milliseconds = 1000 * size.seconds(device)
        duration = _duration(size.hours(device))
        needed = sum(size.memory.values())
        memory = "fits" if needed <= device.memory else "too small"
        values = f"{milliseconds:>10,.1f} {duration:>9} {memory:>9}"
        assumed = _assumed(device, size.mixed)
        yield f"  {device.name:<{width}} {values}   {assumed}"
    yield "  evaluations, checkpoints and the training of the target are not included"
    for device, size in sizes:
        slow = slow_bfloat16(device.half, device.single)
        if size.mixed and slow:
            yield f"  {device.name}: {slow}; to train in float32, add {FLOAT32}"


def _assumed(device: Device, mixed: bool) -> str:
    """Return the properties of a device that an estimate is based on."""
    from spd_lightning.planning.precision import per_second

    peak = device.half if mixed else device.single
    bandwidth = device.bandwidth / 1e9
    microseconds = 1e6 * device.launch
    memory = device.memory / GiB
    return (
        f"{device.share:.0%} of {per_second(peak)}, "
        f"{bandwidth:,.3g} GB/s, "
        f"{microseconds:,.0f} µs an operation, "
        f"{memory:,.0f} GiB"
    )


def _duration(hours: float) -> str:
    """Return a time in a readable unit."""
    minutes = 60 * hours
    seconds = 3600 * hours
    days = hours / 24
    if hours < 1 / 60:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes:.0f} min"
    if hours < 48:
        return f"{hours:.1f} h"
    return f"{days:,.1f} days"
