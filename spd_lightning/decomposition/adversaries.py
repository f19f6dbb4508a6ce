"""Adversaries: the sources that hurt most, found by ascending a loss (section M of docs/method.md).

With the vector v = (s, s_Δ) of a position, two adversaries search for sources that raise the
reconstruction loss. Importances, routes and components are constants for both.

*Fresh adversary (PGD).* It starts over in every training step.

1. Start at random vectors, at ones, or at zeros.
2. Repeat `steps` times: `v ← clamp(v + η · sign(∂loss/∂v), 0, 1)`.
3. Return the sources.

*Persistent adversary.* Its vectors live on from one training step to the next.

1. Spread the vectors over the samples and positions of the batch.
2. Climb `ascents` times by Adam: `v ← clamp(v + lr · m₁ / (√m₂ + 1e-8), 0, 1)`, with the
   bias-corrected first and second moments m₁ and m₂ of the gradient.
3. Use the vectors in the training loss, and climb once more from the gradient that its backward
   pass leaves behind.

Source: VPD (Bushnaq et al., 2026). This module does not know the model: a loss is a function of
sources or vectors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lightning.decomposition.masks import Sources, uniform
from spd_lightning.errors import BadInput, check_range

State = dict[str, Tensor]
"""One tensor for each site."""


@dataclass(frozen=True)
class Adversary:
    """A fresh adversary that ascends the loss by projected gradient ascent (PGD).

    Args:
        steps: number of ascents; state it next to every result.
        step_size: η of `s ← clamp(s + η·sign(∇L), 0, 1)`.
        init: the sources before the first ascent.
        scope: per_position, or per_batch (one vector shared by all positions and examples).
    """

    steps: int = 20
    step_size: float = 0.1
    init: Literal["random", "ones", "zeros"] = "random"
    scope: Literal["per_position", "per_batch"] = "per_batch"

    def __post_init__(self):
        place = "adversary"
        check_range(place, least=0, whole=True, steps=self.steps)
        check_range(place, above=0, step_size=self.step_size)

    def check_start(self, delta: bool, place: str) -> None:
        """Reject an initial point where the gradient is zero.

        With the delta component on, sources of 1 give the target itself (D5). The loss and its
        gradient are 0 there. The adversary would not move, which would look like robustness.

        Args:
            delta: whether the model has the delta component.
            place: the setting that requests the adversary, for the message.

        Raises:
            BadInput: the adversary would start at the target itself.
        """
        if self.init == "ones" and delta:
            raise BadInput(
                f"adversary init 'ones' in {place}: with the delta component on, the search starts "
                "at the target itself and never leaves it; use init 'random' or 'zeros'"
            )


def pgd_sources(
    adversary: Adversary,
    importances: Mapping[str, Tensor],
    loss: Callable[[Sources], Tensor],
    generator: torch.Generator | None,
    start: Sources | None = None,
) -> Sources:
    """Return the sources that a fresh adversary finds by ascending a loss.

    Args:
        adversary: the settings.
        importances: g [..., C] of every site, for the shapes.
        loss: maps sources to the scalar to raise. Parameters in it need no gradient.
        generator: draws the initial sources.
        start: sources to continue from; initial ones if omitted.
    """
    vectors: State = {}  # [..., C + 1] or [C + 1] at every site
    for name, g in importances.items():
        if start is None:
            vectors[name] = _initial(adversary, g, generator)  # step 1
        else:
            vectors[name] = _join(*start[name])

    def damage(leaves: Mapping[str, Tensor]) -> Tensor:
        sources = split(leaves, importances)
        return loss(sources)

    for _ in range(adversary.steps):  # step 2
        leaves = {name: v.detach().requires_grad_() for name, v in vectors.items()}
        gradients = _gradients(damage, leaves)
        for name, gradient in gradients.items():
            vectors[name] = _ascend(vectors[name], gradient, adversary.step_size)
    return split(vectors, importances)  # step 3


def _gradients(loss: Callable[[Mapping[str, Tensor]], Tensor], leaves: State) -> State:
    """Return the gradient of a loss to the vectors of every site."""
    vectors = list(leaves.values())
    with torch.enable_grad():
        value = loss(leaves)
        gradients = torch.autograd.grad(value, vectors)
    by_site = zip(leaves, gradients, strict=True)
    return dict(by_site)


def _initial(
    adversary: Adversary, g: Float[Tensor, "... C"], generator: torch.Generator | None
) -> Tensor:
    """Return initial vectors: [..., C + 1], or [C + 1] if the whole batch shares one."""
    g = _at_least_float32(g)
    width = g.shape[-1] + 1  # C components and the delta component
    if adversary.scope == "per_position":
        positions = g.shape[:-1]
        shape = (*positions, width)
    else:
        shape = (width,)
    match adversary.init:
        case "random":
            return uniform(g, shape, generator)
        case "ones":
            return g.new_ones(shape)
        case "zeros":
            return g.new_zeros(shape)


def _at_least_float32(g: Tensor) -> Tensor:
    """Return importances in single precision or higher: steps can be finer than half precision."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    return g.to(dtype)


