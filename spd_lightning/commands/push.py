"""push: send a finished run to its trackers again."""

from collections.abc import Sequence

from spd_lightning import runs
from spd_lightning.commands import loading, options
from spd_lightning.errors import BadInput, command


def main(argv: Sequence[str]) -> None:
    """Send a finished run, with its harvests, to the trackers that its config names."""
    arguments = options.read("push", argv)
    run = runs.find(arguments.run)
    if run.state != "finished":
        raise BadInput(
            f"run '{run.name}': it is {run.state}; let its fit finish, which also sends it"
        )
    if not (run.path / "config.yaml").exists():
        raise BadInput(
            f"run '{run.name}': it has no config.yaml, so it was not made by fit; to list the "
            f"runs: {command('runs')}"
        )
    runs.check_whole(run.path)
    settings = run.checked_config()
    trainer = settings.get("trainer")
    trackers = None
    if isinstance(trainer, dict) and not run.pulled:  # a pulled run can come from a stranger
        trackers = trainer.get("logger")
    with loading.trainer():
        from spd_lightning.analysis.summary_page import write_summaries
        from spd_lightning.tracking.publishing import send

        write_summaries(run.path)
        send(trackers, run.path, settings)
    print(f"sent: {run.path}")
