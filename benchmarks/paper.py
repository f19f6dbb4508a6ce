"""`make paper`: Table 1 of the SPD paper, over several seeds.

Each (model, seed) is a separate run, `runs/paper-<model>-<seed>`. It is fitted with the normal
command on one thread; as many runs as there are cores are fitted in parallel. Finished runs are not
repeated. The script prints the table of docs/results.md at the end.

    python benchmarks/paper.py [MODEL ...]         MODEL: fit only these models
"""

import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm.auto import tqdm

from spd_lightning import runs

SEEDS = {"tms_5-2": 8, "tms_5-2-id": 8, "tms_40-10": 3, "tms_40-10-id": 3}
"""Number of seeds of each model."""

TRUTH = {
    "tms_5-2": (5, None),
    "tms_5-2-id": (5, 2),
    "tms_40-10": (40, None),
    "tms_40-10-id": (40, 10),
}
"""Expected numbers of alive components in linear1 and in the identity layer."""


def fit(model: str, seed: int) -> dict[str, Any]:
    """Return the summary of a run, which is fitted first if it has not been."""
    name = f"paper-{model}-{seed}"
    folder = runs.root() / name
    if not (folder / "summary.json").exists():
        command = [
            sys.executable,
            "-m",
            "spd_lightning",
            "fit",
            "--config",
            f"{model}.yaml",
            "--run",
            name,
        ]
        command += ["--seed_everything", str(seed), "--trainer.logger", "false"]
        done = subprocess.run(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return runs.read_json(folder / "summary.json")


def passes(model: str, s: dict[str, Any]) -> bool:
    """Return whether a run has found the mechanism that the paper reports."""
    alive, dense = TRUTH[model]
    sound = (
        s["mmcs/linear1"] >= 0.999
        and 0.97 <= s["ml2r/linear1"] <= 1.04
        and s["alive/linear1"] == alive
    )
    whole = dense is None or s["alive/hidden.0"] == dense
    return sound and whole and s["identity_error/linear1"] == 0


def row(model: str, summaries: list[dict[str, Any]]) -> str:
    """Return a line of the table: the share of seeds that pass, and the results of those."""
    good = [s for s in summaries if passes(model, s)]
    told = sum(s["verdict"] != "ok" for s in summaries if not passes(model, s))
    others = "the other" if len(summaries) - len(good) == 1 else f"{told} others"
    share = f"{len(good)} of {len(summaries)}" + (f" ({others} reported it)" if told else "")
    if not good:
        return f"| {model} | {share} | | | | | | |"
    mmcs, ml2r = ([s[f"{key}/linear1"] for s in good] for key in ("mmcs", "ml2r"))
    alive = {s["alive/linear1"] for s in good}
    dense = {s["alive/hidden.0"] for s in good if "alive/hidden.0" in s} or {"–"}
    seconds = statistics.mean(s["seconds/fit"] + s["seconds/target"] for s in summaries)
    cells = [f"{statistics.mean(v):.3f} ± {statistics.pstdev(v):.3f}" for v in (mmcs, ml2r)]
    cells += [", ".join(str(v) for v in sorted(counts, key=str)) for counts in (alive, dense)]
    errors = {s["identity_error/linear1"] for s in good}
    return f"| {model} | {share} | {' | '.join(cells)} | {max(errors)} | {seconds:.0f} |"


def main(models: list[str]) -> None:
    jobs = [(model, seed) for model in models for seed in range(SEEDS[model])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(
            zip(
                jobs,
                tqdm(pool.map(lambda job: fit(*job), jobs), total=len(jobs), unit="run"),
                strict=True,
            )
        )
    print(
        "| model | seeds that pass | MMCS | ML2R | alive in linear1 | in the identity | identity "
        "error | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for model in models:
        print(row(model, [results[model, seed] for seed in range(SEEDS[model])]))


if __name__ == "__main__":
    main(sys.argv[1:] or list(SEEDS))
