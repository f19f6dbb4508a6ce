"""Run folders, their locks, and the trackers that hold copies of them.

    <root>/<run>/         config.yaml, run.json, checkpoints/, metrics.jsonl, figures/,
                          decomposition.{safetensors,json}, harvest/<name>/,
                          and summary.json, which is written last: a run that has it is finished
    <root>/<run>/.lock    locked while a process works on the run; the system frees it at its end

The local folder is the original, and a tracker has a copy of it. While the copy may be incomplete,
the run's folder contains `uncopied.json`. The command that made the run then completes the copy
instead of starting another run. By default, MLflow's records are embedded: a sqlite file and a
folder of artifacts below the root. MLFLOW_TRACKING_URI can name a server instead. A reference is
the name of a run, the path of a run or of a harvest, `mlflow:<run id or name>`, or
`wandb:<entity>/<project>/<artifact>:<version>`.
"""

from spd_lightning.files import root
from spd_lightning.runs.artifacts import check_whole
from spd_lightning.runs.files import (
    append_metrics,
    cut_metrics,
    metrics_size,
    read_json,
    writable,
    write_json,
    write_whole,
)
from spd_lightning.runs.folders import Run, check_name, latest_finished, newest, runs
from spd_lightning.runs.lock import UNCOPIED, RunLock, acquire_run, uncopied
from spd_lightning.runs.references import find, pull
from spd_lightning.runs.trackers import (
    MIRRORED,
    NoAnswer,
    artifact_location,
    embedded_uri,
    log_artifacts,
    mlflow_client,
    reachable,
    tracking_uri,
    trouble,
)

__all__ = [
    "MIRRORED",
    "UNCOPIED",
    "NoAnswer",
    "Run",
    "RunLock",
    "acquire_run",
    "append_metrics",
    "artifact_location",
    "check_name",
    "check_whole",
    "cut_metrics",
    "embedded_uri",
    "find",
    "latest_finished",
    "log_artifacts",
    "metrics_size",
    "mlflow_client",
    "newest",
    "pull",
    "reachable",
    "read_json",
    "root",
    "runs",
    "tracking_uri",
    "trouble",
    "uncopied",
    "writable",
    "write_json",
    "write_whole",
]
