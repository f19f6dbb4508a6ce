"""Networks that files can name: a closed list of classes, with bounds on their size.

A decomposition or a target is read from disk, or comes from someone else's tracker. Its JSON names
the class of its network and the arguments. Only the classes of `NETWORKS` are built from such a
name, and the name is looked up before anything is imported. To use another class, pass the network
as an object (`Decomposition.from_pretrained(run, target=…)`), or name its package on the command
line (`--allow_classes`).

Sizes in JSON are not trusted, either. Before anything is allocated, the network is built on torch's
meta device, which stores only shapes, and compared with the saved weights.
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
"""Our networks, and where each is defined. HuggingFaceLM builds a model of transformers from its
configuration.
"""

# Maximum total size of the tables that a network computes, such as rotary angles.
_BUFFERS = 1 << 28
# Largest integer argument; configurations use this number for "no bound".
_LARGEST = 1 << 31
# Names of arguments that count modules.
_COUNTS = re.compile(r"layers?$|blocks?$|n_identity$", re.IGNORECASE)
_Module = TypeVar("_Module", bound=nn.Module)


def network_class(path: str) -> type[nn.Module]:
    """Return the class of a network that a file names.

    Raises:
        BadInput: the class must not be built from a file, or does not exist.
    """
    module, _, name = path.rpartition(".")
    if name in NETWORKS and module in ("spd_lightning", NETWORKS[name]):
        return getattr(importlib.import_module(NETWORKS[name]), name)
    known = ", ".join(f"spd_lightning.{name}" for name in NETWORKS)
    if not classes.allowed_by_user(path):
        raise BadInput(
            f"target '{path[:100]}': cannot be built: files can name {known}; pass another network "
            "as an object (Decomposition.from_pretrained(run, target=…)), or name its package: "
            "--allow_classes PACKAGE"
        )
    try:
        network = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(
            f"target '{path}': cannot be built ({error}); install its package"
        ) from error
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        raise BadInput(
            f"target '{path}': cannot be built (it is not a torch.nn.Module); name a network"
        )
    return network


def build(spec: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Build the network that a class path and its arguments describe, without loading weights.

    Args:
        spec: `class_path` and `init_args`, from a file.
        weights: its parameters and buffers, also from a file, to check the size of the network
            against. None for a network from the user's config, which can have any size.

    Raises:
        BadInput: the network must not be built from a file, or does not fit the weights.
    """
    path = str(spec.get("class_path"))
    arguments = spec.get("init_args") or {}
    make = network_class(path)

    def built() -> nn.Module:
        try:
            return make(**arguments)
        except BadInput:
            raise
        except Exception as error:  # unsuitable arguments can raise anything
            why = " ".join(str(error).split())[:200]
            raise BadInput(
                f"target '{path}': cannot be built ({why}); restore its JSON from a copy"
            ) from error

    if weights is not None:
        _check_numbers(path, arguments, len(weights))
        check_shapes(built, weights, f"target '{path}'")
    return built()


def check_shapes(make: Callable[[], nn.Module], weights: Mapping[str, Tensor], what: str) -> None:
    """Compare the shapes of a module and of its weights, before the module is allocated.

    Args:
        make: builds the module.
        weights: its weights.
        what: the name of the module in messages.

    Raises:
        BadInput: a parameter is missing, unknown, or of another shape.
    """
    bound = 4 * len(weights) + 64
    with torch.device("meta"), _at_most(bound, what):
        module = make()
    state = module.state_dict()
    remedy = "weights of another model; name the run that belongs to this target"
    for name in sorted({*state, *weights}):
        if name not in weights:
            raise BadInput(f"{what}: its weights have no '{name}': {remedy}")
        if name not in state:
            raise BadInput(f"{what}: it has no place for the weights' '{name}': {remedy}")
        shape = list(state[name].shape)
        saved = list(weights[name].shape)
        if shape != saved:
            raise BadInput(
                f"{what}: '{name}' would be {shape}, and {saved} in its weights: {remedy}"
            )
    tables = 0
    for name, buffer in module.named_buffers():
        if name not in state:
            tables += buffer.numel()
    if tables > _BUFFERS:
        raise BadInput(
            f"{what}: it would make tables of {tables:,} numbers; the maximum is {_BUFFERS:,}; "
            f"{remedy}"
        )


def _check_numbers(path: str, arguments: Any, tensors: int, name: str = "") -> None:
    """Check that no argument is too large, and none counts more modules than there are weights.

    Args:
        path: class path of the network.
        arguments: the arguments, or a value inside them.
        tensors: number of tensors in the weights.
        name: name of the argument.

    Raises:
        BadInput: an argument is too large.
    """
    if isinstance(arguments, dict):
        for key, value in arguments.items():
            _check_numbers(path, value, tensors, str(key))
    elif isinstance(arguments, list):
        for value in arguments:
            _check_numbers(path, value, tensors, name)
    elif isinstance(arguments, int | float) and not isinstance(arguments, bool):
        counts_modules = _COUNTS.search(name) is not None
        is_size = counts_modules or isinstance(arguments, int)
        most = max(tensors, 1) if counts_modules else _LARGEST
        if is_size and math.isfinite(arguments) and abs(arguments) > most:
            raise BadInput(
                f"target '{path}': {name[:60]} {arguments}: its weights are of a smaller network, "
                f"in which it is at most {most}; restore its JSON from a copy"
            )


@contextmanager
def _at_most(count: int, what: str) -> Iterator[None]:
    """Raise an error once more than `count` parameters and submodules are registered.

    This stops a loop over a huge number of layers.
    """
    registered = 0

    def count_one(module: nn.Module, name: str, registrand: Any) -> None:
        nonlocal registered
        registered += 1
        if registered > count:
            raise BadInput(
                f"{what}: it would have more parts than its weights; restore its JSON from a copy"
            )

    hooks = [
        register_module_parameter_registration_hook(count_one),
        register_module_module_registration_hook(count_one),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
