"""A config of TMS 5-2 that is fitted in a second, for tests of everything but what it learns."""

from pathlib import Path

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
    evaluation: {ladder: [2]}
trainer: {max_steps: STEPS, val_check_interval: 4, logger: false}
data:
  init_args: {batch_size: 64, n_random_prompts: 160, predict_batch_size: BATCH}
"""
TARGET = """\
base: targets/tms_5-2.yaml
model: {init_args: {retries: 0}}
trainer: {max_steps: 100}
data: {init_args: {batch_size: 64}}
"""


def lay_out(here: Path, steps: int, batch: int) -> Path:
    """Writes tiny.yaml and the target.yaml that it needs; returns where runs are to go."""
    (here / "tiny.yaml").write_text(CONFIG.replace("STEPS", str(steps)).replace("BATCH", str(batch)))
    (here / "target.yaml").write_text(TARGET)
    return here / "runs"
