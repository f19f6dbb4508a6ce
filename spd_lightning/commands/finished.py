"""A session on a finished run, for the verbs that use one: predict and validate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from spd_lightning.commands import loading
from spd_lightning.commands.arguments import RunArguments

if TYPE_CHECKING:
    from spd_lightning.training.session import Session


@contextmanager
def finished(request: RunArguments, tracked: bool) -> Iterator["Session"]:
    """Open a session on the finished run that is asked for: its weights, the config's data and
    trainer.
    """
    config = request.config
    run = None if request.prints_only else request.finished_run()
    with loading.trainer():
        from spd_lightning.training.decompose import Decomposition
        from spd_lightning.training.session import Plan, Session

        def plan(settings: dict[str, Any]) -> Plan:
            assert run is not None  # printing settings ends before there is a plan
            return Plan(
                run.path, run.name, Decomposition.from_pretrained(run.path), tracked=tracked
            )

        yield Session(config, request.overrides, plan)
