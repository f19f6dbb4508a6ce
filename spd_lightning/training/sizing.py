"""What a decomposition will take, before anything is trained: parameters, memory, FLOPs, hours.

    memory  = weights + gradients + optimiser state + adversaries + what a step keeps until its backward pass
    seconds = FLOPs / (peak · share) + bytes moved / (bandwidth / 2) + operations · launch        for one step

Weights are counted, the rest is read off a rehearsed step (`rehearsal`). The target is not trained, and of one on the
hub nothing but its configuration is fetched. Evaluations, checkpoints and the target's own training come on top.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spd_lightning import config as configs
from spd_lightning.errors import BadInput, nearest
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.networks import build
from spd_lightning.training.open_target import is_trained_here
from spd_lightning.training.rehearsal import FAITHFULNESS, Rehearsal, Work, fakes, rehearse
from spd_lightning.training.session import Settings

GiB = 2**30
STREAM = 0.5
"""The share of a memory's bandwidth that operations other than matrix products are assumed to reach."""
MODEST = 0.25
"""The share of a machine's memory up to which a rough bound on the need makes a closer look unnecessary."""


# ---- devices --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A machine as far as hours depend on it.

    Attributes:
        name: as people know it.
        half: peak of dense matrix products in bfloat16, in FLOP/s.
        single: the same in float32.
        bandwidth: of its memory, in byte/s.
        memory: in bytes.
        launch: seconds that one operation costs, however small.
        share: of the peak that matrix products of these shapes are assumed to reach.
        gpu: whether it is one: they decompose whole batches, where a processor picks the routed positions.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    memory: float
    launch: float = 1e-5
    share: float = 0.4
    gpu: bool = True

    def seconds(self, work: Work, mixed: bool) -> float:
        """How long some work takes; mixed: whether matrix products are in bfloat16."""
        products = work.flops / (self.share * (self.half if mixed else self.single))
        return products + work.moved / (STREAM * self.bandwidth) + work.operations * self.launch


DEVICES = {
    "h200": Device("NVIDIA H200", 989e12, 67e12, 4.8e12, 141e9),
    "h100": Device("NVIDIA H100", 989e12, 67e12, 3.35e12, 80e9),
    "a100": Device("NVIDIA A100 80 GB", 312e12, 19.5e12, 2.0e12, 80e9),
    "rtx4090": Device("NVIDIA RTX 4090", 165e12, 82.6e12, 1.0e12, 24e9),
    "t4": Device("NVIDIA T4 (no bfloat16)", 8.1e12, 8.1e12, 0.32e12, 16e9),
    "laptop": Device("laptop CPU, 8 cores", 0.4e12, 0.4e12, 40e9, 16e9, launch=5e-6, share=0.6, gpu=False),
}
"""Peaks from the makers' data sheets, without sparsity; the laptop is a guess."""


def measured(threads: int | None = None) -> Device:
    """This machine's GPU, or its processor where it has none, by short measurements."""
    cuda = torch.cuda.is_available()
    place = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else f"this CPU, {torch.get_num_threads()} threads"
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        half, single = (_products(place, dtype) for dtype in (torch.bfloat16, torch.float32))
        memory, launch = machine_memory(place), _launch(place)
        return Device(name, half, single, _bandwidth(place), memory, launch, share=0.7, gpu=cuda)
    finally:
        torch.set_num_threads(before)


def machine_memory(place: torch.device) -> float:
    """Bytes that a process can have there: a GPU's, or the machine's up to the limit set for it."""
    if place.type == "cuda":
        return float(torch.cuda.mem_get_info(place)[1])
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    words = limit.read_text().strip() if limit.exists() else "max"
    return float(min(physical, int(words))) if words.isdigit() else float(physical)


def _quickest(work: Callable[[], Any], place: torch.device) -> float:
    """Seconds of the quickest of many runs, within a fifth of a second."""
    best, begun = float("inf"), time.perf_counter()
    while (started := time.perf_counter()) < begun + 0.2:
        work()
        if place.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def _products(place: torch.device, dtype: torch.dtype) -> float:
    size = 4096 if place.type == "cuda" else 512
    a = torch.ones(size, size, device=place, dtype=dtype)
    return 2 * size**3 / _quickest(lambda: a @ a, place)


def _bandwidth(place: torch.device) -> float:
    a = torch.ones(2**24, device=place)
    b = torch.empty_like(a)
    return 2 * a.numel() * a.element_size() / _quickest(lambda: b.copy_(a), place)


def _launch(place: torch.device) -> float:
    a = torch.ones(1, device=place)

    def many() -> None:
        for _ in range(1000):
            a.add_(1)

    return _quickest(many, place) / 1000


