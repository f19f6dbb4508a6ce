"""From a config to a trainer, a module and its data, by LightningCLI."""

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

from spd_lightning import classes
from spd_lightning import config as configs
from spd_lightning.errors import BadInput, shown
from spd_lightning.training.checkpoint import SafetensorsIO
from spd_lightning.training.copies import Copies
from spd_lightning.training.interruption import Interruption
from spd_lightning.training.launchers import forget_ranks, forgotten_launcher, is_first_process
from spd_lightning.training.parsing import Parser, complaint, refuse_unknown
from spd_lightning.training.progress import Progress
from spd_lightning.training.trackers import trackers
from spd_lightning.training.tracking import MetricsFile, without_secrets

log = logging.getLogger(__name__)

TRAINER = {
    "enable_checkpointing": False,  # ours are safetensors
    "enable_model_summary": False,
    "num_sanity_val_steps": 1,  # an evaluation that fails should fail before the training
    "check_val_every_n_epoch": None,
}


@dataclass(frozen=True)
class Plan:
    """Additions of a session to its config: a folder, a name, and a module in place of the
    config's.

    A logged session writes its folder's metrics; a tracked one also speaks to the trackers that its
    config chooses.
    """

    folder: Path
    name: str
    model: LightningModule | None = None
    callbacks: Sequence[Callback] = ()
    tracked: bool = False
    logged: bool = False


class Session(LightningCLI):
    """A trainer, a module and its data, put together from a config.

    Args:
        args: a config (merged with all it builds on) and what the command line overrides.
        plan: called with the parsed settings before anything is built; says where to work.

    Raises:
        BadInput: a setting is unknown, of a wrong type, or refused by what it is for.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        overrides: Sequence[str],
        plan: Callable[[dict[str, Any]], Plan],
    ):
        self._plan, self._given = plan, config
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
            raise complaint(error) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for owner in ("model", "data"):
            parser.link_arguments("seed_everything", f"{owner}.init_args.seed")

    def before_instantiate_classes(self) -> None:
        refuse_unknown(self._given, self.config.as_dict())
        said = self.parser.dump(_plain(self.config), skip_validation=True, skip_link_targets=False)
        self.settings = yaml.safe_load(said)
        self._take_trackers()
        self.plan = self._plan(self.settings)
        if self.plan.model is not None:
            self.config["model"] = self.plan.model
        if self.plan.tracked and is_first_process():
            self.copies = Copies(trackers(self.trackers, self.plan.folder), self.plan.folder)
            self.copies.connect()

    def _take_trackers(self) -> None:
        """Trackers are not for Lightning: they get copies of what the run itself holds (see
        `copies`).
        """
        trainer = self.config["trainer"]
        self.trackers = _dicts(trainer.get("logger"))
        trainer["logger"] = False
        self.settings["trainer"]["logger"] = without_secrets(self.settings["trainer"].get("logger"))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        chosen = self.config_init["trainer"]
        own = [SafetensorsIO(), *forgotten_launcher(), *(chosen.get("plugins") or [])]
        own_callbacks = [Progress(self.plan.name), Interruption(), *self.plan.callbacks]
        callbacks = [*(chosen.get("callbacks") or []), *own_callbacks]
        own_file = [MetricsFile(self.plan.folder)] if self.plan.logged or self.plan.tracked else []
        if chosen.get("val_check_interval") == 0:
            raise BadInput(
                "config: trainer.val_check_interval: it must be at least 1, the number of batches "
                "between evaluations"
            )
        try:
            return super().instantiate_trainer(
                logger=own_file or False,
                plugins=own,
                callbacks=callbacks,
                default_root_dir=str(self.plan.folder),
                **kwargs,
            )
        except (
            RuntimeError,
            KeyError,
        ) as error:  # which is how Lightning rejects the variables of a launcher
            raise BadInput(
                f"trainer: {error}; unset the variables of the launcher, or start with it"
            ) from error


class Settings(Session):
    """A config parsed and checked, of which nothing is built unless asked for: no folder, no
    target, no trainer.

    Args:
        config: a config (merged with all it builds on).
        overrides: what the command line adds.

    Raises:
        BadInput: a setting is unknown, or of a wrong type.
    """

    def __init__(self, config: Mapping[str, Any], overrides: Sequence[str] = ()):
        super().__init__(config, overrides, lambda settings: Plan(Path(), ""))

    def instantiate_classes(self) -> None:
        """Nothing: see `built`."""

    def built(self, owner: str, **given: Any) -> Any:
        """The model or the data, with some of its arguments given as objects.

        Raises:
            BadInput: it refuses one of its arguments.
        """
        chosen = self.config[owner].clone()
        for name, value in given.items():
            chosen["init_args"][name] = value
        try:
            return self.parser.instantiate_classes(Namespace({owner: chosen}))[owner]
        except (ValueError, TypeError) as error:
            raise complaint(error) from error


def _dicts(value: Any) -> Any:
    """Settings with dicts in the place of namespaces."""
    if isinstance(value, Namespace):
        return {key: _dicts(held) for key, held in vars(value).items()}
    return [_dicts(held) for held in value] if isinstance(value, list | tuple) else value


def _check_shape(config: Mapping[str, Any]) -> None:
    """Check the parts of a config that are read before jsonargparse checks it.

    Raises:
        BadInput: its trainer is not a mapping, or it has a key of the command line's.
    """
    if not isinstance(config.get("trainer", {}), dict):
        raise BadInput("config: trainer: expected 'key: value' lines")
    if "config" in config:
        raise BadInput("config: config: not a setting; name the configs to build on under 'base'")


def _check_files(overrides: Sequence[str]) -> None:
    """Read every YAML file that an override names, so that what is wrong with it is said with the
    file's name.
    """
    for word in overrides:
        path = Path(word.partition("=")[2] if word.startswith("--") else word)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            configs.read_file(path)
    for option, value in _pairs(overrides):
        # jsonargparse reads a file that the value of such an option names, and takes its text for
        # the setting.
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
    """Whether a value names something on the disk that is neither a folder nor a YAML file."""
    path = Path(value)
    try:
        return (
            value != ""
            and path.exists()
            and not path.is_dir()
            and path.suffix not in (".yaml", ".yml")
        )
    except (OSError, ValueError):  # not a possible name
        return False


def _plain(value: Any) -> Any:
    """Settings with dataclasses, as defaults have them, as maps: jsonargparse cannot write those
    inside a map.
    """
    if isinstance(value, Namespace):
        return Namespace(**{key: _plain(held) for key, held in vars(value).items()})
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in value.items()}
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries' advice on settings that are ours to choose is kept from the user."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # read when mlflow is imported
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's to heed
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(
        logging.ERROR
    )  # "not found. Creating it."
    with warnings.catch_warnings():
        for text in _OURS_TO_CHOOSE:
            warnings.filterwarnings("ignore", message=f".*{text}.*")
        yield


_OURS_TO_CHOOSE = (
    "LeafSpec",
    "args parameter is intended to run",  # LightningCLI, if it is given words
    "in eval mode at the start of training",  # the target is (D6)
    "max_epochs. was not set",  # steps count here
    "GPU available but not used",
    "does not have many workers",
    "predict returned None",  # harvesters write what there is to return
)
