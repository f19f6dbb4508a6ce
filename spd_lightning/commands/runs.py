"""runs: lists the runs there are."""

import json
from collections.abc import Sequence

from spd_lightning import runs
from spd_lightning.commands import options, results


def main(argv: Sequence[str]) -> None:
    """Print the runs there are, as lines, as a table of results, or as JSON."""
    asked = options.read("runs", argv)
    found = runs.runs()
    if asked.json:
        facts = [
            {
                "name": r.name,
                "path": str(r.path),
                "state": r.state,
                "summary": r.summary,
                "problem": r.problem,
            }
            for r in found
        ]
        print(json.dumps(facts, indent=1))
    elif not found:
        print(
            f"no runs in '{runs.root()}' yet; make one: python -m spd_lightning fit --config "
            "tms.yaml"
        )
    elif asked.table:
        print(results.table([(r.name, r.summary) for r in reversed(found) if r.summary]))
    else:
        for r in found:
            problem = r.problem
            print(f"damaged      {r.path}  {problem}" if problem else _listed(r))


def _listed(run: runs.Run) -> str:
    """The line of one run."""
    return f"{run.state:<12} {run.path}  {run.summary.get('verdict', '')}"