def _ascend(v: Tensor, gradient: Tensor, step_size: float) -> Tensor:
    """Return a vector after one step of projected gradient ascent."""
    gradient = _sum_over_devices(gradient)
    direction = gradient.sign()
    moved = v.detach() + step_size * direction
    return moved.clamp(0, 1)


def _join(s: Tensor, delta: Tensor) -> Tensor:
    """Return the vectors of some sources: the inverse of `split`."""
    shared = s.ndim == 1
    if shared:  # one vector for the batch; its delta was repeated at every position
        repeated = delta.flatten()
        delta = repeated[0]
    column = delta[..., None]  # [..., 1]
    return torch.cat([s, column], dim=-1)


def _sum_over_devices(gradient: Tensor) -> Tensor:
    """Return the gradient, summed over devices in place if the batch shares one vector."""
    distributed = torch.distributed
    shared = gradient.ndim == 1
    if shared and distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(gradient)
    return gradient


def split(vectors: Mapping[str, Tensor], importances: Mapping[str, Tensor]) -> Sources:
    """Return the sources of vectors [..., C + 1]: the last entry is that of the delta component.

    They have the dtype of the importances.
    """
    sources = {}
    for name, v in vectors.items():
        g = importances[name]
        v = v.to(g.dtype)
        s = v[..., :-1]  # [..., C]
        positions = g.shape[:-1]
        s_delta = v[..., -1]  # [...], or [] if the batch shares one vector
        s_delta = s_delta.expand(positions)
        sources[name] = (s, s_delta)
    return sources


# ---- the persistent adversary --------------------------------------------------------------------


