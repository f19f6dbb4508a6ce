"""Estimates for a decomposition before anything is trained: parameters, memory, FLOPs, hours.

    memory  = weights + gradients + optimizer state + adversaries
            + what a step keeps until its backward pass
    seconds = FLOPs / (peak · share) + bytes moved / (bandwidth / 2)
            + operations · launch, for one step

Weights are counted, and the rest is measured in a dry run of one step (`dry_run`). The target is
not trained. Of a target on the hub only its configuration is fetched. Evaluations, checkpoints and
the target's own training come on top.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spd_lightning import config as configs
from spd_lightning.errors import BadInput
from spd_lightning.planning.devices import Device, machine_memory
from spd_lightning.planning.dry_run import FAITHFULNESS, StepCost, Work, fake_tensors, measure_step
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.networks import build
from spd_lightning.training.open_target import is_trained_here
from spd_lightning.training.session import Settings

GiB = 2**30
MOST_STEPS = 10**12
MODEST = 0.25
"""The share of a machine's memory up to which a rough bound on the need makes a closer look
unnecessary.
"""


# ---- what a config asks for ----------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A site's name, its number of components, and the parameters of them all (0 where they are
    another site's).
    """

    name: str
    C: int
    parameters: int


@dataclass(frozen=True)
class Size:
    """The size of a decomposition.

    Attributes:
        target: parameters of the target.
        sites: the sites with their components.
        importance: parameters of the importance functions.
        weights: bytes of all these, as held in memory.
        step: a rehearsed training step.
        steps: how many there will be.
        warm_up: how many on faithfulness alone before them.
        mixed: whether matrix products are in bfloat16.
        tokens: rows or tokens of a batch.
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
        """Bytes by what they are for."""
        step = self.step
        kept = {
            "gradients": step.gradients,
            "optimizer": step.state,
            "activations": step.activations,
        }
        return {
            "weights": self.weights,
            **kept,
            **({"adversaries": step.adversaries} if step.adversaries else {}),
        }

    def seconds(self, device: Device) -> float:
        """Estimate the seconds of one step."""
        return device.seconds(self.step.total, self.mixed)

    def hours(self, device: Device) -> float:
        """Estimate the hours of the whole training, with the warm-up and without evaluations."""
        warming = device.seconds(self.step.parts.get(FAITHFULNESS, Work()), False) * self.warm_up
        return (self.seconds(device) * self.steps + warming) / 3600


def size_of(settings: Settings, gpu: bool = False) -> Size:
    """Estimate the size of the decomposition that a config describes.

    Args:
        settings: the config.
        gpu: whether it is to run on one.

    Raises:
        BadInput: it is not a decomposition, or something in it is refused.
    """
    make = _module(settings)
    batch = _batch(settings)
    trainer = settings.config["trainer"]
    mixed = _mixed(settings)
    if trainer["max_steps"] > MOST_STEPS:
        raise BadInput(f"trainer.max_steps: at most {MOST_STEPS:,} can be planned for")
    with fake_tensors():
        module = make()
        rows = batch().numel() if not batch().is_floating_point() else len(batch())
    return Size(
        target=_parameters(module.model.target),
        sites=_sites(module),
        importance=_parameters(module.model.importance_function),
        weights=sum(
            t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())
        ),
        step=measure_step(make, batch, torch.bfloat16 if mixed else None, whole=gpu),
        steps=max(0, trainer["max_steps"]),
        warm_up=module.warm_up.steps,
        mixed=mixed,
        tokens=rows,
    )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _sites(module: Decomposition) -> list[Site]:
    model = module.model
    return [Site(name, C, _parameters(model[name])) for name, C in model.counts.items()]


def _mixed(settings: Settings) -> bool:
    return str(settings.config["trainer"].get("precision") or "").startswith("bf16")


def _batch(settings: Settings) -> Callable[[], Tensor]:
    """Makes a batch of the config's shape, all zeros."""
    data = settings.built("data")
    if hasattr(data, "seq_len"):
        return lambda: torch.zeros(data.batch_size, data.seq_len, dtype=torch.long)
    return lambda: torch.zeros(data.batch_size, data.n_features)


def _module(settings: Settings) -> Callable[[], Decomposition]:
    """Makes the config's module on an untrained target; to be called where tensors are fake."""
    chosen = settings.config["model"]
    target = (
        chosen["init_args"].get("target")
        if chosen["class_path"].endswith("Decomposition")
        else None
    )
    if not isinstance(target, str):
        raise BadInput(
            "config: model: no decomposition of a target that a config or a checkpoint names"
        )
    network = outline(target)
    return lambda: settings.built("model", target=network())


def outline(reference: str) -> Callable[[], nn.Module]:
    """Return a builder of an untrained network like the one a reference names (`open_target`).

    Raises:
        BadInput: there is no such config, or no such model to be had.
    """
    if not is_trained_here(reference):
        from spd_lightning.targets.conversion import decoder_like
        from spd_lightning.targets.huggingface import HuggingFaceLM, configuration

        kind, name = reference.split(":", 1)
        found = configuration(name)
        return (
            (lambda: HuggingFaceLM(found.to_dict()))
            if kind == "hf"
            else (lambda: decoder_like(name, found))
        )
    try:
        given = configs.load(reference)
    except BadInput as error:
        raise BadInput(f"target '{reference}': {error}") from error
    for key in ("model", "init_args", "target"):
        given = given.get(key) if isinstance(given, dict) else None
    if not isinstance(given, dict) or "class_path" not in given:
        raise BadInput(
            f"target '{reference}': does not train a target; its model must be a TargetTraining"
        )
    return lambda: build(given)


# ---- what does not fit ---------------------------------------------------------------------------


def refuse_what_does_not_fit(settings: Settings, available: float | None = None) -> None:
    """Stops a fit that its machine has no memory for, before anything is trained.

    Args:
        settings: the fit's.
        available: bytes there are; of the machine that the trainer would choose if omitted.

    Raises:
        BadInput: it takes more.
    """
    available = machine_memory(_place(settings)) if available is None else available
    if rough_bound(settings) < MODEST * available:
        return
    size = size_of(settings, _place(settings).type == "cuda")
    if (needed := sum(size.memory.values())) <= available:
        return
    largest = max(size.sites, key=lambda site: site.C)
    raise BadInput(
        f"sites: '{largest.name}: {largest.C}' and the others take {needed / GiB:.1f} GiB with "
        "batches of "
        f"{settings.built('data').batch_size}, and there are {available / GiB:.1f} GiB; take fewer "
        "components or a "
        "smaller batch ('plan' shows what takes how much)"
    )


def _place(settings: Settings) -> torch.device:
    chosen = settings.config["trainer"].get("accelerator", "auto")
    return torch.device(
        "cuda" if chosen in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
    )


def rough_bound(settings: Settings) -> float:
    """More bytes than a fit can take, without rehearsing it: sixteen copies of every tensor of each
    masked pass.
    """
    with fake_tensors():
        module = _module(settings)()
        tokens = _batch(settings)().numel()
    trained = sum(p.numel() for p in module.parameters())
    width = sum(module.model.counts.values()) + int(getattr(module.network, "vocab", 0))
    width += sum(site.d_in + site.d_out for site in module.model.sites.values())
    passes = 1 + sum(
        term.samples * (len(module.model.sites) if term.route == "layerwise" else 1)
        for term in module.losses.reconstruction.values()
    )
    return 16.0 * trained + 64.0 * passes * tokens * width
