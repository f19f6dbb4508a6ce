"""The types of the JSON files of runs and targets, against which `json_files.read` checks them."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from spd_lightning.errors import BadInput
from spd_lightning.json_files import open_ended, read

RESTORE = "restore it from a copy, or run the fit again"

Figure = int | float | str | bool | None

Summary = dict[str, Figure | dict[str, Figure]]
"""The results of a run, by name: figures, seconds, steps, the verdict, versions."""


def read_summary(path: Path) -> Summary:
    """Read the results of a run.

    Raises:
        BadInput: the file is damaged, or a figure (`mmcs/linear1`, …) is not a number.
    """
    summary = read(path, Summary, RESTORE)
    for name, value in summary.items():
        is_figure = "/" in name and not name.startswith("version/")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_figure and not is_number:
            raise BadInput(
                f"'{path}': {name[:60]}: found {str(value)[:40]!r}, expected a number; {RESTORE}"
            )
    return summary


@open_ended
class Record(TypedDict):
    """The name, settings and start time of a run (run.json), written when its folder is made."""

    family: str
    digest: str
    started: float


class Origin(TypedDict):
    """The tracker's copy from which a run was pulled (pulled.json)."""

    reference: str
    origin: str


class Network(TypedDict):
    """The class of a network, its arguments, and the seconds that its training took."""

    class_path: str
    init_args: NotRequired[dict[str, Any] | None]
    seconds: NotRequired[float]


class SiteShape(TypedDict):
    """The sizes of a decomposed weight: numbers of components, inputs and outputs."""

    C: int
    d_in: int
    d_out: int


class ModelSettings(TypedDict):
    """The settings of a decomposition; their classes check `importance` and `evaluation`."""

    sites: dict[str, int]
    tied: dict[str, str]
    delta: bool
    seed: int
    importance: dict[str, Any]
    evaluation: dict[str, Any]


class Description(TypedDict):
    """A decomposition (decomposition.json), and the digest of its weights."""

    schema: int
    model: ModelSettings
    target: Network | None
    sites: dict[str, SiteShape]
    tied: dict[str, str]
    digest: str


@open_ended
class Factorization(TypedDict):
    """The part of decomposition.json that is needed to find the matrices of a site."""

    tied: dict[str, str]
    digest: str


@open_ended
class TargetDescription(TypedDict):
    """A trained target (target.json), and the digest of its weights."""

    spec: Network
    digest: str
    seconds: float
    seed: int
    losses: dict[str, float]
