"""Results of runs as a table: errors against the known truth for toys, kept performance for
language models.
"""

from collections.abc import Iterator, Sequence
from typing import Any

Summary = dict[str, Any]


def table(rows: Sequence[tuple[str, Summary]]) -> str:
    """Runs and what they reached, a line for each of their sites; runs with known truth apart from
    those without.
    """
    judged = [(name, summary) for name, summary in rows if _has_truth(summary)]
    others = [(name, summary) for name, summary in rows if not _has_truth(summary)]
    parts = [_judged(judged)] if judged else []
    parts += [_measured(others)] if others else []
    return "\n\n".join("\n".join(lines) for lines in parts)


def _has_truth(summary: Summary) -> bool:
    return any(key.startswith(("mmcs/", "identity_error/", "dense_error/")) for key in summary)


def sites_of(summary: Summary) -> list[str]:
    """The sites that a summary speaks of, in the model's order."""
    return [key.removeprefix("alive/") for key in summary if key.startswith("alive/")]


def _width(rows: Sequence[tuple[str, Summary]]) -> tuple[int, int]:
    """Return the widths of the columns `run` and `site`."""
    names = [name for name, _ in rows]
    sites = [site for _, summary in rows for site in sites_of(summary)]
    return max(18, *map(len, names)), max([18, *map(len, sites)])


def _judged(rows: Sequence[tuple[str, Summary]]) -> Iterator[str]:
    """Runs with known truth: how near they come to it."""
    run, at = _width(rows)
    yield (
        f"{'run':<{run}} {'site':<{at}} {'MMCS':>6} {'ML2R':>6} {'alive':>6} {'L0':>7} "
        f"{'error':>6} {'seconds':>8}"
    )
    for name, summary in rows:
        seconds = f"{summary.get('seconds/fit', 0):.0f}"
        for site in sites_of(summary):
            error = summary.get(f"identity_error/{site}", summary.get(f"dense_error/{site}", ""))
            mmcs, ml2r = (_figure(summary.get(f"{key}/{site}"), 3) for key in ("mmcs", "ml2r"))
            alive = summary[f"alive/{site}"]
            l0 = _figure(summary.get(f"l0/{site}"), 2)
            line = (
                f"{name:<{run}} {site:<{at}} {mmcs:>6} {ml2r:>6} {alive:>6} {l0:>7} {error:>6} "
                f"{seconds:>8}"
            )
            yield line.rstrip()
            name = seconds = ""


def _measured(rows: Sequence[tuple[str, Summary]]) -> Iterator[str]:
    """Runs without known truth: what their components keep of the target, and how many it takes."""
    run, at = _width(rows)
    yield f"{'run':<{run}} {'site':<{at}} {'alive':>6} {'L0':>8} {'seconds':>8}"
    for name, summary in rows:
        seconds = f"{summary.get('seconds/fit', 0):.0f}"
        for site in sites_of(summary):
            alive = summary[f"alive/{site}"]
            l0 = _figure(summary.get(f"l0/{site}"), 2)
            yield f"{name:<{run}} {site:<{at}} {alive:>6} {l0:>8} {seconds:>8}".rstrip()
            name = seconds = ""
        yield from _kept(summary)


def _kept(summary: Summary) -> Iterator[str]:
    """Yield how much of the output is kept under importances as masks, and with every component
    on.
    """
    said = [
        _with_error(summary, "kl/ci", "KL", " nats"),
        _with_error(summary, "mse/ci", "squared error", ""),
        _with_error(summary, "task_difference/ci", "loss difference", ""),
    ]
    if (share := summary.get("recovered/ci")) is not None:
        said.append(f"recovered {100 * share:.1f} %")
    if any(said):
        yield f"  under CI masks: {', '.join(filter(None, said))}"
    loss = summary.get("task/target")
    all_on = _with_error(summary, "task_difference/unmasked", "loss difference", "")
    if all_on:
        beside = f", the target's loss is {loss:.4g}" if loss else ""
        yield f"  unmasked: {all_on}{beside}"


def _with_error(summary: Summary, key: str, what: str, unit: str) -> str:
    """A figure in words, with its standard error where that is known; nothing where it is not."""
    value = summary.get(key)
    error = summary.get(f"se/{key}")
    if value is None:
        return ""
    return f"{what} {value:.4g}" + (f" ± {error:.2g}" if error is not None else "") + unit


def _figure(value: int | float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
