"""Estimates before a decomposition is trained: parameters, memory, FLOPs, hours.

    memory  = weights + gradients + optimizer state + adversaries
            + what a step keeps until its backward pass
    seconds = FLOPs / (peak · share) + bytes moved / (bandwidth / 2)
            + operations · launch, for one step

Weights are counted. The rest is measured in a dry run of one step (`dry_run`). The target need not
be trained, and only the configuration of a target on the hub is downloaded. The estimates do not
cover evaluations, checkpoints, or the training of the target.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spd_lightning import config as configs
from spd_lightning.errors import BadInput, command
from spd_lightning.planning.devices import Device, machine_memory, place_of
from spd_lightning.planning.dry_run import FAITHFULNESS, StepCost, Work, fake_tensors, measure_step
from spd_lightning.planning.precision import is_mixed
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.networks import build
from spd_lightning.training.open_target import is_trained_here
from spd_lightning.training.session import Settings

GiB = 2**30
MOST_STEPS = 10**12
MODEST = 0.25
"""A fit whose rough bound is below this share of the memory is not measured more closely."""


# ---- the size of a decomposition -----------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """The size of a site.

    Attributes:
        name: the site.
        C: number of components.
        parameters: number of parameters of all its components; 0 if the site is tied to another.
    """

    name: str
    C: int
    parameters: int


@dataclass(frozen=True)
class Size:
    """The size of a decomposition.

    Attributes:
        target: number of parameters of the target.
        sites: the sites with their components.
        importance: number of parameters of the importance functions.
        weights: bytes of all weights in memory.
        step: cost of a training step.
        steps: number of training steps.
        warm_up: number of faithfulness warm-up steps before them.
        mixed: whether matrix products are in bfloat16.
        tokens: number of rows or tokens of a batch.
    """

    target: int
    sites: list[Site]
    importance: int
    weights: int
    step: StepCost
    steps: int
    warm_up: int
    mixed: bool
    tokens: int

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by purpose."""
        step = self.step
        memory = {
            "weights": self.weights,
            "gradients": step.gradients,
            "optimizer": step.state,
            "activations": step.activations,
        }
        if step.adversaries:
            memory["adversaries"] = step.adversaries
        return memory

    def seconds(self, device: Device) -> float:
        """Estimate the seconds of one step."""
        return device.seconds(self.step.total, self.mixed)

    def hours(self, device: Device) -> float:
        """Estimate the hours of the whole training, with the warm-up but without evaluations."""
        warm_up_step = self.step.parts.get(FAITHFULNESS, Work())
        warm_up = device.seconds(warm_up_step, mixed=False) * self.warm_up
        training = self.seconds(device) * self.steps
        return (training + warm_up) / 3600


