"""Adversaries: sources that hurt most, found by ascending a loss (section M of docs/method.md)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lightning.decomposition.masks import Sources, uniform
from spd_lightning.errors import BadInput, check_range


@dataclass(frozen=True)
class Adversary:
    """A fresh adversary that ascends the loss by projected gradient ascent (PGD).

    Args:
        steps: ascents; always to be stated beside a result.
        step_size: η of `s ← clamp(s + η·sign(∇L), 0, 1)`.
        init: where the sources start.
        scope: per_position, or per_batch (one vector shared by all positions and examples).
    """

    steps: int = 20
    step_size: float = 0.1
    init: Literal["random", "ones", "zeros"] = "random"
    scope: Literal["per_position", "per_batch"] = "per_batch"

    def __post_init__(self):
        check_range("adversary", least=0, whole=True, steps=self.steps)
        check_range("adversary", above=0, step_size=self.step_size)

    def check_start(self, delta: bool, place: str) -> None:
        """Reject a start from which no gradient leads away.

        Args:
            delta: whether the model has the delta component. With it on, sources of 1 make the
                target itself (D5): the loss is 0, its gradient too, and an adversary that stays
                there would read as robustness.
            place: where the adversary was asked for, for the message.

        Raises:
            BadInput: the adversary would start at the target itself.
        """
        if self.init == "ones" and delta:
            raise BadInput(
                f"adversary init 'ones' in {place}: with the delta component on, the search starts "
                "at the target "
                "itself and never leaves it; use init 'random' or 'zeros'"
            )


def pgd_sources(
    adversary: Adversary,
    importances: Mapping[str, Tensor],
    loss: Callable[[Sources], Tensor],
    generator: torch.Generator | None,
    start: Sources | None = None,
) -> Sources:
    """Sources an adversary finds by ascending `loss`; the delta's source is one more entry of each
    vector.

    loss: maps sources to the scalar to be raised; its parameters need no gradient and should carry
    none. start: sources to go on from, instead of fresh ones.
    """
    names = list(importances)
    vectors = [
        _initial(adversary, g, generator) if start is None else _joined(*start[n])
        for n, g in importances.items()
    ]
    for _ in range(adversary.steps):
        leaves = [v.detach().requires_grad_() for v in vectors]
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                loss(split(dict(zip(names, leaves, strict=True)), importances)), leaves
            )
        vectors = [
            (v.detach() + adversary.step_size * _shared(g).sign()).clamp(0, 1)
            for v, g in zip(vectors, gradients, strict=True)
        ]
    return split(dict(zip(names, vectors, strict=True)), importances)


def _initial(
    adversary: Adversary, g: Float[Tensor, "... C"], generator: torch.Generator | None
) -> Tensor:
    g = g.to(torch.promote_types(g.dtype, torch.float32))  # steps may be finer than half precision
    shape = (g.shape[:-1] if adversary.scope == "per_position" else ()) + (g.shape[-1] + 1,)
    match adversary.init:
        case "random":
            return uniform(g, shape, generator)
        case "ones":
            return g.new_ones(shape)
        case "zeros":
            return g.new_zeros(shape)


def _joined(s: Tensor, delta: Tensor) -> Tensor:
    """The inverse of `_split`: one vector a position, or one for the batch."""
    return torch.cat([s, (delta if s.ndim > 1 else delta.flatten()[0])[..., None]], dim=-1)


def _shared(gradient: Tensor) -> Tensor:
    """Sources shared by a batch are shared by its devices too: their gradients are summed before
    the sign is taken.
    """
    if (
        gradient.ndim == 1
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
    ):
        torch.distributed.all_reduce(gradient)
    return gradient


def split(vectors: Mapping[str, Tensor], importances: Mapping[str, Tensor]) -> Sources:
    """Vectors [..., C+1] as the sources of components and of the delta, in the importances'
    precision.
    """
    like = {name: v.to(importances[name].dtype) for name, v in vectors.items()}
    return {n: (v[..., :-1], v[..., -1].expand(importances[n].shape[:-1])) for n, v in like.items()}


# ---- the persistent adversary --------------------------------------------------------------------


@dataclass(frozen=True)
class Persistent:
    """An adversary whose sources live on from step to step, climbing by Adam (VPD).

    Args:
        lr: Adam's, once warmed up.
        warmup: fraction of training over which it rises from 0.
        betas: of Adam.
        ascents: climbs a step with all else at rest; one more follows from the gradient of the
            training loss.
        particles: a pool of so many sources, dealt out to the samples of a batch and the same at
            all positions of one; left out, every sample and position has its own.
    """

    lr: float = 0.01
    warmup: float = 0.025
    betas: tuple[float, float] = (0.5, 0.99)
    ascents: int = 2
    particles: int | None = None

    def __post_init__(self):
        check_range("persistent", above=0, lr=self.lr)
        check_range("persistent", least=0, most=1, warmup=self.warmup)
        check_range("persistent", least=0, below=1, betas=self.betas)
        check_range("persistent", least=0, whole=True, ascents=self.ascents)
        check_range(
            "persistent",
            least=1,
            whole=True,
            hint="leave it out for no pool",
            particles=self.particles,
        )


State = dict[str, Tensor]


class PersistentAdversary:
    """The sources of one persistent adversary, with Adam's moments.

    Args:
        settings: how it climbs.
        importances: g of every site, for the shapes.
        generator: draws where the sources start, for all devices alike.
        rank: this device's number; it holds its own part of the batch.
        world: how many devices there are.
        parts: how many equal parts a device takes its batch in; this one belongs to one of them.
    """

    def __init__(
        self,
        settings: Persistent,
        importances: Mapping[str, Float[Tensor, "... C"]],
        generator: torch.Generator | None,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
    ):
        self.settings = settings
        self.rank = rank
        self.world = world
        self.parts = parts
        self.updates = 0
        self.vectors: State = {}
        for name, g in importances.items():
            g = g.detach().to(torch.promote_types(g.dtype, torch.float32))
            rows = len(g)
            kept = (settings.particles,) if settings.particles else (world * rows, *g.shape[1:-1])
            drawn = uniform(g, (*kept, g.shape[-1] + 1), generator)
            self.vectors[name] = (
                drawn if settings.particles else drawn[rank * rows : (rank + 1) * rows].clone()
            )
        self.first = {name: torch.zeros_like(v) for name, v in self.vectors.items()}
        self.second = {name: torch.zeros_like(v) for name, v in self.vectors.items()}
        self._leaves: State = {}
        self._coeff = 1.0

    def spread(
        self, vectors: Mapping[str, Tensor], importances: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The vector of every sample and position ([..., C+1]); sample b of all devices' has
        particle b mod K.
        """
        if not self.settings.particles:
            return dict(vectors)
        spread = {}
        for name, v in vectors.items():
            shape = importances[name].shape[:-1]
            mine = (
                torch.arange(shape[0], device=v.device) + self.rank * shape[0]
            ) % self.settings.particles
            spread[name] = v[mine].view(shape[0], *[1] * (len(shape) - 1), -1).expand(*shape, -1)
        return spread

    def ascend(self, loss: Callable[[Mapping[str, Tensor]], Tensor], progress: float) -> None:
        """Climbs the loss, a function of the vectors alone. progress: fraction of training."""
        for _ in range(self.settings.ascents):
            leaves = self._fresh()
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(leaves), list(leaves.values()))
            self._climb(dict(zip(leaves, gradients, strict=True)), progress)

    def leaves(self, coeff: float) -> State:
        """Vectors that the training loss's backward pass leaves its gradient in. coeff: the loss's,
        divided out.
        """
        self._leaves = self._fresh()
        self._coeff = coeff
        return self._leaves

    def finish(self, progress: float) -> None:
        """The last climb of a step, from that gradient, of the mean loss over all parts."""
        share = self._coeff / self.parts
        gradients = {
            name: leaf.grad / share for name, leaf in self._leaves.items() if leaf.grad is not None
        }
        if gradients:
            self._climb(gradients, progress)
        self._leaves = {}

    def state(self) -> dict[str, State | int]:
        """All that lives on, whole: the parts of all devices together."""
        parts = {"vectors": self.vectors, "first": self.first, "second": self.second}
        return {k: {n: self._whole(v) for n, v in part.items()} for k, part in parts.items()} | {
            "updates": self.updates
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; each device takes its part."""
        for part in ("vectors", "first", "second"):
            own: State = getattr(self, part)
            for name, v in state[part].items():
                rows = len(own[name])
                mine = (
                    v if self.settings.particles else v[self.rank * rows : (self.rank + 1) * rows]
                )
                own[name] = mine.to(own[name].device, copy=True)
        self.updates = state["updates"]

    @property
    def bytes(self) -> int:
        """Memory that it takes from step to step."""
        return sum(
            v.nbytes for part in (self.vectors, self.first, self.second) for v in part.values()
        )

    def _fresh(self) -> State:
        return {name: v.detach().clone().requires_grad_() for name, v in self.vectors.items()}

    def _climb(self, gradients: Mapping[str, Tensor], progress: float) -> None:
        """One update of Adam, upwards, kept within [0, 1]; from gradients of the mean over one part
        of one device.
        """
        (b1, b2), warmup = self.settings.betas, self.settings.warmup
        lr = self.settings.lr * (min(1.0, progress / warmup) if warmup else 1.0)
        self.updates += 1
        for name, gradient in gradients.items():
            g = gradient / (self.world * self.parts)
            if self.settings.particles and self.world > 1:
                torch.distributed.all_reduce(g)
            self.first[name].lerp_(g, 1 - b1)
            self.second[name].mul_(b2).addcmul_(g, g, value=1 - b2)
            size = (self.second[name] / (1 - b2**self.updates)).sqrt_().add_(1e-8)
            self.vectors[name] = (
                self.vectors[name]
                .addcdiv(self.first[name], size, value=lr / (1 - b1**self.updates))
                .clamp_(0, 1)
            )

    def _whole(self, v: Tensor) -> Tensor:
        if self.settings.particles or self.world == 1:
            return v.clone()
        parts = [torch.empty_like(v) for _ in range(self.world)]
        torch.distributed.all_gather(parts, v)
        return torch.cat(parts)