@dataclass(frozen=True)
class Persistent:
    """An adversary whose sources live on from step to step and climb by Adam (VPD).

    Args:
        lr: learning rate of Adam after the warm-up.
        warmup: fraction of training over which the learning rate rises from 0.
        betas: decay rates of Adam's moments.
        ascents: number of climbs in a training step before the loss is computed; one more follows
            from the gradient of the loss.
        particles: size of a pool of source vectors, which are assigned to the samples of a batch
            in turn, at all positions of a sample; if omitted, every sample and position has its
            own vector.
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
            hint="omit it to have no pool",
            particles=self.particles,
        )


class PersistentAdversary:
    """The source vectors of one persistent adversary, with Adam's moments.

    Args:
        settings: how it climbs.
        importances: g of every site, for the shapes.
        generator: draws the initial vectors, the same on all devices.
        rank: index of this device, which holds the vectors of its part of the batch.
        world: number of devices.
        parts: number of micro-batches on a device; this adversary belongs to one of them.
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
        self.first: State = {}
        self.second: State = {}
        for name, g in importances.items():
            g = _at_least_float32(g.detach())
            v = self._draw(g, generator)
            self.vectors[name] = v
            self.first[name] = torch.zeros_like(v)
            self.second[name] = torch.zeros_like(v)
        self._leaves: State = {}
        self._coeff = 1.0

    def _draw(self, g: Float[Tensor, "batch ... C"], generator: torch.Generator | None) -> Tensor:
        """Draw the vectors of a site: [particles, C + 1], or [batch, ..., C + 1] without a pool."""
        batch, *positions, C = g.shape
        width = C + 1  # C components and the delta component
        particles = self.settings.particles
        if particles:
            return uniform(g, (particles, width), generator)
        global_batch = self.world * batch
        shape = (global_batch, *positions, width)
        whole = uniform(g, shape, generator)
        part = self._part(whole, batch)
        return part.clone()  # so that the vectors of the other devices are freed

    def _part(self, whole: Tensor, rows: int) -> Tensor:
        """Return the rows of this device."""
        start = self.rank * rows
        end = start + rows
        return whole[start:end]

    def spread(
        self, vectors: Mapping[str, Tensor], importances: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the vector of every sample and position, [batch, ..., C + 1] (step 1).

        With a pool of K particles, sample b of the global batch uses particle b mod K.
        """
        particles = self.settings.particles
        if not particles:
            return dict(vectors)
        spread = {}
        for name, v in vectors.items():
            g = importances[name]
            batch, *positions, _ = g.shape
            first_sample = self.rank * batch  # every device has `batch` samples
            sample = torch.arange(batch, device=v.device) + first_sample  # [batch]
            particle = sample % particles  # [batch]
            vector = v[particle]  # [batch, C + 1]
            ones = [1] * len(positions)
            vector = vector.view(batch, *ones, -1)  # [batch, 1, ..., C + 1]
            spread[name] = vector.expand(batch, *positions, -1)
        return spread

    def ascend(self, loss: Callable[[Mapping[str, Tensor]], Tensor], progress: float) -> None:
        """Climb a loss, a function of the vectors, several times (step 2).

        Args:
            loss: the scalar to raise.
            progress: fraction of training.
        """
        for _ in range(self.settings.ascents):
            leaves = self._fresh_leaves()
            gradients = _gradients(loss, leaves)
            self._climb(gradients, progress)

    def leaves(self, coeff: float) -> State:
        """Return vectors for the training loss, whose backward pass leaves its gradient in them.

        Args:
            coeff: weight of this adversary's loss in the total; `finish` divides by it.
        """
        self._leaves = self._fresh_leaves()
        self._coeff = coeff
        return self._leaves

    def finish(self, progress: float) -> None:
        """Climb once more, from the gradient that the training loss left behind (step 3)."""
        share = self._coeff / self.parts
        gradients = {}
        for name, leaf in self._leaves.items():
            if leaf.grad is not None:
                gradients[name] = leaf.grad / share
        if gradients:
            self._climb(gradients, progress)
        self._leaves = {}

    def state(self) -> dict[str, State | int]:
        """Return everything that lives on, with the vectors and moments of all devices."""
        return {
            "vectors": self._gather_state(self.vectors),
            "first": self._gather_state(self.first),
            "second": self._gather_state(self.second),
            "updates": self.updates,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; each device takes its part."""
        self.updates = state["updates"]
        current = {"vectors": self.vectors, "first": self.first, "second": self.second}
        for name, tensors in current.items():
            self._copy(state[name], tensors)

    def _copy(self, saved: Mapping[str, Tensor], current: State) -> None:
        """Replace this device's tensors by its part of the saved ones."""
        for name, v in saved.items():
            replaced = current[name]
            if not self.settings.particles:
                v = self._part(v, len(replaced))
            current[name] = v.to(replaced.device, copy=True)

    @property
    def bytes(self) -> int:
        """Memory in bytes that the vectors and moments take."""
        total = 0
        for state in (self.vectors, self.first, self.second):
            for tensor in state.values():
                total += tensor.nbytes
        return total

    def _fresh_leaves(self) -> State:
        """Return copies of the vectors that collect gradients."""
        leaves = {}
        for name, v in self.vectors.items():
            leaf = v.detach().clone()
            leaves[name] = leaf.requires_grad_()
        return leaves

    def _climb(self, gradients: Mapping[str, Tensor], progress: float) -> None:
        """Do one update of Adam, upwards, and clamp to [0, 1].

        Args:
            gradients: of the mean loss over one part of the batch of one device.
            progress: fraction of training.
        """
        beta1, beta2 = self.settings.betas
        lr = self._learning_rate(progress)
        self.updates += 1
        bias1 = 1 - beta1**self.updates  # corrects for moments that start at 0
        bias2 = 1 - beta2**self.updates
        step_size = lr / bias1
        parts = self.world * self.parts  # of the global batch
        for name, gradient in gradients.items():
            g = gradient / parts  # of the mean over the global batch
            if self.settings.particles and self.world > 1:
                torch.distributed.all_reduce(g)
            first = self.first[name]
            first.lerp_(g, 1 - beta1)
            second = self.second[name]
            second.mul_(beta2)
            second.addcmul_(g, g, value=1 - beta2)
            size = second / bias2  # m₂
            size.sqrt_().add_(1e-8)  # √m₂ + 1e-8
            v = self.vectors[name]
            v = v.addcdiv(first, size, value=step_size)
            self.vectors[name] = v.clamp_(0, 1)

    def _learning_rate(self, progress: float) -> float:
        """Return the learning rate at a fraction of training."""
        lr = self.settings.lr
        warmup = self.settings.warmup
        if progress >= warmup:
            return lr
        share = progress / warmup
        return lr * share

    def _gather_state(self, state: State) -> State:
        """Return one state of all devices together."""
        gathered = {}
        for name, v in state.items():
            gathered[name] = self._gather(v)
        return gathered

    def _gather(self, v: Tensor) -> Tensor:
        """Return the tensor of all devices together."""
        if self.settings.particles:
            return v.clone()  # all devices have the same pool
        if self.world == 1:
            return v.clone()
        parts = [torch.empty_like(v) for _ in range(self.world)]
        torch.distributed.all_gather(parts, v)
        return torch.cat(parts)
