"""validate: evaluate a finished run again, and print its figures."""

import json
from collections.abc import Sequence

from spd_lightning.commands.arguments import RunArguments
from spd_lightning.commands.finished import finished


def main(argv: Sequence[str]) -> None:
    """Evaluate a finished run again, and print its figures as JSON."""
    arguments = RunArguments.parse("validate", argv)
    with finished(arguments, tracked=False) as session:
        session.trainer.validate(session.model, datamodule=session.datamodule, verbose=False)
        if session.trainer.is_global_zero:
            print(json.dumps(session.model.figures, indent=1))
