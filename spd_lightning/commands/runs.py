"""runs: list the runs."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from spd_lightning import runs
from spd_lightning.commands import options, results
from spd_lightning.errors import command


def main(argv: Sequence[str]) -> None:
    """Print the runs as lines, as a table of results, or as JSON."""
    arguments = options.read("runs", argv)
    found = runs.runs()
    if arguments.json:
        print(json.dumps(_facts(found), indent=1))
    elif not found:
        print(f"no runs in '{runs.root()}' yet; make one: {command('fit --config tms.yaml')}")
    elif arguments.table:
        rows = [(run.name, run.summary) for run in reversed(found) if run.summary]
        print(results.table(rows))
    else:
        for run in found:
            print(_line(run))


def _facts(found: Iterable[runs.Run]) -> list[dict[str, Any]]:
    """Return the facts of some runs as JSON values."""
    return [
        {
            "name": run.name,
            "path": str(run.path),
            "state": run.state,
            "summary": run.summary,
            "problem": run.problem,
        }
        for run in found
    ]


def _line(run: runs.Run) -> str:
    """Return the line of one run: its state, its path, and its verdict or problem."""
    path = run.path
    problem = run.problem
    if problem:  # then its files may be unreadable
        return f"{'damaged':<12} {path}  {problem}"
    verdict = run.summary.get("verdict", "")
    return f"{run.state:<12} {path}  {verdict}"
