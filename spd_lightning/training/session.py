"""Sessions: a trainer, a module and its data, built from a config with LightningCLI."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from spd_lightning import classes, runs
from spd_lightning import config as configs
from spd_lightning.data.modules import StepData
from spd_lightning.errors import BadInput, shown
from spd_lightning.tracking.copies import Copies
from spd_lightning.tracking.publishing import MetricsFile, without_secrets
from spd_lightning.tracking.trackers import trackers
from spd_lightning.training.checkpoint import SafetensorsIO
from spd_lightning.training.interruption import Interruption
from spd_lightning.training.launchers import forget_ranks, forgotten_launcher, is_first_process
from spd_lightning.training.parsing import Parser, as_one_line_error, reject_unknown
from spd_lightning.training.progress import Progress

log = logging.getLogger(__name__)

TRAINER = {
    "enable_checkpointing": False,  # ours are safetensors
    "enable_model_summary": False,
    "num_sanity_val_steps": 1,  # an evaluation that fails should fail before the training
    "check_val_every_n_epoch": None,
}


@dataclass(frozen=True)
class Plan:
    """Additions of a session to its config.

    Args:
        folder: folder of the run or the target.
        name: name of the work, for progress bars.
        model: a module that replaces the config's.
        callbacks: callbacks in addition to the config's.
        tracked: whether to copy the run to the config's trackers; implies `logged`.
        logged: whether to write metrics into the folder.
    """

    folder: Path
    name: str
    model: LightningModule | None = None
    callbacks: Sequence[Callback] = ()
    tracked: bool = False
    logged: bool = False


class Session(LightningCLI):
    """A trainer, a module and its data, built from a config.

    Args:
        config: a config, merged with all configs it builds on.
        overrides: options of the command line.
        plan: returns the plan for the parsed settings, before anything is built.

    Raises:
        BadInput: a setting is unknown, of a wrong type, or invalid.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        overrides: Sequence[str],
        plan: Callable[[dict[str, Any]], Plan],
    ):
        self._plan = plan
        self._given = config
        self.copies = Copies([], Path())
        forget_ranks()
        _check_shape(config)
        _check_files(overrides)
        denied, allowed = classes.verdicts()
        set_parsing_settings(import_path_denylist=denied, import_path_allowlist=allowed)
        try:
            super().__init__(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,
                seed_everything_default=0,
                trainer_defaults=TRAINER,
                parser_class=Parser,
                args=["--config", configs.one_line(dict(config)), *overrides],
                run=False,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        except (ValueError, TypeError, MisconfigurationException) as error:
            self.copies.abandon()
            raise as_one_line_error(error) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for owner in ("model", "data"):
            parser.link_arguments("seed_everything", f"{owner}.init_args.seed")

    def before_instantiate_classes(self) -> None:
        reject_unknown(self._given, self.config.as_dict())
        plain = _plain(self.config)
        text = self.parser.dump(plain, skip_validation=True, skip_link_targets=False)
        self.settings = yaml.safe_load(text)
        self._take_trackers()
        self.plan = self._plan(self.settings)
        if self.plan.model is not None:
            self.config["model"] = self.plan.model
        if self.plan.tracked and is_first_process():
            folder = self.plan.folder
            self.copies = Copies(trackers(self.trackers, folder), folder)
            self.copies.connect()

    def _take_trackers(self) -> None:
        """Take the trackers out of the config: they get copies of the run (see `copies`)."""
        trainer = self.config["trainer"]
        self.trackers = _dicts(trainer.get("logger"))
        trainer["logger"] = False
        saved = self.settings["trainer"]
        saved["logger"] = without_secrets(saved.get("logger"))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        plan = self.plan
        settings = self.config_init["trainer"]
        plugins = [SafetensorsIO(), *forgotten_launcher(), *(settings.get("plugins") or [])]
        callbacks = list(settings.get("callbacks") or [])
        if settings.get("enable_progress_bar") is not False:
            callbacks.append(Progress(plan.name))
        callbacks += [Interruption(), *plan.callbacks]
        loggers = [MetricsFile(plan.folder)] if plan.logged or plan.tracked else []
        if settings.get("val_check_interval") == 0:
            raise BadInput(
                "config: trainer.val_check_interval: it must be at least 1, the number of batches "
                "between evaluations"
            )
        try:
            return super().instantiate_trainer(
                logger=loggers or False,
                plugins=plugins,
                callbacks=callbacks,
                default_root_dir=str(plan.folder),
                **kwargs,
            )
        except (RuntimeError, KeyError) as error:  # Lightning rejects a launcher's variables
            raise BadInput(
                f"trainer: {error}; unset the variables of the launcher, or start with it"
            ) from error


class Settings(Session):
    """A config that is parsed and checked, but not built: no folder, no target, no trainer.

    Args:
        config: a config, merged with all configs it builds on.
        overrides: options of the command line.

    Raises:
        BadInput: a setting is unknown, or of a wrong type.
    """

    def __init__(self, config: Mapping[str, Any], overrides: Sequence[str] = ()):
        plan = Plan(Path(), "")
        super().__init__(config, overrides, lambda settings: plan)

    def instantiate_classes(self) -> None:
        """Do nothing (see `built`)."""

    def built(self, owner: str, **given: Any) -> Any:
        """Build the model or the data, with some of its arguments given as objects.

        Args:
            owner: `model` or `data`; or `trainer`, for its settings with callbacks that are built.
            **given: arguments that replace those of the config.

        Raises:
            BadInput: an argument is invalid.
        """
        section = self.config[owner].clone()
        for name, value in given.items():
            section["init_args"][name] = value
        try:
            return self.parser.instantiate_classes(Namespace({owner: section}))[owner]
        except (ValueError, TypeError) as error:
            raise as_one_line_error(error) from error


def data_of(folder: Path) -> StepData:
    """Return the data module of a run; it prepares nothing before it is needed.

    Raises:
        BadInput: the run has no config, or one that cannot be read.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise BadInput(
            f"run '{folder}': config.yaml, which describes the data, is missing; use another run"
        )
    runs.Run(folder).checked_config()
    return Settings(configs.load(str(path.resolve()))).built("data")


def _dicts(value: Any) -> Any:
    """Return settings with dicts in place of namespaces."""
    if isinstance(value, Namespace):
        return {key: _dicts(item) for key, item in vars(value).items()}
    if isinstance(value, list | tuple):
        return [_dicts(item) for item in value]
    return value


def _check_shape(config: Mapping[str, Any]) -> None:
    """Check the parts of a config that are read before jsonargparse checks it.

    Raises:
        BadInput: its trainer is not a mapping, or it has a key that is a command-line option.
    """
    if not isinstance(config.get("trainer", {}), dict):
        raise BadInput("config: trainer: expected 'key: value' lines")
    if "config" in config:
        raise BadInput("config: config: not a setting; name the configs to build on under 'base'")


def _check_files(overrides: Sequence[str]) -> None:
    """Check the files that overrides name, so that error messages contain the file's name.

    Raises:
        BadInput: a file is not valid YAML, or not a YAML file.
    """
    for word in overrides:
        path = Path(word.partition("=")[2] if word.startswith("--") else word)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            configs.read_file(path)
    for option, value in _pairs(overrides):
        # jsonargparse would read the file and use its text as the setting.
        takes_class = option == "--data" or option.startswith(("--model", "--trainer"))
        if takes_class and _is_other_file(value):
            raise BadInput(
                f"{option} '{shown(value)}': this is a file, not a setting; only .yaml files are "
                "read here"
            )


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the options of the command line with their values."""
    for word, after in pairwise([*overrides, ""]):
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            yield option, value if equals else after


def _is_other_file(value: str) -> bool:
    """Return whether a value names a file that is not a YAML file."""
    path = Path(value)
    if value == "" or path.suffix in (".yaml", ".yml"):
        return False
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):  # not a possible name
        return False


def _plain(value: Any) -> Any:
    """Return settings with dataclasses as dicts.

    Defaults contain dataclasses, and jsonargparse cannot write them inside a dict.
    """
    if isinstance(value, Namespace):
        items = {key: _plain(item) for key, item in vars(value).items()}
        return Namespace(**items)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value


@contextmanager
def quiet() -> Iterator[None]:
    """Hide advice of libraries about settings that we choose on purpose."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # read when mlflow is imported
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they concern Lightning
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    mlflow_log = logging.getLogger("lightning.pytorch.loggers.mlflow")
    mlflow_log.setLevel(logging.ERROR)  # it warns "not found. Creating it."
    with warnings.catch_warnings():
        for text in _UNWANTED_ADVICE:
            warnings.filterwarnings("ignore", message=f".*{text}.*")
        yield


_UNWANTED_ADVICE = (
    "LeafSpec",
    "args parameter is intended to run",  # LightningCLI, because it gets arguments
    "in eval mode at the start of training",  # the target is in eval mode (D6)
    "max_epochs. was not set",  # training is measured in steps
    "GPU available but not used",
    "does not have many workers",
    "predict returned None",  # harvesters write their results
)
