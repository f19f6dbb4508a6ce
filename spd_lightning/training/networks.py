"""Networks that a file on disk may name: a closed list, looked up before anything is imported, and
bounded in size.

A decomposition or a target comes from disk, or from somebody else's tracker. Its JSON names the
class of its network and the arguments. Only the classes of `NETWORKS` are built from such a name; a
network of another class is passed as an object (`Decomposition.from_pretrained(run, target=…)`), or
its package is named by the user (`--allow_classes`).

Sizes in JSON are not believed either: before anything is allocated, the network is built on torch's
meta device, which holds shapes alone, and compared with the weights beside it.
"""

import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from spd_lightning import classes
from spd_lightning.errors import BadInput

NETWORKS = {
    "TMS": "spd_lightning.targets.toy",
    "ResidualMLP": "spd_lightning.targets.toy",
    "InductionHead": "spd_lightning.targets.toy",
    "Decoder": "spd_lightning.targets.transformer",
    "HuggingFaceLM": "spd_lightning.targets.huggingface",
}
"""Every network of ours, and where it is defined. HuggingFaceLM builds a model of transformers by
its configuration.
"""

_BUFFERS = 1 << 28  # numbers in tables that a network computes for itself, such as rotary angles
_LARGEST = (
    1 << 31
)  # of whole numbers among the arguments; configurations have this one for "no bound"
_COUNTS = re.compile(
    r"layers?$|blocks?$|n_identity$", re.IGNORECASE
)  # names of arguments that count modules
_Module = TypeVar("_Module", bound=nn.Module)


def network_class(path: str) -> Callable[..., nn.Module]:
    """The class of a network that a file names.

    Raises:
        BadInput: it is not one that may be built from a file.
    """
    module, _, name = path.rpartition(".")
    if name in NETWORKS and module in ("spd_lightning", NETWORKS[name]):
        return getattr(importlib.import_module(NETWORKS[name]), name)
    known = ", ".join(f"spd_lightning.{name}" for name in NETWORKS)
    if not classes.allowed_by_user(path):
        raise BadInput(
            f"target '{path[:100]}': cannot be built: files may name {known}; pass another network "
            "as an object "
            "(Decomposition.from_pretrained(run, target=…)), or name its package: --allow_classes "
            "PACKAGE"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(
            f"target '{path}': cannot be built ({error}); install what defines it"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise BadInput(
            f"target '{path}': cannot be built (it is not a torch.nn.Module); name a network"
        )
    return found


def build(spec: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The network that a class path and its arguments describe, not yet with its weights.

    Args:
        spec: `class_path` and `init_args`, from a file.
        weights: its parameters and buffers, from a file too; the network has to be as large as
            these. None for a network from a config of the user's, which may be of any size.

    Raises:
        BadInput: it is not a network that may be built from a file, or not one with these weights.
    """
    path = str(spec.get("class_path"))
    arguments = spec.get("init_args") or {}
    make = network_class(path)

    def built() -> nn.Module:
        try:
            return make(**arguments)
        except BadInput:
            raise
        except Exception as error:  # of whatever the class makes of arguments that are not its own
            why = " ".join(str(error).split())[:200]
            raise BadInput(
                f"target '{path}': cannot be built ({why}); restore its JSON from a copy"
            ) from error

    if weights is not None:
        _check_numbers(path, arguments, len(weights))
        check_shapes(built, weights, f"target '{path}'")
    return built()


def check_shapes(make: Callable[[], nn.Module], weights: Mapping[str, Tensor], what: str) -> None:
    """Compare a module's shapes with its weights' before the module is made: nothing is allocated.

    Raises:
        BadInput: there is a parameter too many or too few, or one of another shape.
    """
    with torch.device("meta"), _at_most(4 * len(weights) + 64, what):
        module = make()
    own = module.state_dict()
    remedy = "weights of another model; name the run that belongs to this target"
    for name in sorted({*own, *weights}):
        if name not in own or name not in weights:
            side = "its weights have no" if name in own else "it has no place for the weights'"
            raise BadInput(f"{what}: {side} '{name}': {remedy}")
        if own[name].shape != weights[name].shape:
            shapes = f"{list(own[name].shape)}, and {list(weights[name].shape)} in its weights"
            raise BadInput(f"{what}: '{name}' would be {shapes}: {remedy}")
    tables = sum(buffer.numel() for name, buffer in module.named_buffers() if name not in own)
    if tables > _BUFFERS:
        raise BadInput(
            f"{what}: it would make tables of {tables:,} numbers, at most {_BUFFERS:,} are made; "
            f"{remedy}"
        )


def _check_numbers(path: str, arguments: Any, tensors: int, name: str = "") -> None:
    """No argument is larger than any network needs, and none counts more modules than there are
    weights.
    """
    if isinstance(arguments, dict):
        for key, value in arguments.items():
            _check_numbers(path, value, tensors, str(key))
    elif isinstance(arguments, list):
        for value in arguments:
            _check_numbers(path, value, tensors, name)
    elif isinstance(arguments, int | float) and not isinstance(arguments, bool):
        most = max(tensors, 1) if _COUNTS.search(name) else _LARGEST
        whole = isinstance(arguments, int) or _COUNTS.search(name)
        if whole and math.isfinite(arguments) and abs(arguments) > most:
            raise BadInput(
                f"target '{path}': {name[:60]} {arguments}: its weights are of a smaller network, "
                "in which it is at "
                f"most {most}; restore its JSON from a copy"
            )


@contextmanager
def _at_most(count: int, what: str) -> Iterator[None]:
    """While open, no more than `count` parameters and submodules are registered: a loop over layers
    comes to an end.
    """
    seen = 0

    def counted(module: nn.Module, name: str, held: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > count:
            raise BadInput(
                f"{what}: it would have more parts than its weights; restore its JSON from a copy"
            )

    hooks = [
        register_module_parameter_registration_hook(counted),
        register_module_module_registration_hook(counted),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
