"""Where things are: run folders, who is working on them, and the trackers that hold copies.

    <root>/<run>/         config.yaml, run.json, checkpoints/, metrics.jsonl, figures/,
                          decomposition.{safetensors,json}, harvest/<name>/,
                          and summary.json, which is written last: a run that has it is finished
    <root>/<run>/.lock    locked while a process works on the run; the lock ends with the process

The local folder is the truth and a tracker holds a copy of it. While a tracker may lack a part of a
run, the run's folder has `uncopied.json`, and the command that made the run sends the rest instead
of making another one. MLflow is the embedded one (a sqlite file and a folder of artifacts below the
root) unless MLFLOW_TRACKING_URI names a server. A reference is the name of a run, the path of a run
or of a harvest, `mlflow:<run id or name>`, or `wandb:<entity>/<project>/<artifact>:<version>`.
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
from spd_lightning.runs.folders import Run, check_name, newest, runs
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
