"""Variables that a launcher of processes (srun, torchrun, Lightning) left behind in the environment
of a command.

Lightning takes them for an order to join a group of processes. In a command that no launcher
started, it then waits for processes that do not exist, rejects its own settings, or takes itself
for one of the others and logs nothing.
"""

import logging
import os

from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)

LAUNCHED = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "JSM_NAMESPACE_RANK")
"""What a process has that a launcher started; sbatch and salloc alone give no step."""

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


def forget_ranks() -> None:
    """Remove ranks from the environment of a command that no launcher started, with a line."""
    if any(name in os.environ for name in LAUNCHED):
        return
    found = {name: os.environ.pop(name) for name in RANKS if name in os.environ}
    if strange := ", ".join(f"{name}={value}" for name, value in found.items() if value != "0"):
        log.warning("%s: ignored, because no launcher started this command", strange)
    rank_zero_only.rank = 0  # pyright: ignore[reportFunctionMemberAccess]


def is_first_process() -> bool:
    """Whether this is process 0 of those that work together."""
    return rank_zero_only.rank == 0  # pyright: ignore[reportFunctionMemberAccess]


def forgotten_launcher() -> list[ClusterEnvironment]:
    """Return Lightning's plain environment for a command in a SLURM job that srun did not start."""
    launched = "SLURM_STEP_ID" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched or "SLURM_NTASKS" not in os.environ:
        return []
    if (tasks := os.environ["SLURM_NTASKS"]) != "1":
        log.warning("SLURM_NTASKS=%s: ignored, because srun did not start this command", tasks)
    return [LightningEnvironment()]
