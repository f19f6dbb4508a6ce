"""The arguments that fit, plan, predict and validate share: configs, a run's name, settings."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spd_lightning import config as configs
from spd_lightning import runs
from spd_lightning.commands import options
from spd_lightning.errors import BadInput, command


@dataclass
class RunArguments:
    """The arguments of a verb that takes configs: fit, plan, predict or validate.

    Attributes:
        names: the configs, in the order in which they are merged.
        run: the run's name; None if omitted.
        overrides: the remaining words, which LightningCLI reads.
    """

    names: list[str] = field(default_factory=list)
    run: str | None = None
    overrides: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, verb: str, argv: Sequence[str]) -> "RunArguments":
        """Read --config and --run, and keep all other words for LightningCLI.

        Raises:
            BadInput: --config is missing, or an option has no value.
        """
        given, rest = options.read_some(verb, argv)
        if not given.config:
            raise BadInput(
                f"{verb}: --config is missing; for example: --config tms.yaml; to list the "
                f"configs: {command('list')}"
            )
        return cls(given.config, given.run, rest)

    @property
    def prints_only(self) -> bool:
        """Return whether to print the merged settings and do nothing else."""
        return any(word.startswith("--print_config") for word in self.overrides)

    @property
    def name(self) -> str:
        """Return the run's name: the one given, or the name of the first config."""
        if self.run is not None:
            return runs.check_name(self.run)
        first = self.names[0]
        path = Path(first)
        name = path.name.removesuffix(".yaml")
        return runs.check_name(name)

    def finished_run(self) -> runs.Run:
        """Return the run given by name, or the newest finished run of the first config.

        Raises:
            BadInput: there is no such run, or none of them has finished.
        """
        if self.run is not None:
            return runs.find(self.run)
        fit = shlex.join(["fit", "--config", self.names[0]])
        return runs.newest(self.name, command(fit))

    @property
    def config(self) -> dict[str, Any]:
        """Return all configs, merged.

        Later configs win, with one exception. The callbacks (above all harvesters) of the second
        and later configs are joined, and together replace those of the first.
        """
        merged = configs.load(self.names[0])
        callbacks = list[Any]()
        for name in self.names[1:]:
            later = configs.load(name)
            merged = configs.merge(merged, later)
            new = [callback for callback in _callbacks(later) if callback not in callbacks]
            callbacks += new
        if not callbacks:
            return merged
        return configs.merge(merged, {"trainer": {"callbacks": callbacks}})


def _callbacks(config: dict[str, Any]) -> list[Any]:
    """Return the callbacks of a config's trainer, or an empty list."""
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        return []
    callbacks = trainer.get("callbacks")
    return callbacks if isinstance(callbacks, list) else []
