"""Tables of results: errors against a known truth for toys, kept performance for language models.

Every function takes summaries of runs, as `summary.json` holds them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Summary = dict[str, Any]


def table(rows: Sequence[tuple[str, Summary]]) -> str:
    """Return the results of runs by name, one line for each site.

    Runs with a known truth come first, in a table of their own.
    """
    with_truth = []
    without_truth = []
    for name, summary in rows:
        group = with_truth if _has_truth(summary) else without_truth
        group.append((name, summary))
    parts = []
    if with_truth:
        parts.append("\n".join(_lines_with_truth(with_truth)))
    if without_truth:
        parts.append("\n".join(_lines_without_truth(without_truth)))
    return "\n\n".join(parts)


TRUTH = ("mmcs/", "identity_error/", "dense_error/")
"""The beginnings of figures that compare components with a known truth."""


def _has_truth(summary: Summary) -> bool:
    """Return whether a summary has figures against a known truth."""
    return any(key.startswith(TRUTH) for key in summary)


def sites_of(summary: Summary) -> list[str]:
    """Return the sites of a summary, in the model's order."""
    return [key.removeprefix("alive/") for key in summary if key.startswith("alive/")]


def _widths(rows: Sequence[tuple[str, Summary]]) -> tuple[int, int]:
    """Return the widths of the columns `run` and `site`."""
    run_width = 18
    site_width = 18
    for name, summary in rows:
        run_width = max(run_width, len(name))
        for site in sites_of(summary):
            site_width = max(site_width, len(site))
    return run_width, site_width


def _lines_with_truth(rows: Sequence[tuple[str, Summary]]) -> Iterator[str]:
    """Yield the table of runs with a known truth: how close their components come to it."""
    run_width, site_width = _widths(rows)
    yield (
        f"{'run':<{run_width}} {'site':<{site_width}} {'MMCS':>6} {'ML2R':>6} {'alive':>6} "
        f"{'L0':>7} {'error':>6} {'seconds':>8}"
    )
    for run, seconds, site, summary in _site_rows(rows):
        dense_error = summary.get(f"dense_error/{site}", "")
        error = summary.get(f"identity_error/{site}", dense_error)
        mmcs = _figure(summary.get(f"mmcs/{site}"), 3)
        ml2r = _figure(summary.get(f"ml2r/{site}"), 3)
        alive = summary[f"alive/{site}"]
        l0 = _figure(summary.get(f"l0/{site}"), 2)
        line = (
            f"{run:<{run_width}} {site:<{site_width}} {mmcs:>6} {ml2r:>6} {alive:>6} "
            f"{l0:>7} {error:>6} {seconds:>8}"
        )
        yield line.rstrip()


def _site_rows(rows: Sequence[tuple[str, Summary]]) -> Iterator[tuple[str, str, str, Summary]]:
    """Yield run, seconds, site and summary for each site; run and seconds only for its first."""
    for name, summary in rows:
        run = name
        seconds = _seconds(summary)
        for site in sites_of(summary):
            yield run, seconds, site, summary
            run = ""
            seconds = ""


def _seconds(summary: Summary) -> str:
    return f"{summary.get('seconds/fit', 0):.0f}"


def _lines_without_truth(rows: Sequence[tuple[str, Summary]]) -> Iterator[str]:
    """Yield the table of runs without a known truth: components alive, and performance kept."""
    run_width, site_width = _widths(rows)
    yield f"{'run':<{run_width}} {'site':<{site_width}} {'alive':>6} {'L0':>8} {'seconds':>8}"
    for name, summary in rows:
        for run, seconds, site, _ in _site_rows([(name, summary)]):
            alive = summary[f"alive/{site}"]
            l0 = _figure(summary.get(f"l0/{site}"), 2)
            line = f"{run:<{run_width}} {site:<{site_width}} {alive:>6} {l0:>8} {seconds:>8}"
            yield line.rstrip()
        yield from _performance(summary)


def _performance(summary: Summary) -> Iterator[str]:
    """Yield the performance kept under importances as masks, and with every component on."""
    masked = [
        _with_error(summary, "kl/ci", "KL", " nats"),
        _with_error(summary, "mse/ci", "squared error", ""),
        _with_error(summary, "task_difference/ci", "loss difference", ""),
    ]
    recovered = summary.get("recovered/ci")
    if recovered is not None:
        masked.append(f"recovered {100 * recovered:.1f} %")
    known = [text for text in masked if text]
    if known:
        yield f"  under CI masks: {', '.join(known)}"
    unmasked = _with_error(summary, "task_difference/unmasked", "loss difference", "")
    if not unmasked:
        return
    loss = summary.get("task/target")
    if loss:
        unmasked += f", the target's loss is {loss:.4g}"
    yield f"  unmasked: {unmasked}"


def _with_error(summary: Mapping[str, Any], key: str, label: str, unit: str) -> str:
    """Return a figure with its standard error if that is known; empty without the figure."""
    value = summary.get(key)
    if value is None:
        return ""
    error = summary.get(f"se/{key}")
    return f"{label} {uncertain(value, error)}{unit}"


def uncertain(value: float | int, error: float | None) -> str:
    """Format a value to its last certain digit; to four digits if its error is unknown."""
    if error is None or not error > 0 or not math.isfinite(error):
        if isinstance(value, int):
            return str(value)
        return f"{value:.4g}"
    exponent = math.log10(error)
    digits = -math.floor(exponent)
    scientific = f"{error:e}"
    if scientific.startswith("1"):
        digits += 1  # 0.0014 rather than 0.001
    if digits > 6 or digits < -3:
        return f"{value:.4g} ± {error:.1g}"
    places = max(0, digits)
    value = round(value, digits)
    error = round(error, digits)
    return f"{value:.{places}f} ± {error:.{places}f}"


def _figure(value: int | float | None, digits: int) -> str:
    """Return a number with some decimal places; empty for None."""
    if value is None:
        return ""
    return f"{value:.{digits}f}"
