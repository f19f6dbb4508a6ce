"""plan: what a fit of a config will take on a device, printed before anything is trained."""

from __future__ import annotations  # sizes are names of a module that loads torch

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spd_lightning.commands import loading, options
from spd_lightning.commands.arguments import RunArguments

if TYPE_CHECKING:
    from spd_lightning.planning.devices import Device
    from spd_lightning.planning.estimate import Size

GiB = 2**30


def main(argv: Sequence[str]) -> None:
    """Prints what the fit of a config will take: parameters, memory, FLOPs of a step, hours."""
    device = options.read_some("plan", argv)[0].device
    request = RunArguments.parse("plan", argv)
    config = request.config
    with loading.trainer():
        print("\n".join(_lines(config, request.overrides, device)))


def _lines(
    config: Mapping[str, Any], overrides: Sequence[str], device: str | None
) -> Iterator[str]:
    from spd_lightning.planning.devices import DEVICES, device_named, measured
    from spd_lightning.planning.estimate import size_of
    from spd_lightning.training.session import Settings

    settings = Settings(config, overrides)
    sizes = {False: size_of(settings)}
    devices = [measured(), *DEVICES.values()] if device is None else [device_named(device)]
    if sizes[False].step.gathered and any(device.gpu for device in devices):
        sizes[True] = size_of(settings, gpu=True)
    return table([(device, sizes.get(device.gpu, sizes[False])) for device in devices])


def table(sizes: Sequence[tuple[Device, Size]]) -> Iterator[str]:
    """The lines of a plan: memory and work on the first device, hours on all."""
    size = sizes[0][1]
    names = [site.name for site in size.sites]
    names += [*size.memory, *size.step.parts, *(device.name for device, _ in sizes)]
    width = max([LEAST_WIDTH, *map(len, names)])
    yield from _parameters(size, width)
    yield ""
    yield from _memory(size, width)
    yield ""
    yield from _work(size, width)
    yield ""
    yield from _hours(sizes, width)


LEAST_WIDTH = 32
"""The least width of the column of names. Longer names widen it in all parts of a plan, so that
numbers line up.
"""


def _parameters(size: Size, width: int) -> Iterator[str]:
    yield f"{'parameters':<{width + 2}} {'C':>8} {'number':>16}"
    yield f"  {'target':<{width}} {'':>8} {size.target:>16,}"
    for site in size.sites:
        yield f"  {site.name:<{width}} {site.C:>8,} {site.parameters:>16,}"
    yield f"  {'importance functions':<{width}} {'':>8} {size.importance:>16,}"


def _memory(size: Size, width: int) -> Iterator[str]:
    yield f"{'memory':<{width + 2}} {'GiB':>25}"
    for name, count in size.memory.items():
        yield f"  {name:<{width}} {count / GiB:>25.3f}"
    yield f"  {'together':<{width}} {sum(size.memory.values()) / GiB:>25.3f}"


def _work(size: Size, width: int) -> Iterator[str]:
    rows = {**size.step.parts, "together": size.step.total}
    unit, per = _unit(size.step.total.flops)
    heads = f"{f'forward {unit}':>15} {f'backward {unit}':>16} {'moved GB':>9} {'share':>6}"
    yield f"{f'a step of {size.tokens:,}':<{width + 2}} {heads}"
    for name, work in rows.items():
        share = work.flops / max(1, size.step.total.flops)
        yield (
            f"  {name:<{width}} {work.forward / per:>15,.3f} {work.backward / per:>16,.3f} "
            f"{work.moved / 1e9:>9,.2f}"
            f" {share:>6.1%}"
        )


def _unit(flops: int) -> tuple[str, float]:
    return ("TFLOP", 1e12) if flops >= 1e11 else ("GFLOP", 1e9)


def _per_second(peak: float) -> str:
    return f"{peak / 1e12:,.3g} TFLOP/s" if peak >= 1e11 else f"{peak / 1e9:,.3g} GFLOP/s"


def _hours(sizes: Sequence[tuple[Device, Size]], width: int) -> Iterator[str]:
    size = sizes[0][1]
    precision = "bfloat16" if size.mixed else "float32"
    heads = f"{'ms a step':>10} {'together':>9} {'memory':>9}   assumed"
    yield f"{f'{size.steps:,} steps in {precision}':<{width + 2}} {heads}"
    for device, size in sizes:
        peak = device.half if size.mixed else device.single
        fits = "fits" if sum(size.memory.values()) <= device.memory else "too small"
        yield (
            f"  {device.name:<{width}} {1000 * size.seconds(device):>10,.1f} "
            f"{_span(size.hours(device)):>9} {fits:>9}"
            f"   {device.share:.0%} of {_per_second(peak)}, {device.bandwidth / 1e9:,.3g} GB/s,"
            f" {1e6 * device.launch:,.0f} µs an operation, {device.memory / GiB:,.0f} GiB"
        )
    yield "  evaluations, checkpoints and the training of the target come on top"


def _span(hours: float) -> str:
    """A time as people say it."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"
