"""A config of TMS 5-2 that is fitted in a second, and commands on it in processes of their own, to
be killed.
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
from spd_lightning.training import copies, figures
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
    """Writes tiny.yaml and the target.yaml that it needs; returns where runs are to go."""
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
        "matplotlib.figure",  # this and what follows is imported only when it is needed
        "matplotlib.backends.backend_agg",
        "pyarrow.parquet",
        "mlflow.tracking",  # five seconds, for each command with a tracker
        "mlflow.store.tracking.sqlalchemy_store",
        "mlflow.store.db.utils",
        "alembic.command",
    ]
)


def one_figure(module: Decomposition) -> Iterator[tuple[str, Any]]:
    """Draw the first figure of a decomposition alone. All of them took half of a fit's time."""
    return islice(ALL_FIGURES(module), 1)


def work(root: Path, words: list[str], surroundings: dict[str, str]) -> None:
    """One command, in a process that has imported much and done nothing."""
    os.chdir(root.parent)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ.update(surroundings, SPD_RUNS=str(root), OMP_NUM_THREADS="1")
    figures.draw = one_figure
    copies.POLL = 0.1  # the trainings here are over in the seconds between two looks
    sys.exit(cli.run(words))


def work_uncopied(root: Path, words: list[str], surroundings: dict[str, str]) -> None:
    """The same, under a tracker that fails when the run's files are to be copied; what it says is
    in a file, `said`.
    """
    from mlflow.exceptions import MlflowException

    def dies(*_, **__):
        raise MlflowException("no more room")

    with open(
        root.parent / "said", "wb"
    ) as said:  # a process of the server has the standard error that the server had
        os.dup2(said.fileno(), 2)
    runs.log_artifacts = dies
    work(root, words, surroundings)


def work_hanging(root: Path, words: list[str], surroundings: dict[str, str]) -> None:
    """The same, under a tracker that hangs when the run's files are to be copied; a file,
    `copying`, says when.
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
    """Runs a command to its end."""
    process = begun(root, words, **surroundings)
    process.join(120)
    assert process.exitcode == 0


def killed(root: Path, words: list[str], ready: Callable[[], bool], **surroundings: str) -> None:
    """Runs a command and kills it as soon as something is so."""
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
        time.sleep(0.005)  # the work needs the processor more than those who wait for it
    os.kill(pid, by)
