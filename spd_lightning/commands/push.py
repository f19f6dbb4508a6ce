"""push: sends a finished run to its trackers again."""

from collections.abc import Sequence

from spd_lightning import runs
from spd_lightning.commands import loading, options
from spd_lightning.errors import BadInput


def main(argv: Sequence[str]) -> None:
    """Send a finished run, with its harvests, to the trackers that its config names."""
    found = runs.find(options.read("push", argv).run)
    if found.state != "finished":
        raise BadInput(
            f"run '{found.name}': it is {found.state}; let its fit finish, which also sends it"
        )
    if not (found.path / "config.yaml").exists():
        raise BadInput(
            f"run '{found.name}': it has no config.yaml, so it was not made by fit; 'runs' lists "
            "the runs"
        )
    runs.check_whole(found.path)
    settings = found.checked_config()
    trainer = settings.get("trainer")
    # A pulled run may come from a stranger, so its config chooses no tracker here.
    chosen = trainer.get("logger") if isinstance(trainer, dict) and not found.pulled else None
    with loading.trainer():
        from spd_lightning.training.tracking import send

        send(chosen, found.path, settings)
    print(f"sent: {found.path}")