def device_named(name: str) -> Device:
    """A device of the table by its short name; `this` is measured.

    Raises:
        BadInput: there is none of that name.
    """
    if name == "this":
        return measured()
    if name not in DEVICES:
        raise BadInput(f"--device '{name}': not in the table; {nearest(name, [*DEVICES, 'this'])}")
    return DEVICES[name]


# ---- what a config asks for -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A site's name, its number of components, and the parameters of them all (0 where they are another site's)."""

    name: str
    C: int
    parameters: int


@dataclass(frozen=True)
class Size:
    """What a decomposition will take.

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
    step: Rehearsal
    steps: int
    warm_up: int
    mixed: bool
    tokens: int

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by what they are for."""
        step = self.step
        kept = {"gradients": step.gradients, "optimiser": step.state, "activations": step.activations}
        return {"weights": self.weights, **kept, **({"adversaries": step.adversaries} if step.adversaries else {})}

    def seconds(self, device: Device) -> float:
        """Of one step."""
        return device.seconds(self.step.total, self.mixed)

    def hours(self, device: Device) -> float:
        """Of the whole training, warm-up included, evaluations not."""
        warming = device.seconds(self.step.parts.get(FAITHFULNESS, Work()), False) * self.warm_up
        return (self.seconds(device) * self.steps + warming) / 3600


def size_of(settings: Settings, gpu: bool = False) -> Size:
    """What a decomposition config asks for.

    Args:
        settings: the config.
        gpu: whether it is to run on one.

    Raises:
        BadInput: it is no decomposition, or something in it is refused.
    """
    make, batch = _module(settings), _batch(settings)
    trainer, mixed = settings.config["trainer"], _mixed(settings)
    with fakes():
        module = make()
        rows = batch().numel() if not batch().is_floating_point() else len(batch())
    return Size(
        target=_parameters(module.model.target),
        sites=_sites(module),
        importance=_parameters(module.model.importance_function),
        weights=sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())),
        step=rehearse(make, batch, torch.bfloat16 if mixed else None, whole=gpu),
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
    target = chosen["init_args"].get("target") if chosen["class_path"].endswith("Decomposition") else None
    if not isinstance(target, str):
        raise BadInput("config: model: no decomposition of a target that a config or a checkpoint names")
    network = outline(target)
    return lambda: settings.built("model", target=network())


def outline(reference: str) -> Callable[[], nn.Module]:
    """What makes an untrained network like the one a reference means (`open_target`).

    Raises:
        BadInput: there is no such config, or no such model to be had.
    """
    if not is_trained_here(reference):
        from spd_lightning.targets.conversion import decoder_like
        from spd_lightning.targets.huggingface import HuggingFaceLM, configuration

        kind, name = reference.split(":", 1)
        found = configuration(name)
        return (lambda: HuggingFaceLM(found.to_dict())) if kind == "hf" else (lambda: decoder_like(name, found))
    try:
        given = configs.load(reference)
    except BadInput as error:
        raise BadInput(f"target '{reference}': {error}") from error
    for key in ("model", "init_args", "target"):
        given = given.get(key) if isinstance(given, dict) else None
    if not isinstance(given, dict) or "class_path" not in given:
        raise BadInput(f"target '{reference}': does not train a target; its model must be a TargetTraining")
    return lambda: build(given)


# ---- what does not fit ----------------------------------------------------------------------------------------------


def refuse_what_does_not_fit(settings: Settings, available: float | None = None) -> None:
    """Stops a fit that its machine has no memory for, before anything is trained.

    Args:
        settings: the fit's.
        available: bytes there are; of the machine that the trainer would choose where left out.

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
        f"sites: '{largest.name}: {largest.C}' and the others take {needed / GiB:.1f} GiB with batches of "
        f"{settings.built('data').batch_size}, and there are {available / GiB:.1f} GiB; take fewer components or a "
        "smaller batch ('plan' shows what takes how much)"
    )


def _place(settings: Settings) -> torch.device:
    chosen = settings.config["trainer"].get("accelerator", "auto")
    return torch.device("cuda" if chosen in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu")


def rough_bound(settings: Settings) -> float:
    """More bytes than a fit can take, without rehearsing it: sixteen copies of every tensor of each masked pass."""
    with fakes():
        module = _module(settings)()
        tokens = _batch(settings)().numel()
    trained = sum(p.numel() for p in module.parameters())
    width = sum(module.model.counts.values()) + int(getattr(module.network, "vocab", 0))
    width += sum(site.d_in + site.d_out for site in module.model.sites.values())
    passes = 1 + sum(term.samples * (len(module.model.sites) if term.route == "layerwise" else 1)
                     for term in module.losses.reconstruction.values())  # fmt: skip
    return 16.0 * trained + 64.0 * passes * tokens * width
