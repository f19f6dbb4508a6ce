"""A session on a finished run, for the verbs that need one: predict and validate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from spd_lightning.commands import loading
from spd_lightning.commands.arguments import RunArguments

if TYPE_CHECKING:
    from spd_lightning.training.session import Session


@contextmanager
def finished(request: RunArguments, tracked: bool) -> Iterator["Session"]:
    """Open a session with the weights of a finished run and the data and trainer of the configs.

    Args:
        request: names the run and the configs.
        tracked: whether the trackers that the config names get a copy.
    """
    config = request.config
    run = None
    if not request.prints_only:
        run = request.finished_run()
    with loading.trainer():
        from spd_lightning.training.decompose import Decomposition
        from spd_lightning.training.session import Plan, Session

        def plan(settings: dict[str, Any]) -> Plan:
            assert run is not None  # --print_config exits before a plan is made
            model = Decomposition.from_pretrained(run.path)
            return Plan(run.path, run.name, model, tracked=tracked)

        yield Session(config, request.overrides, plan)
