"""Environment variables left over from a launcher of processes (srun, torchrun, Lightning).

If they are set, Lightning joins a group of processes. In a command that no launcher started, it
then waits for processes that do not exist, rejects its own settings, or takes itself for another
process and logs nothing.
"""

import logging
import os

from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)

LAUNCHED = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "JSM_NAMESPACE_RANK")
"""Variables of a process that a launcher started; sbatch and salloc alone set no step."""

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


def forget_ranks() -> None:
    """Remove ranks from the environment, with a warning, if no launcher started this command."""
    if any(name in os.environ for name in LAUNCHED):
        return
    ranks = {name: os.environ.pop(name) for name in RANKS if name in os.environ}
    misleading = [f"{name}={value}" for name, value in ranks.items() if value != "0"]
    if misleading:
        names = ", ".join(misleading)
        log.warning("%s: ignored, because no launcher started this command", names)
    rank_zero_only.rank = 0  # pyright: ignore[reportFunctionMemberAccess]


def is_first_process() -> bool:
    """Return whether this is process 0 of its group."""
    return rank_zero_only.rank == 0  # pyright: ignore[reportFunctionMemberAccess]


def forgotten_launcher() -> list[ClusterEnvironment]:
    """Return Lightning's plain environment for a command in a SLURM job that srun did not start."""
    launched = "SLURM_STEP_ID" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    tasks = os.environ.get("SLURM_NTASKS")
    if launched or tasks is None:
        return []
    if tasks != "1":
        log.warning("SLURM_NTASKS=%s: ignored, because srun did not start this command", tasks)
    return [LightningEnvironment()]
