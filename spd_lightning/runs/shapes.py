"""The types of the JSON files of runs and targets, against which `json_files.read` checks them."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from spd_lightning.errors import BadInput
from spd_lightning.json_files import open_ended, read

RESTORE = "restore it from a copy, or run the fit again"

Figure = int | float | str | bool | None

Summary = dict[str, Figure | dict[str, Figure]]
"""What a run reached, by name: figures, seconds, steps, the verdict, versions."""


def read_summary(path: Path) -> Summary:
    """Read the results of a run.

    Raises:
        BadInput: the file is damaged, or holds something else for a figure (`mmcs/linear1`, …) than
            a number.
    """
    summary = read(path, Summary, RESTORE)
    remedy = f"expected a number; {RESTORE}"
    for name, value in summary.items():
        figure = "/" in name and not name.startswith("version/")
        if figure and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise BadInput(f"'{path}': {name[:60]}: found {str(value)[:40]!r}, {remedy}")
    return summary


@open_ended
class Record(TypedDict):
    """How a run's folder was claimed (run.json)."""

    family: str
    digest: str
    started: float


class Origin(TypedDict):
    """Where a pulled run came from (pulled.json)."""

    reference: str
    origin: str


class Network(TypedDict):
    """The class of a network, its arguments, and how long its training took."""

    class_path: str
    init_args: NotRequired[dict[str, Any] | None]
    seconds: NotRequired[float]


class SiteShape(TypedDict):
    """A decomposed weight: components, inputs, outputs."""

    C: int
    d_in: int
    d_out: int


class ModelSettings(TypedDict):
    """The settings of a decomposition; `importance` and `evaluation` are checked by their
    classes.
    """

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
    """The part of decomposition.json that tells where a site's matrices are."""

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
