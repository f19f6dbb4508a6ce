"""predict: run a config's harvesters over its prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.arguments import RunArguments
from spd_lightning.commands.finished import finished
from spd_lightning.errors import BadInput

if TYPE_CHECKING:
    from spd_lightning.training.session import Session


def main(argv: Sequence[str]) -> None:
    """Write the tables of a config's harvesters into a run, and send a copy to its trackers."""
    arguments = RunArguments.parse("predict", argv)
    with finished(arguments, tracked=True) as session:
        _harvest(session)


def _harvest(session: "Session") -> None:
    from spd_lightning.analysis.summary_page import write_summaries
    from spd_lightning.harvest.module import Harvester
    from spd_lightning.tracking.publishing import compact_harvests, publish

    trainer: Any = session.trainer
    harvesters = [callback for callback in trainer.callbacks if isinstance(callback, Harvester)]
    if not harvesters:
        raise BadInput(
            "config: no harvester in trainer.callbacks; add class_path spd_lightning.PromptGraphs"
        )
    with session.copies:
        session.copies.begin()
        session.trainer.predict(
            session.model, datamodule=session.datamodule, return_predictions=False
        )
    names = [harvester.name for harvester in harvesters]
    if session.trainer.is_global_zero:
        compact_harvests(session.plan.folder, names)
        for harvester in harvesters:
            # With several devices, `harvester.folder` is set only in their processes.
            folder = session.plan.folder / "harvest" / harvester.name
            print(f"harvest: {folder}    view it: python -m spd_lightning view")
    if len(session.copies):
        write_summaries(session.plan.folder, names)
    publish(session.copies, [f"harvest/{name}" for name in names])
