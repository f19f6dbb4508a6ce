"""predict: runs a config's harvesters over its prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spd_lightning.commands.arguments import RunArguments
from spd_lightning.commands.finished import finished
from spd_lightning.errors import BadInput

if TYPE_CHECKING:
    from spd_lightning.training.session import Session


def main(argv: Sequence[str]) -> None:
    """Write the tables of a config's harvesters into a run, and log them to its tracker as one
    artifact.
    """
    with finished(RunArguments.parse("predict", argv), tracked=True) as session:
        _harvest(session)


def _harvest(session: "Session") -> None:
    from spd_lightning.harvest.module import Harvester
    from spd_lightning.training.tracking import publish

    harvesters = [c for c in session.trainer.callbacks if isinstance(c, Harvester)]  # pyright: ignore[reportAttributeAccessIssue]
    if not harvesters:
        raise BadInput(
            "config: no harvester in trainer.callbacks; add class_path spd_lightning.PromptGraphs"
        )
    with session.copies:
        session.copies.begin()
        session.trainer.predict(
            session.model, datamodule=session.datamodule, return_predictions=False
        )
    for harvester in harvesters:
        if session.trainer.is_global_zero:
            folder = (
                session.plan.folder / "harvest" / harvester.name
            )  # devices of their own processes know it alone
            print(f"harvest: {folder}    see it: python -m spd_lightning view")
    publish(session.copies, [f"harvest/{harvester.name}" for harvester in harvesters])
