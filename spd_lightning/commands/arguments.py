"""The arguments that fit, plan, predict and validate share: configs, a run's name, settings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spd_lightning import config as configs
from spd_lightning import runs
from spd_lightning.commands import options
from spd_lightning.errors import BadInput


@dataclass
class RunArguments:
    """The arguments of a verb that takes configs: fit, plan, predict, validate."""

    names: list[str] = field(default_factory=list)
    run: str | None = None
    overrides: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, verb: str, argv: Sequence[str]) -> "RunArguments":
        """Read --config and --run; all else is for LightningCLI.

        Raises:
            BadInput: there is no --config, or an option has no value.
        """
        found, rest = options.read_some(verb, argv)
        if not found.config:
            raise BadInput(
                f"{verb}: --config is missing; for example: --config tms.yaml ('list' shows the "
                "configs)"
            )
        return cls(found.config, found.run, rest)

    @property
    def prints_only(self) -> bool:
        """Whether the merged settings are to be printed, and nothing else."""
        return any(word.startswith("--print_config") for word in self.overrides)

    @property
    def name(self) -> str:
        """The run's name: as asked for, or the first config's."""
        return runs.check_name(
            Path(self.names[0]).name.removesuffix(".yaml") if self.run is None else self.run
        )

    def finished_run(self) -> runs.Run:
        """Return the run that is asked for by name, or the newest that finished.

        Raises:
            BadInput: there is no such run, or none that finished.
        """
        return runs.newest(self.name) if self.run is None else runs.find(self.run)

    @property
    def config(self) -> dict[str, Any]:
        """All configs, merged; what several laid over the first say of callbacks, harvesters above
        all, adds up.
        """
        merged = configs.load(self.names[0])
        laid = []
        for name in self.names[1:]:
            over = configs.load(name)
            merged = configs.merge(merged, over)
            laid += [each for each in _callbacks(over) if each not in laid]
        return configs.merge(merged, {"trainer": {"callbacks": laid}}) if laid else merged


def _callbacks(config: dict[str, Any]) -> list[Any]:
    trainer = config.get("trainer")
    found = trainer.get("callbacks") if isinstance(trainer, dict) else None
    return found if isinstance(found, list) else []
