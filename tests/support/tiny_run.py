"""A config of TMS 5-2 that takes a second to fit, and commands that run in separate processes.

Tests can kill these processes.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from spd_lightning import cli, runs
from spd_lightning.tracking import copies
from spd_lightning.training import figures
from spd_lightning.training.decompose import Decomposition

ALL_FIGURES = figures.draw

CONFIG = """\
base: tms_5-2.yaml
model:
  init_args:
    target: target.yaml
    sites: {linear1: 6, linear2: 6}
    warm_up: {steps: 20}
    inner_steps: 5
    log_every: 7
    checkpoint_every: 20
    evaluation: {pgd_steps: [2]}
    losses:
      reconstruction:
        lasting: {source: persistent_pgd, divergence: mse, coeff: 0.5, persistent: {ascents: 1}}
trainer: {max_steps: STEPS, val_check_interval: 4, logger: false}
data:
  init_args: {batch_size: 64, n_prompts: 160, predict_batch_size: BATCH}
"""
TARGET = """\
base: targets/tms_5-2.yaml
model: {init_args: {retries: 0}}
trainer: {max_steps: 100}
data: {init_args: {batch_size: 64}}
"""


def lay_out(here: Path, steps: int, batch: int) -> Path:
    """Write tiny.yaml and the target.yaml that it needs; return the folder for runs."""
    (here / "tiny.yaml").write_text(
        CONFIG.replace("STEPS", str(steps)).replace("BATCH", str(batch))
    )
    (here / "target.yaml").write_text(TARGET)
    return here / "runs"


os.environ.setdefault(
    "MLFLOW_LOGGING_LEVEL", "WARNING"
)  # as the product sets it; read when mlflow is imported
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "spd_lightning.commands.fit",
        "spd_lightning.commands.predict",
        "spd_lightning.planning.estimate",
        "spd_lightning.training.target",
        "spd_lightning.training.checkpoint",
        "spd_lightning.harvest.graphs",
        "matplotlib.figure",  # the product imports this and the following only when needed
        "matplotlib.backends.backend_agg",
        "pyarrow.parquet",
        "mlflow.tracking",  # takes five seconds in each command with a tracker
        "mlflow.store.tracking.sqlalchemy_store",
        "mlflow.store.db.utils",
        "alembic.command",
    ]
)


def one_figure(module: Decomposition) -> Iterator[tuple[str, Any]]:
    """Draw only the first figure of a decomposition: all of them took half of the time of a fit."""
    return islice(ALL_FIGURES(module), 1)


def work(root: Path, words: list[str], surroundings: dict[str, str]) -> None:
    """Run a command, in a process that has already imported the large packages."""
    os.chdir(root.parent)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ.update(surroundings, SPD_RUNS=str(root), OMP_NUM_THREADS="1")
    figures.draw = one_figure
    copies.POLL = 0.1  # these trainings end within the usual seconds between two polls
    sys.exit(cli.run(words))


def work_uncopied(root: Path, words: list[str], surroundings: dict[str, str]) -> None:
    """Run a command whose tracker fails when it should copy the run's files.

    The standard error is written to a file, `said`.
    """
    from mlflow.exceptions import MlflowException

    def dies(*_, **__):
        raise MlflowException("no more room")

    with open(
        root.parent / "said", "wb"
    ) as said:  # processes of the fork server inherit its standard error
        os.dup2(said.fileno(), 2)
    runs.log_artifacts = dies
    work(root, words, surroundings)


def work_hanging(root: Path, words: list[str], surroundings: dict[str, str]) -> None:
    """Run a command whose tracker hangs when it should copy the run's files.

    The tracker then creates a file, `copying`.
    """

    def hangs(*_, **__):
        (root.parent / "copying").touch()
        time.sleep(600)

    runs.log_artifacts = hangs
    work(root, words, surroundings)


def begun(root: Path, words: list[str], **surroundings: str) -> BaseProcess:
    process = SERVER.Process(target=work, args=(root, words, surroundings))
    process.start()
    return process


def done(root: Path, words: list[str], **surroundings: str) -> None:
    """Run a command to its end."""
    process = begun(root, words, **surroundings)
    process.join(120)
    assert process.exitcode == 0


def killed(root: Path, words: list[str], ready: Callable[[], bool], **surroundings: str) -> None:
    """Run a command, and kill it as soon as `ready` returns True."""
    process = begun(root, words, **surroundings)
    kill_when(ready, process.is_alive, process.pid)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def kill_when(
    ready: Callable[[], bool],
    alive: Callable[[], bool],
    pid: int | None,
    by: signal.Signals = signal.SIGKILL,
) -> None:
    assert pid is not None
    deadline = time.monotonic() + 240  # a busy machine needs a minute to import torch and Lightning
    while alive() and not ready():
        assert time.monotonic() < deadline
        time.sleep(0.005)  # leave the processor to the command
    os.kill(pid, by)