def size_of(settings: Settings, gpu: bool = False) -> Size:
    """Estimate the size of the decomposition that a config describes.

    Args:
        settings: the config.
        gpu: whether the decomposition will run on a GPU.

    Raises:
        BadInput: the config does not describe a decomposition, or one of its settings is invalid.
    """
    make = module_of(settings)
    batch = batch_of(settings)
    trainer = settings.config["trainer"]
    mixed = is_mixed(settings.settings["trainer"])
    if trainer["max_steps"] > MOST_STEPS:
        raise BadInput(f"trainer.max_steps: at most {MOST_STEPS:,} can be planned for")
    with fake_tensors():
        module = make()
        example = batch()
        rows = len(example) if example.is_floating_point() else example.numel()
    return Size(
        target=_parameters(module.model.target),
        sites=_sites(module),
        importance=_parameters(module.model.importance_function),
        weights=bytes_of(module),
        step=measure_step(make, batch, torch.bfloat16 if mixed else None, whole=gpu),
        steps=max(0, trainer["max_steps"]),
        warm_up=module.warm_up.steps,
        mixed=mixed,
        tokens=rows,
    )


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a module."""
    count = 0
    for tensor in (*module.parameters(), *module.buffers()):
        count += tensor.numel() * tensor.element_size()
    return count


def _parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    sizes = (parameter.numel() for parameter in module.parameters())
    return sum(sizes)


def _sites(module: Decomposition) -> list[Site]:
    model = module.model
    sites = []
    for name, C in model.counts.items():
        sites.append(Site(name, C, _parameters(model[name])))
    return sites


def batch_of(settings: Settings, predict: bool = False) -> Callable[[], Tensor]:
    """Return a function that makes a batch of zeros of the config's shape.

    predict: whether it is a batch of `predict`, and not of the training.
    """
    data = settings.built("data")
    size = data.predict_batch_size if predict else data.batch_size
    if not hasattr(data, "seq_len"):
        return lambda: torch.zeros(size, data.n_features)
    length = data.seq_len
    if predict:
        length = getattr(data, "n_ctx", length)
    return lambda: torch.zeros(size, length, dtype=torch.long)


def module_of(settings: Settings) -> Callable[[], Decomposition]:
    """Return a function that makes the config's module on an untrained target.

    Call it while new tensors are fake.
    """
    chosen = settings.config["model"]
    target = None
    if chosen["class_path"].endswith("Decomposition"):
        target = chosen["init_args"].get("target")
    if not isinstance(target, str):
        raise BadInput(
            "config: model: not a Decomposition whose target is named by a config or a checkpoint"
        )
    network = outline(target)
    return lambda: settings.built("model", target=network())


def outline(reference: str) -> Callable[[], nn.Module]:
    """Return a builder of an untrained network like the one a reference names (`open_target`).

    Raises:
        BadInput: the config or the model does not exist, or the config does not train a target.
    """
    if not is_trained_here(reference):
        from spd_lightning.targets.conversion import decoder_like
        from spd_lightning.targets.huggingface import HuggingFaceLM, configuration

        kind, name = reference.split(":", 1)
        architecture = configuration(name)
        if kind == "hf":
            return lambda: HuggingFaceLM(architecture.to_dict())
        return lambda: decoder_like(name, architecture)
    try:
        section = configs.load(reference)
    except BadInput as error:
        raise BadInput(f"target '{reference}': {error}") from error
    for key in ("model", "init_args", "target"):
        section = section.get(key) if isinstance(section, dict) else None
    if not isinstance(section, dict) or "class_path" not in section:
        raise BadInput(
            f"target '{reference}': does not train a target; its model must be a TargetTraining"
        )
    return lambda: build(section)


# ---- fits that are too large ---------------------------------------------------------------------


def check_memory(settings: Settings, available: float | None = None) -> None:
    """Raise an error if a fit needs more memory than its machine has.

    Args:
        settings: the settings of the fit.
        available: available bytes; those of the device that the trainer would choose if omitted.

    Raises:
        BadInput: the fit needs more memory.
    """
    place = place_of(settings.settings["trainer"])
    if available is None:
        available = machine_memory(place)
    if rough_bound(settings) < MODEST * available:
        return
    size = size_of(settings, gpu=place.type == "cuda")
    needed = sum(size.memory.values())
    if needed <= available:
        return
    largest = max(size.sites, key=lambda site: site.C)
    batch_size = settings.built("data").batch_size
    raise BadInput(
        f"sites: '{largest.name}: {largest.C}' and the others take {needed / GiB:.1f} GiB with "
        f"batches of {batch_size}, but only {available / GiB:.1f} GiB are available; use fewer "
        f"components or a smaller batch; for the memory of each part: {command('plan')} with the "
        "same options"
    )


def rough_bound(settings: Settings) -> float:
    """Return an upper bound on the bytes of a fit, without a dry run.

    It allows for sixteen copies of every tensor of each masked pass.
    """
    with fake_tensors():
        module = module_of(settings)()
        tokens = batch_of(settings)().numel()
    model = module.model
    trained = _parameters(module)
    width = int(getattr(module.network, "vocab", 0))
    for name, site in model.sites.items():
        width += model.counts[name] + site.d_in + site.d_out
    passes = 1
    for term in module.losses.reconstruction.values():
        passes_per_sample = len(model.sites) if term.route == "layerwise" else 1
        passes += term.samples * passes_per_sample
    return 16.0 * trained + 64.0 * passes * tokens * width
